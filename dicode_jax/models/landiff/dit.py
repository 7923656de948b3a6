"""The denoiser of LanDiff: CogVideoX's transformer, steered by a control branch.

Yin et al., "The Best of Both Worlds" (arXiv 2503.04606); the transformer is that of CogVideoX-2b
(arXiv 2408.06072). Text and video are one sequence, the text in front, and each has its own
modulation by the timestep. The control branch reads noisy latents plus semantic ones. Behind each
of its layers stands a linear layer that starts at zero, whose output is added to the main layer of
the same number, text included, and is what the next control layer gets.
Shape letters: b videos, f frames of latents, h w their rows and columns, c channels, l text tokens,
e their width, t positions, d model width, k width of an embedded timestep.
"""

import dataclasses
import functools
from typing import cast

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.diffusion.prior import GaussianPrior
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.landiff.semantic import SemanticUpsampler, UpsamplerConfig
from dicode_jax.nn.activations import tanh_gelu
from dicode_jax.nn.conv import Conv
from dicode_jax.nn.layer_stack import make_blocks, run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.modulation import Modulation, TimestepEmbedder
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.transformer import MLP, Attention
from dicode_jax.typing import Array, Float, Int, typechecked

EPS, INNER_EPS = 1e-5, 1e-6  # of norms over the sequence; of heads and of the last norm
ZEROS = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the transformer; the defaults are those of CogVideoX-2b.

    Attributes:
      num_frames: Most frames of latents in a window.
      height, width: Of the latents, multiples of `patch_size`.
      channels: Of the latents.
      patch_size: Latents along height and along width that make a token.
      embed_dim: Model width, a multiple of 16.
      num_layers: Number of blocks.
      num_heads: Attention heads; must divide `embed_dim`.
      mlp_dim: Width inside the feed-forward part, `4 * embed_dim` when None.
      time_dim: Width of an embedded timestep.
      text_len: Text tokens.
      text_dim: Width of a text token.
      interpolation: Divides rows and columns before they become positions.
      scan_layers: Keep the blocks' parameters stacked and `lax.scan` over them.
      remat: What of each block the backward pass computes again, see `nn.remat`.

    Raises:
      ValueError: A size is not positive or does not fit another.
    """

    num_frames: int = 13
    height: int = 60
    width: int = 90
    channels: int = 16
    patch_size: int = 2
    embed_dim: int = 1920
    num_layers: int = 30
    num_heads: int = 30
    mlp_dim: int | None = None
    time_dim: int = 512
    text_len: int = 226
    text_dim: int = 4096
    interpolation: float = 1.875
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("remat", "scan_layers") and value is not None and value <= 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        check_counts(
            self, num_layers=1000, num_frames=4096, height=4096, width=4096, text_len=2**16
        )
        if self.embed_dim % self.num_heads or self.embed_dim % 16:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads ({self.num_heads}) and, for its "
                f"positions, of 16, got {self.embed_dim}"
            )
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError(
                f"height and width must be multiples of patch_size ({self.patch_size}), got "
                f"{self.height}x{self.width}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def stacks(self) -> tuple[str, ...]:
        """The part of a transformer of `make_base` whose layers are stacked."""
        return ("lower_blocks",) if self.scan_layers else ()


def position_table(cfg: DiTConfig) -> np.ndarray:
    """Fixed sinusoids, float32 `[text_len + tokens, d]`, zero for the text.

    A quarter of the width tells the frame, the rest the column and the row, sines first in each.
    """
    d, (rows, columns) = cfg.embed_dim, cfg.grid
    frame, row, column = np.indices((cfg.num_frames, rows, columns)).reshape(3, -1)
    table = np.concatenate(
        [
            _sinusoids(frame, d // 4),
            _sinusoids(column / cfg.interpolation, 3 * d // 8),
            _sinusoids(row / cfg.interpolation, 3 * d // 8),
        ],
        axis=1,
    )
    return np.concatenate([np.zeros((cfg.text_len, d)), table]).astype(np.float32)


def _sinusoids(positions: np.ndarray, dim: int) -> np.ndarray:
    angles = np.outer(positions, 10_000.0 ** (-np.arange(dim // 2) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class Block(nnx.Module):
    """Attention and feed-forward part over text and video, each modulated in its own way."""

    def __init__(self, cfg: DiTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        d, linear = cfg.embed_dim, _linear(**options)
        head_dim = d // cfg.num_heads
        self.text_len = cfg.text_len
        self.modulation = Modulation(cfg.time_dim, 12, part_dim=d, **options)
        self.attn_norm = layer_norm(d, eps=EPS, **options)
        self.attn = Attention(
            d,
            num_heads=cfg.num_heads,
            head_dim=head_dim,
            packed=True,
            head_norm=functools.partial(layer_norm, head_dim, eps=INNER_EPS, **options),
            linear=linear,
        )
        self.mlp_norm = layer_norm(d, eps=EPS, **options)
        self.mlp = MLP(d, cfg.mlp_dim or 4 * d, activation=tanh_gelu, linear=linear)

    def __call__(
        self, x: Float[Array, "b t d"], times: Float[Array, "b k"]
    ) -> Float[Array, "b t d"]:
        """Text and then video; `times` are the embedded timesteps."""
        parts = self.modulation(times)
        video, text = parts[:6], parts[6:]
        y = self._on_both(_modulated, self.attn_norm(x), text[:2], video[:2])
        x = x + self._on_both(_gated, self.attn(y)[0], text[2:3], video[2:3])
        y = self._on_both(_modulated, self.mlp_norm(x), text[3:5], video[3:5])
        return x + self._on_both(_gated, self.mlp(y), text[5:], video[5:])

    def _on_both(self, change, x, text, video):
        first, last = jnp.split(x, (self.text_len,), axis=1)
        return jnp.concatenate([change(first, *text), change(last, *video)], axis=1)


class Embed(nnx.Module):
    """Latents and text to one sequence with positions, and timesteps to vectors."""

    def __init__(self, cfg: DiTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        d, p, xavier = cfg.embed_dim, cfg.patch_size, nnx.initializers.xavier_uniform()
        patch = functools.partial(Conv, kernel_size=(p, p), strides=p, padding=0)
        self.patch = patch(cfg.channels, d, kernel_init=xavier, **options)
        self.text = _linear(**options)(cfg.text_dim, d)
        of_time = functools.partial(Linear, kernel_init=nnx.initializers.normal(0.02), **options)
        self.time = TimestepEmbedder(cfg.time_dim, sinusoid_dim=d, linear=of_time)
        # As it is stored: what reads it takes the first of its rows, whatever they hold.
        self.positions = nnx.Param(jnp.asarray(position_table(cfg), param_dtype))

    def __call__(
        self, x: Float[Array, "b f h w c"], timesteps: Array, context: Float[Array, "b l e"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b k"]]:
        """The sequence, the text in front, and the embedded timesteps."""
        video = rearrange(self.patch(x), "b f y x d -> b (f y x) d")
        tokens = jnp.concatenate([self.text(context), video], axis=1)
        positions = self.positions[...][: tokens.shape[1]].astype(tokens.dtype)
        return tokens + positions[None], self.time(timesteps)


class Head(nnx.Module):
    """The sequence behind the last block to what is predicted for each latent."""

    def __init__(self, cfg: DiTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        d, self.cfg = cfg.embed_dim, cfg
        self.norm = layer_norm(d, eps=EPS, **options)
        self.last_norm = layer_norm(d, eps=INNER_EPS, **options)
        self.modulation = Modulation(cfg.time_dim, 2, part_dim=d, **options)
        self.linear = Linear(d, cfg.channels * cfg.patch_size**2, kernel_init=ZEROS, **options)

    def __call__(
        self, x: Float[Array, "b t d"], times: Float[Array, "b k"]
    ) -> Float[Array, "b f h w c"]:
        """Text and video to the video's latents."""
        p, (rows, columns) = self.cfg.patch_size, self.cfg.grid
        x = self.last_norm(self.norm(x[:, self.cfg.text_len :]))
        y = self.linear(_modulated(x, *self.modulation(times)))
        layout = "b (f y x) (c p q) -> b f (y p) (x q) c"
        return rearrange(y, layout, y=rows, x=columns, p=p, q=p)


class ControlBlock(nnx.Module):
    """A block and its linear layer without bias, zero before training."""

    def __init__(self, cfg: DiTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layer = Block(cfg, **options)
        self.zero = Linear(
            cfg.embed_dim, cfg.embed_dim, use_bias=False, kernel_init=ZEROS, **options
        )

    def __call__(
        self, x: Float[Array, "b t d"], times: Float[Array, "b k"]
    ) -> Float[Array, "b t d"]:
        """What is added to the main layer and handed to the next control layer."""
        return self.zero(self.layer(x, times))


class DiT(nnx.Module):
    """The main transformer; `lower_blocks` are those with control, `upper_blocks` the others."""

    def __init__(self, cfg: DiTConfig, num_controlled: int, *, rngs: nnx.Rngs, **options):
        self.embed = Embed(cfg, rngs=rngs, **options)
        self.lower_blocks = _stack(Block, cfg, num_controlled, rngs=rngs, **options)
        self.upper_blocks = _stack(
            Block, cfg, cfg.num_layers - num_controlled, rngs=rngs, **options
        )
        self.head = Head(cfg, rngs=rngs, **options)


def make_base(cfg: DiTConfig, *, rngs: nnx.Rngs, **options) -> DiT:
    """The transformer alone, as CogVideoX-2b is: all its blocks are `lower_blocks`."""
    return DiT(cfg, cfg.num_layers, rngs=rngs, **options)


class Control(nnx.Module):
    """The control branch: what it reads with, and its blocks."""

    def __init__(self, cfg: DiTConfig, num_layers: int, *, rngs: nnx.Rngs, **options):
        self.embed = Embed(cfg, rngs=rngs, **options)
        self.blocks = _stack(ControlBlock, cfg, num_layers, rngs=rngs, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Transformer, control branch and noise; the defaults are those of the release.

    Attributes:
      dit: The transformer; the control branch has its sizes, but for the number of layers.
      control_layers: Layers of the control branch, at most those of the transformer.
      upsampler: From semantic features to latents.
      schedule: Noise, and what is predicted.
      semantic_prior: Standard deviation of clean latents about the semantic ones: the network then
        says what a Gaussian so wide about these leaves open (ours; see `GaussianPrior`). None for a
        network that says everything, as the release's.

    Raises:
      ValueError: There are more control layers than layers, or none; or a prior does not fit.
    """

    dit: DiTConfig = DiTConfig()
    control_layers: int = 15
    upsampler: UpsamplerConfig = UpsamplerConfig()
    schedule: NoiseSchedule = NoiseSchedule(
        zero_terminal_snr=True, parameterization="v", snr_shift=3.0
    )
    semantic_prior: float | None = None

    def __post_init__(self):
        try:
            _ = self.prior
        except ValueError as error:
            raise ValueError(f"semantic_prior: {error}") from error
        if not 1 <= self.control_layers <= self.dit.num_layers:
            raise ValueError(
                f"control_layers must be from 1 to num_layers ({self.dit.num_layers}), got "
                f"{self.control_layers}"
            )

    @property
    def prior(self) -> GaussianPrior | None:
        """What semantic latents tell before the network says anything, where they are asked."""
        if self.semantic_prior is None:
            return None
        return GaussianPrior(schedule=self.schedule, std=self.semantic_prior)

    @property
    def stacks(self) -> tuple[str, ...]:
        """The parts of a `Denoiser` whose layers are stacked."""
        if not self.dit.scan_layers:
            return ()
        has_upper = self.dit.num_layers > self.control_layers
        upper = ("dit.upper_blocks",) if has_upper else ()
        return ("dit.lower_blocks", *upper, "control.blocks")


class _Pair(nnx.Module):
    """A main block and the control block of the same number, or stacks of both."""

    def __init__(self, main: nnx.Module, control: nnx.Module):
        self.main, self.control = main, control


class Denoiser(nnx.Module):
    """Noisy latents, a timestep, text and semantic latents to what the noise hides."""

    def __init__(self, cfg: DenoiserConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg, self.dtype = cfg, dtype
        self.dit = DiT(cfg.dit, cfg.control_layers, **options)
        self.control = Control(cfg.dit, cfg.control_layers, **options)
        self.semantic = SemanticUpsampler(cfg.upsampler, cfg.dit.channels, **options)

    @typechecked
    def semantic_latents(
        self, features: Float[Array, "b f y x k"], past: Float[Array, "b p y x k"] | None = None
    ) -> Float[Array, "b f h w c"]:
        """What the control branch adds to noisy latents: once for a video, for all steps.

        Args:
          past: Features of the `upsampler.num_past` frames before these; None for the first frame,
            repeated.

        Raises:
          ValueError: The grid of the features makes no latents of the transformer, or `past` has
            another number of frames.
        """
        cfg = self.cfg
        if past is not None and past.shape[1] != cfg.upsampler.num_past:
            raise ValueError(
                f"past has {past.shape[1]} frames, num_past is {cfg.upsampler.num_past}"
            )
        grid = tuple(side * cfg.upsampler.upsampling for side in features.shape[2:4])
        if grid != (cfg.dit.height, cfg.dit.width):
            raise ValueError(
                f"features of {features.shape[2]}x{features.shape[3]} make latents of "
                f"{grid[0]}x{grid[1]}, but the model's are {cfg.dit.height}x{cfg.dit.width}"
            )
        return self.semantic(features, past)

    @typechecked
    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        context: Float[Array, "b l e"],
        semantic: Float[Array, "#b f h w c"],
    ) -> Float[Array, "b f h w c"]:
        """Predicts for a window; its first frame has the position 0, the one behind it 1.

        Args:
          x: Noisy latents, scaled; at most `num_frames` frames.
          timesteps: Of the noise, from 0.
          context: Encoded text of `text_len` tokens, padding included; zeros for none.
          semantic: See `semantic_latents`; of the frames of the window.

        Raises:
          ValueError: Latents or text are of another size than the model's.
        """
        cfg, dtype = self.cfg, self.dtype or x.dtype
        if x.shape[1] > cfg.dit.num_frames:
            raise ValueError(f"a window has at most {cfg.dit.num_frames} frames, got {x.shape[1]}")
        if x.shape[2:4] != (cfg.dit.height, cfg.dit.width):
            raise ValueError(
                f"latents must be {cfg.dit.height}x{cfg.dit.width}, got {x.shape[2]}x{x.shape[3]}"
            )
        if context.shape[1] != cfg.dit.text_len:
            raise ValueError(f"text must have {cfg.dit.text_len} tokens, got {context.shape[1]}")
        if (prior := cfg.prior) is None:
            return self._run(x.astype(dtype), timesteps, context, semantic)
        mean = jnp.broadcast_to(semantic, x.shape).astype(jnp.float32)
        seen = prior.whiten(x.astype(jnp.float32), mean, timesteps).astype(dtype)
        out = self._run(seen, timesteps, context, semantic).astype(jnp.float32)
        return prior.velocity(out, x.astype(jnp.float32), mean, timesteps)

    def _run(self, x: Array, timesteps: Array, context: Array, semantic: Array) -> Array:
        context, semantic = (a.astype(x.dtype) for a in (context, semantic))
        h, times = self.dit.embed(x, timesteps, context)
        c, control_times = self.control.embed(x + semantic, timesteps, context)

        def call_pair(pair, carry, past, key):
            h, c = carry
            c = pair.control(c, control_times)
            return (pair.main(h, times) + c, c), None

        (h, _), _ = run_blocks(self._pairs(), call_pair, (h, c), remat=self.cfg.dit.remat)

        def call(block, x, past, key):
            return block(x, times), None

        h, _ = run_blocks(self.dit.upper_blocks, call, h, remat=self.cfg.dit.remat)
        return self.dit.head(h, times)

    def _pairs(self) -> nnx.Module:
        lower, control = self.dit.lower_blocks, self.control.blocks
        if isinstance(lower, nnx.List):
            control = cast(nnx.List, control)
            return nnx.List([_Pair(*blocks) for blocks in zip(lower, control, strict=True)])
        return _Pair(lower, control)


def _stack(kind, cfg: DiTConfig, num_layers: int, **options) -> nnx.Module:
    if num_layers == 0:
        return nnx.List([])
    return make_blocks(kind, dataclasses.replace(cfg, num_layers=num_layers), **options)


def _modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def _gated(x, gate):
    return x * gate[:, None]


def _linear(**options):
    return functools.partial(Linear, kernel_init=nnx.initializers.xavier_uniform(), **options)
