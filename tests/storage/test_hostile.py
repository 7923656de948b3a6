"""Model folders from elsewhere: what they claim is weighed first, and what they say is a line."""

import contextlib
import dataclasses
import inspect
import json
import signal

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax import config as config_lib
from dicode_jax.cli.main import main
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.models.t5 import T5EncoderConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import MAX_ARRAYS, ShapeRngs, blank
from dicode_jax.storage import model_card, weights

RESAMPLER = ResamplerConfig(
    dim=12, depth=1, head_dim=4, num_heads=2, num_queries=4, embed_dim=10, output_dim=6
)
BODY = GPT2Config(num_layers=1, num_heads=2, embed_dim=8, max_seq_len=4, vocab_size=10)
AUTOENCODER = AutoencoderKLConfig(channels=4, channel_mult=(1,), num_res_blocks=1, num_groups=2)
LIES = [
    (Resampler, RESAMPLER, {"depth": 1000}, "more than 1[0-9]+ arrays"),
    (GPT2, BODY, {"num_layers": 1000}, "more than 116 arrays"),
    (GPT2, BODY, {"num_layers": 1000, "scan_layers": True}, "missing blocks"),
    (GPT2, BODY, {"mlp_dim": -1}, "nonnegative"),
    (AutoencoderKL, AUTOENCODER, {"num_res_blocks": 100}, "more than 1[0-9]+ arrays"),
    (AutoencoderKL, AUTOENCODER, {"channels": 0}, "channels must be a multiple"),
    (AutoencoderKL, AUTOENCODER, {"z_channels": 10**19}, "shape"),
]
COUNTS = [
    (ResamplerConfig, "depth", 1000),
    *((body, "num_layers", 1000) for body in (GPT2Config, LlamaConfig, T5EncoderConfig)),
    *((tower, "num_layers", 1000) for tower in (CLIPTextConfig, CLIPVisionConfig)),
    *((UNet3DConfig, name, 100) for name in ("num_res_blocks", "transformer_depth")),
    (AutoencoderKLConfig, "num_res_blocks", 100),
    *((config, "channel_mult", 20) for config in (UNet3DConfig, AutoencoderKLConfig)),
]


@contextlib.contextmanager
def within(seconds):
    """Ends what takes longer, instead of waiting for it."""

    def stop(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path):
    weights.save_module(tmp_path, Resampler(RESAMPLER, rngs=nnx.Rngs(3)), RESAMPLER)
    return tmp_path


def write(path, header, body=b""):
    """A safetensors file, whose header may say anything."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def read(path):
    """Header and bytes of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_metadata(folder, **metadata):
    header, body = read(folder / weights.WEIGHTS_FILE)
    write(folder / weights.WEIGHTS_FILE, header | {"__metadata__": metadata}, body)


def one_line(call, *args, **options):
    with within(60), pytest.raises(UserError) as caught:
        call(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 2500
    return str(caught.value)


@pytest.mark.parametrize(("kind", "config", "lie", "message"), LIES)
def test_a_config_that_asks_for_other_arrays_than_there_are_is_refused_at_once(
    tmp_path, kind, config, lie, message
):
    weights.save_module(tmp_path, random_module(lambda: kind(config, rngs=ShapeRngs())), config)
    data = json.loads((tmp_path / weights.CONFIG_FILE).read_text())
    (tmp_path / weights.CONFIG_FILE).write_text(json.dumps(data | lie))
    call = weights.load_module if kind is Resampler else weights.check_module
    with pytest.raises(UserError, match=f"does not fit .*{message}"), within(60):
        call(tmp_path, kind, type(config))


@pytest.mark.parametrize(("config_type", "name", "most"), COUNTS)
def test_counts_far_beyond_those_of_any_model_are_refused_before_one_is_built(
    config_type, name, most
):
    counts = [most, most + 1, 10**8]
    if name == "channel_mult":
        counts = [[1] * most, [1] * (most + 1), [1] * 10**4]
    assert config_lib.from_dict(config_type, {name: counts[0]})
    for count in counts[1:]:
        with pytest.raises(UserError, match=f"{name} must be at most {most}, got"):
            config_lib.from_dict(config_type, {name: count})


def test_a_module_without_weights_has_no_more_arrays_than_could_be_built_in_a_minute():
    config = ResamplerConfig(depth=1000)
    module = lambda cfg, rngs: nnx.List([Resampler(cfg, rngs=rngs) for _ in range(1000)])  # noqa: E731
    with pytest.raises(UserError, match="more than 30 arrays"), within(60):
        blank(module, config, most=30)
    assert inspect.signature(blank).parameters["most"].default == MAX_ARRAYS < 10**5


def test_a_small_misfit_is_told_by_name(folder):
    config = dataclasses.replace(RESAMPLER, depth=3)
    (folder / weights.CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(config)))
    assert "missing blocks.1." in one_line(weights.check_module, folder, Resampler, ResamplerConfig)


def test_a_pointer_of_git_lfs_is_called_one(folder):
    path = folder / weights.WEIGHTS_FILE
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for call in (weights.read_header, weights.read_arrays):
        assert "is a Git LFS pointer and not the file itself" in one_line(call, path)


def test_a_header_of_very_many_arrays_is_not_read(folder):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = folder / weights.WEIGHTS_FILE
    write(path, {f"a{i}": empty for i in range(80_000)})
    for call in (weights.read_header, weights.read_arrays):
        assert "its header has" in one_line(call, path)
    assert "its header has" in one_line(model_card.inspect, folder)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_types_that_no_array_can_have_are_told_without_reading_any(folder, dtype):
    path, end, size = folder / weights.WEIGHTS_FILE, 0, 2 if dtype == "F4" else 1
    header, _ = read(path)
    for name in [name for name in header if name != "__metadata__"]:
        begin, end = end, end + int(np.prod(header[name]["shape"])) // size
        header[name] |= {"dtype": dtype, "data_offsets": [begin, end]}
    write(path, header, bytes(end))
    for call in (weights.check_module, weights.load_module):
        line = one_line(call, folder, Resampler, ResamplerConfig)
        assert f"is of a type not known here, {dtype}" in line
    one_line(weights.read_arrays, path)


@pytest.mark.parametrize("shape", [[1] * 100, [2**31, 0, 2**40]])
def test_shapes_that_no_array_can_have_are_one_line(folder, shape):
    bits = bytes(4 * (0 not in shape))
    array = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(bits)]}
    write(folder / weights.WEIGHTS_FILE, {"a": array}, bits)
    assert "no array is like a" in one_line(weights.hash_module, folder)
    one_line(weights.read_arrays, folder / weights.WEIGHTS_FILE)
    one_line(weights.load_module, folder, Resampler, ResamplerConfig)


def test_names_of_arrays_are_no_lines_of_their_own(folder):
    header, body = read(folder / weights.WEIGHTS_FILE)
    header = {f"{'x' * 9000}\x1b[2J\nname": value for value in header.values()} | header
    del header["proj_in.bias"]
    write(folder / weights.WEIGHTS_FILE, header, body)
    line = one_line(weights.check_module, folder, Resampler, ResamplerConfig)
    assert "\x1b" not in line


def test_enormous_metadata_is_refused(folder):
    for metadata in ({"converter": "x" * 300_000}, {f"k{i}": "v" for i in range(100_000)}):
        with_metadata(folder, **metadata)
        assert "letters of its origin" in one_line(weights.read_metadata, folder)
        assert "letters of its origin" in one_line(model_card.render, folder)


@pytest.mark.parametrize(
    "sources", ['{"a": {"b": ["c"]}}', "[1, 2]", "[" * 100_000, "{", '{"a": 5}', "9" * 5000]
)
def test_sources_of_another_shape_are_none(folder, sources, capsys):
    with_metadata(folder, sources=sources, origin="gpt2")
    (part,) = model_card.inspect(folder)
    assert part.sources == {}
    assert "## Sources" in model_card.render(folder)
    assert main(["info", str(folder)]) == 0
    assert "GPT-2: MIT" in capsys.readouterr().out
    weights.write_config(folder, RESAMPLER, weights.read_metadata(folder))
    assert weights.check_module(folder, Resampler, ResamplerConfig) == RESAMPLER


def test_what_metadata_say_ends_no_line_and_no_head_of_a_card(folder, capsys):
    forged = "x\n---\nlicense: mit\n\x1b]0;title\x07\r| a | b |\n<script>"
    sources = {f"{forged}{i}": f"{forged}`|" for i in range(2)}
    with_metadata(
        folder,
        origin=f"gpt2,{forged}," + ",".join(map(str, range(1000))),
        converter=forged,
        sources=json.dumps(sources),
    )
    card = model_card.render(folder, name=f'a/b"{forged}')
    lines = card.splitlines()
    assert not any(ord(sign) < 32 for sign in card.replace("\n", ""))
    assert lines.count("---") == 2
    assert [line for line in lines if line.startswith("license:")] == ["license: other"]
    assert huggingface_hub.ModelCard(card).data.to_dict()["license"] == "other"
    assert sum("<script>" in line for line in lines) == 1  # in the example, which is code
    rows = [line for line in lines if line.startswith("| x")]
    assert len(rows) == 2
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
    assert len(lines) < 70  # not one for each origin
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith(("---", "license", "|")) for line in out.splitlines())


def test_weights_that_are_no_numbers_are_not_written(folder):
    before = weights.hash_module(folder)
    module = Resampler(RESAMPLER, rngs=nnx.Rngs(0))
    module.proj_in.bias[0] = jnp.nan
    with pytest.raises(UserError, match=r"nothing is written: .*NaN .*\(proj_in.bias, float32\)"):
        weights.save_module(folder, module, RESAMPLER)
    module.proj_in.bias[0] = 1e6
    with pytest.raises(UserError, match="float16"):
        weights.save_module(folder, module, RESAMPLER, dtype=jnp.float16)
    with pytest.raises(UserError, match="float16"):
        weights.save_module(folder / "new", module, RESAMPLER, dtype=jnp.float16)
    assert weights.hash_module(folder) == before
    assert not (folder / "new").exists()
    weights.save_module(folder, module, RESAMPLER)
    assert weights.hash_module(folder) != before
