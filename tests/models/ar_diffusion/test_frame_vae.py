"""The frame VAE: its sizes, that tokens are directions, and what the temporal decoder looks at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.nn.rngs import ShapeRngs, blank

SIDE = QueryTransformerConfig(patch_size=4, embed_dim=12, num_layers=2, num_heads=3)
TINY = {
    "image_size": 8,
    "num_tokens": 5,
    "token_dim": 3,
    "codebook_size": 7,
    "encoder": SIDE,
    "decoder": SIDE,
    "pixel_decoder": MaskGITDecoderConfig(
        z_channels=6, channels=4, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=2
    ),
}


@pytest.fixture(scope="module")
def vae():
    return random_module(lambda: FrameVAE(FrameVAEConfig(**TINY), rngs=ShapeRngs()))


@pytest.fixture(scope="module")
def temporal():
    return FrameVAE(FrameVAEConfig(**TINY, temporal=True), rngs=nnx.Rngs(0))


def alive(model):
    """The model with every number drawn: no branch is zero."""
    graph, state = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(state))))
    draw = lambda x: 0.5 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, state))


decode = nnx.jit(lambda model, latents: model.decode(latents))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("with_time", "count"), [(False, 640_993_547), (True, 842_713_355)])
def test_the_full_size_has_the_parameters_of_the_release(with_time, count):
    model = blank(FrameVAE, FrameVAEConfig(temporal=with_time))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == count


def test_decoding_looks_at_the_directions_of_latents_alone(vae):
    z = normal(1, 2, 3, 5, 3)
    lengths = jnp.exp(normal(2, 2, 3, 5, 1))
    np.testing.assert_allclose(decode(vae, z), decode(vae, lengths * z), atol=1e-5)
    assert jnp.abs(decode(vae, z) - decode(vae, -z)).max() > 1e-5


def test_latents_are_the_raw_means_and_draws_have_length_one(vae):
    video = jax.random.uniform(jax.random.key(1), (2, 3, 8, 8, 3))
    latents = vae.encode(video)
    assert latents.shape == (2, 3, 5, 3)
    assert not np.allclose(np.linalg.norm(latents, axis=-1), 1.0, atol=1e-2)
    frames, posterior = vae(video, jax.random.key(2))
    assert frames.shape == video.shape
    drawn = posterior.sample(jax.random.key(2))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(decode(vae, drawn.reshape(2, 3, 5, 3)), frames, atol=1e-6)


def test_frames_do_not_know_each_other_without_time(vae):
    z = normal(1, 2, 3, 5, 3)
    one = jnp.stack([decode(vae, z[:, i : i + 1])[:, 0] for i in range(3)], axis=1)
    np.testing.assert_allclose(decode(vae, z), one, atol=1e-5)


def test_an_untrained_temporal_decoder_decodes_frame_by_frame(temporal, vae):
    graph, state = nnx.split(temporal)
    flat = dict(nnx.to_flat_state(state)) | dict(nnx.to_flat_state(nnx.state(vae)))
    started = nnx.merge(graph, nnx.from_flat_state(list(flat.items())))
    z = normal(1, 2, 3, 5, 3)
    np.testing.assert_allclose(decode(started, z), decode(vae, z), atol=1e-5)


@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_frames_look_back_and_never_ahead(temporal, part):
    model = alive(temporal)
    for block in getattr(model.temporal, "coarse" if part == "fine" else "fine"):
        out = block.out if part == "fine" else block.attn.out
        out.kernel[...], out.bias[...] = jnp.zeros_like(out.kernel), jnp.zeros_like(out.bias)
    z = normal(1, 2, 4, 5, 3)
    moved = z.at[:, 2].set(normal(2, 2, 5, 3))
    change = jnp.abs(decode(model, z) - decode(model, moved)).max((0, 2, 3, 4))
    np.testing.assert_array_equal(change[:2], 0.0)
    assert change[2] > 1e-4
    assert change[3] > 1e-6


def test_clips_of_a_batch_do_not_mix(temporal):
    model = alive(temporal)
    z = normal(1, 2, 3, 5, 3)
    one = jnp.concatenate([decode(model, z[:1]), decode(model, z[1:])])
    np.testing.assert_allclose(decode(model, z), one, atol=1e-5)


@pytest.mark.long
def test_recomputing_blocks_changes_no_gradient(vae):
    side = QueryTransformerConfig(**vars(SIDE) | {"remat": True})
    cfg = FrameVAEConfig(**TINY | {"encoder": side, "decoder": side})
    other = nnx.merge(nnx.graphdef(blank(FrameVAE, cfg)), nnx.state(vae))
    video = jax.random.uniform(jax.random.key(1), (1, 2, 8, 8, 3))
    gradient = nnx.jit(nnx.grad(lambda m: jnp.square(m(video)[0]).mean()))
    grads = [gradient(m) for m in (vae, other)]
    for got, want in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_what_cannot_work_is_refused_with_the_numbers(vae):
    with pytest.raises(ValueError, match="makes 4 pixels of a patch"):
        FrameVAEConfig(
            **TINY | {"decoder": QueryTransformerConfig(**vars(SIDE) | {"patch_size": 2})}
        )
    with pytest.raises(ValueError, match="multiple of patch_size, got 10 and 4"):
        FrameVAEConfig(**TINY | {"image_size": 10})
    with pytest.raises(ValueError, match="multiple of num_heads, got 12 and 5"):
        QueryTransformerConfig(embed_dim=12, num_heads=5)
    with pytest.raises(ValueError, match="5 tokens of 3 channels, got 4 of 3"):
        decode(vae, jnp.zeros((1, 1, 4, 3)))
    with pytest.raises(ValueError, match="must be 8x8 pixels, got 8x12"):
        vae.encode(jnp.zeros((1, 1, 8, 12, 3)))
