"""Config files, overrides and JSON."""

import dataclasses
import json
from typing import ClassVar, Literal

import pytest

from dicode_jax import config as config_lib
from dicode_jax import kinds
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.stages.config import RunConfig
from dicode_jax.stages.dicode.tokenizer_loss import TokenizerLossConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    name: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    head: Inner | None = None
    steps: int = 3


def test_json_round_trip_keeps_nested_configs_and_tuples(tmp_path):
    config = Outer(inner=Inner(rate=2.0, sizes=(3, 4, 5), name="a"), head=Inner())
    config_lib.to_json(config, tmp_path / "c.json")
    assert config_lib.from_json(Outer, tmp_path / "c.json") == config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renewed:
    steps: int = 3

    RETIRED: ClassVar = {"rounds": "steps", "twist": (False, "a turn")}


def test_retired_field_is_named_with_what_replaced_it_and_an_unknown_one_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"steps": 5, "rounds": 7}')
    with pytest.warns(UserWarning, match="rounds is gone: steps has replaced it"):
        assert config_lib.from_json(Renewed, path) == Renewed(steps=5)
    path.write_text('{"steps": 5, "round": 7}')
    with pytest.raises(UserError, match="round"):
        config_lib.from_json(Renewed, path)


@pytest.mark.filterwarnings("error")
def test_an_option_that_is_gone_is_passed_over_only_where_it_was_off():
    assert config_lib.from_dict(Renewed, {"steps": 5, "twist": False}) == Renewed(steps=5)
    with pytest.raises(UserError, match="twist = True is gone: a turn has replaced it") as caught:
        config_lib.from_dict(Renewed, {"twist": True})
    assert "\n" not in str(caught.value)


GONE = [
    (config_type, name)
    for config_type in (*map(kinds.config_type, kinds.MODULES), SamplingConfig, TokenizerLossConfig)
    for name in getattr(config_type, "RETIRED", {})
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("config_type", "name"), GONE, ids=lambda x: getattr(x, "__name__", x))
def test_folders_of_earlier_releases_load_but_for_options_that_are_gone(config_type, name):
    is_lm = config_type is DiCoDeLMConfig
    config = DiCoDeLMConfig(body=GPT2Config(vocab_size=50300)) if is_lm else config_type()
    off, _ = config_type.RETIRED[name]
    stored = config_lib.to_dict(config)
    assert config_lib.from_dict(config_type, stored | {name: off}) == config
    other = not off if isinstance(off, bool) else 3
    with pytest.raises(UserError, match=f"{name} = {other} is gone: .+ has replaced it"):
        config_lib.from_dict(config_type, stored | {name: other})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"] = "circle"
    size: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    size: float = 1.0
    part: Inner | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Circle | Square = Circle()


def test_a_union_is_decided_by_its_kind_and_by_the_first_without_one(tmp_path):
    for shape in (Circle(size=2.0), Square(size=2.0, part=Inner(name="a"))):
        config_lib.to_json(Drawing(shape=shape), tmp_path / "c.json")
        assert config_lib.from_json(Drawing, tmp_path / "c.json") == Drawing(shape=shape)
        assert config_lib.from_dict(Circle | Square, config_lib.to_dict(shape)) == shape
    assert config_lib.from_dict(Drawing, {"shape": {"size": 3}}).shape == Circle(size=3.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"kind": "star"}, "unknown kind 'star'; known are circle, square"),
        ({"kind": "square", "sise": 1.0}, "sise"),
        ({"kind": "circle", "part": {}}, "part"),
    ],
)
def test_a_union_that_does_not_fit_names_the_field(shape, message):
    with pytest.raises(UserError, match=message):
        config_lib.from_dict(Drawing, {"shape": shape})


def test_overrides_reach_the_member_of_a_union_that_is_the_default():
    config = Drawing(shape=Square())
    got = config_lib.from_args(type(config), ["--shape.size", "4"], default=config, prog="x")
    assert got == Drawing(shape=Square(size=4.0))


def test_integer_in_json_is_read_into_a_float_field():
    assert config_lib.from_dict(Inner, {"rate": 2}).rate == 2.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 1}, "stepz"),
        ({"steps": "many"}, "steps"),
        ({"inner": {"rate": -1.0}}, "rate must not be negative, got -1.0"),
    ],
)
def test_data_that_does_not_fit_is_one_line_that_names_the_field(data, message):
    with pytest.raises(UserError, match=message) as caught:
        config_lib.from_dict(Outer, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"rate": "0.5"}}, r"want float, got '0.5' @ \$.inner.rate"),
        ({"inner": {"rate": True}}, r"want float, got True @ \$.inner.rate"),
        ({"steps": True}, r"want int, got True @ \$.steps"),
        ({"steps": 3.0}, r"want int, got 3.0 @ \$.steps"),
        ({"inner": {"sizes": [1, "2"]}}, r"want int, got '2' @ \$.inner.sizes\[1\]"),
        ({"inner": {"names": "ab"}}, r"want list, got 'ab' @ \$.inner.names"),
        ({"inner": {"name": 3}}, r"@ \$.inner.name"),
        ({"inner": 5}, r"want dict, got 5 @ \$.inner"),
        ({"steps": "x", "inner": {"rate": "y"}}, r"got 'y' @ \$.inner.rate; .* got 'x' @ \$.steps"),
    ],
)
def test_nothing_is_taken_for_a_value_of_another_type_and_all_places_are_named(data, message):
    with pytest.raises(UserError, match=message):
        config_lib.from_dict(Outer, data)


def test_enormous_lists_and_files_are_refused_as_a_whole(tmp_path):
    many = ["a"] * 10_001  # a fault each, of which an error would be made
    with pytest.raises(UserError, match=r"at most 10000 values, got 10001 @ \$.inner.sizes"):
        config_lib.from_dict(Outer, {"inner": {"sizes": many}})
    (tmp_path / "c.json").write_text(json.dumps({str(i): i for i in range(400_000)}))
    with pytest.raises(UserError, match="too large"):
        config_lib.from_json(Outer, tmp_path / "c.json")


def test_a_field_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"missing @ \$.body"):
        config_lib.from_dict(DiCoDeLMConfig, {})


def test_overrides_reach_nested_fields():
    config = config_lib.from_args(Outer, ["--inner.rate", "0.25", "--steps", "7"])
    assert config == Outer(inner=Inner(rate=0.25), steps=7)


def test_unknown_override_ends_the_program_and_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        config_lib.from_args(Outer, ["--inner.rat", "0.25"])
    assert caught.value.code != 0
    assert "--inner.rate" in capsys.readouterr().err


def test_missing_config_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        config_lib.load_config_file(tmp_path / "none.py")


def test_file_without_get_config_is_an_error(tmp_path):
    (tmp_path / "c.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        config_lib.load_config_file(tmp_path / "c.py")


def test_notes_are_written_beside_the_settings_and_not_read_as_such(tmp_path):
    config = Inner(rate=0.25)
    config_lib.to_json(config, tmp_path / "c.json", notes={"sources": "abc"})
    assert json.loads((tmp_path / "c.json").read_text())["_sources"] == "abc"
    assert config_lib.from_json(Inner, tmp_path / "c.json") == config


@pytest.mark.parametrize("option", ["--help", "-H"])
def test_help_lists_every_field_and_explains_them_when_asked(option, capsys):
    config = RunConfig()
    with pytest.raises(SystemExit):
        config_lib.from_args(type(config), [option], default=config, prog="train")
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("num-steps", "data.path", "optim.lr"):
        assert f"--{name} " in shown
    assert ("Examples per step, over all devices." in shown) == (option == "-H")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
def test_no_number_of_a_config_is_infinite_or_none_at_all(tmp_path, value):
    for inner in ({"rate": value}, {"name": "x", "rate": -value}):
        with pytest.raises(UserError, match="does not fit Outer"):
            config_lib.from_dict(Outer, {"inner": inner})
    (tmp_path / "c.json").write_text('{"inner": {"rate": 1e400}}')
    with pytest.raises(UserError, match="1e400 is no finite number"):
        config_lib.from_json(Outer, tmp_path / "c.json")


@pytest.mark.parametrize("value", ["nan", "inf", "1e400"])
def test_no_number_of_a_command_line_is_infinite_or_none_at_all(value):
    with pytest.raises(UserError, match=r"inner.rate must be a finite number, got (nan|inf)"):
        config_lib.from_args(Outer, ["--inner.rate", value])
    assert config_lib.from_args(Outer, ["--inner.rate", "1e300"]).inner.rate == 1e300


@pytest.mark.parametrize("kind", kinds.PIPELINES)
@pytest.mark.parametrize(
    "settings",
    [{"fps": 0.0}, {"fps": -1.0}, {"fps": 1e9}, *({"frame_size": n} for n in (True, 0, -8, 2**40))],
)
def test_a_pipeline_of_impossible_frames_is_refused(kind, settings):
    name = next(iter(settings))
    if name == "frame_size" and kind != "dicode":
        settings = {name: [8, settings[name]]}
    with pytest.raises(UserError, match=r"frame_size|fps"):
        config_lib.from_dict(kinds.config_type(kind), settings)
