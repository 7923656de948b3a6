"""The T5 encoder. Bounds are those of the README beside the fixture."""

import re

import jax.numpy as jnp
import numpy as np

from convert import from_torch
from dicode_jax.models.t5 import relative_buckets
from parity.harness import Check, runner
from parity.runners.gpt2 import HIDDEN, require_all


@runner("text_and_vision/t5_encoder")
def run_t5(fixture):
    arrays, done = fixture.arrays, set()
    model = from_torch("t5", fixture.sibling("weights.safetensors"), fixture.config["model"])

    def check(name, got, **bound):
        done.add(name)
        return Check(name, np.asarray(got), arrays[name], **bound)

    for name in sorted(arrays):
        if not (match := re.fullmatch(r"out\.(\w+)\.hidden", name)):
            continue
        case = {k.split(".")[-1]: v for k, v in arrays.items() if k.startswith(f"in.{match[1]}.")}
        x = case["embeds"] if "embeds" in case else model.embed_tokens(jnp.asarray(case["ids"]))
        valid = jnp.asarray(case["mask"].astype(bool)) if "mask" in case else None
        yield check(name, model(jnp.asarray(x), valid), **HIDDEN)

    x = model.embed_tokens(jnp.asarray(arrays["in.plain.ids"]))
    bias = model.bias(x.shape[1])
    yield check("mid.position_bias_13", bias, **HIDDEN)
    for i, block in enumerate(model.blocks):
        attended, _ = block.attn(block.attn_norm(x), bias=bias)
        fed = block.mlp(block.mlp_norm(x + attended))
        x = x + attended + fed
        got = {"": x, ".attn": attended, ".ff": fed}
        for part, value in got.items():
            if (name := f"mid.plain.block{i}{part}") in arrays:
                yield check(name, value, **HIDDEN)
    cfg = model.cfg
    offsets = arrays["bucket.relative_position"]
    done.add("bucket.relative_position")
    buckets = relative_buckets(offsets, cfg.num_buckets, cfg.max_distance)
    yield check("bucket.bucket", buckets, exact=True)
    require_all([k for k in arrays if not k.startswith("in.")], done)
