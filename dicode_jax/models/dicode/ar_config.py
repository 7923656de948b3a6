"""Sizes and training regime of the deep-token language model (`models.dicode.ar`)."""

import dataclasses

from dicode_jax.distributions.gaussian_mixture import num_params
from dicode_jax.models.causal_lm import BodyConfig
from dicode_jax.models.dicode import ar_losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiCoDeLMConfig:
    """The released model by default, apart from `body`.

    Attributes:
      body: Kind and sizes of the transformer.
      num_tokens: Deep tokens per keyframe, `n`.
      token_dim: Width of a deep token, `z`.
      max_keyframes: Rows of the keyframe table.
      mlp_dim: Width inside the input and output MLPs, the body's width when None.
      loss: What the head predicts and how it is judged: `gmm`, `vae`, or a plain vector under
        `mse`, `l1`, `cosine`, `l1l2` or `l1l2cos`.
      num_mixtures: Components of `gmm`.
      latent_dim: Latent size of `vae`, `token_dim` when None.
      loss_reduction: `mean`, or `batchmean` with `mse`.
      gmm_with_mse_and_l1: Add distances of the mixture's expected value.
      balance_samples: `gmm` only: every sample counts the same, however many keyframes it has.
      kl_weight: Of the KL term of `vae`.
      llm_loss_weight: Of the distance between hidden states and input embeddings (vector losses).
      rec_loss_weight: Of the reconstruction through both MLPs without the body. Above 0 the
        embeddings are detached before the body and `llm_rec_loss_weight` must be 0.
      llm_rec_loss_weight: Of the prediction itself.
      pre_normalizer: One divisor per place in a keyframe; deep tokens are divided by it on the way
        in and multiplied on the way out.
      image_token_id: `<img>`, before each keyframe.
      pad_token_id: Fills the text on the right; a text of nothing else is the empty prompt.

    Raises:
      ValueError: An option is unknown or contradicts another.
    """

    body: BodyConfig
    num_tokens: int = 16
    token_dim: int = 1024
    max_keyframes: int = 32
    mlp_dim: int | None = None
    loss: str = "gmm"
    num_mixtures: int = 16
    latent_dim: int | None = None
    loss_reduction: str = "mean"
    gmm_with_mse_and_l1: bool = False
    balance_samples: bool = False
    kl_weight: float = 0.001
    llm_loss_weight: float = 0.0
    rec_loss_weight: float = 0.0
    llm_rec_loss_weight: float = 1.0
    pre_normalizer: tuple[float, ...] | None = None
    image_token_id: int = 50258
    pad_token_id: int = 50256

    def __post_init__(self):
        for name in ("num_tokens", "token_dim", "max_keyframes", "num_mixtures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.loss not in ar_losses.LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; known are {', '.join(ar_losses.LOSSES)}")
        if self.loss_reduction not in ("mean", "batchmean"):
            raise ValueError(f"unknown loss_reduction {self.loss_reduction!r}; use 'mean'")
        if self.loss_reduction == "batchmean" and self.loss != "mse":
            raise ValueError(f"loss_reduction 'batchmean' needs loss 'mse', not {self.loss!r}")
        if self.loss != "gmm" and (self.balance_samples or self.gmm_with_mse_and_l1):
            raise ValueError(
                f"balance_samples and gmm_with_mse_and_l1 need loss 'gmm', not {self.loss!r}"
            )
        if self.balance_samples and self.gmm_with_mse_and_l1:
            raise ValueError("balance_samples and gmm_with_mse_and_l1 exclude each other")
        if self.rec_loss_weight > 0 and self.llm_rec_loss_weight != 0:
            raise ValueError(
                f"rec_loss_weight {self.rec_loss_weight} needs llm_rec_loss_weight 0, "
                f"got {self.llm_rec_loss_weight}"
            )
        if self.rec_loss_weight <= 0 and self.llm_rec_loss_weight <= 0:
            raise ValueError("llm_rec_loss_weight must be positive unless rec_loss_weight is")
        if self.pre_normalizer is not None and len(self.pre_normalizer) not in (1, self.num_tokens):
            raise ValueError(
                f"pre_normalizer has {len(self.pre_normalizer)} values for {self.num_tokens} tokens"
            )
        for name in ("image_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.body.vocab_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is outside the vocabulary of "
                    f"{self.body.vocab_size}"
                )

    @property
    def head_dim(self) -> int:
        """Number of outputs per token of the head, `p`."""
        if self.loss == "gmm":
            return num_params(self.num_mixtures, self.token_dim)
        if self.loss == "vae":
            return 2 * (self.latent_dim or self.token_dim)
        return self.token_dim

    @property
    def predicts_tokens(self) -> bool:
        """Whether generation goes through the head; otherwise raw hidden states are fed back."""
        weights = (self.rec_loss_weight, self.llm_loss_weight, self.llm_rec_loss_weight)
        return weights == (0.0, 0.0, 1.0)
