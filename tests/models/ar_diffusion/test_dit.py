"""What a frame can learn of another, what stays as it is, and the contexts of classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig, DiT, DiTConfig
from dicode_jax.nn.layer_stack import with_scan_layers

TINY = DiTConfig(
    num_frames=3,
    num_tokens=2,
    channels=4,
    embed_dim=24,
    num_layers=3,
    num_heads=2,
    context_len=5,
    context_dim=7,
)


def alive(module, seed=0):
    """The module with every parameter drawn, so that no branch is zero."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


def inputs(cfg=TINY, frames=3):
    x = jax.random.normal(jax.random.key(1), (2, frames, cfg.num_tokens, cfg.channels))
    context = jax.random.normal(jax.random.key(2), (2, cfg.context_len, cfg.context_dim))
    return x, jnp.array([[3, 500, 999], [0, 1, 2]])[:, :frames], context


def change_by_last_frame(model):
    x, t, context = inputs(model.cfg)
    moved = model(x.at[:, -1].add(1.0), t, context) - model(x, t, context)
    return np.abs(moved).max(axis=(0, 2, 3))


@pytest.mark.parametrize("variant", [{}, {"rotary": True, "qk_norm": True}])
def test_later_frames_reach_earlier_ones_through_the_context_alone(variant):
    cfg = dataclasses.replace(TINY, **variant)
    leaks = {}
    for mask in ("temporal_causal", "video_temporal_causal", "none"):
        model = alive(DiT(dataclasses.replace(cfg, mask=mask), rngs=nnx.Rngs(0)))
        leaks[mask] = change_by_last_frame(model)
        assert leaks[mask][-1] > 1e-3
    assert (leaks["temporal_causal"][:-1] == 0).all()
    assert (leaks["video_temporal_causal"][:-1] > 1e-4).all()
    assert (leaks["none"][:-1] > 1e-4).all()
    shallow = dataclasses.replace(cfg, num_layers=1)
    assert (change_by_last_frame(alive(DiT(shallow, rngs=nnx.Rngs(0))))[:-1] == 0).all()


def test_a_timestep_steers_its_own_frame_in_the_first_layer():
    cfg = dataclasses.replace(TINY, num_layers=1, mask="temporal_causal")
    model, (x, t, context) = alive(DiT(cfg, rngs=nnx.Rngs(0))), inputs()
    moved = np.abs(model(x, t.at[:, 1].add(100), context) - model(x, t, context)).max((0, 2, 3))
    assert moved[0] == 0
    assert (moved[1:] > 1e-4).all()


def test_before_training_the_prediction_is_zero():
    assert not np.any(DiT(TINY, rngs=nnx.Rngs(0))(*inputs()))


def test_fewer_frames_are_the_first_of_a_causal_window_and_more_are_refused():
    cfg = dataclasses.replace(TINY, mask="temporal_causal")
    model, (x, t, context) = alive(DiT(cfg, rngs=nnx.Rngs(0))), inputs()
    short = model(x[:, :2], t[:, :2], context)
    np.testing.assert_allclose(short, model(x, t, context)[:, :2], atol=1e-5)
    with pytest.raises(ValueError, match="at most 3 frames, got 6"):
        model(jnp.concatenate([x, x], axis=1), jnp.concatenate([t, t], axis=1), context)


def test_stacked_blocks_compute_the_same():
    model = alive(DiT(TINY, rngs=nnx.Rngs(0)))
    stacked = with_scan_layers(model)
    np.testing.assert_allclose(stacked(*inputs()), model(*inputs()), atol=1e-5)


@pytest.mark.parametrize(
    ("num_classes", "null", "row"),
    [(0, "zero", None), (3, "first", 0), (3, "own", 3), (0, "own", None)],
)
def test_contexts_are_rows_and_minus_one_is_the_null_context(num_classes, null, row):
    model = Denoiser(DenoiserConfig(dit=TINY, num_classes=num_classes, null=null), rngs=nnx.Rngs(0))
    got = model.contexts(jnp.array([1, -1, 2]))
    table = model.context[...]
    for i, label in ((0, 1), (2, 2)):
        np.testing.assert_array_equal(got[i], table[label] if num_classes else table)
    if row is not None:
        want = table[row]
    else:
        want = model.null[...] if null == "own" else np.zeros((5, 7))
    np.testing.assert_array_equal(got[1], want)


def test_a_class_has_the_contexts_of_its_parts():
    dit = dataclasses.replace(TINY, context_len=6)
    cfg = DenoiserConfig(dit=dit, num_classes=12, class_parts=(2, 3, 2))
    model = Denoiser(cfg, rngs=nnx.Rngs(0))
    table = model.context[...]
    assert table.shape == (7, 2, 7)
    assert model.null.shape == (6, 7)
    classes = [(1, 0, 1), (0, 2, 0), (1, 2, 1)]
    got = model.contexts(jnp.array([i * 6 + j * 2 + k for i, j, k in classes] + [-1]))
    for row, (i, j, k) in zip(got, classes, strict=False):
        np.testing.assert_array_equal(row, table[np.array([i, 2 + j, 5 + k])].reshape(6, 7))
    np.testing.assert_array_equal(got[-1], model.null[...])
    first = dataclasses.replace(cfg, null="first")
    np.testing.assert_array_equal(
        Denoiser(first, rngs=nnx.Rngs(0)).null_context(), table[np.array([0, 2, 5])].reshape(6, 7)
    )


@pytest.mark.parametrize(
    ("parts", "words"),
    [((2, 3), "must multiply to num_classes 12"), ((4, 3), "context_len 5 must be a multiple")],
)
def test_parts_that_do_not_make_the_classes_are_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        DenoiserConfig(dit=TINY, num_classes=12, class_parts=parts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "must divide"),
        ({"mask": "causal"}, "mask must be one of"),
        ({"channels": 0}, "channels must be positive"),
        ({"embed_dim": 6, "num_heads": 2, "rotary": True}, "even width"),
    ],
)
def test_impossible_sizes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match="there are no classes"):
        DenoiserConfig(null="first")
