import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm_inside import explicit_loss

from convert import from_torch
from convert.dicode.lm import config_from_original
from convert.engine.plan import flat_shapes
from convert.engine.rules import ConversionError
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.rngs import ShapeRngs

B, L, K, N, Z = 2, 5, 3, 4, 6
BODY = GPT2Config(num_layers=2, num_heads=2, embed_dim=8, max_seq_len=40, vocab_size=23)
CONFIG = DiCoDeLMConfig(
    body=BODY,
    num_tokens=N,
    token_dim=Z,
    max_keyframes=4,
    mlp_dim=10,
    num_mixtures=3,
    image_token_id=20,
    pad_token_id=19,
)
TEXT = jax.random.randint(jax.random.key(1), (B, L), 0, 19)
TOKENS = jax.random.normal(jax.random.key(2), (B, K, N, Z))


def build(**options) -> DiCoDeLM:
    """A model none of whose parameters is zero."""
    model = DiCoDeLM(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def explicit(tokens_per_row=(K, K), image=20):
    """Ids and slots of `text | <img> | tokens | <img> | ...`, padded behind."""
    ids = np.full((B, L + K * (N + 1)), 19, np.int32)
    slots = np.zeros(ids.shape, bool)
    ids[:, :L] = TEXT
    for row, frames in enumerate(tokens_per_row):
        for f in range(frames):
            ids[row, L + f * (N + 1)] = image
            slots[row, L + f * (N + 1) + 1 : L + (f + 1) * (N + 1)] = True
    return {"input_ids": jnp.asarray(ids), "token_mask": jnp.asarray(slots)}


def close(a, b):
    np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-6)


def test_a_prediction_sees_only_tokens_before_it():
    model = build()
    base = model.loss(TEXT, TOKENS).pred
    changed = model.loss(TEXT, TOKENS.at[:, 1, 2].multiply(-1)).pred
    flat_base, flat_changed = (x.reshape(B, K * N, -1) for x in (base, changed))
    at = 1 * N + 2
    close(flat_base[:, : at + 1], flat_changed[:, : at + 1])
    assert np.abs(flat_base[:, at + 1] - flat_changed[:, at + 1]).min(axis=-1).max() > 1e-4


def test_every_text_token_reaches_the_first_prediction():
    model = build()
    base = model.loss(TEXT, TOKENS).pred[:, 0, 0]
    for i in range(L):
        other = model.loss(TEXT.at[:, i].set((TEXT[:, i] + 1) % 19), TOKENS).pred[:, 0, 0]
        assert (np.abs(other - base).max(-1) > 1e-4).all()


@pytest.mark.parametrize("loss", ["gmm", "l1", "cosine"])
def test_fast_layout_equals_explicit_masks(loss):
    model = build(loss=loss)
    fast = model.loss(TEXT, TOKENS)
    slow, _ = explicit_loss(model, deep_tokens=TOKENS, **explicit())
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        close(a, b)


def test_fast_layout_equals_explicit_masks_for_a_valid_prefix():
    model = build(balance_samples=True)
    valid = jnp.asarray([[True] * 3, [True, False, False]])
    fast = model.loss(TEXT, TOKENS, frame_mask=valid)
    slow, _ = explicit_loss(model, deep_tokens=TOKENS, frame_mask=valid, **explicit((3, 1)))
    close(fast.loss, slow.loss)
    close(fast.pred[valid], slow.pred[slow.valid])


@pytest.mark.long
def test_gradients_of_both_layouts_agree():
    graph, state = nnx.split(build())
    fast = jax.grad(lambda s: nnx.merge(graph, s).loss(TEXT, TOKENS).loss)(state)

    def slow_loss(state):
        return explicit_loss(nnx.merge(graph, state), deep_tokens=TOKENS, **explicit())[0].loss

    slow = jax.grad(slow_loss)(state)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        close(a, b)


def test_keyframes_are_numbered_by_rank_among_the_valid_ones():
    model = build()
    valid = jnp.asarray([[True, False, True]] * B)
    got, _ = explicit_loss(model, deep_tokens=TOKENS, frame_mask=valid, **explicit((2, 2)))
    packed = model.loss(TEXT, TOKENS[:, jnp.asarray([0, 2])])
    close(got.pred[:, :2], packed.pred)
    close(got.loss, packed.loss)


def test_inputs_may_differ_from_targets():
    model = build()
    noisy = TOKENS + 0.5
    got = model.loss(TEXT, TOKENS, inputs=noisy)
    close(got.pred, model.loss(TEXT, noisy).pred)
    assert abs(float(got.loss - model.loss(TEXT, noisy).loss)) > 1e-3
    close(model.loss(TEXT, TOKENS, inputs=TOKENS).loss, model.loss(TEXT, TOKENS).loss)


def test_normaliser_divides_on_the_way_in_and_multiplies_on_the_way_out():
    values = (0.5, 2.0, 1.0, 4.0)
    model, plain = build(pre_normalizer=values), build()
    scale = jnp.asarray(values)[:, None]
    close(model.loss(TEXT, TOKENS * scale).loss, plain.loss(TEXT, TOKENS).loss)
    close(model.denormalize(model.normalize(TOKENS)), TOKENS)
    close(model.denormalize(TOKENS), TOKENS * scale)


def test_hidden_padding_does_not_matter_and_positions_do():
    model, layout = build(), explicit()
    attention = np.ones(layout["input_ids"].shape, bool)
    attention[:, 1] = False
    layout |= {"deep_tokens": TOKENS, "attention_mask": jnp.asarray(attention)}
    base, _ = explicit_loss(model, **layout)
    layout["input_ids"] = layout["input_ids"].at[:, 1].set(7)
    close(base.pred, explicit_loss(model, **layout)[0].pred)
    positions = jnp.broadcast_to(jnp.arange(attention.shape[1]) + 1, attention.shape)
    moved, _ = explicit_loss(model, positions=positions, **layout)
    assert np.abs(moved.pred - base.pred).max() > 1e-3


def test_wrong_lengths_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r"5 keyframes, but the model knows 4"):
        model.loss(TEXT, jnp.zeros((B, 5, N, Z)))
    with pytest.raises(ValueError, match="positions, but the model has 40"):
        model.loss(jnp.zeros((B, 30), jnp.int32), TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "huber"}, "unknown loss 'huber'"),
        ({"loss": "l1l2"}, "loss = 'l1l2' is gone: one of gmm, mse, l1, cosine has replaced it"),
        ({"loss": "mse", "balance_samples": True}, "needs loss 'gmm'"),
        ({"pre_normalizer": (1.0, 2.0)}, "2 values for 4 tokens"),
        ({"image_token_id": 23}, "image_token_id 23 is outside the vocabulary of 23"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def released() -> DiCoDeLMConfig:
    body = GPT2Config(num_layers=36, num_heads=20, embed_dim=1280, vocab_size=50257 + 66)
    return DiCoDeLMConfig(body=body)


def test_released_size_has_the_published_number_of_parameters():
    model = nnx.eval_shape(lambda: DiCoDeLM(released(), rngs=ShapeRngs()))
    counts: dict[str, int] = {}
    for path, shape in flat_shapes(nnx.state(model)).items():
        part = path.split(".")[0]
        counts[part] = counts.get(part, 0) + math.prod(shape)
    assert counts == {
        "body": 774_114_560,
        "input_mlp": 2_951_680,
        "output_mlp": 43_635_984,
        "frame_embed": 61_440 - 16 * 1280,
        "place_embed": 16 * 1280,
    }


# Conversion.

ORIGINAL = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 40, "vocab_size": 23},
    "agent": {"num_img_tokens": N, "max_length": 19, "num_gmm_kernel": 3, "loss_func": "gmm"},
    "special_ids": {"boi": 20, "pad": 19},
}


def original_state(model):
    """The original's state dict of a model, written without the converter."""
    out = {
        "video_pos_token.frame_token": model.frame_embed[...][:, None],
        "video_pos_token.pos_token": model.place_embed[...][None],
        "llm.transformer.wte.weight": model.body.token_embed.embedding[...],
        "llm.transformer.wpe.weight": model.body.position_embed.embedding[...],
        "llm.transformer.ln_f.weight": model.body.final_norm.scale[...],
        "llm.transformer.ln_f.bias": model.body.final_norm.bias[...],
    }
    for name, mlp in (("input", model.input_mlp), ("output", model.output_mlp)):
        for index, layer in ((0, mlp.up), (2, mlp.down)):
            out[f"{name}_resampler.{index}.weight"] = layer.kernel[...].T
            out[f"{name}_resampler.{index}.bias"] = layer.bias[...]
    for i, block in enumerate(model.body.blocks):
        head = f"llm.transformer.h.{i}."
        for name, norm in (("ln_1", block.attn_norm), ("ln_2", block.mlp_norm)):
            out |= {f"{head}{name}.weight": norm.scale[...], f"{head}{name}.bias": norm.bias[...]}
        for name, layer in (
            ("attn.c_attn", block.attn.qkv),
            ("attn.c_proj", block.attn.out),
            ("mlp.c_fc", block.mlp.up),
            ("mlp.c_proj", block.mlp.down),
        ):
            out |= {
                f"{head}{name}.weight": layer.kernel[...],
                f"{head}{name}.bias": layer.bias[...],
            }
    return {key: np.asarray(value) for key, value in out.items()}


def test_original_agent_converts():
    model = build()
    source = original_state(model)
    source["llm.lm_head.weight"] = source["llm.transformer.wte.weight"]
    source["pre_input_resampler.latents"] = np.zeros((1, 4, 8), np.float32)
    got = from_torch("dicode_lm", source, ORIGINAL)
    assert got.cfg == CONFIG
    close(got.loss(TEXT, TOKENS).pred, model.loss(TEXT, TOKENS).pred)
    stacked = dataclasses.replace(CONFIG, body=dataclasses.replace(BODY, scan_layers=True))
    deep = from_torch("dicode_lm", source, stacked)
    close(deep.loss(TEXT, TOKENS).pred, got.loss(TEXT, TOKENS).pred)
    del source["video_pos_token.pos_token"]
    with pytest.raises(ConversionError, match="place_embed"):
        from_torch("dicode_lm", source, ORIGINAL)


def test_original_config_takes_missing_values_from_weights_and_vocabulary():
    large = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 40, "vocab_size": 50323}
    shapes = {"input_resampler.0.weight": np.zeros((10, Z))}
    shapes["pre_normalizer"] = np.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1)
    cfg = config_from_original({"gpt2": large, "agent": {"num_img_tokens": N}}, shapes)
    assert (cfg.pad_token_id, cfg.image_token_id) == (50256, 50258)
    assert (cfg.token_dim, cfg.mlp_dim, cfg.max_keyframes) == (Z, 10, 128)
    assert cfg.pre_normalizer == (1.0, 2.0, 3.0, 4.0)
    for option, message in (
        ({"llm_loss_weight": 0.5}, "llm_loss_weight = 0.5 is gone: the loss of the predictions"),
        ({"gmm_with_mse_and_l1": True}, "gmm_with_mse_and_l1 = True is gone: loss gmm alone"),
        ({"loss_func": "vae"}, "loss = 'vae' is gone: one of gmm, mse"),
    ):
        agent = {"num_img_tokens": N, **option}
        with pytest.raises(ValueError, match=message):
            config_from_original({"gpt2": large, "agent": agent}, shapes)
    with pytest.raises(ValueError, match=r"unknown option.*lora"):
        config_from_original({"gpt2": large, "agent": {"num_img_tokens": N, "lora": 8}}, shapes)
