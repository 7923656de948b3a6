"""The conversion engine: strict both ways, by shapes first, tensor by tensor afterwards."""

import dataclasses
import difflib
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from convert.engine import command
from convert.engine.plan import NAMED, plan, write_module
from convert.engine.rules import (
    CONV1X1,
    DROP0,
    LINEAR,
    ConversionError,
    Rule,
    Skip,
    Split,
    original_names,
    prefixed,
)
from convert.engine.sources import LazyTensor
from dicode_jax.errors import UserError
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import weights

RULES = (
    Rule(r"(?:model\.)?layers\.(\d+)\.(up|down)\.weight", "blocks.{0}.{1}.kernel", LINEAR),
    Rule(r"(?:model\.)?layers\.(\d+)\.(up|down)\.bias", "blocks.{0}.{1}.bias"),
    Rule(r"table", "table", DROP0),
    Skip(r"layers\.\d+\.mask", why="a buffer"),
)
SHAPES = {
    "blocks.0.up.kernel": (3, 5),
    "blocks.0.up.bias": (5,),
    "blocks.1.up.kernel": (3, 5),
    "blocks.1.up.bias": (5,),
    "table": (7, 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_layers: int = 2


class Block(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(3, 5, rngs=nnx.Rngs(0))


class Model(nnx.Module):
    def __init__(self, cfg, **_):
        self.blocks = nnx.List([Block() for _ in range(cfg.num_layers)])
        self.table = nnx.Param(np.zeros((7, 2), np.float32))


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    shapes = {"table": (1, 7, 2), "layers.0.mask": (2, 2)}
    for i in range(2):
        shapes |= {f"layers.{i}.up.weight": (5, 3), f"layers.{i}.up.bias": (5,)}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def test_a_plan_reads_shapes_only(source):
    def fail():
        raise AssertionError("read")

    lazy = {key: LazyTensor(a.shape, a.dtype, fail) for key, a in source.items()}
    done = plan(lazy, RULES, SHAPES).check()
    assert done.skipped == {"layers.0.mask": "a buffer"}
    report = done.report()
    assert (report["source_keys"], report["used"], report["targets"]) == (6, 5, 5)
    assert report["parameters"] == 54
    json.dumps(report)


def test_all_problems_are_listed_with_the_nearest_names(source):
    source["layers.0.up.bais"] = source.pop("layers.0.up.bias")
    source["layers.1.up.weight"] = np.zeros((5, 4), np.float32)
    source["layers.1.up.bias"] = np.zeros(5, np.int32)
    source["layers.2.down.bias"] = np.zeros(5, np.float32)
    source["table"] = np.zeros((2, 7, 2), np.float32)
    with pytest.raises(ConversionError) as error:
        plan(source, RULES, SHAPES).check()
    assert error.value.problems == [
        "unused source key: layers.0.up.bais (nearest missing: model.layers.0.up.bias)",
        "unfilled target: blocks.0.up.bias (from model.layers.0.up.bias, "
        "nearest unused: layers.0.up.bais)",
        "layers.1.up.bias: dtype int32 does not fit blocks.1.up.bias, which holds floating-point "
        "numbers",
        "layers.1.up.weight: shape (5, 4) does not fit blocks.1.up.kernel (3, 5)",
        "layers.2.down.bias: the model has no blocks.2.down.bias, nearest is blocks.1.up.bias",
        "table: layout drop0 cannot take shape (2, 7, 2)",
    ]


def test_nearest_names_are_looked_for_a_few_times_only(source, monkeypatch):
    looked_for = []
    nearest = difflib.get_close_matches
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda *args, **_: looked_for.append(args) or nearest(*args)
    )
    many = {f"layers.{i}.up.bias": np.zeros(5, np.float32) for i in range(2, 300)}
    many |= {f"stray.{i}": np.zeros(1, np.float32) for i in range(300)}
    made = plan(source | many, RULES, blank(Model, Config()))
    assert len(made.mismatched) == 298
    assert "nearest is blocks.1.up.bias" in made.mismatched[0]
    assert len(looked_for) <= 2 * NAMED


def test_one_target_is_filled_once(source):
    source["model.layers.0.up.bias"] = source["layers.0.up.bias"]
    (line,) = plan(source, RULES, SHAPES).problems
    assert line == "model.layers.0.up.bias: blocks.0.up.bias is already filled by layers.0.up.bias"


def test_layers_are_stacked_one_by_one(source):
    shapes = {"blocks.up.kernel": (2, 3, 5), "blocks.up.bias": (2, 5), "table": (7, 2)}
    done = plan(source, RULES, shapes, stacked=("blocks",)).check()
    want = np.stack([source[f"layers.{i}.up.weight"].T for i in range(2)])
    np.testing.assert_array_equal(done.array("blocks.up.kernel"), want)
    del source["layers.1.up.bias"]
    problems = plan(source, RULES, shapes, stacked=("blocks",)).problems
    assert problems == ["unfilled target: blocks.1.up.bias (from model.layers.1.up.bias)"]


def test_a_key_is_cut_for_several_targets():
    rules = (Split(r"qkv", ("q", "k", "v"), layout=LINEAR),)
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    done = plan({"qkv": array}, rules, dict.fromkeys("qkv", (4, 2)))
    np.testing.assert_array_equal(done.array("k"), array[2:4].T)
    done = plan({"qkv": array[:5]}, rules, dict.fromkeys("qkv", (4, 2)))
    assert done.problems[0] == "qkv: shape (5, 4) cannot be cut in 3"


def test_patterns_are_written_out_with_the_usual_name_first():
    names = [key for key, _ in original_names(prefixed(RULES, "a."), "blocks.3.up.bias")]
    assert names == ["a.model.layers.3.up.bias", "a.layers.3.up.bias"]
    assert list(original_names(RULES, "blocks.3.side.bias")) == []
    with pytest.raises(ValueError, match="cannot be written out"):
        list(original_names((Rule(r"a.*", "a"),), "a"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_what_loads(source, dtype, tmp_path):
    done = plan(source, RULES, SHAPES)
    notes = {"origin": "dicode", "sources": "{}"}
    write_module(tmp_path, done, Config(), dtype=dtype, metadata=notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model, cfg = weights.load_module(tmp_path, Model, Config)
    assert cfg == Config()
    want = source["layers.1.up.weight"].T.astype(getattr(ml_dtypes, dtype, None) or dtype)
    np.testing.assert_array_equal(model.blocks[1].up.kernel[...], want.astype(np.float32))
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == notes | {"format": "dicode_jax"}


def test_a_module_is_filled_in_memory(source):
    model = plan(source, RULES, blank(Model, Config())).module()
    np.testing.assert_array_equal(model.table[...], source["table"][0])
    broken = source | {"table": source["table"] * np.nan}
    with pytest.raises(UserError, match="table holds NaN"):
        plan(broken, RULES, blank(Model, Config())).module()
    del source["table"]
    with pytest.raises(ConversionError, match="unfilled target: table"):
        plan(source, RULES, blank(Model, Config())).module()


def test_a_scalar_stays_one():
    class Scale(nnx.Module):
        def __init__(self, *, rngs):
            self.alpha = nnx.Param(np.zeros((), np.float32))

    module = plan({"alpha": np.float32(2)}, (Rule("alpha", "alpha"),), blank(Scale)).module()
    assert module.alpha[...].shape == ()


def test_what_is_built_in_memory_is_what_a_command_writes(source, tmp_path):
    done = plan(source, RULES, blank(Model, Config()))
    write_module(tmp_path, done, Config())
    written, _ = weights.load_module(tmp_path, Model, Config)
    for path, array in weights.named_arrays(done.module()).items():
        np.testing.assert_array_equal(array, weights.named_arrays(written)[path], err_msg=path)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float32", "blocks.0.up.bias holds NaN or infinite"),
        (-np.inf, "bfloat16", "blocks.0.up.bias holds NaN or infinite"),
        (1e6, "float16", "blocks.0.up.bias has numbers too large for float16"),
    ],
)
def test_numbers_that_are_none_are_refused(source, value, dtype, message, tmp_path):
    source["layers.0.up.bias"][2] = value
    with pytest.raises(UserError, match=message):
        write_module(tmp_path, plan(source, RULES, SHAPES), Config(), dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_convolution_kernel_must_be_one_wide():
    rules = (Rule("a", "a", CONV1X1),)
    (line,) = plan({"a": np.zeros((4, 3, 3, 3), np.float32)}, rules, {"a": (3, 4)}).problems
    assert line == "a: layout conv1x1 cannot take shape (4, 3, 3, 3)"


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    shape, size = (512, 1024), 2**21
    one = LazyTensor(shape, np.dtype(np.float32), lambda: np.ones(shape, np.float32))
    source = {f"t{i}": one for i in range(16)}
    done = plan(source, (Rule(r"(t\d+)", "{0}", LINEAR),), dict.fromkeys(source, shape[::-1]))
    tracemalloc.start()
    write_module(tmp_path, done, Config())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.safetensors").stat().st_size > 16 * size
    assert peak < 4 * size  # the tensor, its transpose, and what the check for NaN takes


# The shell of all commands.


def shell(tmp_path, main, *extra):
    options = command.parser("convert.test", "A test.", source="a file", required=False)
    return command.run(main, options, ["--out", str(tmp_path / "out"), *extra])


@dataclasses.dataclass(frozen=True)
class Work:
    """A result that writes one file, and may fail while it does."""

    text: str
    error: BaseException | None = None
    problems: tuple = ()
    report: dict = dataclasses.field(default_factory=lambda: {"told": 1})
    summary: str = "done"

    def write(self, args, report):
        with command.output_folder(args.out, overwrite=args.overwrite) as folder:
            (folder / "config.json").write_text(self.text)
            if self.error is not None:
                raise self.error
        return report | {"sources": {}}


def test_what_a_main_returns_is_reported_and_written(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert shell(tmp_path, lambda args: Work("{}"), "--report", str(path)) == 0
    assert capsys.readouterr().out == "done\n"
    report = json.loads(path.read_text())
    assert report == {"converter": command.converter("convert.test"), "told": 1, "sources": {}}
    bad = Work("{}", problems=("b: 2", "a: 1"))
    assert shell(tmp_path, lambda args: bad, "--report", str(path), "--overwrite") == 2
    assert "does not fit: a: 1; b: 2" in capsys.readouterr().err
    report = json.loads(path.read_text())
    assert (report["told"], report["problems"]) == (1, ["a: 1", "b: 2"])
    for error, told in (
        (UserError("disk full"), "disk full"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        assert shell(tmp_path, lambda args, e=error: Work("{}", e), "--report", str(path),
                     "--overwrite")  # fmt: skip
        assert json.loads(path.read_text())["problems"] == [told]


def test_an_output_appears_whole_or_not_at_all(tmp_path, capsys):
    def fail(args):
        return Work("new", ConversionError(["b: 1", "c: 2", "d: 3", "e: 4"]))

    def work(args):
        return Work("{}")

    assert shell(tmp_path, fail, "--report", str(tmp_path / "report.json")) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "b: 1; c: 2; d: 3; and 1 more (all are in" in line
    assert json.loads((tmp_path / "report.json").read_text())["problems"][3] == "e: 4"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert shell(tmp_path, work) == 0
    assert shell(tmp_path, work) == 2
    assert "already there" in capsys.readouterr().err
    assert shell(tmp_path, fail, "--overwrite") == 2
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert shell(tmp_path, work, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.json"]


def test_overwriting_spares_what_is_no_model(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    def main(args):
        command.check_folder(tmp_path / "out", overwrite=args.overwrite)

    assert shell(tmp_path, main, "--overwrite") == 2
    assert "is not a model" in capsys.readouterr().err


def test_an_interrupted_command_leaves_nothing(tmp_path, capsys):
    def main(args):
        with command.output_folder(args.out):
            raise KeyboardInterrupt

    assert shell(tmp_path, main) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
