"""Runners of the whole DiCoDe system: weights, decoding, options, training, prompt to video.

Bounds are those of the README beside the fixtures: largest difference over largest value.
"""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_inside import observed

import convert
from convert.dicode import modules as dicode
from convert.engine.plan import flatten, plan
from convert.parts import deep_tokens
from dicode_jax.diffusion.guided import SamplingConfig, sample_guided
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS, NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_time_grid, ddim_timesteps
from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.errors import OptionGone
from dicode_jax.models.dicode import decoder as decoding
from dicode_jax.models.dicode.decoder import ClipDecoder
from dicode_jax.pipelines import dicode as pipelines_dicode
from dicode_jax.pipelines import dicode_programs, painting
from dicode_jax.stages.dicode import tokenizer_loss as training
from parity.harness import Check, LeftOut, runner
from parity.runners.language import byte_ids

TOKENS = {"rel_max": 1e-5}
UNET = {"rel_max": 2e-5}
LATENTS = {"rel_max": 5e-5}
LOSS = {"rel_max": 1e-5}
TABLE = {"rtol": 1e-6, "atol": 1e-12}
LEVELS = {"atol": 1.0, "max_fraction": 0.01}

SAMPLING_OPTIONS = {
    "ddim_steps": "num_inference_steps",
    "ddim_eta": "eta",
    "unconditional_guidance_scale": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "timestep_spacing": "spacing",
    "fs": "fs",
}
CASE_NOTES = {"entry", "video_length", "same_arrays", "multiple_cond_cfg", "cfg_img", "rm_tkn"}


def last(video):
    """[..., c, f, h, w] -> [..., f, h, w, c]."""
    return jnp.asarray(np.moveaxis(np.asarray(video), -4, -1))


def torch_order(video):
    """[..., f, h, w, c] -> [..., c, f, h, w]."""
    return np.moveaxis(np.asarray(video), -1, -4)


def require_all(names, done):
    """No array of a fixture may be left out silently."""
    left = sorted(set(names) - set(done))
    assert not left, f"the runner compares nothing with {', '.join(left)}"


@dataclasses.dataclass
class Loaded:
    """A converted checkpoint with what it was converted from."""

    source: dict
    cfg: dicode.SystemConfig
    system: dicode.System

    def text_context(self, ids):
        """Text tokens of CLIP ids, in the configured layer."""
        tower = dicode.text_tower_from_torch(self.source, self.cfg)
        return tower(jnp.asarray(ids, jnp.int32), self.cfg.text_layer)


def system_source(fixture):
    """(options of the diffusion model, weights) that a fixture refers to."""
    path = fixture.config.get("weights", "weights.safetensors").split()[0]
    options = fixture.config.get("system")
    if options is None:
        folder = path.rsplit("/", 1)[0]
        options = fixture.sibling_fixture(folder).config["system"]
    return dict(options), fixture.sibling(path)


def load(options, source) -> Loaded:
    """Converts a checkpoint and compiles its network once per shape."""
    cfg = dicode.config_from_original(options)
    return Loaded(source, cfg, convert.from_torch("dicode", source, cfg))


@functools.partial(jax.jit, static_argnums=0)
def network_call(graph, state, *inputs):
    """One evaluation of a decoder's network; cases of equal sizes share the program."""
    return nnx.merge(graph, state).denoise(*inputs)


def with_compiled_network(decoder: ClipDecoder) -> ClipDecoder:
    """The same decoder, whose every evaluation is one compiled call."""
    compiled, bare = (nnx.merge(*nnx.split(decoder)) for _ in range(2))
    # What the network itself does not read must not keep programs apart.
    bare.cfg = dataclasses.replace(bare.cfg, schedule=NoiseSchedule())
    graph, state = nnx.split(bare)
    compiled.denoise = lambda x, t, condition, fs, **_: network_call(
        graph, state, x, t, condition, fs
    )
    return compiled


def with_option(fixture, name, options, source):
    """Options and weights with those of a case of `../options` laid over them."""
    case = fixture.config["cases"][name]
    extra = {
        key.removeprefix(f"{name}:"): value
        for key, value in fixture.sibling("weights.safetensors").items()
        if key.startswith(f"{name}:")
    }
    options = dict(options)
    if any(key.startswith("vae_") for key in extra):
        options["vae_projector_config"] = {}
    if "image_cat_stage_config" in case:
        options["conditioning_key"] = "hybrid_concat"
        options["image_cat_stage_config"] = case["image_cat_stage_config"]
    if "in_channels" in case:
        unet = options["unet_config"]
        params = unet["params"] | {"in_channels": case["in_channels"]}
        options["unet_config"] = unet | {"params": params}
    return options, source | extra


# --- dicode/system


@runner("dicode/system")
def run_system(fixture):
    """Every parameter lands where it belongs: written back, the weights are the same files."""
    options, source = system_source(fixture)
    loaded = load(options, source)
    for name in PERSISTENT_BUFFERS:
        if name in source:
            yield Check(name, loaded.cfg.decoder.schedule.table(name), source[name], **TABLE)
    for name, want in fixture.arrays.items():
        assert name.startswith("schedule/"), name
        table = loaded.cfg.decoder.schedule.table(name.removeprefix("schedule/"))
        yield Check(name, table, want, **TABLE)
    rules = (*deep_tokens.TOKENIZER_RULES, *deep_tokens.decoder_rules(source))
    for part in (loaded.system.tokenizer, loaded.system.decoder):
        state = nnx.state(part)
        shapes = {path: tuple(leaf.shape) for path, leaf in flatten(state).items()}
        own = {k: v for k, v in source.items() if k not in PERSISTENT_BUFFERS}
        converted = plan(own, rules, shapes)
        for path, leaf in flatten(state).items():
            if path in converted.sources:
                yield Check(converted.sources[path], leaf[...], converted.array(path), exact=True)
        left = set(converted.missing) - {"text_context", "null_tokens"}
        assert not left, f"filled by nothing: {sorted(left)}"


# --- dicode/decode and dicode/options


@runner("dicode/decode")
def run_decode(fixture):
    arrays, done = fixture.arrays, {"keyframes_u8"}
    loaded = load(*system_source(fixture))
    schedule = loaded.cfg.decoder.schedule
    for name, want in arrays.items():
        group, *rest = name.split("/")
        if group == "ddim_timesteps":
            got = ddim_timesteps(rest[0], int(rest[1]), schedule.num_timesteps)
            yield Check(name, got, want, exact=True)
        elif group == "schedule":
            yield Check(name, schedule.table(rest[0]), want, **TABLE)
        elif match := re.fullmatch(r"schedule(\d+)", group):
            grid = ddim_time_grid("uniform", int(match[1]), schedule.num_timesteps)
            tables = DDIM(schedule=schedule, eta=1.0).tables(grid)
            yield Check(name, getattr(tables, rest[0].removeprefix("ddim_"))[::-1], want, **TABLE)
        else:
            continue
        done.add(name)
    yield from run_cases(loaded, fixture, keyframes(arrays["keyframes_u8"]), done)
    require_all(arrays, done)


@runner("dicode/options")
def run_options(fixture):
    done = set()
    options, source = system_source(fixture)
    frames = fixture.config["keyframes"].split()
    frames = fixture.sibling_fixture(frames[0]).arrays[frames[-1]]
    for name in fixture.config["cases"]:
        try:
            loaded = load(*with_option(fixture, name, options, source))
        except OptionGone as gone:
            done |= {key for key in fixture.arrays if key.startswith(f"{name}/")}
            yield LeftOut(name, gone.option)
            continue
        yield from run_cases(loaded, fixture, keyframes(frames), done, only=name)
    require_all(fixture.arrays, done)


def keyframes(frames_u8):
    """uint8 [k, h, w, 3] -> [1, k, h, w, 3] in [-1, 1]."""
    return jnp.asarray(frames_u8.astype(np.float32) / 255.0 * 2.0 - 1.0)[None]


def run_cases(loaded, fixture, frames, done, only=None):
    """Every decoding case of a fixture."""
    arrays = fixture.arrays
    decoder = with_compiled_network(loaded.system.decoder)
    tokens, given = {"tokens": loaded.system.tokenizer(frames)}, None
    for name, case in fixture.config["cases"].items():
        if only not in (None, name):
            continue
        if "clips" in case:
            yield from run_clips(decoder, arrays, name, case, done)
            continue
        if case["entry"].startswith("demo_llm"):
            given = jnp.asarray(arrays.get(f"{name}/img_emb", given))
            case_tokens = {"tokens": given}
        else:
            case_tokens = tokens
        yield from run_case(decoder, case_tokens, arrays, name, case, done)
        if name == "default":
            plain = loaded.system.decoder
            yield from one_program(plain, case_tokens, arrays, name, case)


def sampling_config(case, num_frames) -> SamplingConfig:
    """Our settings for a decoding case."""
    fields = {ours: case[name] for name, ours in SAMPLING_OPTIONS.items() if name in case}
    unknown = set(case) - set(SAMPLING_OPTIONS) - CASE_NOTES
    unknown -= {"image_cat_stage_config", "in_channels"}
    assert not unknown, f"unknown options of a case: {unknown}"
    if case.get("multiple_cond_cfg"):
        # The text is the same in all its branches, so that this scale alone counts.
        fields["guidance_scale"] = case["cfg_img"]
    if case.get("rm_tkn", -1) >= 0:
        fields["drop_tokens"] = case["rm_tkn"]
    return SamplingConfig(num_frames=num_frames, batch_guidance=True, **fields)


def run_case(decoder, tokens, arrays, name, case, done):
    """One clip: conditions, every step, latents, video, saved levels."""
    same = case.get("same_arrays", {})
    read = lambda key: arrays[same.get(key, f"{name}/{key}")]  # noqa: E731
    x_init, noise = last(read("x_T")), last(read("step_noise")[:])
    cfg = sampling_config(case, num_frames=x_init.shape[1])
    branches = decoding.clip_conditions(decoder, **tokens, cfg=cfg)
    cond, uncond = branches if cfg.is_guided else (*branches, None)
    latents, steps = step_by_step(decoder, branches, cfg, x_init, noise)
    got = {"context": cond.context, "latents": torch_order(latents)}
    got["uncond_context"] = None if uncond is None else uncond.context
    got["c_concat"] = None if cond.concat is None else torch_order(cond.concat)
    grid = ddim_time_grid(cfg.spacing, cfg.num_inference_steps)
    bounds = {"context": TOKENS, "uncond_context": TOKENS, "c_concat": TOKENS}
    bounds |= {"model_calls": UNET, "saved_u8": LEVELS, "timesteps": {"exact": True}}
    for key in [k.removeprefix(f"{name}/") for k in arrays if k.startswith(f"{name}/")]:
        done.add(f"{name}/{key}")
        want = arrays[f"{name}/{key}"]
        if key in ("x_T", "step_noise", "img_emb"):
            continue
        if key == "timesteps":
            got[key] = grid[:-1]
        elif key == "x_prev":
            got[key] = torch_order(steps.x)
        elif key == "pred_x0":
            got[key] = torch_order(steps.x0)
        elif key == "model_calls":
            states = last(arrays[f"{name}/x_prev"]) if f"{name}/x_prev" in arrays else steps.x
            states = np.concatenate([x_init[None], states[:-1]])
            got[key] = model_calls(decoder, states, grid, cfg, cond, uncond)
        elif key.startswith("video") or key == "saved_u8":
            got[key] = frames_of(decoder, latents, key)
        yield Check(f"{name}/{key}", got[key], want, **bounds.get(key, LATENTS))


def step_by_step(decoder, branches, cfg, x_init, noise):
    """Latents of `decode_clip` and every step on the way, the network compiled on its own."""
    return sample_guided(
        decoder.denoise,
        branches,
        decoder.cfg.schedule,
        cfg,
        x_init.shape[1:],
        keys=None,
        x_init=x_init,
        noise=noise,
        return_trajectory=True,
        use_scan=False,
    )


def one_program(decoder, tokens, arrays, name, case):
    """The same clip as one compiled program, its network inside a scan."""
    graph, state = nnx.split(decoder)
    x_init, noise = (last(arrays[f"{name}/{key}"]) for key in ("x_T", "step_noise"))
    cfg = sampling_config(case, num_frames=x_init.shape[1])

    @jax.jit
    def run(state, tokens, x_init, noise):
        model = nnx.merge(graph, state)
        return decoding.decode_clip(model, keys=None, cfg=cfg, x_init=x_init, noise=noise, **tokens)

    got = torch_order(run(state, tokens, x_init, noise))
    yield Check(f"{name}/latents (one program)", got, arrays[f"{name}/latents"], **LATENTS)


def model_calls(decoder, states, grid, cfg, cond, uncond):
    """Outputs of all branches at given states, in the original's order of evaluation."""
    outputs = []
    for x, t in zip(states, grid[:-1], strict=True):
        b = x.shape[0]
        timesteps, fs = jnp.full((b,), t, jnp.int32), jnp.full((b,), cfg.fs, jnp.int32)
        for branch in (cond, uncond):
            if branch is not None:
                outputs.append(decoder.denoise(jnp.asarray(x), timesteps, branch, fs))
    return torch_order(np.stack(outputs))


def frames_of(decoder, latents, key):
    """Decoded video in the form an array of that name has."""
    video = decoding.decode_latents(decoder, latents)
    if key == "saved_u8":
        return np.asarray(decoding.to_uint8(video))[0]
    video = torch_order(video)
    if match := re.fullmatch(r"video_sub(\d+)", key):
        step = int(match[1])
        return video[..., ::step, ::step]
    return video


def run_clips(decoder, arrays, name, case, done):
    """Clips decoded one by one from neighbouring keyframes and joined on time."""
    tokens, noise = arrays[f"{name}/img_emb"], last(arrays[f"{name}/noise"])
    note = {"clips", "frames", "noise"}
    cfg = sampling_config({k: v for k, v in case.items() if k not in note}, noise.shape[2])
    done |= {f"{name}/img_emb", f"{name}/noise"}
    latents = decode_chain(decoder, tokens, noise, cfg, case["clips"])
    shape = np.asarray(torch_order(decoding.decode_latents(decoder, latents)).shape)
    yield Check(f"{name}/frames", shape, np.asarray(case["frames"]), exact=True)
    for key in [k.removeprefix(f"{name}/") for k in arrays if k.startswith(f"{name}/")]:
        if f"{name}/{key}" in done:
            continue
        done.add(f"{name}/{key}")
        bound = LEVELS if key == "saved_u8" else LATENTS
        got = frames_of(decoder, latents, key)
        yield Check(f"{name}/{key}", got, arrays[f"{name}/{key}"], **bound)


def decode_chain(decoder, tokens, noise, cfg, clips):
    """Latents of consecutive clips [1, clips f, h, w, c]; noise holds x_T and the steps of each."""
    per_clip = cfg.num_inference_steps + 1
    out = []
    for i in range(clips):
        own = noise[i * per_clip : (i + 1) * per_clip]
        pair = jnp.asarray(tokens[i : i + 2])[None]
        branches = decoding.clip_conditions(decoder, pair, cfg)
        out.append(step_by_step(decoder, branches, cfg, own[0], own[1:])[0])
    return jnp.concatenate(out, axis=1)


# --- dicode/end_to_end and dicode/llm_batch


@runner("dicode/end_to_end")
def run_end_to_end(fixture):
    arrays, config = fixture.arrays, fixture.config
    done = {"u", "component", "eps", "noise"}
    options, source = system_source(fixture)
    loaded = load(options, source)
    frames = config["num_frames_to_gen"]
    ids, tokens = yield from generated(loaded, options, [config["prompt"]], frames, arrays)
    got = {"text_ids": ids, "img_emb": tokens[0]}
    decoder = with_compiled_network(loaded.system.decoder)
    noise = last(arrays["noise"])
    cfg = sampling_config({"ddim_steps": config["ddim_steps"]}, noise.shape[2])
    latents = decode_chain(decoder, np.asarray(tokens[0]), noise, cfg, frames - 1)
    shape = torch_order(decoding.decode_latents(decoder, latents)).shape
    yield Check("video_shape", np.asarray(shape), np.asarray(config["video_shape"]), exact=True)
    bounds = {"text_ids": {"exact": True}, "img_emb": TOKENS, "saved_u8": LEVELS}
    painted = through_pipeline(decoder, np.asarray(tokens[0]), noise, cfg)
    yield Check("saved_u8 (pipeline)", painted, arrays["saved_u8"], **LEVELS)
    for name in set(arrays) - done:
        done.add(name)
        value = got[name] if name in got else frames_of(decoder, latents, name)
        yield Check(name, value, arrays[name], **bounds.get(name, LATENTS))
    require_all(arrays, done)


def through_pipeline(decoder, tokens, noise, cfg):
    """The video of `DiCoDePipeline.decode`, with the noise of each clip where its key would draw.

    The program is not compiled as one: the network is, once for this and for what is beside it.
    """
    pipe = pipelines_dicode.DiCoDePipeline(
        tokenizer=None,
        decoder=decoder,
        language_model=None,
        text=None,
        config=pipelines_dicode.PipelineConfig(sampling=cfg),
    )
    data = lambda key: np.asarray(jax.random.key_data(key)).tobytes()  # noqa: E731
    sample = jax.random.fold_in(jax.random.key(5), 0)
    per_clip = cfg.num_inference_steps + 1
    noise_of = {
        data(jax.random.fold_in(sample, 1 + clip)): noise[clip * per_clip :][:per_clip]
        for clip in range(len(tokens) - 1)
    }

    def denoise(graphs, states, rows, *, shared, **_):
        given, carry = rows["given"], rows["carry"]
        own = noise_of[data(dicode_programs._keys(given))]
        x = step_by_step(decoder, given["conditions"], shared[0], own[0], own[1:])[0]
        return carry._replace(state=carry.state._replace(x=x)), x

    programs = painting.Programs(
        dicode_programs._prepare.__wrapped__, denoise, dicode_programs._decode.__wrapped__
    )
    with mock.patch.object(pipelines_dicode, "PIXELS", programs):
        return pipe.decode(tokens, seed=5, clips_per_batch=1)


@runner("dicode/llm_batch")
def run_llm_batch(fixture):
    arrays, config = fixture.arrays, fixture.config
    done = {"clip_idx", "u", "component", "eps", "frame_stride", "t", "uniform_drop", "z", "noise"}
    options, source = system_source(fixture)
    loaded = load(options, source)
    decoder = with_compiled_network(loaded.system.decoder)
    loss_cfg = dataclasses.replace(loaded.cfg.loss, uncond_prob=config["uncond_prob"])
    _, dropped = training.drop_masks(jnp.asarray(arrays["uniform_drop"]), loss_cfg.uncond_prob)
    captions = ["" if d else text for d, text in zip(dropped, config["captions"], strict=True)]
    assert captions == config["effective_captions"], captions
    index = arrays["clip_idx"]
    _, tokens = yield from generated(loaded, options, captions, int(index.max()) + 2, arrays)
    pairs = tokens[np.arange(len(index))[:, None], index[:, None] + np.arange(2)]

    latents, noise = last(arrays["z"]), last(arrays["noise"])
    draws = training.Draws(
        timesteps=jnp.asarray(arrays["t"], jnp.int32),
        noise=noise,
        uniform_drop=jnp.asarray(arrays["uniform_drop"]),
    )
    loss, metrics = training.denoising_loss(
        decoder,
        latents,
        pairs,
        draws,
        loss_cfg,
        fs=jnp.asarray(arrays["frame_stride"], jnp.int32),
        deterministic=True,
    )
    words, num_frames = loaded.cfg.text.max_seq_len, latents.shape[1]
    got = {
        "context_image": decoder.condition(pairs, num_frames).context[:, words:],
        "uncond_image": decoder.null_condition(1, num_frames).context[:, words:],
        "model_output": torch_order(metrics["prediction"]),
        "loss": loss,
    }
    bounds = {"model_output": UNET, "loss": LOSS}
    for name in set(arrays) - done:
        done.add(name)
        yield Check(name, got[name], arrays[name], **bounds.get(name, TOKENS))
    require_all(arrays, done)


def generated(loaded, options, prompts, num_keyframes, arrays):
    """(text ids, deep tokens [b, k, n, z]) of prompts with the stored draws; checks components."""
    lm, kwargs = loaded.system.lm, options["llm_config"]["generate_kwargs"]
    assert kwargs["num_img_tokens"] == lm.cfg.num_tokens
    ids = byte_ids(prompts, kwargs["text_length"], lm.cfg.pad_token_id)
    u, eps = (jnp.asarray(arrays[name]) for name in ("u", "eps"))
    assert kwargs["add_sep"]
    assert not kwargs["weighted_sample"]
    tokens, seen = observed(
        lm,
        jnp.asarray(ids),
        num_keyframes=num_keyframes,
        do_sample=kwargs["do_sample"],
        var_scale=kwargs["var_scale"],
        guidance_scale=kwargs.get("cfg_scale", 1.0),
        u=u,
        noise=eps.reshape(len(eps), u.shape[1], -1),
        parity=True,
    )
    mixture = GaussianMixture.from_params(jnp.asarray(seen.head_out), lm.cfg.num_mixtures)
    picked = mixture.component_of(u.T).T
    yield Check("component", picked, arrays["component"], exact=True)
    return ids, tokens
