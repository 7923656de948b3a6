"""Deep tokenizer and clip decoder, by the keys that DiCoDe and DynamiCrafter share."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from convert.engine.plan import Plan, plan, select
from convert.engine.rules import Rule, Rules, prefixed
from convert.engine.sources import Source, open_source
from convert.parts import autoencoder_kl, clip, constants, resampler, unet3d
from dicode_jax.models.clip import CLIPTextConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import hub

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
TEXT_TOWER = "cond_stage_model.model."
IMAGE_TOWER = "embedder.model."
RESAMPLER = "image_proj_model."
LATENT_HEAD = "image_cat_proj_model."
TOKENIZER_PARTS = (IMAGE_TOWER, RESAMPLER)
DECODER_PARTS = (UNET, AUTOENCODER, LATENT_HEAD)
PREFIXES = (*TOKENIZER_PARTS, *DECODER_PARTS, TEXT_TOWER)

TOKENIZER_RULES: Rules = (
    *prefixed(clip.VISION_RULES, IMAGE_TOWER, "vision."),
    *prefixed(resampler.RULES, RESAMPLER, "resampler."),
)


def decoder_rules(state_dict: Mapping[str, Any]) -> Rules:
    """The table of the clip decoder; the UNet's depends on how its projections are stored."""
    unet = unet3d.rules(use_linear=unet3d.uses_linear(state_dict, UNET))
    return (
        *prefixed(unet, UNET, "unet."),
        *prefixed(autoencoder_kl.RULES, AUTOENCODER, "autoencoder."),
        *prefixed(resampler.RULES, LATENT_HEAD, "latent_head."),
        Rule(r"text_context", "text_context"),
        Rule(r"null_tokens", "null_tokens"),
    )


class Plans(NamedTuple):
    """What goes where in tokenizer and clip decoder; of the text tower one constant is kept."""

    tokenizer: Plan
    text: Plan
    decoder: Plan

    @property
    def problems(self) -> list[str]:
        return [line for part in self for line in part.problems]


def plan_system(
    source: Mapping[str, Any],
    tokenizer: DeepTokenizerConfig,
    decoder: ClipDecoderConfig,
    text: CLIPTextConfig,
    text_layer: str = "penultimate",
) -> Plans:
    """Decides by shapes alone; the decoder's constants are computed when they are read."""
    own = select(source, *TOKENIZER_PARTS)
    images = plan(own, TOKENIZER_RULES, blank(DeepTokenizer, tokenizer))
    prompts = clip.TEXT.plan(source, text, TEXT_TOWER)
    own = select(source, *DECODER_PARTS)
    own |= constants.lazy(prompts, text, images, tokenizer, text_layer)
    clips = plan(own, decoder_rules(source), blank(ClipDecoder, decoder))
    return Plans(images, prompts, clips)


def add_clip(tensors: dict[str, Any], given: str | pathlib.Path | None) -> list[Source]:
    """Adds the towers that a checkpoint lacks from CLIP's own file; what was opened for it.

    The file is `given`, or in that folder, or in that repository on the Hub.

    Raises:
      UserError: The file is missing, damaged or no state dict.
    """
    absent = [
        prefix
        for prefix in (TEXT_TOWER, IMAGE_TOWER)
        if not any(key.startswith(prefix) for key in tensors)
    ]
    if not absent or given is None:
        return []
    source = open_source(hub.find_folder(given, (), either=clip.FILES))
    for key, tensor in source.items():
        prefix = IMAGE_TOWER if key.startswith("visual.") else TEXT_TOWER
        if prefix in absent:
            tensors[prefix + key] = tensor
    return [source]
