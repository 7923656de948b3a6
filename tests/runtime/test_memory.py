"""Memory of a device, and of a program by the sizes of what it makes."""

import jax
import jax.numpy as jnp

from dicode_jax.runtime import memory


def test_memory_of_the_machine_is_read_and_the_limit_of_a_container_counts(monkeypatch):
    device = jax.devices()[0]
    free, total = memory.available(device)
    assert 0 < free < total
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: [(1000, 400)])
    assert memory.available(device) == (600, 1000)


def peak(function, *shape):
    program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return memory.peak_bytes(program.jaxpr)


def test_a_program_needs_what_it_has_made_and_will_use():
    assert peak(lambda x: jnp.exp(jnp.sin(x)) + 1, 100) == 800  # one in, one out
    assert peak(lambda x: jnp.sin(x) + jnp.exp(jnp.cos(x)), 100) == 1200
    assert peak(lambda x: jnp.exp(jnp.broadcast_to(x, (5, 100))).sum(), 100) == 4000
    assert peak(lambda x: x.astype(jnp.bfloat16), 100) == 200


def test_the_inside_of_a_call_and_of_a_loop_counts_once():
    wide = lambda x: jnp.exp(jnp.broadcast_to(x, (5, 100))).sum(0)  # noqa: E731
    assert peak(jax.jit(wide), 100) == peak(wide, 100) == 4000
    loop = lambda x: jax.lax.scan(lambda c, _: (wide(c), None), x, None, length=7)[0]  # noqa: E731
    assert peak(loop, 100) == 4000
    assert peak(lambda x: loop(jnp.sin(x)) + x, 100) == 4400
