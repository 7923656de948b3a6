"""A model folder says what it is; those of the release before, which said nothing, still load.

`old_models` holds what that release wrote: two pipelines of random weights and the config of a run.
"""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_pipeline

import dicode_jax
from dicode_jax import cli, kinds
from dicode_jax import config as config_lib
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.causal_lm import BodyConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines import base
from dicode_jax.pipelines import load as load_lib
from dicode_jax.pipelines.ar_diffusion import ARDiffusionPipeline
from dicode_jax.pipelines.dicode import DiCoDePipeline, GenerationConfig, PipelineConfig
from dicode_jax.pipelines.divot import DivotConfig, DivotDetokenizer
from dicode_jax.pipelines.dynamicrafter import DynamiCrafterConfig, DynamiCrafterPipeline
from dicode_jax.pipelines.landiff import LanDiffPipeline
from dicode_jax.storage import weights

OLD = pathlib.Path(__file__).parents[1] / "old_models"
CLASSES = {
    "dicode": DiCoDePipeline,
    "dynamicrafter": DynamiCrafterPipeline,
    "divot": DivotDetokenizer,
    "ar_diffusion": ARDiffusionPipeline,
    "landiff": LanDiffPipeline,
}


@pytest.fixture
def folder(tmp_path):
    """A DiCoDe pipeline of this release."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, **changes):
    """Changes entries of a folder's config; None takes one out."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_the_defaults_are_those_of_the_releases():
    shown = {"fps": 8.0}
    assert PipelineConfig() == PipelineConfig(
        frame_size=256,
        text_length=80,
        sampling=SamplingConfig(batch_guidance=True),
        generation=GenerationConfig(
            do_sample=True, var_scale=0.01, logits_temperature=1.0, guidance_scale=1.0
        ),
        **shown,
    )
    assert DynamiCrafterConfig() == DynamiCrafterConfig(
        frame_size=(256, 256),
        interpolation=False,
        schedule=NoiseSchedule(),
        sampling=SamplingConfig(fs=3),
        **shown,
    )
    assert DivotConfig() == DivotConfig(
        frame_size=(256, 256),
        schedule=NoiseSchedule(zero_terminal_snr=True, parameterization="v"),
        sampling=SamplingConfig(fs=3, table_dtype="float16"),
        **shown,
    )


def test_old_dicode_folder_generates_and_decodes():
    pipe = dicode_jax.load(OLD / "dicode")
    assert type(pipe) is DiCoDePipeline
    tokens = pipe.generate_tokens("a red circle grows on a navy background", seed=1)
    video = pipe.decode(tokens[0], seed=1)
    assert video.shape == (4, 16, 16, 3)
    assert video.std() > 0


def test_old_dynamicrafter_folder_paints():
    pipe = dicode_jax.load(OLD / "dynamicrafter")
    assert type(pipe) is DynamiCrafterPipeline
    video = pipe("cat", image=np.full((8, 16, 3), 90, np.uint8), seed=1)
    assert video.shape == (1, 4, 8, 16, 3)
    assert video.frames.std() > 0


def test_the_types_that_are_asked_for_reach_the_pipeline(monkeypatch):
    monkeypatch.setattr(DiCoDePipeline, "from_pretrained", lambda *args, **options: (args, options))
    for asked, told in (
        ({}, {"dtype": "auto", "param_dtype": jnp.float32}),  # which "auto" overrules
        ({"dtype": None}, {"dtype": None, "param_dtype": jnp.float32}),
        ({"param_dtype": np.float16}, {"dtype": None, "param_dtype": np.float16}),
        ({"dtype": "bfloat16", "param_dtype": np.float16},) * 2,
    ):
        assert dicode_jax.load(OLD / "dicode", **asked) == ((OLD / "dicode",), told)


@pytest.mark.parametrize(
    ("options", "computes", "stored"),
    [
        ({}, None, jnp.float32),
        ({"dtype": jnp.bfloat16}, jnp.bfloat16, jnp.float32),
        ({"param_dtype": jnp.float16}, None, jnp.float16),
        ({"dtype": "bfloat16", "param_dtype": jnp.float16}, "bfloat16", jnp.float16),
        ({"dtype": "auto", "param_dtype": jnp.float16}, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_parts_are_loaded_in_the_types_that_are_asked_for(monkeypatch, options, computes, stored):
    def stop(*args, skip, **types):
        raise UserError(str(types))

    monkeypatch.setattr(base, "auto_dtype", lambda: jnp.bfloat16)
    monkeypatch.setattr(base.weights, "load_module", stop)
    with pytest.raises(UserError) as seen:
        DiCoDePipeline.from_pretrained(OLD / "dicode", **options)
    assert str(seen.value) == str({"dtype": computes, "param_dtype": stored})


@pytest.mark.parametrize(
    ("pipeline", "dtype"), [(DiCoDePipeline, jnp.float16), (LanDiffPipeline, jnp.float32)]
)
def test_auto_is_no_type_that_a_model_overflows_in(monkeypatch, pipeline, dtype):
    def stop(*args, **types):
        raise UserError(str(types))

    monkeypatch.setattr(base, "auto_dtype", lambda: jnp.float16)
    monkeypatch.setattr(pipeline, "_read_config", lambda folder: None)
    monkeypatch.setattr(pipeline, "_load_parts", stop)
    with pytest.raises(UserError) as seen:
        pipeline.from_pretrained(OLD / "dicode", dtype="auto")
    assert str(seen.value) == str({"dtype": dtype, "param_dtype": dtype})


@pytest.mark.parametrize("load", [dicode_jax.load, DiCoDePipeline.from_pretrained])
def test_all_that_says_where_a_model_is_reaches_the_hub(monkeypatch, load):
    def stop(*args, **options):
        raise UserError(f"{args} {options}")

    monkeypatch.setattr(load_lib.hub, "find_model", stop)
    where = {"cache_dir": "c", "local_files_only": True, "token": "t"}
    with pytest.raises(UserError) as seen:
        load("owner/name", "v2", **where)
    assert str(seen.value) == f"('owner/name',) {dict(revision='v2', **where)}"


@pytest.mark.parametrize("kind", ["dicode", "dynamicrafter"])
def test_info_knows_the_kind_of_an_old_folder(kind, capsys):
    assert cli.main(["info", str(OLD / kind)]) == 0
    out, err = capsys.readouterr()
    assert f"{'kind':<16} {kind}\n" in out
    assert not err


def test_a_folder_of_every_kind_is_checked_without_its_weights(tmp_path, capsys):
    for kind, part in (("dicode", "text"), ("dynamicrafter", "resampler")):
        shutil.copytree(OLD / kind, tmp_path / kind)
        shutil.rmtree(tmp_path / kind / part)
        assert cli.main(["info", str(tmp_path / kind)]) == 2
        out, err = capsys.readouterr()
        assert part in err
        assert err.count("\n") == 1
        assert not out


def test_every_kind_is_of_a_class_and_every_class_of_a_kind():
    for kind in kinds.KINDS:
        assert kinds.kind_of(kinds.config_type(kind)) == kind
    assert {kind: load_lib.pipeline_class(kind) for kind in kinds.PIPELINES} == CLASSES


def test_folder_and_its_parts_say_their_kind_and_version(folder):
    said = {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())
        for path in folder.glob("**/config.json")
    }
    assert {name: data["kind"] for name, data in said.items()} == {
        ".": "dicode",
        "tokenizer": "dicode_tokenizer",
        "decoder": "dicode_decoder",
        "language_model": "dicode_language_model",
    }
    assert {data["version"] for data in said.values()} == {1}


def test_a_body_is_read_as_one_of_several_kinds(tmp_path):
    body = GPT2Config(num_layers=1, num_heads=2, embed_dim=16, max_seq_len=64, vocab_size=9)
    config_lib.to_json(body, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "gpt2"
    assert config_lib.from_json(BodyConfig, tmp_path / "config.json") == body
    rewrite(tmp_path, kind="unet3d")
    with pytest.raises(UserError, match="of the kind 'unet3d', not 'gpt2' or 'llama'"):
        config_lib.from_json(BodyConfig, tmp_path / "config.json")


def test_the_kind_decides_and_not_the_parts(folder):
    rewrite(folder, kind="divot")
    assert load_lib.pipeline_kind(folder) == "divot"


def test_packaged_model_is_the_default():
    assert load_lib.pipeline_kind(dicode_jax.storage.hub.find_model()) == "dicode"


@pytest.mark.parametrize("wrong", ["dynamicrafter", "divot"])
def test_a_class_refuses_the_folder_of_another(folder, wrong):
    with pytest.raises(
        UserError, match=f"'dicode', which {CLASSES[wrong].__name__}.* dicode_jax.l"
    ):
        CLASSES[wrong].from_pretrained(folder)
    with pytest.raises(UserError, match=r"'dynamicrafter', which DiCoDePipeline .* dicode_jax"):
        DiCoDePipeline.from_pretrained(OLD / "dynamicrafter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "opera"}, "of the kind 'opera'; known are dicode, dynamicrafter, divot"),
        ({"kind": ["dicode"]}, r"of the kind \['dicode'\]; known are dicode"),
        ({"version": 2}, "of version 2, known is 1"),
        ({"kind": "unet3d"}, "a single module of the kind 'unet3d'; name the folder of a whole"),
        (
            {"kind": "ar_training"},
            "of a training of the kind 'ar_training'; .* with: dicode export ",
        ),
    ],
)
def test_what_is_no_pipeline_is_refused_in_one_line(folder, changes, message):
    rewrite(folder, **changes)
    for load in (dicode_jax.load, DiCoDePipeline.from_pretrained):
        with pytest.raises(UserError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_old_folders_that_are_no_pipeline_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"the folder of a training; .* dicode export"):
        dicode_jax.load(OLD / "run")
    with pytest.raises(UserError, match="a single module; name the folder of a whole pipeline"):
        dicode_jax.load(OLD / "dicode/decoder")
    shutil.copy(OLD / "dicode/config.json", tmp_path)
    with pytest.raises(UserError, match=r"is no model: .* no part lies there"):
        dicode_jax.load(tmp_path)


def test_a_module_of_another_kind_is_refused(tmp_path):
    cfg = ResamplerConfig(dim=8, depth=1, head_dim=4, num_heads=2, num_queries=2, embed_dim=6)
    module = Resampler(cfg, rngs=ShapeRngs())
    weights.save_module(tmp_path, module, cfg)
    rewrite(tmp_path, kind="unet3d")
    with pytest.raises(UserError, match="is of the kind 'unet3d', not 'resampler'"):
        weights.load_module(tmp_path, Resampler, ResamplerConfig)
    rewrite(tmp_path, kind="resampler")
    hash_now = weights.hash_module(tmp_path)
    rewrite(tmp_path, kind=None, version=None)
    assert weights.load_module(tmp_path, Resampler, ResamplerConfig)[1] == cfg
    assert weights.hash_module(tmp_path) == hash_now  # so that caches of before stay good
