"""`python -m convert.to_torch`: the way to original names and back is bitwise for every kind."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from flax import nnx
from models.dicode.tiny_decoder import with_prior
from safetensors.numpy import load_file, save_file
from tiny import random_module, tiny_pipeline

from convert import to_torch
from convert.dicode import command as dicode_command
from convert.engine import command
from convert.engine.plan import plan
from convert.engine.sources import open_source
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.models.landiff.dit import DenoiserConfig
from dicode_jax.models.landiff.semantic import UpsamplerConfig
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs, blank
from dicode_jax.storage import weights

SYSTEM = pathlib.Path(__file__).parents[1] / "golden" / "dicode" / "system"
VISION = CLIPVisionConfig(
    image_size=8, patch_size=4, embed_dim=6, num_layers=2, num_heads=2, output_dim=5
)
TEXT = CLIPTextConfig(
    max_seq_len=7, vocab_size=11, embed_dim=4, num_layers=2, num_heads=2, output_dim=5
)
RESAMPLER = ResamplerConfig(
    dim=8, depth=2, head_dim=4, num_heads=3, num_queries=4, embed_dim=6, output_dim=10,
)  # fmt: skip
UNET = UNet3DConfig(
    in_channels=5, out_channels=4, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(1,), head_dim=4, context_dim=10, num_groups=4, text_context_len=7,
)  # fmt: skip
AUTOENCODER = AutoencoderKLConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4, attn_resolutions=(128,)
)
BODY = GPT2Config(num_layers=3, num_heads=2, embed_dim=6, max_seq_len=9, vocab_size=80)
LLAMA = LlamaConfig(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, embed_dim=8, mlp_dim=10,
    vocab_size=12, max_seq_len=16, tie_embeddings=False,
)  # fmt: skip
SIDE = QueryTransformerConfig(patch_size=4, embed_dim=6, num_layers=2, num_heads=2)
FRAME_VAE = FrameVAEConfig(
    image_size=8, num_tokens=3, token_dim=2, codebook_size=7, encoder=SIDE, decoder=SIDE,
    pixel_decoder=MaskGITDecoderConfig(
        z_channels=5, channels=4, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=2
    ),
    temporal=True,
)  # fmt: skip
CONFIGS = {
    "tokenizer": DeepTokenizerConfig(vision=VISION, resampler=RESAMPLER),
    "decoder": ClipDecoderConfig(
        unet=UNET,
        autoencoder=AUTOENCODER,
        num_tokens=4,
        latent_head=ResamplerConfig(
            dim=8, depth=1, head_dim=4, num_heads=1, num_queries=4, embed_dim=10, output_dim=4,
            output_shape=(4, 4, 1),
        ),
    ),
    "language_model": DiCoDeLMConfig(
        body=BODY, num_tokens=3, token_dim=5, max_keyframes=4, num_mixtures=2, image_token_id=79,
        pad_token_id=13, pre_normalizer=(1.0, 2.0, 3.5),
    ),
    "stacked": DiCoDeLMConfig(
        body=GPT2Config(**{**vars(BODY), "scan_layers": True}), num_tokens=3, token_dim=5,
        loss="mse", image_token_id=79, pad_token_id=13,
    ),
    "clip": CLIPConfig(vision=VISION, text=TEXT),
    "text_tower": TEXT,
    "image_tower": VISION,
    "unet": UNET,
    "autoencoder": AUTOENCODER,
    "resampler": RESAMPLER,
    "gpt2": BODY,
    "gpt2_stacked": GPT2Config(**{**vars(BODY), "scan_layers": True}),
    "llama": LLAMA,
    "frame_vae": FRAME_VAE,
    "llama_agent": DiCoDeLMConfig(
        body=LLAMA, num_tokens=3, token_dim=5, image_token_id=11, pad_token_id=3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_way_to_original_names_and_back_is_bitwise(name, tmp_path):
    cfg = CONFIGS[name]
    kind = to_torch.KINDS[type(cfg)]
    module = random_module(lambda: kind.module(cfg, rngs=nnx.Rngs(0)))
    weights.save_module(tmp_path / "ours", module, cfg)
    out = tmp_path / "original.safetensors"
    assert to_torch.main([str(tmp_path / "ours"), "--out", str(out)]) == 0
    source = open_source(out)
    extras = kind.extras(cfg)
    for key, array in extras.items():
        np.testing.assert_array_equal(source[key].numpy(), array, err_msg=key)
    tensors = {key: tensor for key, tensor in source.items() if key not in extras}
    constants = {path: np.asarray(weights.named_arrays(module)[path]) for path in kind.constants}
    stacked = {"stacked": ("body.blocks",), "gpt2_stacked": ("blocks",)}.get(name, ())
    back = plan(
        tensors | constants, kind.rules(cfg), blank(kind.module, cfg), stacked=stacked
    ).check()
    assert not back.skipped
    for path, array in weights.named_arrays(module).items():
        got = back.array(path)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array, err_msg=path)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("latent_view", {"latent_view": "between"}),
        ("latent_prior", {"latent_prior": 0.3}),
        (
            "token_path",
            {
                "latent_view": "between",
                "token_path": ResamplerConfig(embed_dim=8, num_queries=4, output_dim=6),
            },
        ),
    ],
)
def test_a_decoder_that_the_original_would_read_otherwise_is_refused(field, changes):
    cfg = with_prior()
    channels = cfg.unet.in_channels + ("latent_view" in changes)
    unet = dataclasses.replace(cfg.unet, in_channels=channels)
    with pytest.raises(UserError, match=f"the original knows no {field}, as this dicode_decoder"):
        to_torch.original_state_dict({}, dataclasses.replace(cfg, unet=unet, **changes))


def test_a_denoiser_that_the_release_would_read_otherwise_is_refused():
    cfg = DenoiserConfig(semantic_prior=0.2)
    with pytest.raises(UserError, match="the original knows no semantic_prior, as this landiff"):
        to_torch.original_state_dict({}, cfg)
    cfg = DenoiserConfig(upsampler=UpsamplerConfig(num_past=2))
    with pytest.raises(UserError, match=r"the original knows no upsampler\.num_past, as this"):
        to_torch.original_state_dict({}, cfg)


def test_a_config_is_read_by_its_kind_and_one_of_old_by_its_fields(tmp_path):
    old = pathlib.Path(__file__).parents[1] / "old_models/dicode"
    for part, config_type in (("tokenizer", DeepTokenizerConfig), ("decoder", ClipDecoderConfig)):
        assert type(to_torch.read_config(old / part)) is config_type
    stored = json.loads((old / "tokenizer/config.json").read_text())
    named = {"kind": "dicode_decoder", "version": 1}
    (tmp_path / "config.json").write_text(json.dumps(named | stored))
    with pytest.raises(UserError, match="does not fit ClipDecoderConfig"):
        to_torch.read_config(tmp_path)


def test_names_are_those_of_the_original(tmp_path):
    """The whole official checkpoint: converted, written back, and compared key for key."""
    models = tmp_path / "models"
    models.mkdir()
    weights_file = SYSTEM / "weights.safetensors"
    (models / "pytorch_model.safetensors").write_bytes(weights_file.read_bytes())
    options = json.loads((SYSTEM / "config.json").read_text())["system"]
    (models / "config.json").write_text(json.dumps(options))  # JSON is YAML
    done = dicode_command.main(
        ["--tokenizer", str(models / "pytorch_model.safetensors"), "--out", str(tmp_path / "out"),
         "--yaml", str(models / "config.json")]
    )  # fmt: skip
    assert done == 0
    file = tmp_path / "original.safetensors"
    assert to_torch.main([str(tmp_path / "out"), "--out", str(file)]) == 0
    original, got = load_file(weights_file), load_file(file)
    assert set(got) <= set(original)
    for key, array in got.items():
        assert array.shape == original[key].shape, key
        if key in to_torch.PERSISTENT_BUFFERS:  # computed from the configuration
            np.testing.assert_allclose(array, original[key], rtol=1e-5, atol=1e-7, err_msg=key)
        else:
            np.testing.assert_array_equal(array, original[key].astype(np.float32), err_msg=key)
    left = {key.split(".")[0] for key in set(original) - set(got)}
    assert left == {"cond_stage_model", "embedder", "llm_agent"}
    embedder = {k for k in set(original) - set(got) if k.startswith("embedder.")}
    assert not [key for key in embedder if ".visual." in key]


@pytest.mark.torch
def test_a_pipeline_goes_to_one_torch_file_in_half_precision(tmp_path):
    torch = pytest.importorskip("torch")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    out = tmp_path / "all.pt"
    args = [str(tmp_path / "model"), "--out", str(out), "--dtype", "float16"]
    assert to_torch.main(args) == 0
    content = torch.load(out, weights_only=True)
    assert {key.split(".")[0] for key in content} >= {"model", "first_stage_model", "llm_agent"}
    kinds = {str(v.dtype) for k, v in content.items() if k not in to_torch.PERSISTENT_BUFFERS}
    assert kinds == {"torch.float16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.pt", "model"]


def test_a_config_of_far_more_layers_than_there_are_is_refused(tmp_path, capsys):
    weights.save_module(tmp_path / "ours", GPT2(BODY, rngs=ShapeRngs()), BODY)
    path = tmp_path / "ours/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1000}))
    assert to_torch.main([str(tmp_path / "ours"), "--out", str(tmp_path / "a.safetensors")]) == 2
    assert "asks for more than 1" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_only_files_of_its_own_are_overwritten(suffix, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    cfg = CONFIGS["resampler"]
    module = random_module(lambda: to_torch.KINDS[type(cfg)].module(cfg, rngs=nnx.Rngs(0)))
    weights.save_module(tmp_path / "ours", module, cfg)
    out, mine = tmp_path / f"out{suffix}", tmp_path / f"mine{suffix}"
    args = [str(tmp_path / "ours"), "--overwrite", "--out"]
    for _ in range(2):
        assert to_torch.main([*args, str(out)]) == 0
    written = {key: tensor.numpy() for key, tensor in open_source(out).items()}
    assert written
    if suffix == ".pt":
        assert set(torch.load(out, weights_only=True, mmap=True)) == set(written)
        torch.save({"w": torch.zeros(2)}, mine)
    else:
        save_file(written, mine)
    for content in (mine.read_bytes(), b"trained for weeks"):
        mine.write_bytes(content)
        assert to_torch.main([*args, str(mine)]) == 2
        assert "was not written by this command" in capsys.readouterr().err
        assert mine.read_bytes() == content


def test_what_is_in_the_way_or_no_model_is_refused(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"mine")
    for args, message in (
        ([str(tmp_path), "--out", str(file)], "already there"),
        ([str(tmp_path), "--out", str(tmp_path / "a.npz")], "extension"),
        ([str(tmp_path), "--out", str(tmp_path / "b.pt")], "not a model"),
        (["nowhere", "--out", str(tmp_path / "b.pt")], "no model"),
    ):
        assert to_torch.main(args) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
    assert file.read_bytes() == b"mine"
    assert command.REPORT_FILE not in {path.name for path in tmp_path.iterdir()}
