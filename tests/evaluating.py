"""A model that paints what it is told, and the command `dicode evaluate` run with it."""

import itertools
import json
import pathlib
import types

import numpy as np
import pytest

from dicode_jax import cli
from dicode_jax.cli import video
from dicode_jax.data import shapes_world
from dicode_jax.evaluation import accuracy, report


class Painter:
    """Paints what the captions say, but grey for the last; from keyframes with an error of 10."""

    def __init__(self, kind="dicode", num=3):
        self.kind, self.calls = kind, []
        self.scenes = {scene.caption: scene for scene in accuracy.scenes(num, 2)}
        self.last = [*self.scenes][-1]
        sampling = types.SimpleNamespace(num_frames=16)
        names = tuple(self.scenes) if kind == "ar_diffusion" else None
        self.config = types.SimpleNamespace(
            sampling=sampling, frame_size=64, class_names=names, fps=8.0
        )
        cfg = types.SimpleNamespace(image_size=64, num_tokens=8, token_dim=8)
        self.parts = {"vae": types.SimpleNamespace(cfg=cfg)}

    def __call__(self, prompts, *, num_clips=1, **options):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self.calls.append((prompts, options))
        length = options.get("num_frames", 16 * num_clips) // 16
        drawn = {p: shapes_world.render(self.scenes[p], length) for p in prompts}
        return np.stack(
            [np.full_like(x, 110) if p == self.last else x for p, x in drawn.items()]
        ).reshape(len(prompts), -1, 64, 64, 3)

    def encode(self, clip):
        return clip

    def decode(self, tokens, **options):
        self.calls.append((len(tokens), options))
        return np.where(tokens < 128, tokens + 10, tokens - 10).astype(np.uint8)

    def reconstruct(self, clip):
        return np.where(clip < 128, clip + 10, clip - 10).astype(np.uint8)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with a painter; gives its status and what it found."""
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw", lambda plot, path: None)  # tests/evaluation draws

    def run(painter, *words, out="found"):
        monkeypatch.setattr(video, "find", lambda args, *kinds: (folder, painter.kind))
        monkeypatch.setattr(video, "load", lambda args, folder: painter)
        seed = [] if "--videos" in words else ["--seed", "2"]
        status = cli.main(["evaluate", *map(str, words), "--out", out, *seed])
        found = pathlib.Path(out, "results.json") if len(out) < 256 else pathlib.Path("none")
        suite = next((w for o, w in itertools.pairwise(words) if o == "--suite"), "shapes")
        return status, json.loads(found.read_text()).get(suite) if found.exists() else None

    return run


def means(found):
    return {k: v["mean"] if isinstance(v, dict) else v for k, v in found["values"].items()}


def listed(path, *prompts):
    path.write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    return path
