"""Whatever configs, command lines and paths say, it works, or one line says why not."""

import contextlib
import functools
import io
import pathlib
import tempfile
import warnings

import pytest
from fuzzing import ODD_NAMES, dumped, ends_well, mutated, tree, weird
from hypothesis import event, given
from hypothesis import strategies as st

from dicode_jax import config as config_lib
from dicode_jax import kinds
from dicode_jax.cli.arguments import make_parser
from dicode_jax.cli.main import COMMANDS
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.pipelines.load import pipeline_kind
from dicode_jax.stages.dicode.representation_model import RepresentationConfig
from dicode_jax.storage import hub
from dicode_jax.storage.folders import check_folder, new_folder
from train import command, loop
from train.encode import EncodeOptions

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = [f for f in sorted(ROOT.glob("configs/*.py")) if "def get_config(" in f.read_text()]


@functools.cache
def examples():
    """Config data of every kind: those of files in the tree, and the defaults of the classes."""
    found = {kind: [] for kind in kinds.KINDS}
    stored = ("tests/old_models/**/config.json", "dicode_jax/assets/**/config.json")
    for path in sorted(path for pattern in stored for path in ROOT.glob(pattern)):
        kind, data = config_lib.read_json(path)
        for name in [kind] if kind else kinds.KINDS:
            with contextlib.suppress(UserError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = config_lib.from_dict(kinds.config_type(name), data)
                found[name].append(config_lib.to_dict(made))
    for path in CONFIGS:
        made = config_lib.load_config_file(path)
        found[kinds.kind_of(type(made))].append(config_lib.to_dict(made))
    for name, held in found.items():
        with contextlib.suppress(TypeError):
            held.append(config_lib.to_dict(kinds.config_type(name)()))
    tokenizer = config_lib.from_dict(DeepTokenizerConfig, found["dicode_tokenizer"][0])
    head = ResamplerConfig(embed_dim=tokenizer.token_dim, output_shape=(4, 4, 3))
    whole = RepresentationConfig(tokenizer=tokenizer, head=head)
    found["dicode_representation"].append(config_lib.to_dict(whole))
    assert all(found.values()), [kind for kind, held in found.items() if not held]
    return found


@given(data=st.data())
def test_configs_are_valid_or_refused(data):
    kind = data.draw(st.sampled_from(sorted(kinds.KINDS)))
    changed = data.draw(mutated(data.draw(st.sampled_from(examples()[kind]))))
    config_type = kinds.config_type(kind)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that are gone
        path = pathlib.Path(name) / "config.json"
        head = data.draw(
            st.sampled_from([{}, {"kind": kind}, {"kind": kind, "version": 1}, {"version": 2}])
        )
        try:
            path.write_text(dumped(head | changed if isinstance(changed, dict) else changed))
        except UnicodeEncodeError:
            return
        before = tree(name)
        made = ends_well(config_lib.from_json, config_type, path)
        ends_well(pipeline_kind, name)
        assert tree(name) == before
        event(f"{'read' if made is not None else 'refused'}")
        if isinstance(changed, dict):
            ends_well(config_lib.from_dict, config_type, changed)
        if made is not None:
            config_lib.to_json(made, path)
            assert config_lib.from_json(config_type, path) == made


@given(
    text=st.one_of(
        st.binary(max_size=30),
        st.sampled_from(
            [b"", b"[" * 100_000, b"9" * 5000, b"{}", b"nul", b"NaN", b"\xff", b'{"a":1}x']
        ),
        weird.map(lambda x: dumped(x).encode()),
    ),
    what=st.sampled_from(["file", "file", "file", "folder", "loop", "below"]),
)
def test_config_files_of_any_bytes_end_well(text, what):
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "config.json"
        if what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path.name)
        else:
            path.write_bytes(text)
        ends_well(config_lib.read_json, path / "x" if what == "below" else path)


# Command lines


@functools.cache
def options_of(config):
    data = config_lib.to_dict(config_lib.load_config_file(config))
    return sorted(config_lib.leaves(data))


VALUES = [
    "None",
    "True",
    "x",
    "1",
    "0",
    "-1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "9" * 5000,
    "",
    "[]",
    "a b",
    "\n",
    "é",
    "\ud800",
    "--",
    "1,2",
    "float32",
]


@given(data=st.data())
def test_command_lines_of_trainings_end_well(data):
    config = data.draw(st.sampled_from(CONFIGS))
    names = options_of(config)
    args = ["--config", str(config)] if data.draw(st.integers(0, 9)) else []
    own = ["workdir", "out", "limit", "split", "shard-size", "help-config", "process-id", "x"]
    for _ in range(data.draw(st.integers(0, 4))):
        name = data.draw(st.sampled_from(names) | st.sampled_from(own) | st.text(max_size=5))
        args.append(data.draw(st.sampled_from(["--", "--", "--", "--no-", "-", ""])) + name)
        values = st.one_of(st.sampled_from(VALUES), st.text(max_size=4))
        args += data.draw(st.lists(values, min_size=0, max_size=2))
    kind = config_lib.load_config_file(config)
    options = data.draw(
        st.sampled_from([loop._options, lambda name: EncodeOptions(out=pathlib.Path(name))])
    )
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        said = ends_well(command.parse, args, (type(kind),), options, prog="train.x", about="x")
        event("parsed" if said else "refused")


WORDS = [
    *("inspect", "--out", "--model", "--seed", "--steps", "--fps", "--num-clips", "--limit", "-h"),
    *("--sheet", "--guidance-scale", "--sampler", "--keyframes", "--dtype", "--set", "--version"),
    *("--num-frames", "--data.path", "ddim", "every", "a.mp4", *COMMANDS),
]


@given(
    words=st.lists(
        st.one_of(st.sampled_from(WORDS), st.sampled_from(VALUES), st.text(max_size=3)), max_size=7
    )
)
def test_command_lines_of_dicode_end_well(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        ends_well(make_parser(COMMANDS).parse_args, words)


# Paths


@given(
    name=st.sampled_from(ODD_NAMES) | st.text(max_size=12),
    there=st.sampled_from(["nothing", "file", "folder", "full", "ours", "loop", "gone", "link"]),
    overwrite=st.booleans(),
    fails=st.booleans(),
)
def test_folders_of_any_name_are_written_whole_or_not_at_all(name, there, overwrite, fails):
    with tempfile.TemporaryDirectory() as top:
        (pathlib.Path(top) / "inner").mkdir()
        inside = name.lstrip("/").replace("..", "_")
        out = f"{top}/inner/{inside}"
        path = pathlib.Path(out)
        with contextlib.suppress(OSError, ValueError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if there in ("folder", "full"):
                path.mkdir()
                if there == "full":
                    (path / "precious").write_text("x")
            elif there == "file":
                path.write_text("x")
            elif there in ("loop", "gone"):
                path.symlink_to(path.name if there == "loop" else "gone")
            elif there == "link":
                (pathlib.Path(top) / "else").mkdir()
                path.symlink_to(pathlib.Path(top) / "else")
            elif there == "ours":
                with new_folder(path) as fresh:
                    (fresh / "a").write_text("old")
        before = tree(top)

        def write():
            with new_folder(out, overwrite=overwrite) as folder:
                (folder / "a").write_text("new")
                if fails:
                    raise UserError("no")
            return True

        checked = ends_well(check_folder, out, overwrite=overwrite)
        assert tree(top) == before
        done = ends_well(write)
        event("written" if done else "refused")
        after = tree(top)
        if not done:
            assert {k: v for k, v in after.items() if v is not None} == {
                k: v for k, v in before.items() if v is not None
            }
        else:
            assert checked is not None
            assert (path / "a").read_text() == "new"
            kept = {
                k: v
                for k, v in before.items()
                if v is not None and not k.endswith(("/a", ".dicode_jax"))
            }
            assert kept.items() <= after.items()


@given(
    name=st.sampled_from(ODD_NAMES) | st.text(max_size=12),
    there=st.sampled_from(["nothing", "file", "folder", "loop"]),
    options=st.sampled_from([{}, {"bare": True}, {"revision": "x"}]),
)
def test_models_of_any_name_are_found_or_not(name, there, options):
    with tempfile.TemporaryDirectory() as top, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(top)
        with contextlib.suppress(OSError, ValueError):
            path = pathlib.Path(top) / name.lstrip("/").replace("..", "_")
            path.parent.mkdir(parents=True, exist_ok=True)
            if there == "folder":
                path.mkdir()
            elif there == "file":
                path.write_text("x")
            elif there == "loop":
                path.symlink_to(path.name)
        for find in (hub.find_folder, hub.find_model):
            given = {k: v for k, v in options.items() if find is hub.find_folder or k != "bare"}
            ends_well(find, name, local_files_only=True, cache_dir=f"{top}/cache", **given)
