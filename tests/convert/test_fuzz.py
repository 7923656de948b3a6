"""Whatever a file holds, a conversion ends in a valid model or in one line of complaint."""

import contextlib
import io
import json
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_clip import CONFIG, checkpoint

from convert.dicode import command as dicode_command
from convert.engine.command import parser, run
from convert.engine.rules import ConversionError
from convert.open_clip import main
from convert.parts import clip as open_clip
from dicode_jax.errors import UserError
from dicode_jax.models.clip import CLIP, CLIPConfig
from dicode_jax.storage import weights

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SYSTEM = pathlib.Path(__file__).parents[1] / "golden" / "dicode" / "system"
FUZZ = settings(derandomize=True, database=None, deadline=None)
CLIP_KEYS = sorted(checkpoint(CONFIG))
DTYPES = ["float16", "bfloat16", "float64", "int64", "bool", "complex64", "uint8"]


def mutations(keys):
    """Lists of changes to a state dict, most of them short."""
    key = st.sampled_from(keys)
    number = st.integers(0, 5)
    return st.lists(
        st.one_of(
            st.tuples(st.just("drop"), key, number),
            st.tuples(st.just("rename"), key, st.sampled_from([".x", "0", "\n", "é", ".0.weight"])),
            st.tuples(st.just("add"), st.text(max_size=8), st.lists(number, max_size=4)),
            st.tuples(st.just("shape"), key, st.lists(number, max_size=5)),
            st.tuples(st.just("dtype"), key, st.sampled_from(DTYPES)),
            st.tuples(st.just("value"), key, st.sampled_from([np.nan, np.inf, 1e30, -0.0])),
        ),
        max_size=3,
    )


def mutated(source, changes):
    out = dict(source)
    for kind, key, value in changes:
        if kind == "add":
            out[key] = torch.zeros(value)
        elif key not in out:
            continue
        elif kind == "drop":
            del out[key]
        elif kind == "rename":
            out[key + value] = out.pop(key)
        elif kind == "shape":
            out[key] = torch.ones(value)
        elif kind == "dtype":
            out[key] = out[key].to(getattr(torch, value))
        elif out[key].numel() and out[key].is_floating_point():
            out[key] = out[key].clone()
            out[key].view(-1)[0] = value
    return out


WRAPPERS = {
    "none": lambda d: d,
    "lightning": lambda d: {"state_dict": d, "epoch": 1, "optimizer_states": []},
    "deepspeed": lambda d: {"module": {f"_forward_module.{k}": v for k, v in d.items()}},
    "half": lambda d: {f"module.{k}" if i % 2 else k: v for i, (k, v) in enumerate(d.items())},
    "list": lambda d: list(d.items()),
    "deep": lambda d: {"state_dict": {"state_dict": d}},
    "loop": lambda d: {"state_dict": {"module": 3}, "module": d},
}


def damaged(data, damage):
    """Flips bits or cuts the end; places are parts of the whole."""
    out = bytearray(data)
    for kind, place, bit in damage:
        at = min(int(place * len(out)), len(out) - 1)
        if kind == "cut":
            del out[at:]
        else:
            out[at] ^= 1 << bit
        if not out:
            break
    return bytes(out)


DAMAGE = st.lists(
    st.tuples(st.sampled_from(["flip", "flip", "cut"]), st.floats(0, 1), st.integers(0, 7)),
    max_size=2,
)


@pytest.fixture(scope="module")
def clip():
    return {key: torch.from_numpy(array) for key, array in checkpoint(CONFIG).items()}


@settings(FUZZ, max_examples=80)
@given(
    changes=mutations(CLIP_KEYS),
    wrapper=st.sampled_from([*["none"] * 4, *WRAPPERS]),
    damage=DAMAGE,
    suffix=st.sampled_from([".bin", ".safetensors"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
@pytest.mark.long
def test_clip_is_valid_or_refused_on_one_line(clip, changes, wrapper, damage, suffix, dtype):
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        file, config, out = folder / f"clip{suffix}", folder / "config.json", folder / "out"
        content = mutated(clip, changes)
        if suffix == ".bin":
            torch.save(WRAPPERS[wrapper](content), file)
        else:
            save_file({k: v.contiguous() for k, v in content.items()}, file)
        file.write_bytes(damaged(file.read_bytes(), damage))
        config.write_text(json.dumps(CONFIG))
        before = sorted(path.name for path in folder.iterdir())
        err = io.StringIO()
        args = [file, "--config", config, "--out", out, "--dtype", dtype]
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            status = main([str(arg) for arg in args])
        event("written" if status == 0 else "refused")  # see --hypothesis-show-statistics
        if status == 0:
            module, cfg = weights.load_module(out, CLIP, CLIPConfig)
            assert cfg == open_clip.config_from_original(CONFIG)
            assert all(jnp.isfinite(a).all() for a in weights.named_arrays(module).values())
        else:
            assert status == 2
            lines = [line for line in err.getvalue().splitlines() if "error:" in line]
            assert len(lines) == 1
            assert err.getvalue().count("\n") == 1, err.getvalue()
            assert before == sorted(path.name for path in folder.iterdir())


SYSTEM_SHAPES = {
    key: tuple(array.shape) for key, array in load_file(SYSTEM / "weights.safetensors").items()
}


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    options = json.loads((SYSTEM / "config.json").read_text())["system"]
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(json.dumps(options))
    return str(path)


@pytest.fixture(scope="module")
def system():
    return load_file(SYSTEM / "weights.safetensors")


TELLING = sorted(
    key
    for key in SYSTEM_SHAPES
    if key.endswith(
        (
            "conv1.weight",
            "latents",
            "proj",
            "0.weight",
            "embedding",
            "conv_in.weight",
            "to_q.weight",
        )
    )
)


def planned(tensors, yaml):
    """The plan, or the error."""
    try:
        return dicode_command.read_system(tensors, yaml=yaml), ""
    except UserError as error:
        return None, str(error)


@settings(FUZZ, max_examples=6)
@given(
    key=st.sampled_from(TELLING),
    shape=st.one_of(st.none(), st.lists(st.integers(0, 70), min_size=1, max_size=5)),
)
def test_dicode_is_planned_or_refused(system, yaml, key, shape):
    tensors = dict(system)
    if shape is None:
        del tensors[key]
    else:
        tensors[key] = np.broadcast_to(np.float32(0), shape)
    made, error = planned(tensors, yaml)
    assert "\n" not in error
    if made is not None:
        left_alone = key.startswith("llm_agent.") or key in made.plans.tokenizer.skipped
        same = shape is not None and tuple(shape) == SYSTEM_SHAPES[key]
        assert bool(made.problems) != (same or left_alone)


@settings(FUZZ, max_examples=30)
@given(problems=st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_a_report_of_problems_is_always_one_line(problems):
    def fail(args):
        raise ConversionError(problems)

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert (
            run(
                fail,
                parser("convert.test", "", source="a file", required=False),
                ["--out", "nowhere"],
            )
            == 2
        )
    assert len(err.getvalue().splitlines()) == 1
