"""The discriminator of AR-Diffusion's VAE, and LPIPS from torchvision's VGG-16 and taming's heads.

A checkpoint of the original's loss holds both: `discriminator.*` and `perceptual_loss.*`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.engine.plan import Kind
from convert.engine.rules import CONV1X1, CONV2D, Rule, Rules, Skip, affine, dense
from dicode_jax.errors import UserError
from dicode_jax.models.lpips import LPIPS, SCALE, SHIFT, LPIPSConfig
from dicode_jax.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig

JUDGE, PERCEPTUAL = "discriminator.", "perceptual_loss."  # in a checkpoint of the loss
NUM_CONVS = tuple(len(widths) for widths in LPIPSConfig().widths)


def rules(source: Mapping[str, Any], cfg: PatchDiscriminatorConfig) -> Rules:
    """`main.N`: a convolution, then norm and activation in turn."""
    last = cfg.num_layers + 1
    numbers = (0, *(3 * i - 1 for i in range(1, last + 1)))
    convs = [r for i, n in enumerate(numbers) for r in dense(rf"main\.{n}", f"convs.{i}", CONV2D)]
    norms = [r for i in range(1, last) for r in affine(rf"main\.{3 * i}", f"norms.{i - 1}")]
    statistics = r"main\.\d+\.(?:running_mean|running_var|num_batches_tracked)"
    why = "running statistics: state of a training, which starts anew"
    return (*convs, *norms, Skip(statistics, why=why))


def find_config(source: Mapping[str, Any]) -> PatchDiscriminatorConfig:
    """Sizes by shapes.

    Raises:
      UserError: It is no such discriminator.
    """
    kernels = [k for k in source if re.fullmatch(r"main\.\d+\.weight", k)]
    kernels = [k for k in kernels if len(source[k].shape) == 4]
    if len(kernels) < 3 or "main.0.weight" not in kernels:
        raise UserError("no discriminator of AR-Diffusion: want main.0.weight and its like")
    return PatchDiscriminatorConfig(
        channels=int(source["main.0.weight"].shape[0]), num_layers=len(kernels) - 2
    )


def _vgg(prefix: str, number) -> list[Rule]:
    out, place = [], 0
    for block, count in enumerate(NUM_CONVS):
        place += bool(block)  # the pooling before it
        for conv in range(count):
            source = rf"{prefix}{number(block, place)}"
            out += dense(source, f"blocks.{block}.{conv}", CONV2D)
            place += 2  # with its ReLU
    return out


def _heads(prefix: str) -> list[Rule]:
    name = rf"{prefix}lin(0|1|2|3|4)\.model\.1\.weight"
    return [Rule(name, "heads.{0}.kernel", CONV1X1)]


SHIFTS = Skip(r"scaling_layer\.(?:shift|scale)", why="the constants of every LPIPS")
LPIPS_RULES: Rules = (
    *_vgg("", lambda block, place: rf"net\.slice{block + 1}\.{place}"),
    *_heads(""),
    SHIFTS,
)
TORCHVISION_RULES: Rules = (
    *_vgg("", lambda block, place: rf"features\.{place}"),
    *_heads(""),
    Skip(r"classifier\..*", why="VGG-16's classes, of which LPIPS knows nothing"),
)
"""`lin*` of taming's `vgg.pth` beside the keys of torchvision's VGG-16."""


def stored_statistics(cfg: PatchDiscriminatorConfig) -> dict[str, np.ndarray]:
    """Running statistics before any batch, under original names."""
    out = {}
    for i, width in enumerate(cfg.widths[1:], 1):
        name = f"{JUDGE}main.{3 * i}"
        out[f"{name}.running_mean"] = np.zeros(width, np.float32)
        out[f"{name}.running_var"] = np.ones(width, np.float32)
        out[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
    return out


def stored_constants(cfg: LPIPSConfig) -> dict[str, np.ndarray]:
    """The constants that every LPIPS keeps, under original names."""
    values = {"shift": SHIFT, "scale": SCALE}
    return {
        f"{PERCEPTUAL}scaling_layer.{name}": np.asarray(x, np.float32).reshape(1, 3, 1, 1)
        for name, x in values.items()
    }


KIND = Kind(
    PatchDiscriminator, PatchDiscriminatorConfig, lambda x: PatchDiscriminatorConfig(**x), rules
)

LPIPS_KIND = Kind(LPIPS, LPIPSConfig, lambda x: LPIPSConfig(**x), lambda source, cfg: LPIPS_RULES)

TORCHVISION_KIND = Kind(
    LPIPS, LPIPSConfig, lambda x: LPIPSConfig(**x), lambda source, cfg: TORCHVISION_RULES
)
