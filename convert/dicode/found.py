"""Configurations of DiCoDe's parts, found from the keys and shapes of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from convert.dicode.config import SystemConfig
from convert.engine import found
from convert.engine.found import Found, Keys
from convert.engine.rules import to_numpy
from convert.parts import deep_tokens
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.clip import CLIPConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.models.gpt2 import GPT2Config

RELEASED = NoiseSchedule(
    linear_start=0.00085, linear_end=0.012, zero_terminal_snr=True, parameterization="v"
)
TRAINING = ("loss", "trainable", "lm")
"""Fields of `SystemConfig` that are no part of what a conversion writes."""

_NUM_SPECIAL = 66  # image tokens at the end of the vocabulary


def system(source: Mapping[str, Any], clip: CLIPConfig | None = None) -> Found:
    """The `SystemConfig` of a checkpoint without its language model.

    Args:
      source: Original keys.
      clip: Gives the heads of the CLIP towers, where they are not OpenCLIP's.

    Raises:
      UserError: Keys of a part are missing, or the shapes make no sense.
    """
    if not any(key.startswith(deep_tokens.UNET) for key in source):
        first = next(iter(source), "none")
        raise UserError(f"the checkpoint has no {deep_tokens.UNET}* (its first key is {first})")
    keys = Keys(source)
    images = keys.below(deep_tokens.IMAGE_TOWER + "visual.")
    vision = found.clip_vision(images, clip and clip.vision)
    text = found.clip_text(keys.below(deep_tokens.TEXT_TOWER), clip and clip.text)
    unet = found.unet(
        keys.below(deep_tokens.UNET),
        context_rule="per_frame",
        default_fs=3,
        text_context_len=text.config.max_seq_len,
    )
    autoencoder = found.autoencoder(keys.below(deep_tokens.AUTOENCODER))
    head_dim = unet.config.head_dim or found.HEAD_DIM
    resampler = found.resampler(keys.below(deep_tokens.RESAMPLER), head_dim=head_dim)
    tokenizer = found.found(
        DeepTokenizerConfig,
        {
            "vision": vision,
            "resampler": resampler,
            "use_vae": "vae_mean_proj.weight" in source,
            "vae_decoder": "vae_decoder.weight" in source,
        },
        {"resize": "stretch"},
    )
    head = None
    if keys.any(deep_tokens.LATENT_HEAD):
        extra = unet.config.in_channels - autoencoder.config.embed_dim
        head = found.resampler(
            keys.below(deep_tokens.LATENT_HEAD), head_dim=head_dim, image_channels=extra
        )
    decoder = found.found(
        ClipDecoderConfig,
        {
            "unet": unet,
            "autoencoder": autoencoder,
            "num_tokens": resampler.config.num_tokens,
            "latent_head": head,
        },
        {"schedule": RELEASED},
    )
    whole = found.found(SystemConfig, {"tokenizer": tokenizer, "decoder": decoder, "text": text})
    written = {k: v for k, v in whole.assumed.items() if k not in TRAINING}
    return Found(whole.config, written)


def language_model(agent: Mapping[str, Any], body: GPT2Config | None = None) -> Found:
    """The `DiCoDeLMConfig` of an agent's keys (without `llm_agent.`).

    Args:
      agent: Original keys.
      body: Gives the number of heads; by default they are 64 wide.

    Raises:
      UserError: Keys are missing, or the shapes make no sense.
    """
    keys = Keys(agent)
    gpt2 = found.gpt2(keys.below("llm.transformer."), body)
    mlp_dim, token_dim = keys.shape("input_resampler.0.weight", 2)
    outputs = keys.shape("output_resampler.2.weight", 2)[0]
    num_tokens = keys.shape("video_pos_token.pos_token", 3)[1]
    vocab = gpt2.config.vocab_size
    told: dict[str, Any] = {
        "body": gpt2,
        "num_tokens": num_tokens,
        "token_dim": token_dim,
        "max_keyframes": keys.shape("video_pos_token.frame_token", 3)[0],
        "mlp_dim": mlp_dim,
        "pre_normalizer": None,
        "image_token_id": vocab - _NUM_SPECIAL + 1,
        "pad_token_id": vocab - _NUM_SPECIAL - 1,
    }
    assumed = {}
    if "vae_decoder.weight" in keys:
        told["loss"] = "vae"
    elif outputs == token_dim:
        assumed["loss"] = "mse"
    elif outputs % (2 * token_dim + 1) == 0:
        told |= {"loss": "gmm", "num_mixtures": outputs // (2 * token_dim + 1)}
    else:
        raise UserError(
            f"output_resampler gives {outputs} numbers, which is no mixture for deep tokens of "
            f"width {token_dim}"
        )
    if "pre_normalizer" in keys:
        told["pre_normalizer"] = tuple(to_numpy(agent["pre_normalizer"]).reshape(-1).tolist())
    return found.found(DiCoDeLMConfig, told, assumed)
