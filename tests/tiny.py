"""A whole pipeline of random weights, small enough to build and run in a test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.clip import CLIPVisionConfig
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.dicode import DiCoDePipeline, PipelineConfig
from dicode_jax.text import gpt as text

NUM_TOKENS, TOKEN_DIM, NUM_FRAMES = 3, 8, 4


def random_module(build) -> nnx.Module:
    """The module with plain random parameters: its own initialisation would compile for minutes."""
    rng, graphs = np.random.default_rng(0), []

    def make():
        graph, state = nnx.split(build())
        graphs.append(graph)
        return state

    abstract = jax.eval_shape(make)  # sooner than nnx's own, which keeps track of changes

    def draw(leaf):
        values = rng.normal(scale=0.1, size=leaf.shape) + (len(leaf.shape) == 1)
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphs[0], jax.tree.map(draw, abstract))


def with_value(module: nnx.Module, value: float) -> nnx.Module:
    """The module with `value` in all of its largest array."""
    graph, state = nnx.split(module)
    largest = max(leaf.size for leaf in jax.tree.leaves(state))
    fill = lambda leaf: jnp.full_like(leaf, value) if leaf.size == largest else leaf  # noqa: E731
    return nnx.merge(graph, jax.tree.map(fill, state))


def tiny_pipeline() -> DiCoDePipeline:
    """Modules of its own each time, of arrays that are drawn once."""
    parts, tokenizer_text = _parts()
    own = lambda graph, state: nnx.merge(graph, jax.tree.map(lambda x: x, state))  # noqa: E731
    return DiCoDePipeline(
        **{name: own(*part) for name, part in parts.items()},
        text=tokenizer_text,
        config=PipelineConfig(
            frame_size=16,
            fps=NUM_FRAMES / 2,
            text_length=14,
            sampling=SamplingConfig(num_frames=NUM_FRAMES, num_inference_steps=2),
        ),
    )


def with_latent_prior(cfg):
    """The like of a clip decoder's config whose UNet says what a Gaussian leaves open."""
    h, w, c = cfg.latent_shape
    head = ResamplerConfig(
        dim=16,
        depth=1,
        head_dim=8,
        num_heads=2,
        num_queries=4,
        embed_dim=cfg.token_dim,
        output_dim=h * w * c // 4,
        output_shape=(h, w, c),
    )
    unet = dataclasses.replace(cfg.unet, in_channels=2 * c)
    return dataclasses.replace(cfg, unet=unet, latent_head=head, latent_prior=0.3)


@functools.cache
def _parts():
    """Graph and arrays of each part, and the words."""
    tokenizer_text = text.train_small(all_captions())
    tokenizer = DeepTokenizerConfig(
        vision=CLIPVisionConfig(
            image_size=16, patch_size=8, embed_dim=12, num_layers=1, num_heads=2, output_dim=None
        ),
        resampler=ResamplerConfig(
            dim=16,
            depth=1,
            head_dim=8,
            num_heads=2,
            num_queries=NUM_TOKENS,
            embed_dim=12,
            output_dim=TOKEN_DIM,
        ),
        preprocess="plain",
    )
    decoder = ClipDecoderConfig(
        unet=UNet3DConfig(
            model_channels=8,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_resolutions=(1,),
            temporal_attention=False,
            temporal_conv=False,
            init_attention=False,
            head_dim=8,
            context_dim=TOKEN_DIM,
            text_context_len=2,
            image_tokens_per_frame=NUM_TOKENS,
            temporal_length=NUM_FRAMES,
            num_groups=4,
        ),
        autoencoder=AutoencoderKLConfig(
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            resolution=16,
            num_groups=4,
            mid_attention=False,
        ),
        schedule=NoiseSchedule(zero_terminal_snr=True, parameterization="v"),
        num_tokens=NUM_TOKENS,
    )
    language_model = DiCoDeLMConfig(
        body=GPT2Config(
            num_layers=1,
            num_heads=2,
            embed_dim=16,
            max_seq_len=64,
            vocab_size=tokenizer_text.vocab_size,
        ),
        num_tokens=NUM_TOKENS,
        token_dim=TOKEN_DIM,
        max_keyframes=6,
        num_mixtures=2,
        image_token_id=tokenizer_text.image_start_id,
        pad_token_id=tokenizer_text.pad_id,
    )
    build = {
        "tokenizer": lambda: DeepTokenizer(tokenizer, rngs=ShapeRngs()),
        "decoder": lambda: ClipDecoder(decoder, rngs=ShapeRngs()),
        "language_model": lambda: DiCoDeLM(language_model, rngs=ShapeRngs()),
    }
    parts = {name: nnx.split(random_module(make)) for name, make in build.items()}
    return parts, tokenizer_text
