"""Crop or stretch: settled by a tokenizer's training, and the same in a cache and in a pipeline."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import random_module, tiny_pipeline

from dicode_jax import cli
from dicode_jax import config as config_lib
from dicode_jax.data import encoded_cache
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.dicode import DiCoDePipeline
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode import examples as lm_examples
from dicode_jax.stages.dicode import representation
from dicode_jax.stages.dicode.configs import (
    ARTrainConfig,
    RepresentationTrainConfig,
    TokenizerTrainConfig,
)
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.dicode.representation_model import RepresentationConfig
from dicode_jax.stages.dicode.tokenizer import VideoTokenizer
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.workdir import claim
from train import encode
from train.encode import EncodeOptions

SIZES = [(360, 640), (640, 360), (9, 12), (12, 9), (16, 16), (33, 20)]
TRAINED_CROP, TRAINED_STRETCH = ("crop", True), ("stretch", True)
CONVERTED = ("stretch", False)
BOUND = 0.004  # a grey level of rounding, and the bfloat16 of a cache
STRETCH = DataConfig(resize="stretch")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def reads_by(pipe, resize, antialias=False):
    """The pipeline with a tokenizer whose config says so."""
    cfg = dataclasses.replace(pipe.tokenizer.cfg, resize=resize, antialias=antialias)
    tokenizer = random_module(lambda: type(pipe.tokenizer)(cfg, rngs=ShapeRngs()))
    return DiCoDePipeline(
        **pipe.parts | {"tokenizer": tokenizer}, text=pipe.text, config=pipe.config
    )


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """Gives the folder of a pipeline whose tokenizer reads in a way."""
    root = tmp_path_factory.mktemp("models")

    def save(resize, antialias=False):
        path = root / f"{resize}-{antialias}"
        if not path.exists():
            reads_by(pipe, resize, antialias).save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of all sizes, with edges, slopes and noise, and their pixels."""
    path, rng, images = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), {}
    for h, w in SIZES:
        y, x = np.mgrid[:h, :w] / max(h, w)
        waves = 90 * np.sin(9 * x + 5 * y)[..., None] + [10, 60, 110]
        image = waves + 60 * (x > 0.7)[..., None] + rng.normal(scale=80, size=(h, w, 3))
        images[f"{h}x{w}.png"] = np.clip(image, 0, 255).astype(np.uint8)
        Image.fromarray(images[f"{h}x{w}.png"]).save(path / f"{h}x{w}.png")
        (path / f"{h}x{w}.txt").write_text("waves\n")
    return path, images


def lm_config(pipe, folder, **options):
    return ARTrainConfig(
        model=pipe.language_model.cfg,
        tokenizer=folder,
        text_length=14,
        num_keyframes=2,
        frame_size=16,
        **options,
    )


def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [TRAINED_CROP, pytest.param(TRAINED_STRETCH, marks=pytest.mark.long), CONVERTED]
)
def test_tokens_of_a_cache_are_those_of_the_pipeline(pipe, folder, pictures, tmp_path, way):
    path, images = pictures
    config = lm_config(pipe, folder(*way), data=DataConfig(path=str(path), validation=0.0))
    manifest = encode.encode(config, EncodeOptions(out=tmp_path / "cache"))
    said = manifest["settings"]["data"]
    assert (said["resize"], said["antialias"]) == way
    exported = DiCoDePipeline.from_pretrained(folder(*way))
    cache = EncodedCache(tmp_path / "cache")
    assert set(cache.names) == set(images)
    for i, name in enumerate(cache.names):
        tokens = cache[i].arrays["tokens"].astype(np.float32)[0]
        wanted = exported.encode(np.stack([images[name]] * 2))[0]
        assert apart(tokens, wanted) < BOUND, name


def test_tokens_would_be_others_by_another_way(pipe, pictures):
    """So that the bound of the test above says something."""
    video = np.stack([pictures[1]["360x640.png"]] * 2)
    crop, stretch, converted = (
        reads_by(pipe, *way).encode(video)[0] for way in (TRAINED_CROP, TRAINED_STRETCH, CONVERTED)
    )
    assert apart(crop, stretch) > 3 * BOUND
    assert apart(converted, stretch) > 3 * BOUND
    np.testing.assert_array_equal(reads_by(pipe, None).encode(video)[0], converted)


def run_configs(pipe, folder):
    """A run of each kind that goes on from, or stands on, a tokenizer."""
    trained = {"tokenizer": pipe.tokenizer.cfg, "decoder": pipe.decoder.cfg}
    return [TokenizerTrainConfig(**trained, init=folder), lm_config(pipe, folder)]


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


@pytest.mark.parametrize("kind", [0, 1])
def test_runs_read_as_the_tokenizer_that_they_name(pipe, folder, kind):
    for resize in ("crop", "stretch"):
        config = run_configs(pipe, folder(resize))[kind]
        settled = settle(config)
        assert settled.data.resize == resize
        assert settled.data.antialias is (kind == 0)  # a decoder learns from smooth frames
        assert settle(settled) == settled
        assert settle(with_data(config, resize=resize)) == settled
    with pytest.raises(UserError, match=r"data.resize says 'crop' and .*stretch.* says 'stretch'"):
        settle(with_data(config, resize="crop"))
    silent = run_configs(pipe, folder(None))[kind]
    assert settle(silent).data == DataConfig(resize="crop")
    assert settle(with_data(silent, resize="stretch")).data == STRETCH


def test_runs_without_a_tokenizer_crop_unless_told(pipe):
    autoencoder = AutoencoderTrainConfig(model=AutoencoderKLConfig())
    fresh = TokenizerTrainConfig(tokenizer=pipe.tokenizer.cfg, decoder=pipe.decoder.cfg)
    for config in (autoencoder, fresh):
        assert settle(config).data == DataConfig(resize="crop")
        assert settle(with_data(config, resize="stretch")).data == STRETCH
    stretched = dataclasses.replace(pipe.tokenizer.cfg, resize="stretch")
    fresh = dataclasses.replace(fresh, tokenizer=stretched)
    assert settle(fresh).data.resize == "stretch"
    with pytest.raises(
        UserError, match=r"data\.resize says 'crop' and the config of the tokenizer"
    ):
        settle(with_data(fresh, resize="crop"))


def test_exported_tokenizer_says_how_frames_were_read(pipe, tmp_path):
    config = TokenizerTrainConfig(tokenizer=pipe.tokenizer.cfg, decoder=pipe.decoder.cfg)
    build = lambda: VideoTokenizer(config.tokenizer, config.decoder, rngs=ShapeRngs())  # noqa: E731
    model = random_module(build)
    for data, resize in ((DataConfig(), "crop"), (STRETCH, "stretch")):
        stage = build_stage(dataclasses.replace(config, data=data))
        stage.export(model, tmp_path / resize)
        stored = json.loads((tmp_path / resize / "tokenizer/config.json").read_text())
        assert (stored["resize"], stored["antialias"]) == (resize, True)


@pytest.fixture(scope="module")
def regression(pipe):
    """A tiny representation and its model."""
    head = ResamplerConfig(
        dim=8, depth=1, head_dim=4, num_heads=2, embed_dim=8, num_queries=4, output_dim=16
    )
    head = dataclasses.replace(head, output_shape=(2, 2, 16))
    model = RepresentationConfig(tokenizer=pipe.tokenizer.cfg, head=head)
    config = RepresentationTrainConfig(
        model=model, autoencoder="runs/a/model", frame_size=16, probe_weight=0.0
    )
    autoencoder = pipe.decoder.cfg.autoencoder
    build = lambda: representation.Regression(config, autoencoder, rngs=ShapeRngs())  # noqa: E731
    return config, random_module(build)


def test_representation_hands_its_way_on(pipe, regression, tmp_path):
    config, model = regression
    path = str(tmp_path / "model")
    representation.export(settle(with_data(config, resize="stretch")), model, tmp_path / "model")
    again = dataclasses.replace(config, init=path)
    assert settle(again).data == STRETCH
    assert representation.load_start(settle(again), again.init).cfg.tokenizer.resize == "stretch"
    other = dataclasses.replace(again, model=dataclasses.replace(config.model, token_noise=0.3))
    with pytest.raises(UserError, match="model of other sizes"):
        representation.load_start(settle(other), other.init)
    decoder = TokenizerTrainConfig(
        tokenizer=pipe.tokenizer.cfg, decoder=pipe.decoder.cfg, representation=path
    )
    assert settle(decoder).data == STRETCH
    with pytest.raises(UserError, match=r"data\.resize says 'crop' and the tokenizer in"):
        settle(with_data(decoder, resize="crop"))


def test_run_of_an_earlier_release_goes_on(pipe, folder, tmp_path):
    """Its config says "crop", and nothing of the filter; that of today says neither."""
    config = lm_config(pipe, folder(None))
    config_lib.to_json(with_data(config, resize="crop"), tmp_path / "config.json")
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["data"]["antialias"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "metrics.jsonl").write_text("{}\n")  # it has begun
    claim(tmp_path, settle(config))
    with pytest.raises(UserError, match=r"data\.resize crop -> stretch"):
        claim(tmp_path, settle(with_data(config, resize="stretch")))


def test_cache_of_another_way_is_refused(pipe, folder, pictures, tmp_path):
    data = DataConfig(path=str(pictures[0]), validation=0.0)
    silent, crop = (lm_config(pipe, folder(resize), data=data) for resize in (None, "crop"))
    out = EncodeOptions(out=tmp_path / "cache")
    encode.encode(with_data(silent, resize="stretch"), out)
    with pytest.raises(UserError, match="resize stretch -> crop"):
        encode.encode(silent, out)
    cached = with_data(crop, path=str(out.out))
    with pytest.raises(UserError, match="tokenizer"):
        lm_examples.open_examples(cached, pipe.text)
    manifest = json.loads((out.out / "manifest.json").read_text())
    manifest["encoder"] = weights.hash_module(f"{crop.tokenizer}/tokenizer")
    (out.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"frames read by 'stretch', the tokenizer .* by 'crop'"):
        lm_examples.open_examples(cached, pipe.text)


def test_a_tokenizer_that_was_trained_again_at_its_path_is_noticed(pipe, pictures, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    data = DataConfig(path=str(pictures[0]), validation=0.0)
    config = lm_config(pipe, str(tmp_path / "model"), data=data)
    out = EncodeOptions(out=tmp_path / "cache", limit=1)
    encode.encode(config, out)
    cached = settle(with_data(config, path=str(out.out)))
    lm_examples.open_examples(cached, pipe.text)
    graph, state = nnx.split(pipe.tokenizer)
    other = nnx.merge(graph, jax.tree.map(lambda x: 1.25 * x, state))
    weights.save_module(tmp_path / "model/tokenizer", other, pipe.tokenizer.cfg)
    with pytest.raises(
        UserError, match=r"another tokenizer than .*model/tokenizer now holds \(.*NEW"
    ):
        lm_examples.open_examples(cached, pipe.text)
    with pytest.raises(UserError, match=r"another cache \(encoder .* -> .*; take another --out"):
        encode.encode(config, out)


def test_whether_the_data_are_a_cache_is_asked_once(pipe, folder, pictures, tmp_path):
    config = lm_config(pipe, folder(None), data=DataConfig(path=str(pictures[0]), validation=0.0))
    encode.encode(config, EncodeOptions(out=tmp_path / "cache", limit=1))
    cached = with_data(config, path=str(tmp_path / "cache"))
    assert not cached.reads_tokens  # nobody has looked yet
    settled = settle(cached)
    assert (settled.data.kind, settle(config).data.kind) == ("cache", "auto")
    shutil.rmtree(tmp_path / "cache")
    assert settled.reads_tokens
    assert settled == settle(settled)
    earlier = with_data(settled, kind="auto")  # as the last release noted it
    config_lib.to_json(earlier, tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    claim(tmp_path, settled)
    with pytest.raises(UserError, match=r"another config \(data\.crop center -> random\)"):
        claim(tmp_path, with_data(settled, crop="random"))


def test_cached_videos_of_a_cache_are_refused(pipe, folder):
    old = str(pathlib.Path(__file__).parents[1] / "old_models/token_cache")
    config = lm_config(pipe, folder(None), data=DataConfig(path=old), cached_videos=3)
    with pytest.raises(UserError, match="token_cache is encoded already: leave cached_videos out"):
        settle(config)


def test_cache_of_an_earlier_release_is_known_again(pipe, folder, pictures, tmp_path):
    """Its plan does not name the filter, which was always the smooth one."""
    config = lm_config(pipe, folder(None), data=DataConfig(path=str(pictures[0]), validation=0.0))
    out = EncodeOptions(out=tmp_path / "cache")
    manifest = encode.encode(config, out)
    plan = json.loads((out.out / encoded_cache.PLAN).read_text())
    assert plan["settings"]["data"].pop("antialias") is True
    (out.out / encoded_cache.PLAN).write_text(json.dumps(plan))
    assert encode.encode(config, out) == manifest


def test_info_tells(folder, capsys):
    for way, line in ((TRAINED_CROP, "the largest square, antialiased"), (CONVERTED, "stretched")):
        assert cli.main(["info", folder(*way)]) == 0
        assert line in capsys.readouterr().out
