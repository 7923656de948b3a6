"""Sizes and training regime of the deep-token language model (`models.dicode.ar`)."""

import dataclasses
from typing import ClassVar

from dicode_jax.distributions.gaussian_mixture import num_params
from dicode_jax.errors import OptionGone
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
      loss: `gmm`, or of a plain vector `mse`, `l1` or `cosine`.
      num_mixtures: Components of `gmm`.
      balance_samples: With `gmm` samples count the same, however many keyframes they have.
      pre_normalizer: Divisors of the deep tokens on the way in, one per place in a keyframe.
      image_token_id: `<img>`, before each keyframe.
      pad_token_id: Fills the text on the right; nothing else is the empty prompt.

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
    balance_samples: bool = False
    pre_normalizer: tuple[float, ...] | None = None
    image_token_id: int = 50258
    pad_token_id: int = 50256

    RETIRED: ClassVar = {
        "latent_dim": (None, "loss gmm"),
        "loss_reduction": ("mean", "the mean"),
        "gmm_with_mse_and_l1": (False, "loss gmm alone"),
        "kl_weight": (0.001, "loss gmm"),
        "llm_loss_weight": (0.0, "the loss of the predictions"),
        "rec_loss_weight": (0.0, "the loss of the predictions"),
        "llm_rec_loss_weight": (1.0, "the loss of the predictions"),
    }

    def __post_init__(self):
        for name in ("num_tokens", "token_dim", "max_keyframes", "num_mixtures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.loss in ("vae", "l1l2", "l1l2cos"):
            raise OptionGone("loss", self.loss, f"one of {', '.join(ar_losses.LOSSES)}")
        if self.loss not in ar_losses.LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; known are {', '.join(ar_losses.LOSSES)}")
        if self.loss != "gmm" and self.balance_samples:
            raise ValueError(f"balance_samples needs loss 'gmm', not {self.loss!r}")
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
        return self.token_dim
