"""A clip decoder small enough to compile in seconds, every size distinct where it may be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs

CONFIG = ClipDecoderConfig(
    unet=UNet3DConfig(
        in_channels=5,
        out_channels=2,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        head_dim=4,
        context_dim=6,
        text_context_len=3,
        num_groups=4,
    ),
    autoencoder=AutoencoderKLConfig(
        channels=4,
        channel_mult=(1, 1),
        num_res_blocks=1,
        resolution=8,
        z_channels=2,
        embed_dim=2,
        num_groups=2,
    ),
    num_tokens=4,
    latent_head=ResamplerConfig(
        dim=8,
        depth=1,
        head_dim=4,
        num_heads=1,
        num_queries=4,
        embed_dim=6,
        output_dim=5,
        ff_mult=1,
        output_shape=(4, 4, 3),
    ),
)
TOKENS = jax.random.normal(jax.random.key(1), (3, 2, 4, 6))


def build(cfg: ClipDecoderConfig = CONFIG, **options) -> ClipDecoder:
    """A decoder with random numbers in every parameter, none of them zero; nothing is compiled."""
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: ClipDecoder(cfg, **options, rngs=ShapeRngs()))
    )
    rng = np.random.default_rng(3)

    def fill(path, leaf):
        values = 0.3 * rng.standard_normal(leaf.shape)
        return leaf.replace(jnp.asarray(values + (path[-1] == "scale"), leaf.dtype))

    flat = nnx.to_flat_state(abstract)
    return nnx.merge(graph, nnx.from_flat_state([(p, fill(p, leaf)) for p, leaf in flat]))


def with_prior(**options):
    """A config whose UNet says what a Gaussian about the latent image leaves open."""
    unet = dataclasses.replace(CONFIG.unet, in_channels=4)
    assert CONFIG.latent_head is not None
    head = dataclasses.replace(CONFIG.latent_head, output_shape=(4, 4, 2))
    return dataclasses.replace(CONFIG, **{"unet": unet, "latent_head": head, **options})
