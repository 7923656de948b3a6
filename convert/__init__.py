"""Port original PyTorch weights: `convert.from_torch(kind, state_dict, config)` returns the module.

It holds what the commands (`python -m convert`) write, by the same plan. A part is a file with a
table of rules (see `convert.engine.rules`), `config_from_original`, which reads the original
configuration, and a `Kind` of both. A state dict may hold numpy arrays or torch tensors.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

# kind -> "module:name" of what takes (state_dict, config) and returns the module.
KINDS: dict[str, str] = {
    "unet3d": "convert.parts.unet3d:KIND",
    "autoencoder_kl": "convert.parts.autoencoder_kl:KIND",
    "autoencoder_causal3d": "convert.landiff.vae:KIND",
    "landiff_denoiser": "convert.landiff.dit:KIND",
    "cogvideox_transformer": "convert.landiff.dit:BASE",
    "resampler": "convert.parts.resampler:KIND",
    "image_proj": "convert.parts.resampler:IMAGE_PROJ",
    "clip": "convert.parts.clip:TOWERS",
    "clip_vision": "convert.parts.clip:VISION",
    "clip_text": "convert.parts.clip:TEXT",
    "gpt2": "convert.parts.gpt2:KIND",
    "llama": "convert.parts.llama:KIND",
    "t5": "convert.parts.t5:KIND",
    "ar_diffusion_vae": "convert.ar_diffusion.vae:KIND",
    "ar_diffusion_discriminator": "convert.ar_diffusion.discriminator:KIND",
    "ar_diffusion_lpips": "convert.ar_diffusion.discriminator:LPIPS_KIND",
    "i3d": "convert.parts.inception:I3D_KIND",
    "inception": "convert.parts.inception:INCEPTION_KIND",
    "dicode_lm": "convert.dicode.lm:from_torch",
    "dicode": "convert.dicode.modules:from_torch",
    "ar_diffusion_dit": "convert.ar_diffusion.dit:DIT",
    "ar_diffusion_denoiser": "convert.ar_diffusion.dit:KIND",
    "landiff_language_model": "convert.landiff.language_model:KIND",
    "landiff_semantic_tokenizer": "convert.landiff.semantic_tokenizer:KIND",
    "landiff_theia": "convert.landiff.theia:KIND",
}


def from_torch(kind: str, state_dict: Mapping[str, Any], config: Any) -> nnx.Module:
    """Builds the module of `kind` and fills it from an original state dict.

    Args:
      kind: One of `KINDS`.
      state_dict: Original key -> array in PyTorch's layout.
      config: The original configuration (a mapping with the original's names) or our own dataclass.

    Raises:
      ValueError: Unknown kind, or an option of the configuration that is not supported.
      ConversionError: A source key is unused, a target unfilled or a shape wrong; lists them all.
      UserError: A weight is NaN or infinite.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(sorted(KINDS))}")
    module, function = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), function)(state_dict, config)
