"""What the README shows must run as it stands."""

import dataclasses
import pathlib
import re
import tomllib

import pytest
from documented import PAGES

import dicode_jax
from dicode_jax.media.video import read_video

README = pathlib.Path(__file__).parents[1] / "README.md"


def in_two_steps(load=dicode_jax.load):
    pipe = load()
    sampling = dataclasses.replace(pipe.config.sampling, num_inference_steps=2)
    pipe.config = dataclasses.replace(pipe.config, sampling=sampling)
    return pipe


@pytest.mark.slow
def test_python_example_makes_a_video_and_takes_it_apart(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    first, picture, batch, long = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "num_clips=1800" in long
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dicode_jax, "load", in_two_steps)
    names = {}
    exec(compile(first + picture, "README.md", "exec"), names)
    assert names["video"].shape == (1, 32, 64, 64, 3)
    lengths = {"circle": 32, "from_picture": 16, "between": 16, "longer": 48}
    for name, length in lengths.items():
        assert len(read_video(tmp_path / f"{name}.mp4")) == length
    exec(compile(batch, "README.md", "exec"), names)
    assert names["frames"].shape == (4, 16, 64, 64, 3)
    assert names["tokens"].shape[0] == 3
    assert names["again"].shape == (32, 64, 64, 3)
    exec(compile(long.replace("1800", "2"), "README.md", "exec"), {})
    assert len(read_video(tmp_path / "hour.mp4").frames) == 32


def test_files_that_the_pages_name_exist():
    folders = "benchmarks|configs|convert|dicode_jax|docs|scripts|tests|train"
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w", page.read_text("utf-8"))
    }
    assert len(named) > 40
    missing = [(page, path) for page, path in named if not (README.parent / path).exists()]
    assert not [(page, path) for page, path in missing if "NAME" not in path]


def test_the_readme_names_all_extras():
    extras = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    line = README.read_text().split("Extras: ")[1].split(".\n")[0]
    assert set(re.findall(r"`(\w+)`", line)) == set(extras["optional-dependencies"])
