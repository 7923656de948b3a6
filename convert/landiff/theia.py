"""Theia's backbone, from which LanDiff's semantic tokens are made, out of its published file.

Written against `theia-base-patch16-224-cddsv`: a ViT below `backbone.model.`, and translators to
the features of other models, which LanDiff does not use.
"""

from collections.abc import Mapping
from typing import Any

from convert.engine import found
from convert.engine.plan import Kind
from convert.engine.rules import Rules, Skip, prefixed
from convert.parts import vit
from dicode_jax.models.vit import ViT, ViTConfig

BACKBONE = "backbone.model."

RULES: Rules = (
    *prefixed(vit.RULES, BACKBONE),
    Skip(r"translator\..*", why="translators to features of other models, which nothing reads"),
)


def find_config(source: Mapping[str, Any]) -> found.Found:
    """Sizes by shapes.

    Raises:
      UserError: It is no Theia.
    """
    return vit.find_config(found.Keys(source, BACKBONE))


KIND = Kind(ViT, ViTConfig, lambda config: ViTConfig(**config), lambda source, cfg: RULES)
