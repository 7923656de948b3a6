"""Llama, and the rotary tables of its head sizes. Bounds are those of the README beside it."""

import re

import jax.numpy as jnp
import numpy as np

from convert import from_torch
from convert.parts import llama
from dicode_jax.nn.masks import causal_mask
from dicode_jax.nn.rotary import rotary_frequencies, rotary_tables
from parity.harness import Check, runner
from parity.runners.gpt2 import HIDDEN, greedy, lm_cached, lm_case, lm_gradients, require_all

FAR = {"atol": 3e-4}
FREQUENCY = {"rtol": 2e-6}
NEAR_ANGLE, FAR_ANGLE = {"atol": 5e-5}, {"atol": 1e-3}  # below position 512, up to 8191


@runner("text_and_vision/llama")
def run_llama(fixture):
    arrays, config, done = fixture.arrays, fixture.config, set()
    weights = fixture.sibling("weights.safetensors")
    model = from_torch("llama", weights, config["model"])
    inputs = {k.removeprefix("in."): jnp.asarray(v) for k, v in arrays.items() if k[:3] == "in."}
    inputs |= {k: v.astype(bool) for k, v in inputs.items() if k.startswith("mask_")}

    def check(name, got, bound, where=None):
        done.add(name)
        got = np.asarray(got)
        if where is not None:
            got = np.where(np.asarray(where)[..., None], got, 0)
        return Check(name, got, arrays[name], **bound)

    for name in sorted(arrays):
        match = re.fullmatch(r"out\.([a-z_]+)\.hidden", name)
        if match and match[1] != "positions_far":
            yield from lm_case(model, match[1], inputs, arrays, check)
    far, _ = model(inputs["embeds"], inputs["positions_far"])
    yield check("out.positions_far.hidden", far, FAR)
    yield from intermediates(model, inputs, arrays, check)
    yield from lm_cached(model, config, inputs, arrays, check)
    yield from lm_gradients(model, llama.rules(model.cfg), inputs, arrays, done)
    want = arrays["out.greedy.ids"]
    prompt = jnp.asarray(want[:, : config["greedy_prompt"]])
    got = greedy(model, prompt, want.shape[1] - prompt.shape[1])
    done.add("out.greedy.ids")
    yield Check("out.greedy.ids", np.asarray(got), want, exact=True)
    yield from rope(model.cfg, arrays, done)
    require_all([k for k in arrays if not k.startswith("in.")], done)


def intermediates(model, inputs, arrays, check):
    cfg, ids = model.cfg, inputs["ids"]
    frequencies = rotary_frequencies(
        cfg.width_of_head, theta=cfg.rope_theta, scaling=cfg.rope_scaling
    )
    rotary = rotary_tables(jnp.arange(ids.shape[1])[None], frequencies)
    x = model.embed_tokens(ids)
    got = {"mid.ids.embed": x, "out.ids.hf_hidden_states.0": x}
    mask = causal_mask(ids.shape[1])
    for i, block in enumerate(model.blocks):
        name = f"mid.ids.layer{i}"
        normed = got[f"{name}.input_layernorm"] = block.attn_norm(x)
        got |= {f"{name}.{k}_proj": getattr(block.attn, k)(normed) for k in "qkv"}
        got[f"{name}.self_attn"] = block.attn(normed, mask, rotary=rotary)[0]
        x = x + got[f"{name}.self_attn"]
        got[f"{name}.mlp"] = block.mlp(block.mlp_norm(x))
        x = x + got[f"{name}.mlp"]
        got[name] = got[f"out.ids.hf_hidden_states.{i + 1}"] = x
    last = model.final_norm(x)
    got["mid.ids.norm"] = got[f"out.ids.hf_hidden_states.{len(model.blocks)}"] = last
    for name, value in got.items():
        if name in arrays:
            yield check(name, value, HIDDEN)


def rope(cfg, arrays, done):
    positions = arrays["rope.positions"]
    near = positions < 512
    done.add("rope.positions")
    for name in sorted(arrays):
        if not (match := re.fullmatch(r"rope\.hd(\d+)\.inv_freq", name)):
            continue
        head = f"rope.hd{match[1]}"
        frequencies = rotary_frequencies(
            int(match[1]), theta=cfg.rope_theta, scaling=cfg.rope_scaling
        )
        yield Check(name, frequencies, arrays[name], **FREQUENCY)
        tables = rotary_tables(jnp.asarray(positions)[None], frequencies)
        for part, table in zip(("cos", "sin"), tables, strict=True):
            got, want = np.concatenate([table[0]] * 2, axis=-1), arrays[f"{head}.{part}"]
            yield Check(f"{head}.{part}[:512]", got[near], want[near], **NEAR_ANGLE)
            yield Check(f"{head}.{part}", got, want, **FAR_ANGLE)
            done.add(f"{head}.{part}")
        done.add(name)
