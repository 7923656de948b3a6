"""Runner of the tokenizer's training step: losses, conditions, gradients, every switch.

Bounds are those of the README beside the fixtures: largest difference over largest value.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.engine.plan import flatten, plan
from convert.parts import deep_tokens
from dicode_jax.diffusion.losses import add_offset_noise
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS
from dicode_jax.errors import OptionGone
from dicode_jax.stages.dicode import tokenizer_loss as training
from parity.harness import Check, LeftOut, runner
from parity.runners.dicode import (
    LOSS,
    TOKENS,
    UNET,
    last,
    load,
    require_all,
    system_source,
    torch_order,
    with_compiled_network,
    with_option,
)

GRADIENT = {"rel_max": 1e-4}

TRAIN_NOTES = {"draws_equal_to", "draw_shapes", "loss", "grad_norm_by_module"}
TRAIN_NOTES |= {"n_params_with_grad", "global_step"}
SCHEDULE_OPTIONS = {"rescale_betas_zero_snr", "parameterization", "linear_start", "linear_end"}
VIDEO_ARRAYS = {
    "x_noisy": "x_t",
    "z": "latents",
    "target_v": "target",
    "model_output": "prediction",
}


@runner("dicode/tokenizer_train")
def run_tokenizer_train(fixture):
    arrays = fixture.arrays
    done = {"t", "uniform_drop", "video_u8", "frame_stride", "caption_ids"}
    options, source = system_source(fixture)
    # Weights of the optional parts, for the cases that have them.
    optional = None
    if (fixture.path.parent / "options").is_dir():
        optional = fixture.sibling_fixture("../options")
    for name, case in fixture.config["cases"].items():
        case_options, case_source = options, source
        if optional is not None and name in optional.config["cases"]:
            case_options, case_source = with_option(optional, name, options, source)
        overrides = {k: v for k, v in case.items() if k not in TRAIN_NOTES}
        if SCHEDULE_OPTIONS & set(overrides):
            # The case kept its own schedule: the checkpoint's buffers belong to the system's.
            case_source = {k: v for k, v in case_source.items() if k not in PERSISTENT_BUFFERS}
        try:
            loaded = load(case_options | overrides, case_source)
        except OptionGone as gone:
            done |= {key for key in arrays if key.startswith(f"{name}/")}
            yield LeftOut(name, gone.option)
            continue
        yield from train_case(loaded, fixture, name, case, arrays, done)
    require_all(arrays, done)


def train_case(loaded, fixture, name, case, arrays, done):
    tokenizer, decoder = loaded.system.tokenizer, loaded.system.decoder
    equal = dict(case["draws_equal_to"])

    def read(key):
        """An array of this case, or of the one it is said to equal."""
        return arrays[equal.get(key, f"{name}/{key}")]

    def draw(index):
        return arrays[equal.get(index, f"{name}/draw_{index}")]

    video = jnp.asarray(np.moveaxis(arrays["video_u8"].astype(np.float32), 1, -1) / 255 * 2 - 1)
    cfg = dataclasses.replace(loaded.cfg.loss, uncond_prob=fixture.config["uncond_prob"])
    text = loaded.text_context(arrays["caption_ids"])
    draws = injected_draws(draw, len(case["draw_shapes"]), video.shape, cfg, arrays)
    done |= {f"{name}/draw_{i}" for i in range(len(case["draw_shapes"]))}

    def loss(tokenizer, decoder):
        return training.tokenizer_loss(
            tokenizer,
            decoder,
            video,
            draws,
            cfg,
            fs=jnp.asarray(arrays["frame_stride"], jnp.int32),
            text_context=text,
            per_frame=False,
            deterministic=True,
        )

    if "grad_norm_by_module" in case:
        graphs, states = zip(*[nnx.split(m) for m in (tokenizer, decoder)], strict=True)
        merged = lambda states: loss(*map(nnx.merge, graphs, states))  # noqa: E731
        (value, metrics), grads = jax.jit(jax.value_and_grad(merged, has_aux=True))(states)
        yield from gradients(loaded, grads, name, case, arrays, done)
    else:
        value, metrics = loss(tokenizer, with_compiled_network(decoder))

    yield Check(f"{name}/loss (config)", value, np.float32(case["loss"]), **LOSS)
    condition = decoder.condition(metrics["tokens"], video.shape[1])
    words = loaded.cfg.text.max_seq_len
    if cfg.no_text:
        seen_text = jnp.broadcast_to(decoder.text_context[...], text.shape)
    else:
        seen_text = training.training_text(decoder, text, draws.uniform_drop, cfg)
    derived = {"context": condition.context[:, words:], "text_context": seen_text}
    if condition.concat is not None:
        derived["c_concat"] = torch_order(condition.concat)
    own = {k.removeprefix(f"{name}/") for k in arrays if k.startswith(f"{name}/")}
    own |= {key for key in equal if isinstance(key, str)}
    for key in sorted(own):
        done.add(f"{name}/{key}")
        if key.startswith(("draw_", "grad/")):
            continue
        if key in VIDEO_ARRAYS:
            bound = UNET if key == "model_output" else TOKENS
            yield Check(
                f"{name}/{key}", torch_order(metrics[VIDEO_ARRAYS[key]]), read(key), **bound
            )
        elif key in derived:
            yield Check(f"{name}/{key}", derived[key], read(key), **TOKENS)
        elif key == "loss_vae_kl":
            yield Check(f"{name}/{key}", np.zeros_like(read(key)), read(key), exact=True)
        elif key == "kl_loss_weight":
            yield LeftOut(f"{name}/{key}", "vae_kl_loss_weight, of a term of 0")
        else:
            yield Check(f"{name}/{key}", metrics[key], read(key), **LOSS)


def injected_draws(draw, count, video_shape, cfg, arrays):
    """The original's draws of a case in its order of drawing."""
    b, f = video_shape[:2]
    posterior = np.moveaxis(draw(0), 1, -1)
    index, offset = 1, None
    if cfg.offset_noise > 0:
        offset, index = last(draw(index)), index + 1
    assert index == count - 1, f"{count} draws, the last should be {index}"
    noise = last(draw(index))
    if offset is not None:
        noise = add_offset_noise(noise, offset, cfg.offset_noise)
    return training.Draws(
        timesteps=jnp.asarray(arrays["t"], jnp.int32),
        noise=noise,
        uniform_drop=jnp.asarray(arrays["uniform_drop"]),
        posterior_noise=jnp.asarray(posterior.reshape(b, f, *posterior.shape[1:])),
    )


def gradients(loaded, grads, name, case, arrays, done):
    """Stored gradients, norms by module, and the number of trained parameters."""
    flat = {path: np.asarray(leaf[...]) for part in grads for path, leaf in flatten(part).items()}
    shapes = {path: value.shape for path, value in flat.items()}
    rules = (*deep_tokens.TOKENIZER_RULES, *deep_tokens.decoder_rules(loaded.source))
    prefix = f"{name}/grad/"
    wanted = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    converted = plan(wanted, rules, shapes)
    assert len(converted.sources) == len(wanted), converted.problems
    for path, key in converted.sources.items():
        done.add(prefix + key)
        yield Check(prefix + key, flat[path], converted.array(path), **GRADIENT)
    # The fixtures take gradients of the resampler whether the config trains it or not.
    trains = dataclasses.replace(loaded.cfg.trainable, resampler=True)
    sources = plan(loaded.source, rules, shapes).sources
    sources = {path: key for path, key in sources.items() if trains(path.split("."))}
    for module, want in case["grad_norm_by_module"].items():
        squares = [
            np.square(flat[path].astype(np.float64)).sum()
            for path, key in sources.items()
            if key.startswith(f"{module}.")
        ]
        yield Check(f"{name}/grad_norm/{module}", np.sqrt(sum(squares)), want, **GRADIENT)
    if "n_params_with_grad" in case:
        count = np.asarray(len(set(sources.values())))
        yield Check(f"{name}/n_params", count, np.asarray(case["n_params_with_grad"]), exact=True)
