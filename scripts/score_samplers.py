"""Scores ways of sampling on the shapes world: how near, how good and how fast.

    python scripts/score_samplers.py --num-clips 64 --out samplers.json

Unseen clips are encoded, and painted again from their own keyframes' tokens in each of `WAYS`, all
from the same noise. The table has, with 95 % intervals from a bootstrap over clips, PSNR and SSIM
to the first way's clips (the model's own settings), to those of DDIM without fresh noise, and to
the true ones; the share in which `evaluation.shapes` reads what the caption says; network calls and
seconds of a clip. A call of the shallow part alone (DeepCache) is counted apart.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.diffusion.guided import SamplingConfig, make_grid, plan_turns
from dicode_jax.errors import UserError
from dicode_jax.evaluation import shapes
from dicode_jax.evaluation.intervals import interval
from dicode_jax.evaluation.quality import psnr, ssim
from dicode_jax.pipelines import options
from dicode_jax.pipelines.dicode import DiCoDePipeline
from dicode_jax.storage.files import atomic_path, check_output

TRAILING = {"eta": 0.0, "spacing": "uniform_trailing"}


def _way(sampler: str, steps: int, **changes) -> dict:
    return {"sampler": sampler, "num_inference_steps": steps, **TRAILING, **changes}


GUIDED = {"guidance_scale": 2.0}
WAYS = {
    "own": {},
    "ddim 50": {"num_inference_steps": 50, "eta": 0.0},
    **{name: dict(options.QUALITIES[name]) for name in ("draft", "best")},
    **{f"ddim {n}": _way("ddim", n) for n in (20, 4)},
    **{f"dpm++ {n}": _way("dpm++", n) for n in (20, 10)},
    **{f"unipc {n}": _way("unipc", n) for n in (20, 10, 8, 4)},
    **{f"own {n}": {"num_inference_steps": n} for n in (20, 10, 4)},
    **{f"unipc 20, cache {n}": _way("unipc", 20, deep_cache_interval=n) for n in (2, 3)},
    **{f"ddim 10, cache {n}": _way("ddim", 10, deep_cache_interval=n) for n in (2, 3)},
    "own, cache 3": {"deep_cache_interval": 3},
    "guided unipc 20": _way("unipc", 20, **GUIDED),
    "guided unipc 20, 0.2 to 0.7": _way("unipc", 20, guidance_interval=(0.2, 0.7), **GUIDED),
    "guided unipc 20, 0 to 0.5": _way("unipc", 20, guidance_interval=(0.0, 0.5), **GUIDED),
}
"""Name -> changes of the model's sampling settings."""
NEAR = ("own", "ddim 50")


def _bounds(values: Sequence[float]) -> list[float]:
    """Mean and the ends of its 95 % interval."""
    return list(dataclasses.astuple(interval(values))[:3])


def calls(cfg: SamplingConfig, schedule) -> dict[str, int]:
    """Evaluations of the whole network and of its shallow part for one clip, branches apart."""
    branches = 2 if cfg.is_guided else 1
    turns = plan_turns(cfg, len(make_grid(schedule, cfg)) - 1, branches)
    whole = sum(turn.num_branches for turn in turns if turn.is_whole)
    return {"calls": whole, "shallow_calls": sum(turn.num_branches for turn in turns) - whole}


def score(pipe: DiCoDePipeline, scenes: list, ways: dict, seed: int, say: Callable) -> dict:
    """Numbers of each way; each is said as soon as it is known.

    Args:
      pipe: Encodes and decodes; its sampling settings are changed and put back.
      scenes: Of `data.shapes_world`.
      ways: Name -> changes of the settings.
      seed: Of the noise; clip i has `seed + i`.
      say: Called with all numbers so far.
    """
    true = np.stack([synthetic.render(scene)[0] for scene in scenes])
    tokens = np.stack([pipe.encode(clip) for clip in true])
    own, painted, found = pipe.config, {}, {}
    for name, changes in ways.items():
        sampling = dataclasses.replace(own.sampling, **changes)
        pipe.config = dataclasses.replace(own, sampling=sampling)
        pipe.decode(tokens[:2], seed=seed)  # compiles
        start = time.perf_counter()
        clips = pipe.decode(tokens, seed=seed)
        took = time.perf_counter() - start
        if clips.shape != true.shape:
            raise UserError(f"clips are {true.shape[1:]} here, not {clips.shape[1:]}")
        painted[name] = clips if name in NEAR else None
        row = {"settings": changes, **calls(sampling, pipe.decoder.cfg.schedule)}
        row["seconds"] = took / len(scenes)
        for other, others in (*((near, painted.get(near)) for near in NEAR), ("true", true)):
            if others is None or other == name:
                continue
            for measure in (psnr, ssim):
                each = [measure(a[None], b[None]) for a, b in zip(others, clips, strict=True)]
                row[f"{measure.__name__} to {other}"] = _bounds(each)
        matches = [
            shapes.judge(clip).matches(s.attributes) for s, clip in zip(scenes, clips, strict=True)
        ]
        fields = ("shape", "color", "motion", "background")
        for field in fields:
            row[field] = _bounds([match[field] for match in matches])
        row["all"] = _bounds([all(m[f] for f in fields) for m in matches])
        found[name] = row
        say(found)
    pipe.config = own
    return found


def table(found: dict) -> str:
    """The numbers as rows of Markdown."""
    columns = (*(f"{m} to {o}" for o in (*NEAR, "true") for m in ("psnr", "ssim")), "motion", "all")
    lines = [
        "| " + " | ".join(("", "calls", "s", *columns)) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, row in found.items():
        shallow = f" + {row['shallow_calls']}" if row["shallow_calls"] else ""
        cells = [name, f"{row['calls']}{shallow}", f"{row['seconds']:.2f}"]
        for column in columns:
            digits = 1 if column.startswith("psnr") else 3
            cells.append(_cell(row.get(column), digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float] | None, digits: int) -> str:
    if values is None:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a pipeline's folder; the packaged model by default")
    parser.add_argument("--num-clips", type=int, default=64, help="of the test split")
    parser.add_argument("--seed", type=int, default=0, help="of clips and noise")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help="some alone")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .json of all numbers")
    args = parser.parse_args(argv)
    if args.num_clips < 1:
        raise UserError("--num-clips must be at least 1")
    check_output(args.out, (".json",))
    pipe = DiCoDePipeline.from_pretrained(args.model)
    scenes = [synthetic.scene_at(args.seed + 1000, i, "test") for i in range(args.num_clips)]

    def say(found: dict) -> None:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps({"num_clips": args.num_clips, "ways": found}, indent=1))
        print(table(found).splitlines()[-1], flush=True)

    names = args.ways or list(WAYS)
    if args.ways is None and pipe.decoder.cfg.latent_prior is not None:  # which takes no guidance
        names = [name for name in names if "guidance_scale" not in WAYS[name]]
    ways = {name: WAYS[name] for name in names}
    print(table(score(pipe, scenes, ways, args.seed, say)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
