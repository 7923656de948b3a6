import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dicode_jax.training.flops import FlopCount, count_flops, peak_flops

B, D, M = 5, 7, 11
FORWARD = 2 * B * D * M * 2  # two products of B x D x M, a multiplication and an addition each


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {
    "up": jax.ShapeDtypeStruct((D, M), jnp.float32),
    "down": jax.ShapeDtypeStruct((M, D), jnp.float32),
}
X = jax.ShapeDtypeStruct((B, D), jnp.float32)


def loss(params, x):
    return jnp.square(mlp(params, x)).sum()


def test_gradient_of_all_inputs_costs_two_forward_passes_more():
    assert count_flops(mlp, PARAMS, X) == FlopCount(model=FORWARD)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    assert count_flops(step, PARAMS, X) == FlopCount(model=3 * FORWARD)
    # without the gradient of x one product is missing
    assert count_flops(jax.grad(loss), PARAMS, X).model == 3 * FORWARD - FORWARD // 2


@pytest.mark.parametrize("jitted", [False, True])
def test_recomputation_is_told_apart(jitted):
    layer = jax.jit(mlp) if jitted else mlp
    deep = lambda p, x: jnp.square(jnp.sin(jax.checkpoint(layer)(p, x))).sum()  # noqa: E731
    count = count_flops(jax.value_and_grad(deep, argnums=(0, 1)), PARAMS, X)
    assert count.model == 3 * FORWARD
    # the backward pass needs the activation inside, not the output
    assert count.recomputed == FORWARD // 2
    assert count.total == count.model + count.recomputed


def test_recomputation_inside_a_scan_counts_once_per_layer():
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((4, *s.shape), s.dtype), PARAMS)

    def deep(params, x):
        body = jax.checkpoint(lambda x, p: (jnp.sin(mlp(p, x)), None), prevent_cse=False)
        return jax.lax.scan(body, x, params)[0].sum()

    count = count_flops(jax.grad(deep), stacked, X)
    assert count.model == 4 * 3 * FORWARD
    assert count.recomputed == 4 * FORWARD


def test_batched_products_count_every_batch():
    q = jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.float32)
    k = jax.ShapeDtypeStruct((2, 3, 11, 7), jnp.float32)
    scores = lambda q, k: jnp.einsum("bhtd,bhsd->bhts", q, k)  # noqa: E731
    assert count_flops(scores, q, k).model == 2 * 2 * 3 * 5 * 11 * 7


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolution_and_its_gradients(stride, groups):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    x = jax.ShapeDtypeStruct((2, 8, 12, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4 // groups, 6), jnp.float32)
    outputs = 2 * (8 // stride) * (12 // stride) * 6
    forward = 2 * outputs * 3 * 3 * 4 // groups
    assert count_flops(conv, x, kernel).model == forward
    for wrt in (0, 1):  # each gradient costs what the forward pass does
        grad = jax.grad(lambda *a: jnp.sin(conv(*a)).sum(), argnums=wrt)
        assert count_flops(grad, x, kernel).model == 2 * forward


def test_of_two_branches_the_dearer_one_counts():
    def choose(flag, params, x):
        return jax.lax.cond(flag, lambda: mlp(params, x), lambda: x @ params["up"] @ params["down"])

    one = count_flops(lambda f, p, x: choose(f, p, x), jnp.array(True), PARAMS, X)
    assert one.model == FORWARD
    small = lambda f, p, x: jax.lax.cond(f, lambda: mlp(p, x), lambda: x)  # noqa: E731
    assert count_flops(small, jnp.array(True), PARAMS, X).model == FORWARD


def test_a_loop_of_unknown_length_is_refused_only_when_it_multiplies_matrices():
    def until(w, limit):
        return jax.lax.while_loop(lambda s: s.sum() < limit, lambda s: s @ w, w)

    w = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"while.*lax\.scan"):
        count_flops(until, w, 1.0)
    harmless = lambda x: jax.lax.while_loop(lambda s: s < 9, lambda s: s + 1, x)  # noqa: E731
    assert count_flops(harmless, 1.0).total == 0


def test_a_program_for_one_device_counts_on_each():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(mlp, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    x = jax.ShapeDtypeStruct((4 * B, D), jnp.float32)
    assert count_flops(spread, PARAMS, x).model == 4 * FORWARD


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_peak_by_the_names_that_jax_gives_devices(kind, tera):
    assert peak_flops(kind) == tera * 1e12


def test_the_peak_of_an_unknown_device_is_not_known():
    assert peak_flops("cpu") is None
