"""LanDiff's semantic tokenizer: features of a video to a few codes per frame, and back.

Yin et al. (arXiv 2503.04606), after TiTok. Learned queries stand behind the features of all frames
and leave as tokens: many for the first, the I frame, few for each other, a P frame, all of which
share theirs. The decoder reads them behind as many copies of one mask token as there are features.
Frames see those before them and never those behind, in both directions, so that tokens can be
decoded as they come. Positions are rotary: time, row and column for features, thrice its number
for a token.

Letters: b batch, f semantic frames, y x places of a frame, c width of a feature, n tokens, t
positions, d model width, e width of a token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.models.landiff.frames import FrameTokens, check_codes
from dicode_jax.nn.activations import gelu
from dicode_jax.nn.kv_cache import KVCache
from dicode_jax.nn.layer_stack import run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.masks import LabelMask
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.quantizer import Quantizer
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.rotary import axial_tables, rotary_frequencies
from dicode_jax.nn.transformer import MLP, Attention, Block
from dicode_jax.typing import Array, Float, Int, typechecked

INIT = nnx.initializers.truncated_normal(0.02)
FEATURE = -1  # in the place of a token's number


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticTokenizerConfig:
    """Sizes of both sides; the defaults are the release's.

    Attributes:
      frames: Tokens of a frame; a call has at most one segment.
      grid: Rows and columns of the features of a frame.
      feature_dim: Width of a feature.
      embed_dim, num_layers, num_heads: Each transformer, with a feed-forward width of four times
        `embed_dim`.
      token_dim: Width of a token, before and behind the codes.
      codebook_size, code_dim: Number of codes, and their width.
      rope_theta: Base of the rotary frequencies.
      remat: What of each block the backward pass computes again, see `nn.remat`.

    Raises:
      ValueError: A size is not positive, or heads are not a multiple of 16 wide.
    """

    frames: FrameTokens = FrameTokens()
    grid: tuple[int, int] = (30, 45)
    feature_dim: int = 768
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    token_dim: int = 768
    codebook_size: int = 2048
    code_dim: int = 16
    rope_theta: float = 10_000.0
    remat: Remat = False

    def __post_init__(self):
        sizes = ("feature_dim", "embed_dim", "num_layers", "num_heads", "token_dim")
        for name in (*sizes, "codebook_size", "code_dim", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_counts(self, num_layers=1000)
        if len(self.grid) != 2 or min(self.grid) < 1 or max(self.grid) > 4096:
            raise ValueError(f"grid must be rows and columns from 1 to 4096, got {self.grid}")
        if self.embed_dim % self.num_heads or self.head_dim % 16:
            raise ValueError(
                f"heads must be a multiple of 16 wide for positions on three axes, got embed_dim "
                f"{self.embed_dim} and num_heads {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def num_places(self) -> int:
        """Features of a frame."""
        return self.grid[0] * self.grid[1]

    def check_frames(self, num_frames: int) -> None:
        """Refuses more than a segment. Raises ValueError."""
        if not 1 <= num_frames <= self.frames.segment:
            raise ValueError(
                f"the tokenizer takes 1 to {self.frames.segment} semantic frames, a segment; got "
                f"{num_frames}"
            )


# Labels of a position: its frame, and the number of its token or `FEATURE`.


def labels(cfg: SemanticTokenizerConfig, num_frames: int) -> Int[Array, "t 2"]:
    """Labels of all features, frame by frame, and behind them of all tokens."""
    features = jnp.repeat(jnp.arange(num_frames), cfg.num_places)
    tokens = jnp.asarray(np.repeat(np.arange(num_frames), cfg.frames.per_frame(num_frames)))
    number = jnp.concatenate([jnp.full_like(features, FEATURE), jnp.arange(len(tokens))])
    return jnp.stack([jnp.concatenate([features, tokens]), number], axis=1)


def sees_in_encoder(query: Array, key: Array) -> Array:
    """Features see features, and tokens both, of frames up to their own; tokens none behind."""
    (frame, number), (other, before) = (jnp.moveaxis(x, -1, 0) for x in (query, key))
    feature = (before == FEATURE) & (other <= frame)
    return feature | ((number != FEATURE) & (before != FEATURE) & (before <= number))


def sees_in_decoder(query: Array, key: Array) -> Array:
    """Everything sees everything of frames up to its own."""
    return key[..., 0] <= query[..., 0]


def places(cfg: SemanticTokenizerConfig, num_frames: int) -> Int[Array, "t 3"]:
    """Positions of what `labels` names: time, row and column."""
    (rows, columns), count = cfg.grid, cfg.frames.count(num_frames)
    at = jnp.indices((num_frames, rows, columns)).reshape(3, -1)
    numbers = jnp.broadcast_to(jnp.arange(count), (3, count))
    return jnp.concatenate([at, numbers], axis=1).T


def rotary(cfg: SemanticTokenizerConfig, positions: Int[Array, "t 3"]) -> tuple[Array, Array]:
    """Cosines and sines: a quarter of the channels turn with time, 3/8 with row and column each."""
    quarter, rest = cfg.head_dim // 4, cfg.head_dim // 8 * 3
    freqs = [rotary_frequencies(width, theta=cfg.rope_theta) for width in (quarter, rest, rest)]
    return axial_tables(positions, freqs)


def make_block(cfg: SemanticTokenizerConfig, **options) -> Block:
    """A block without biases in its attention."""
    linear = functools.partial(Linear, kernel_init=INIT, **options)
    dim = cfg.embed_dim
    return Block(
        norm=lambda: layer_norm(dim, **options),
        attention=lambda: Attention(
            dim,
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            rotates_pairs=True,
            linear=functools.partial(linear, use_bias=False),
        ),
        mlp=lambda: MLP(dim, 4 * dim, activation=gelu, linear=linear),
    )


class _Stack(nnx.Module):
    """Norm, blocks, norm; what both sides have."""

    def __init__(self, cfg: SemanticTokenizerConfig, **options):
        self.cfg = cfg
        self.norm_pre = layer_norm(cfg.embed_dim, **options)
        self.blocks = nnx.List([make_block(cfg, **options) for _ in range(cfg.num_layers)])
        self.norm_post = layer_norm(cfg.embed_dim, **options)

    def __call__(
        self, x: Float[Array, "b t d"], mask, positions, cache: KVCache | None = None
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Positions behind the last block, before its norm."""
        tables = rotary(self.cfg, positions)
        length = 0 if cache is None else cache.length
        x, cache = run_blocks(
            self.blocks,
            lambda block, x, past, key: block(x, mask, past, length, rotary=tables),
            self.norm_pre(x),
            cache=cache,
            remat=self.cfg.remat,
        )
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + positions.shape[0])
        return x, cache


class SemanticEncoder(nnx.Module):
    """Features to tokens, not yet quantized."""

    def __init__(
        self, cfg: SemanticTokenizerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg, self.dtype = cfg, dtype
        self.iframe_queries = _free(cfg.frames.iframe, cfg, param_dtype, rngs)
        self.pframe_queries = _free(cfg.frames.pframe, cfg, param_dtype, rngs)
        self.feature_embed = Linear(cfg.feature_dim, cfg.embed_dim, kernel_init=INIT, **options)
        self.transformer = _Stack(cfg, **options)
        self.head = Linear(cfg.embed_dim, cfg.token_dim, kernel_init=INIT, **options)

    @typechecked
    def __call__(self, features: Float[Array, "b f y x c"]) -> Float[Array, "b n e"]:
        """Tokens of up to a segment of frames.

        Raises:
          ValueError: There are too many frames, or they have another grid.
        """
        cfg, num_frames = self.cfg, features.shape[1]
        cfg.check_frames(num_frames)
        if features.shape[2:4] != cfg.grid:
            raise ValueError(
                f"features lie on a grid of {cfg.grid[0]} x {cfg.grid[1]}, got "
                f"{features.shape[2]} x {features.shape[3]}"
            )
        x, names = self.embed(features), labels(cfg, num_frames)
        mask = LabelMask(names, names, sees_in_encoder)
        x, _ = self.transformer(x, mask, places(cfg, num_frames))
        tokens = x[:, num_frames * cfg.num_places :]
        return self.head(self.transformer.norm_post(tokens))

    def embed(self, features: Float[Array, "b f y x c"]) -> Float[Array, "b t d"]:
        """What goes into the transformer: features and queries."""
        x = rearrange(self.feature_embed(features), "b f y x d -> b (f y x) d")
        queries = [self.iframe_queries[...], *[self.pframe_queries[...]] * (features.shape[1] - 1)]
        queries = jnp.concatenate(queries).astype(x.dtype)
        return jnp.concatenate([x, _repeat(queries, len(x))], axis=1)


class SemanticDecoder(nnx.Module):
    """Quantized tokens to features."""

    def __init__(
        self, cfg: SemanticTokenizerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(Linear, kernel_init=INIT, **options)
        self.cfg, self.dtype = cfg, dtype
        self.token_embed = linear(cfg.token_dim, cfg.embed_dim)
        self.mask_token = _free(1, cfg, param_dtype, rngs)
        self.transformer = _Stack(cfg, **options)
        self.head_in = linear(cfg.embed_dim, 2 * cfg.embed_dim)
        self.head_out = linear(2 * cfg.embed_dim, cfg.feature_dim)

    @typechecked
    def __call__(self, tokens: Float[Array, "b n e"]) -> Float[Array, "b f y x c"]:
        """Features of all frames at once.

        Raises:
          ValueError: No segment has so many tokens.
        """
        cfg = self.cfg
        num_frames = cfg.frames.num_frames(tokens.shape[1])
        cfg.check_frames(num_frames)
        names = labels(cfg, num_frames)
        mask = LabelMask(names, names, sees_in_decoder)
        x, _ = self.transformer(self.embed(tokens), mask, places(cfg, num_frames))
        return self.head(x[:, : num_frames * cfg.num_places])

    def embed(self, tokens: Float[Array, "b n e"]) -> Float[Array, "b t d"]:
        """What goes into the transformer: mask tokens for the features, and the tokens."""
        count = self.cfg.frames.num_frames(tokens.shape[1]) * self.cfg.num_places
        return self._with_masks(self.token_embed(tokens), count)

    def _with_masks(self, x: Float[Array, "b n d"], count: int) -> Float[Array, "b t d"]:
        masks = jnp.repeat(self.mask_token[...].astype(x.dtype), count, axis=0)
        return jnp.concatenate([_repeat(masks, len(x)), x], axis=1)

    def head(self, x: Float[Array, "b t d"]) -> Float[Array, "b f y x c"]:
        """Features of positions behind the last block."""
        x = self.head_out(jnp.tanh(self.head_in(self.transformer.norm_post(x))))
        rows, columns = self.cfg.grid
        return rearrange(x, "b (f y x) c -> b f y x c", y=rows, x=columns)

    def init_cache(self, *, batch: int, num_frames: int) -> KVCache:
        """Room for what frames leave behind; see `decode_frame`."""
        cfg = self.cfg
        return KVCache.empty(
            num_layers=cfg.num_layers,
            batch=batch,
            size=num_frames * cfg.num_places + cfg.frames.count(num_frames),
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            dtype=self.dtype or jnp.float32,
        )

    def decode_frame(
        self, tokens: Float[Array, "b n e"], frame: int | Array, cache: KVCache
    ) -> tuple[Float[Array, "b 1 y x c"], KVCache]:
        """Features of one frame from its own tokens, and from earlier frames through the cache.

        Args:
          tokens: `frames.iframe` of frame 0, `frames.pframe` of every other.
          frame: Its number, may be traced.
          cache: After the frames before it.
        """
        cfg, (count, most) = self.cfg, (tokens.shape[1], cache.size)
        first = jnp.where(frame == 0, 0, cfg.frames.iframe + (frame - 1) * cfg.frames.pframe)
        at = places(cfg, 1)[: cfg.num_places].at[:, 0].set(frame)
        number = jnp.broadcast_to((first + jnp.arange(count))[:, None], (count, 3))
        # Of the slots those in use are seen, up to the end of this frame.
        used = jnp.full((cfg.num_places + count, 1), cache.length + cfg.num_places + count - 1)
        mask = LabelMask(used, jnp.arange(most)[:, None], sees_in_decoder)
        x = self._with_masks(self.token_embed(tokens), cfg.num_places)
        x, filled = self.transformer(x, mask, jnp.concatenate([at, number]), cache)
        assert filled is not None
        return self.head(x[:, : cfg.num_places]), filled


class SemanticTokenizer(nnx.Module):
    """Encoder, codes and decoder; without its encoder it makes features of codes alone."""

    def __init__(
        self,
        cfg: SemanticTokenizerConfig,
        *,
        has_encoder: bool = True,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg, self.dtype = cfg, dtype
        self.encoder = SemanticEncoder(cfg, **options) if has_encoder else None
        self.decoder = SemanticDecoder(cfg, **options)
        self.quantizer = Quantizer(
            cfg.token_dim,
            num_codes=cfg.codebook_size,
            code_dim=cfg.code_dim,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def encode(self, features: Float[Array, "b f y x c"]) -> Int[Array, "b n"]:
        """Codes of up to a segment of frames; those of a frame know nothing of later ones.

        Raises:
          ValueError: There is no encoder.
        """
        return self.quantizer.encode(self.tokens(features))

    def tokens(self, features: Float[Array, "b f y x c"]) -> Float[Array, "b n e"]:
        """What `encode` looks up in the codebook; likewise."""
        if self.encoder is None:
            raise ValueError("this semantic tokenizer has no encoder: it reads codes alone")
        return self.encoder(features)

    def decode(self, codes: Int[Array, "b n"]) -> Float[Array, "b f y x c"]:
        """Features of codes, frame by frame: no frame computes with later ones.

        The same as `decoder` of all tokens at once, in about half the work and the memory of one
        frame, plus the keys and values of all.

        Raises:
          ValueError: No segment has so many codes, or the codebook has not one of them.
        """
        cfg, (b, count) = self.cfg, codes.shape
        num_frames = cfg.frames.num_frames(count)
        cfg.check_frames(num_frames)
        check_codes(codes, cfg.codebook_size)
        tokens = self.quantizer.decode(codes)
        if self.dtype is not None:
            tokens = tokens.astype(self.dtype)
        cache = self.decoder.init_cache(batch=b, num_frames=num_frames)
        iframe, rest = jnp.split(tokens, (cfg.frames.iframe,), axis=1)
        first, cache = self.decoder.decode_frame(iframe, 0, cache)
        if num_frames == 1:
            return first

        def step(cache, item):
            tokens, frame = item
            features, cache = self.decoder.decode_frame(tokens, frame, cache)
            return cache, features[:, 0]

        rest = rearrange(rest, "b (f n) e -> f b n e", f=num_frames - 1)
        _, others = jax.lax.scan(step, cache, (rest, jnp.arange(1, num_frames)))
        return jnp.concatenate([first, jnp.moveaxis(others, 0, 1)], axis=1)

    def __call__(self, features: Float[Array, "b f y x c"]) -> Float[Array, "b f y x c"]:
        """Features through codes and back, all frames at once."""
        tokens = self.quantizer.decode(self.encode(features))
        return self.decoder(tokens if self.dtype is None else tokens.astype(self.dtype))


def _free(count: int, cfg: SemanticTokenizerConfig, param_dtype, rngs: nnx.Rngs) -> nnx.Param:
    """Learned vectors `[count, d]` of about unit length."""
    values = jax.random.normal(rngs.params(), (count, cfg.embed_dim), param_dtype)
    return nnx.Param(values * cfg.embed_dim**-0.5)


def _repeat(x: Float[Array, "n d"], b: int) -> Float[Array, "b n d"]:
    return jnp.broadcast_to(x, (b, *x.shape))
