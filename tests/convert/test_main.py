"""`python -m convert NAME`: one door to the commands that `python -m convert.NAME` opens too."""

import contextlib
import importlib
import json
import subprocess
import sys

import pytest
from safetensors.numpy import save_file
from tiny_clip import CONFIG, checkpoint

from convert.__main__ import COMMANDS, main


def test_alone_it_lists_every_command_with_a_line(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS)
    assert all(len(line.split()) > 3 for line in lines[2:])


def test_an_unknown_name_gets_the_nearest(capsys):
    assert main(["dynamicraft", "x", "--out", "y"]) == 2
    assert capsys.readouterr().err == (
        "python -m convert: error: there is no 'dynamicraft', nearest is dynamicrafter\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_under_its_name(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m convert.{name} ")
    assert text.partition("positional arguments:")[2].split()[0] == "SOURCE"
    assert "--out" in text
    assert not any(alias in text for alias in ("--ckpt", "--models"))
    assert importlib.util.find_spec(f"convert.{name}"), "python -m convert.NAME has to stay"


@pytest.mark.parametrize(
    ("name", "option"), [("dicode", "--models"), ("dynamicrafter", "--ckpt"), ("divot", "--ckpt")]
)
def test_the_source_comes_first_or_under_its_option(name, option, tmp_path, capsys):
    source, out = str(tmp_path / "nowhere"), ["--out", str(tmp_path / "out")]
    for given in ([source], [option, source]):
        assert main([name, *given, *out]) == 2
        assert source in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([name, source, option, source, *out])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_source_it_is_asked_for(name, tmp_path, capsys):
    with contextlib.suppress(SystemExit):
        assert main([name, "--out", str(tmp_path / "out")]) == 2
    assert "SOURCE" in capsys.readouterr().err.splitlines()[-1]


def test_both_doors_lead_to_the_same_model(tmp_path):
    save_file(checkpoint(CONFIG), tmp_path / "clip.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    args = [str(tmp_path / "clip.safetensors"), "--config", str(tmp_path / "config.json"), "--out"]
    assert main(["open_clip", *args, str(tmp_path / "a")]) == 0
    module = [sys.executable, "-m", "convert.open_clip", *args, str(tmp_path / "b")]
    subprocess.run(module, check=True, capture_output=True)
    for name in ("model.safetensors", "config.json", "conversion.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
