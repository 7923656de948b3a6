"""The tiny pipelines on one device and on several: run in a process of its own.

python tests/sharded_painting.py [landiff]

What it found is the line that starts with REPORT, as in `sharded_training.py`.
"""

import json
import os
import re
import sys

COLLECTIVE = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+"
PROMPTS = [
    "a red circle moves right on a black background",
    "a blue cross grows on a gray background",
]
FEWER = {
    "sampler": "unipc",
    "num_inference_steps": 5,
    "guidance_scale": 2.0,
    "guidance_interval": (0.2, 0.6),
    "deep_cache_interval": 2,
}


def compare() -> dict:
    """Tokens and frames of eight devices beside those of one; what devices tell each other."""
    import jax
    import numpy as np
    import tiny
    import tiny_ar_diffusion

    from dicode_jax.models.dicode import generate
    from dicode_jax.pipelines import ar_diffusion, dicode

    texts = {}

    def keep_text(module, name):
        given = getattr(module, name)
        run = given.advance if name == "PIXELS" else given

        def called(*args, **options):
            is_split = any(isinstance(x, jax.sharding.Mesh) for x in (*args, *options.values()))
            sampler = getattr(options.get("shared", (None,))[0], "sampler", "")
            if is_split and (key := f"{name} {sampler}".strip()) not in texts:
                texts[key] = run.lower(*args, **options).compile().as_text()
            return run(*args, **options)

        setattr(module, name, given._replace(advance=called) if name == "PIXELS" else called)

    pipe, found = tiny.tiny_pipeline(), {}
    rolled, rolling = {}, tiny_ar_diffusion.make(spread=0.1)
    for module, name in (
        (generate, "_begin"),
        (generate, "_go_on"),
        (dicode, "PIXELS"),
        (ar_diffusion, "_advance"),
    ):
        keep_text(module, name)
    for count, at_once in ((1, 3), (8, 2)):
        pipe.devices = jax.devices()[:count]
        tokens = pipe.generate_tokens(PROMPTS * 2, num_clips=2, seed=3)
        frames = pipe.decode(tokens, seed=3, clips_per_batch=at_once).astype(int)
        fewer = pipe.decode(tokens, seed=3, clips_per_batch=at_once, **FEWER).astype(int)
        found[count] = tokens, frames, fewer
        rolling.devices = pipe.devices
        made = rolling([0, 1, 2] * 3, seed=3, num_frames=6, clips_per_batch=at_once)
        rolled[count] = np.asarray(made, int)
    alone = [pipe.generate_tokens(x, num_clips=2, seed=3 + i)[0] for i, x in enumerate(PROMPTS)]
    return split_part() | {
        "devices": jax.device_count(),
        "equal_tokens": bool(np.array_equal(found[8][0], found[1][0])),
        "equal_alone": bool(np.array_equal(found[8][0][:2], np.stack(alone))),
        "levels": [int(np.abs(found[8][i] - found[1][i]).max()) for i in (1, 2)],
        "spread": [float(found[8][i].std()) for i in (1, 2)],
        "between": float(np.abs(found[8][1] - found[8][2]).mean()),
        "rolled_levels": int(np.abs(rolled[8] - rolled[1]).max()),
        "rolled_shape": rolled[8].shape,
        "partitions": {
            name: int(re.search(r"num_partitions=(\d+)", text)[1]) for name, text in texts.items()
        },
        "without_loop": [name for name, text in texts.items() if " while(" not in text],
        "collectives": sorted({x for text in texts.values() for x in re.findall(COLLECTIVE, text)}),
    }


def split_part() -> dict:
    """One part of LanDiff, split over four devices, beside itself on one."""
    import jax
    import numpy as np
    import tiny_landiff_pipeline
    from flax import nnx
    from tiny import random_module

    from dicode_jax.models.landiff import programs
    from dicode_jax.models.t5 import T5Encoder
    from dicode_jax.nn.rngs import ShapeRngs
    from dicode_jax.pipelines import shelf

    cfg, ids = tiny_landiff_pipeline.TEXT, np.asarray([[3, 1, 4, 1, 5, 9]], np.int32)
    whole = random_module(lambda: T5Encoder(cfg, rngs=ShapeRngs()))
    split = shelf.spread(whole, jax.devices()[:4], min_size=16)
    made = [np.asarray(programs.embed_text(*nnx.split(x), ids, None)) for x in (whole, split)]
    leaves = jax.tree.leaves(nnx.state(split))
    return {
        "part_error": float(np.abs(made[1] - made[0]).max()),
        "part_spread": float(made[0].std()),
        "part_split": sum(not leaf.sharding.is_fully_replicated for leaf in leaves),
    }


def compare_landiff() -> dict:
    """The same of LanDiff, whose parts are split where those of the others are copied.

    Every array of 16 numbers or more is split, where a real model's has 65,536.
    """
    import functools
    import tempfile

    import jax
    import numpy as np
    import tiny_landiff_pipeline
    from flax import nnx

    from dicode_jax.models.landiff import engine
    from dicode_jax.pipelines import shelf
    from dicode_jax.pipelines.landiff import LanDiffPipeline

    tokens, found, write = [], {}, engine.write_segments

    def written(*args, **options):
        for codes in write(*args, **options):
            tokens.append(np.asarray(codes))
            yield codes

    engine.write_segments = written
    shelf.spread = functools.partial(shelf.spread, min_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tiny_landiff_pipeline.make().save_pretrained(folder)
        for count in (1, 4):
            pipe = LanDiffPipeline.from_pretrained(folder, devices=jax.devices()[:count])
            made = pipe(PROMPTS[0], num_clips=2, seed=3)
            found[count] = np.concatenate(tokens, axis=1), np.asarray(made, int)
            tokens.clear()
    split = {
        name: sum(
            not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(part))
        )
        for name, part in pipe.parts.items()
    }
    return {
        "devices": jax.device_count(),
        "tokens": [codes.ravel().tolist() for codes, _ in found.values()],
        "shape": found[4][1].shape,
        "level": int(np.abs(found[4][1] - found[1][1]).max()),
        "spread": float(found[1][1].std()),
        "split": split,
    }


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    found = compare_landiff() if "landiff" in sys.argv[1:] else compare()
    sys.stdout.write(f"\nREPORT {json.dumps(found)}\n")
