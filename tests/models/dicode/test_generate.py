import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm_inside import observed

from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.generate import generate, keyframes_in_sight
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.attention import KEYS_IN_PARTS
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.runtime.platform import tracing_for

B, L, N, Z = 2, 3, 4, 5
CONFIG = DiCoDeLMConfig(
    body=GPT2Config(num_layers=2, num_heads=2, embed_dim=8, max_seq_len=30, vocab_size=13),
    num_tokens=N,
    token_dim=Z,
    max_keyframes=5,
    num_mixtures=3,
    image_token_id=12,
    pad_token_id=11,
)
TEXT = jax.random.randint(jax.random.key(1), (B, L), 0, 11)
KEYS = jax.random.split(jax.random.key(9), B)
TOKENS = jax.random.normal(jax.random.key(5), (B, 1, N, Z))


def build(num_layers=1, **options) -> DiCoDeLM:
    body = dataclasses.replace(CONFIG.body, num_layers=num_layers)
    model = DiCoDeLM(dataclasses.replace(CONFIG, body=body, **options), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def lm():
    return build(num_layers=2)


def greedy(lm, num_keyframes, **options):
    return generate(lm, TEXT, num_keyframes=num_keyframes, do_sample=False, **options)


def sampled(lm, num_keyframes, **options):
    return generate(lm, TEXT, num_keyframes=num_keyframes, keys=KEYS, var_scale=1.0, **options)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("loss", ["gmm", "cosine"])
@pytest.mark.long
def test_training_forward_on_the_result_predicts_what_was_generated(loss):
    lm = build(loss=loss)
    tokens, seen = observed(lm, TEXT, num_keyframes=3, do_sample=False)
    pred = lm.loss(TEXT, tokens).pred
    close(seen.head_out.reshape(pred.shape), pred)
    assert tokens.shape == (B, 3, N, Z)


def test_greedy_result_is_a_prefix_of_a_longer_one(lm):
    close(greedy(lm, 2), greedy(lm, 4)[:, :2])


@pytest.mark.parametrize("num_given", [1, 3])
def test_going_on_from_the_first_keyframes_reproduces_the_tail(lm, num_given):
    whole = sampled(lm, 4)
    tail = sampled(lm, 4 - num_given, prefix=whole[:, :num_given])
    close(tail, whole[:, num_given:])


def test_parity_mode_keeps_the_wrong_numbers_after_a_prefix(lm):
    whole = greedy(lm, 3)
    faulty = greedy(lm, 2, prefix=whole[:, :1], parity=True)
    close(faulty[:, 0, 0], whole[:, 1, 0])  # the first token is predicted before any mark
    assert np.abs(faulty - whole[:, 1:]).max() > 1e-2
    close(greedy(lm, 3, parity=True), whole)  # without a prefix both agree


def test_a_sample_does_not_depend_on_its_batch(lm):
    both = sampled(lm, 2)
    one = generate(lm, TEXT[1:], num_keyframes=2, keys=KEYS[1:], var_scale=1.0)
    close(one[0], both[1])
    other = generate(lm, TEXT, num_keyframes=2, keys=KEYS[::-1], var_scale=1.0)
    assert np.abs(other - both).max() > 1e-2


@pytest.mark.long
def test_one_prompt_gives_the_same_tokens_as_it_is_traced_for_gpus(lm, monkeypatch):
    options = {"num_keyframes": 2, "keys": KEYS[:1], "var_scale": 1.0, "prefix": TOKENS[:1]}
    want = generate(lm, TEXT[:1], **options)
    caches = []
    empty = type(lm.body).init_cache
    note = lambda *args, **kwargs: caches.append(kwargs) or empty(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(lm.body), "init_cache", note)
    with tracing_for(platform="gpu"):
        got = generate(lm, TEXT[:1], **options)
    assert {cache["batch"] for cache in caches} == {1}
    assert {cache["size"] % KEYS_IN_PARTS for cache in caches} == {0}
    close(got, want)


@pytest.mark.long
def test_guidance_moves_away_from_the_empty_prompt(lm):
    close(greedy(lm, 2, guidance_scale=jnp.asarray(1.0)), greedy(lm, 2))
    tokens, seen = observed(lm, TEXT, num_keyframes=1, do_sample=False, guidance_scale=3.0)
    drawn = GaussianMixture.from_params(jnp.asarray(seen.head_out), 3).expected_value()
    cond, uncond = jnp.split(drawn, 2)
    close(tokens.reshape(B, N, Z), uncond + 3.0 * (cond - uncond))
    empty = generate(
        lm, jnp.full((1, L), 11), num_keyframes=1, do_sample=False, guidance_scale=5.0
    )  # an empty prompt differs in nothing from itself
    close(empty, generate(lm, jnp.full((1, L), 11), num_keyframes=1, do_sample=False))


def test_guidance_works_with_a_prefix(lm):
    whole = sampled(lm, 3, guidance_scale=1.5, share_guidance_draws=True)
    options = {"guidance_scale": 1.5, "share_guidance_draws": True}
    close(sampled(lm, 2, prefix=whole[:, :1], **options), whole[:, 1:])


def test_no_variance_and_cold_logits_are_the_means_of_the_heaviest_components(lm):
    options = {"keys": KEYS, "var_scale": 0, "logits_temperature": 1e-4}
    got, seen = observed(lm, TEXT, num_keyframes=1, **options)
    raw = seen.head_out
    best = raw[..., -3:].argmax(-1)
    means = raw[..., : 3 * Z].reshape(B, N, 3, Z)
    want = np.take_along_axis(means, best[..., None, None], axis=2)[:, :, 0]
    close(got[:, 0], want)


def test_longer_videos_slide_a_window(lm):
    # 3 + 1 + 5*5 - 2 of 30 positions: five keyframes fit, as many as the table has rows
    assert keyframes_in_sight(lm, L) == 5
    got = sampled(lm, 9, overlap=2)
    assert got.shape == (B, 9, N, Z)
    first = sampled(lm, 5)
    close(got[:, :5], first)
    # what comes next goes on from the last two keyframes and draws as token 20, 21, ...
    again = sampled(lm, 4, prefix=got[:, :5], overlap=2)
    close(again, got[:, 5:])
    small = sampled(lm, 6, window=3, overlap=1)
    close(small[:, :3], first[:, :3])
    np.testing.assert_array_equal(np.isfinite(small), True)
    assert np.abs(small[:, 3:5] - first[:, 3:5]).max() > 1e-3


def test_windows_of_any_number_share_their_tail(lm):
    long, longer = (sampled(lm, k, window=3, overlap=1) for k in (8, 11))
    close(long, longer[:, :8])


def test_generation_works_under_an_outer_jit(lm):
    graph, state = nnx.split(lm)

    @jax.jit
    def run(state, keys, var_scale):
        return generate(
            nnx.merge(graph, state), TEXT, num_keyframes=2, keys=keys, var_scale=var_scale
        )

    close(run(state, KEYS, 1.0), sampled(lm, 2))


def test_scanned_layers_generate_the_same(lm):
    other = nnx.merge(*nnx.split(lm))
    other.body = with_scan_layers(lm.body)
    close(greedy(other, 2), greedy(lm, 2))


@pytest.mark.long
def test_outputs_are_in_the_scale_of_the_tokenizer():
    plain, scaled = build(), build(pre_normalizer=(1.0, 2.0, 3.0, 4.0))
    want = greedy(plain, 2) * jnp.arange(1.0, 5.0)[:, None]
    close(greedy(scaled, 2), want)
    close(greedy(scaled, 1, prefix=want[:, :1]), want[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keyframes": 0}, "num_keyframes must be positive, got 0"),
        ({}, "sampling needs keys"),
        ({"keys": KEYS[:1]}, "1 keys for 2 prompts"),
        ({"prefix": jnp.zeros((B, 1, N, Z + 1))}, "prefix has shape"),
        ({"do_sample": False, "var_scale": -1.0}, "var_scale must be at least 0"),
        ({"do_sample": False, "guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"do_sample": False, "window": 6}, "a window of 6 keyframes is impossible: 1 to 5"),
        ({"do_sample": False, "num_keyframes": 9, "overlap": 5}, "overlap of 1 to 4"),
        ({"do_sample": False, "num_keyframes": 6, "parity": True}, "with parity=True"),
    ],
)
def test_mistakes_get_one_clear_line(lm, options, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, TEXT, **{"num_keyframes": 2} | options)


def test_a_text_that_leaves_no_room_is_refused(lm):
    with pytest.raises(ValueError, match="a text of 28 tokens leaves no room"):
        generate(lm, jnp.zeros((1, 28), jnp.int32), num_keyframes=1, do_sample=False)
