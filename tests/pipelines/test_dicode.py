"""DiCoDePipeline: what depends on what, round trips, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from PIL import Image
from tiny import (
    NUM_FRAMES,
    NUM_TOKENS,
    TOKEN_DIM,
    tiny_pipeline,
    with_latent_prior,
    with_value,
)

from dicode_jax import config as config_lib
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.decoder import (
    ClipDecoder,
    decode_clip,
    decode_latents,
    to_uint8,
)
from dicode_jax.nn.rngs import sample_keys
from dicode_jax.pipelines import dicode as pipelines_dicode
from dicode_jax.pipelines import dicode_programs
from dicode_jax.pipelines.dicode import DiCoDePipeline, GenerationConfig, PipelineConfig
from dicode_jax.storage import weights
from dicode_jax.text.gpt import learn

PROMPTS = [
    "a red circle moves right on a black background",
    "a small blue cross grows on a gray background",
    "a white square stays still on a navy background",
]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def videos(pipe):
    return pipe(PROMPTS, num_clips=2, seed=3)


@pytest.fixture
def pipe_about_tokens():
    """One whose UNet paints about what deep tokens show."""
    pipe = tiny_pipeline()
    pipe.decoder = ClipDecoder(with_latent_prior(pipe.decoder.cfg), rngs=nnx.Rngs(0))
    return pipe


VIDEO = np.zeros((4, 8, 8, 3), np.uint8)
TOKENS = np.zeros((2, NUM_TOKENS, TOKEN_DIM), np.float32)


def close(a, b):
    """Equal up to one level: sums run in another order in another batch size."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_video_has_all_clips_of_all_prompts(videos):
    assert videos.shape == (3, 2 * NUM_FRAMES, 16, 16, 3)
    assert videos.dtype == np.uint8
    assert np.asarray(videos).std() > 0


@pytest.mark.slow
def test_sample_of_a_batch_is_that_prompt_alone_with_its_own_seed(pipe, videos):
    for i, prompt in enumerate(PROMPTS):
        assert close(pipe(prompt, num_clips=2, seed=3 + i)[0], videos[i])
    again = pipe(PROMPTS[::-1], num_clips=2, seed=np.array([5, 4, 3]))
    assert close(again[::-1], videos)
    tokens = pipe.generate_tokens(PROMPTS, num_clips=2, seed=3)
    assert close(pipe.decode(tokens[1], seed=4), videos[1])
    assert close(pipe.decode(tokens[::2], seed=[3, 5]), videos[::2])


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_tokens_are_the_same_bits_in_a_batch_of_any_size(pipe, guidance_scale):
    generation = dataclasses.replace(pipe.config.generation, guidance_scale=guidance_scale)
    config = dataclasses.replace(pipe.config, generation=generation)
    text = {"text": pipe.text, "config": config}
    guided = DiCoDePipeline(**pipe.parts, **text)
    prompts = [*PROMPTS, "a red circle grows on a navy background", PROMPTS[0]]
    alone = [guided.generate_tokens(p, num_clips=2, seed=7 + i) for i, p in enumerate(prompts)]
    for count in (2, 3, 5):
        tokens = guided.generate_tokens(prompts[:count], num_clips=2, seed=7)
        np.testing.assert_array_equal(tokens, np.concatenate(alone[:count]))
    assert not np.array_equal(alone[0], alone[4])  # the same prompt, another seed


def test_first_sample_draws_as_it_always_did():
    """From the seed and place 0 of the batch, from which all samples were folded once."""
    for seed in (0, 5, 2**32 - 1):
        want = jax.random.fold_in(jax.random.key(seed), 0)
        (got,) = sample_keys([seed])
        np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(want))


def test_first_clip_does_not_depend_on_how_many_follow(pipe, videos):
    assert close(pipe(PROMPTS[0], num_clips=1, seed=3)[0], videos[0, :NUM_FRAMES])


def test_same_seed_repeats_and_another_seed_differs(pipe, videos):
    again = pipe(PROMPTS, num_clips=2, seed=3)
    np.testing.assert_array_equal(again, videos)
    assert not close(pipe(PROMPTS, num_clips=2, seed=4), videos)


def test_saved_pipeline_gives_the_same_video(pipe, videos, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiCoDePipeline.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(loaded(PROMPTS, num_clips=2, seed=3), videos)


@pytest.mark.slow
@pytest.mark.long
def test_weights_are_kept_in_the_type_that_is_asked_for(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    half = DiCoDePipeline.from_pretrained(
        tmp_path / "model", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    for module in half.parts.values():
        types = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(module))}
        assert types == {"bfloat16"}
    video = half(PROMPTS[0], seed=3)
    assert video.shape == (1, NUM_FRAMES, 16, 16, 3)


def test_video_of_any_size_is_encoded_and_painted_again(pipe):
    video = np.random.default_rng(0).integers(0, 256, (7, 20, 30, 3), dtype=np.uint8)
    tokens = pipe.encode(video, keyframes=[0, 3, 6])
    assert tokens.shape == (3, NUM_TOKENS, TOKEN_DIM)
    assert pipe.decode(tokens).shape == (2 * NUM_FRAMES, 16, 16, 3)
    assert pipe.reconstruct(video).shape == (NUM_FRAMES, 16, 16, 3)


def test_each_clip_is_painted_of_its_own_two_keyframes_with_a_key_of_its_own(pipe):
    tokens = pipe.generate_tokens(PROMPTS[0], num_clips=3, seed=3)
    painted = pipe.decode(tokens[0], seed=3).reshape(3, NUM_FRAMES, 16, 16, 3)
    sample = jax.random.fold_in(jax.random.key(3), 0)
    for clip in range(3):
        key = jax.random.fold_in(sample, 1 + clip)[None]
        pair = jnp.asarray(tokens[:, clip : clip + 2])
        latents = decode_clip(pipe.decoder, pair, key, pipe.config.sampling)
        assert close(np.asarray(to_uint8(decode_latents(pipe.decoder, latents)))[0], painted[clip])
    for other in (1, 2):
        assert not close(painted[0], painted[other])


def test_clips_of_equal_tokens_have_noise_of_their_own(pipe):
    first, second = pipe.decode(np.ones((3, NUM_TOKENS, TOKEN_DIM)), seed=3).reshape(2, -1)
    assert not close(first, second)


@pytest.fixture(scope="module")
def tokens_of(pipe):
    """What the module itself makes of each frame, of pixels in [-1, 1]."""
    graph, state = nnx.split(pipe.tokenizer)
    encode = jax.jit(lambda state, x: nnx.merge(graph, state)(x[None, None])[0, 0])
    return lambda frames: np.stack([encode(state, jnp.asarray(x, jnp.float32)) for x in frames])


def test_the_first_and_the_last_frame_are_encoded_in_minus_one_to_one(pipe, tokens_of):
    video = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    want = tokens_of(video / 127.5 - 1)
    np.testing.assert_allclose(pipe.encode(video), want[[0, 4]], rtol=1e-5, atol=1e-5)
    got = pipe.encode(video, [1, -2, 0])
    np.testing.assert_allclose(got, want[[1, 3, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_frames_of_another_size_are_resized_as_the_tokenizer_says(pipe, tokens_of, resize):
    tokenizer = nnx.merge(*nnx.split(pipe.tokenizer))
    tokenizer.cfg = dataclasses.replace(tokenizer.cfg, resize=resize, antialias=True)
    video = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    video[:, :, 4:12] = video[:, :, 36:44] = 128  # the filter of a crop looks over its edge
    seen = video[:, :, 8:40] if resize == "crop" else video
    bands = [Image.fromarray(frame[..., c]).convert("F") for frame in seen for c in range(3)]
    small = [x.resize((16, 16), Image.Resampling.BILINEAR) for x in bands]
    frames = np.reshape(small, (2, 3, 16, 16)).transpose(0, 2, 3, 1)
    got = changed(pipe, tokenizer=tokenizer).encode(video)
    np.testing.assert_allclose(got, tokens_of(frames / 127.5 - 1), atol=1e-5)


def test_keyframes_are_encoded_each_alone(pipe):
    video = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    tokens = pipe.encode(video, keyframes=[0, 1, 2, 3])
    np.testing.assert_allclose(pipe.encode(video, keyframes=[2, 0]), tokens[[2, 0]], atol=1e-6)


def test_frames_that_come_one_by_one_are_encoded_once_each(pipe, monkeypatch):
    video = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    tokens, encode, calls = pipe.encode(video), pipelines_dicode._encode, []
    monkeypatch.setattr(pipelines_dicode, "_encode", lambda *x: calls.append(x) or encode(*x))
    first, last = video
    got = pipe.encode_frames(iter([first, first, first, last]))
    np.testing.assert_array_equal(got, tokens[[0, 0, 0, 1]])
    assert len(calls) == 2
    for frames, message in (
        ([], "a clip needs two keyframes, got 0"),
        ([first], "a clip needs two keyframes, got 1"),
        ([first, last[..., 0]], r"a keyframe is uint8 \[h, w, 3\], got uint8 \(20, 30\)"),
        ([first, last / 255], r"a keyframe is uint8 \[h, w, 3\], got float64"),
        ([None, first], r"a keyframe is uint8 \[h, w, 3\], got object"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.encode_frames(frames)


@pytest.mark.slow
def test_guidance_and_steps_change_the_video(pipe, videos):
    tokens = pipe.generate_tokens(PROMPTS[0], seed=3)[0]
    default = pipe.decode(tokens)
    assert not close(pipe.decode(tokens, num_inference_steps=3), default)
    assert not close(pipe.decode(tokens, guidance_scale=1.0), default)


def test_another_guidance_scale_compiles_nothing(pipe):
    tokens = pipe.generate_tokens(PROMPTS[0], seed=3)[0]
    dicode_programs._denoise.clear_cache()
    with compilations("_denoise") as compiled:
        painted = [pipe.decode(tokens, guidance_scale=scale) for scale in (2.0, 30.0, 100.0)]
    assert len(compiled) == 1
    assert not close(painted[0], painted[1])
    assert not close(painted[1], painted[2])


@pytest.mark.slow
def test_the_sampler_changes_the_video(pipe, videos):
    tokens = pipe.generate_tokens(PROMPTS[0], num_clips=2, seed=3)[0]
    assert close(pipe.decode(tokens, seed=3, sampler="ddim"), videos[0])
    ddim, dpm = (
        pipe.decode(tokens[:2], num_inference_steps=4, sampler=sampler)
        for sampler in ("ddim", "dpm++")
    )
    assert not close(dpm, ddim)


def test_long_prompt_is_cut_with_a_warning(pipe):
    prompt = " ".join(["red"] * 38 + ["blue", "circle"])
    with pytest.warns(UserWarning, match=r"reads the first 14 .* out: red (red )*blue circle$"):
        pipe.generate_tokens(prompt)


def test_guidance_is_refused_where_nothing_is_painted_without_tokens(pipe_about_tokens):
    with pytest.raises(UserError, match=r"guidance_scale: .*\(latent_prior\).* leave it out"):
        pipe_about_tokens.decode(TOKENS, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(""), "empty"),
        (lambda p: p("a red circle ☃"), "never seen"),
        (lambda p: p([]), "list of prompts is empty"),
        (lambda p: p(None), "a prompt is text, or a list of texts, got None"),
        (lambda p: p(["a red circle", 3]), "got 3 among them"),
        (lambda p: p(PROMPTS[0], num_clips=0), "num_clips: want a whole number from 1 .* got 0"),
        (lambda p: p(PROMPTS[0], num_clips=2.0), "num_clips: want a whole number"),
        (lambda p: p(PROMPTS[0], num_clips=None), "num_clips: .* got None"),
        (lambda p: p(PROMPTS[0], num_clips=10**9), "num_clips: .* from 1 to 1800"),
        (lambda p: p(PROMPTS[0], num_frames="4"), "num_frames: want a whole number .* '4'"),
        (lambda p: p(PROMPTS[0], num_frames=10**9), "num_frames: .* from 1 to 256"),
        (lambda p: p(PROMPTS[0], num_inference_steps=2.5), "num_inference_steps: .* 2.5"),
        (lambda p: p(PROMPTS[0], guidance_scale=float("nan")), "guidance_scale: .* got nan"),
        (lambda p: p(PROMPTS[0], guidance_scale=np.float32("inf")), "guidance_scale: .* got inf"),
        (lambda p: p(PROMPTS[0], guidance_scale=0), "guidance_scale: want a finite number above 0"),
        (lambda p: p(PROMPTS[0], guidance_scale="7.5"), "guidance_scale: .* got '7.5'"),
        (lambda p: p(PROMPTS[0], guidance_scale=10**400), "guidance_scale: "),
        (lambda p: p(PROMPTS[0], num_frames=3), "num_frames must be even, got 3"),
        (lambda p: p(PROMPTS[0], num_inference_steps=0), "num_inference_steps: want .* from 1 to"),
        (lambda p: p(PROMPTS[0], num_inference_steps=501), "501"),
        (lambda p: p(PROMPTS[0], num_inference_steps=1001), "from 1 to 1000, got 1001"),
        (lambda p: p(PROMPTS[0], guidance_scale=100.5), "guidance_scale: .* 100, got 100.5"),
        (
            lambda p: p(PROMPTS[0], sampler="euler"),
            r"sampler: want ddim or dpm\+\+ or unipc, got 'euler'",
        ),
        (lambda p: p(PROMPTS[0], sampler=2), "sampler: .* got 2"),
        (lambda p: p.encode(np.zeros((1, 8, 8, 3), np.uint8)), "two keyframes"),
        (lambda p: p.encode(np.zeros((4, 8, 8, 3), np.float32)), "uint8"),
        (lambda p: p.encode(np.zeros((4, 0, 8, 3), np.uint8)), "video is uint8"),
        (lambda p: p.encode([[1, 2], [3]]), "video is uint8"),
        (lambda p: p.encode(VIDEO, keyframes=[0]), "keyframes: a clip needs two, got 1"),
        (lambda p: p.encode(VIDEO, keyframes=[0, 4]), "keyframes: .* from -4 to 3, got 4"),
        (lambda p: p.encode(VIDEO, keyframes=[0, 1.5]), "keyframes: .* got 1.5"),
        (lambda p: p.encode(VIDEO, keyframes=[True, False]), "keyframes: .* got True"),
        (lambda p: p.encode(VIDEO, keyframes=3), "keyframes: want a list of frame numbers"),
        (lambda p: p.decode("tokens"), "this model decodes .* got 'tokens'"),
        (lambda p: p.decode(np.zeros((0, 2, NUM_TOKENS, TOKEN_DIM))), r"shape \(0, 2"),
        (lambda p: p.decode(np.zeros((1802, NUM_TOKENS, TOKEN_DIM))), "at most 1800 clips"),
        (lambda p: p.decode(TOKENS, seed=[1, 2]), r"2 seeds for 1 sample\(s\)"),
        (lambda p: GenerationConfig(var_scale=float("nan")), "var_scale: "),
        (lambda p: GenerationConfig(overlap=0), "overlap: "),
        (lambda p: GenerationConfig(var_scale=1e300), "var_scale: .* of at most 1e\\+06"),
        (lambda p: GenerationConfig(logits_temperature=1e300), "logits_temperature: .* at most"),
        (lambda p: GenerationConfig(guidance_scale=101.0), "guidance_scale: .* of at most 100"),
        (lambda p: PipelineConfig(sampling=SamplingConfig(num_frames=3)), "want an even number"),
        (lambda p: PipelineConfig(fps=float("inf")), "fps: "),
        (lambda p: p.decode(np.zeros((2, 5, 8), np.float32)), r"shape \(2, 5, 8\)"),
        (
            lambda p: p.decode(np.full((2, NUM_TOKENS, TOKEN_DIM), np.nan, np.float32)),
            "^this model decodes .*, got NaN or infinite numbers$",
        ),
        (lambda p: DiCoDePipeline.from_pretrained("no such model"), "no model 'no such model'"),
    ],
)
def test_mistake_is_one_clear_line(pipe, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(pipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text_length", "generation", "line"),
    [
        (65 - NUM_TOKENS - 1, {}, None),  # as long as one keyframe fits
        (14, {"window": 3, "overlap": 2}, None),
        (
            65 - NUM_TOKENS,
            {},
            r"behind a text of 62 tokens .* room for 0 keyframes, 1 are",
        ),
        (2**63, {}, "room for 0 keyframes"),
        (14, {"window": 2**63}, r"behind a text of 14 tokens .* room for \d keyframes, 92\d+ are"),
        (14, {"window": 3, "overlap": 3}, "overlap must be below the window of 3, got 3"),
        (14, {"overlap": 2**63}, "overlap must be below the window of"),
    ],
)
def test_a_config_that_asks_more_of_the_language_model_is_refused_at_once(
    pipe, tmp_path, text_length, generation, line
):
    generation = GenerationConfig(**generation)
    config = dataclasses.replace(pipe.config, text_length=text_length, generation=generation)
    pipe.save_pretrained(tmp_path / "model")
    config_lib.to_json(config, tmp_path / "model/config.json")
    for load in (
        lambda: DiCoDePipeline.check_folder(tmp_path / "model"),
        lambda: DiCoDePipeline.from_pretrained(tmp_path / "model"),
        lambda: DiCoDePipeline(**pipe.parts, text=pipe.text, config=config),
    ):
        if line is None:
            load()
        else:
            with pytest.raises(UserError, match=line):
                load()


SEEDS = [-1, 2**32, 2**63, 1.5, "1", None, True, [], [1], [1, 2, 3], [1, -1], [1, None], "12"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("call", ["__call__", "generate_tokens", "decode"])
def test_seed_that_is_none_is_refused(pipe, call, seed):
    given = np.stack([TOKENS, TOKENS]) if call == "decode" else PROMPTS[:2]
    with pytest.raises(UserError, match=r"^seed: ") as caught:
        getattr(pipe, call)(given, seed=seed)
    assert "\n" not in str(caught.value)


def test_last_seed_is_in_range_and_its_successor_is_not(pipe):
    last = pipe.generate_tokens(PROMPTS[:2], seed=2**32 - 2)
    np.testing.assert_array_equal(
        pipe.generate_tokens(PROMPTS[1], seed=np.uint32(2**32 - 1)), last[1:]
    )
    with pytest.raises(UserError, match="must not pass 4294967295"):
        pipe.generate_tokens(PROMPTS[:2], seed=2**32 - 1)
    assert not np.array_equal(last[1:], pipe.generate_tokens(PROMPTS[1], seed=0))


def changed(pipe, **parts):
    return DiCoDePipeline(**pipe.parts | parts, text=pipe.text, config=pipe.config)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["tokenizer", "decoder", "language_model"])
def test_weights_that_are_no_numbers_are_refused_at_load(pipe, tmp_path, part, value):
    bad = changed(pipe, **{part: with_value(pipe.parts[part], value)})
    with pytest.raises(UserError, match=r"nothing is written: .* NaN or infinite"):
        bad.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:  # as other programs write
        patch.setattr(weights, "not_finite", lambda arrays: None)
        bad.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=rf"weights of {part} hold NaN or infinite numbers \(\w+"):
        DiCoDePipeline.from_pretrained(tmp_path / "model")


def test_weights_that_a_narrow_type_cannot_hold_are_refused_at_load(pipe, tmp_path):
    changed(pipe, decoder=with_value(pipe.decoder, 1e6)).save_pretrained(tmp_path / "model")
    assert DiCoDePipeline.from_pretrained(tmp_path / "model").decoder is not None
    with pytest.raises(UserError, match=r"float16.*param_dtype is too narrow"):
        DiCoDePipeline.from_pretrained(tmp_path / "model", param_dtype=jnp.float16)
    before = weights.hash_module(tmp_path / "model/decoder")
    with pytest.raises(UserError, match=r"nothing is written: .*float16"):
        changed(pipe, decoder=with_value(pipe.decoder, 1e6)).save_pretrained(
            tmp_path / "model", dtype="float16"
        )
    assert weights.hash_module(tmp_path / "model/decoder") == before


def test_a_vocabulary_with_more_ids_than_the_language_model_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    learn([], vocab_size=300).save(tmp_path / "text")
    for load in (DiCoDePipeline.check_folder, DiCoDePipeline.from_pretrained):
        with pytest.raises(UserError, match="has 323 ids, the language model has 210"):
            load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_what_overflows_on_the_way_is_no_video_and_no_tokens(pipe, value):
    """Parts that never went through a file, and numbers that are finite until they are summed."""
    bad = {name: with_value(module, value) for name, module in pipe.parts.items()}
    with pytest.raises(UserError, match="language_model gave NaN or infinite"):
        changed(pipe, language_model=bad["language_model"]).generate_tokens(PROMPTS[0])
    with pytest.raises(UserError, match="tokenizer gave NaN or infinite"):
        changed(pipe, tokenizer=bad["tokenizer"]).encode(VIDEO)
    with pytest.raises(UserError, match=r"no picture: look at the weights of decoder.* 7\.5"):
        changed(pipe, decoder=bad["decoder"]).decode(TOKENS)


def test_one_bad_sample_of_a_batch_is_named(pipe):
    tokens = np.stack([TOKENS, np.full_like(TOKENS, 3e38)])
    with pytest.raises(UserError, match=r"^sample 1 came out as NaN or infinite numbers"):
        pipe.decode(tokens)
