"""DynamiCrafter's checkpoints: full-size key lists by shapes, and tiny files end to end."""

import dataclasses
import hashlib
import json
import math

import fake_open_clip
import jax.numpy as jnp
import numpy as np
import pytest
from convert_names import open_clip_parts, read_manifest, shapes_only, state_dict
from fake_hub import FakeHub
from flax import nnx
from safetensors.numpy import save_file
from tiny import random_module

from convert import dynamicrafter as command
from convert.parts import clip as open_clip
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.dynamicrafter import PARTS, DynamiCrafterPipeline
from dicode_jax.storage import model_card, weights

VARIANTS = ("256", "512", "512_interp", "1024")
TINY = {
    "unet": UNet3DConfig(
        in_channels=8,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        head_dim=8,
        context_dim=64,
        text_context_len=6,
        context_rule="length",
        image_tokens_per_frame=2,
    ),
    "autoencoder": AutoencoderKLConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    "text_tower": CLIPTextConfig(
        max_seq_len=6, vocab_size=20, embed_dim=64, num_layers=2, num_heads=1, output_dim=10
    ),
    "image_tower": CLIPVisionConfig(
        image_size=16, patch_size=8, embed_dim=64, num_layers=2, num_heads=1, output_dim=10
    ),
    "resampler": ResamplerConfig(
        dim=24, depth=1, num_heads=1, num_queries=2, embed_dim=64, output_dim=64, video_length=16
    ),
}


def full_size(name):
    manifest = read_manifest(f"dynamicrafter_{name}")
    tensors = manifest["tensors"] | open_clip_parts(command.TEXT_TOWER, command.IMAGE_TOWER)
    return manifest, shapes_only(tensors)


def elements(source, keys):
    return sum(math.prod(source[key].shape) for key in keys)


def found_configs(source, name):
    found = command.find_configs(source, command.VARIANTS[name])
    return {part: config.config for part, config in found.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_key_of_a_release_is_used_or_skipped_and_every_target_filled(name):
    manifest, source = full_size(name)
    assert command.find_variant(source, name) == name
    parts = command.plan_pipeline(source, found_configs(source, name))
    assert command.problems(source, parts) == []
    counts = manifest["param_counts"]
    assert parts["unet"].plan.report()["parameters"] == counts["model.diffusion_model"]
    assert parts["autoencoder"].plan.report()["parameters"] == counts["first_stage_model"]
    assert parts["resampler"].plan.report()["parameters"] == counts["image_proj_model"]
    for part in ("text_tower", "image_tower"):
        plan, prefix = parts[part].plan, command.PREFIXES[part]
        expected = manifest["open_clip_expected"][prefix]
        assert len(plan.source) == expected["n_keys"]
        assert elements(plan.source, plan.source) == expected["n_elements"]
        left_out = elements(plan.source, plan.skipped)
        assert plan.report()["parameters"] == expected["n_elements"] - left_out
    for part in parts.values():
        report = part.plan.report()
        assert report["used"] + len(report["skipped"]) == report["source_keys"]


def test_start_of_dicode_has_the_sizes_of_its_release():
    _, source = full_size("256")
    parts = command.plan_for_dicode(source, found_configs(source, "256"))
    assert command.problems(source, parts) == []
    assert parts["tokenizer"].config == DeepTokenizerConfig(resize="stretch")
    assert parts["decoder"].config == ClipDecoderConfig()
    shapes = parts["decoder"].plan.shapes
    unet = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("unet."))
    assert unet == 1_438_843_476
    shapes = parts["tokenizer"].plan.shapes
    resampler = sum(math.prod(s) for path, s in shapes.items() if path.startswith("resampler."))
    assert resampler == 48_541_696


def modules(name="256"):
    """The parts of a tiny model."""
    learnable = command.VARIANTS[name].learnable_image_scale
    configs = TINY | {"unet": dataclasses.replace(TINY["unet"], learnable_image_scale=learnable)}
    return {
        part: random_module(lambda kind=kind, part=part: kind(configs[part], rngs=ShapeRngs()))
        for part, (kind, _) in PARTS.items()
    }


def tiny_state_dict(parts, name="256"):
    """Those parts as a checkpoint, with leftovers and buffers as the original has them."""
    variant = command.VARIANTS[name]
    schedule = variant.schedule
    out = {key: np.asarray(schedule.table(key), np.float32) for key in PERSISTENT_BUFFERS}
    if schedule.base_scale is not None:
        tail = np.full(1400 - len(schedule.scale_array), schedule.base_scale, np.float32)
        out["scale_arr"] = np.concatenate([schedule.scale_array, tail])
    tables = {
        "unet": command.unet3d.rules(),
        "autoencoder": command.autoencoder_kl.RULES,
        "text_tower": open_clip.TEXT_RULES,
        "image_tower": open_clip.VISION_RULES,
        "resampler": command.resampler.RULES,
    }
    for part, module in parts.items():
        out |= state_dict(module, tables[part], command.PREFIXES[part])
    text, image = command.TEXT_TOWER, command.IMAGE_TOWER
    for key in ("token_embedding.weight", "positional_embedding", "text_projection"):
        out[image + key] = out[text + key]
    for prefix in (text, image):
        out[prefix + "logit_scale"] = np.asarray(2.6, np.float32)
    return out


@pytest.fixture(scope="module")
def parts():
    return modules()


@pytest.fixture(scope="module")
def checkpoint(parts):
    return tiny_state_dict(parts)


def run(tmp_path, tensors, *argv):
    save_file(tensors, tmp_path / "model.safetensors")
    file, out = str(tmp_path / "model.safetensors"), str(tmp_path / "out")
    return command.main([file, "--out", out, *argv])


def refused(capsys, tmp_path, tensors, *argv):
    assert run(tmp_path, tensors, *argv) == 2
    assert not (tmp_path / "out").exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def same(module, folder):
    arrays = weights.read_arrays(folder / "model.safetensors")
    wanted = weights.named_arrays(module)
    assert set(arrays) == set(wanted)
    for path, array in wanted.items():
        np.testing.assert_array_equal(arrays[path], array, path)


def test_a_checkpoint_becomes_a_pipeline_bit_for_bit(tmp_path, parts, checkpoint):
    assert run(tmp_path, checkpoint) == 0
    out = tmp_path / "out"
    for part, module in parts.items():
        same(module, out / part)
    pipe = DynamiCrafterPipeline.from_pretrained(out)
    assert pipe.config.frame_size == (256, 256)
    assert pipe.config.schedule.parameterization == "eps"
    assert pipe.parts["unet"].cfg.learnable_image_scale
    assert pipe.parts["unet"].cfg.image_tokens_per_frame == 2
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads(pipe.metadata["unet"]["sources"]) == {"model.safetensors": digest}
    assert pipe.metadata["text_tower"]["origin"] == "open_clip"
    report = json.loads((out / "conversion.json").read_text())
    assert report["variant"] == "256"
    assert report["parts"]["unet"]["problems"] == []
    assert digest in (out / "README.md").read_text()


def test_a_name_of_the_hub_is_searched_for_the_checkpoint(tmp_path, parts, checkpoint, monkeypatch):
    def towers(key):
        return key.startswith((command.TEXT_TOWER, command.IMAGE_TOWER))

    fake = FakeHub(tmp_path / "cache", monkeypatch)
    fake.repositories = {"Doubiiu/D_256": tmp_path / "hub", "laion/H": tmp_path / "laion"}
    clip = {k.removeprefix(command.TEXT_TOWER).removeprefix(command.IMAGE_TOWER): checkpoint[k]
            for k in checkpoint if towers(k)}  # fmt: skip
    rest = {key: array for key, array in checkpoint.items() if not towers(key)}
    for file, tensors in (("hub/x.safetensors", rest), ("laion/open_clip_model.safetensors", clip)):
        (tmp_path / file).parent.mkdir()
        save_file(tensors, tmp_path / file)
    (tmp_path / "laion/open_clip_pytorch_model.bin").write_text("not asked for")
    out = tmp_path / "out"
    assert command.main(["Doubiiu/D_256", "--clip", "laion/H", "--out", str(out)]) == 0
    same(parts["unet"], out / "unet")
    same(parts["text_tower"], out / "text_tower")
    assert fake.files("laion/H") == {"open_clip_model.safetensors"}


def test_the_older_name_of_the_fs_embedding_is_read(tmp_path, parts, checkpoint):
    older = {k.replace("fps_embedding", "framestride_embed"): v for k, v in checkpoint.items()}
    assert older.keys() != checkpoint.keys()
    assert run(tmp_path, older) == 0
    same(parts["unet"], tmp_path / "out/unet")


@pytest.mark.torch
@pytest.mark.parametrize("wrap", ["state_dict", "deepspeed"])
def test_wrapped_torch_files_are_read(tmp_path, parts, checkpoint, wrap):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in checkpoint.items()}
    if wrap == "deepspeed":
        content = {"module": {f"_forward_module.{k}": v for k, v in tensors.items()}}
    else:
        content = {"state_dict": tensors, "global_step": 7}
    torch.save(content, tmp_path / "model.ckpt")
    argv = [str(tmp_path / "model.ckpt"), "--out", str(tmp_path / "out")]
    assert command.main(argv) == 0
    same(parts["unet"], tmp_path / "out/unet")


@pytest.mark.parametrize(
    ("name", "frame_size", "interpolation"),
    [("512", (320, 512), False), ("512_interp", (320, 512), True), ("1024", (576, 1024), False)],
)
def test_variants_bring_their_own_settings(tmp_path, capsys, name, frame_size, interpolation):
    tensors = tiny_state_dict(modules(name), name)
    if name != "1024":  # nothing in the file tells these two apart
        assert "512 or 512_interp" in refused(capsys, tmp_path, tensors)
        assert "1024: the file is of" in refused(capsys, tmp_path, tensors, "--variant", "1024")
        assert run(tmp_path, tensors, "--variant", name) == 0
    else:
        assert run(tmp_path, tensors) == 0
    config = DynamiCrafterPipeline.from_pretrained(tmp_path / "out").config
    assert (config.frame_size, config.interpolation) == (frame_size, interpolation)
    assert config.schedule == command.VARIANTS[name].schedule
    assert config.sampling.spacing == "uniform_trailing"


def test_what_does_not_fit_is_one_line_and_nothing_is_written(tmp_path, capsys, checkpoint):
    def without(key):
        return {k: v for k, v in checkpoint.items() if k != key}

    conv, out = command.FIRST_CONV, f"{command.UNET}out.2.bias"
    assert "no DynamiCrafter" in refused(capsys, tmp_path, {"a.b": np.zeros(3, np.float32)})
    four = checkpoint | {conv: np.ascontiguousarray(checkpoint[conv][:, :4])}
    assert "convert dicode" in refused(capsys, tmp_path, four)
    assert "unfilled target: conv_out.bias" in refused(capsys, tmp_path, without(out))
    extra = checkpoint | {"something.else": np.zeros(3, np.float32)}
    assert "unused source key: something.else" in refused(capsys, tmp_path, extra)
    assert "1024" in refused(capsys, tmp_path, checkpoint, "--variant", "1024")
    schedule = dataclasses.replace(command.VARIANTS["256"].schedule, zero_terminal_snr=True)
    other = checkpoint | {"betas": np.asarray(schedule.table("betas"), np.float32)}
    assert "noise schedule in the checkpoint" in refused(capsys, tmp_path, other)
    odd = checkpoint | {conv: np.zeros(3, np.float32)}
    assert f"{conv} has shape (3,)" in refused(capsys, tmp_path, odd)
    odd = checkpoint | {"scale_arr": np.zeros((), np.float32)}
    assert "noise schedule in the checkpoint" in refused(capsys, tmp_path, odd)
    broken = checkpoint | {out: np.full_like(checkpoint[out], np.nan)}
    assert "NaN" in refused(capsys, tmp_path, broken)


def test_schedule_of_another_variant_is_named(tmp_path, capsys, checkpoint):
    other = command.VARIANTS["512"].schedule
    tables = {k: np.asarray(other.table(k), np.float32) for k in PERSISTENT_BUFFERS}
    line = refused(capsys, tmp_path, checkpoint | tables)
    assert "zero_terminal_snr=True, parameterization=v" in line


def test_start_of_dicode_keeps_the_latents_channels_and_one_frame(tmp_path, parts, checkpoint):
    assert run(tmp_path, checkpoint, "--for-dicode") == 0
    out = tmp_path / "out"
    tokenizer, _ = weights.load_module(out / "tokenizer", DeepTokenizer, DeepTokenizerConfig)
    decoder, cfg = weights.load_module(out / "decoder", ClipDecoder, ClipDecoderConfig)
    whole, cut = (weights.named_arrays(m) for m in (parts["unet"], decoder.unet))
    conv = "down_stages.0.layers.0.kernel"
    np.testing.assert_array_equal(cut.pop(conv), whole.pop(conv)[:, :, :4])
    for path, array in whole.items():
        np.testing.assert_array_equal(cut[path], array, path)
    queries = parts["resampler"].latents[...]
    np.testing.assert_array_equal(tokenizer.resampler.latents[...], queries[:2])
    notes = model_card.licence_notes(model_card.inspect(out))
    assert [note.split(":")[0] for note in notes] == ["DynamiCrafter", "OpenCLIP ViT-H/14 of LAION"]
    assert cfg.schedule.zero_terminal_snr
    assert cfg.unet.context_rule == "per_frame"
    text, ids = parts["text_tower"], jnp.array([[18, 19, 0, 0, 0, 0]])
    want = nnx.jit(lambda text: text(ids)[0])(text)
    np.testing.assert_allclose(decoder.text_context[...], want, atol=1e-5)
    want = nnx.jit(lambda tokenizer: tokenizer.null_tokens())(tokenizer)
    np.testing.assert_allclose(decoder.null_tokens[...], want, atol=1e-5)


def original_options(name):
    """What the release's YAML says of the model, at full size."""
    variant = command.VARIANTS[name]
    schedule = variant.schedule
    unet = {
        "in_channels": 8,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "context_dim": 1024,
        "use_linear": True,
        "temporal_conv": True,
        "use_relative_position": False,
        "temporal_length": 16,
        "addition_attention": True,
        "image_cross_attention": True,
        "image_cross_attention_scale_learnable": variant.learnable_image_scale,
        "default_fs": variant.default_fs,
        "fs_condition": True,
    }
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    sizes |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    queries = {"dim": 1024, "depth": 4, "dim_head": 64, "heads": 12, "num_queries": 16}
    queries |= {"embedding_dim": 1280, "output_dim": 1024, "ff_mult": 4, "video_length": 16}
    return {
        "linear_start": schedule.linear_start,
        "linear_end": schedule.linear_end,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "parameterization": schedule.parameterization,
        "use_dynamic_rescale": schedule.base_scale is not None,
        "base_scale": schedule.base_scale or 0.7,
        "unet_config": {"target": "x", "params": unet},
        "first_stage_config": {
            "target": "x",
            "params": {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": sizes},
        },
        "image_proj_stage_config": {"target": "x", "params": queries},
    }


@pytest.mark.parametrize("name", ["256", "1024"])
def test_the_originals_own_configuration_agrees_and_another_does_not(name):
    _, source = full_size(name)
    variant = command.VARIANTS[name]
    configs = command.find_configs(source, variant)
    options = original_options(name)
    assert command.contradictions(options, configs, variant, "c.yaml") == []
    options["unet_config"]["params"]["model_channels"] = 256
    options["parameterization"] = "x0"
    lines = command.contradictions(options, configs, variant, "c.yaml")
    assert lines[0] == "unet.model_channels: 320 by the weights, 256 by c.yaml"
    assert lines[1].startswith("schedule: ")
    with pytest.raises(UserError, match=r"c.yaml is no configuration of DynamiCrafter"):
        command.contradictions({}, configs, variant, "c.yaml")


def test_a_yaml_file_is_read_and_compared(tmp_path, checkpoint, capsys):
    yaml = pytest.importorskip("yaml")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"model": {"params": original_options("256")}}))
    line = refused(capsys, tmp_path, checkpoint, "--yaml", str(file))
    assert f"by {file}" in line
    file.write_text("- : [")
    assert "not a readable YAML file" in refused(capsys, tmp_path, checkpoint, "--yaml", str(file))


def test_a_vocabulary_is_put_beside_the_weights(tmp_path, checkpoint, capsys):
    from dicode_jax.text import clip as clip_text

    (tmp_path / "wrong").mkdir()
    clip_text.build(["a b</w>"]).save(str(tmp_path / "wrong/tokenizer.json"))
    line = refused(capsys, tmp_path, checkpoint, "--vocab", str(tmp_path / "wrong"))
    assert "not the vocabulary of this text tower" in line
    with pytest.raises(UserError):
        clip_text.ClipTokenizer.from_file(tmp_path / "none", 20)


def test_an_installed_open_clip_makes_it_know_prompts(tmp_path, monkeypatch, capsys):
    merges = ["c a", "ca t</w>"]
    table = dataclasses.replace(TINY["text_tower"], vocab_size=514 + len(merges))
    monkeypatch.setitem(TINY, "text_tower", table)
    tensors = tiny_state_dict(modules())
    (tmp_path / "without").mkdir()
    assert run(tmp_path / "without", tensors) == 0
    said = capsys.readouterr().out
    assert "knows the empty prompt only" in said
    assert "--vocab FILE, or after pip install open_clip_torch" in said
    fake_open_clip.install(tmp_path / "site", monkeypatch, merges)
    assert run(tmp_path, tensors) == 0
    assert "empty prompt" not in capsys.readouterr().out
    assert DynamiCrafterPipeline.from_pretrained(tmp_path / "out").text.has_words


def test_towers_that_were_taken_out_come_from_their_own_file(tmp_path, capsys, parts, checkpoint):
    def towers(key):
        return key.startswith((command.TEXT_TOWER, command.IMAGE_TOWER))

    rest = {key: array for key, array in checkpoint.items() if not towers(key)}
    assert "give CLIP's own file as --clip" in refused(capsys, tmp_path, rest)
    own = {
        key.removeprefix(command.TEXT_TOWER).removeprefix(command.IMAGE_TOWER): array
        for key, array in checkpoint.items()
        if towers(key)
    }
    save_file(own, tmp_path / "clip.safetensors")
    assert run(tmp_path, rest, "--clip", str(tmp_path / "clip.safetensors")) == 0
    for name in ("text_tower", "image_tower", "unet"):
        same(parts[name], tmp_path / "out" / name)
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert "clip.safetensors" in report["sources"]
