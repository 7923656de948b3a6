"""What a training needs of a device, counted by hand."""

import dataclasses

import jax
import pytest
import tiny_training

from dicode_jax.errors import UserError
from dicode_jax.runtime.sharding import make_mesh
from dicode_jax.training import memory
from dicode_jax.training.setup import plan_stage

GB = 10**9


def measured(**options):
    stage = tiny_training.make_stage(dataclasses.replace(tiny_training.TinyConfig(), **options))
    plan = plan_stage(stage, make_mesh(stage.config.sharding, jax.devices()[:1]))
    return memory.measure(plan), memory.row_bytes(stage, plan), plan


def test_what_is_held_is_the_state_and_the_gradients_are_the_parameters():
    found, _, plan = measured()
    sizes = [x.size for x in jax.tree.leaves(plan.state.params)]
    assert found.trained == 4 * sum(sizes)
    copies = 3 + (plan.state.ema is not None)  # and two moments
    assert copies * found.trained < found.held < copies * found.trained + 100
    with_average, *_ = measured(ema_decay=0.9)
    assert with_average.held - measured(ema_decay=0.0)[0].held == found.trained


def test_a_row_is_what_the_backward_pass_keeps_of_it():
    _, row, plan = measured()
    hidden = plan.state.params["up"]["kernel"].get_value().shape[-1]
    assert 4 * hidden <= row <= 10 * 4 * (hidden + 9)


NEED = memory.Memory(held=10 * GB, trained=3 * GB)


def test_a_step_holds_gradients_updates_and_the_rows_of_a_part():
    assert NEED.step(4, GB, accumulates=False) == 20 * GB
    assert NEED.step(4, GB, accumulates=True) == 23 * GB


@pytest.mark.parametrize(("free", "parts"), [(24, 1), (23, 2), (21, 4), (20, 8), (1, 8)])
def test_a_batch_is_split_until_it_fits_and_no_further(free, parts):
    assert memory.parts_that_fit(NEED, 8, GB, free * GB) == parts


def test_weights_that_do_not_fit_are_refused_with_the_numbers():
    memory.require(NEED, 13 * GB)
    with pytest.raises(UserError, match=r"need 13.0 GB of each device, which has 12.9 GB"):
        memory.require(NEED, 12_900_000_000)
