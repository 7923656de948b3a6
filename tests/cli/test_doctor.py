"""`dicode doctor`, and the packaged models as they were packaged."""

import shutil
import types

import pytest

from dicode_jax import cli
from dicode_jax.cli import doctor
from dicode_jax.media import video
from dicode_jax.storage import packaged

EXTRAS = ["[convert]", "[data]", "[wandb]", "[app]", "[bench]", "[test]", "[docs]"]
CHECKS = ["version", "packages", *EXTRAS, "devices", "memory", "video", "cache", "models", "hub"]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The packaged models, in a place where they can be damaged."""
    source = packaged.models()["shapes"]
    shutil.copytree(source, tmp_path / source.name)
    shutil.copy(source.parent / packaged.SUMS_FILE, tmp_path)
    monkeypatch.setattr(packaged, "models", lambda: {source.name: tmp_path / source.name})
    return tmp_path / source.name


def run(capsys, *argv):
    """Exit status, lines by their first word, and the error."""
    status = cli.main(["doctor", *argv])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == CHECKS
    return status, {line.split()[0]: line[17:] for line in lines}, err


def session(monkeypatch, head):
    monkeypatch.setattr(
        "huggingface_hub.utils.get_session", lambda: types.SimpleNamespace(head=head)
    )


def test_what_works_is_said_and_nobody_is_asked(capsys, monkeypatch):
    session(monkeypatch, None)
    status, said, err = run(capsys)
    assert (status, err) == (0, "")
    assert "x cpu (cpu)" in said["devices"]
    assert said["video"] == ".mp4, .gif, .webp are written and read"
    counts = {"ar-shapes": 5, "landiff-shapes": 17, "shapes": 8, "shapes_features": 2}
    wanted = [f"{name} ({count} files as packaged)" for name, count in counts.items()]
    assert said["models"] == ", ".join(wanted)
    assert "not asked" in said["hub"]


@pytest.mark.long
def test_a_flipped_bit_of_a_packaged_model_is_found(capsys, copy):
    assert cli.main(["info"]) == 0
    assert "verified         8 files" in capsys.readouterr().out
    for name in ("decoder/model.safetensors", "text/tokenizer.json", "tokenizer/config.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        status, said, err = run(capsys)
        damaged = f"the packaged model shapes is damaged: shapes/{name} is not as it was packaged"
        assert damaged in said["models"]
        assert (status, err) == (2, "dicode: error: models: see above\n")
        assert cli.main(["info", str(copy)]) == 2
        assert damaged in capsys.readouterr().err
        (copy / name).unlink()
        assert damaged in run(capsys)[1]["models"]
        (copy / name).write_bytes(whole)
    assert run(capsys)[0] == 0


def test_a_model_of_the_users_own_is_not_verified(capsys, copy, tmp_path):
    shutil.copytree(copy, tmp_path / "mine")
    assert cli.main(["info", str(tmp_path / "mine")]) == 0
    assert "verified" not in capsys.readouterr().out


def test_every_file_of_a_packaged_model_is_listed():
    root = packaged.models()["shapes"].parent
    listed = {line.split("  ")[1] for line in (root / packaged.SUMS_FILE).read_text().splitlines()}
    there = {str(path.relative_to(root)) for kind in ("json", "safetensors")
             for path in root.rglob(f"*.{kind}")}  # fmt: skip
    assert listed == there


def test_what_does_not_work_is_named_and_the_rest_still_looked_at(capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("no encoder\nfor \x1b[2Jh264")

    monkeypatch.setattr(video, "write_video", fail)
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: "17.9" if n == "av" else installed(n))
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["av>=18.1", 'x; extra == "y"'])
    status, said, err = run(capsys)
    assert status == 2
    assert said["video"] == "does not work: no encoder for \\x1b[2Jh264"
    assert said["packages"] == "does not work: av is 17.9, want 18.1 or later"
    assert err == "dicode: error: packages, video: see above\n"


def test_each_extra_says_what_it_has_or_what_does_not_go_without_it(capsys, monkeypatch):
    wants = ["numpy>=2.0", "torch>=2.10; extra == 'convert'", 'pyyaml>=6; extra == "convert"']
    wants += ['scenedetect-headless>=0.7; extra == "data"', "jax[cuda12]; extra == 'cuda'"]
    wants += ['pyright[nodejs]==1.1.414; extra == "test"', 'ruff~=0.17.5; extra == "test"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wants)
    has = {"torch": "2.9.1+cpu", "pyyaml": "6.0.4", "pyright": "1.1.414", "ruff": "0.17.6"}
    installed = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda n: installed(n) if n == "numpy" else has.get(n, "")
    )
    status, said, _ = run(capsys)
    assert status == 0  # an extra is no must
    assert said["[convert]"] == (
        "without torch is 2.9.1+cpu, want 2.10: no reading of PyTorch's checkpoints and CLIP's "
        'vocabulary; pip install "dicode-jax[convert]"'
    )
    assert said["[data]"].startswith("without scenedetect-headless: no `dicode data cut` and")
    assert said["[test]"] == "pyright 1.1.414, ruff 0.17.6"
    assert said["[wandb]"] == "not known to this install; is for metrics to Weights & Biases"


def test_the_cache_says_how_much_it_holds(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    (tmp_path / "program").write_bytes(b"1" * 10**7)
    assert doctor._cache() == f"{tmp_path}, by JAX_COMPILATION_CACHE_DIR; 1 files, 0.01 GB"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "none"))
    assert doctor._cache().endswith("; empty")


def test_the_hub_is_asked_only_when_told_to(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    session(monkeypatch, lambda url, timeout: types.SimpleNamespace(status_code=200))
    assert run(capsys, "--network")[1]["hub"].endswith(" answers")

    def unreachable(url, timeout):
        raise ConnectionError("nobody there")

    session(monkeypatch, unreachable)
    status, said, _ = run(capsys, "--network")
    assert (status, said["hub"]) == (2, "does not work: nobody there")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, said, _ = run(capsys, "--network")
    assert status == 0
    assert "offline" in said["hub"]
