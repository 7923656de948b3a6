"""Models from the Hub and to it, against a stand-in: no test reaches for the network."""

import json
import pathlib
import shutil
import types

import huggingface_hub
import numpy as np
import pytest
from fake_hub import FakeHub
from huggingface_hub import errors
from tiny import tiny_pipeline

from dicode_jax import cli
from dicode_jax.errors import UserError
from dicode_jax.pipelines.dicode import DiCoDePipeline
from dicode_jax.pipelines.dynamicrafter import DynamiCrafterPipeline
from dicode_jax.storage import hub, model_card, weights

NAME = "someone/tiny-model"
DIGEST = "0123" * 16
SOURCE = {
    "origin": "dicode",
    "converter": "convert.dicode 0.1",
    "sources": json.dumps({"a.bin": DIGEST}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder whose decoder says that it was converted."""
    pipe = tiny_pipeline()
    pipe.metadata = {"decoder": SOURCE}
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def downloads(monkeypatch, folder):
    """`snapshot_download` answers with the folder, and notes how it was asked."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_downloads_need_a_place(downloads, monkeypatch):
    for home in (None, ""):
        for variable in ("XDG_CACHE_HOME", "HOME", *hub._SAY):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
        if home is not None:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(UserError, match=f"no home folder to keep {NAME} in; set HF_HOME"):
            hub.find_model(NAME)
        assert not downloads
    assert hub.find_model(NAME, cache_dir="somewhere")
    monkeypatch.setenv("HF_HOME", "somewhere")
    assert hub.find_model(NAME)


def failing(monkeypatch, error):
    def snapshot_download(name, **_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def refused(kind, message):
    """An error of the library as its HTTP client would raise it."""
    return kind(message, response=types.SimpleNamespace(headers={}, request=None))


class ConnectFault(Exception):
    """As HTTP clients have them: of no kind that one could list."""


def one_line(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_of_the_hub_is_downloaded_and_loaded(downloads, folder):
    pipe = DiCoDePipeline.from_pretrained(NAME, "v1", cache_dir="cache", local_files_only=True)
    ((name, options),) = downloads
    assert (name, options["revision"], options["cache_dir"]) == (NAME, "v1", "cache")
    assert options["local_files_only"]
    assert pipe.config == DiCoDePipeline.from_pretrained(folder).config
    arrays = weights.named_arrays(pipe.decoder)
    stored = weights.read_arrays(folder / "decoder/model.safetensors")
    np.testing.assert_array_equal(arrays["null_tokens"], stored["null_tokens"])


def test_no_file_that_could_hold_code_is_asked_for(downloads):
    hub.find_model(NAME)
    patterns = downloads[0][1]["allow_patterns"]
    assert set(patterns) == {"*.safetensors", "*.json", "*.txt", "*.md"}


def test_a_folder_wins_over_a_name_and_the_package_asks_nobody(
    downloads, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "someone/tiny-model")
    assert hub.find_model(NAME) == pathlib.Path(NAME)
    assert hub.find_model().name == hub.find_model("shapes").name == "shapes"
    assert not downloads


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused(errors.RepositoryNotFoundError, "gone\nmore"), "no such model"),
        (refused(errors.GatedRepoError, "gated"), "terms accepted"),
        (refused(errors.RevisionNotFoundError, "no rev"), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("not\ncached"), "at 'v9' is not in the cache"),
        (errors.HFValidationError("bad\nname"), "cannot download someone/tiny-model: bad"),
        (refused(errors.HfHubHTTPError, "500\nserver"), "cannot download"),
        (OSError("no space left\non device"), "no space left"),
        (ConnectFault("no route\nto host"), "cannot download someone/tiny-model: no route"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, message):
    failing(monkeypatch, error)
    assert message in one_line(DiCoDePipeline.from_pretrained, NAME, "v9")


def test_offline_takes_what_the_cache_holds_and_says_when_it_does_not(
    folder, tmp_path, monkeypatch
):
    """With the real library, whose offline switch is on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = one_line(hub.find_model, NAME, cache_dir=tmp_path)
    assert "not in the cache" in line
    assert "offline" in line
    commit, repo = "a" * 40, tmp_path / "models--someone--tiny-model"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    found = hub.find_model(NAME, cache_dir=tmp_path)
    assert found == repo / "snapshots" / commit
    assert DiCoDePipeline.from_pretrained(NAME, cache_dir=tmp_path).tokenizer is not None
    assert "v2" in one_line(hub.find_model, NAME, revision="v2", cache_dir=tmp_path)


def test_what_is_no_model_is_said(downloads, folder, tmp_path, monkeypatch):
    assert "neither a folder" in one_line(hub.find_model, "no such model")
    assert "has no revision" in one_line(hub.find_model, folder, revision="main")
    assert "has no revision" in one_line(hub.find_model, "shapes", revision="main")
    assert "holds no config.json" in one_line(hub.find_model, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    line = one_line(hub.find_model, NAME)
    assert line == f"{NAME} on the Hub is not a model of dicode_jax: it holds no config.json"


def test_of_several_forms_of_the_same_weights_the_first_is_fetched_alone(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    for name, files in (
        ("gpt2", ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/config.json"]),
        ("a/old", ["config.json", "pytorch_model.bin", "tf_model.h5"]),
    ):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(file)
        fake.repositories[name] = tmp_path / name
    options = {"either": ("*.safetensors", "*.bin"), "bare": True}
    folder = hub.find_folder("gpt2", ("config.json",), **options)
    assert folder == tmp_path / "cache/gpt2"
    assert fake.files("gpt2") == {"config.json", "model.safetensors"}
    hub.find_folder("a/old", ("config.json",), **options)
    assert fake.files("a/old") == {"config.json", "pytorch_model.bin"}
    monkeypatch.chdir(tmp_path)  # where both are folders
    for name in ("gpt2", "a/old"):
        assert hub.find_folder(name, **options) == pathlib.Path(name)


def test_what_can_be_no_name_is_not_asked_for(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    for name in ("gpt2", "runs/a/model", "/runs/a", "models/x.ckpt", "", "a b/c"):
        assert "there is nothing at" in one_line(hub.find_folder, name)
    assert "there is nothing at" in one_line(hub.find_folder, "tokenizer.json", bare=True)
    assert fake.asked == []
    assert "there is no folder gpt2, and no such model" in one_line(
        hub.find_folder, "gpt2", bare=True
    )


@pytest.mark.parametrize(
    "revision", ["../../../x", "/abs", "a/../b", "a//b", "a/", ".git", "", "a b", "a\n", "x" * 201]
)
def test_what_can_be_no_revision_is_not_looked_up(tmp_path, monkeypatch, revision, api):
    """With the real library, which takes it for a path in its cache."""
    repo = tmp_path / "cache/models--o--n"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (tmp_path / "x").write_text("y" * 40)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    line = one_line(hub.find_model, "o/n", revision=revision, **options)
    assert "no branch, tag or commit" in line
    assert "no branch" in one_line(hub.upload, tmp_path, NAME, revision=revision)
    for right in ("main", "v1.0", "refs/pr/1", "a" * 40, "feature/x-1"):
        assert "not in the cache" in one_line(hub.find_model, "o/n", revision=right, **options)


@pytest.mark.parametrize("name", ["a..b/c", "a/b..c", "é/b", "a/b\n", "a/" + "b" * 97])
def test_names_that_the_cache_could_take_for_paths_are_not_asked_for(tmp_path, monkeypatch, name):
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    assert "there is nothing at" in one_line(hub.find_folder, name)
    assert fake.asked == []


def test_a_cache_that_leads_out_of_itself_is_refused(folder, tmp_path):
    repo, commit = tmp_path / "cache/models--o--n", "a" * 40
    snapshot = shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    (repo / "blobs").mkdir()  # where the files of a snapshot lie
    (snapshot / "config.json").rename(repo / "blobs/abc")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert hub.find_model("o/n", **options) == snapshot
    (tmp_path / "key.json").write_text("{}")
    (snapshot / "key.json").symlink_to(tmp_path / "key.json")
    assert "key.json leads out of the cache of o/n" in one_line(hub.find_model, "o/n", **options)
    (repo / "refs/main").write_text("../../../elsewhere")
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert "leads out of the cache" in one_line(hub.find_model, "o/n", **options)


class FakeApi:
    """Takes uploads into memory."""

    sent: dict
    error: Exception | None = None

    def __init__(self, **options):
        self.sent["options"] = options

    def create_repo(self, name, **options):
        if self.error is not None:
            raise self.error
        self.sent["repo"] = (name, options)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
        root = pathlib.Path(folder_path)
        files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        wanted = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)
        files = {name: files[name] for name in wanted}
        self.sent["files"], self.sent["upload"] = files, (repo_id, options)


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "sent", {}, raising=False)
    return FakeApi


def test_push_sends_the_pipeline_and_its_card(api, folder):
    pipe = DiCoDePipeline.from_pretrained(folder)
    url = pipe.push_to_hub(NAME, private=True, revision="dev", dtype="float16")
    assert url == f"https://huggingface.co/{NAME}"
    assert api.sent["repo"] == (NAME, {"private": True, "exist_ok": True})
    assert api.sent["upload"][0] == NAME
    assert api.sent["upload"][1]["revision"] == "dev"
    files = api.sent["files"]
    assert {"config.json", "README.md", "decoder/model.safetensors"} <= set(files)
    card = files["README.md"].decode()
    assert f"# {NAME}" in card
    assert f'dicode_jax.load("{NAME}")' in card
    assert "float16" in card
    assert "no licence" in card  # the decoder's origin was handed on
    assert DIGEST in card


def test_a_pipeline_of_another_kind_is_pushed_as_well(api):
    old = pathlib.Path(__file__).parents[1] / "old_models/dynamicrafter"
    DynamiCrafterPipeline.from_pretrained(old).push_to_hub(NAME)
    files = api.sent["files"]
    assert {"config.json", "text/tokenizer.json", "resampler/model.safetensors"} <= set(files)
    assert "pipeline_tag: image-to-video" in files["README.md"].decode()


def test_push_says_in_one_line_what_is_wrong(api, folder, tmp_path, monkeypatch):
    assert "owner/name" in one_line(hub.upload, folder, "just-a-name")
    assert "no config.json" in one_line(hub.upload, tmp_path, NAME)
    for error, message in (
        (errors.LocalTokenNotFoundError("none"), "hf auth login"),
        (refused(errors.HfHubHTTPError, "403\nno"), "cannot upload"),
        (ConnectFault("no route\nto host"), "cannot upload to someone/tiny-model: no route"),
    ):
        monkeypatch.setattr(FakeApi, "error", error)
        assert message in one_line(hub.upload, folder, NAME)


OTHERS = (
    *(".env.json", ".lock", ".git/config.json", "secrets.txt", "key.json", "metrics.jsonl"),
    *("notes/config.txt", "decoder/deep/config.json", "decoder/.hidden.json"),
)


def test_nothing_but_the_files_of_a_model_is_sent(api, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    wanted = {str(p.relative_to(copy)) for p in copy.rglob("*.json")} | {"README.md", "LICENSE.txt"}
    wanted |= {str(p.relative_to(copy)) for p in copy.rglob("*.safetensors")}
    for name in (*OTHERS, "LICENSE.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("private")
    with pytest.warns(UserWarning, match=r"not sent, .*decoder/\.hidden\.json, .* and 1 more"):
        hub.upload(copy, NAME)
    assert set(api.sent["files"]) == wanted


@pytest.mark.parametrize("name", ["README.md", "text", "text/tokenizer.json", "extra"])
def test_a_link_out_of_the_model_is_not_sent(api, folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    mine = tmp_path / "mine" if "." not in name else tmp_path / "mine.json"
    if "." in name:
        mine.write_text("private")
        (copy / name).unlink()
    else:
        mine.mkdir()
        (mine / "config.json").write_text("private")
        shutil.rmtree(copy / name, ignore_errors=True)
    (copy / name).symlink_to(mine)
    assert f"{name} is a link that leads out of the model" in one_line(hub.upload, copy, NAME)
    assert "files" not in api.sent


def test_a_link_within_the_model_is_sent_as_what_it_leads_to(api, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "text/tokenizer.json").rename(copy / "text/config.json")
    (copy / "text/tokenizer.json").symlink_to("config.json")
    hub.upload(copy, NAME)
    assert api.sent["files"]["text/tokenizer.json"] == (folder / "text/tokenizer.json").read_bytes()


def test_the_folder_of_a_training_is_no_model(api, tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "ar_training"}')
    assert "its model lies in" in one_line(hub.upload, tmp_path, NAME)


def test_card_counts_what_is_stored_and_keeps_one_that_is_there(folder, tmp_path):
    parts = {part.name: part for part in model_card.inspect(folder)}
    assert set(parts) == {"tokenizer", "decoder", "language_model"}
    for name, part in parts.items():
        arrays = weights.read_arrays(folder / name / "model.safetensors")
        assert part.num_parameters == sum(array.size for array in arrays.values())
        assert part.dtypes == ("float32",)
    card = (folder / "README.md").read_text()
    assert f"| decoder | {parts['decoder'].num_parameters:,} | float32 |" in card
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("mine")
    DiCoDePipeline.from_pretrained(copy).save_pretrained(copy)
    assert (copy / "README.md").read_text() == "mine"


def test_weights_trained_here_need_no_licence_note(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "dicode_jax",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-video",
        "tags": ["jax", "flax", "video-generation"],
    }
    assert "trained with dicode_jax" in card.text


def test_origin_survives_loading_and_saving(folder, tmp_path):
    DiCoDePipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert weights.read_metadata(tmp_path / "again/decoder") == SOURCE
    assert weights.read_metadata(tmp_path / "again/tokenizer") == {}


def test_info_lists_types_sources_and_licences(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "parameters, float32" in out
    assert f"{DIGEST}  a.bin" in out
    assert "convert.dicode 0.1" in out
    assert "states no licence" in out
    assert cli.main(["info", str(folder / "decoder")]) == 0
    assert "decoder" in capsys.readouterr().out


def test_info_of_a_broken_file_is_one_line(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = (copy / "decoder/model.safetensors").read_bytes()
    (copy / "decoder/model.safetensors").write_bytes(data[: len(data) // 2])
    assert cli.main(["info", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "not a whole safetensors file" in err
    assert err.count("\n") == 1
