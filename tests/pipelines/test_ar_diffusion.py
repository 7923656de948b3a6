"""Videos of a tiny AR-Diffusion: what a class, a lag and given frames mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from tiny_ar_diffusion import DIT, SAMPLING, VAE, make

import dicode_jax
from dicode_jax.diffusion.asynchronous import sample_frames
from dicode_jax.diffusion.frame_schedule import frame_schedule
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import per_sample_normal
from dicode_jax.diffusion.time_grid import ddim_timesteps
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import UserError
from dicode_jax.media.video import write_video
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines.ar_diffusion import ARDiffusionConfig, ARDiffusionPipeline


@pytest.fixture(scope="module")
def pipe():
    return make(spread=0.1)


def near(got, want):
    """Other sums in another batch, and a step of a grey level between."""
    assert got.shape == want.shape
    assert np.abs(np.asarray(got, int) - want).max() <= 1


def test_videos_depend_on_class_and_seed_alone(pipe):
    prompts = ["Crawling", 0, "basketball"]
    for at_once in (2, 3):
        videos = pipe(prompts, seed=7, clips_per_batch=at_once)
        assert videos.shape == (3, 5, 8, 8, 3)
        assert videos.dtype == np.uint8
        for i, prompt in enumerate((" crawling", "Archery", np.int64(1))):
            near(pipe(prompt, seed=7 + i)[0], videos[i])
    for prompt in ("2", 2):
        np.testing.assert_array_equal(pipe(prompt, seed=7), pipe("Crawling", seed=7))
    assert not np.array_equal(pipe("Archery", seed=7)[0], videos[0])


def dense(pipe, label, seed, num_frames, lag, history_noise=0, guided_steps=(0, 6), forgets=False):
    """Latents of a whole video at once, all of it in memory."""
    graph, state = nnx.split(pipe.parts["denoiser"])
    schedule, (n, c) = pipe._schedule, (DIT.num_tokens, DIT.channels)
    steps = ddim_timesteps("uniform", SAMPLING.num_inference_steps, schedule.num_timesteps)
    sampler = AsynchronousDDIM(schedule=schedule, timesteps=tuple(map(int, steps)))
    frames = frame_schedule(num_frames, len(steps), lag, window=DIT.num_frames)
    behind = np.zeros(frames.num_rows, bool)  # by the first row of those that are run at once
    for start, stop in frames.parts():
        behind[start:stop] = forgets and frames.starts[start] > 0
    keys = jax.vmap(jax.random.fold_in, (None, 0))
    of_stream = [
        per_sample_normal(keys(fold(sample_keys([seed]), i)[0], np.arange(num_frames)), 0, (n, c))
        for i in (0, 1)
    ]

    @jax.jit
    def run(x, history):
        model = nnx.merge(graph, state)
        contexts = model.contexts(jnp.array([label, -1]))

        def denoise(x, times, step):
            cond, null = (model(x, times, context[None]) for context in contexts)
            first = jnp.asarray(frames.starts)[step]
            taken = jnp.asarray(frames.steps)[step, first + jnp.arange(x.shape[1])]
            is_guided = (guided_steps[0] <= taken) & (taken < guided_steps[1])
            scales = jnp.where(is_guided, SAMPLING.guidance_scale, 1)[:, None, None]
            guided = null + scales * (cond - null)
            return jnp.where(jnp.asarray(behind)[step], null, guided)

        options = {"history_noise": history_noise, "history": history}
        return sample_frames(denoise, sampler, x, frames, **options)[0]

    return run(*(x[None] for x in of_stream))


@pytest.mark.parametrize(
    ("num_frames", "lag", "history_noise", "temporal"),
    [(9, 5, 300, False), (4, 4, 0, True)],
)
def test_what_is_held_of_a_video_is_enough(num_frames, lag, history_noise, temporal):
    pipe = make(spread=0.1, vae=dataclasses.replace(VAE, temporal=temporal))
    options = {"num_frames": num_frames, "lag": lag, "history_noise": history_noise}
    latents = dense(pipe, 1, 5, **options)
    graph, state = nnx.split(pipe.parts["vae"])
    pixels = jax.jit(lambda x: nnx.merge(graph, state).decode(x))(latents)
    want = (255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    near(pipe(1, seed=5, **options), want)


def test_guidance_begins_and_ends_by_the_steps_of_each_frame():
    pipe = make(spread=0.1)
    options = {"num_frames": 4, "lag": 2}
    graph, state = nnx.split(pipe.parts["vae"])
    latents = dense(pipe, 1, 5, **options, guided_steps=(1, 3))
    pixels = jax.jit(lambda x: nnx.merge(graph, state).decode(x))(latents)
    want = (255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    found = pipe(1, seed=5, **options, guidance_interval=(0.2, 0.5))
    near(found, want)
    assert np.abs(np.asarray(pipe(1, seed=5, **options), int) - found).max() > 1
    none = pipe(1, seed=5, **options, guidance_interval=(0.5, 0.5))
    np.testing.assert_array_equal(none, pipe(1, seed=5, **options, guidance_scale=1))


def test_windows_behind_the_first_frame_read_no_prompt_where_that_says_how_a_video_begins():
    pipe = make(spread=0.1, prompt_windows="first")
    options = {"num_frames": 9, "lag": 4}
    graph, state = nnx.split(pipe.parts["vae"])
    latents = dense(pipe, 1, 5, **options, forgets=True)
    pixels = jax.jit(lambda x: nnx.merge(graph, state).decode(x))(latents)
    found = np.asarray(pipe(1, seed=5, **options))
    near(found, (255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    told = np.asarray(make(spread=0.1)(1, seed=5, **options), int)
    assert np.abs(told - found).max() > 1
    # Behind a window of given frames no class says anything.
    given = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    videos = pipe([0, 2], seed=[3, 3], video=given, num_frames=9, lag=4)
    np.testing.assert_array_equal(videos[0], videos[1])
    with pytest.raises(ValueError, match="prompt_windows must be all or first, got 'none'"):
        ARDiffusionConfig(prompt_windows="none")


def test_pixels_of_a_frame_need_the_latents_up_to_it_alone():
    graph, state = nnx.split(make(vae=dataclasses.replace(VAE, temporal=True)).parts["vae"])
    latents = jax.random.normal(jax.random.key(1), (1, 4, 3, 4))
    decode = jax.jit(lambda x, only: nnx.merge(graph, state).decode(x, only))
    whole = jax.jit(lambda x: nnx.merge(graph, state).decode(x))(latents)
    for i in range(4):
        some = latents.at[:, i + 1 :].set(0)  # what is not there yet
        np.testing.assert_allclose(decode(some, i)[:, 0], whole[:, i], atol=1e-5)


def test_memory_and_programs_do_not_grow_with_the_length(pipe):
    short = pipe(0, num_frames=9)
    with compilations("_advance") as programs, compilations("_decode") as more:
        stream = pipe.stream(0, num_frames=10**6)
        clips = [next(stream) for _ in range(5)]
        held = [sum(x.nbytes for x in jax.live_arrays())]
        for _ in range(20):
            next(stream)
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    np.testing.assert_array_equal(np.concatenate([clip.frames for clip in clips]), short[0, :5])
    assert held[1] < held[0] + 20 * 48  # latents of 20 frames would take as much
    assert programs == more == []


def test_steps_are_rows_which_are_told_one_by_one_and_change_no_bit(pipe):
    options = {"num_frames": 9, "lag": SAMPLING.lag, "seed": 3, "history_noise": 300}
    whole, told, said = pipe([0, 2], **options), [], []
    with compilations("_advance") as programs:
        found = pipe(
            [0, 2],
            **options,
            progress=lambda *news: said.append(news),
            callback_on_step_end=lambda *news: told.append(news),
        )
    assert programs == []
    np.testing.assert_array_equal(found, whole)
    num_rows = SAMPLING.num_inference_steps + 8 * SAMPLING.lag
    assert [news[1] for news in told] == list(range(num_rows))
    for _, _, timestep, known in told:
        assert timestep.shape == known["latents"].shape[1:2]  # of each frame that is held
    steps = [news[1] for news in said if news[0] == "steps"]
    assert steps == list(range(0, 2 * num_rows + 1, 2))
    assert said[-1] == ("clips", 18, 18)

    def stop(pipe, step, timestep, known):
        if step:
            raise KeyboardInterrupt
        return {"latents": 0 * known["latents"]}

    with pytest.raises(KeyboardInterrupt):
        pipe(0, callback_on_step_end=stop)


def test_videos_side_by_side_leave_frame_by_frame(pipe):
    clips = list(pipe.stream([0, 1, 2], num_frames=3, clips_per_batch=2))
    order = [(clip.sample, clip.index) for clip in clips]
    assert order == [(s, i) for i in range(3) for s in (0, 1)] + [(2, i) for i in range(3)]


def test_frames_leave_in_order_and_as_soon_as_they_are_done(pipe):
    whole = pipe("Archery", seed=1)
    clips = list(pipe.stream("Archery", seed=1))
    assert [(clip.sample, clip.index) for clip in clips] == [(0, i) for i in range(5)]
    np.testing.assert_array_equal(np.concatenate([clip.frames for clip in clips]), whole[0])


def test_given_frames_come_back_bit_for_bit(pipe):
    video = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    long = np.concatenate([video] * 4)  # more than the window has
    np.testing.assert_array_equal(pipe(0, video=long, num_frames=9)[0, :8], long)
    plain = pipe(0, video=video, num_frames=4)
    noisy = pipe(0, video=video, num_frames=4, history_noise=400)
    for got in (plain, noisy):
        np.testing.assert_array_equal(got[0, :2], video)
    assert not np.array_equal(plain[0, 2:], noisy[0, 2:])
    np.testing.assert_array_equal(pipe(0, image=video[0], num_frames=3)[0, 0], video[0])
    assert pipe(0, image=np.zeros((10, 14, 3), np.uint8), num_frames=3).shape == (1, 3, 8, 8, 3)


def test_a_reconstruction_is_the_vae_s_of_each_frame_by_itself(pipe, tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = pipe.reconstruct(video)
    assert found.shape == video.shape
    vae = pipe.parts["vae"]
    latents = unit(vae.encode(jnp.asarray(video[None, 1:2], jnp.float32) / 255))
    wanted = np.clip(np.round(np.asarray(vae.decode(latents))[0, 0] * 255), 0, 255)
    assert np.abs(found[1] - wanted).max() <= 1  # rounding
    with pytest.raises(UserError, match="video is uint8"):
        pipe.reconstruct(video[0])
    write_video(tmp_path / "in.webp", video, fps=pipe.config.fps)
    np.testing.assert_array_equal(pipe.reconstruct(tmp_path / "in.webp"), found)


def test_a_saved_pipeline_gives_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = dicode_jax.load(tmp_path / "model")
    assert isinstance(loaded, ARDiffusionPipeline)
    assert loaded.config == pipe.config
    np.testing.assert_array_equal(loaded(1, lag=0, num_frames=4), pipe(1, lag=0, num_frames=4))


def test_a_model_without_classes_takes_no_prompt():
    pipe = make(num_classes=0)
    assert pipe(num_frames=2, lag=6).shape == (1, 2, 8, 8, 3)
    assert pipe([None, ""], num_frames=2).shape == (2, 2, 8, 8, 3)
    with pytest.raises(UserError, match="takes no prompt, got 'Archery'"):
        pipe("Archery")


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("Diving", {}, "from 0 to 2 or a name, such as Archery"),
        (3, {}, "from 0 to 2"),
        (None, {}, "from 0 to 2"),
        (0, {"lag": 1}, r"4 \* lag must reach the 6 steps, so lag 2 at least"),
        (0, {"num_frames": 10**6 + 1}, "num_frames: want a whole number from 1 to 1000000"),
        (0, {"num_frames": 2.5}, "num_frames"),
        (0, {"clips_per_batch": 0}, "clips_per_batch"),
        (0, {"lag": 7}, "from 0 to the 6 steps"),
        (0, {"lag": 2.5}, "lag"),
        (0, {"num_inference_steps": 501}, "501"),
        (0, {"history_noise": 1000}, "history_noise"),
        (0, {"guidance_interval": (0.5, 0.2)}, "guidance_interval: want two numbers"),
        (0, {"guidance_interval": (0, 1), "guidance_scale": 1}, "guidance is off"),
        (0, {"image": np.zeros((8, 8, 3))}, "uint8"),
        (0, {"video": np.zeros((5, 8, 8, 3), np.uint8)}, "5 frames are given"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(pipe, prompt, options, words):
    with pytest.raises(UserError, match=words):
        pipe.stream(prompt, **options)


def test_parts_that_do_not_fit_are_refused():
    parts = {"denoiser": Denoiser(DenoiserConfig(dit=DIT), rngs=nnx.Rngs(0))}
    other = dataclasses.replace(VAE, num_tokens=2)
    parts["vae"] = FrameVAE(other, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="3 tokens of 4 numbers"):
        ARDiffusionPipeline(parts, config=ARDiffusionConfig())
