"""A training of a few milliseconds a step, as a command line, for tests that stop and kill runs."""

import dataclasses
import functools
import json
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.data.config import DataConfig
from dicode_jax.data.stream import BatchStream
from dicode_jax.nn.rngs import draw
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.stage import Stage
from train import loop

LENGTH = 37  # examples; no multiple of the batch size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Settings; the last ones make things happen.

    Attributes:
      data: Unused.
      width: Of the hidden layer.
      poison: Batches (by number) that hold an infinity.
      evaluate: Whether there is a validation loss, `1 / step`, and samples.
      sleep: Seconds that the data takes for a batch.
      num_workers: Processes that make batches.
    """

    data: DataConfig = DataConfig(path="numbers")
    width: int = 8
    num_steps: int = 40
    batch_size: int = 4
    optim: OptimConfig = OptimConfig(lr=3e-3, warmup_steps=5)
    ema_decay: float = 0.9
    sharding: ShardingConfig = ShardingConfig()
    seed: int = 3
    poison: tuple[int, ...] = ()
    evaluate: bool = False
    sleep: float = 0.0
    num_workers: int = 0


class TinyModel(nnx.Module):
    def __init__(self, config: TinyConfig, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(6, config.width, rngs=rngs)
        self.down = nnx.Linear(config.width, 3, rngs=rngs)


def make_example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = (index / LENGTH + rng.normal(size=6)).astype(np.float32)
    return {"x": x, "y": np.tanh(x[:3] - x[3:])}


class TinyBatches:
    """A stream whose batches are also written to a file, as the loop reads them."""

    def __init__(self, config: TinyConfig, record: pathlib.Path):
        self.config, self.record = config, record
        self.before = lambda number: None
        self.stream = BatchStream(
            make_example,
            LENGTH,
            names=lambda index: f"clip {index}",
            batch_size=config.batch_size,
            seed=config.seed,
            num_workers=config.num_workers,
        )
        self.state, self.restore, self.close = (
            self.stream.state,
            self.stream.restore,
            self.stream.close,
        )

    def __next__(self) -> dict[str, np.ndarray]:
        number = self.state()["next_batch"]
        self.before(number)
        batch = next(self.stream)
        if number in self.config.poison:
            batch["x"][0, 0] = np.inf
        time.sleep(self.config.sleep)
        crc = zlib.crc32(batch["x"].tobytes())
        with self.record.open("a") as file:
            file.write(
                json.dumps({"batch": number, "ids": batch["ids"].tolist(), "crc": crc}) + "\n"
            )
        return batch


def loss_fn(model: TinyModel, batch, keys):
    hidden = jnp.tanh(model.up(batch["x"]))
    hidden = hidden + 0.1 * draw(jax.random.normal, keys, hidden.shape)
    loss = jnp.mean(jnp.square(model.down(hidden) - batch["y"]))
    return loss, {"largest": jnp.max(jnp.abs(hidden))}


def export(model: TinyModel, folder: pathlib.Path) -> None:
    np.savez(folder / "model.npz", up=model.up.kernel[...], down=model.down.kernel[...])


def make_stage(config: TinyConfig) -> Stage:
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return Stage(
        name="tiny",
        config=config,
        create=lambda rngs: TinyModel(config, rngs=rngs),
        load=dict,
        is_trained=lambda path, _: True,
        loss_fn=loss_fn,
        batch_shapes=lambda b: {"x": f32((b, 6)), "y": f32((b, 3))},
        export=export,
    )


def build(config: TinyConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains almost nothing."""
    steps = iter(range(1, 10**6))
    evaluate = lambda model: {"validation_loss": abs(next(steps) - 2.5)}  # noqa: E731
    return loop.Task(
        stage=make_stage(config),
        batches=TinyBatches(config, workdir / f"batches_{jax.process_index()}.jsonl"),
        evaluate=evaluate if config.evaluate else None,
        units={"tokens": 100.0 * config.batch_size},
    )


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A config file for the command line."""
    path = folder / "tiny_config.py"
    path.write_text("from tiny_training import TinyConfig\n\nget_config = TinyConfig\n")
    return path


def main(argv: list[str]) -> int:
    return loop.main("tiny_training", build, (TinyConfig,), argv)
