"""How long a training step takes: the language model beside Hugging Face's, the tokenizer by parts.

    python -m benchmarks.train_step language-model
    python -m benchmarks.train_step tokenizer

The first steps GPT-2 small (124 M parameters, 4 x 256 positions, float32, AdamW, cross-entropy over
the vocabulary) here and in PyTorch, from the same weights, on the same batches, in one process, in
turns, and compares the losses of all steps as well as the times. The second steps a tokenizer of
`configs/tokenizer_256.py`'s form at a smaller size and times its parts.

Both use the cores that the process may (`taskset -c 0` for one). Other work on these spoils the
times, though less the CPU times. A virtual machine may take long to give memory to a process, which
each step asks for anew; with

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

in front of the command (glibc) both keep theirs from step to step.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx

from configs import tokenizer_256
from dicode_jax.media.transforms import to_float
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.dicode import tokenizer_loss
from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.flops import count_flops
from dicode_jax.training.optim import make_optimizer
from dicode_jax.training.setup import Prepared, plan_stage
from dicode_jax.training.stage import Stage
from dicode_jax.training.state import create_state, make_train_step

LR, WEIGHT_DECAY = 1e-4, 0.01
BATCH = (4, 256)  # rows and positions
WARM_UP = 2  # rounds that compile, and in which the memory settles


# Language model


def cross_entropy(model, batch, key):
    """The loss of `GPT2LMHeadModel`: every position but a row's last predicts the next token."""
    ids = batch["ids"]
    b, t = ids.shape
    hidden, _ = model(model.embed_tokens(ids), deterministic=False)
    logits = model.logits(hidden.reshape(b * t, -1))  # [b, t, v] would be copied for its gradient
    labels = jnp.roll(ids, -1, axis=1).reshape(-1)
    counts = jnp.tile(jnp.arange(t) < t - 1, b)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(counts, losses, 0.0).sum() / counts.sum(), {}


def our_steps(state_dict) -> tuple[Callable, int]:
    """`step(ids) -> loss` with this project's train step, and its FLOPs."""
    from convert import from_torch

    model = from_torch("gpt2", state_dict, GPT2Config())
    graph, params, frozen = nnx.split(model, nnx.Param, ...)
    tx = optax.adamw(LR, weight_decay=WEIGHT_DECAY)
    train_step = make_train_step(graph, cross_entropy, tx, optax.constant_schedule(LR))
    compiled = jax.jit(train_step, donate_argnums=0)
    state = jax.jit(lambda p: create_state(p, tx, jax.random.key(0), use_ema=False))(params)

    def step(ids):
        nonlocal state
        state, metrics = compiled(state, frozen, {"ids": ids})
        return float(metrics["loss"])

    shapes = {"ids": jax.ShapeDtypeStruct(BATCH, jnp.int32)}
    return step, count_flops(compiled, state, frozen, shapes).model


def their_steps(model) -> Callable:
    """`step(ids) -> loss` as a PyTorch user would write it."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step(ids):
        ids = torch.from_numpy(ids).long()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def compare_language_models(rounds: int) -> None:
    try:
        import torch
        import transformers
    except ImportError:
        sys.exit(
            "error: the comparison needs PyTorch and transformers: "
            'pip install -e ".[convert,bench]"'
        )
    num_threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    options = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    theirs = transformers.GPT2LMHeadModel(options).train()
    weights = {name: value.detach().numpy().copy() for name, value in theirs.state_dict().items()}
    ours, flops = our_steps(weights)
    steps = {"dicode_jax": ours, "transformers": their_steps(theirs)}
    del weights

    rng = np.random.default_rng(0)
    walls, cpus, losses = ({name: [] for name in steps} for _ in range(3))
    for i in tqdm.trange(WARM_UP + rounds, desc="rounds"):
        ids = rng.integers(0, options.vocab_size, BATCH, dtype=np.int32)
        for name in (list(steps), list(steps)[::-1])[i % 2]:
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name].append(steps[name](ids))
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    np.testing.assert_allclose(*losses.values(), rtol=1e-4)  # the work is the same

    print(f"GPT-2 small, {BATCH[0]} x {BATCH[1]} positions, float32, AdamW, {num_threads} core(s)")
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    print(f"{versions}, transformers {transformers.__version__}; medians of {rounds} steps")
    for name in steps:
        wall, cpu = (statistics.median(x[name][WARM_UP:]) for x in (walls, cpus))
        rates = f"{BATCH[0] * BATCH[1] / wall:.0f} tokens/s, {flops / wall / 1e9:.0f} GFLOP/s"
        print(f"{name:<13} {wall:6.2f} s a step, {cpu:6.2f} s of CPU time, {rates}")
    for what, times in (("step", walls), ("CPU time", cpus)):
        ours, theirs = (statistics.median(times[name][WARM_UP:]) for name in steps)
        print(f"ratio of {what}: {theirs / ours:.2f} (above 1: ours is faster)")


# Tokenizer


def small_tokenizer_config() -> TokenizerTrainConfig:
    """`configs/tokenizer_256.py` with the same parts at about a tenth of the width."""
    config = tokenizer_256.get_config()
    vision = dataclasses.replace(
        config.tokenizer.vision, image_size=112, embed_dim=160, num_layers=8, num_heads=2
    )
    resampler = dataclasses.replace(
        config.tokenizer.resampler, dim=128, num_heads=2, embed_dim=160, output_dim=128
    )
    unet = dataclasses.replace(
        config.decoder.unet, model_channels=32, head_dim=32, context_dim=128, remat=False
    )
    autoencoder = dataclasses.replace(config.decoder.autoencoder, channels=32, resolution=128)
    return dataclasses.replace(
        config,
        tokenizer=dataclasses.replace(config.tokenizer, vision=vision, resampler=resampler),
        decoder=dataclasses.replace(config.decoder, unet=unet, autoencoder=autoencoder),
        frame_size=128,
        batch_size=1,
        dtype="float32",
    )


def time_tokenizer(rounds: int) -> None:
    config = small_tokenizer_config()
    stage = build_stage(config)
    prepared = with_random_parameters(stage)
    key = jax.random.key(0)
    batch = {
        name: jax.random.randint(key, x.shape, 0, 255).astype(x.dtype)
        for name, x in stage.batch_shapes(config.batch_size).items()
    }
    parts = tokenizer_parts(config, prepared, batch, key)
    times = {
        name: statistics.median(time_of(call, rounds))
        for name, (call, _) in tqdm.tqdm(parts.items(), desc="parts")
    }
    flops = {name: count for name, (_, count) in parts.items()}
    for name, seconds in times.items():
        print(f"{name:<16} {1000 * seconds:8.0f} ms")
    print("now the whole step, which compiles for minutes on a CPU", flush=True)

    state = prepared.state
    plan = prepared.plan
    whole = count_flops(plan.step, plan.state, plan.frozen, batch).model

    def step():
        nonlocal state
        state, metrics = prepared.train_step(state, batch)
        return metrics

    total = statistics.median(time_of(step, rounds))
    name = "backward, rest"
    times[name] = total - sum(times.values())
    flops[name] = whole - sum(flops.values())

    size = sum(x.size for x in jax.tree.leaves((plan.state.params, plan.frozen)))
    b, f, h, w, _ = batch["video"].shape
    cores = len(os.sched_getaffinity(0))
    print(f"tokenizer_256 scaled down to {size / 1e6:.1f} M parameters, float32, {cores} core(s)")
    print(f"{b} clip(s) of {f} frames of {h} x {w}; medians of {rounds}; the last part is the rest")
    for name, seconds in times.items():
        rate = f"{flops[name] / seconds / 1e9:6.1f} GFLOP/s" if flops[name] else ""
        print(f"{name:<16} {1000 * seconds:8.0f} ms {seconds / total:6.1%}  {rate}")
    print(f"{'whole step':<16} {1000 * total:8.0f} ms {1:6.1%}  {whole / total / 1e9:6.1f} GFLOP/s")


def with_random_parameters(stage: Stage) -> Prepared:
    """As `setup.prepare`, whose program that draws parameters compiles for minutes on a CPU."""
    rng = np.random.default_rng(0)
    plan = plan_stage(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))

    def draw(leaf):
        values = rng.normal(0.0, 0.02, leaf.shape) + (leaf.ndim == 1)
        return jnp.asarray(values, leaf.dtype)

    params, frozen = jax.tree.map(draw, (plan.state.params, plan.frozen))
    return Prepared(plan=plan, state=jax.jit(plan.create)(params), frozen=frozen)


def tokenizer_parts(config, prepared, batch, key) -> dict[str, tuple[Callable, int]]:
    """Name -> (a call that does this part of the step alone, its FLOPs)."""
    graph, state = nnx.split(prepared.model_of(prepared.state))
    calls = {}

    def part(name: str, run: Callable, *args):
        """Runs once, for what the next part takes."""
        jitted = jax.jit(lambda state, *args: run(nnx.merge(graph, state), *args))
        calls[name] = lambda: jitted(state, *args), count_flops(jitted, state, *args).model
        return jitted(state, *args)

    video = jax.jit(to_float)(batch["video"])
    keyframes = tokenizer_loss.select_keyframes(video)[0]
    features = part("CLIP", lambda m, x: m.tokenizer.encode_images(x), keyframes)
    tokens = part("resampler", lambda m, x: m.tokenizer.resampler(x), features)[None]
    latents = part(
        "VAE encode",
        lambda m, x: m.decoder.autoencoder.encode_latents(x, per_frame=True),
        video,
    )
    draws = tokenizer_loss.sample_draws(
        key, latents.shape, config.loss, num_timesteps=config.decoder.schedule.num_timesteps
    )

    def denoise(model, latents, tokens, fs):
        options = {"fs": fs, "rngs": nnx.Rngs(dropout=key)}
        args = (model.decoder, latents, tokens, draws, config.loss)
        return tokenizer_loss.denoising_loss(*args, **options)[0]

    part("UNet forward", denoise, latents, tokens, batch["fs"])

    params = prepared.state.params
    tx = make_optimizer(config.optim, config.num_steps)

    @jax.jit
    def optimise(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    calls["optimiser"] = lambda: optimise(params, prepared.state.opt_state, params), 0
    return calls


def time_of(call: Callable, rounds: int) -> list[float]:
    """Seconds of each call after a first one, which compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("language-model", "tokenizer"))
    parser.add_argument("--rounds", type=int, default=5, help="measured steps (default: 5)")
    args = parser.parse_args()
    if args.what == "language-model":
        compare_language_models(args.rounds)
    else:
        time_tokenizer(args.rounds)


if __name__ == "__main__":
    main()
