"""GPT-2 and the mixture head.

Bounds are those of the READMEs beside the fixtures.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import from_torch
from convert.engine.plan import flatten, plan
from convert.parts import gpt2
from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.nn.masks import causal_mask, key_mask, positions_from_valid
from parity.harness import Check, LeftOut, runner

HIDDEN = {"atol": 5e-5}
LOGITS = {"atol": 1e-4}
GRADIENT = {"atol": 1e-5}


def require_all(names, done):
    """No array of a fixture may be left out silently."""
    left = sorted(set(names) - set(done))
    assert not left, f"the runner compares nothing with {', '.join(left)}"


def by_original_key(grads, rules, arrays):
    """(original key, our gradient, the original's in our layout) for the given original arrays."""
    converted = plan(arrays, rules, grads)
    assert not converted.unused, converted.unused
    assert not converted.mismatched, converted.mismatched
    ours = flatten(grads)
    for path, key in converted.sources.items():
        yield key, np.asarray(ours[path][...]), converted.array(path)


# --- text_and_vision/gpt2


@runner("text_and_vision/gpt2")
def run_gpt2(fixture):
    arrays, config, done = fixture.arrays, fixture.config, set()
    weights = fixture.sibling("weights.safetensors")
    model = from_torch("gpt2", weights, config["model"])
    inputs = {k.removeprefix("in."): jnp.asarray(v) for k, v in arrays.items() if k[:3] == "in."}
    inputs |= {k: v.astype(bool) for k, v in inputs.items() if k.startswith("mask_")}

    def check(name, got, bound, where=None):
        done.add(name)
        got = np.asarray(got)
        if where is not None:
            got = np.where(np.asarray(where)[..., None], got, 0)
        return Check(name, got, arrays[name], **bound)

    for name in sorted(arrays):
        if match := re.fullmatch(r"out\.([a-z_]+)\.hidden", name):
            yield from lm_case(model, match[1], inputs, arrays, check)
    yield from gpt2_intermediates(model, inputs, arrays, check)
    yield from lm_cached(model, config, inputs, arrays, check)
    yield from lm_gradients(model, gpt2.RULES, inputs, arrays, done)

    want = arrays["out.greedy.ids"]
    prompt = jnp.asarray(want[:, : config["greedy_prompt"]])
    got = greedy(model, prompt, want.shape[1] - prompt.shape[1])
    done.add("out.greedy.ids")
    yield Check("out.greedy.ids", np.asarray(got), want, exact=True)

    hub = from_torch("gpt2", fixture.sibling("weights_hub_layout.safetensors"), config["model"])
    for path, leaf in flatten(nnx.state(hub)).items():
        same = flatten(nnx.state(model))[path]
        yield Check(f"hub_layout/{path}", np.asarray(leaf[...]), same[...], exact=True)
    require_all([k for k in arrays if not k.startswith("in.")], done)


def lm_case(model, case, inputs, arrays, check):
    source = case if case in ("ids", "embeds", "tiny_embeds") else None
    if source is None:
        source = "embeds" if case.endswith("embeds") else "ids"
    x = inputs[source]
    embeds = model.embed_tokens(x) if source == "ids" else x
    side = next((s for s in ("right", "left") if case.startswith(f"{s}_pad")), None)
    valid = mask = positions = None
    if side is not None:
        valid = inputs[f"mask_{side}"]
        mask = causal_mask(valid.shape[1]) & key_mask(valid)
    if "mask_positions" in case:
        positions = positions_from_valid(valid)
        given = np.asarray(inputs[f"positions_{side}"])
        yield Check(
            f"in.positions_{side}",
            np.asarray(positions)[np.asarray(valid)],
            given[np.asarray(valid)],
            exact=True,
        )
    hidden, _ = model(embeds, positions, mask)
    yield check(f"out.{case}.hidden", hidden, HIDDEN, valid)
    if f"out.{case}.logits" in arrays:
        yield check(f"out.{case}.logits", model.logits(hidden), LOGITS, valid)


def gpt2_intermediates(model, inputs, arrays, check):
    ids = inputs["ids"]
    x = model.embed_tokens(ids) + model.position_embed(jnp.arange(ids.shape[1]))
    got = {"mid.ids.embed": x, "out.ids.hf_hidden_states.0": x}
    mask, zero = causal_mask(ids.shape[1]), jnp.zeros((), jnp.int32)
    for i, block in enumerate(model.blocks):
        name = f"mid.ids.block{i}"
        got[f"{name}.ln_1"] = block.attn_norm(x)
        got[f"{name}.c_attn"] = block.attn.qkv(got[f"{name}.ln_1"])
        got[f"{name}.attn"] = block.attn(got[f"{name}.ln_1"], mask, None, zero)[0]
        x = x + got[f"{name}.attn"]
        got[f"{name}.ln_2"] = block.mlp_norm(x)
        got[f"{name}.mlp"] = block.mlp(got[f"{name}.ln_2"])
        x = x + got[f"{name}.mlp"]
        got[name] = got[f"out.ids.hf_hidden_states.{i + 1}"] = x
    last = model.final_norm(x)
    got["mid.ids.ln_f"] = got[f"out.ids.hf_hidden_states.{len(model.blocks)}"] = last
    for name, value in got.items():
        if name in arrays:
            yield check(name, value, HIDDEN)


def lm_cached(model, config, inputs, arrays, check):
    embeds, prefill = inputs["embeds"], config["prefill"]
    b, t, _ = embeds.shape
    step = jax.jit(lambda *args: model(*args))
    for case in ("cached", "cached_left_pad"):
        if f"out.{case}.decode_hidden" not in arrays:
            continue
        positions = mask = None
        if case == "cached_left_pad":
            positions = inputs["positions_left"]
            mask = causal_mask(t) & key_mask(inputs["mask_left"])

        def rows(x, start, stop):
            return None if x is None else x[..., start:stop, :]

        def at(start, stop, positions=positions):
            return None if positions is None else positions[:, start:stop]

        cache = model.init_cache(batch=b, size=t)
        _, cache = step(embeds[:, :prefill], at(0, prefill), rows(mask, 0, prefill), cache)
        for name in arrays:
            if match := re.fullmatch(rf"mid\.{case}\.prefill_(k|v)\.layer(\d+)", name):
                slots = getattr(cache, match[1])[int(match[2])][:, :prefill]
                yield check(name, np.moveaxis(np.asarray(slots), 1, 2), HIDDEN)
        outs = []
        for i in range(prefill, t):
            hidden, cache = step(embeds[:, i : i + 1], at(i, i + 1), rows(mask, i, i + 1), cache)
            outs.append(hidden)
        yield check(f"out.{case}.decode_hidden", jnp.concatenate(outs, axis=1), HIDDEN)


def lm_gradients(model, rules, inputs, arrays, done):
    graph, state = nnx.split(model)

    def loss(state, embeds):
        model = nnx.merge(graph, state)
        logits = model.logits(model(embeds)[0])[:, :-1]
        labels = inputs["labels"][:, 1:]
        kept = labels != -100
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.where(kept, labels, 0)[..., None], axis=-1
        )[..., 0]
        return -jnp.where(kept, picked, 0).sum() / kept.sum()

    value, (grads, embed_grad) = jax.jit(jax.value_and_grad(loss, (0, 1)))(state, inputs["embeds"])
    yield Check("out.loss", np.asarray(value)[None], arrays["out.loss"], **LOGITS)
    yield Check("grad.embeds", np.asarray(embed_grad), arrays["grad.embeds"], **GRADIENT)
    done |= {"out.loss", "grad.embeds"}
    wanted = {k[5:]: v for k, v in arrays.items() if k[:5] == "grad." and k != "grad.embeds"}
    for key, got, want in by_original_key(grads, rules, wanted):
        done.add(f"grad.{key}")
        yield Check(f"grad.{key}", got, want, **GRADIENT)


def greedy(model, ids, steps):
    """Continues `ids` with the likeliest token, one scan over the cache."""
    cache = model.init_cache(batch=ids.shape[0], size=ids.shape[1] + steps)
    hidden, cache = model(model.embed_tokens(ids), cache=cache)

    def best(hidden):
        return model.logits(hidden[:, -1:]).argmax(-1).astype(ids.dtype)

    def step(carry, _):
        token, cache = carry
        hidden, cache = model(model.embed_tokens(token), cache=cache)
        return (best(hidden), cache), token

    _, tokens = jax.lax.scan(step, (best(hidden), cache), None, length=steps)
    return jnp.concatenate([ids, jnp.moveaxis(tokens[..., 0], 0, 1)], axis=1)


# --- text_and_vision/gmm_head


@runner("text_and_vision/gmm_head")
def run_gmm_head(fixture):
    arrays, done = fixture.arrays, set()
    cases = sorted({name.split(".in.")[0] for name in arrays if name.endswith(".in.raw")})
    values = {"rel_max": 1e-5}
    for case in cases:
        num_mixtures = int(re.match(r"k(\d+)_", case)[1])
        ins = {
            k.removeprefix(f"{case}.in."): jnp.asarray(v)
            for k, v in arrays.items()
            if k.startswith(f"{case}.in.")
        }
        for name in arrays:
            if name.startswith(f"{case}.out.weighted_sample."):
                done.add(name)
                yield LeftOut(name, "weighted_sample")
        for name, got, bound in gmm_case(num_mixtures, ins, case, arrays):
            done.add(f"{case}.{name}")
            yield Check(f"{case}.{name}", np.asarray(got), arrays[f"{case}.{name}"], **bound)
    raw = jnp.asarray(arrays["activation.raw"])

    def variance(raw):
        return GaussianMixture.from_params(jnp.stack([0 * raw, raw, 0 * raw]), 1).variance[0, 0]

    yield Check("activation.var", jax.vmap(variance)(raw), arrays["activation.var"], rtol=1e-5)
    slope = jax.vmap(jax.grad(variance))(raw)
    yield Check("activation.dvar_draw", slope, arrays["activation.dvar_draw"], **values)
    done |= {"activation.raw", "activation.var", "activation.dvar_draw"}
    require_all([k for k in arrays if ".in." not in k], done)


def gmm_case(num_mixtures, ins, case, arrays):
    raw, target = ins["raw"], ins["target"]
    values, log_prob, gradient = {"rel_max": 1e-5}, {"rtol": 1e-5}, {"rel_max": 2e-5}

    def nll(raw, target):
        return GaussianMixture.from_params(raw, num_mixtures).nll(target)

    mixture = GaussianMixture.from_params(raw, num_mixtures)
    raw_grad, target_grad = jax.jit(jax.grad(nll, (0, 1)))(raw, target)
    yield "out.log_prob", mixture.log_prob(target), log_prob
    yield "out.component_log_prob", mixture.component_log_prob(target), log_prob
    yield "out.log_weights", mixture.log_weights, values
    yield "out.nll", mixture.nll(target)[None], log_prob
    yield "out.var", mixture.variance, {"rtol": 1e-5}
    yield "out.expected_value", mixture.expected_value(), values
    yield "grad.raw", raw_grad, gradient
    yield "grad.raw_fp64", raw_grad, gradient
    yield "grad.target", target_grad, gradient
    for name in arrays:
        if not name.startswith(f"{case}.out."):
            continue
        name = name.removeprefix(f"{case}.")
        if match := re.fullmatch(r"out\.(var_scaled_|sample\.var_scale_)(.+)", name):
            scaled = GaussianMixture.from_params(raw, num_mixtures, var_scale=float(match[2]))
            if match[1] == "var_scaled_":
                yield name, scaled.variance, {"rtol": 1e-5}
            else:
                yield name, scaled.sample_with(ins["component"], ins["noise"]), values
