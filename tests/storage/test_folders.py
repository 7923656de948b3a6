"""No command deletes, replaces or moves a file that it did not write, however it ends."""

import contextlib
import errno
import json
import os
import pathlib
import tempfile

import pytest
from hugging_face_folder import draw, write_folder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convert.parts import gpt2, hugging_face
from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path, check_output
from dicode_jax.storage.folders import MARK, check_folder, new_folder

MODEL = {"config.json": "{}", "part/model.safetensors": "weights"}


def write(out, *, mark="", **options):
    """The smallest conversion: a model of two files, whose bytes end in `mark`."""
    with new_folder(out, **options) as folder:
        (folder / "part").mkdir()
        for name, text in MODEL.items():
            (folder / name).write_text(text + mark)
        if options.get("sources") == ("raise",):
            raise KeyboardInterrupt


def contents(root):
    """Bytes of every file and target of every link below a folder."""
    out = {}
    for folder, names, files in os.walk(root):
        for path in (pathlib.Path(folder) / name for name in (*names, *files)):
            if path.is_symlink():
                out[str(path.relative_to(root))] = os.readlink(path)
            elif path.is_file():
                out[str(path.relative_to(root))] = path.read_bytes()
    return out


class Killed(BaseException):
    """What a process that is killed does not live to see."""


@contextlib.contextmanager
def killed_at(count):
    """Makes the n-th call to the file system, and all after it, fail: nothing is cleaned up."""
    done = 0

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal done
            done += 1
            if done >= count:
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    names = ("rename", "replace", "unlink", "mkdir", "rmdir", "open", "chmod")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


# A tree of a user: files, folders and links anywhere, also where models go and sources lie.

PLACES = (
    *("out", "out/notes.txt", "out/part", "out/part/mine.txt", "out/.git/HEAD", "out/config.json"),
    *("src", "src/model.bin", "src/out", "src/out/mine.txt", "paper.txt", "a/paper.txt", "a/out"),
    *("a/out/part/model.safetensors", "link", "link/mine.txt", "a/link", "out/link", "src/link"),
)
PLACE = st.sampled_from(PLACES)
ENTRY = st.one_of(st.sampled_from(["file", "folder"]), PLACE.map(lambda place: f"to {place}"))
TREE = st.lists(st.tuples(PLACE, ENTRY), max_size=9)
OTHERS = st.sampled_from(["a/out", "src/out", "link", "a/../out", "src", "a", ".", "new/out"])
OUT = st.one_of(st.just("out"), OTHERS)
SOURCES = st.lists(st.sampled_from(["src", "src/model.bin", "a", "link", "out"]), max_size=2)


def grow(root, tree):
    for place, entry in tree:
        path = root / place
        with contextlib.suppress(OSError):  # something else is there, or in the way
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry == "file":
                path.write_text(f"mine: {place}")
            elif entry == "folder":
                path.mkdir()
            else:
                path.symlink_to(root / entry.removeprefix("to "))


@contextlib.contextmanager
def grown(first, earlier, tree, out):
    """A folder with the tree, and what of it is the user's.

    With `earlier` there is a model of ours at `out`, which the second half of the tree comes after.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder).resolve()
        (root / "a").mkdir()
        grow(root, first)
        before = contents(root)
        if earlier:
            with contextlib.suppress(UserError):
                write(root / out)
        ours = {name: text for name, text in contents(root).items() if before.get(name) != text}
        grow(root, tree)
        users = {name: text for name, text in contents(root).items() if ours.get(name) != text}
        yield root, users


def missing(root, users):
    now = contents(root)
    return [name for name, text in users.items() if now.get(name) != text]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(first=TREE, tree=TREE, out=OUT, sources=SOURCES, earlier=st.booleans())
@example(first=[], tree=[("out/notes.txt", "file")], out="out", sources=[], earlier=True)
def test_every_file_of_the_user_is_there_after_any_command(first, tree, out, sources, earlier):
    for overwrite in (False, True):
        with grown(first, earlier, tree, out) as (root, users):
            given = tuple(root / source for source in sources)
            with contextlib.suppress(UserError):
                write(root / out, mark="2", sources=given, overwrite=overwrite)
                inside = pathlib.Path(os.path.realpath(root / out))
                assert (inside / "config.json").read_text() == "{}2"
            assert missing(root, users) == []
            assert not [name for name in contents(root) if name.endswith((".new", ".old"))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(first=TREE, tree=TREE, out=OUT, sources=SOURCES, earlier=st.booleans())
@example(first=[], tree=[("out/notes.txt", "file")], out="out", sources=[], earlier=True)
def test_every_file_of_the_user_is_there_after_any_kill(first, tree, out, sources, earlier):
    for count in range(1, 100):
        with grown(first, earlier, tree, out) as (root, users):
            given = tuple(root / source for source in sources)
            was_killed = False
            with killed_at(count):
                try:
                    write(root / out, mark="2", sources=given, overwrite=True)
                except UserError:
                    pass
                except Killed:
                    was_killed = True
            assert missing(root, users) == []
            if not was_killed:
                break
            with contextlib.suppress(UserError):  # the next run
                write(root / out, mark="3", sources=given, overwrite=True)
                inside = pathlib.Path(os.path.realpath(root / out))
                assert (inside / "config.json").read_text() == "{}3"
            assert missing(root, users) == []
    else:
        raise AssertionError("the command never came to its end")


def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path):
    out, states = tmp_path / "out", set()
    write(out)
    for count in range(1, 100):
        with killed_at(count):
            try:
                write(out, mark="2", overwrite=True)
                done = True
            except Killed:
                done = False
        (beside,) = [p for p in tmp_path.iterdir() if p.name.endswith(".old")] or [None]
        states.add("old" if beside and not out.exists() else "in place")
        check_folder(out, overwrite=True)  # puts back what a kill between two renames left
        texts = {(out / name).read_text().removeprefix(text) for name, text in MODEL.items()}
        assert texts in ({""}, {"2"})
        if done:
            break
        if texts == {"2"}:  # what is left of the old one is put back whole or not at all
            out.rename(tmp_path / "new")
            check_folder(out, overwrite=True)
            assert not out.exists() or all((out / name).is_file() for name in MODEL)
        for path in [p for p in tmp_path.iterdir() if p != out]:
            path.rename(tmp_path.parent / f"{path.name}{count}")
        if texts == {"2"}:
            write(out, overwrite=True)
    assert texts == {"2"}
    assert states == {"old", "in place"}


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", mark="2", sources=("raise",), overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/config.json").read_text() == "{}"


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/model")
    for mark in ("1", "2"):
        write(tmp_path / "out", mark=mark, overwrite=True)
        assert os.readlink(tmp_path / "out") == "disk/model"
        assert (tmp_path / "disk/model/config.json").read_text() == "{}" + mark
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


def claim_all(out, size):
    """A mark that lists files without their sizes, as no writer does; one is the user's."""
    (out / "part/model.safetensors").unlink()
    (out / "part").rmdir()
    (out / "config.json").write_text("1")
    mark = json.loads((out / MARK).read_text())
    (out / MARK).write_text(json.dumps(mark | {"files": {"config.json": size}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "notes.txt").touch(), "holds notes.txt, which"),
        (lambda out: (out / "part/notes.txt").touch(), "holds part/notes.txt, which"),
        (lambda out: (out / "empty").mkdir(), "holds empty, which"),
        (lambda out: (out / "link").symlink_to("config.json"), "holds link, which"),
        (lambda out: (out / "config.json").write_text("{1}"), r"holds config.json \(changed since"),
        (lambda out: (out / MARK).unlink(), "is not a model that was written here"),
        (lambda out: (out / MARK).write_text("[]"), "is not a model that was written here"),
        (lambda out: (out / MARK).write_text("[" * 10**5), "is not a model that was written here"),
        (lambda out: claim_all(out, None), "is not a model that was written here"),
        (lambda out: claim_all(out, True), "is not a model that was written here"),
    ],
)
def test_what_is_not_ours_in_a_model_is_named(tmp_path, change, message):
    out = tmp_path / "out"
    write(out)
    change(out)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        write(out, overwrite=True)
    assert contents(tmp_path) == before


def test_places_to_work_in_are_no_output(tmp_path, monkeypatch):
    (tmp_path / "work/here").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work/here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in (".", "..", tmp_path / "home", tmp_path, "/"):
        with pytest.raises(UserError, match="is a folder to work in"):
            check_folder(place, overwrite=True)


def test_a_source_is_found_under_every_name(tmp_path):
    (tmp_path / "src/part").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/one").write_text("weights")
    (tmp_path / "src/model.bin").symlink_to("../blobs/one")
    (tmp_path / "alias").symlink_to("src")
    for out in ("src", "alias", "src/part", "alias/new/out", "src/../src", "blobs"):
        with pytest.raises(UserError, match="which is read; name another folder"):
            check_folder(tmp_path / out, sources=[tmp_path / "src"], overwrite=True)
    with pytest.raises(UserError, match="is or holds"):
        check_folder(tmp_path / "src", sources=[tmp_path / "alias/model.bin"], overwrite=True)
    check_folder(tmp_path / "src/new", sources=[tmp_path / "src/model.bin"])  # beside it


def test_a_card_goes_along_where_it_may_be_anybodys(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    write(tmp_path / "out", mark="2", overwrite=True, keep=["README.md"])
    assert (tmp_path / "out/README.md").read_text() == "mine"
    with pytest.raises(UserError, match=r"holds README.md, which"):  # and stays the user's
        write(tmp_path / "out", overwrite=True)


# A converter


CONFIG = {
    "model_type": "gpt2",
    "n_embd": 4,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 3,
    "vocab_size": 5,
}
SHAPES = {
    "wte.weight": (5, 4), "wpe.weight": (3, 4), "ln_f.weight": (4,), "ln_f.bias": (4,),
    "h.0.ln_1.weight": (4,), "h.0.ln_1.bias": (4,), "h.0.ln_2.weight": (4,), "h.0.ln_2.bias": (4,),
    "h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,),
    "h.0.attn.c_proj.weight": (4, 4), "h.0.attn.c_proj.bias": (4,),
    "h.0.mlp.c_fc.weight": (4, 16), "h.0.mlp.c_fc.bias": (16,),
    "h.0.mlp.c_proj.weight": (16, 4), "h.0.mlp.c_proj.bias": (4,),
}  # fmt: skip


def convert(*args):
    return hugging_face.main(gpt2.FAMILY, [str(arg) for arg in args])


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "gpt2", CONFIG, draw(SHAPES))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tree=TREE, out=OUT, earlier=st.booleans())
def test_a_converter_keeps_every_file_of_the_user(tree, out, earlier):
    with grown([], earlier, tree, out) as (root, users):
        if not os.path.lexists(root / "src"):
            write_folder(root / "src", CONFIG, draw(SHAPES))
            users = users | {f"src/{n}": text for n, text in contents(root / "src").items()}
        for _ in range(2):
            convert(root / "src", "--out", root / out, "--overwrite")
            assert missing(root, users) == []


def test_overwrite_takes_no_project_for_a_model_and_no_source_for_a_place(tmp_path, source, capsys):
    project = tmp_path / "project"
    (project / "node").mkdir(parents=True)
    (project / "node/config.json").write_text("{}")
    (project / "paper.txt").write_text("years of work")
    before = contents(tmp_path)
    for out, message in (
        (project, "is not a model that was written here"),
        (source, "is or holds"),
        (source / "converted", "lies in"),
        (tmp_path, "is or holds"),
    ):
        assert convert(source, "--out", out, "--overwrite") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_conversion_of_an_earlier_release_is_known_by_its_report(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert convert(source, "--out", out) == 0
    (out / MARK).unlink()  # which it did not have
    assert convert(source, "--out", out, "--overwrite") == 0
    (out / MARK).unlink()
    stamp = (out / "conversion.json").stat().st_mtime_ns
    for name in ("tokenizer.json", "README.md", "notes.txt"):
        (out / name).write_text("{}")
        os.utime(out / name, ns=(stamp + (name == "README.md"),) * 2)
        before = contents(out)
        assert convert(source, "--out", out, "--overwrite") == 2
        assert f"holds {name}, which was not written here" in capsys.readouterr().err
        assert contents(out) == before
        (out / name).unlink()


def test_a_report_replaces_an_earlier_report_alone(tmp_path, source, capsys):
    report, notes = tmp_path / "report.json", tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    (tmp_path / "link.json").symlink_to("gpt2/model.safetensors")
    os.link(source / "model.safetensors", tmp_path / "hard.json")
    before = contents(tmp_path)
    for path, message in (
        (source / "model.safetensors", "is read by this command"),
        (source / "../gpt2/config.json", "is read by this command"),
        (tmp_path / "link.json", "is read by this command"),
        (tmp_path / "hard.json", "is no earlier report"),
        (notes, "is no earlier report"),
        (tmp_path / "out/report.json", "lies in --out"),
        (tmp_path, "is a folder"),
    ):
        assert convert(source, "--out", tmp_path / "out", "--report", path) == 2
        assert message in capsys.readouterr().err
        assert contents(tmp_path) == before
    for extra in ([], ["--overwrite"]):
        assert convert(source, "--out", tmp_path / "out", "--report", report, *extra) == 0
    assert json.loads(report.read_text())["converter"].startswith("convert.gpt2")


@pytest.mark.parametrize("letter", ["x", "é", "文"])
def test_a_name_as_long_as_a_file_system_allows_is_written(tmp_path, letter):
    name = letter * (250 // len(letter.encode()))
    file = tmp_path / f"{name}.gif"
    for text in ("old", "new"):
        with atomic_path(file) as temporary:
            temporary.write_text(text)
        write(tmp_path / name, mark=text, overwrite=True)
    assert file.read_text() == "new"
    assert (tmp_path / name / "config.json").read_text() == "{}new"
    assert len(list(tmp_path.iterdir())) == 2
    check_output(file, (".gif",))


def test_a_missing_file_that_is_read_while_another_is_written_is_named(tmp_path):
    file = tmp_path / "out.bin"
    for reads in (open, os.listdir, os.stat):
        with pytest.raises(FileNotFoundError, match="caption"), atomic_path(file):
            reads(str(tmp_path / "caption.txt"))
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"out.bin: No such"), atomic_path(file) as temporary:
        temporary.unlink()  # the writer's own
    with pytest.raises(UserError, match=r"cannot write .*out.bin: No space"), atomic_path(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
