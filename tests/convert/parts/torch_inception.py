"""I3D and Inception-v3 written from torch's own functions, under the names of published weights.

Independent of the modules under test: every unit is called by its name and sizes come of the
tensors alone. Sizes of all tensors at full width are here too.
"""

import math

import torch
import torch.nn.functional as F

EPSILON = 1e-3
I3D_MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}
NORM = ("weight", "bias", "running_mean", "running_var")


def unit_shapes(name, conv, kernel):
    shapes = {f"{name}.{conv}.weight": kernel}
    return shapes | {f"{name}.bn.{part}": kernel[:1] for part in NORM}


def i3d_shapes(divisor=1, num_classes=400):
    d, out = divisor, {}
    for name, i, o, k in (
        ("Conv3d_1a_7x7", 3, 64, 7),
        ("Conv3d_2b_1x1", 64, 64, 1),
        ("Conv3d_2c_3x3", 64, 192, 3),
    ):
        out |= unit_shapes(name, "conv3d", (o // d, i if i == 3 else i // d, k, k, k))
    for block, (i, b0, b1a, b1b, b2a, b2b, b3b) in I3D_MIXED.items():
        for branch, (a, b, k) in {
            "b0": (i, b0, 1),
            "b1a": (i, b1a, 1),
            "b1b": (b1a, b1b, 3),
            "b2a": (i, b2a, 1),
            "b2b": (b2a, b2b, 3),
            "b3b": (i, b3b, 1),
        }.items():
            shape = (b // d, a // d, k, k, k)
            out |= unit_shapes(f"Mixed_{block}.{branch}", "conv3d", shape)
    out["logits.conv3d.weight"] = (num_classes, 1024 // d, 1, 1, 1)
    out["logits.conv3d.bias"] = (num_classes,)
    return out


def drawn(shapes, seed=0):
    """Random weights under which numbers neither vanish nor explode."""
    rng, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=rng)
        if name.endswith(("running_var", "bn.weight")):
            x = 1 + 0.3 * x.abs()
        elif len(shape) > 1:
            x = x * math.sqrt(2 / math.prod(shape[1:]))
        else:
            x = 0.2 * x
        out[name] = x
    return out


def _unit(w, x, name, conv, convolve, **how):
    x = convolve(x, w[f"{name}.{conv}.weight"], **how)
    norm = [w[f"{name}.bn.{part}"] for part in NORM]
    mean, var = norm[2:]
    return F.relu(F.batch_norm(x, mean, var, *norm[:2], training=False, eps=EPSILON))


def _same(x, kernel, strides):
    """Zeros as TensorFlow's SAME adds them: the odd one after."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(strides)):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def i3d(w, x):
    """Logits [b, n] of clips [b, 3, f, h, w]."""

    def unit(x, name, stride=1):
        kernel = w[f"{name}.conv3d.weight"].shape[2:]
        x = _same(x, kernel, (stride,) * 3)
        return _unit(w, x, name, "conv3d", F.conv3d, stride=stride)

    def pool(x, kernel, strides):
        return F.max_pool3d(_same(x, kernel, strides), kernel, strides)

    x = unit(x, "Conv3d_1a_7x7", 2)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block in I3D_MIXED:
        if block == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        u = lambda x, branch, block=block: unit(x, f"Mixed_{block}.{branch}")  # noqa: E731
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        x = torch.cat(
            [u(x, "b0"), u(u(x, "b1a"), "b1b"), u(u(x, "b2a"), "b2b"), u(pooled, "b3b")], 1
        )
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    x = F.conv3d(x, w["logits.conv3d.weight"], w["logits.conv3d.bias"])
    return x[..., 0, 0].mean(-1)


# name -> input channels, output channels, kernel; of Inception-v3 as FID has it.
def inception_units():
    out = {
        "Conv2d_1a_3x3": (3, 32, (3, 3)),
        "Conv2d_2a_3x3": (32, 32, (3, 3)),
        "Conv2d_2b_3x3": (32, 64, (3, 3)),
        "Conv2d_3b_1x1": (64, 80, (1, 1)),
        "Conv2d_4a_3x3": (80, 192, (3, 3)),
    }
    for block, i, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        out |= {
            f"Mixed_{block}.branch1x1": (i, 64, (1, 1)),
            f"Mixed_{block}.branch5x5_1": (i, 48, (1, 1)),
            f"Mixed_{block}.branch5x5_2": (48, 64, (5, 5)),
            f"Mixed_{block}.branch3x3dbl_1": (i, 64, (1, 1)),
            f"Mixed_{block}.branch3x3dbl_2": (64, 96, (3, 3)),
            f"Mixed_{block}.branch3x3dbl_3": (96, 96, (3, 3)),
            f"Mixed_{block}.branch_pool": (i, pooled, (1, 1)),
        }
    out |= {
        "Mixed_6a.branch3x3": (288, 384, (3, 3)),
        "Mixed_6a.branch3x3dbl_1": (288, 64, (1, 1)),
        "Mixed_6a.branch3x3dbl_2": (64, 96, (3, 3)),
        "Mixed_6a.branch3x3dbl_3": (96, 96, (3, 3)),
    }
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        out |= {
            f"Mixed_{block}.branch1x1": (768, 192, (1, 1)),
            f"Mixed_{block}.branch7x7_1": (768, c, (1, 1)),
            f"Mixed_{block}.branch7x7_2": (c, c, (1, 7)),
            f"Mixed_{block}.branch7x7_3": (c, 192, (7, 1)),
            f"Mixed_{block}.branch7x7dbl_1": (768, c, (1, 1)),
            f"Mixed_{block}.branch7x7dbl_2": (c, c, (7, 1)),
            f"Mixed_{block}.branch7x7dbl_3": (c, c, (1, 7)),
            f"Mixed_{block}.branch7x7dbl_4": (c, c, (7, 1)),
            f"Mixed_{block}.branch7x7dbl_5": (c, 192, (1, 7)),
            f"Mixed_{block}.branch_pool": (768, 192, (1, 1)),
        }
    out |= {
        "Mixed_7a.branch3x3_1": (768, 192, (1, 1)),
        "Mixed_7a.branch3x3_2": (192, 320, (3, 3)),
        "Mixed_7a.branch7x7x3_1": (768, 192, (1, 1)),
        "Mixed_7a.branch7x7x3_2": (192, 192, (1, 7)),
        "Mixed_7a.branch7x7x3_3": (192, 192, (7, 1)),
        "Mixed_7a.branch7x7x3_4": (192, 192, (3, 3)),
    }
    for block, i in (("7b", 1280), ("7c", 2048)):
        out |= {
            f"Mixed_{block}.branch1x1": (i, 320, (1, 1)),
            f"Mixed_{block}.branch3x3_1": (i, 384, (1, 1)),
            f"Mixed_{block}.branch3x3_2a": (384, 384, (1, 3)),
            f"Mixed_{block}.branch3x3_2b": (384, 384, (3, 1)),
            f"Mixed_{block}.branch3x3dbl_1": (i, 448, (1, 1)),
            f"Mixed_{block}.branch3x3dbl_2": (448, 384, (3, 3)),
            f"Mixed_{block}.branch3x3dbl_3a": (384, 384, (1, 3)),
            f"Mixed_{block}.branch3x3dbl_3b": (384, 384, (3, 1)),
            f"Mixed_{block}.branch_pool": (i, 192, (1, 1)),
        }
    return out


def inception_shapes(divisor=1):
    out = {}
    for name, (i, o, kernel) in inception_units().items():
        shape = (o // divisor, i if i == 3 else i // divisor, *kernel)
        out |= unit_shapes(name, "conv", shape)
    return out | {"fc.weight": (1008, 2048 // divisor), "fc.bias": (1008,)}


def inception(w, x):
    """Features [b, d] of images [b, 3, h, w]."""

    def unit(x, name, stride=1, pad=(0, 0)):
        return _unit(w, x, name, "conv", F.conv2d, stride=stride, padding=pad)

    def chain(x, *steps):
        for step in steps:
            x = unit(x, *step)
        return x

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    x = chain(x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, (1, 1)))
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(chain(x, ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",)), 3, 2)
    for m in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        double = ((f"{m}branch3x3dbl_{n}", 1, (1, 1)) for n in (2, 3))
        x = torch.cat([
            unit(x, f"{m}branch1x1"),
            chain(x, (f"{m}branch5x5_1",), (f"{m}branch5x5_2", 1, (2, 2))),
            chain(x, (f"{m}branch3x3dbl_1",), *double),
            unit(average(x), f"{m}branch_pool"),
        ], 1)  # fmt: skip
    m = "Mixed_6a."
    x = torch.cat([
        unit(x, f"{m}branch3x3", 2),
        chain(x, (f"{m}branch3x3dbl_1",), (f"{m}branch3x3dbl_2", 1, (1, 1)),
              (f"{m}branch3x3dbl_3", 2)),
        F.max_pool2d(x, 3, 2),
    ], 1)  # fmt: skip
    row, column = (0, 3), (3, 0)
    for m in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        double = zip((2, 3, 4, 5), (column, row, column, row))
        x = torch.cat([
            unit(x, f"{m}branch1x1"),
            chain(x, (f"{m}branch7x7_1",), (f"{m}branch7x7_2", 1, row),
                  (f"{m}branch7x7_3", 1, column)),
            chain(x, (f"{m}branch7x7dbl_1",),
                  *((f"{m}branch7x7dbl_{n}", 1, pad) for n, pad in double)),
            unit(average(x), f"{m}branch_pool"),
        ], 1)  # fmt: skip
    m = "Mixed_7a."
    x = torch.cat([
        chain(x, (f"{m}branch3x3_1",), (f"{m}branch3x3_2", 2)),
        chain(x, (f"{m}branch7x7x3_1",), (f"{m}branch7x7x3_2", 1, row),
              (f"{m}branch7x7x3_3", 1, column), (f"{m}branch7x7x3_4", 2)),
        F.max_pool2d(x, 3, 2),
    ], 1)  # fmt: skip
    for m in ("Mixed_7b.", "Mixed_7c."):
        fork = lambda x, name: torch.cat(  # noqa: E731
            [unit(x, f"{name}a", 1, (0, 1)), unit(x, f"{name}b", 1, (1, 0))], 1
        )
        double = chain(x, (f"{m}branch3x3dbl_1",), (f"{m}branch3x3dbl_2", 1, (1, 1)))
        pooled = F.max_pool2d(x, 3, 1, 1) if m == "Mixed_7c." else average(x)
        x = torch.cat([
            unit(x, f"{m}branch1x1"),
            fork(unit(x, f"{m}branch3x3_1"), f"{m}branch3x3_2"),
            fork(double, f"{m}branch3x3dbl_3"),
            unit(pooled, f"{m}branch_pool"),
        ], 1)  # fmt: skip
    return x.mean((2, 3))
