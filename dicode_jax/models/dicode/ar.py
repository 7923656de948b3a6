"""The language model over deep tokens: text in, one continuous vector after another out.

DiCoDe (arXiv 2412.04446), section 3.3. A sequence is `text | <img> | n deep tokens | <img> | ...`;
a deep token enters through an MLP plus a learned embedding of its keyframe and of its place in the
keyframe, on top of the body's own positions. What comes after a position is predicted by an MLP on
its last hidden state: the parameters of a Gaussian mixture, or a vector. There is no loss on text.

Deviations from the reference: invalid keyframes are masked instead of dropped (static shapes),
unknown options raise, and the frozen resampler that makes deep tokens lives outside.

Letters: b batch, l text tokens, t positions, k keyframes, n deep tokens per keyframe, z their
width, d model width, p head outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.models.causal_lm import build_body
from dicode_jax.models.dicode import ar_losses
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.nn.activations import gelu
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.masks import causal_mask, segment_mask
from dicode_jax.typing import Array, Bool, Float, Int, typechecked


class TokenMLP(nnx.Module):
    """Two linear layers around an exact GELU; weights start as normal(0.02), biases at 0."""

    def __init__(
        self,
        in_dim: int,
        mlp_dim: int,
        out_dim: int,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {
            "kernel_init": nnx.initializers.normal(0.02),
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.up = Linear(in_dim, mlp_dim, **kwargs)
        self.down = Linear(mlp_dim, out_dim, **kwargs)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = self.up(x.reshape(-1, x.shape[-1]))
        return self.down(gelu(y)).reshape(*x.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LMOutput:
    """Loss and predictions of a training step.

    Attributes:
      loss: Of the predictions.
      pred: Head outputs `[b, k, n, p]`; keyframes are in order, the valid ones first.
      valid: Which of them count, `[b, k]`.
      weight: What `loss` is a mean over: how many valid tokens, or samples with `balance_samples`.
    """

    loss: Float[Array, ""]
    pred: Float[Array, "b k n p"]
    valid: Bool[Array, "b k"]
    weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """A batch laid out for the body.

    Attributes:
      embeds: Input embeddings `[b, t, d]`, without positions.
      targets: What is predicted, `[b, k, n, z]` (normalised).
      read_at: Position whose hidden state predicts a token, `[b, k*n]`.
    """

    embeds: Float[Array, "b t d"]
    targets: Float[Array, "b k n z"]
    read_at: Int[Array, "b kn"]


class DiCoDeLM(nnx.Module):
    """Body, input and output MLP, and the tables of keyframes and places.

    Train with `loss` (every keyframe valid or a valid prefix, the fast layout) or with
    `packed_loss` (several videos in a row); generate with `models.dicode.generate`.
    """

    def __init__(self, cfg: DiCoDeLMConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg, self.dtype = cfg, dtype
        self.body = build_body(cfg.body, **kwargs)
        d = self.body.embed_dim
        mlp_dim = cfg.mlp_dim or d
        self.input_mlp = TokenMLP(cfg.token_dim, mlp_dim, d, **kwargs)
        self.output_mlp = TokenMLP(d, mlp_dim, cfg.head_dim, **kwargs)
        table = nnx.initializers.truncated_normal(0.02)
        self.frame_embed = nnx.Param(table(rngs.params(), (cfg.max_keyframes, d), param_dtype))
        self.place_embed = nnx.Param(table(rngs.params(), (cfg.num_tokens, d), param_dtype))

    def normalize(self, deep_tokens: Float[Array, "b k n z"]) -> Float[Array, "b k n z"]:
        """Divides deep tokens by the pre-normaliser, if there is one."""
        scale = self._normalizer()
        return deep_tokens if scale is None else deep_tokens / scale

    def denormalize(self, deep_tokens: Float[Array, "b k n z"]) -> Float[Array, "b k n z"]:
        """Multiplies by the pre-normaliser: the scale that the tokenizer and the decoder know."""
        scale = self._normalizer()
        return deep_tokens if scale is None else deep_tokens * scale

    def _normalizer(self) -> Array | None:
        values = self.cfg.pre_normalizer
        return None if values is None else jnp.asarray(values, jnp.float32)[:, None]

    def embed_deep_tokens(self, deep_tokens: Float[Array, "... z"]) -> Float[Array, "... d"]:
        """Normalised deep tokens to embeddings (of length one for `cosine`), without positions."""
        embeds = self.input_mlp(deep_tokens)
        return ar_losses.normalize(embeds) if self.cfg.loss == "cosine" else embeds

    def positions_of(self, num_keyframes: int) -> Float[Array, "k n d"]:
        """Keyframe and place embeddings of the first keyframes.

        Raises:
          ValueError: There are more keyframes than rows in the table.
        """
        if num_keyframes > self.cfg.max_keyframes:
            raise ValueError(
                f"{num_keyframes} keyframes, but the model knows {self.cfg.max_keyframes} "
                "(max_keyframes); use fewer, or generate by a sliding window"
            )
        return self.frame_embed[...][:num_keyframes, None] + self.place_embed[...]

    def positions_at(self, numbers: Int[Array, "b k"]) -> Float[Array, "b k n d"]:
        """Keyframe and place embeddings of keyframes of any number below `max_keyframes`."""
        return self.frame_embed[...][numbers][:, :, None] + self.place_embed[...]

    @typechecked
    def loss(
        self,
        text_ids: Int[Array, "b l"],
        deep_tokens: Float[Array, "b k n z"],
        *,
        frame_mask: Bool[Array, "b k"] | None = None,
        inputs: Float[Array, "b k n z"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> LMOutput:
        """Loss on the fixed layout `text | <img> | n tokens | <img> | n tokens ...`.

        The sequence is put together by static slices and the head sees prediction positions only,
        so this is the fast path; padding of the text is seen by the model, as in generation.

        Args:
          text_ids: Text, padded on the right, without `<img>`.
          deep_tokens: Tokens of each keyframe, as the tokenizer made them.
          frame_mask: Valid keyframes, a prefix of each row (later ones cannot reach them); None for
            all.
          inputs: What the model reads in place of `deep_tokens`, for example with noise added.
          deterministic: False switches dropout on.
          rngs: With a `dropout` stream, needed when dropout acts.

        Raises:
          ValueError: More keyframes than the table has, or a sequence longer than the body's.
        """
        k = deep_tokens.shape[1]
        targets = jax.lax.stop_gradient(self.normalize(deep_tokens))
        sequence = self.lay_out(text_ids, self._embed(targets, inputs) + self.positions_of(k))
        hidden, _ = self.body(sequence, deterministic=deterministic, rngs=rngs)
        hidden = rearrange(hidden[:, text_ids.shape[1] :], "b (k n) d -> b k n d", k=k)
        return self._judge(hidden[:, :, :-1], targets, frame_mask)

    def lay_out(
        self, text_ids: Int[Array, "b l"], token_embeds: Float[Array, "b k n d"]
    ) -> Float[Array, "b t d"]:
        """`text | <img> | tokens | <img> | tokens ...`; the embeddings carry their positions."""
        b, k, _, d = token_embeds.shape
        # One lookup for all words: another one, of a constant id in a table split over devices, jax
        # 0.10.2 compiles so that the first row on each device gets no gradient.
        image_ids = jnp.full((b, 1), self.cfg.image_token_id, text_ids.dtype)
        words = self.body.embed_tokens(jnp.concatenate([text_ids, image_ids], axis=1))
        words = words.astype(token_embeds.dtype)
        text, image = words[:, :-1], words[:, -1:, None]
        frames = jnp.concatenate([jnp.broadcast_to(image, (b, k, 1, d)), token_embeds], axis=2)
        return jnp.concatenate([text, rearrange(frames, "b k n d -> b (k n) d")], axis=1)

    def image_embed(self, dtype=None) -> Float[Array, "1 1 d"]:
        """Word embedding of `<img>`."""
        embed = self.body.embed_tokens(jnp.full((1, 1), self.cfg.image_token_id, jnp.int32))
        return embed if dtype is None else embed.astype(dtype)

    @typechecked
    def packed_loss(
        self,
        *,
        input_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        token_mask: Bool[Array, "b t"],
        tokens: Float[Array, "b k n z"],
        frame_segments: Int[Array, "b k"],
        inputs: Float[Array, "b k n z"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> LMOutput:
        """Loss on rows that hold several videos, as `packing.pack_row` lays them out.

        Attention stays inside a video, and the body's positions and the numbers of keyframes count
        from its beginning: a video is seen as it is alone, and the loss is the mean over all
        tokens of the row's videos (over videos with `balance_samples`).

        Args:
          input_ids: Text and `<img>`; anything where a deep token goes.
          segment_ids: Which video a position belongs to, 0 for none.
          positions: Of each position in its video.
          token_mask: Where deep tokens go.
          tokens: Deep tokens of the keyframes of all videos, one after another.
          frame_segments: Which video a keyframe belongs to, 0 for none; those come last. A video
            must not have more keyframes than the table has rows.
          inputs: As in `loss`.
          deterministic: As in `loss`.
          rngs: As in `loss`.
        """
        same = frame_segments[:, :, None] == frame_segments[:, None, :]
        sequence = self.sequence(
            input_ids,
            tokens,
            token_mask=token_mask,
            frame_numbers=jnp.tril(same, -1).sum(-1),
            inputs=inputs,
        )
        mask = causal_mask(input_ids.shape[1]) & segment_mask(segment_ids)
        hidden, _ = self.body(
            sequence.embeds, positions, mask, deterministic=deterministic, rngs=rngs
        )
        return self._judge(
            self.read(hidden, sequence), sequence.targets, frame_segments > 0, frame_segments
        )

    def sequence(
        self,
        input_ids: Int[Array, "b t"],
        deep_tokens: Float[Array, "b k n z"],
        *,
        token_mask: Bool[Array, "b t"],
        frame_numbers: Int[Array, "b k"],
        inputs: Float[Array, "b k n z"] | None = None,
    ) -> Sequence:
        """Puts deep tokens into their slots, in order; arguments as in `packed_loss`.

        `frame_numbers` are rows of the keyframe table. A row may have fewer slots than tokens: the
        last ones are left out.
        """
        k, n = deep_tokens.shape[1:3]
        targets = jax.lax.stop_gradient(self.normalize(deep_tokens))
        placed = self._embed(targets, inputs) + self.positions_at(frame_numbers)
        placed = rearrange(placed, "b k n d -> b (k n) d")
        slot = jnp.clip(jnp.cumsum(token_mask, axis=1) - 1, 0, k * n - 1)
        words = self.body.embed_tokens(input_ids).astype(placed.dtype)
        reads = jnp.pad(token_mask[:, 1:], ((0, 0), (0, 1)))  # at the position before
        return Sequence(
            embeds=jnp.where(
                token_mask[..., None], jnp.take_along_axis(placed, slot[..., None], axis=1), words
            ),
            targets=targets,
            read_at=jnp.argsort(~reads, axis=1, stable=True)[:, : k * n],
        )

    def read(self, hidden: Float[Array, "b t d"], sequence: Sequence) -> Float[Array, "b k n d"]:
        """The hidden states that predict the sequence's tokens."""
        k = sequence.targets.shape[1]
        picked = jnp.take_along_axis(hidden, sequence.read_at[..., None], axis=1)
        return rearrange(picked, "b (k n) d -> b k n d", k=k)

    def _embed(self, targets: Array, inputs: Array | None) -> Array:
        if inputs is not None:
            targets = jax.lax.stop_gradient(self.normalize(inputs))
        return self.embed_deep_tokens(targets)

    def _judge(
        self,
        hidden: Float[Array, "b k n d"],
        targets: Float[Array, "b k n z"],
        valid: Bool[Array, "b k"] | None,
        samples: Int[Array, "b k"] | None = None,
    ) -> LMOutput:
        cfg = self.cfg
        pred = self.output_mlp(hidden)
        if cfg.loss == "gmm":
            loss = ar_losses.mixture_loss(
                pred,
                targets,
                valid,
                num_mixtures=cfg.num_mixtures,
                balance=cfg.balance_samples,
                samples=samples,
            )
        else:
            loss = ar_losses.vector_loss(cfg.loss, pred, targets, valid)
        valid = jnp.ones(targets.shape[:2], bool) if valid is None else valid
        if cfg.balance_samples:
            weight = ar_losses.num_samples(valid, samples)
        else:
            weight = (valid.sum() * targets.shape[2]).astype(jnp.float32)
        return LMOutput(loss=loss, pred=pred, valid=valid, weight=weight)
