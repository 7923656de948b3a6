"""Packed rows: every video is seen as it is alone, and the loss is the mean over their tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.stages.dicode.packing import pack_row
from dicode_jax.training.stage import WEIGHT
from dicode_jax.training.state import create_state, make_train_step

L, N, Z, IMAGE, PAD = 5, 3, 4, 20, 19
LENGTHS = ((1, 3, 2), (4, 1))  # keyframes of the videos in each row
GPT2 = GPT2Config(num_layers=1, num_heads=2, embed_dim=8, max_seq_len=30, vocab_size=23)
LLAMA = LlamaConfig(
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    embed_dim=8,
    mlp_dim=10,
    max_seq_len=30,
    vocab_size=23,
    rope_scaling=None,
)
CONFIG = DiCoDeLMConfig(
    body=GPT2,
    num_tokens=N,
    token_dim=Z,
    max_keyframes=4,
    mlp_dim=10,
    num_mixtures=3,
    image_token_id=IMAGE,
    pad_token_id=PAD,
)


def build(**options) -> DiCoDeLM:
    """A model none of whose parameters is zero."""
    graph, state = nnx.split(DiCoDeLM(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def videos(seed=0):
    """Rows of videos: text ids padded with `PAD`, and deep tokens."""
    rng = np.random.default_rng(seed)
    for row in LENGTHS:
        texts = [np.where(np.arange(L) < 3, rng.integers(0, PAD, L), PAD) for _ in row]
        yield texts, [rng.normal(size=(k, N, Z)).astype(np.float32) for k in row]


def pack(rows, row_length=45, max_frames=7):
    options = {"row_length": row_length, "max_frames": max_frames, "image_id": IMAGE, "pad_id": PAD}
    packed = [pack_row(texts, tokens, **options) for texts, tokens in rows]
    batch = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return jax.tree.map(jnp.asarray, batch)


@nnx.jit
def packed_loss(model, batch):
    return model.packed_loss(**batch)


@nnx.jit
def _each_alone(model, texts, tokens, inputs, mask):
    def alone(text, tokens, inputs, mask):
        return model.loss(text[None], tokens[None], inputs=inputs[None], frame_mask=mask[None])

    return jax.vmap(alone)(texts, tokens, inputs, mask)


def each_alone(model, rows, added=0.0):
    """What each video gives in a batch of its own; outputs have a leading axis over videos."""
    texts = np.stack([text for texts, _ in rows for text in texts]).astype(np.int32)
    videos = [video for _, tokens in rows for video in tokens]
    k = max(map(len, videos))
    tokens = np.stack([np.pad(v, ((0, k - len(v)), (0, 0), (0, 0))) for v in videos])
    mask = np.arange(k) < np.array([[len(v)] for v in videos])
    return _each_alone(model, *map(jnp.asarray, (texts, tokens, tokens + added, mask)))


@pytest.mark.parametrize(
    "options",
    [{}, {"body": LLAMA}, {"loss": "cosine"}],
    ids=["gmm", "llama", "cosine"],
)
@pytest.mark.long
def test_loss_is_the_mean_over_tokens_of_the_videos_alone(options):
    model = build(**options)
    rows = list(videos())
    out, single = packed_loss(model, pack(rows)), each_alone(model, rows)
    weights = [k for row in LENGTHS for k in row]
    wanted = np.average(single.loss, weights=weights)
    np.testing.assert_allclose(out.loss, wanted, rtol=1e-6)
    wanted = single.pred[single.valid]
    np.testing.assert_allclose(out.pred[out.valid], wanted, atol=5e-6)


def test_balanced_loss_is_the_mean_over_videos():
    model = build(balance_samples=True)
    rows = list(videos())
    wanted = np.mean(each_alone(model, rows).loss)
    np.testing.assert_allclose(packed_loss(model, pack(rows)).loss, wanted, rtol=1e-6)


def test_nothing_of_a_video_reaches_its_neighbours():
    model = build()
    rows = list(videos())
    base = packed_loss(model, pack(rows)).pred
    (texts, tokens), other = rows
    tokens = [tokens[0], 50 * tokens[1], tokens[2]]
    texts = [texts[0], (texts[1] + 1) % PAD, texts[2]]
    changed = packed_loss(model, pack([(texts, tokens), other])).pred
    np.testing.assert_array_equal(changed[0, :1], base[0, :1])
    np.testing.assert_array_equal(changed[0, 4:6], base[0, 4:6])
    np.testing.assert_array_equal(changed[1], base[1])
    assert np.abs(changed[0, 1:4] - base[0, 1:4]).max(-1).min() > 1e-3


def test_noisy_inputs_change_what_is_read_and_not_what_is_predicted():
    model, rows = build(), list(videos())
    batch = pack(rows)

    @nnx.jit
    def noisy_loss(model, batch):
        return model.packed_loss(inputs=batch["tokens"] + 0.5, **batch)

    out, single = noisy_loss(model, batch), each_alone(model, rows, added=0.5)
    wanted = single.pred[single.valid]
    np.testing.assert_allclose(out.pred[out.valid], wanted, atol=5e-6)
    assert abs(float(out.loss - packed_loss(model, batch).loss)) > 1e-4


def test_length_of_the_row_and_room_for_keyframes_change_nothing():
    model, rows = build(), list(videos())
    base, roomy = (packed_loss(model, pack(rows, *size)).loss for size in ((45, 7), (60, 9)))
    np.testing.assert_allclose(base, roomy, rtol=1e-5)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.long
def test_parts_of_a_packed_batch_and_padded_videos_give_one_update(balance):
    """Rows hold 6 and 5 keyframes, and 3 and 2 videos: no part is as heavy as the other."""
    model, rows = build(balance_samples=balance), list(videos())
    graph, params = nnx.split(model)
    tx = optax.sgd(1.0)

    def padded_loss(params):
        out = each_alone(nnx.merge(graph, params), rows)
        return jnp.average(out.loss, weights=out.weight), out.weight.sum()

    def loss_fn(model, batch, keys):
        out = model.packed_loss(**batch)
        return out.loss, {WEIGHT: out.weight}

    (loss, weight), wanted = jax.value_and_grad(padded_loss, has_aux=True)(params)
    assert float(weight) == pytest.approx(5 if balance else 11 * N)
    step = make_train_step(graph, loss_fn, tx, optax.constant_schedule(1.0), accumulate_steps=2)
    state = create_state(params, tx, jax.random.key(0), use_ema=False)
    after, metrics = jax.jit(step)(state, {}, pack(rows))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    for old, new, gradient in zip(*map(jax.tree.leaves, (params, after.params, wanted))):
        # Sums in another order: float32 rounds each to 6e-8 of the largest.
        np.testing.assert_allclose(old - new, gradient, rtol=0, atol=2e-6 * largest)
