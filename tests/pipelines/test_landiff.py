"""Videos of a tiny LanDiff: clips, windows, given frames, tokens, and what cannot be."""

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from tiny import with_value
from tiny_landiff_pipeline import CONFIGS, make, video

import dicode_jax
from dicode_jax.errors import UserError
from dicode_jax.media import video as media
from dicode_jax.models.landiff import programs
from dicode_jax.pipelines import shelf
from dicode_jax.pipelines.landiff import LanDiffPipeline
from dicode_jax.pipelines.landiff_config import LanDiffConfig, LanDiffSamplingConfig

PROMPT, OTHER = "a red circle grows on a black background", "a blue cross"


@pytest.fixture(scope="module")
def pipe():
    return make()


@pytest.mark.slow
def test_a_sample_is_what_it_is_alone_and_clips_come_in_order(pipe):
    both = list(pipe.stream([PROMPT, OTHER], num_clips=2, seed=7))
    assert [(c.sample, c.index, len(c.frames)) for c in both] == [
        (0, 0, 17), (0, 1, 8), (1, 0, 17), (1, 1, 8),
    ]  # fmt: skip
    assert pipe.num_frames(2) == 25
    assert both[0].frames.shape[1:] == (*pipe.frame_size, 3) == (16, 24, 3)
    alone = pipe(OTHER, num_clips=2, seed=8, progress=False)
    assert alone.shape == (1, 25, 16, 24, 3)
    np.testing.assert_array_equal(alone[0], np.concatenate([c.frames for c in both[2:]]))
    assert both[0].frames.std() > 0
    assert not np.array_equal(both[0].frames, both[2].frames)


def test_what_steers_a_window_is_made_with_the_frames_before_it(monkeypatch):
    cfg = CONFIGS["denoiser"]
    upsampler = dataclasses.replace(cfg.upsampler, num_past=2)
    pipe = make(CONFIGS | {"denoiser": dataclasses.replace(cfg, upsampler=upsampler)})
    seen, begin = [], programs.begin_window

    def noted(graph, state, given):
        seen.append(np.asarray(given.semantic))
        return begin(graph, state, given)

    monkeypatch.setattr(programs, "begin_window", noted)
    tokenizer, denoiser = pipe.parts["semantic_tokenizer"], pipe.parts["denoiser"]
    tokens = np.random.default_rng(0).integers(0, 5, tokenizer.cfg.frames.count(7))
    pipe.decode(tokens)
    segments = [tokenizer.decode(jnp.asarray(part)[None]) for part in np.split(tokens, [5, 10])]
    whole = denoiser.semantic_latents(jnp.concatenate(segments, axis=1))
    assert np.std(whole) > 0.01
    for got, start in zip(seen, (0, 2), strict=True):  # segments have three frames
        np.testing.assert_allclose(got, whole[:, start : start + 5], atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_given_frames_come_back_bit_for_bit(pipe):
    given = video(9)
    plain = np.asarray(pipe("", video=given, seed=1))
    noisy = np.asarray(pipe("", video=given, seed=1, history_noise=400))
    for made in (plain, noisy):
        assert made.shape == (1, 17, 16, 24, 3)
        np.testing.assert_array_equal(made[0, :9], given)
    assert not np.array_equal(plain, noisy)


@pytest.mark.slow
def test_a_given_video_may_be_longer_than_what_the_language_model_sees(pipe):
    given = video(9)
    short = dataclasses.replace(pipe.config, max_segments=1)
    pipe = LanDiffPipeline(pipe.parts, config=short, text=pipe.text)
    made = np.asarray(pipe(PROMPT, video=given, num_clips=2, num_inference_steps=2))
    assert made.shape == (1, 25, 16, 24, 3)
    np.testing.assert_array_equal(made[0, :9], given)


@pytest.mark.slow
def test_tokens_are_painted_window_by_window(pipe):
    codes = np.asarray([0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 1, 2, 3], np.int64)  # 3 + 3 + 1 frames
    clips = [clip.frames for clip in pipe.decode_stream(codes, seed=3)]
    assert [len(frames) for frames in clips] == [17, 8]
    shorter = pipe.decode(codes[:9], seed=3)  # the first five frames
    np.testing.assert_array_equal(shorter[0], clips[0])
    again = [clip.frames for clip in pipe.decode_stream(codes, seed=3, carry="frames")]
    np.testing.assert_array_equal(again[0], clips[0])
    assert again[1].shape == clips[1].shape
    assert not np.array_equal(again[1], clips[1])


@pytest.mark.slow
def test_steps_of_windows_are_told_one_by_one_and_change_no_bit(pipe):
    codes = np.asarray([0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 1, 2, 3], np.int64)  # two windows
    options = {"seed": 3, "num_inference_steps": 3, "history_noise": 400}
    whole, told, said = pipe.decode(codes, **options), [], []
    with compilations("advance_window") as programs:
        found = pipe.decode(codes, **options, callback_on_step_end=lambda *x: told.append(x))
        again = pipe.decode(codes, **options, progress=lambda *x: said.append(x))
    assert programs == []
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(again, whole)
    assert [(step, time) for _, step, time, _ in told] == [(0, 999), (1, 666), (2, 333)] * 2
    assert [known["latents"].shape[1] for *_, known in told] == [5] * 3 + [5] * 3
    assert said == [("steps", done, 6) for done in range(7)]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.decode(codes, **options, callback_on_step_end=stop)


@pytest.mark.slow
def test_a_video_goes_through_tokens_and_back(pipe, tmp_path):
    frames = video(17)
    codes = pipe.encode(frames)
    assert codes.dtype == np.int32
    assert len(codes) == 9  # 3 + 1 + 1, 3 + 1
    # A segment knows nothing of the one before.
    np.testing.assert_array_equal(codes[:5], pipe.encode(frames[:9]))
    media.write_video(tmp_path / "in.webp", frames, fps=8)
    np.testing.assert_array_equal(pipe.encode(tmp_path / "in.webp"), codes)
    np.testing.assert_array_equal(pipe.reconstruct(frames, seed=2), pipe.decode(codes, seed=2))


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_gives_the_same_whole_or_part_by_part(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    want = pipe(PROMPT, num_clips=2, seed=4)
    loaded = dicode_jax.load(tmp_path / "model")
    assert isinstance(loaded, LanDiffPipeline)
    assert loaded.config == pipe.config
    np.testing.assert_array_equal(loaded(PROMPT, num_clips=2, seed=4), want)
    apart = LanDiffPipeline.from_pretrained(tmp_path / "model", offload=True)
    np.testing.assert_array_equal(apart(PROMPT, num_clips=2, seed=4), want)
    with pytest.raises(UserError, match="copy the folder"):
        apart.save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="T5 overflows in float16"):
        LanDiffPipeline.from_pretrained(tmp_path / "model", dtype=jnp.float16)


def test_text_to_video_needs_no_encoder_of_frames(pipe):
    parts = {name: part for name, part in pipe.parts.items() if name != "features"}
    pipe = LanDiffPipeline(parts, config=pipe.config, text=pipe.text)
    for call in (lambda: pipe.encode(video(9)), lambda: pipe.stream("", image=video(1)[0])):
        with pytest.raises(UserError, match="cannot read frames: it has no encoder of features"):
            call()
    pipe.stream(PROMPT)  # is begun by whoever reads it


def test_without_features_the_tokenizer_s_encoder_is_neither_read_nor_missed(pipe, tmp_path):
    kept = {name: pipe.parts[name] for name in ("text_encoder", "language_model", "denoiser")}
    kept |= {name: pipe.parts[name] for name in ("vae", "semantic_tokenizer")}
    LanDiffPipeline(kept, config=pipe.config, text=pipe.text).save_pretrained(tmp_path / "a")
    LanDiffPipeline.check_folder(tmp_path / "a")
    loaded = LanDiffPipeline.from_pretrained(tmp_path / "a")
    assert loaded.parts["semantic_tokenizer"].encoder is None
    with pytest.raises(ValueError, match="has no encoder"):
        loaded.parts["semantic_tokenizer"].encode(jnp.zeros((1, 1, 2, 3, 8)))
    loaded.save_pretrained(tmp_path / "b")
    LanDiffPipeline.check_folder(tmp_path / "b")
    a, b = (shelf.part_bytes(tmp_path / x / "semantic_tokenizer", jnp.float32) for x in "ab")
    assert b < a
    assert b == shelf.part_bytes(tmp_path / "a/semantic_tokenizer", jnp.float32, ("encoder.",))


def test_one_warning_says_which_words_are_lost(pipe):
    words = "a large red circle moves in a circle on a black background a"
    long = f"{words} {words}"
    with pytest.warns(UserWarning, match="has 27 tokens") as caught:
        pipe.stream(long)
    assert [str(one.message) for one in caught] == [
        "the prompt has 27 tokens; the language model reads the first 16 and leaves out: red circle"
        " moves in a circle on a black background a; the painter reads the first 15 and leaves out:"
        " large red circle moves in a circle on a black background a"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.stream(PROMPT)


def test_a_clip_that_is_not_finite_is_refused_and_not_shown_black(pipe):
    broken = LanDiffPipeline(
        {**pipe.parts, "denoiser": with_value(pipe.parts["denoiser"], np.inf)},
        config=pipe.config,
        text=pipe.text,
    )
    with pytest.raises(UserError, match="sample 0 came out as NaN or infinite numbers"):
        broken.decode(np.zeros(9, np.int32), seed=3)


@pytest.mark.parametrize(
    ("part", "call", "words"),
    [
        ("language_model", lambda pipe: pipe(PROMPT), "the language model gave NaN or infinite"),
        ("features", lambda pipe: pipe.encode(video(1)), "the encoder of features gave NaN"),
        ("semantic_tokenizer", lambda pipe: pipe.encode(video(1)), "the semantic tokenizer gave"),
    ],
)
def test_no_token_is_made_of_what_is_not_finite(pipe, part, call, words):
    parts = {**pipe.parts, part: with_value(pipe.parts[part], np.nan)}
    broken = LanDiffPipeline(parts, config=pipe.config, text=pipe.text)
    with pytest.raises(UserError, match=words):
        call(broken)


def test_a_file_is_gone_on_from_by_its_last_frames(pipe, tmp_path):
    media.write_video(tmp_path / "in.webp", video(12), fps=8)
    frames, count = pipe.read_end(tmp_path / "in.webp")
    assert count == 12
    np.testing.assert_array_equal(frames, video(12)[3:])
    media.write_video(tmp_path / "short.webp", video(3), fps=8)
    frames, count = pipe.read_end(tmp_path / "short.webp")
    assert count == 3
    np.testing.assert_array_equal(frames, video(3)[2:])


def test_how_far_a_file_is_read_is_told(pipe, tmp_path):
    media.write_video(tmp_path / "long.mp4", video(9).repeat(8, 0), fps=8)
    told = []
    pipe.read_end(tmp_path / "long.mp4", lambda *given: told.append(given))
    assert told == [("frames read", done, 72) for done in (0, 32, 64)]


@pytest.mark.parametrize(
    "name", ["num_clips", "guidance_scale", "motion_score", "temperature", "top_k", "top_p"]
)
def test_what_writes_tokens_is_refused_where_they_are_given(pipe, name):
    with pytest.raises(UserError, match=f"{name} is of writing tokens, which are given here"):
        pipe.decode_stream(np.zeros(9, np.int32), PROMPT, **{name: 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "a prompt is text"),
        ({"prompt": "a pink horse"}, "words that the model has never seen: pink, horse"),
        ({"num_clips": 0}, "num_clips: want a whole number"),
        ({"num_clips": 9}, "positions of the language model, which has 80"),
        ({"top_k": 3, "top_p": 0.5}, "exclude each other"),
        ({"top_k": 13}, "top_k is at most 12"),
        ({"num_inference_steps": 1}, "must be in 2..1000, got 1"),
        ({"history_noise": 1000}, "history_noise"),
        ({"temperature": 1e-7}, "temperature: want a finite number of at least 1e-06"),
        ({"carry": "pixels"}, "carry: want latents or frames"),
        ({"eta": 1.0}, "there is no option eta; there are num_clips, guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"image": np.zeros((2, 2, 3))}, "an image is uint8"),
        ({"image": np.zeros((2, 2, 3), np.uint8), "video": video(1)}, "not both"),
        ({"video": video(13)}, r"8 m \+ 1\), so that none is lost, got 13"),
        ({"video": video(17)}, "goes on from at most 9 frames, got 17"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(pipe, options, words):
    with pytest.raises(UserError, match=words):
        pipe.stream(**{"prompt": PROMPT} | options)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([0.5] * 9, "whole numbers"),
        ([[0] * 9], "whole numbers"),
        ([0] * 8 + [5], "codes from 0 to 4, got 5"),
        ([0] * 7, "7 tokens make no video"),
        ([0] * 4, "4 tokens are 2 semantic frames"),
    ],
)
def test_tokens_of_no_video_are_refused(pipe, codes, words):
    with pytest.raises(UserError, match=words):
        pipe.decode_stream(np.asarray(codes))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("semantic_tokenizer", {"codebook_size": 6}, "their codes are 5 and 6"),
        ("vae", {"z_channels": 3}, "channels of latents are 2 and 3"),
        ("vae", {"time_factor": 2}, "semantic frame are 2 and 4"),
        ("language_model", {"text_dim": 5}, "language model's text are 5 and 6"),
        ("features", {"patch_size": 4}, r"grid of features are \(2, 3\) and \(4, 6\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(pipe, name, changes, words):
    configs = CONFIGS | {name: dataclasses.replace(CONFIGS[name], **changes)}
    with pytest.raises(UserError, match=words):
        pipe.check_fit(pipe.config, configs)


@pytest.mark.parametrize(
    "make_config",
    [
        lambda: LanDiffConfig(prefix_latents=4),
        lambda: LanDiffConfig(text_length=1),
        lambda: LanDiffConfig(max_segments=0),
        lambda: LanDiffSamplingConfig(top_k=1, top_p=0.5),
        lambda: LanDiffSamplingConfig(temperature=1e-9),
    ],
)
def test_impossible_configs_are_refused(make_config):
    with pytest.raises(UserError):
        make_config()


def test_the_size_of_what_is_remembered_is_known_before(pipe):
    # 2 layers' worth of k and v: 1 layer, 2 rows, 2 heads of 4 numbers, float32.
    for clips, frames in ((1, 5), (3, 9)):
        positions = 3 + 16 + pipe.parts["language_model"].cfg.frames.count(frames) + 2 * frames
        assert pipe.cache_bytes(clips) == 2 * 2 * positions * 2 * 4 * 4 + 4
        assert pipe.cache_bytes(clips, is_guided=False) == 2 * positions * 2 * 4 * 4 + 4
    longer = dataclasses.replace(pipe.config, text_length=40)
    longer = LanDiffPipeline(pipe.parts, config=longer, text=pipe.text)
    assert longer.cache_bytes(1) > longer.cache_bytes(1, PROMPT) == pipe.cache_bytes(1)


@pytest.mark.parametrize("count", [-5, 0, 10**9, 1.5, "2"])
def test_an_impossible_number_of_clips_has_no_frames_and_no_size(pipe, count):
    for call in (pipe.num_frames, pipe.cache_bytes):
        with pytest.raises(UserError, match="num_clips: want a whole number from 1 to 1000000"):
            call(count)


def test_what_is_not_known_is_told_with_all_that_is(pipe):
    with pytest.raises(UserError, match=r"does not know negative_prompt; .* takes guid.*, carry, "):
        pipe(PROMPT, negative_prompt="a square")


def test_what_runs_together_needs_room_together(pipe, monkeypatch):
    sizes = {"text_encoder": 6_000, "denoiser": 5_400, "semantic_tokenizer": 350, "vae": 430}
    sizes = {name: 10**6 * size for name, size in sizes.items()} | {"language_model": 4_100_000}
    room = lambda size: lambda device: (size, size)  # noqa: E731
    apart = LanDiffPipeline(
        pipe.parts, config=pipe.config, text=pipe.text, shelf=shelf.OnDisk(None, sizes)
    )
    monkeypatch.setattr(shelf.memory, "available", room(6_100_000_000))
    apart.decode_stream(np.zeros(9, np.int32), PROMPT)
    words = "semantic_tokenizer and denoiser and vae together take 6.18 GB, and the CPU has 6.1 GB"
    with pytest.raises(UserError, match=words):
        apart.decode_stream(np.zeros(9, np.int32), PROMPT, carry="frames")
    sizes["text_encoder"] = sizes["denoiser"] = 0
    cache = pipe.cache_bytes(2)
    monkeypatch.setattr(shelf.memory, "available", room(440_000_000))
    sizes["language_model"] = 440_000_000 - cache
    apart.stream(PROMPT, num_clips=2)
    sizes["language_model"] += 1
    with pytest.raises(UserError, match=r"2 clips beside 0.44 GB of its weights, and 0.44 GB are"):
        apart.stream(PROMPT, num_clips=2)
    pipe.stream(PROMPT, num_clips=2)  # whose weights are there already


def test_parts_that_memory_cannot_hold_are_told_with_their_sizes(monkeypatch):
    class Device:
        platform = "gpu"

    sizes = {"text_encoder": 9_500_000_000, "vae": 430_000_000}
    for free, offload, words in (
        (
            9_900_000_000,
            False,
            "the parts take 9.93 GB .*text_encoder 9.5, vae 0.43.* GPU has 9.9 ",
        ),
        (9_400_000_000, True, "text_encoder alone takes 9.5 GB, and the GPU has 9.4 GB free"),
    ):
        monkeypatch.setattr(shelf.memory, "available", lambda device, free=free: (free, free))
        with pytest.raises(UserError, match=words):
            shelf.check_room(sizes, [Device()], offload=offload)
        shelf.check_room(sizes, [Device()] * 2, offload=False)  # split over both
    monkeypatch.setattr(shelf.memory, "available", lambda device: (9_600_000_000,) * 2)
    shelf.check_room(sizes, [Device()], offload=True)
    monkeypatch.setattr(shelf.memory, "available", lambda device: None)
    shelf.check_room(sizes, [Device()], offload=False)
