"""I3D and Inception-v3: every published key has its place, and both compute as torch does."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

import convert  # noqa: E402
from convert import to_torch  # noqa: E402
from convert.__main__ import main  # noqa: E402
from convert.engine.rules import ConversionError  # noqa: E402
from convert.parts import inception  # noqa: E402
from dicode_jax.errors import UserError  # noqa: E402
from dicode_jax.models.i3d import I3D, I3DConfig  # noqa: E402
from dicode_jax.models.inception import Inception, InceptionConfig  # noqa: E402
from dicode_jax.storage import weights  # noqa: E402
from tests.convert.parts import torch_inception as reference  # noqa: E402

pytestmark = pytest.mark.torch


def shapes_only(shapes):
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def run(model, x):
    return nnx.jit(lambda model, x: model(x))(model, jnp.asarray(x.numpy()))


@pytest.mark.parametrize(
    ("shapes", "find", "kind", "config", "keys", "parameters"),
    [
        (
            reference.i3d_shapes,
            inception.find_i3d,
            inception.I3D_KIND,
            I3DConfig(),
            287,
            12_697_264,
        ),
        (
            reference.inception_shapes,
            inception.find_inception,
            inception.INCEPTION_KIND,
            InceptionConfig(),
            472,
            21_785_568,
        ),
    ],
    ids=["i3d", "inception"],
)
def test_the_published_keys_are_consumed_and_fill_all(shapes, find, kind, config, keys, parameters):
    source = shapes_only(shapes())
    source["Mixed_5b.num_batches_tracked"] = np.int64(3)  # of later PyTorch
    assert find(source).config == config
    made = kind.plan(source, config)
    assert made.problems == []
    assert len(made.source) == keys + 1
    assert made.report()["used"] + len(made.skipped) == keys + 1
    statistics = sum(np.prod(x) for n, x in made.shapes.items() if n.endswith((".mean", ".var")))
    assert made.report()["parameters"] - statistics == parameters


@pytest.mark.slow
def test_i3d_computes_as_torch_does_on_uneven_sides():
    w = reference.drawn(reference.i3d_shapes(8, 5))
    x = torch.rand(1, 3, 17, 195, 200, generator=torch.Generator().manual_seed(1)) * 2 - 1
    want = reference.i3d(w, x).numpy()
    model = convert.from_torch("i3d", w, I3DConfig(num_classes=5, divisor=8))
    got = run(model, x.permute(0, 2, 3, 4, 1))
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="9 frames or more of 224 x 224, got 8 of 200 x 195"):
        model(jnp.zeros((1, 8, 195, 200, 3)))


@pytest.mark.slow
def test_inception_computes_as_torch_does_on_uneven_sides():
    w = reference.drawn(reference.inception_shapes(16))
    x = torch.rand(3, 3, 107, 130, generator=torch.Generator().manual_seed(1)) * 2 - 1
    want = reference.inception(w, x).numpy()
    model = convert.from_torch("inception", w, InceptionConfig(divisor=16))
    got = run(model, x.permute(0, 2, 3, 1))
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shapes", "kind", "config"),
    [
        ("i3d", reference.i3d_shapes(8, 5), I3D, I3DConfig(num_classes=5, divisor=8)),
        ("inception", reference.inception_shapes(16), Inception, InceptionConfig(divisor=16)),
    ],
)
def test_the_command_finds_the_sizes_and_the_way_back_is_exact(
    tmp_path, name, shapes, kind, config
):
    source = {key: x.numpy() for key, x in reference.drawn(shapes).items()}
    save_file(source, tmp_path / "w.safetensors")
    out = str(tmp_path / "out")
    assert main([name, str(tmp_path / "w.safetensors"), "--out", out]) == 0
    model, found = weights.load_module(out, kind, type(config))
    assert found == config
    again = to_torch.original_state_dict(weights.named_arrays(model), found)
    assert again.keys() == source.keys() - {"fc.weight", "fc.bias"}
    for key, (_, _, read) in again.items():
        np.testing.assert_array_equal(read(), source[key])


def test_other_networks_of_the_same_names_are_refused():
    flow = shapes_only(reference.i3d_shapes(8))
    flow["Conv3d_1a_7x7.conv3d.weight"] = np.zeros((8, 2, 7, 7, 7), np.float32)
    with pytest.raises(UserError, match="2 channels"):
        inception.find_i3d(flow)
    later = shapes_only(reference.inception_shapes(16))
    later["fc.weight"] = np.zeros((1000, 128), np.float32)
    with pytest.raises(UserError, match="torchvision's weights"):
        inception.find_inception(later)
    with pytest.raises(UserError, match="has no Conv2d_1a_3x3"):
        inception.find_inception(flow)
    lacking = shapes_only(reference.i3d_shapes(8))
    lacking["Mixed_5b.b9.bn.bias"] = lacking.pop("Mixed_5b.b3b.bn.bias")
    with pytest.raises(ConversionError) as error:
        inception.I3D_KIND(lacking, I3DConfig(divisor=8))
    assert len(error.value.problems) == 2
    assert "Mixed_5b.b3b.bn.bias" in str(error.value)
