"""How runs of several sizes are read and held beside each other, with a pipeline that draws."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation import accuracy
from scripts import scale_language_models as scaling


class Pipe:
    """Draws what captions say, but for as many of the clips as have a seed below `wrong`."""

    def __init__(self, size, wrong):
        self.parts = {"language_model": nnx.Dict(kernel=nnx.Param(jnp.zeros((2, size))))}
        self.wrong = wrong

    def __call__(self, captions, *, seed, num_inference_steps, progress):
        assert (num_inference_steps, progress) == (7, False)
        known = dict(zip(accuracy.seeds(10), accuracy.scenes(10)))
        clips = [shapes_world.render(known[one])[0] for one in seed]
        assert captions == [known[one].caption for one in seed]
        return np.stack(
            [0 * c if one < accuracy.seeds(1)[0] + self.wrong else c for c, one in zip(clips, seed)]
        )


def write_run(folder, losses, num_steps=40):
    folder.mkdir()
    rows = [{"step": i, "loss": 9.0, "validation_loss": x} for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"kind": "ar_training", "num_steps": num_steps}
    (folder / "config.json").write_text(json.dumps(told))


def test_runs_are_read_and_shown_by_size(tmp_path, monkeypatch, capsys):
    pipes = {"large": Pipe(50, 0), "small": Pipe(5, 6)}
    asked = []
    monkeypatch.setattr(scaling, "export", lambda run, out, settings: asked.append(run.name))
    monkeypatch.setattr(scaling.dicode_jax, "load", lambda folder: pipes[asked[-1]])
    write_run(tmp_path / "large", [3.0, 1.5])
    write_run(tmp_path / "small", [3.0, 2.0])
    runs, out = [str(tmp_path / name) for name in ("large", "small")], tmp_path / "found.json"
    plot = tmp_path / "plot.png"
    scaling.main([*runs, "--num", "10", "--steps", "7", "--out", f"{out}", "--plot", f"{plot}"])
    small, large = json.loads(out.read_text())
    assert (small["parameters"], small["loss"], small["steps"]) == (10, 2.0, 40)
    assert (large["parameters"], large["loss"]) == (100, 1.5)
    assert (small["accuracy"]["all"][0], large["accuracy"]["all"][0]) == (0.4, 1.0)
    assert "| 100 | 1.500 |" in capsys.readouterr().out
    assert Image.open(plot).width > 500


def test_runs_that_do_not_compare_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "export", lambda run, out, settings: None)
    monkeypatch.setattr(scaling.dicode_jax, "load", lambda folder: Pipe(5, 0))
    write_run(tmp_path / "a", [3.0])
    write_run(tmp_path / "b", [3.0], num_steps=50)
    write_run(tmp_path / "c", [])
    words = ["--num", "2", "--steps", "7", "--out", str(tmp_path / "x.json")]
    with pytest.raises(UserError, match="different numbers of steps"):
        scaling.main([str(tmp_path / "a"), str(tmp_path / "b"), *words])
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'c'} is no run")):
        scaling.main([str(tmp_path / "c"), *words])
    assert not (tmp_path / "x.json").exists()
