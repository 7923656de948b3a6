"""Image and text towers, resamplers, pixel transforms and the tokenizer's encode path.

Bounds are those of the README beside the fixtures.
"""

import re

import jax.numpy as jnp
import numpy as np

from convert import from_torch
from convert.engine.plan import plan
from convert.engine.rules import prefixed
from convert.parts.clip import VISION_RULES
from convert.parts.clip import config_from_original as clip_config
from convert.parts.resampler import RULES as RESAMPLER_RULES
from convert.parts.resampler import config_from_original as resampler_config
from dicode_jax.errors import OptionGone
from dicode_jax.media.transforms import clip_preprocess, resize_bilinear, to_float
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import blank
from parity.harness import Check, LeftOut, runner
from parity.runners.unets import captured


def nhwc(images):
    return jnp.asarray(np.moveaxis(images, -3, -1))


def nchw(images):
    return np.moveaxis(np.asarray(images), -1, -3)


def require_all(names, done):
    """No array of a fixture may be left out silently."""
    left = sorted(set(names) - set(done))
    assert not left, f"the runner compares nothing with {', '.join(left)}"


# --- dynamicrafter/resampler.npz


def resampler_path(path: str) -> str:
    """Original module path -> path in `Resampler`."""
    path = re.sub(r"^layers\.(\d+)\.0\b", r"blocks.\1.attn", path)
    path = re.sub(r"^layers\.(\d+)\.1\b", r"blocks.\1.ff", path)
    path = re.sub(r"^self_attn_layers\.(\d+)", r"blocks.\1.self_attn", path)
    path = path.replace(".norm1", ".norm_features").replace(".norm2", ".norm_latents")
    path = re.sub(r"\.ff\.(0|1|3)$", lambda m: f".ff.{FF[m[1]]}", path)
    return path.replace("final_proj_out", "final_proj")


FF = {"0": "norm", "1": "up", "3": "down"}
RESAMPLER = {"atol": 2e-5, "rtol": 1e-4}
# Activations stored as float16 are rounded to 2**-11 of their size.
RESAMPLER_HALF = {"atol": 2e-5, "rtol": 1e-3}


@runner("dynamicrafter/resampler")
def run_resampler(fixture):
    arrays, done = fixture.arrays, set()
    for name, variant in fixture.config["variants"].items():
        weights = fixture.state_dict(f"sd/{name}/")
        kind = {"Resampler": "resampler", "ImageProjModel": "image_proj"}[variant["cls"]]
        model = from_torch(kind, weights, variant["config"])
        with captured(model) as outputs:
            y = model(jnp.asarray(arrays[f"in/{name}/x"]))
        y = nchw(y) if y.ndim == 4 else y
        yield Check(f"out/{name}/y", y, arrays[f"out/{name}/y"], **RESAMPLER)
        done.add(f"out/{name}/y")
        for key in (key for key in arrays if key.startswith(f"act/{name}/")):
            want = arrays[key]
            path = key.removeprefix(f"act/{name}/")
            if kind == "resampler":
                path = resampler_path(path)
            bound = RESAMPLER if want.dtype == np.float32 else RESAMPLER_HALF
            yield Check(key, outputs[path], want, **bound)
            done.add(key)
    require_all((key for key in arrays if not key.startswith("in/")), done)


# --- dynamicrafter/clip_preprocess.npz


@runner("dynamicrafter/clip_preprocess")
def run_clip_preprocess(fixture):
    arrays, config, done = fixture.arrays, fixture.config, set()
    for case, facts in config["cases"].items():
        image = nhwc(arrays[f"in/{case}/image"])
        x = image.astype(jnp.float32) / 127.5 - 1
        stride = facts.get("y_stride", 1)
        size = config.get("size", 224)
        y = nchw(clip_preprocess(x, size, tuple(config["mean"]), tuple(config["std"])))
        for key in (key for key in arrays if key.startswith(f"out/{case}/")):
            part, want = key.split("/")[-1], arrays[key]
            if part == "y":
                got, bound = y[..., ::stride, ::stride], {"atol": 2e-3}
                bound = bound if want.dtype == np.float16 else {"atol": 1e-5}
            elif crop := re.fullmatch(r"crop(\d+)", part):
                side = int(crop[1])
                got, bound = y[..., :side, :side], {"atol": 1e-5}
            elif part == "channel_mean":
                got, bound = y.mean(axis=(0, 2, 3), dtype=np.float64), {"atol": 1e-5}
            else:
                raise KeyError(f"nothing to compare with {key}")
            yield Check(key, got, want, **bound)
            done.add(key)
    require_all((key for key in arrays if key.startswith("out/")), done)


# --- text_and_vision/openclip


def openclip_values(model, arrays):
    """Array name -> value, for everything that is computed from `in.image` and `in.text.ids`."""
    image, ids = nhwc(arrays["in.image"]), jnp.asarray(arrays["in.text.ids"])
    values = {}
    with captured(model) as outputs:
        tokens = model.vision(image)
        values["out.vision.tokens"] = tokens
        values["mid.vision.with_pos"] = model.vision.embed(image)
    values |= {
        "mid.vision.patch_embed": outputs["vision.patch_embed"],
        "mid.vision.ln_pre": outputs["vision.norm_pre"],
        "mid.vision.ln_post": model.vision.norm_post(tokens),
    }
    values |= block_values("vision", outputs)
    with captured(model) as outputs:
        last = model.text(ids, layer="last")
    values |= block_values("text", outputs)
    values["out.text.penultimate"] = model.text(ids, layer="penultimate")
    values["mid.text.embed"] = model.text.embed(ids)
    values["mid.text.eot_index"] = jnp.argmax(ids, axis=-1)
    values["out.text.last"] = last
    values["out.text.pooled"] = model.text.pooled(last, ids)
    values["out.text.pooled_normalised"] = model.encode_text(ids)
    values["out.vision.pooled"] = model.vision.pooled(tokens)
    values["out.vision.pooled_normalised"] = model.encode_image(image)
    values["out.clip.logits_per_image"] = logits = model(image, ids)
    values["out.clip.logits_per_text"] = logits.T
    values["out.clip.cosine"] = model.encode_image(image) @ model.encode_text(ids).T
    return values


def block_values(tower, outputs):
    names = {"": "", ".attn": ".attn_out", ".mlp": ".mlp_out", ".norm1": ".ln_1", ".norm2": ".ln_2"}
    values = {}
    for path, output in outputs.items():
        match = re.fullmatch(rf"{tower}\.blocks\.(\d+)(|\.attn|\.mlp|\.norm1|\.norm2)", path or "")
        if match:
            values[f"mid.{tower}.block{match[1]}{names[match[2]]}"] = output
    return values


def openclip_bound(name):
    if name == "mid.text.eot_index":
        return {"exact": True}
    if "tokens_from_raw" in name:
        return {"atol": 4e-4}
    if "normalised" in name or "cosine" in name:
        return {"atol": 1e-5}
    if name.startswith(("out.vision.tokens", "mid.vision", "out.preprocess")):
        return {"atol": 1e-4}
    if "logits" in name:
        return {"atol": 1e-4}
    return {"atol": 5e-5}


@runner("text_and_vision/openclip")
def run_openclip(fixture):
    arrays, config = fixture.arrays, fixture.config
    cfg = clip_config(config["model"] | {"quick_gelu": config.get("quick_gelu", False)})
    assert cfg.vision.num_heads == config.get("vision_heads", cfg.vision.num_heads)
    model = from_torch("clip", fixture.sibling("weights.safetensors"), cfg)
    values = openclip_values(model, arrays)
    statistics = tuple(config["image_mean"]), tuple(config["image_std"])
    for key in (key for key in arrays if key.startswith("in.raw.")):
        case = key.removeprefix("in.raw.")
        x = clip_preprocess(nhwc(arrays[key]), cfg.vision.image_size, *statistics)
        values[f"out.preprocess.{case}"] = nchw(x)
        values[f"out.vision.tokens_from_raw.{case}"] = model.vision(x)
    for key in (key for key in arrays if not key.startswith("in.")):
        want, name = arrays[key], key
        if first := re.fullmatch(r"(.+)_first(\d+)", key):
            name = first[1]
        got = values[name][: len(want)]  # some arrays hold the first samples only
        yield Check(key, got, want, **openclip_bound(name))


# --- dicode/encode

CLIP_BOUND = {"rel_max": 2e-5}
DEEP_BOUND = {"rel_max": 1e-5}
PIXEL_BOUND = {"rel_max": 1e-5}


def part(weights, prefix):
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


SIZES = (
    "dim", "depth", "dim_head", "heads", "num_queries", "embedding_dim", "output_dim", "ff_mult",
)  # fmt: skip


def resampler_options(name, weights, params, arrays):
    """Constructor arguments of an option variant: what its name, weights and output say."""
    options = {name: params[name] for name in SIZES if name in params}
    options["use_norm_out"] = "norm_out.weight" in weights
    options["extra_self_attn"] = any(key.startswith("self_attn_layers.") for key in weights)
    options["use_cosine"] = "cosine" in name
    options["depth"] = 1 + max(int(key.split(".")[1]) for key in part_keys(weights, "layers."))
    options["num_queries"], options["dim"] = weights["latents"].shape[1:]
    options["output_dim"], _ = weights["proj_out.weight"].shape
    if "final_proj_out.weight" in weights:
        shape = arrays[f"resampler_{name}/out"].shape
        if len(shape) == 4:
            options["output_shape"] = shape[1:]
        else:
            options["extra_output_proj"] = True
    return options


def part_keys(weights, prefix):
    return [key for key in weights if key.startswith(prefix)]


def resized(name, frames):
    """What a `resize/*` array holds, from its name: size[, antialias flag][, colour channel]."""
    match = re.fullmatch(
        r"(?:up_|down_)?(\d+)(?:x(\d+))?(?:_antialias_(True|False))?(?:_(red|green|blue))?", name
    )
    if match is None:
        raise KeyError(f"nothing to compare with resize/{name}")
    size = (int(match[1]), int(match[2] or match[1]))
    y = nchw(resize_bilinear(to_float(frames), size, antialias=match[3] == "True"))
    if match[4]:
        channel = ("red", "green", "blue").index(match[4])
        y = y[:, channel : channel + 1]
    return y


@runner("dicode/encode")
def run_encode(fixture):
    arrays, system, done = fixture.arrays, fixture.config["system"], set()
    weights = fixture.sibling("../system/weights.safetensors")
    cfg = clip_config(system["clip"])
    params = system["image_proj_stage_config"]["params"]
    resampler = resampler_config(params)
    tokenizer = plan(
        {k: v for k, v in weights.items() if k.startswith(("embedder.", "image_proj_model."))},
        (
            *prefixed(VISION_RULES, "embedder.model.", "vision."),
            *prefixed(RESAMPLER_RULES, "image_proj_model.", "resampler."),
        ),
        blank(DeepTokenizer, DeepTokenizerConfig(vision=cfg.vision, resampler=resampler)),
    ).module()
    own = part(weights, "llm_agent.pre_input_resampler.")  # of the same sizes, without options
    agent = from_torch("resampler", own, resampler_options("agent", own, params, arrays))
    text = from_torch("clip_text", part(weights, "cond_stage_model.model."), system["clip"])

    def check(key, got, bound):
        done.add(key)
        return Check(key, got[: len(arrays[key])], arrays[key], **bound)

    clip_tokens = {}
    for case in sorted({key.split("/")[0] for key in arrays if key.endswith("/clip_tokens")}):
        if f"{case}/frames_u8" in arrays:
            images = to_float(jnp.asarray(arrays[f"{case}/frames_u8"]))
        else:  # the unconditional branch
            assert case == "zero", f"no frames for {case}"
            images = jnp.zeros((1, cfg.vision.image_size, cfg.vision.image_size, 3))
        clip_tokens[case] = tokenizer.encode_images(images)
        yield check(f"{case}/clip_tokens", clip_tokens[case], CLIP_BOUND)
        deep = tokenizer(images[None])[0]
        if case == "zero":
            np.testing.assert_array_equal(deep[0], tokenizer.null_tokens())
        yield check(f"{case}/deep_tokens", deep, DEEP_BOUND)
        if (key := f"{case}/llm_pre_input_resampler") in arrays:
            yield check(key, agent(clip_tokens[case]), DEEP_BOUND)
        for key in [key for key in arrays if key.startswith(f"{case}/preprocessed")]:
            stride = int(re.fullmatch(r".*/preprocessed(?:_sub(\d+))?", key)[1] or 1)
            got = nchw(tokenizer.preprocess(images))[..., ::stride, ::stride]
            yield check(key, got, PIXEL_BOUND)
    options = fixture.sibling("weights.safetensors")
    for key in [key for key in arrays if re.fullmatch(r"resampler_.*/out", key)]:
        name = key.removeprefix("resampler_").removesuffix("/out")
        own = part(options, f"{name}:")
        try:
            model = from_torch("resampler", own, resampler_options(name, own, params, arrays))
        except OptionGone as gone:
            done.add(key)
            yield LeftOut(key, gone.option)
            continue
        got = model(clip_tokens["small"])
        yield check(key, nchw(got) if got.ndim == 4 else got, DEEP_BOUND)
    for key in [key for key in arrays if key.startswith("text/") and key.endswith("_embedding")]:
        ids = jnp.asarray(arrays[key.replace("_embedding", "_ids")])
        yield check(key, text(ids), CLIP_BOUND)
    frames = jnp.asarray(arrays["resize/frames_u8"])
    for key in [key for key in arrays if key.startswith("resize/") and key != "resize/frames_u8"]:
        yield check(key, resized(key.removeprefix("resize/"), frames), PIXEL_BOUND)
    inputs = {key for key in arrays if key.endswith(("/frames_u8", "_ids"))}
    require_all(set(arrays) - inputs, done)
