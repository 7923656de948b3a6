"""What the README shows must run as it stands."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_python_example_makes_a_video_and_takes_it_apart(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "circle.mp4").stat().st_size > 0
    assert names["video"].shape == (1, 32, 64, 64, 3)
    assert names["tokens"].shape[0] == 3
    assert names["again"].shape == names["video"].shape[1:]


def test_commands_of_the_readme_name_files_that_exist():
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:configs|scripts|docs|dicode_jax)/[\w/.-]+\w", text)
    assert len(paths) > 5
    missing = [path for path in paths if not (README.parent / path).exists()]
    assert not missing
