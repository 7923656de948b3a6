"""The command line over a real, tiny, untrained pipeline in a folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dicode_jax import cli
from dicode_jax.data import synthetic, text, video
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.clip import CLIPVisionConfig
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig, SamplingConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.pipelines.dicode import DiCoDePipeline, PipelineConfig

NUM_TOKENS, TOKEN_DIM, NUM_FRAMES = 3, 8, 4
PROMPT = "a red circle moves right on a black background"


def random_module(build) -> nnx.Module:
    """The module with plain random parameters: its own initialisation would compile for minutes."""
    rng = np.random.default_rng(0)
    graph, abstract = nnx.split(nnx.eval_shape(build))

    def draw(leaf):
        values = rng.normal(scale=0.1, size=leaf.shape) + (len(leaf.shape) == 1)
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graph, jax.tree.map(draw, abstract))


def tiny_pipeline() -> DiCoDePipeline:
    tokenizer_text = text.train_small()
    tokenizer = DeepTokenizerConfig(
        vision=CLIPVisionConfig(
            image_size=16, patch_size=8, embed_dim=12, num_layers=1, num_heads=2, output_dim=None
        ),
        resampler=ResamplerConfig(
            dim=16,
            depth=1,
            head_dim=8,
            num_heads=2,
            num_queries=NUM_TOKENS,
            embed_dim=12,
            output_dim=TOKEN_DIM,
        ),
        preprocess="plain",
    )
    decoder = ClipDecoderConfig(
        unet=UNet3DConfig(
            model_channels=8,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_resolutions=(1,),
            temporal_attention=False,
            temporal_conv=False,
            init_attention=False,
            head_dim=8,
            context_dim=TOKEN_DIM,
            text_context_len=2,
            image_tokens_per_frame=NUM_TOKENS,
            temporal_length=NUM_FRAMES,
            num_groups=4,
        ),
        autoencoder=AutoencoderKLConfig(
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            resolution=16,
            num_groups=4,
            mid_attention=False,
        ),
        schedule=NoiseSchedule(zero_terminal_snr=True, parameterization="v"),
        num_tokens=NUM_TOKENS,
    )
    language_model = DiCoDeLMConfig(
        body=GPT2Config(
            num_layers=1,
            num_heads=2,
            embed_dim=16,
            max_seq_len=64,
            vocab_size=tokenizer_text.vocab_size,
        ),
        num_tokens=NUM_TOKENS,
        token_dim=TOKEN_DIM,
        max_keyframes=6,
        num_mixtures=2,
        image_token_id=tokenizer_text.image_start_id,
        pad_token_id=tokenizer_text.pad_id,
    )
    return DiCoDePipeline(
        tokenizer=random_module(lambda: DeepTokenizer(tokenizer, rngs=nnx.Rngs(0))),
        decoder=random_module(lambda: ClipDecoder(decoder, rngs=nnx.Rngs(0))),
        language_model=random_module(lambda: DiCoDeLM(language_model, rngs=nnx.Rngs(0))),
        text=tokenizer_text,
        config=PipelineConfig(
            frame_size=16,
            fps=NUM_FRAMES / 2,
            text_length=14,
            sampling=SamplingConfig(num_frames=NUM_FRAMES, num_inference_steps=2),
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pipeline on disk; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def broken(folder, work):
    """A copy of the model that a test may break."""
    shutil.copytree(folder, work / "broken")
    return work / "broken"


def line_of(capsys, *argv):
    """Runs a command that must fail; returns its only line."""
    assert cli.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


def test_a_prompt_becomes_a_video_that_the_seed_decides(folder, work, capsys):
    argv = ["generate", PROMPT, "--model", str(folder), "--num-clips", "2"]
    assert cli.main([*argv, "--out", "a.webp", "--sheet", "a.png"]) == 0
    assert cli.main([*argv, "--out", "b.webp"]) == 0
    assert cli.main([*argv, "--out", "c.webp", "--seed", "1"]) == 0
    a, b, c = (video.read_video(f"{name}.webp").frames for name in "abc")
    assert a.shape == (2 * NUM_FRAMES, 16, 16, 3)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert (work / "a.png").is_file()
    assert not capsys.readouterr().err


def test_encode_and_decode_are_reconstruct(folder, work):
    scene = synthetic.scene_at(0, 3)
    video.write_video("in.mp4", synthetic.render(scene, 2, frame_size=40).reshape(-1, 40, 40, 3))
    model = ["--model", str(folder), "--seed", "4", "--steps", "3"]
    assert cli.main(["encode", "in.mp4", "--out", "t.safetensors", *model[:2]]) == 0
    assert cli.read_tokens("t.safetensors").shape == (3, NUM_TOKENS, TOKEN_DIM)
    assert cli.main(["decode", "t.safetensors", "--out", "a.webp", *model]) == 0
    assert cli.main(["reconstruct", "in.mp4", "--out", "b.webp", *model]) == 0
    a, b = (video.read_video(f"{name}.webp").frames for name in "ab")
    assert a.shape == (2 * NUM_FRAMES, 16, 16, 3)
    np.testing.assert_array_equal(a, b)


def test_info_counts_what_lies_in_the_folder(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in ("tokenizer", "decoder", "language_model"):
        arrays = load_file(folder / part / "model.safetensors")
        assert f"{sum(array.size for array in arrays.values()):,} parameters" in out
    assert f"{NUM_TOKENS} deep tokens of {TOKEN_DIM} numbers" in out


def test_a_long_prompt_is_cut_with_a_warning(folder, work, capsys):
    argv = ["generate", "red " * 20, "--out", "a.gif", "--model", str(folder), "--steps", "1"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert err.startswith("dicode: warning: the prompt has 20 tokens")
    assert err.count("\n") == 1


def test_what_cannot_be_spelled_is_named(folder, work, capsys):
    line = line_of(capsys, "generate", "a réd circle", "--out", "a.mp4", "--model", folder)
    assert "'é'" in line


def test_tokens_of_another_model_are_refused(folder, work, capsys):
    save_file({"tokens": np.zeros((2, 5, TOKEN_DIM), np.float32)}, "t.safetensors")
    line = line_of(capsys, "decode", "t.safetensors", "--out", "a.mp4", "--model", folder)
    assert f"{NUM_TOKENS} tokens of width {TOKEN_DIM}" in line


def test_an_unknown_model_is_refused(work, capsys):
    line = line_of(capsys, "generate", PROMPT, "--out", "a.mp4", "--model", "nowhere")
    assert "no model 'nowhere'" in line
    (work / "empty").mkdir()
    line = line_of(capsys, "info", "empty")
    assert "is not a model" in line


def test_weights_that_do_not_fit_are_refused(broken, capsys):
    file = broken / "decoder" / "model.safetensors"
    arrays = load_file(file)
    first, *_ = sorted(arrays)
    save_file({name: array for name, array in arrays.items() if name != first}, file)
    assert f"missing {first}" in line_of(capsys, "info", broken)
    save_file(arrays | {first: np.zeros((2, 2), np.float32)}, file)
    assert f"{first} has shape (2, 2)" in line_of(capsys, "info", broken)
    file.write_bytes(file.read_bytes()[:-9])
    assert "not a whole safetensors file" in line_of(capsys, "info", broken)
    file.unlink()
    assert "no weights at" in line_of(capsys, "info", broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), (json.dumps({"frame_sise": 3}), "does not fit PipelineConfig")],
)
def test_a_broken_config_is_refused(broken, capsys, content, message):
    (broken / "config.json").write_text(content)
    assert message in line_of(capsys, "info", broken)


def test_a_model_without_its_vocabulary_is_refused(broken, capsys):
    shutil.rmtree(broken / "text")
    assert "no tokenizer in" in line_of(capsys, "info", broken)
