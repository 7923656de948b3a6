"""The causal autoencoder of videos: its rules for odd and even frames, chunks, full size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.autoencoder_causal3d import (
    AutoencoderCausal3D,
    AutoencoderCausal3DConfig,
    double_frames,
    halve_frames,
    repeat_to,
)
from dicode_jax.nn.rngs import blank

TINY = AutoencoderCausal3DConfig(
    channels=2, encoder_mult=(1, 2), decoder_mult=(1, 2), encoder_blocks=1, decoder_blocks=1,
    z_channels=3, time_factor=2, num_groups=2,
)  # fmt: skip


def frames(*values):
    return jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1, 1)


@pytest.mark.parametrize(
    ("function", "given", "wanted"),
    [
        (double_frames, (1, 2, 3), (1, 2, 2, 3, 3)),
        (double_frames, (1, 2), (1, 1, 2, 2)),
        (double_frames, (1,), (1,)),
        (halve_frames, (1, 2, 4, 6, 8), (1, 3, 7)),
        (halve_frames, (2, 4, 6, 8), (3, 7)),
        (halve_frames, (5,), (5,)),
        (lambda z: repeat_to(z, (1, 5, 1, 1, 1)), (1, 2, 3), (1, 2, 2, 3, 3)),
        (lambda z: repeat_to(z, (1, 4, 1, 1, 1)), (1, 2), (1, 1, 2, 2)),
    ],
)
def test_the_first_of_an_odd_number_of_frames_stays_alone(function, given, wanted):
    np.testing.assert_array_equal(function(frames(*given)), frames(*wanted))


def test_a_scan_over_pairs_is_chunk_after_chunk_with_the_cache_handed_on():
    graph, state = nnx.split(blank(AutoencoderCausal3D, TINY))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state)
    model = nnx.merge(graph, drawn)
    z = jax.random.normal(jax.random.key(1), (1, 7, 2, 2, 3))
    scanned = jax.jit(model.decode)(z)
    assert scanned.shape == (1, 13, 4, 4, 3)
    decode = jax.jit(model.decode_chunk)
    first, cache = decode(z[:, :3])
    second, cache = decode(z[:, 3:5], cache)
    third, _ = decode(z[:, 5:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second, third], axis=1), scanned, atol=1e-5)
    decode_more = jax.jit(model.decode_more)
    pieces, cache = [], None
    for piece in (z[:, :3], z[:, 3:]):
        made, cache = decode_more(TINY.scale_factor * piece, cache)
        pieces.append(made)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), scanned, atol=1e-5)
    for piece, wanted in ((z[:, :2], "odd"), (z[:, :3], "even")):
        with pytest.raises(ValueError, match=f"must be {wanted}, got"):
            model.decode_more(piece, None if wanted == "odd" else cache)
    moved, _ = decode(z[:, 5:], jax.tree.map(lambda x: x + 1.0, cache))
    assert np.abs(moved - third).max() > 1e-3


def test_chunks_are_encoded_one_after_the_other_with_the_cache_handed_on():
    graph, state = nnx.split(blank(AutoencoderCausal3D, TINY))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state)
    model = nnx.merge(graph, drawn)
    video = jax.random.normal(jax.random.key(1), (1, 13, 4, 4, 3))
    encode = jax.jit(model.encoder)
    first, cache = encode(video[:, :5])  # a chunk is four frames, and one in front of the first
    second, cache = encode(video[:, 5:9], cache)
    third, _ = encode(video[:, 9:], cache)
    moments = jax.jit(model.moments, static_argnames="in_chunks")
    chunked = moments(video, in_chunks=True)
    assert chunked.shape == (1, 7, 2, 2, 6)
    np.testing.assert_allclose(jnp.concatenate([first, second, third], 1), chunked, atol=1e-5)
    whole = moments(video)  # whose norms pool over all frames
    assert 0.01 < np.abs(whole - chunked).max() < np.abs(whole).max()


def test_the_release_has_its_sizes():
    cfg = AutoencoderCausal3DConfig()
    model = blank(AutoencoderCausal3D, cfg)
    count = lambda part: sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(part)))  # noqa: E731
    assert (count(model.encoder), count(model.decoder)) == (92_215_456, 123_368_451)
    graph, state = nnx.split(model)
    video = jax.ShapeDtypeStruct((1, 49, 480, 720, 3), jnp.float32)
    moments = jax.eval_shape(lambda s, x: nnx.merge(graph, s).moments(x), state, video)
    assert moments.shape == (1, 13, 60, 90, 32)
    z = jax.ShapeDtypeStruct((1, 13, 60, 90, 16), jnp.float32)
    assert jax.eval_shape(lambda s, z: nnx.merge(graph, s).decode(z), state, z).shape == video.shape


def test_a_whole_video_is_encoded_that_is_not_decoded_again():
    model = blank(AutoencoderCausal3D, TINY)
    graph, state = nnx.split(model)
    for count, wanted in ((1, 1), (3, 2), (7, 4), (9, 5)):  # a latent of two frames each
        video = jax.ShapeDtypeStruct((1, count, 4, 4, 3), jnp.float32)
        moments = jax.eval_shape(lambda s, x: nnx.merge(graph, s).moments(x), state, video)
        assert moments.shape == (1, wanted, 2, 2, 6)


def test_videos_that_would_lose_frames_are_refused():
    cfg = AutoencoderCausal3DConfig()
    assert [cfg.num_latents(n) for n in (1, 5, 9, 13, 49)] == [1, 2, 3, 4, 13]
    assert [cfg.num_decodable(n) for n in (1, 9, 49)] == [1, 3, 13]
    with pytest.raises(ValueError, match=r"8 m \+ 1 frames \(1, 9, 17 ...\), got 13"):
        cfg.num_decodable(13)
    for count in (0, 4, 7):
        with pytest.raises(ValueError, match=rf"4 k \+ 1 frames \(1, 5, 9 ...\), got {count}"):
            cfg.num_latents(count)
    model = blank(AutoencoderCausal3D, TINY)
    for count in (7, 11):  # of which the whole can be encoded
        with pytest.raises(ValueError, match=rf"4 m \+ 1 frames .* got {count}"):
            model.moments(jnp.zeros((1, count, 4, 4, 3)), in_chunks=True)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        model.decode(jnp.zeros((1, 4, 2, 2, 3)))
    with pytest.raises(ValueError, match="multiples of 2, got 4x5"):
        model.moments(jnp.zeros((1, 5, 4, 5, 3)))
    with pytest.raises(ValueError, match="3 channels"):
        model.decode_chunk(jnp.zeros((1, 3, 2, 2, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 100}, "num_groups 32, got 100"),
        ({"decoder_mult": (1, 2)}, "same number of levels"),
        ({"time_factor": 3}, "power of 2, at most 8, got 3"),
        ({"z_channels": 0}, "z_channels must be at least 1"),
        ({"scale_factor": 0.0}, "scale_factor"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderCausal3DConfig(**changes)
