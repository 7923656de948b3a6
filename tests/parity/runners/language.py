"""The deep-token language model: training forward and generation.

Bounds are those of the README beside the fixtures.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_inside import explicit_loss, observed

from convert import from_torch
from convert.dicode import lm as dicode_lm
from convert.engine.plan import flatten, plan
from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.errors import OptionGone
from dicode_jax.nn.masks import causal_mask, key_mask
from parity.harness import Check, LeftOut, runner
from parity.runners.gpt2 import by_original_key, require_all

LM = {"rel_max": 1e-5}
GRAD_NORM = {"rtol": 1e-4}


# --- dicode/lm_train


def agent_config(fixture, model_kwargs):
    """The fixture's configuration with the options of one case."""
    config = dict(fixture.config)
    config["agent"] = config["agent"] | model_kwargs
    return config


def agent_weights(weights, loss_func):
    """Plain keys, with the other heads laid over them where the loss needs one."""
    out = {key: value for key, value in weights.items() if ":" not in key}
    if loss_func != "gmm":
        out |= {k.removeprefix("vec:"): v for k, v in weights.items() if k.startswith("vec:")}
    return out


def build_agent(fixture, weights, model_kwargs):
    """The language model of one case."""
    config = agent_config(fixture, model_kwargs)
    loss_func = config["agent"].get("loss_func", "gmm")
    return from_torch("dicode_lm", agent_weights(weights, loss_func), config)


@runner("dicode/lm_train")
def run_lm_train(fixture):
    arrays, config, done = fixture.arrays, fixture.config, set()
    weights = fixture.sibling("weights.safetensors")
    inputs = {k.removeprefix("inputs/"): v for k, v in arrays.items() if k.startswith("inputs/")}
    resampler = dicode_lm.resampler_from_torch(weights, config)
    frames = inputs["video_frame_mask"].astype(bool)
    deep_tokens = resampler(jnp.asarray(inputs["video_embeds"]))
    deep_tokens = deep_tokens.reshape(*frames.shape, *deep_tokens.shape[1:])
    want = inputs["deep_tokens_target"]
    yield Check("inputs/deep_tokens_target", np.asarray(deep_tokens)[frames], want, **LM)
    done |= {f"inputs/{name}" for name in inputs}
    for case, spec in config["cases"].items():
        own = {k.removeprefix(f"{case}/"): v for k, v in arrays.items() if k.startswith(f"{case}/")}
        done |= {f"{case}/{name}" for name in own}
        if "query_video_ids_mask" in spec["forward_extra"]:
            yield LeftOut(case, "query_video_ids_mask")
            continue
        try:
            model = build_agent(fixture, weights, spec["model_kwargs"])
        except OptionGone as gone:
            yield LeftOut(case, gone.option)
            continue
        given = {k.removeprefix("inputs/"): v for k, v in own.items() if k.startswith("inputs/")}
        kwargs = forward_kwargs(spec, inputs | given)
        wanted = {k: v for k, v in own.items() if not k.startswith("inputs/")}
        seen = set()
        if model.cfg.loss != "gmm":  # logged with a weight of 0; of `gmm` they are 0
            seen |= {"llm_loss", "rec_loss"}
            yield LeftOut(f"{case}/llm_loss and rec_loss", "llm_loss_weight, rec_loss_weight")
        for check in train_case(model, deep_tokens, kwargs, wanted, spec):
            seen.add(check.name)
            yield Check(**{**vars_of(check), "name": f"{case}/{check.name}"})
        require_all(wanted, seen)
    require_all(arrays, done)


def vars_of(check):
    return {f: getattr(check, f) for f in check.__dataclass_fields__}


def forward_kwargs(spec, inputs):
    names = {
        "attention_mask": ("attention_mask", bool),
        "position_ids": ("positions", np.int32),
        "input_ids": ("input_ids", np.int32),
        "video_ids_mask": ("token_mask", bool),
        "video_frame_mask": ("frame_mask", bool),
    }
    always = {"input_ids", "video_ids_mask", "video_frame_mask"}
    if unknown := set(spec["forward_extra"]) - set(names):
        raise ValueError(f"unknown inputs of the training forward: {sorted(unknown)}")
    return {
        names[name][0]: jnp.asarray(inputs[name].astype(names[name][1]))
        for name in always | set(spec["forward_extra"])
    }


def train_case(model, deep_tokens, kwargs, wanted, spec):
    graph, state = nnx.split(model)

    def loss(state, deep_tokens, kwargs):
        out, _ = explicit_loss(nnx.merge(graph, state), deep_tokens=deep_tokens, **kwargs)
        return out.loss, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state, deep_tokens, kwargs)
    valid = np.asarray(out.valid)
    yield Check("total_loss", np.asarray(out.loss), wanted["total_loss"], **LM)
    yield Check("llm_rec_loss", np.asarray(out.loss), wanted["llm_rec_loss"], **LM)
    if model.cfg.loss == "gmm":
        for name in ("llm_loss", "rec_loss"):
            yield Check(name, np.zeros_like(wanted[name]), wanted[name], exact=True)
    yield Check("pred", np.asarray(out.pred)[valid], wanted["pred"], **LM)
    yield Check("config:total_loss", np.asarray(out.loss), spec["total_loss"], **LM)
    yield from train_intermediates(model, deep_tokens, kwargs, wanted, out)

    own = {k[5:]: v for k, v in wanted.items() if k.startswith("grad/")}
    for key, got, want in by_original_key(grads, dicode_lm.RULES, own):
        yield Check(f"grad/{key}", got, want, rel_max=1e-4)
    # Norms do not depend on the layout, so the key alone finds our parameter.
    shapes = {key: np.zeros(1) for key in spec["grad_norm_by_param"]}
    paths = plan(shapes, dicode_lm.RULES, grads).sources
    ours = {key: np.asarray(flatten(grads)[path][...]) for path, key in paths.items()}
    assert set(paths) == set(flatten(grads)), "a parameter has no gradient norm in the fixture"
    for key, want in spec["grad_norm_by_param"].items():
        yield Check(f"config:grad_norm/{key}", np.linalg.norm(ours[key]), want, **GRAD_NORM)
    for module, want in spec["grad_norm_by_module"].items():
        parts = [np.sum(g**2) for key, g in ours.items() if key.startswith(f"{module}.")]
        yield Check(f"config:grad_norm/{module}", np.sqrt(sum(parts)), want, **GRAD_NORM)


def train_intermediates(model, deep_tokens, kwargs, wanted, out):
    cfg, valid = model.cfg, np.asarray(out.valid)
    _, sequence = explicit_loss(model, deep_tokens=deep_tokens, **kwargs)
    if "inputs_embeds" in wanted:
        yield Check("inputs_embeds", np.asarray(sequence.embeds), wanted["inputs_embeds"], **LM)
    got = {"video_embeds_in": model.embed_deep_tokens(sequence.targets)}
    got["video_embeds_in_with_pos"] = got["video_embeds_in"] + model.positions_of(valid.shape[1])
    if cfg.loss == "gmm":
        mixture = GaussianMixture.from_params(out.pred, cfg.num_mixtures)
        got["means"], got["variances"] = mixture.mean, mixture.variance
        got["weights_logits"] = mixture.logits
        got["log_prob"] = mixture.log_prob(sequence.targets)
        got["gmm_predict"] = mixture.expected_value()
    for name, value in got.items():
        if name in wanted:
            yield Check(name, np.asarray(value)[valid], wanted[name], **LM)
    layers = [name for name in wanted if name.startswith("hidden_layer")]
    if not layers and "last_hidden_state" not in wanted:
        return
    t = sequence.embeds.shape[1]
    mask = causal_mask(t)
    if "attention_mask" in kwargs:
        mask = mask & key_mask(kwargs["attention_mask"])
    positions = kwargs.get("positions", jnp.arange(t)[None])
    x = sequence.embeds + model.body.position_embed(positions)
    for i, block in enumerate(model.body.blocks, start=1):
        x, _ = block(x, mask, None, jnp.zeros((), jnp.int32))
        if f"hidden_layer{i}" in wanted and i < len(model.body.blocks):
            yield Check(f"hidden_layer{i}", np.asarray(x), wanted[f"hidden_layer{i}"], **LM)
    last = np.asarray(model.body.final_norm(x))
    for name in ("last_hidden_state", f"hidden_layer{len(model.body.blocks)}"):
        if name in wanted:
            yield Check(name, last, wanted[name], **LM)


# --- dicode/lm_generate


def byte_ids(texts, text_length, pad):
    """Ids of the tiny tokenizer: bytes in GPT-2's order, padded or cut on the right."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    rows = [[order.index(byte) for byte in text.strip().encode()] for text in texts]
    if text_length is not None:
        rows = [(row + [pad] * text_length)[:text_length] for row in rows]
    return np.asarray(rows, np.int32).reshape(len(rows), -1)


def prompts_of(spec):
    texts = spec.get("text_prompt") or [""]
    return [texts] if isinstance(texts, str) else texts


def case_kwargs(case, spec, own, config):
    """Constructor options of a case: as stated, else read off its name and its head's width."""
    kwargs = dict(spec.get("model_kwargs", {}))
    agent = config["agent"]
    if "normalizer" in case:
        kwargs.setdefault("pre_normalizer", config["pre_normalizer"])
    if "head_out" not in own:
        kwargs.setdefault("llm_loss_weight", 1.0)  # anything but (0, 0, 1) feeds hidden states back
        return kwargs
    width, z, m = own["head_out"].shape[-1], agent["deep_token_dim"], agent["num_gmm_kernel"]
    if "cosine" in case:
        kwargs.setdefault("loss_func", "cosine")
    elif width == z:
        kwargs.setdefault("loss_func", "mse")
    elif width != 2 * m * z + m:
        kwargs.setdefault("loss_func", "vae")
    return kwargs


def num_keyframes(spec, length, n):
    """How many keyframes the original makes: no more than its keyword max_length allows."""
    max_length = spec.get("max_length", 512)
    if spec.get("add_sep", False):
        most = (max_length - length + 1) // (n + 1)
    else:
        most = (max_length - length) // n
    wanted = spec.get("num_frames_to_gen")
    return most if wanted is None else min(wanted, most)


@runner("dicode/lm_generate")
def run_lm_generate(fixture):
    arrays, config = fixture.arrays, fixture.config
    weights = fixture.sibling(config["weights"])
    pad = config["special_ids"]["pad"]
    done, all_ids = set(), []
    for case, spec in config["cases"].items():
        own = {k.removeprefix(f"{case}/"): v for k, v in arrays.items() if k.startswith(f"{case}/")}
        ids = byte_ids(prompts_of(spec), spec.get("text_length"), pad)
        all_ids.append(ids)
        done |= {f"{case}/{name}" for name in own}
        try:
            model = build_agent(fixture, weights, case_kwargs(case, spec, own, config))
            check_options(spec)
        except OptionGone as gone:
            yield LeftOut(case, gone.option)
            continue
        seen = set()
        for check in generate_case(model, ids, spec, own):
            seen.add(check.name)
            yield Check(**{**vars_of(check), "name": f"{case}/{check.name}"})
        require_all(own, seen | {"u", "eps", "video_embeds"})
    for name, want in arrays.items():
        if name.startswith("text_ids/"):
            same = [ids for ids in all_ids if np.array_equal(ids, want)]
            done.add(name)
            yield Check(name, same[0] if same else np.zeros(0), want, exact=True)
    require_all(arrays, done)


def check_options(spec):
    """Raises `OptionGone` for what generation no longer does."""
    if spec.get("weighted_sample", False):
        raise OptionGone("weighted_sample", True, "do_sample")
    if not spec.get("add_sep", False):
        raise OptionGone("add_sep", False, "<img> before each keyframe")


def generate_case(model, ids, spec, own):
    cfg, b = model.cfg, len(ids)
    assert spec.get("num_img_tokens", cfg.num_tokens) == cfg.num_tokens
    prefix = own.get("video_embeds")
    before = 0 if prefix is None else prefix.shape[1] * (cfg.num_tokens + 1)
    frames = num_keyframes(spec, ids.shape[1] + 1 + before, cfg.num_tokens)
    scale = spec.get("cfg_scale", 1.0)
    rows = 2 * b if scale > 1 else b
    draws = {name: jnp.asarray(own[name]) for name in ("u",) if name in own}
    if "eps" in own:
        draws["noise"] = jnp.asarray(own["eps"].reshape(len(own["eps"]), rows, -1))
    tokens, trace = observed(
        model,
        jnp.asarray(ids),
        num_keyframes=frames,
        do_sample=spec.get("do_sample", False),
        var_scale=spec.get("var_scale", 1.0),
        guidance_scale=scale,
        prefix=None if prefix is None else jnp.asarray(prefix),
        parity=True,
        **draws,
    )
    pred = np.tile(np.asarray(tokens), (rows // b, 1, 1, 1))
    yield Check(
        "config:pred_shape", np.asarray(pred.shape), np.asarray(spec["pred_shape"]), exact=True
    )
    yield Check("pred", pred, own["pred"], **LM)
    for name in ("text_embeds", "fed_embeds", "hidden", "head_out"):
        if name in own:
            yield Check(name, np.asarray(getattr(trace, name)), own[name], **LM)
    if "component" in own:
        mixture = GaussianMixture.from_params(jnp.asarray(trace.head_out), cfg.num_mixtures)
        picked = mixture.component_of(jnp.asarray(own["u"]).T).T
        yield Check("component", np.asarray(picked), own["component"], exact=True)
