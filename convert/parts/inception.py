"""Inception networks under the names of their PyTorch ports: I3D and Inception-v3.

I3D's are those of `pytorch-i3d`, Inception-v3's torchvision's, as `pytorch-fid` stores the weights
of TensorFlow's network of 2015 under them. Sizes are found from the weights.
"""

from collections.abc import Mapping
from typing import Any

from convert.engine import found
from convert.engine.plan import Kind
from convert.engine.rules import CONV2D, Layout, Rule, Rules, Skip
from dicode_jax.errors import UserError
from dicode_jax.models.i3d import I3D, I3DConfig
from dicode_jax.models.inception import Inception, InceptionConfig

CONV3D = Layout("conv3d", (2, 3, 4, 1, 0))  # [o, i, t, h, w] -> [t, h, w, i, o]
CONV1X1X1 = Layout("conv1x1x1", (1, 0), drop=(2, 3, 4))  # [o, i, 1, 1, 1] -> linear [i, o]
CLASSES = 1008  # of TensorFlow's network of 2015; torchvision's has 1000
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _unit(source: str, target: str, conv: str, layout: Layout) -> tuple[Rule, ...]:
    return (
        Rule(rf"{source}\.{conv}\.weight", f"{target}.conv.kernel", layout),
        *(
            Rule(rf"{source}\.bn\.{theirs}", f"{target}.norm.{our}")
            for theirs, our in _NORM.items()
        ),
    )


_COUNT = Skip(r".*\.num_batches_tracked", why="a count of the training's batches")

I3D_RULES: Rules = (
    *_unit("Conv3d_1a_7x7", "conv_1a", "conv3d", CONV3D),
    *_unit("Conv3d_2b_1x1", "conv_2b", "conv3d", CONV3D),
    *_unit("Conv3d_2c_3x3", "conv_2c", "conv3d", CONV3D),
    *_unit(r"Mixed_(\w+)\.(\w+)", "mixed_{0}.{1}", "conv3d", CONV3D),
    Rule(r"logits\.conv3d\.weight", "logits.kernel", CONV1X1X1),
    Rule(r"logits\.conv3d\.bias", "logits.bias"),
    _COUNT,
)
INCEPTION_RULES: Rules = (
    *_unit("Conv2d_1a_3x3", "conv_1a", "conv", CONV2D),
    *_unit("Conv2d_2a_3x3", "conv_2a", "conv", CONV2D),
    *_unit("Conv2d_2b_3x3", "conv_2b", "conv", CONV2D),
    *_unit("Conv2d_3b_1x1", "conv_3b", "conv", CONV2D),
    *_unit("Conv2d_4a_3x3", "conv_4a", "conv", CONV2D),
    *_unit(r"Mixed_(\w+)\.(\w+)", "mixed_{0}.{1}", "conv", CONV2D),
    Skip(r"fc\.(?:weight|bias)", why="the classes, of which FID knows nothing"),
    _COUNT,
)

I3D_KIND = Kind(I3D, I3DConfig, lambda x: I3DConfig(**x), lambda source, cfg: I3D_RULES)
INCEPTION_KIND = Kind(
    Inception, InceptionConfig, lambda x: InceptionConfig(**x), lambda source, cfg: INCEPTION_RULES
)


def find_i3d(source: Mapping[str, Any]) -> found.Found:
    """Sizes by shapes.

    Raises:
      UserError: It is no I3D of colour frames.
    """
    keys = found.Keys(source)
    width, channels, *_ = keys.shape("Conv3d_1a_7x7.conv3d.weight", 5)
    if channels != 3:
        raise UserError(f"this I3D reads {channels} channels (optical flow); FVD's reads colours")
    (classes,) = keys.shape("logits.conv3d.bias", 1)
    return found.found(I3DConfig, {"num_classes": classes, "divisor": _divisor(64, width)})


def find_inception(source: Mapping[str, Any]) -> found.Found:
    """Sizes by shapes.

    Raises:
      UserError: It is no Inception-v3, or torchvision's, whose features are not FID's.
    """
    keys = found.Keys(source)
    width, *_ = keys.shape("Conv2d_1a_3x3.conv.weight", 4)
    is_later = keys.any("AuxLogits.")
    if "fc.weight" in keys:
        is_later |= keys.shape("fc.weight", 2)[0] != CLASSES
    if is_later:
        raise UserError(
            "these are torchvision's weights of Inception-v3; FID is of TensorFlow's, which "
            "pytorch-fid has as pt_inception-2015-12-05-6726825d.pth"
        )
    return found.found(InceptionConfig, {"divisor": _divisor(32, width)})


def _divisor(published: int, width: int) -> int:
    return max(published // width, 1)
