"""LanDiff's language model: a caption and two numbers in, semantic tokens of a video out.

Yin et al. (arXiv 2503.04606). The sequence is BOS, one position each for the number of frames and
the motion score, the caption as a text encoder gives it, and then for each frame a mark, its
tokens and another mark; EOS comes last:

    BOS frames motion text .. | START_I code .. END_I | START_P code .. END_P | .. | EOS

A further segment starts with START_I again. Left out of the release: the head that predicts the
motion score and an EOS that the model itself chooses, both off there. `generate` writes the tokens.

Letters: b batch, l text tokens, e their width, n semantic tokens, t positions, d model width.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.nn.activations import tanh_gelu
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.masks import causal_mask, key_mask, positions_from_valid
from dicode_jax.nn.modulation import TimestepEmbedder
from dicode_jax.typing import Array, Bool, Float, Int, typechecked

NO_TOKEN = -100  # where a position is a feature and no token
CODE = -1  # in a layout: any code
NUM_PREFIX = 3  # BOS and the two numbers, in front of the text
MARKS = ("eos", "bos", "start_iframe", "end_iframe", "start_pframe", "end_pframe", "pad")
"""Tokens behind the codes, in the order of their ids."""

RELEASED_BODY = LlamaConfig(
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    embed_dim=2048,
    mlp_dim=11_008,
    max_seq_len=32_768,
    vocab_size=2055,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    rotates_pairs=True,
    activation="tanh_gelu",
    last_norm="layer",
    tie_embeddings=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Sizes of the model; the defaults are the release's, of 2.05 billion parameters.

    Attributes:
      body: The transformer; its vocabulary is the codes and the seven of `MARKS`.
      frames: Tokens of a frame.
      codebook_size: Number of codes.
      text_dim: Width of the text encoder's vectors.
      micro_dim: Width between the two layers that embed a number.
      sinusoid_dim: Width of the sinusoids of a number.

    Raises:
      ValueError: A size is not positive, or the vocabulary does not fit.
    """

    body: LlamaConfig = RELEASED_BODY
    frames: FrameTokens = FrameTokens()
    codebook_size: int = 2048
    text_dim: int = 4096
    micro_dim: int = 512
    sinusoid_dim: int = 256

    def __post_init__(self):
        for name in ("codebook_size", "text_dim", "micro_dim", "sinusoid_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.body.vocab_size != self.codebook_size + len(MARKS):
            raise ValueError(
                f"the body has a vocabulary of {self.body.vocab_size}; {self.codebook_size} codes "
                f"and {len(MARKS)} marks need {self.codebook_size + len(MARKS)}"
            )

    def mark(self, name: str) -> int:
        """The id of one of `MARKS`."""
        return self.codebook_size + MARKS.index(name)

    def layout(self, num_frames: int) -> np.ndarray:
        """The tokens of a video without EOS, int32 `[t]`: ids of marks, and `CODE` for codes."""
        out: list[int] = []
        for count, frame in zip(self.frames.per_frame(num_frames), self._kinds(num_frames)):
            marks = self.mark(f"start_{frame}"), self.mark(f"end_{frame}")
            out += [marks[0], *[CODE] * count, marks[1]]
        return np.asarray(out, np.int32)

    def _kinds(self, num_frames: int) -> list[str]:
        lengths = self.frames.segments(num_frames)
        return [kind for n in lengths for kind in ("iframe", *["pframe"] * (n - 1))]


class Sequence(NamedTuple):
    """What the model is trained on.

    Attributes:
      features: What goes into the body, `[b, t, d]`.
      tokens: Ids `[b, t]`, `NO_TOKEN` where a position is none; position `t` predicts `t + 1`.
      is_learned: Bool `[b, t]`: tokens whose prediction counts.
      valid: Bool `[b, t]`, False at padding of the text.
    """

    features: Array
    tokens: Array
    is_learned: Array
    valid: Array


class LanguageModel(nnx.Module):
    """The body, and what makes positions of a caption and of two numbers."""

    def __init__(
        self, cfg: LanguageModelConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg, self.dtype = cfg, dtype
        d, normal = cfg.body.embed_dim, nnx.initializers.normal(0.02)
        linear = functools.partial(Linear, kernel_init=normal, **kwargs)
        zeros = functools.partial(Linear, kernel_init=nnx.initializers.zeros_init(), **kwargs)
        self.text_in, self.text_out = linear(cfg.text_dim, d), linear(d, d)
        self.null_text = nnx.Param(normal(rngs.params(), (d,), param_dtype))
        number = functools.partial(
            TimestepEmbedder,
            d,
            sinusoid_dim=cfg.sinusoid_dim,
            hidden_dim=cfg.micro_dim,
            linear=linear,
            last=zeros,
        )
        self.num_frames, self.motion_score = number(), number()
        self.body = Llama(cfg.body, **kwargs)

    @typechecked
    def embed_text(
        self, text: Float[Array, "b l e"], dropped: Bool[Array, " b"] | None = None
    ) -> Float[Array, "b l d"]:
        """Positions for a caption.

        Args:
          text: Of the text encoder.
          dropped: Rows that get the null vector at each position instead.
        """
        x = self.text_out(tanh_gelu(self.text_in(text)))
        if dropped is None:
            return x
        return jnp.where(dropped[:, None, None], self.null_text[...].astype(x.dtype), x)

    @typechecked
    def embed_numbers(
        self, num_frames: Float[Array, " b"], motion_score: Float[Array, " b"]
    ) -> Float[Array, "b 2 d"]:
        """Positions for the number of semantic frames and the motion score."""
        return jnp.stack([self.num_frames(num_frames), self.motion_score(motion_score)], axis=1)

    @typechecked
    def embed_prompt(
        self,
        text: Float[Array, "b l e"],
        num_frames: Float[Array, " b"],
        motion_score: Float[Array, " b"],
        dropped: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Everything in front of the first frame, `t = 3 + l`."""
        bos = jnp.full((len(text), 1), self.cfg.mark("bos"), jnp.int32)
        parts = [
            self.body.embed_tokens(bos),
            self.embed_numbers(num_frames, motion_score),
            self.embed_text(text, dropped),
        ]
        return jnp.concatenate([part.astype(parts[0].dtype) for part in parts], axis=1)

    def lay_out(
        self,
        text: Float[Array, "b l e"],
        codes: Int[Array, "b n"],
        *,
        motion_score: Float[Array, " b"],
        text_valid: Bool[Array, "b l"] | None = None,
        dropped: Bool[Array, " b"] | None = None,
    ) -> Sequence:
        """Whole sequences to learn.

        Args:
          text: Of the text encoder, padded where `text_valid` is False.
          codes: Semantic tokens, of one number of frames.
          dropped: See `embed_text`.

        Raises:
          ValueError: No video has so many codes.
        """
        cfg, (b, l) = self.cfg, text.shape[:2]  # noqa: E741
        num_frames = cfg.frames.num_frames(codes.shape[1])
        layout = np.append(cfg.layout(num_frames), cfg.mark("eos"))
        tokens = fill(layout, codes)
        frames = jnp.full((b,), num_frames, jnp.float32)
        prompt = self.embed_prompt(text, frames, motion_score, dropped)
        features = jnp.concatenate([prompt, self.body.embed_tokens(tokens)], axis=1)
        before = jnp.full((b, NUM_PREFIX + l), NO_TOKEN, jnp.int32).at[:, 0].set(cfg.mark("bos"))
        is_learned = np.arange(features.shape[1]) >= NUM_PREFIX + l
        return Sequence(
            features=features,
            tokens=jnp.concatenate([before, tokens], axis=1),
            is_learned=jnp.broadcast_to(is_learned, features.shape[:2]),
            valid=validity(text_valid, b, l, len(layout)),
        )

    def __call__(
        self, features: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t v"]:
        """Scores of the next token at each position, float32; no position sees padding."""
        positions = mask = None
        if valid is not None:
            mask = causal_mask(features.shape[1]) & key_mask(valid)
            positions = positions_from_valid(valid)
        return self.body.logits(self.body(features, positions, mask)[0])


def fill(layout: np.ndarray, codes: Int[Array, "b n"]) -> Int[Array, "b t"]:
    """The layout `[t]` with the codes of each row in its free places."""
    rows = jnp.broadcast_to(jnp.asarray(layout, jnp.int32), (len(codes), len(layout)))
    return rows.at[:, np.flatnonzero(layout == CODE)].set(codes.astype(jnp.int32))


def validity(
    text_valid: Bool[Array, "b l"] | None, b: int, length: int, behind: int
) -> Bool[Array, "b t"]:
    """Which positions are no padding, with a text of `length` and `behind` positions after it."""
    text = jnp.ones((b, length), bool) if text_valid is None else text_valid
    ones = functools.partial(jnp.ones, dtype=bool)
    return jnp.concatenate([ones((b, NUM_PREFIX)), text, ones((b, behind))], axis=1)
