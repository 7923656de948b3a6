"""Modules to folders and back."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring
from safetensors.flax import save_file

from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.storage import weights

CONFIG = ResamplerConfig(
    dim=12, depth=1, head_dim=4, num_heads=2, num_queries=4, embed_dim=10, output_dim=6
)

ENV = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def folder(tmp_path):
    weights.save_module(tmp_path, Resampler(CONFIG, rngs=nnx.Rngs(3)), CONFIG)
    return tmp_path


def test_round_trip_keeps_every_array_and_the_config(folder):
    module, config = weights.load_module(folder, Resampler, ResamplerConfig)
    assert config == CONFIG
    want = weights.named_arrays(Resampler(CONFIG, rngs=nnx.Rngs(3)))
    got = weights.named_arrays(module)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_half_precision_storage_is_read_as_float32(tmp_path):
    weights.save_module(tmp_path, Resampler(CONFIG, rngs=nnx.Rngs(0)), CONFIG, dtype=jnp.float16)
    stored = weights.read_arrays(tmp_path / weights.WEIGHTS_FILE)
    assert {array.dtype for array in stored.values()} == {jnp.dtype("float16")}
    module, _ = weights.load_module(tmp_path, Resampler, ResamplerConfig)
    assert module.proj_in.kernel.dtype == jnp.float32


def test_loading_compiles_nothing(tmp_path):
    """A start would wait for two programs of each shape, read from the cache or not."""
    config = dataclasses.replace(CONFIG, dim=20, embed_dim=14)  # shapes that no other test has
    weights.save_module(tmp_path, Resampler(config, rngs=nnx.Rngs(0)), config, dtype=jnp.float16)
    compiled = []

    def note(event, _, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more)

    monitoring.register_event_duration_secs_listener(note)
    try:
        for dtype in (jnp.float32, jnp.bfloat16):
            weights.load_module(tmp_path, Resampler, ResamplerConfig, param_dtype=dtype)
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert not compiled


def test_half_precision_storage_is_read_on_the_host_too(tmp_path):
    for dtype in (jnp.bfloat16, jnp.float16):
        weights.save_module(tmp_path, Resampler(CONFIG, rngs=nnx.Rngs(0)), CONFIG, dtype=dtype)
        host, _ = weights.load_module(tmp_path, Resampler, ResamplerConfig, on_host=True)
        device, _ = weights.load_module(tmp_path, Resampler, ResamplerConfig)
        want = weights.named_arrays(device)
        for name, array in weights.named_arrays(host).items():
            assert type(array) is np.ndarray
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, want[name])


@pytest.mark.long
def test_stacked_blocks_are_single_ones_on_a_device_and_stay_stacked_on_the_host(tmp_path):
    body = GPT2Config(num_layers=3, num_heads=1, embed_dim=4, max_seq_len=6, vocab_size=5)
    body = dataclasses.replace(body, scan_layers=True)
    config = DiCoDeLMConfig(
        body=body, num_tokens=2, token_dim=3, num_mixtures=1, image_token_id=4, pad_token_id=3
    )
    weights.save_module(tmp_path, DiCoDeLM(config, rngs=nnx.Rngs(0)), config)
    host, stored = weights.load_module(tmp_path, DiCoDeLM, DiCoDeLMConfig, on_host=True)
    assert stored == config
    lm, loaded = weights.load_module(
        tmp_path, DiCoDeLM, DiCoDeLMConfig, param_dtype=jnp.bfloat16, dtype=jnp.float32
    )
    assert not loaded.body.scan_layers
    assert loaded == lm.cfg
    assert len(lm.body.blocks) == 3
    ours, theirs = weights.named_arrays(lm), weights.named_arrays(host)
    assert {array.dtype for array in ours.values()} == {jnp.dtype("bfloat16")}
    for i in range(3):
        want = theirs["body.blocks.attn.qkv.kernel"][i].astype(jnp.bfloat16)
        np.testing.assert_array_equal(ours[f"body.blocks.{i}.attn.qkv.kernel"], want)
    assert len(ours) == len(theirs) + 2 * sum("blocks" in name for name in theirs)
    weights.save_module(tmp_path / "again", lm, lm.cfg)
    again, _ = weights.load_module(tmp_path / "again", DiCoDeLM, DiCoDeLMConfig)
    x = jnp.ones((1, 4, 4))
    np.testing.assert_allclose(again.body(x)[0], lm.body(x)[0], atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_loading_holds_one_array_beside_the_module(tmp_path, dtype):
    """Of 64 arrays of 2 MB; the peak of getrusage would begin with that of the parent."""
    arrays = {f"layers.{i}": jnp.full((512, 1024), i, dtype) for i in range(64)}
    for count, name in ((1, "warm"), (64, "large")):
        (tmp_path / name).mkdir()
        held = {f"layers.{i}": arrays[f"layers.{i}"] for i in range(count)}
        save_file(held, tmp_path / name / weights.WEIGHTS_FILE)
        (tmp_path / name / weights.CONFIG_FILE).write_text(f'{{"count": {count}}}')
    code = """
import dataclasses, re, sys
import jax.numpy as jnp
from flax import nnx
from dicode_jax.storage import weights

@dataclasses.dataclass(frozen=True)
class Config:
    count: int

class Model(nnx.Module):
    def __init__(self, cfg, **_):
        self.layers = nnx.List([nnx.Param(jnp.zeros((512, 1024))) for _ in range(cfg.count)])

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

weights.load_module("warm", Model, Config)
before = peak()
model, _ = weights.load_module("large", Model, Config)
assert float(model.layers[5][0, 0]) == 5
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 0, done.stderr
    assert 100 < float(done.stdout) < 192  # halfway from one copy, 128, to two


def test_wrong_shape_and_missing_array_are_named(folder):
    config = dataclasses.replace(CONFIG, depth=2, output_dim=7)
    path = folder / weights.CONFIG_FILE
    path.write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UserError, match=r"missing blocks\.1\..* more"):
        weights.load_module(folder, Resampler, ResamplerConfig)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights at"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), "not a whole safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"dimm": 3}'), "dimm"),
        (lambda f: (f / "config.json").unlink(), "no configuration at"),
    ],
)
def test_broken_folder_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        weights.load_module(folder, Resampler, ResamplerConfig)
    assert "\n" not in str(caught.value)


def test_cut_weights_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole safetensors"):
        weights.load_module(folder, Resampler, ResamplerConfig)


def test_weights_file_has_the_permissions_of_any_new_file(folder, tmp_path):
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert (folder / weights.WEIGHTS_FILE).stat().st_mode == mode


def test_hash_follows_config_and_numbers_but_not_notes(folder, tmp_path_factory):
    def stored(module, config=CONFIG, **options):
        other = tmp_path_factory.mktemp("other")
        weights.save_module(other, module, config, **options)
        return weights.hash_module(other)

    base = weights.hash_module(folder)
    same = Resampler(CONFIG, rngs=nnx.Rngs(3))
    assert stored(same, metadata={"source": "elsewhere"}) == base
    assert stored(same, dtype=jnp.float16) != base
    assert stored(same, dataclasses.replace(CONFIG, num_heads=1, head_dim=8)) != base
    same.proj_in.bias[0] += 1e-6
    assert stored(same) != base
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not a whole safetensors"):
        weights.hash_module(folder)
