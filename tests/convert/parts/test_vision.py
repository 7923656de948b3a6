"""CLIP and resampler converters: strictness, original options, the full-size key lists."""

import numpy as np
import pytest
from flax import nnx

from convert import from_torch
from convert.engine import found
from convert.engine.plan import plan
from convert.engine.rules import ConversionError, prefixed
from convert.parts import clip as open_clip
from convert.parts import resampler
from dicode_jax.errors import UserError
from dicode_jax.models.clip import CLIP, CLIPConfig, CLIPText, CLIPVision
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs

CLIP_TINY = {
    "embed_dim": 5,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 6, "layers": 2, "head_width": 3},
    "text_cfg": {"context_length": 7, "vocab_size": 11, "width": 4, "layers": 1, "heads": 2},
}
RESAMPLER_TINY = {
    "dim": 6,
    "depth": 1,
    "dim_head": 3,
    "heads": 4,
    "num_queries": 4,
    "embedding_dim": 5,
    "output_dim": 8,
    "ff_mult": 2,
}


def zeros(shapes):
    """Arrays of any size without memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def draws(shapes):
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def block_shapes(prefix, layers, d):
    shapes = {
        "ln_1.weight": (d,), "ln_1.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,),
        "attn.in_proj_weight": (3 * d, d), "attn.in_proj_bias": (3 * d,),
        "attn.out_proj.weight": (d, d), "attn.out_proj.bias": (d,),
        "mlp.c_fc.weight": (4 * d, d), "mlp.c_fc.bias": (4 * d,),
        "mlp.c_proj.weight": (d, 4 * d), "mlp.c_proj.bias": (d,),
    }  # fmt: skip
    return {
        f"{prefix}transformer.resblocks.{i}.{key}": shape
        for i in range(layers)
        for key, shape in shapes.items()
    }


def text_extra_shapes(cfg, width):
    text = cfg["text_cfg"]
    return {
        "positional_embedding": (text["context_length"], width),
        "text_projection": (width, cfg["embed_dim"]),
        "logit_scale": (),
        "token_embedding.weight": (text["vocab_size"], width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }


def vision_shapes(cfg):
    vision = cfg["vision_cfg"]
    d, p = vision["width"], vision["patch_size"]
    tokens = 1 + (vision["image_size"] // p) ** 2
    shapes = {"class_embedding": (d,), "positional_embedding": (tokens, d)}
    shapes |= {"proj": (d, cfg["embed_dim"]), "conv1.weight": (d, 3, p, p)}
    shapes |= {f"ln_{at}.{kind}": (d,) for at in ("pre", "post") for kind in ("weight", "bias")}
    shapes = {f"visual.{key}": shape for key, shape in shapes.items()}
    return shapes | block_shapes("visual.", vision["layers"], d)


def clip_shapes(cfg):
    width = cfg["text_cfg"]["width"]
    own = text_extra_shapes(cfg, width) | block_shapes("", cfg["text_cfg"]["layers"], width)
    return own | vision_shapes(cfg)


def resampler_shapes(cfg):
    d, inner, e, z = cfg["dim"], cfg["heads"] * cfg["dim_head"], cfg["embedding_dim"], 0
    z, ff = cfg["output_dim"], cfg["dim"] * cfg["ff_mult"]
    shapes = {"latents": (1, cfg["num_queries"], d), "proj_in.weight": (d, e)}
    shapes |= {"proj_in.bias": (d,), "proj_out.weight": (z, d), "proj_out.bias": (z,)}
    shapes |= {"norm_out.weight": (z,), "norm_out.bias": (z,)}
    for i in range(cfg["depth"]):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.{kind}": (d,) for kind in ("weight", "bias")}
        shapes |= {f"layers.{i}.0.to_q.weight": (inner, d)}
        shapes |= {f"layers.{i}.0.to_kv.weight": (2 * inner, d)}
        shapes |= {f"layers.{i}.0.to_out.weight": (d, inner)}
        shapes |= {f"layers.{i}.1.1.weight": (ff, d), f"layers.{i}.1.3.weight": (d, ff)}
    return shapes


VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 1024,
        "heads": 16,
        "layers": 24,
    },
    "quick_gelu": False,
}


def test_published_clip_configuration_gives_the_defaults():
    assert open_clip.config_from_original(VIT_H_14) == CLIPConfig()


def test_every_key_of_the_published_clip_finds_its_place():
    model = nnx.eval_shape(lambda: CLIP(CLIPConfig(), rngs=ShapeRngs()))
    source = zeros(clip_shapes(VIT_H_14))
    assert len(source) == 686
    done = plan(source, open_clip.CLIP_RULES, nnx.state(model))
    assert done.problems == []
    assert not done.skipped

    # The two partial copies of a DiCoDe checkpoint.
    dead = text_extra_shapes(VIT_H_14, 1024)
    embedder = {f"embedder.model.{k}": s for k, s in (vision_shapes(VIT_H_14) | dead).items()}
    rules = prefixed(open_clip.VISION_RULES, "embedder.model.", "vision.")
    target = {f"vision.{k}": v for k, v in shapes_of(model.vision).items()}
    done = plan(zeros(embedder), rules, target)
    assert done.problems == []
    assert sorted(done.skipped) == sorted(f"embedder.model.{key}" for key in dead)

    text = {k: s for k, s in clip_shapes(VIT_H_14).items() if not k.startswith("visual.")}
    done = plan(zeros(text), open_clip.TEXT_RULES, nnx.state(model.text))
    assert done.problems == []
    assert list(done.skipped) == ["logit_scale"]


def shapes_of(module):
    return {
        ".".join(map(str, path)): tuple(leaf.shape)
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }


def test_every_key_of_the_released_resampler_finds_its_place():
    names = {"dim": 1024, "depth": 4, "dim_head": 64, "heads": 12, "num_queries": 16}
    cfg = names | {"embedding_dim": 1280, "output_dim": 1024, "ff_mult": 4}
    assert resampler.config_from_original(cfg) == ResamplerConfig()
    model = nnx.eval_shape(lambda: Resampler(ResamplerConfig(), rngs=ShapeRngs()))
    source = zeros(resampler_shapes(cfg))
    assert len(source) == 51
    assert plan(source, resampler.RULES, nnx.state(model)).problems == []


def test_towers_are_cut_out_of_a_whole_checkpoint():
    source = draws(clip_shapes(CLIP_TINY))
    clip = from_torch("clip", source, CLIP_TINY)
    vision = from_torch("clip_vision", source, CLIP_TINY)
    text = from_torch("clip_text", source, CLIP_TINY)
    assert isinstance(vision, CLIPVision)
    assert isinstance(text, CLIPText)
    qkv = source["visual.transformer.resblocks.1.attn.in_proj_weight"].T
    for tower in (vision, clip.vision):
        np.testing.assert_array_equal(tower.blocks[1].attn.to_qkv.kernel[...], qkv)
    np.testing.assert_array_equal(text.proj.kernel[...], source["text_projection"])
    assert clip.logit_scale[...] == source["logit_scale"]


def test_missing_and_unexpected_keys_are_all_named():
    source = draws(resampler_shapes(RESAMPLER_TINY))
    del source["layers.0.0.to_q.weight"]
    source["surprise"] = np.zeros(3, np.float32)
    source["proj_in.bias"] = np.zeros(4, np.float32)
    with pytest.raises(ConversionError) as error:
        from_torch("resampler", source, RESAMPLER_TINY)
    message = str(error.value)
    assert "unused source key: surprise" in message
    assert "unfilled target: blocks.0.attn.to_q.kernel" in message
    assert "proj_in.bias: shape (4,) does not fit" in message


def test_resampler_options_are_read():
    read = resampler.config_from_original
    shaped = read(RESAMPLER_TINY | {"output_shape": [3, 4, 6]})
    assert shaped.output_shape == (4, 6, 3)
    assert read({"target": "a.b.Resampler", "params": RESAMPLER_TINY}).num_queries == 4
    assert not read(RESAMPLER_TINY | {"no_norm_out": True}).use_norm_out
    with pytest.raises(ValueError, match="extra_self_attn = True is gone: a larger depth has"):
        read(RESAMPLER_TINY | {"extra_self_attn": True})
    assert read(RESAMPLER_TINY | {"video_length": 4}).num_tokens == 16
    with pytest.raises(ValueError, match=r"unknown option.*colour"):
        read(RESAMPLER_TINY | {"colour": 1})


def test_weights_of_an_option_that_is_gone_are_refused_by_its_name():
    shapes = resampler_shapes(RESAMPLER_TINY) | {"self_attn_layers.0.ln.weight": (4,)}
    with pytest.raises(UserError, match="extra_self_attn = True is gone: a larger depth has"):
        found.resampler(found.Keys(zeros(shapes)), head_dim=RESAMPLER_TINY["dim_head"])


def test_unused_normalizer_is_skipped():
    source = draws(resampler_shapes(RESAMPLER_TINY)) | {"normalizer": np.ones(4, np.float32)}
    options = RESAMPLER_TINY | {"normalizer": [1.0] * 4}
    assert isinstance(from_torch("resampler", source, options), Resampler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": CLIP_TINY["vision_cfg"] | {"ls_init_value": 0.1}}, "ls_init_value = 0.1"),
        ({"text_cfg": CLIP_TINY["text_cfg"] | {"hf_model_name": "x"}}, "hf_model_name = 'x'"),
        ({"text_cfg": CLIP_TINY["text_cfg"] | {"colour": 1}}, "unknown option .* colour = 1"),
        ({"custom_text": True}, "custom_text = True is not supported"),
    ],
)
def test_clip_options_that_would_change_the_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        open_clip.config_from_original(CLIP_TINY | change)


def test_neutral_clip_options_are_accepted():
    vision = CLIP_TINY["vision_cfg"] | {"patch_dropout": 0.0, "ls_init_value": None}
    read = open_clip.config_from_original
    assert read(CLIP_TINY | {"vision_cfg": vision}) == read(CLIP_TINY)
    assert read(CLIP_TINY | {"quick_gelu": True}).vision.activation == "quick_gelu"


def test_image_projection_is_converted():
    options = {"cross_attention_dim": 4, "clip_embeddings_dim": 6, "clip_extra_context_tokens": 3}
    shapes = {"proj.weight": (12, 6), "proj.bias": (12,), "norm.weight": (4,), "norm.bias": (4,)}
    source = draws(shapes)
    model = from_torch("image_proj", source, options)
    np.testing.assert_array_equal(model.proj.kernel[...], source["proj.weight"].T)
    with pytest.raises(ValueError, match=r"unknown option.*colour"):
        from_torch("image_proj", source, options | {"colour": 1})
