"""The two constants of a clip decoder, computed from planned weights one block at a time.

They are the text tower's embedding of the empty prompt and the deep tokens of a grey image. No more
than one block of a tower is in memory, so a conversion stays as lean as its largest tensor.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.engine.plan import Plan, fill
from convert.engine.sources import LazyTensor
from dicode_jax.media.transforms import clip_preprocess
from dicode_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.nn.resampler import Resampler
from dicode_jax.nn.rngs import blank
from dicode_jax.text.clip import ClipTokenizer


def lazy(
    text: Plan,
    text_cfg: CLIPTextConfig,
    tokenizer: Plan,
    tokenizer_cfg: DeepTokenizerConfig,
    layer: str = "penultimate",
) -> dict[str, LazyTensor]:
    """Both constants under their names in a `ClipDecoder`, computed when they are read."""
    float32 = np.dtype(np.float32)
    return {
        "text_context": LazyTensor(
            (text_cfg.max_seq_len, text_cfg.embed_dim),
            float32,
            lambda: empty_text_context(text, text_cfg, layer),
        ),
        "null_tokens": LazyTensor(
            (tokenizer_cfg.num_tokens, tokenizer_cfg.token_dim),
            float32,
            lambda: null_tokens(tokenizer, tokenizer_cfg),
        ),
    }


def empty_text_context(plan: Plan, cfg: CLIPTextConfig, layer: str = "penultimate") -> np.ndarray:
    """Text tokens [l, d] of the empty prompt, float32.

    Args:
      plan: Of a text tower.
      layer: "penultimate" or "last", see `CLIPText`.
    """
    one = dataclasses.replace(cfg, num_layers=1)
    tower = fill(blank(CLIPText, one), plan)
    ids = jnp.asarray(ClipTokenizer(None, cfg.vocab_size)([""], cfg.max_seq_len))
    mask = jnp.tril(jnp.ones((cfg.max_seq_len, cfg.max_seq_len), bool))[None, None]
    count = cfg.num_layers - (layer == "penultimate")
    x = _through(plan, "blocks", tower.blocks[0], count, tower.embed(ids), mask)
    return np.asarray(tower.norm_final(x)[0], np.float32)


def null_tokens(plan: Plan, cfg: DeepTokenizerConfig) -> np.ndarray:
    """Deep tokens [n, z] of a grey (zero) image, float32.

    Args:
      plan: Of a deep tokenizer.
    """
    size = cfg.vision.image_size
    one = dataclasses.replace(cfg.vision, num_layers=1)
    tower = fill(blank(CLIPVision, one), plan, "vision.")
    pixels = jnp.zeros((1, size, size, 3), jnp.float32)
    if cfg.preprocess == "clip":
        pixels = clip_preprocess(pixels, size, cfg.image_mean, cfg.image_std)
    x = tower.norm_pre(tower.embed(pixels))
    x = _through(plan, "vision.blocks", tower.blocks[0], cfg.vision.num_layers, x, None)
    resampler = fill(blank(Resampler, cfg.resampler), plan, "resampler.")
    tokens = nnx.jit(lambda module, x: module(x))(resampler, x)
    return np.asarray(tokens[0], np.float32)


def _through(plan: Plan, prefix: str, block: nnx.Module, count: int, x, mask) -> jax.Array:
    """`count` blocks after one another, each read when it is its turn."""
    graph = nnx.graphdef(block)

    @jax.jit
    def step(state, x):
        return nnx.merge(graph, state)(x, mask)

    for i in range(count):
        x = step(nnx.state(fill(block, plan, f"{prefix}.{i}.")), x)
    return x
