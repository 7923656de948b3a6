"""Before a run starts: what was found for it, what it needs, and how it is made to fit."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.runtime.sharding import make_mesh
from dicode_jax.training import flops, memory
from dicode_jax.training.setup import Plan, plan_stage
from dicode_jax.training.stage import Stage
from dicode_jax.training.workdir import stored_config
from train.command import Command

FOUND = ("tokenizer", "frame_size", "model.")  # fields that data and tokenizers settle
STEP_ON_CPU = 5e11  # FLOPs of a first try without an accelerator: some ten seconds on two cores
USABLE = 0.9  # of free memory; the rest is for what is not counted


def tell_found(said: Command, config: Any) -> None:
    """Prints what a config was found to be, where its file and the command line leave it open.

    Raises:
      UserError: The command line says otherwise.
    """
    before, after = (config_lib.leaves(config_lib.to_dict(c)) for c in (said.config, config))
    changed = [k for k in after if k.startswith(FOUND) and before.get(k) != after[k]]
    for name in changed:
        if name in said.said:
            raise UserError(
                f"--{name.replace('_', '-')} {before[name]} contradicts the data or the tokenizer, "
                f"which say {after[name]}: leave it out, or name others"
            )
    if config.data.path == "shapes" and "data.path" not in said.said:
        _print(
            "data: none is named, so it trains on the drawn world of moving shapes; your own: "
            "--data.path VIDEOS" + " --tokenizer MODEL" * hasattr(config, "text_length")
        )
    if changed:
        _print("found: " + ", ".join(f"{k} {before.get(k)} -> {after[k]}" for k in changed))


def fit(
    said: Command, config: Any, build_stage: Callable[[Any], Stage], workdir: pathlib.Path
) -> Any:
    """The config with a batch that the machine can do, in as many parts as fit; says what it needs.

    Only what the command line does not say is fitted: `optim.accumulate_steps`, which a run that
    goes on keeps, and without an accelerator the batch on the drawn world, where it is a first try.

    Raises:
      UserError: The weights alone do not fit.
    """
    stage = build_stage(config)
    plan = plan_stage(stage, mesh := make_mesh(config.sharding))
    device, ways = jax.local_devices()[0], mesh.shape["data"] * mesh.shape["fsdp"]
    room = memory.available(device)
    need = memory.measure(plan)
    if room is not None:
        memory.require(need, room[1])
    is_try = device.platform == "cpu" and config.data.path == "shapes"
    if is_try and "batch_size" not in said.said:
        config = _first_try(config, stage, plan, ways)
    rows, parts = config.batch_size // ways, config.optim.accumulate_steps
    row = memory.row_bytes(stage, plan)
    earlier = stored_config(workdir, type(config))
    if "optim.accumulate_steps" not in said.said and parts == 1:
        if earlier is not None:
            parts = earlier.optim.accumulate_steps
        elif room is not None:
            parts = memory.parts_that_fit(need, rows, row, int(USABLE * room[0]))
            if jax.process_count() > 1:
                parts = int(multihost_utils.broadcast_one_to_all(np.int32(parts)))
        optim = dataclasses.replace(config.optim, accumulate_steps=parts)
        config = dataclasses.replace(config, optim=optim)
    step = need.step(rows // parts, row, accumulates=parts > 1)
    _tell_needs(config, plan, step, room and room[0], parts)
    return config


def _first_try(config: Any, stage: Stage, plan: Plan, ways: int) -> Any:
    """The config with a batch of which a CPU does a step in seconds rather than in an hour."""
    batch = stage.batch_shapes(config.batch_size)
    with jax.set_mesh(plan.mesh):
        work = flops.count_flops(plan.step, plan.state, plan.frozen, batch).model
    if work <= STEP_ON_CPU:
        return config
    rows = STEP_ON_CPU / work * config.batch_size / ways
    size = ways * 2 ** max(0, math.floor(math.log2(rows)))
    _print(
        f"batch: {config.batch_size} would be {work:.1e} FLOPs a step; without an accelerator it "
        f"tries {size} (--batch-size says another)"
    )
    optim = dataclasses.replace(config.optim, accumulate_steps=1)
    examples = min(config.validation_examples, size)
    return dataclasses.replace(config, batch_size=size, optim=optim, validation_examples=examples)


def _tell_needs(config: Any, plan: Plan, step: int, free: int | None, parts: int) -> None:
    learn, frozen = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (plan.state.params, plan.frozen)
    )
    there = "" if free is None else f" of {free / 1e9:.1f} GB free"
    devices = f" on each of {jax.device_count()} devices" if jax.device_count() > 1 else ""
    split = f" in {parts} parts of {config.batch_size // parts}" if parts > 1 else ""
    _print(
        f"model: {learn:,} parameters learn" + f", {frozen:,} are frozen" * bool(frozen) + "; "
        f"batches of {config.batch_size}{split}; a step needs about {step / 1e9:.1f} GB{there}"
        f"{devices}"
    )
    if free is not None and step > free:
        _print("memory: that may be too much; a smaller --batch-size or --dtype bfloat16 need less")


def _print(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
