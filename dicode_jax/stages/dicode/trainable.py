"""Which parameters of tokenizer and clip decoder are trained: the original's freezing modes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dicode_jax.nn import lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableParts:
    """A predicate on parameter paths; the defaults are those of the release.

    Always frozen: CLIP's image tower, the autoencoder, the decoder's stored constants. The
    original runs a UNet that is not fully trained without dropout. Low-rank adapters, folded into
    the weights at export, and the switch of the latent head are ours.

    Attributes:
        unet: the whole UNet.
        first_block: without ``unet``: its first stages and the attention between.
        image_projections: without ``unet``: the key and value projections of deep tokens.
        resampler: the tokenizer's resampler.
        latent_head: the decoder's latent head, where there is one.
        lora_rank: of additions to the projections of attention; needs ``unet`` off.
        lora_alpha: the additions are scaled by ``lora_alpha / lora_rank``.
    """

    unet: bool = True
    first_block: bool = True
    image_projections: bool = True
    resampler: bool = True
    latent_head: bool = True
    lora_rank: int = 0
    lora_alpha: float = 16.0

    def __post_init__(self):
        if self.lora_rank < 0 or not self.lora_alpha > 0:
            raise ValueError(
                "lora_rank must not be negative and lora_alpha must be positive, got "
                f"{self.lora_rank} and {self.lora_alpha}"
            )
        if self.lora_rank and self.unet:
            raise ValueError("lora_rank trains beside a frozen UNet: set unet to False")
        if self.unet and not (self.first_block and self.image_projections):
            raise ValueError(
                "unet=True trains first_block and image_projections too: leave both True, got "
                f"{self.first_block} and {self.image_projections}"
            )

    def __call__(self, path: Sequence[Any]) -> bool:
        """Whether the parameter at a path is trained.

        Args:
            path: such as ``("decoder", "unet", "conv_out", "bias")``; parts that name the models
                may be absent.
        """
        parts = [str(part) for part in path]
        if "unet" in parts:
            return self.unet or self._in_unet(parts[parts.index("unet") + 1 :])
        if "latent_head" in parts:
            return self.latent_head
        return "resampler" in parts and self.resampler

    def _in_unet(self, parts: list[str]) -> bool:
        if parts[-1] in lora.NAMES:
            return True
        first = parts[0] == "init_attention" or parts[:2] in (
            ["down_stages", "0"],
            ["down_stages", "1"],
        )
        image = "k_image" in parts or "v_image" in parts
        return (self.first_block and first) or (self.image_projections and image)
