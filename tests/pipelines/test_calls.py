"""One way to call every pipeline: videos in order, given frames, and a line for what cannot be."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_ar_diffusion
from compilations import compilations
from PIL import Image
from tiny import NUM_FRAMES, NUM_TOKENS, TOKEN_DIM, tiny_pipeline

from dicode_jax.diffusion import guided
from dicode_jax.errors import UserError
from dicode_jax.media.videos import Videos
from dicode_jax.pipelines import progress
from dicode_jax.pipelines.dicode import DiCoDePipeline

A, B = "a red circle grows on a navy background", "a blue cross grows on a gray background"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def close(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_each_prompt_has_its_videos_one_after_the_other(pipe):
    videos = pipe([A, B], num_videos_per_prompt=2, seed=5)
    assert isinstance(videos, Videos)
    assert [(video.prompt, video.seed) for video in videos] == [(A, 5), (A, 6), (B, 7), (B, 8)]
    for video in videos:
        assert close(video, pipe(video.prompt, seed=video.seed))
    own = [pipe.generate_tokens(video.prompt, seed=video.seed)[0] for video in videos]
    np.testing.assert_array_equal([video.tokens for video in videos], own)
    record = videos[1].record
    assert (record["kind"], record["prompt"], record["seed"]) == ("dicode", A, 6)
    assert record["dtype"] == "float32"


def test_a_video_begins_with_the_given_image_and_ends_with_the_last_one(pipe):
    encoded = pipe.encode(IMAGES)
    begun = pipe(A, image=IMAGES[0], num_clips=2, seed=1)
    np.testing.assert_array_equal(begun.tokens[0], encoded[0])
    free = pipe(A, num_clips=2, seed=1)
    assert not np.allclose(begun.tokens[1], free.tokens[1])  # the language model has seen it
    assert begun.shape == (1, 2 * NUM_FRAMES, 16, 16, 3)
    both = pipe(A, image=IMAGES[0], last_image=IMAGES[1], num_clips=2, seed=1)
    np.testing.assert_array_equal(both.tokens[[0, 2]], encoded)
    np.testing.assert_array_equal(both.tokens[1], begun.tokens[1])
    between = pipe(image=[IMAGES[0], IMAGES[1]], last_image=IMAGES[1], seed=1)
    np.testing.assert_array_equal(between[0].tokens, encoded)
    np.testing.assert_array_equal(between[1].tokens, encoded[[1, 1]])
    assert close(between[0], pipe.decode(encoded, seed=1))
    assert "image_sha256" in both.record


def test_a_video_goes_on_behind_its_last_frame(pipe, tmp_path):
    given = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    longer = pipe(A, video=given, num_clips=2, seed=2)
    assert longer.shape == (1, 7 + 2 * NUM_FRAMES, 16, 16, 3)
    np.testing.assert_array_equal(longer.frames[:7], given)
    known = pipe.encode(given, keyframes=[2, 6])
    np.testing.assert_array_equal(longer.tokens[:2], known)
    want = pipe.generate_tokens(A, num_clips=2, seed=2, prefix=known[None])
    np.testing.assert_array_equal(longer.tokens, want[0])
    assert close(longer.frames[7:], pipe.decode(want[0, 1:], seed=2))
    many = np.zeros((8 * NUM_FRAMES, 16, 16, 3), np.uint8)  # more than the tables hold
    assert len(pipe(A, video=many).tokens) == 5 + 1
    wide = np.zeros((2, 20, 30, 3), np.uint8)
    assert pipe("", video=wide).shape == (1, 2 + NUM_FRAMES, 16, 16, 3)


def test_other_outputs_are_what_the_frames_are_painted_from(pipe):
    video = pipe(A, seed=4, num_clips=2)
    tokens = pipe(A, seed=4, num_clips=2, output_type="tokens")
    np.testing.assert_array_equal(tokens[0], video.tokens)
    ((first, *_),) = pipe(A, seed=4, num_clips=2, output_type="pil")
    assert isinstance(first, Image.Image)
    assert close(first, video.frames[0])


@pytest.mark.slow
@pytest.mark.long
def test_latents_are_those_of_the_frames(pipe):
    latents = pipe(A, seed=4, num_clips=2, output_type="latent")
    assert latents.shape == (1, 2 * NUM_FRAMES, 8, 8, 4)
    pixels = np.asarray(pipe.decoder.autoencoder.decode_latents(jnp.asarray(latents)))
    frames = pipe(A, seed=4, num_clips=2)
    assert close(np.clip((pixels + 1) * 127.5, 0, 255).round(), frames)


def draw(pipe, **options):
    return pipe(A, seed=1, output_type="tokens", **options)


def test_temperature_reaches_the_language_model(pipe):
    assert not np.array_equal(draw(pipe, temperature=1e-3), draw(pipe, temperature=1e3))
    with pytest.raises(UserError, match="language model is not guided"):
        draw(pipe, negative_prompt=B)


@pytest.mark.slow
@pytest.mark.long
def test_a_negative_prompt_reaches_the_language_model(pipe):
    generation = dataclasses.replace(pipe.config.generation, guidance_scale=2.0)
    config = dataclasses.replace(pipe.config, generation=generation)
    guided = DiCoDePipeline(**pipe.parts, text=pipe.text, config=config)
    np.testing.assert_array_equal(draw(guided), draw(guided, negative_prompt=""))
    assert not np.array_equal(draw(guided), draw(guided, negative_prompt=B))


def test_a_call_tells_of_each_clip_and_of_progress(pipe):
    told, said = [], []
    videos = pipe(
        [A, B],
        num_clips=2,
        callback_on_clip_end=lambda *args: told.append(args),
        progress=lambda *args: said.append(args),
    )
    assert [(who, done, total) for who, done, total, _ in told] == [
        (pipe, done, 4) for done in (1, 2, 3, 4)
    ]
    assert close(told[2][3].frames, videos[1].frames[:NUM_FRAMES])
    assert said[-1] == ("clips", 4, 4)
    assert ("keyframes", 2, 2) in said
    steps = [done for what, done, total in said if what == "steps"]
    total = 4 * pipe.config.sampling.num_inference_steps
    assert (steps[0], steps[-1]) == (0, total)
    assert steps == sorted(set(steps))
    assert ("steps", total, total) in said

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(A, callback_on_clip_end=stop)


def test_nobody_listens_to_false_and_a_bar_is_of_a_whole_call(pipe):
    tokens = pipe.generate_tokens(A, seed=2, progress=False)[0]
    np.testing.assert_array_equal(
        pipe.decode(tokens, seed=2, progress=False), pipe.decode(tokens, seed=2)
    )
    for work in (
        lambda: pipe.generate_tokens(A, progress=True),
        lambda: pipe.decode(tokens, progress=True),
        lambda: next(iter(pipe.decode_stream(tokens, progress="bar"))),
        lambda: next(iter(pipe.stream(A, progress=True))),
    ):
        with pytest.raises(UserError, match=r"a function of \(what, done, total\) here, or False"):
            work()


def test_steps_are_told_one_by_one_and_change_neither_a_bit_nor_a_program(pipe):
    tokens = pipe.generate_tokens(A, num_clips=3, seed=2)[0]
    whole, told = pipe.decode(tokens, seed=2), []

    def callback(who, step, timestep, known):
        told.append((who, step, timestep, known["latents"].shape))

    with compilations("_denoise") as programs:
        clips = list(pipe.decode_stream(tokens, seed=2, callback_on_step_end=callback))
        told_of = list(pipe.decode_stream(tokens, seed=2, progress=lambda *_: None))
    assert programs == []
    for found in (clips, told_of):
        np.testing.assert_array_equal(np.concatenate([clip.frames for clip in found]), whole)
    grid = guided.make_grid(pipe.decoder.cfg.schedule, pipe.config.sampling)
    wanted = [  # three clips in micro-batches of two, of which the last one is filled up
        (pipe, i, int(t), (count, NUM_FRAMES, 8, 8, 4))
        for count in (2, 1)
        for i, t in enumerate(grid[:-1])
    ]
    assert told == wanted


def test_a_callback_may_stop_a_call_and_put_other_latents(pipe):
    plain, kept = pipe(A, seed=3), []

    def negate(_, step, timestep, known):
        return {"latents": -known["latents"]} if step == 0 else None

    def stop(_, step, timestep, known):
        kept.append(step)
        if step == 1:
            raise KeyboardInterrupt

    other = pipe(A, seed=3, callback_on_step_end=negate)
    assert not close(other, plain)
    np.testing.assert_array_equal(pipe(A, seed=3), plain)
    with pytest.raises(KeyboardInterrupt):
        pipe(A, seed=3, callback_on_step_end=stop)
    assert kept == [0, 1]
    with pytest.raises(UserError, match="callback_on_step_end gave latents of shape"):
        pipe(A, callback_on_step_end=lambda *_: {"latents": np.zeros(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: want a whole number from 1"),
        ({"seed": [1]}, r"seed: 1 seeds for 2 sample\(s\)"),
        ({"output_type": "mp4"}, "output_type: want np or pil or latent or tokens, got 'mp4'"),
        ({"height": 32}, "height: this model paints 16 x 16 pixels alone, got 32"),
        ({"width": 0}, "width: want a whole number from 1"),
        ({"num_clips": True}, "num_clips: want a whole number"),
        ({"last_image": IMAGES[0]}, "last_image goes with image"),
        ({"image": IMAGES[0], "video": IMAGES}, "an image or a video to go on from, not both"),
        ({"image": "no such.png"}, "no such.png"),
        ({"temperature": 0}, "temperature: want a finite number"),
        ({"temperature": 1e-7}, "temperature: want a finite number of at least 1e-06"),
        ({"num_frames": 3}, "num_frames must be even"),
        ({"steps": 3}, "there is no option steps of sampling"),
    ],
)
def test_an_impossible_call_is_one_line(pipe, options, message):
    with pytest.raises(UserError, match=message) as caught:
        pipe([A, B], **options)
    assert "\n" not in str(caught.value)


def test_ar_diffusion_is_called_the_same_way_and_says_what_it_cannot():
    pipe = tiny_ar_diffusion.make()
    videos = pipe(["Archery", 2], num_videos_per_prompt=2, seed=3, num_frames=3)
    assert [(video.prompt, video.seed) for video in videos] == [
        ("Archery", 3), ("Archery", 4), ("2", 5), ("2", 6),
    ]  # fmt: skip
    assert videos.shape == (4, 3, 8, 8, 3)
    np.testing.assert_array_equal(videos[3], pipe(2, seed=6, num_frames=3)[0])
    picture = Image.fromarray(IMAGES[0, :8, :8])
    for options, line in (
        (
            {"last_image": picture},
            "ARDiffusionPipeline does not know last_image; beside prompt and .* history_noise, lag",
        ),
        ({"num_clips": 2}, "does not know num_clips"),
        ({"negative_prompt": "x"}, "does not know negative_prompt"),
        ({"output_type": "latent"}, "does not know latent"),
        ({"eta": 1.0}, "there is no option eta; there are"),
        ({"image": list(IMAGES)}, "2 image|one image for all prompts"),
    ):
        with pytest.raises(UserError, match=line):
            pipe([0, 1], **options)


def test_a_pipeline_prints_its_parts_and_sizes(pipe, tmp_path):
    head, *parts = repr(pipe).splitlines()
    assert head == "DiCoDePipeline: 16 x 16 pixels at 2 frames a second"
    count = NUM_TOKENS * TOKEN_DIM  # of the null tokens, among others
    assert [line.split()[0] for line in parts] == ["tokenizer", "decoder", "language_model"]
    sizes = [int(line.split()[1].replace(",", "")) for line in parts]
    assert min(sizes) > count
    pipe.save_pretrained(tmp_path / "small")
    loaded = DiCoDePipeline.from_pretrained(tmp_path / "small")
    assert repr(loaded).startswith("DiCoDePipeline small: 16")
    assert str(tmp_path) not in repr(loaded)


class FakeTerminal:
    written = ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_asked", [True, False])
def test_bars_say_how_long_the_compiler_has_been_at_work(monkeypatch, is_asked):
    from jax import monitoring

    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    looks = []
    with progress.shown(is_asked) as tell:
        tell("clips", 0, 4)
        monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_to_mlir_module_duration", 1)
        while is_asked and "compiling, 0 s" not in terminal.written and len(looks) < 500:
            looks.append(progress.time.sleep(0.01))
        monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1)
        tell("clips", 3, 4)
    assert ("clips (compiling, 0 s)" in terminal.written) is is_asked
    assert ("3/4" in terminal.written) is is_asked
    assert is_asked or not terminal.written


def test_the_bar_of_steps_says_which_clip_it_is(monkeypatch):
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.shown() as tell:
        for news in (("clips", 0, 3), ("steps", 0, 12), ("steps", 5, 12), ("clips in a", 1, 3)):
            tell(*news)
    assert "clip 1 of 3, steps: " in terminal.written
    assert "5/12" in terminal.written
    assert "clip 2 of 3 in a, steps: " in terminal.written


def test_nothing_is_written_where_nobody_looks(capsys):
    with progress.shown() as tell:
        assert progress.heard(tell) is None  # so that clips are painted in one call
        tell("clips", 1, 2)
    assert capsys.readouterr().err == ""
