"""Runners of the noise schedules, DDIM tables and trajectories, and the diffusion losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
from dicode_jax.diffusion import guidance, losses, parameterization
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.samplers.base import sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_time_grid, ddim_timesteps
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.models.latent_video import sample_latents
from dicode_jax.nn.embeddings import timestep_embedding
from parity.harness import Check, LeftOut, runner

TABLE = {"rtol": 2e-6}
OUTPUT = {"atol": 5e-5, "rtol": 1e-4}


def schedule_from(model: dict) -> NoiseSchedule:
    """A schedule from the original's model options."""
    dynamic = model.get("use_dynamic_rescale", False)
    return NoiseSchedule(
        num_timesteps=model.get("timesteps", 1000),
        linear_start=model.get("linear_start", 0.00085),
        linear_end=model.get("linear_end", 0.012),
        zero_terminal_snr=model.get("rescale_betas_zero_snr", False),
        parameterization=model.get("parameterization", "eps"),
        base_scale=model.get("base_scale", 0.7) if dynamic else None,
        turning_step=model.get("turning_step", 400),
    )


def spacing_from(name: str) -> str:
    """DynamiCrafter's "uniform" is the integer stride."""
    return "uniform_upstream" if name == "uniform" else name


def last(video):
    """Channels from axis -4 (torch video) to the end; step or branch axes in front are kept."""
    return np.moveaxis(np.asarray(video), -4, -1)


def torch_order(video):
    """The inverse of `last`."""
    return np.moveaxis(np.asarray(video), -1, -4)


@runner("dynamicrafter/noise_schedule")
def run_schedules(fixture):
    config = fixture.config
    base = {
        "num_timesteps": config["timesteps"],
        "linear_start": config["linear_start"],
        "linear_end": config["linear_end"],
    }
    for name, want in fixture.arrays.items():
        group, *rest = name.split("/")
        if group == "f64":
            schedule = NoiseSchedule(zero_terminal_snr=rest[0] == "zsnr1", **base)
            got = {"betas": schedule.betas64, "alphas_cumprod": schedule.alphas_cumprod64}[rest[1]]
            yield Check(name, got, want, atol=1e-12)
        elif group == "buf":
            kind, snr = rest[0].rsplit("_", 1)
            schedule = NoiseSchedule(
                parameterization=kind, zero_terminal_snr=snr == "zsnr1", **base
            )
            rtol = 1e-5 if rest[1] == "lvlb_weights" else 1e-6
            yield Check(name, schedule.table(rest[1]), want, rtol=rtol)
        elif group == "scale_arr":
            turning_step = len(want) - config["timesteps"]
            schedule = NoiseSchedule(base_scale=float(rest[0]), turning_step=turning_step, **base)
            yield Check(name, schedule.scale_array, want, rtol=1e-6)
    yield from run_small_functions(fixture.arrays)


def run_small_functions(arrays):
    for name, want in arrays.items():
        group, *rest = name.split("/")
        if group == "temb" and rest[1] == "out":
            t, dim = arrays[f"temb/{rest[0]}/t"], int(rest[0])
            got = timestep_embedding(jnp.asarray(t), dim)
            # One unit in the last place of a frequency moves an angle of 999 by 6e-5, so the bound
            # is relative to the angle where that is above 1.
            angle = t[:, None] * 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
            angle = np.maximum(np.concatenate([angle, angle], axis=1), 1.0)
            yield Check(name, got / angle, want / angle, atol=1e-6)
        elif group == "rescale_cfg" and rest[0].startswith("out_"):
            got = guidance.rescale_guidance(
                jnp.asarray(last(arrays["rescale_cfg/noise_cfg"])),
                jnp.asarray(last(arrays["rescale_cfg/noise_pred_text"])),
                float(rest[0].removeprefix("out_")),
            )
            yield Check(name, torch_order(got), want, rel_max=1e-6)
        elif group == "diag_gaussian" and rest[0] not in ("moments", "noise"):
            image = lambda key: np.moveaxis(arrays[f"diag_gaussian/{key}"], 1, -1)  # noqa: E731
            posterior = DiagonalGaussian.from_moments(jnp.asarray(image("moments")))
            got = {
                "mean": posterior.mean,
                "logvar": posterior.logvar,
                "std": jnp.exp(0.5 * posterior.logvar),
                "sample": posterior.sample(noise=jnp.asarray(image("noise"))),
                "kl": posterior.kl(),
            }[rest[0]]
            got = got if want.ndim == 1 else np.moveaxis(np.asarray(got), -1, 1)
            yield Check(name, got, want, rtol=1e-6, atol=1e-6)


@runner("dynamicrafter/ddim_tables")
def run_tables(fixture):
    for name, want in fixture.arrays.items():
        grid_name, group, *rest = name.split("/")
        spacing, steps = grid_name.rsplit("_S", 1)
        timesteps = ddim_timesteps(spacing_from(spacing), int(steps))
        grid = ddim_time_grid(spacing_from(spacing), int(steps))
        if group == "timesteps":
            yield Check(name, timesteps, want, exact=True)
        elif group.startswith("scale_"):
            schedule = NoiseSchedule(base_scale=float(group.removeprefix("scale_")))
            tables = DDIM(schedule=schedule).tables(grid)
            got = {"arr": tables.scale, "prev": tables.scale_prev}[rest[0]]
            yield Check(name, got[::-1], want, **TABLE)
        else:
            snr, eta = group.split("_eta")
            schedule = NoiseSchedule(zero_terminal_snr=snr == "zsnr1")
            tables = DDIM(schedule=schedule, eta=float(eta)).tables(grid)
            yield Check(name, getattr(tables, rest[0])[::-1], want, **TABLE)


def load_unet(fixture):
    """The UNet a fixture's weights and (own or the weight file's) configuration describe."""
    config = fixture.config
    unet_config = config.get("unet_config") or config.get("config")
    if unet_config is None:
        source = fixture.sibling_fixture(config["weights_from"]).config
        unet_config = source.get("config") or source["unet_config"]
    return convert.from_torch("unet3d", fixture.state_dict(), unet_config)


def compiled(model):
    """`(x, t, context, concat, fs) -> prediction` of a UNet, compiled once per shape."""
    graph, state = nnx.split(model)

    @jax.jit
    def call(state, x, t, context, concat, fs):
        if concat is not None:
            frames = jnp.broadcast_to(concat, (*x.shape[:-1], concat.shape[-1]))
            x = jnp.concatenate([x, frames], axis=-1)
        return nnx.merge(graph, state)(x, t, context, fs)

    return functools.partial(call, state)


def branches_of(call, arrays, case):
    """One network per stored context: cond and uncond."""
    inputs = f"in/{case}/"
    concat = arrays.get(inputs + "concat")
    concat = None if concat is None else jnp.asarray(last(concat))
    fs = jnp.asarray(arrays[inputs + "fs"]) if inputs + "fs" in arrays else None
    names = ("context", "uncond_context")
    contexts = [jnp.asarray(arrays[inputs + n]) for n in names if inputs + n in arrays]
    return [lambda x, t, context=context: call(x, t, context, concat, fs) for context in contexts]


def guided(branches, case):
    """The guided model of a trajectory case."""
    scale = case["cfg"]
    if scale == 1.0:
        return lambda x, t, _: branches[0](x, t)

    def denoise(x, t, _):
        outputs = [branch(x, t) for branch in branches]
        result = guidance.guide(*outputs, scale)
        if case["guidance_rescale"] > 0:
            result = guidance.rescale_guidance(result, outputs[0], case["guidance_rescale"])
        return result

    return denoise


def run_trajectory(arrays, name, model, case, sampler, bound):
    inputs, outputs = f"in/{name}/", f"out/{name}/"
    branches = branches_of(model, arrays, name)
    x = jnp.asarray(last(arrays[inputs + "x_T"]))
    grid = ddim_time_grid(spacing_from(case["spacing"]), case["steps"])
    noise = jnp.asarray(last(arrays[inputs + "noise"])[: len(grid) - 1])
    _, steps = sample(guided(branches, case), sampler, x, grid, noise=noise, return_trajectory=True)
    for key in [k for k in arrays if k.startswith(outputs)]:
        what, want = key.removeprefix(outputs), arrays[key]
        if what == "timesteps_visited":
            yield Check(key, grid[:-1], want, exact=True)
            continue
        if what == "first_step_model_outputs":
            t = jnp.full((x.shape[0],), grid[0], jnp.int32)
            got = np.stack([branch(x, t) for branch in branches[: len(want)]])
        else:
            got = {
                "x_steps": np.concatenate([x[None], steps.x]),
                "pred_x0_steps": steps.x0,
            }[what]
        yield Check(key, torch_order(got), want, **bound)


@runner("dynamicrafter/ddim_trajectory")
def run_trajectories(fixture):
    unet = load_unet(fixture)
    model = compiled(unet)
    for name, case in fixture.config["cases"].items():
        if case.get("multi"):
            yield LeftOut(name, "multiple_cond_cfg")
            continue
        # The 4-channel trajectories reach larger values; the reference itself is 1.4e-4 off there.
        bound = {"atol": 2e-3 if case.get("in_channels_4") else 1e-3, "rtol": 1e-4}
        sampler = DDIM(schedule=schedule_from(case["model"]), eta=case["eta"])
        yield from run_trajectory(fixture.arrays, name, model, case, sampler, bound)
        if case["eta"] and case["guidance_rescale"]:  # each compiles anew
            schedule = schedule_from(case["model"])
            yield sampled(fixture.arrays, name, unet, case, schedule, bound)


@runner("dynamicrafter/divot_ddim")
def run_divot(fixture):
    schedule = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
    for name, want in fixture.arrays.items():
        if name.startswith(("in/", "out/")):
            continue
        run, what = name.split("/")
        grid_name, eta = run.split("_eta")
        spacing, steps = grid_name.rsplit("_S", 1)
        sampler = DDIM(schedule=schedule, eta=float(eta), table_dtype="float16")
        if what == "timesteps":
            got = ddim_timesteps(spacing_from(spacing), int(steps))
        else:
            got = getattr(sampler.tables(ddim_time_grid(spacing_from(spacing), int(steps))), what)[
                ::-1
            ]
        if want.dtype == np.float64:
            yield Check(name, got, want, rtol=2e-6)
        else:
            yield Check(name, got, want, exact=True)
    case = fixture.config["traj"]
    sampler = DDIM(schedule=schedule, eta=case["eta"], table_dtype="float16")
    unet = load_unet(fixture)
    yield from run_trajectory(fixture.arrays, "traj", compiled(unet), case, sampler, {"atol": 1e-3})
    yield sampled(fixture.arrays, "traj", unet, case, schedule, {"atol": 1e-3}, "float16")


def sampled(arrays, name, unet, case, schedule, bound, table_dtype="float32"):
    """The last state of a trajectory by the function that the pipelines call."""
    inputs = f"in/{name}/"
    x, noise = (jnp.asarray(last(arrays[inputs + key])) for key in ("x_T", "noise"))
    context = jnp.asarray(arrays[inputs + "context"])
    null_context = jnp.asarray(arrays.get(inputs + "uncond_context", context))
    concat = arrays.get(inputs + "concat")
    if concat is not None:
        concat = last(concat)
        concat = jnp.broadcast_to(concat, (*x.shape[:-1], concat.shape[-1]))
    spacing = spacing_from(case["spacing"])
    cfg = SamplingConfig(
        num_frames=x.shape[1],
        num_inference_steps=case["steps"],
        guidance_scale=case["cfg"],
        guidance_rescale=case["guidance_rescale"],
        eta=case["eta"],
        spacing=spacing,
        fs=int(arrays[inputs + "fs"][0]),
        table_dtype=table_dtype,
    )
    steps = len(ddim_time_grid(spacing, case["steps"])) - 1
    graph, state = nnx.split(unet)

    @jax.jit
    def run(state, x, noise):
        model, shape = nnx.merge(graph, state), x.shape[2:]
        return sample_latents(
            model, schedule, context, null_context, concat, None, shape, cfg, x_init=x, noise=noise
        )

    want = arrays[f"out/{name}/x_steps"][-1]
    got = run(state, x, noise[:steps])
    return Check(f"{name}/sample_latents", torch_order(got), want, **bound)


@runner("dynamicrafter/losses")
def run_losses(fixture):
    arrays, model = fixture.arrays, compiled(load_unet(fixture))
    for name, case in fixture.config["cases"].items():
        options = case["model"]
        schedule = schedule_from(options)
        inputs, outputs = f"in/{name}/", f"out/{name}/"
        denoise = branches_of(model, arrays, name)[0]
        z, noise = (jnp.asarray(last(arrays[inputs + key])) for key in ("z", "noise"))
        t = jnp.asarray(arrays[inputs + "t"])
        loss, metrics = losses.diffusion_loss(
            denoise,
            schedule,
            z,
            t,
            noise,
            loss_type=options.get("loss_type", "l2"),
            simple_weight=options.get("l_simple_weight", 1.0),
            elbo_weight=options.get("original_elbo_weight", 0.0),
        )
        x_t, output = metrics["x_t"], metrics["prediction"]
        table = functools.partial(schedule.gather, timesteps=t, ndim=x_t.ndim)
        got = {
            "x_start": metrics["x0"],
            "q_sample": x_t,
            "v": parameterization.velocity(schedule, metrics["x0"], noise, t),
            "model_output": output,
            "x0_from_eps": table("sqrt_recip_alphas_cumprod") * x_t
            - table("sqrt_recipm1_alphas_cumprod") * output,
        }
        levels = table("sqrt_alphas_cumprod"), table("sqrt_one_minus_alphas_cumprod")
        got["x0_from_v"], got["eps_from_v"] = parameterization.x0_and_eps("v", x_t, output, *levels)
        for key in [k for k in arrays if k.startswith(outputs)]:
            what, want = key.removeprefix(outputs), arrays[key]
            if what == "loss":
                yield Check(key, np.reshape(loss, want.shape), want, **OUTPUT)
            elif what == "loss_per_sample":
                yield Check(key, metrics["loss_per_sample"], want, **OUTPUT)
            else:
                yield Check(key, torch_order(got[what]), want, **OUTPUT)
        yield Check(f"{name}/loss", loss, case["loss"], **OUTPUT)
        mean = metrics["loss_per_sample"].mean()
        yield Check(f"{name}/mean_of_per_sample", mean, case["mean_of_per_sample"], **OUTPUT)
        for key, want in case["loss_dict"].items():
            yield Check(f"{name}/{key}", metrics[key.split("/")[-1]], want, **OUTPUT)
