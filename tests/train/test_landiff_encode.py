"""What `train.encode` keeps for LanDiff is what its modules make of the same frames."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.shapes_world import render_at, scene_at
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.media.video import write_video
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicode_jax.models.landiff.features import features_of
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.motion import frame_motion
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.models.vit import ViT, ViTConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.landiff.config import EncodeConfig
from dicode_jax.storage import weights
from dicode_jax.text.t5 import learn_words
from dicode_jax.training.evaluate import jit_local
from train import encode, landiff_encoder, landiff_text
from train.encode import EncodeOptions

TOWER = CLIPVisionConfig(
    image_size=8, patch_size=4, embed_dim=6, num_layers=1, num_heads=2, output_dim=None
)
SIZES = SemanticTokenizerConfig(
    frames=FrameTokens(iframe=3, pframe=2, segment=2), grid=(2, 2), feature_dim=6, embed_dim=16,
    num_layers=1, num_heads=1, token_dim=5, codebook_size=8, code_dim=4,
)  # fmt: skip
VAE = AutoencoderCausal3DConfig(
    channels=2, encoder_mult=(1, 1, 1), decoder_mult=(1, 1, 1), encoder_blocks=1, decoder_blocks=1,
    z_channels=3, num_groups=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The three modules, and a config that names their folders."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"features": (CLIPVision, TOWER), "tokenizer": (SemanticTokenizer, SIZES)}
    kinds["vae"] = (AutoencoderCausal3D, VAE)
    made = {}
    for name, (kind, cfg) in kinds.items():
        made[name] = random_module(lambda kind=kind, cfg=cfg: kind(cfg, rngs=ShapeRngs()))
        weights.save_module(folder / name, made[name], cfg)
    config = EncodeConfig(
        data=DataConfig(num_frames=9), frame_size=8, seed=3,
        tokenizer=str(folder), vae=str(folder / "vae"), keep_features=True,
    )  # fmt: skip
    return made, config


def test_a_cache_holds_what_the_modules_make_segment_by_segment(modules, tmp_path):
    made, config = modules
    encode.encode(config, EncodeOptions(out=tmp_path / "cache", limit=3, shard_size=2))
    cache = EncodedCache(tmp_path / "cache")
    assert len(cache) == 3
    example, scene = cache[2], scene_at(3, 2, "train")
    frames = render_at(scene, np.arange(9) / 16, frame_size=8)
    assert example.captions == (scene.caption,)
    np.testing.assert_allclose(example.arrays["times"], np.arange(9) / 8)
    np.testing.assert_array_equal(example.arrays["motion"], frame_motion(frames))
    features = jit_local(features_of)(made["features"], np.asarray(to_float(frames))[None])
    np.testing.assert_allclose(
        example.arrays["features"].astype(np.float32), features[0], atol=0.02, rtol=0.01
    )
    codes = jit_local(lambda tokenizer, x: tokenizer.encode(x))
    want = [codes(made["tokenizer"], features[:, part])[0] for part in (slice(2), slice(2, 3))]
    np.testing.assert_array_equal(example.arrays["codes"], np.concatenate(want))
    assert example.arrays["codes"].dtype == np.int16
    latents = jit_local(lambda vae, x: vae.encode_latents(to_float(x)))(made["vae"], frames[None])
    assert example.arrays["latents"].shape == (3, 2, 2, 3)
    np.testing.assert_allclose(
        example.arrays["latents"].astype(np.float32), latents[0], atol=0.02, rtol=0.01
    )
    for name, folder in (("tokenizer", "tokenizer"), ("vae", "vae")):
        path = f"{config.tokenizer}/{folder}"
        assert cache.setting(name) == weights.hash_module(path)


def test_frames_that_are_no_squares_fill_a_grid_that_is_none(modules, tmp_path):
    _, config = modules
    vit = ViTConfig(image_size=8, patch_size=4, embed_dim=6, num_layers=1, num_heads=1, mlp_dim=8)
    sizes = dataclasses.replace(SIZES, grid=(2, 3))
    for name, kind, cfg in (
        ("features", ViT, vit), ("tokenizer", SemanticTokenizer, sizes)
    ):  # fmt: skip
        module = random_module(lambda kind=kind, cfg=cfg: kind(cfg, rngs=ShapeRngs()))
        weights.save_module(tmp_path / name, module, cfg)
    frames = np.random.default_rng(0).integers(256, size=(9, 20, 30, 3)).astype(np.uint8)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", frames, fps=8)
    wide = dataclasses.replace(
        config,
        data=DataConfig(path=str(tmp_path / "videos"), num_frames=9, validation=0.0),
        tokenizer=str(tmp_path),
        frame_width=12,
    )
    encode.encode(wide, EncodeOptions(out=tmp_path / "cache"))
    cache = EncodedCache(tmp_path / "cache")
    assert cache[0].arrays["features"].shape == (3, 2, 3, 6)
    assert cache[0].arrays["latents"].shape == (3, 2, 3, 3)
    assert cache.setting("frame_width") == 12
    with pytest.raises(UserError, match=r"takes 2 x 3 features .* of frames of 8 x 8 pixels"):
        landiff_encoder.find(dataclasses.replace(wide, frame_width=None))
    with pytest.raises(UserError, match="height and width of frames, 8 x 14"):
        landiff_encoder.find(dataclasses.replace(wide, frame_width=14))
    with pytest.raises(ValueError, match="frame_width must be at least 1, got 0"):
        dataclasses.replace(wide, frame_width=0)


def test_the_published_configs_fit_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "hash_module", lambda folder: "a" * 64)
    configs = {
        name: config_lib.load_config_file(f"configs/landiff/released_{name}.py")
        for name in ("tokenizer", "encode", "lm", "diffusion")
    }
    sizes = {"features": ViTConfig(), "tokenizer": configs["tokenizer"].model}
    for name, cfg in (sizes | {"vae": AutoencoderCausal3DConfig()}).items():
        (tmp_path / name).mkdir()
        config_lib.to_json(cfg, tmp_path / name / "config.json")
    config = dataclasses.replace(
        configs["encode"], tokenizer=str(tmp_path), vae=str(tmp_path / "vae")
    )
    schema, dit = landiff_encoder.find(config).schema, configs["diffusion"].model.dit
    assert schema["latents"].shape == (None, dit.height, dit.width, dit.channels)
    assert configs["diffusion"].semantic == dataclasses.replace(
        configs["tokenizer"].model, remat=False
    )
    assert config.lm_text_length == configs["lm"].text_length
    assert config.dit_text_length == dit.text_len
    assert configs["lm"].model.frames == configs["tokenizer"].model.frames
    assert configs["lm"].model.codebook_size == configs["tokenizer"].model.codebook_size


def test_another_autoencoder_makes_another_cache(modules, tmp_path):
    _, config = modules
    options = EncodeOptions(out=tmp_path / "cache", limit=1)
    plain = dataclasses.replace(config, vae=None, keep_features=False)
    encode.encode(plain, options)
    assert set(EncodedCache(options.out).schema) == {"codes", "motion", "times"}
    with pytest.raises(UserError, match=r"holds another cache .*settings\.vae"):
        encode.encode(config, options)


def test_latents_are_encoded_in_chunks_where_that_is_asked_for(modules, monkeypatch):
    _, config = modules
    chunked = dataclasses.replace(config, vae_in_chunks=True)
    assert landiff_encoder.find(chunked).settings["vae_in_chunks"]
    assert "vae_in_chunks" not in landiff_encoder.find(config).settings  # caches that there are
    asked, encode_latents = [], AutoencoderCausal3D.encode_latents

    def encoded(self, video, key=None, *, in_chunks=False):
        asked.append(in_chunks)
        return encode_latents(self, video, key, in_chunks=in_chunks)

    monkeypatch.setattr(AutoencoderCausal3D, "encode_latents", encoded)
    folders = {name: pathlib.Path(config.tokenizer) / name for name in modules[0]}
    frames = np.zeros((17, 8, 8, 3), np.uint8)
    for one in (config, chunked):
        graph, state = nnx.split(landiff_encoder._Modules(one, folders))
        run = lambda s, x, graph=graph: landiff_encoder.encode(nnx.merge(graph, s), x)  # noqa: E731
        shapes = jax.eval_shape(run, state, frames)
        assert shapes["latents"].shape == (5, 2, 2, 3)
    assert asked == [False, True]


def test_captions_are_kept_as_the_models_read_them(modules, tmp_path):
    _, config = modules
    sizes = T5EncoderConfig(
        num_layers=1, num_heads=2, embed_dim=6, head_dim=3, mlp_dim=8, vocab_size=9
    )
    t5 = random_module(lambda: T5Encoder(sizes, rngs=ShapeRngs()))
    weights.save_module(tmp_path / "lan/text_encoder", t5, sizes)
    words = learn_words(["a red circle moves up"])  # and nothing else
    words.save(tmp_path / "lan/text_encoder")
    folder = str(tmp_path / "lan")
    reading = dataclasses.replace(
        config, lm_text=folder, dit_text=folder, dit_text_length=11, lm_text_length=4
    )
    read = landiff_text.load(reading, landiff_text.find(reading))
    embed = jit_local(lambda t5, ids, valid: t5(t5.embed_tokens(ids), valid))

    ids = words("a red circle", 11)
    made = read(["a red circle", "up"])
    assert {name: (x.shape, str(x.dtype)) for name, x in made.items()} == {
        "lm_text": ((4, 6), "bfloat16"), "dit_text": ((11, 6), "bfloat16")
    }  # fmt: skip
    want = embed(t5, ids[None], None)[0]  # alone: no padding was seen
    np.testing.assert_allclose(made["lm_text"].astype(np.float32), want, atol=0.02, rtol=0.01)
    padded = np.pad(ids, (0, 7), constant_values=words.pad_id)
    want = embed(t5, padded[None], None)[0]
    np.testing.assert_allclose(made["dit_text"].astype(np.float32), want, atol=0.02, rtol=0.01)
    with pytest.warns(UserWarning, match="captions of more than 4 ids are cut there"):
        assert len(read(["a red circle moves"])["lm_text"]) == 4
    assert len(read([])["lm_text"]) == 1  # its end alone

    encoder = landiff_encoder.find(reading)
    assert {"lm_text", "dit_text"} < set(encoder.schema)
    assert encoder.settings["lm_text"] == weights.hash_module(tmp_path / "lan/text_encoder")
    with pytest.raises(UserError, match=r"no text_encoder in .*: name the `model` folder"):
        landiff_encoder.find(dataclasses.replace(reading, lm_text=str(tmp_path)))
    with pytest.raises(ValueError, match="lm_text_length and dit_text_length must be at least 2"):
        dataclasses.replace(reading, dit_text_length=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": None}, "--tokenizer"),
        ({"frame_size": 16}, "of frames of 16 x 16 pixels its encoder gives 4 x 4 of 6"),
    ],
)
def test_parts_that_do_not_fit_are_refused(modules, change, said, tmp_path):
    _, config = modules
    with pytest.raises(UserError, match=said):
        encode.encode(
            dataclasses.replace(config, **change), EncodeOptions(out=tmp_path / "cache", limit=1)
        )
    assert not (tmp_path / "cache").exists()
