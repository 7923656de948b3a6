"""The autoencoder of CogVideoX, as LanDiff stores it (`vae/3d-vae.pt`).

Written against the "state_dict" of that file, 436 keys without those of its loss.
"""

from collections.abc import Mapping
from typing import Any

from convert.engine import found
from convert.engine.plan import Kind
from convert.engine.rules import CONV2D, Layout, Rules, Skip, affine, dense, prefixed
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig

CONV3D = Layout("conv3d", (2, 3, 4, 1, 0))  # [o, i, t, h, w] -> [t, h, w, i, o]
CONV1X1X1 = Layout("conv1x1x1", (1, 0), drop=(2, 3, 4))  # [o, i, 1, 1, 1] -> linear [i, o]


def spatial_norm(source: str, target: str) -> Rules:
    """A norm of the decoder."""
    return (
        *affine(rf"{source}\.norm_layer", f"{target}.norm"),
        *dense(rf"{source}\.conv_y\.conv", f"{target}.scale", CONV1X1X1),
        *dense(rf"{source}\.conv_b\.conv", f"{target}.shift", CONV1X1X1),
    )


def block(norm, source: str, target: str, *, shortcut: str = "nin_shortcut") -> Rules:
    """A residual block, whose norms are `affine` or `spatial_norm`."""
    return (
        *norm(rf"{source}\.norm1", f"{target}.norm1"),
        *dense(rf"{source}\.conv1\.conv", f"{target}.conv1", CONV3D),
        *norm(rf"{source}\.norm2", f"{target}.norm2"),
        *dense(rf"{source}\.conv2\.conv", f"{target}.conv2", CONV3D),
        *dense(rf"{source}\.{shortcut}", f"{target}.shortcut", CONV1X1X1),
    )


def _side(norm, levels: str) -> Rules:
    level = rf"{levels}\.(\d+)"
    return (
        *dense(r"conv_(in|out)\.conv", "conv_{0}", CONV3D),
        *block(norm, r"mid\.block_1", "middle.0"),
        *block(norm, r"mid\.block_2", "middle.1"),
        *block(norm, rf"{level}\.block\.(\d+)", "levels.{0}.blocks.{1}"),
        *dense(rf"{level}\.{levels}sample\.conv", "levels.{0}.resample.conv", CONV2D),
        *norm(r"norm_out", "norm_out"),
    )


ENCODER_RULES, DECODER_RULES = _side(affine, "down"), _side(spatial_norm, "up")
RULES: Rules = (
    *prefixed(ENCODER_RULES, "encoder.", "encoder."),
    *prefixed(DECODER_RULES, "decoder.", "decoder."),
    Skip(r"loss.*", why="the loss of its training"),
)


def find_config(source: Mapping[str, Any]) -> found.Found:
    """The configuration by keys and shapes.

    Raises:
      UserError: They are not those of such an autoencoder.
    """
    keys = found.Keys(source)
    if "decoder.norm_out.conv_y.conv.weight" not in keys:
        raise UserError(
            "no autoencoder of CogVideoX: want decoder.norm_out.conv_y.conv.weight and its like"
        )
    channels = keys.shape("encoder.conv_in.conv.weight", 5)[0]
    widths = {
        side: [
            keys.shape(f"{side}.{name}.{i}.block.0.conv1.conv.weight", 5)[0]
            for i in range(keys.count(f"{side}.{name}."))
        ]
        for side, name in (("encoder", "down"), ("decoder", "up"))
    }
    told = {
        "channels": channels,
        "encoder_mult": tuple(width // channels for width in widths["encoder"]),
        "decoder_mult": tuple(width // channels for width in widths["decoder"]),
        "encoder_blocks": keys.count("encoder.down.0.block."),
        "decoder_blocks": keys.count("decoder.up.0.block."),
        "z_channels": keys.shape("decoder.conv_in.conv.weight", 5)[1],
    }
    return found.found(AutoencoderCausal3DConfig, told)


KIND = Kind(
    AutoencoderCausal3D,
    AutoencoderCausal3DConfig,
    lambda x: AutoencoderCausal3DConfig(**x),
    lambda source, cfg: RULES,
)
