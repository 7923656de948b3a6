"""Trains the classifier whose features FD-shapes is of, on drawn clips of the shapes world.

    python scripts/train_shapes_features.py --out runs/features

Clips are drawn once and seen several times, each time with other noise, so that the features tell
grain from none. What is printed at the end is the share of words read right off new clips.
"""

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.models.shapes_classifier import ShapesClassifier, ShapesClassifierConfig
from dicode_jax.storage import weights

FIELDS = ("size", "color", "shape", "motion", "background")
WORDS = (
    shapes_world.SIZES,
    tuple(shapes_world.COLORS),
    shapes_world.SHAPES,
    shapes_world.MOTIONS,
    tuple(shapes_world.BACKGROUNDS),
)
TRAINED, TRIED = 11_000, 12_000  # rows of scenes
NOISE = 8.0  # most, of 255


def drawn(row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips uint8 [b, f, h, w, 3] and the numbers of their words, int32 [b, 5]."""
    scenes = [shapes_world.scene_at(row, i, "all") for i in range(count)]
    cfg = ShapesClassifierConfig()
    clips = np.stack(
        [
            shapes_world.render(scene)[0][:: shapes_world.NUM_FRAMES // cfg.num_frames]
            for scene in scenes
        ]
    )
    labels = [
        [words.index(getattr(scene.attributes, field)) for field, words in zip(FIELDS, WORDS)]
        for scene in scenes
    ]
    return clips, np.asarray(labels, np.int32)


def shown(clips: jax.Array) -> jax.Array:
    """Pixels in [-1, 1]."""
    return clips.astype(jnp.float32) / 127.5 - 1


def loss_fn(model: ShapesClassifier, clips, labels, key) -> jax.Array:
    """Mean cross-entropy of the five kinds of words, of clips with a grain."""
    strength, grain = jax.random.split(key)
    level = jax.random.uniform(strength, (len(clips), 1, 1, 1, 1), maxval=NOISE / 127.5)
    # One grain for the batch, of another strength for each clip: drawing it takes most of a step.
    noisy = shown(clips) + level * jax.random.normal(grain, clips.shape[1:])
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits, labels[:, i]).mean()
        for i, logits in enumerate(model(noisy))
    ]
    return sum(losses) / len(losses)


def train(clips, labels, *, num_steps: int, batch_size: int, say) -> ShapesClassifier:
    """The classifier after so many steps of AdamW."""
    model = ShapesClassifier(ShapesClassifierConfig(), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    warmup = min(50, num_steps // 4)
    lr = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup, num_steps)
    tx = optax.adamw(lr, 0.9, 0.99)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, opt_state, clips, labels, key):
        loss, grads = jax.value_and_grad(
            lambda s: loss_fn(nnx.merge(graph, s), clips, labels, key)
        )(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss

    opt_state, rng = tx.init(state), np.random.default_rng(0)
    for i in range(num_steps):
        rows = rng.integers(0, len(clips), batch_size)
        key = jax.random.fold_in(jax.random.key(0), i)
        state, opt_state, loss = step(state, opt_state, clips[rows], labels[rows], key)
        if i % 20 == 19:
            say(i + 1, float(loss))
    return nnx.merge(graph, state)


def looked_at(model: ShapesClassifier, clips) -> tuple[np.ndarray, list[np.ndarray]]:
    """Features [b, d] of clips, and of each kind of word the one that is read [b]."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        model = nnx.merge(graph, state)
        return model.features(shown(x)), [logits.argmax(-1) for logits in model(shown(x))]

    parts = [run(state, clips[i : i + 50]) for i in range(0, len(clips), 50)]
    words = [np.concatenate(read) for read in zip(*(read for _, read in parts))]
    return np.concatenate([features for features, _ in parts]), words


def spread(features: np.ndarray) -> float:
    """How far features are from their means, root mean square, to three digits."""
    return float(f"{np.sqrt(features.var(axis=0).mean()):.3g}") or 1.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder for the weights")
    parser.add_argument("--num-clips", type=int, default=3000, help="drawn for training")
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    if min(args.num_clips, args.num_steps, args.batch_size) < 1:
        raise UserError("all numbers must be at least 1")
    start = time.monotonic()

    def say(step: int, loss: float) -> None:
        print(f"step {step}: loss {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True)

    clips, labels = drawn(TRAINED, args.num_clips)
    size = {"num_steps": args.num_steps, "batch_size": args.batch_size}
    model = train(clips, labels, **size, say=say)
    tried, labels = drawn(TRIED, min(500, args.num_clips))
    features, read = looked_at(model, tried)
    cfg = dataclasses.replace(model.cfg, spread=spread(features))
    weights.save_module(args.out, model, cfg, dtype=jnp.float16)
    for name, words, label in zip(FIELDS, read, labels.T):
        print(f"{name:<12} {np.mean(words == label):.3f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
