"""LanDiff's diffusion side: denoiser with control, sampler and loss, causal autoencoder.

Bounds are those of the README beside the fixtures. Arrays of the original have channels behind the
frames.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import from_torch
from convert.engine.plan import plan
from convert.landiff.vae import DECODER_RULES
from dicode_jax.diffusion import losses
from dicode_jax.diffusion.samplers.subsampled import SubsampledDPM, subsampled_time_grid
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig, Decoder3D
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig, DiTConfig, position_table
from dicode_jax.models.landiff.sampling import WindowSampling, guidance_ramp, sample_window
from dicode_jax.models.landiff.semantic import UpsamplerConfig
from dicode_jax.nn.embeddings import timestep_embedding
from dicode_jax.nn.rngs import blank
from parity.harness import Check, runner
from parity.runners.vision import require_all

NETWORK = {"atol": 5e-5}
SCHEDULE = {"atol": 1e-6}
GUIDANCE = {"rtol": 1e-9}
TRAJECTORY = {"atol": 2e-4}
LOSS = {"atol": 1e-5}


def denoiser_config(config) -> DenoiserConfig:
    """Sizes of a fixture."""
    up = config["up"]
    return DenoiserConfig(
        dit=DiTConfig(
            num_frames=(config["num_frames"] - 1) // 4 + 1,
            height=config["latent_height"],
            width=config["latent_width"],
            channels=config["channels"],
            embed_dim=config["hidden"],
            num_layers=config["num_layers"],
            num_heads=config["heads"],
            time_dim=config["time_embed_dim"],
            text_len=config["text_length"],
            text_dim=config["text_dim"],
            interpolation=config["interp"],
        ),
        control_layers=config["control_layers"],
        upsampler=UpsamplerConfig(
            feature_dim=up["z_channels"],
            channels=tuple(int(mult * up["ch"]) for mult in up["ch_mult"]),
            num_res_blocks=up["num_res_blocks"] + 1,
            hidden_dim=up["out_ch"],
        ),
    )


def load_denoiser(fixture):
    return from_torch("landiff_denoiser", fixture.npz("weights"), denoiser_config(fixture.config))


def compiled(module, function=None):
    """`function(module, ...)`, or the module's own call, as one program."""
    graph, state = nnx.split(module)

    def run(state, *args):
        module = nnx.merge(graph, state)
        return module(*args) if function is None else function(module, *args)

    return functools.partial(jax.jit(run), state)


def ours(x):
    """`[... f, c, h, w]` to `[..., f, h, w, c]`."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


def original(x):
    return np.moveaxis(np.asarray(x), -1, -3)


class Checks:
    """Makes the checks of a fixture, and knows which arrays had none."""

    def __init__(self, want):
        self.want, self.done = want, set()

    def __call__(self, name, got, **bound):
        self.done.add(name)
        return Check(name, np.asarray(got), self.want[name], **bound)

    def finish(self):
        require_all(self.want, self.done)


@runner("landiff/dit")
def run_dit(fixture):
    inputs, check = fixture.npz("inputs"), Checks(fixture.npz("outputs"))
    model = load_denoiser(fixture)
    t, context = jnp.asarray(inputs["t"]), jnp.asarray(inputs["context"])
    x, features = ours(inputs["x"]), ours(inputs["semantic_features"])
    yield check("pos_table_as_built", position_table(model.cfg.dit)[None], **NETWORK)
    got = compiled(model, layer_by_layer)(x, t, context, features)
    upsampled, semantic = got.pop("upsampled"), got["semantic_latent"]
    yield check("upsampled", original(upsampled[0]), **NETWORK)
    for name, array in got.items():
        is_video = array.ndim == 5
        yield check(name, original(array) if is_video else array, **NETWORK)
    whole = compiled(model)(x, t, context, semantic)
    yield Check("out, in one call", original(whole), check.want["out"], **NETWORK)
    check.finish()


def layer_by_layer(model, x, t, context, features):
    """What the parts give, called as the network calls them."""
    semantic = model.semantic_latents(features)
    h, times = model.dit.embed(x, t, context)
    c, control_times = model.control.embed(x + semantic, t, context)
    controls, layers = [], []
    for main, control in zip(model.dit.lower_blocks, model.control.blocks, strict=True):
        c = control(c, control_times)
        h = main(h, times) + c
        controls.append(c)
        layers.append(h)
    for main in model.dit.upper_blocks:
        layers.append(h := main(h, times))
    return {
        "t_sinusoid": timestep_embedding(t, model.cfg.dit.embed_dim),
        "main_time_emb": times,
        "upsampled": model.semantic.upsampled(features),
        "semantic_latent": semantic,
        "control_outputs": jnp.stack(controls),
        "main_layer_outputs": jnp.stack(layers),
        "out": model.dit.head(h, times),
    }


@runner("landiff/sampler")
def run_sampler(fixture):
    config, inputs = fixture.config, fixture.npz("inputs")
    check = Checks(fixture.npz("outputs"))
    model = load_denoiser(fixture.sibling_fixture("../dit"))
    schedule = dataclasses.replace(model.cfg.schedule, snr_shift=config["shift_scale"])
    model.cfg = dataclasses.replace(model.cfg, schedule=schedule)
    sampler, count = SubsampledDPM(schedule=schedule), config["guider_num_steps"]
    grid = subsampled_time_grid(count)
    signals, (_, c) = sampler.signals(grid), sampler.coefficients(grid)
    alphas = np.sqrt(schedule.alphas_cumprod64)
    yield check("alphas_sqrt_grid_1000", alphas, **SCHEDULE)
    yield check(f"alphas_sqrt_{count}", signals, **SCHEDULE)
    yield check(f"timesteps_{count}", grid[:-1], exact=True)
    nearest = sampler.nearest(signals[:-1])
    yield check(f"snapped_idx_{count}", nearest, exact=True)
    yield check(f"snapped_{count}", alphas[nearest], **SCHEDULE)
    factors = np.stack([c.x, -c.x0, 1 + c.history, c.history, c.noise], axis=1)[:-1]
    name = f"multipliers_{count}"
    yield dataclasses.replace(
        check(name, factors * (scale := per_log(signals)), **SCHEDULE),
        want=check.want[name] * scale,
    )

    options = {
        "num_inference_steps": config["sampler_num_steps"],
        "guidance_scale": config["guider_scale"],
        "ramp_steps": count,
        "ramp_exponent": config["guider_exp"],
    }
    scale = lambda cfg, times: 1 + cfg.guidance_scale * guidance_ramp(cfg, times)  # noqa: E731
    cfg = WindowSampling(**options)
    yield check(f"cfg_scale_{count}", scale(cfg, grid[:-1]), **GUIDANCE)
    smooth = dataclasses.replace(cfg, ramp="smooth")
    yield check(f"cfg_scale_{count}_by_counter", scale(smooth, grid[:-1]), **GUIDANCE)

    short = subsampled_time_grid(config["sampler_num_steps"])
    yield check("traj_alphas", sampler.signals(short), **SCHEDULE)
    yield check("traj_timesteps", short[:-1], exact=True)
    features = ours(inputs["traj_semantic_features"])
    semantic = compiled(model, Denoiser.semantic_latents)(features)
    yield from trajectories(model, semantic, cfg, inputs, check, scale(cfg, short[:-1]))
    yield from run_losses(model, semantic, config, inputs, check)
    check.finish()


def per_log(signals):
    """Turns an error of each multiplier into one of the logarithms that it is made of, `[n, 5]`.

    The third and the fourth are h / 2 h_last of differences of logarithms of float32 numbers: where
    these are small, what is a rounding of the signal moves them by more than the schedule's bound.
    """
    h = np.diff(np.log(signals[1:-1]) - np.log(np.sqrt(1 - signals[1:-1] ** 2)))
    scale = np.ones((len(h) + 1, 5))
    scale[2:, 2:4] = (2 * h[:-1] / (1 + h[1:] / h[:-1]))[:, None].clip(max=1)
    return scale


def trajectories(model, semantic, cfg, inputs, check, scales):
    assert not inputs["traj_uncond"].any()  # zeros, which we make ourselves
    context, x = jnp.asarray(inputs["traj_cond"]), ours(inputs["traj_init_noise"])
    steps = cfg.num_inference_steps
    # The first step draws once, those behind it twice and use the second, the last not at all.
    used = [2 * i for i in range(steps - 1)]
    noise = ours(inputs["traj_noise_stream"])[jnp.array([*used, 0])]
    prefix = ours(inputs["prefix"])

    @functools.partial(jax.jit, static_argnames="has_prefix")
    def run(cfg, has_prefix):
        known = prefix if has_prefix else None
        return sample_window(
            model,
            context,
            semantic,
            cfg,
            keys=None,
            prefix=known,
            x_init=x,
            noise=noise,
            return_trajectory=True,
        )

    for head, has_prefix in (("traj_", False), ("prefix_traj_", True)):
        out, states = run(cfg, has_prefix)
        entering = jnp.concatenate([x[None], states.x[:-1]])
        if has_prefix:
            entering = entering.at[:, :, : prefix.shape[1]].set(prefix)
        yield check(f"{head}x", original(entering), **TRAJECTORY)
        yield check(f"{head}x0_guided", original(states.x0), **TRAJECTORY)
        yield check(f"{head}out", original(out), **TRAJECTORY)
        yield check(f"{head}draws_after_step", np.array([*used, used[-1]]) + 1, exact=True)
        yield check(f"{head}cfg_scales", scales, **GUIDANCE)


def run_losses(model, semantic, config, inputs, check):
    x0, noise = ours(inputs["loss_x0"]), ours(inputs["loss_noise"])
    index, context = jnp.asarray(inputs["loss_idx"]), jnp.asarray(inputs["loss_context"])
    network = compiled(model)
    call = lambda x_t, times: network(x_t, times, context, semantic)  # noqa: E731
    clean = jnp.arange(x0.shape[1])[None] < jnp.full((len(x0), 1), config["prefix_frames"])
    for head, given in (("loss_", None), ("loss_prefix_", clean)):
        loss, metrics = losses.diffusion_loss(
            call, model.cfg.schedule, x0, index, noise, clean=given
        )
        yield check(f"{head}noised_input", original(metrics["x_t"]), **LOSS)
        yield check(f"{head}network_t", index, exact=True)
        yield check(f"{head}value", loss[None], **LOSS)


def autoencoder_config(config) -> AutoencoderCausal3DConfig:
    return AutoencoderCausal3DConfig(
        channels=config["ch"],
        encoder_mult=tuple(config["enc_ch_mult"]),
        decoder_mult=tuple(config["dec_ch_mult"]),
        encoder_blocks=config["enc_num_res_blocks"],
        decoder_blocks=config["dec_num_res_blocks"] + 1,
        z_channels=config["z"],
    )


@runner("landiff/vae")
def run_vae(fixture):
    """All of it, or the decoder alone where the fixture has no encoder."""
    inputs, check = fixture.npz("inputs"), Checks(fixture.npz("outputs"))
    weights, cfg = fixture.npz("weights"), autoencoder_config(fixture.config)
    if any(key.startswith("encoder.") for key in weights):
        yield from run_encoder(from_torch("autoencoder_causal3d", weights, cfg), inputs, check)
    z = ours(inputs["z"].swapaxes(1, 2))
    alone = {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
    decoder = plan(alone, DECODER_RULES, blank(Decoder3D, cfg)).module()
    call = compiled(decoder)
    frames, cache = call(z[:, :3])
    chunks = [frames]
    for at in range(3, z.shape[1], 2):
        frames, cache = call(z[:, at : at + 2], cache)
        chunks.append(frames)
    yield check("chunk_frames", [chunk.shape[1] for chunk in chunks], exact=True)
    yield check("chunked", videos(jnp.concatenate(chunks, axis=1)), **NETWORK)
    yield check("whole", videos(call(z)[0]), **NETWORK)
    yield check("single_frame", videos(call(z[:, :1])[0]), **NETWORK)
    check.finish()


def run_encoder(model, inputs, check):
    rgb = ours(inputs["rgb"].swapaxes(1, 2))
    call = compiled(model.encoder)
    moments = call(rgb)
    yield check("moments", videos(moments), **NETWORK)
    yield check("moments_single_frame", videos(call(rgb[:, :1])), **NETWORK)
    posterior = DiagonalGaussian.from_moments(moments)
    noise = ours(inputs["posterior_eps"].swapaxes(1, 2))
    yield check("posterior_sample", videos(posterior.sample(noise=noise)), **NETWORK)
    yield check("posterior_mean", videos(posterior.mode()), **NETWORK)


def videos(x):
    """`[b, f, h, w, c]` to `[b, c, f, h, w]`."""
    return np.moveaxis(np.asarray(x), -1, 1)
