"""AR-Diffusion: denoiser, timesteps, schedules, sampler, loss and steps of training.

Bounds are those of the README beside the fixtures. Arrays of the original have frames, tokens and
channels last, as ours; latents of its `BaseModel` are `[b, f, c, 1, n]`.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from convert import from_torch
from convert.ar_diffusion import dit as convert_dit
from convert.engine.plan import flatten
from convert.engine.rules import original_names
from dicode_jax.diffusion import losses, timesteps
from dicode_jax.diffusion.asynchronous import sample_frames
from dicode_jax.diffusion.frame_schedule import frame_schedule
from dicode_jax.diffusion.guidance import guide
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_timesteps
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.evaluation.frechet import frechet_distance
from dicode_jax.models.ar_diffusion import dit as model_dit
from dicode_jax.nn.embeddings import timestep_embedding
from dicode_jax.stages.ar_diffusion import dit as stage_dit
from parity.harness import Check, runner

NETWORK = {"atol": 3e-5}
TRAJECTORY = {"atol": 3e-5}
TABLE = {"rtol": 2e-6}
LOSS = {"rtol": 1e-5}
GRADIENT = {"atol": 1e-5}


def load_dit(fixture, weights=None, **changes):
    """The network of a fixture, its positions as they are stored."""
    source = fixture.config.get("weights_from")
    source = fixture if source is None else fixture.sibling_fixture(f"../{source}")
    weights = source.npz("weights") if weights is None else weights
    return from_torch("ar_diffusion_dit", weights, fixture.config["dit"] | changes)


def compiled(model):
    graph, state = nnx.split(model)
    return jax.jit(lambda x, t, context: nnx.merge(graph, state)(x, t, context))


@runner("ar_diffusion/dit", "ar_diffusion/dit_rope_qknorm")
def run_dit(fixture):
    inputs, want = fixture.npz("inputs"), fixture.npz("outputs")
    x, t, context = (jnp.asarray(inputs[name]) for name in ("x", "t", "context"))
    for mode in fixture.config["mask_modes"]:
        model = load_dit(fixture, causal_attn_mode=mode)
        call, name = compiled(model), f"{mode}/"
        out = call(x, t, context)
        yield Check(f"{name}out", out, want[f"{name}out"], **NETWORK)
        moved = x.at[:, -1].add(1.0)
        leak = jnp.abs(call(moved, t, context) - out).max(axis=(0, 2, 3))
        key = f"{name}leak_last_to_earlier"
        yield Check(key, leak, want[key], **NETWORK)
        if mode == "temporal_causal":
            yield Check(f"{key}, none", leak[:-1], np.zeros(len(leak) - 1), exact=True)
        if (key := f"{name}mask_allowed") in want:
            mask = model_dit.attention_mask(model.cfg, x.shape[1])
            yield Check(key, mask, want[key], exact=True)
        inside = {k.removeprefix(f"{name}inter/"): v for k, v in want.items() if "/inter/" in k}
        if any(k.startswith(f"{name}inter/") for k in want):
            yield from intermediates(model, moved, t, context, inside, f"{name}inter/")


def intermediates(model, x, t, context, want, head):
    """What the parts of the network give, called as the network calls them.

    The originals were kept while the leak was measured, so they are of the moved last frame.
    """
    cfg, f = model.cfg, x.shape[1]
    tokens, c, times = model.embed(x, t, context)
    got = {"x_emb_before_pos": tokens, "c_emb": c, "t_emb": times}
    if not cfg.rotary:
        tokens = tokens + model_dit.position_table(cfg.embed_dim, tokens.shape[1])[None]
    mask, rotary = jnp.asarray(model_dit.attention_mask(cfg, f))[None, None], model._rotary(f)
    y = jnp.concatenate([c, tokens], axis=1)
    for i, block in enumerate(model.blocks):
        if i == 0:
            parts = block.modulation(times)
            got["block0_adaln"] = jnp.concatenate(parts, axis=-1)
            told = block._on_frames(model_dit.modulate, block.norm(y), *parts[:2])
            got["block0_attn"] = block.attn(told, mask, rotary=rotary)[0]
        y = got[f"block{i}"] = block(y, times, mask, rotary)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for key, value in want.items():
        yield Check(head + key, got[key], value, **NETWORK)


@runner("ar_diffusion/fopp")
def run_fopp(fixture):
    want, config = fixture.npz("outputs"), fixture.config
    for k, f in config["KF"]:
        head = f"K{k}_F{f}/"
        paths = timesteps.HostPaths(k, f)
        for name, table in (("mat_s", paths.starts), ("mat_e", paths.ends)):
            if head + name in want:
                yield Check(head + name, table, want[head + name], rtol=1e-12)
        for mode in ("fopp", "uniform_paths"):
            if (key := f"{head}marginal_{mode}") in want:
                yield Check(key, timesteps.marginals(mode, k, f), want[key], rtol=1e-9, atol=1e-15)
            for what, seed in (("draws", config["seed"]), ("counts", config["seed"] + 1)):
                if (key := f"{head}{what}_{mode}") not in want:
                    continue
                rng = np.random.RandomState(seed)
                count = config["n_save"] if what == "draws" else config["n_count"]
                drawn = np.stack([paths.draw(mode, rng) for _ in range(count)])
                got = drawn if what == "draws" else counts(drawn, k)
                yield Check(key, got, want[key], exact=True)
    for k, f in config["joint"]:
        head = f"joint_K{k}_F{f}/"
        seqs = np.array(list(itertools.combinations_with_replacement(range(k), f)))
        yield Check(f"{head}seqs", seqs, want[f"{head}seqs"], exact=True)
        starts, ends = timesteps.path_counts(k, f)
        through = (starts * ends)[seqs, np.arange(f)]
        yield Check(
            f"{head}prob_fopp",
            (1 / through).sum(axis=1) / (f * k),
            want[f"{head}prob_fopp"],
            rtol=1e-12,
        )
        rng, paths = np.random.RandomState(config["seed"] + 2), timesteps.HostPaths(k, f)
        drawn = [tuple(paths.draw("fopp", rng)) for _ in range(config["n_count"])]
        found = np.array([drawn.count(tuple(seq)) for seq in seqs])
        yield Check(f"{head}counts_fopp", found, want[f"{head}counts_fopp"], exact=True)


def counts(drawn, num_timesteps):
    """How often each timestep came in each frame, `[f, K]`."""
    return np.stack([np.bincount(frame, minlength=num_timesteps) for frame in drawn.T])


@runner("ar_diffusion/ad_schedule")
def run_schedules(fixture):
    want = fixture.npz("outputs")
    for frames, window, lag, asked in fixture.config["cases"]:
        head = f"F{frames}_base{window}_s{lag}_S{asked}/"
        visited = ddim_timesteps("uniform_upstream", asked)
        made = frame_schedule(frames, len(visited), lag, window=window)
        sampler = AsynchronousDDIM(schedule=NoiseSchedule(), timesteps=tuple(visited))
        got = {
            "step_index": made.steps[1:],
            "timesteps": sampler.coefficients(made.steps)[0],
            "update_mask": made.moves,
            "window": np.stack([made.starts, made.starts + window], axis=1),
        }
        for name, array in got.items():
            yield Check(head + name, array, want[head + name], exact=True)


@runner("ar_diffusion/schedule")
def run_tables(fixture):
    want = fixture.npz("outputs")
    for name, value in want.items():
        if match := re.fullmatch(r"([\d.e-]+)_([\d.e-]+)/(\w+)", name):
            schedule = NoiseSchedule(
                linear_start=float(match[1]), linear_end=float(match[2]), parameterization="x0"
            )
            yield Check(name, schedule.table(match[3]), value, **TABLE)
        elif match := re.search(r"ddim(\d+)/(\w+)$", name):
            a, b = map(float, name.split("/")[0].split("_"))
            schedule = NoiseSchedule(linear_start=a, linear_end=b, parameterization="x0")
            bound = {"exact": True} if match[2] == "timesteps" else TABLE  # squares of roots
            yield Check(name, ddim(schedule, int(match[1]))[match[2]], value, **bound)
        elif name == "t_freqs":
            got = timestep_embedding(jnp.ones(1, jnp.int32), 2 * len(value))[0, len(value) :]
            yield Check(f"{name}, sines", got, np.sin(value), atol=2e-7)
        else:
            t = jnp.array([0, 1, 7, 100, 500, 981, 999])
            yield Check(name, timestep_embedding(t, value.shape[1]), value, atol=1e-4)


def ddim(schedule, num_steps):
    """What the original keeps of a grid, with its entry for waiting frames at the end."""
    visited = ddim_timesteps("uniform_upstream", num_steps)
    sampler = AsynchronousDDIM(schedule=schedule, timesteps=tuple(visited))
    steps = np.arange(len(visited), 0, -1)[:, None]
    _, c = sampler.coefficients(np.concatenate([steps[:1], steps, [[0]]]))
    return {
        "timesteps": visited,
        "alphas": np.square(c.signal[:, 0], dtype=np.float64),
        "alphas_prev": np.square(c.x0[:, 0], dtype=np.float64),
    }


def schedule_of(fixture, **changes):
    options = {"parameterization": "x0"} | fixture.config["diffusion"] | changes
    return convert_dit.buffers.schedule_from_original(options)


@runner("ar_diffusion/loss")
def run_loss(fixture):
    inputs, want = fixture.npz("inputs"), fixture.npz("outputs")
    model = load_dit(fixture)
    graph, state = nnx.split(model)
    get = lambda *names: next(jnp.asarray(inputs[n]) for n in names if n in inputs)  # noqa: E731
    x0, t, noise, context = get("x0", "x"), get("t"), get("noise"), get("context")

    @functools.partial(jax.jit, static_argnames="kind")
    def loss(state, kind):
        call = functools.partial(nnx.merge(graph, state), context=context)
        return losses.diffusion_loss(
            call, schedule_of(fixture, parameterization=kind), x0, t, noise
        )

    for kind in fixture.config["parameterizations"]:
        value, metrics = loss(state, kind)
        yield Check(f"{kind}/loss", value, want[f"{kind}/loss"], **LOSS)
        yield Check(
            f"{kind}/model_out", metrics["prediction"], want[f"{kind}/model_out"], **NETWORK
        )
        yield Check(f"{kind}, x_t", metrics["x_t"], want["x_t"], atol=2e-6)
    gradient = jax.grad(lambda s: loss(s, "x0")[0])(state)
    named = by_original_names(gradient, convert_dit.RULES)
    for key in [key for key in want if key.startswith("grad/")]:
        yield Check(key, named[key.removeprefix("grad/")], want[key], **GRADIENT)
    yield Check("grad_norm", optax.global_norm(gradient), want["grad_norm"], **LOSS)


def by_original_names(state, rules):
    """Arrays under original names and in original layouts."""
    out = {}
    for path, leaf in flatten(state).items():
        name, rule = next(original_names(rules, path))
        out[name] = rule.layout.inverse(np.asarray(leaf[...]))
    return out


def trajectory(call, schedule, window, x, run, contexts):
    """The states of a run as the original makes them, its drift of finished frames included."""
    visited = ddim_timesteps("uniform_upstream", run["S"], schedule.num_timesteps)
    frames = frame_schedule(x.shape[1], len(visited), run["s"], window=window)
    sampler = AsynchronousDDIM(schedule=schedule, timesteps=tuple(visited), drift=True)
    context, null = contexts

    def denoise(x, times, step):
        cond = call(x, times, context)
        return cond if run["g"] == 1 else guide(cond, call(x, times, null), run["g"])

    return sample_frames(denoise, sampler, x, frames, return_trajectory=True), frames


@runner("ar_diffusion/ddim")
def run_ddim(fixture):
    inputs, want = fixture.npz("inputs"), fixture.npz("outputs")
    call, schedule = compiled(load_dit(fixture)), schedule_of(fixture)
    contexts = [jnp.asarray(inputs[name]) for name in ("context", "uncond_context")]
    for run in fixture.config["runs"]:
        head, x = f"{run['name']}/", jnp.asarray(inputs[f"x_T_{run['frames']}"])
        window = fixture.config["dit"]["num_frames"]
        (final, states), frames = trajectory(call, schedule, window, x, run, contexts)
        final = windows_left(states, frames, final)
        for name in ("final", "final_plain_ddim"):
            if head + name in want:
                yield Check(head + name, final, want[head + name], **TRAJECTORY)
        for name, array in (("trace_window", states.x), ("x0_window", states.x0)):
            if head + name in want:
                rows = [a[:, s : s + frames.window] for a, s in zip(array, frames.starts)]
                yield Check(head + name, np.stack(rows), want[head + name], **TRAJECTORY)


def windows_left(states, frames, final):
    """The last state, but frames as they were when they left the window: they drift no more."""
    final = np.array(final)
    for f in range(frames.starts.max()):
        final[:, f] = states.x[np.argmax(frames.starts > f) - 1][:, f]
    return final


@runner("ar_diffusion/basemodel_uncond", "ar_diffusion/basemodel_class")
def run_base(fixture):
    inputs, want, config = fixture.npz("inputs"), fixture.npz("outputs"), fixture.config
    model = load_denoiser(fixture)
    call, cfg, scale = compiled(model), model.cfg, config["base"]["scale_factor"]
    tokens = unit(tokens_of(inputs["latents"]) * scale)
    yield Check("zs_normalised", tokens, want["zs_normalised"], atol=1e-6)
    b, f = tokens.shape[:2]
    rng, paths = np.random.RandomState(config["seed"]), timesteps.HostPaths(1000, f)
    drawn = np.stack([paths.draw("fopp", rng) for _ in range(b)])
    yield Check("timesteps", drawn, want["timesteps"], exact=True)
    classes = jnp.asarray(inputs.get("class_id", np.zeros(b, np.int64)))
    contexts = model.contexts(classes), model.contexts(jnp.full_like(classes, -1))
    loss, _ = losses.diffusion_loss(
        functools.partial(call, context=contexts[0]),
        cfg.schedule,
        tokens,
        jnp.asarray(drawn),
        jnp.asarray(inputs["noise"]),
    )
    yield Check("loss_fixed_noise", loss, want["loss_fixed_noise"], **LOSS)
    back = lambda x: np.moveaxis(np.asarray(x), -1, -2)[..., None, :] / scale  # noqa: E731
    for run in config["runs"]:
        head, x = f"{run['name']}/", jnp.asarray(inputs["x_T"])
        (final, _), _ = trajectory(call, cfg.schedule, f, x, run, contexts)
        yield Check(f"{head}xs_pred", back(final), want[f"{head}xs_pred"], atol=6e-5)
        yield Check(f"{head}xs_rec", back(tokens), want[f"{head}xs_rec"], atol=2e-6)


def load_denoiser(fixture):
    config = fixture.config
    nodes = {"model_cfg": config["dit"], "diffusion_cfg": config["diffusion"]}
    return from_torch("ar_diffusion_denoiser", fixture.npz("weights"), config["base"] | nodes)


def tokens_of(latents):
    """`[b, f, c, 1, n]` to `[b, f, n, c]`."""
    return jnp.asarray(np.moveaxis(latents[..., 0, :], -2, -1))


@runner("ar_diffusion/train_steps")
def run_training(fixture):
    """Both variants: with the context's gradient fresh in each step, and piling up."""
    inputs, want, config = fixture.npz("inputs"), fixture.npz("outputs"), fixture.config
    model = load_denoiser(fixture)
    graph, start = nnx.split(model)
    rules = convert_dit.denoiser_rules(model.cfg)
    is_fixed = lambda path: path[0] == "context"  # noqa: E731
    labels = nnx.map_state(lambda path, _: "fixed" if is_fixed(path) else "trained", start)
    adam = optax.adamw(config["lr"], b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4)
    tx = optax.multi_transform({"trained": adam, "fixed": optax.set_to_zero()}, labels)

    @jax.jit
    def gradients(params, latents, t, noise):
        def loss(params):
            classes = jnp.zeros(len(latents), jnp.int32)
            return stage_dit.denoising_loss(nnx.merge(graph, params), latents, classes, t, noise)[0]

        return jax.value_and_grad(loss)(params)

    for variant in ("clean", "as_released"):
        params, average, state, kept = start, start, tx.init(start), None
        found = {name: [] for name in ("loss", "grad_norm_before_clip", "ema_decay")}
        small = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), start)
        for n in range(config["steps"]):
            batch = [jnp.asarray(inputs[name][n]) for name in ("x0", "t", "noise")]
            loss, grads = gradients(params, *batch)
            if kept is not None and variant == "as_released":
                grads["context"] = grads["context"].replace(grads["context"][...] + kept)
            norm = optax.global_norm(grads)
            factor = jnp.minimum(1.0, config["clip"] / (norm + 1e-6))
            grads = jax.tree.map(functools.partial(jnp.multiply, factor), grads)
            small = jax.tree.map(lambda s, g: s | (jnp.abs(g) < 1e-6), small, grads)
            kept = grads["context"][...]
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            decay = min((1 + n) / (10 + n), config["ema_decay"]) if n else 0.0
            average = optax.incremental_update(params, average, 1 - decay)
            for name, value in zip(found, (loss, norm, decay), strict=True):
                found[name].append(value)
        for name, value in found.items():
            key = f"{variant}/{name}"
            yield Check(key, np.array(value), want[key], **LOSS)
        skip = by_original_names(small, rules)
        for what, tree in (("param", params), ("ema", average)):
            for name, got in by_original_names(tree, rules).items():
                if (key := f"{variant}/{what}/{name}") in want:
                    yield Check(key, np.where(skip[name], want[key], got), want[key], atol=2e-5)


@runner("ar_diffusion/frechet")
def run_frechet(fixture):
    inputs, want = fixture.npz("inputs"), fixture.npz("outputs")
    for name in fixture.config["sets"]:
        got = frechet_distance(inputs[f"{name}_a"], inputs[f"{name}_b"])
        is_singular = min(len(inputs[f"{name}_{x}"]) for x in "ab") <= inputs[f"{name}_a"].shape[1]
        bound = 1e-3 if is_singular else 1e-8
        yield Check(f"fid_{name}", got, want[f"fid_{name}"], rtol=bound)
