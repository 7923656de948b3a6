"""`dicode evaluate` with a model that paints what it is told, and what it says of others."""

import errno
import json
import pathlib
import re
import tempfile
import types

import evaluating
import numpy as np
import pytest
from evaluating import Painter, listed, means
from PIL import Image

from dicode_jax import cli
from dicode_jax.cli import distances, evaluate, evaluated_lists, video
from dicode_jax.cli.evaluate_arguments import METRICS, SUITES
from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation import accuracy, report
from dicode_jax.media.video import read_video, write_video

run = evaluating.run


def test_clips_are_held_to_their_captions_and_painted_once(run, capsys):
    painter = Painter()
    status, found = run(painter, "--num", 3, "--steps", 4)
    assert status == 0
    told = {"num_inference_steps": 4, "clips_per_batch": "auto"}
    assert painter.calls == [([*painter.scenes], {"seed": accuracy.seeds(3, 2)} | told)]
    values = means(found)
    assert values["all"] == values["all, and in every frame"] == pytest.approx(2 / 3)
    assert values["color wobble"] == 0
    assert found["values"]["color wobble"]["count"] == 2  # none where nothing is seen
    assert [row["all"] for row in found["rows"]] == [True, True, False]
    assert found["settings"]["num_inference_steps"] == 4
    assert "| all | 0.667 |" in capsys.readouterr().out
    assert Image.open("found/shapes_sheet.png").height > 64
    assert run(painter, "--num", 3, "--steps", 4)[1] == found
    assert len(painter.calls) == 1
    assert run(painter, "--num", 3)[0] == 2
    assert "other settings (options)" in capsys.readouterr().err


def test_a_class_is_asked_for_by_the_name_that_says_the_same(run, capsys):
    painter = Painter("ar_diffusion")
    assert means(run(painter, "--num", 3, "--lag", 2)[1])["all"] == pytest.approx(2 / 3)
    assert painter.calls[0][1] == {"seed": accuracy.seeds(3, 2), "lag": 2}
    painter.config.class_names = ("Archery",)
    assert run(painter, "--num", 3, out="other")[0] == 2
    assert "has no class 'a" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dicode", "ar_diffusion"])
def test_a_reconstruction_is_measured_beside_a_floor(run, kind):
    status, found = run(Painter(kind), "--suite", "reconstruction", "--num", 2)
    assert status == 0
    values = means(found)
    level = 20 * np.log10(255 / 10)
    assert values["psnr"] == pytest.approx(level)
    assert values["psnr above the floor"] == pytest.approx(level - values["psnr of the floor"])
    assert 10 < values["psnr of the floor"] < 40
    assert len(found["rows"][0]["ssim"]) == 16
    assert pathlib.Path("found/psnr_by_place.png").exists()


def test_a_video_of_many_clips_is_held_to_the_wave(run):
    for kind in ("dicode", "ar_diffusion"):
        painter = Painter(kind, num=3)
        words = ("--suite", "long", "--num", 2, "--num-clips", 3)
        status, found = run(painter, *words, out=kind)
        assert status == 0
        assert means(found)["motion"] == means(found)["size, minute 1"] == 1
        assert means(found)["color, shape, background in the last clip"] == 1
        assert [len(row["clips"]) for row in found["rows"]] == [3, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "shapes", "--lpips", "x"], "--lpips is for --suite reconstruction"),
        (["--num-clips", "3"], "--num-clips is for --suite long"),
        (["--lag", "3"], "--lag is for AR-Diffusion"),
        (["--suite", "shape"], "invalid choice"),
        (["--num", "0"], "want a whole number"),
        (["--suite", "text"], "needs --clip DIR, both towers of CLIP"),
        (["--clip", "x"], "--clip is for --suite text"),
        (["--suite", "long", "--i3d", "x"], "--i3d is for --videos and --suite shapes"),
        (["--fps", "8"], "--fps is for --videos"),
        (["--metrics", "psnr"], "--suite shapes has no psnr; it has color, shape"),
        (["--metrics", "fvd"], "is of another network (none is given); it is of --i3d"),
        (["--suite", "reconstruction", "--metrics", "lpips"], "needs --lpips DIR"),
        (["--at-least", "all"], "'all' is no NAME=NUMBER"),
    ],
)
def test_what_cannot_be_asked_is_one_line(run, capsys, words, said):
    assert run(Painter(), *words)[0] == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not pathlib.Path("found").exists()


def test_numbers_can_be_asked_for_alone_and_suites_stay_beside_each_other(run):
    painter = Painter()
    words = ("--suite", "reconstruction", "--num", 2, "--metrics", "psnr")
    status, found = run(painter, *words)
    assert status == 0
    assert found["values"].keys() == {
        "psnr", "mean psnr of clips", "psnr of the floor", "psnr above the floor"
    }  # fmt: skip
    assert [plot["name"] for plot in found["plots"]] == ["psnr_by_place"]
    assert run(painter, "--num", 2, "--metrics", "shape", "all")[0] == 0
    both = json.loads(pathlib.Path("found/results.json").read_text())
    assert both.keys() == {"reconstruction", "shapes"}
    assert both["reconstruction"] == found
    assert both["shapes"]["values"].keys() == {
        "shape", "shape in every frame", "all", "all, and in every frame"
    }  # fmt: skip
    page = pathlib.Path("found/report.md").read_text()
    assert page.count("# How near do clips") == page.count("# Do clips show") == 1


def test_a_number_below_its_floor_is_an_error_after_the_report(run, capsys):
    painter, words = Painter(), ("--num", 3, "--at-least")
    assert run(painter, *words, "all=0.66", "background in every frame=0.5")[0] == 0
    assert run(painter, *words, "color wobble=0")[0] == 0  # just so
    assert run(painter, *words, "all=0.5", "all, and in every frame=0.67")[0] == 2
    said = capsys.readouterr()
    assert "all, and in every frame is 0.6667, and 0.67 at least is asked for" in said.err
    assert "| all | 0.667 |" in said.out
    assert run(painter, *words, "al=0.5")[0] == 2
    assert "'al' names none of color, shape" in capsys.readouterr().err
    assert run(painter, *words, "all shape=0.5")[0] == 2  # of words that there are
    assert "there is no 'all shape'; there are color" in capsys.readouterr().err
    most = ("--num", 3, "--at-most")
    assert run(painter, *most, "color wobble=0", "all=0.7")[0] == 0
    assert run(painter, *most, "all=0.6")[0] == 2
    assert "all is 0.6667, and 0.6 at most is asked for" in capsys.readouterr().err
    assert run(painter, "--num", 3, "--metrics", "color", "--at-most", "all=1")[0] == 2
    assert "'all' is none of --metrics" in capsys.readouterr().err
    assert len(painter.calls) == 1


def test_distances_take_clips_at_the_rate_of_the_model(run):
    painter = Painter()
    painter.last, painter.config.fps = None, 16.0
    fast = type("Fast", (), {"__call__": lambda self, *a, **o: np.repeat(painter(*a, **o), 2, 1)})()
    vars(fast).update(vars(painter))
    status, found = run(fast, "--num", 3, "--features")
    assert status == 0
    assert found["values"]["FD-shapes"] == pytest.approx(0, abs=1e-3)
    assert found["values"]["KVD-shapes"] < 0  # the same clips
    assert found["settings"]["FD-shapes, KVD-shapes: frames a second"] == 4


class Halves(Painter):
    """As DiCoDe: a clip lasts as long as ever, of whatever frames."""

    def __call__(self, prompts, *, num_frames=16, **options):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self.calls.append((prompts, options))
        drawn = [shapes_world.render(self.scenes[p], 1, num_frames=num_frames) for p in prompts]
        return np.concatenate(drawn)


@pytest.mark.parametrize("count", [8, 32])
def test_a_clip_of_other_frames_lasts_as_long(run, tmp_path, count):
    words = ("--num-frames", count)
    status, found = run(Halves(), "--num", 3, *words, "--features")
    assert status == 0
    assert means(found)["motion"] == means(found)["all"] == 1
    assert found["values"]["FD-shapes"] < 0.5  # the times are not quite those of 16 frames
    painter = Halves()
    path = listed(tmp_path / "list.txt", next(iter(painter.scenes)))
    assert run(painter, "--prompts", path, *words, out="list")[0] == 0
    (made,) = pathlib.Path("list").glob("*.mp4")
    assert read_video(made).fps == pytest.approx(8 * count / 16)


def test_what_was_kept_is_compared_at_its_own_rate(run, tmp_path, capsys):
    painter = Halves()
    assert run(painter, "--num", 3, "--num-frames", 32)[0] == 0
    (tmp_path / "true").mkdir()
    for i, scene in enumerate(painter.scenes.values()):
        write_video(tmp_path / f"true/{i}.mp4", shapes_world.render(scene)[0], 8)
    words = ("--videos", "found/clips", "--reference", tmp_path / "true")
    assert run(None, *words, out="apart")[0] == 0
    found = json.loads(pathlib.Path("apart/results.json").read_text())["distances"]
    assert found["values"]["FD-shapes"] == pytest.approx(0, abs=0.5)  # an mp4 is not exact
    np.savez(tmp_path / "found/clips/000000.npz", video=np.zeros((16, 64, 64, 3), np.uint8))
    assert run(None, *words, out="apart")[0] == 2
    assert "does not say how many frames a second" in capsys.readouterr().err


def test_one_folder_holds_reports_of_one_model(run, tmp_path, capsys, monkeypatch):
    assert run(Painter(), "--num", 3)[0] == 0
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(video, "find", lambda args, *kinds: (other, "dicode"))
    assert cli.main(["evaluate", "--suite", "reconstruction", "--out", "found"]) == 2
    assert "holds the suite shapes of another model" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300, "sealed"])
def test_an_output_that_cannot_be_written_is_known_before_a_model_is_loaded(
    run, tmp_path, capsys, monkeypatch, out
):
    (tmp_path / "file").touch()
    (tmp_path / "sealed").mkdir()
    sealed = tempfile.TemporaryFile

    def refuse(*, dir):
        if dir.name == "sealed":
            raise OSError(errno.EROFS, "Read-only file system")
        return sealed(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    painter = Painter()
    assert run(painter, "--num", 3, out=out)[0] == 2
    assert not painter.calls
    said = capsys.readouterr().err
    assert "cannot write to the folder" in said or "is no folder" in said


def test_no_folder_is_left_where_nothing_came_of_it(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "kept").mkdir()
    for out in ("new/found", "kept"):
        assert run(Painter(), "--num", 3, out=out)[0] == 0
    assert (tmp_path / "new/found/results.json").is_file()

    def fail(*_, **__):
        raise UserError("damaged")

    monkeypatch.setattr(video, "load", fail)
    for out in ("other/found", "kept", "new/found"):
        assert cli.main(["evaluate", "--num", "4", "--seed", "2", "--out", out]) == 2
        assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    for out in ("new/found", "kept"):
        assert (tmp_path / out / "results.json").is_file()


def test_a_folder_of_clips_that_cannot_be_made_is_one_line(run, tmp_path, capsys):
    (tmp_path / "found").mkdir()
    (tmp_path / "found/clips").touch()
    assert run(Painter(), "--num", 3)[0] == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_names_that_are_no_text_are_written_all_the_same(tmp_path):
    one = report.Report(title="t", settings={"model": "a\udcff"}, values={"x": 1.0})
    page = report.write(one, tmp_path, "shapes")
    assert "a\\udcff" in page.read_text()
    assert report.write(one, tmp_path, "long") == page  # what lies there is read again


def test_an_option_that_a_family_lacks_and_a_clip_of_another_size_are_refused(run, capsys):
    assert run(Painter("ar_diffusion"), "--eta", 0)[0] == 2
    assert "no eta" in capsys.readouterr().err
    small = Painter()
    small.config.frame_size = 32
    small.decode = lambda tokens, **_: np.zeros((len(tokens), 16, 8, 8, 3), np.uint8)
    assert run(small, "--suite", "reconstruction", "--num", 1)[0] == 2
    assert "not of (16, 32, 32, 3)" in capsys.readouterr().err


def test_every_suite_that_the_parser_knows_is_run():
    assert evaluate.RUNS.keys() == SUITES.keys() == METRICS.keys() - {"distances"}


@pytest.mark.slow
@pytest.mark.long
def test_the_packaged_model_paints_as_closely_as_its_page_says(tmp_path):
    page = (pathlib.Path(cli.__file__).parents[1] / "assets/shapes/README.md").read_text()
    ((words, level, above),) = re.findall(
        r"`dicode (evaluate --suite reconstruction [^`]*) --out found` takes[^`]*?"
        r"have ([\d.]+) dB, ([\d.]+) dB above",
        page,
    )
    assert cli.main([*words.split(), "--out", str(tmp_path)]) == 0
    found = means(json.loads((tmp_path / "results.json").read_text())["reconstruction"])
    assert found["psnr"] == pytest.approx(float(level), abs=0.1)  # one decimal, and rounding
    assert found["psnr above the floor"] == pytest.approx(float(above), abs=0.1)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*.mp4"))


def test_videos_of_a_list_are_called_by_prompt_and_seed_and_only_missing_ones_are_painted(
    run, tmp_path, capsys
):
    painter = Painter()
    one, two, _ = painter.scenes
    path = listed(tmp_path / "list.txt", one, two)
    words = ("--prompts", path, "--samples-per-prompt", 2, "--steps", 3)
    assert run(painter, *words)[0] == 0
    names = [f"{p.replace(' ', '-')}_{seed}.mp4" for p in (one, two) for seed in (2, 3)]
    assert files("found") == sorted(names)
    told = {"num_inference_steps": 3, "clips_per_batch": "auto"}
    assert painter.calls == [([p], {"seed": s} | told) for p in (one, two) for s in (2, 3)]
    pathlib.Path("found", names[2]).unlink()
    assert run(painter, *words, "--clips-per-batch", 2)[0] == 0
    told |= {"clips_per_batch": 2}
    assert painter.calls[4:] == [([two], {"seed": 2} | told)]
    assert len(read_video(pathlib.Path("found", names[2])).frames) == 16
    pathlib.Path("model", "config.json").write_text("{}")  # another state of the model
    assert run(painter, *words)[0] == 2
    assert "made with other settings" in capsys.readouterr().err


def test_vbench_finds_its_layout(run, tmp_path):
    painter = Painter()
    prompt = next(iter(painter.scenes))
    path = listed(tmp_path / "human_action.txt", prompt)
    assert run(painter, "--vbench-prompts", path)[0] == 0
    assert files("found") == [f"human_action/{prompt}-{i}.mp4" for i in range(5)]
    assert [*pathlib.Path("found/human_action").glob("[!a]*")] == []  # not a hidden one either
    assert pathlib.Path("found/human_action.manifest.jsonl").exists()
    assert run(painter, "--vbench-prompts", path)[0] == 0
    assert len(painter.calls) == 5
    flickering = listed(tmp_path / "temporal_flickering.txt", "a", "b", "a")
    args = types.SimpleNamespace(
        vbench_prompts=flickering, prompts=None, samples_per_prompt=None, seed=0, out="found"
    )
    folder, _, tasks = evaluated_lists.plan(args)
    assert (folder, len(tasks)) == (pathlib.Path("found", "temporal_flickering"), 50)
    long = listed(tmp_path / "color.csv", "prompt,name", "a red bird that sits on a branch,a bird")
    args.vbench_prompts = long
    assert evaluated_lists.plan(args)[2][0].file == "a bird-0.mp4"


@pytest.mark.parametrize(
    ("option", "prompts", "said"),
    [
        ("--vbench-prompts", ["a/b"], "no video can be called 'a/b-0'"),
        ("--vbench-prompts", ["x" * 250], "is too long for a file"),
        ("--prompts", ["a", "b", "a"], "two videos would be called a_2.mp4"),
        ("--prompts", [" "], "holds no prompt"),
        ("--vbench-prompts", ["a\0b"], "no video can be called"),
    ],
)
def test_a_list_that_gives_no_names_is_refused(run, tmp_path, capsys, option, prompts, said):
    assert run(Painter(), option, listed(tmp_path / "l.txt", *prompts))[0] == 2
    assert said in capsys.readouterr().err
    assert not pathlib.Path("found").exists()
    both = ("--prompts", "x", "--vbench-prompts", "y")
    for wrong in (both, ("--suite", "long", "--prompts", "x")):
        assert run(Painter(), *wrong)[0] == 2
        assert "one at a time" in capsys.readouterr().err
    assert run(Painter(), "--samples-per-prompt", 2)[0] == 2
    assert run(Painter(), "--prompts", "")[0] == 2  # such as a variable that is not set
    assert not pathlib.Path("found").exists()


def test_hidden_and_unfinished_videos_do_not_count(tmp_path):
    names = ["a.mp4", "b/c.webp", "d.part.mp4", ".e.mp4", ".f/g.mp4", "h.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = distances.files_of(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in found] == names[:2]
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="holds no videos"):
        distances.files_of(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--videos", "a"], "go together"),
        (["m", "--videos", "a", "--reference", "b"], "no model is loaded"),
        (["--videos", "a", "--reference", "b", "--features", "c"], "there is no folder a"),
        (["--videos", "a", "--reference", "b", "--num", "3"], "--num is for suites"),
        (["--prompts", "a", "--num", "3"], "--num is for suites"),
        (["--videos", "a", "--reference", "b", "--steps", "3"], "--steps is for models that paint"),
        *(
            (
                ["--videos", "a", "--reference", "b", *option],
                f"{option[0]} is for models that paint",
            )
            for option in (
                ["--lag", "3"],
                ["--seed", "3"],
                ["--clips-per-batch", "1"],
                ["--dtype", "bfloat16"],
            )
        ),
    ],
)
def test_distances_that_cannot_be_asked_for_are_one_line(run, capsys, words, said):
    assert run(Painter(), *words)[0] == 2
    assert said in capsys.readouterr().err
    assert not pathlib.Path("found").exists()


def test_a_token_that_carries_the_background_is_found_out(run, capsys):
    painter = Painter(num=4)

    def encode(clip):
        """The background in token 1, the whole clip's number in token 0, nothing in token 2."""
        painter.seen.append(clip)
        number = float(len(painter.seen))
        edge = clip[0, 0, 0].astype(np.float32)
        return np.stack([np.stack([np.full(3, number), edge, np.zeros(3)])] * 2).astype(np.float32)

    def decode(held, **_):
        painter.calls.append(len(held))
        back = held[:, 0, 1].round().astype(np.uint8)
        return np.stack([np.broadcast_to(color, (16, 64, 64, 3)) for color in back])

    painter.seen, painter.encode, painter.decode = [], encode, decode
    status, found = run(painter, "--suite", "tokens", "--num", 4)
    assert status == 0
    values = means(found)
    for place, right in ((1, 1), (3, 1)):
        assert values[f"without token {place}: background"] == right
    assert values["without token 2: background"] < 1
    assert values["first tokens 1: background"] == values["without token 2: background"]
    assert values["first tokens 2: background"] == 1
    assert values["first tokens 3: squared error"] == 0 < values["without token 2: squared error"]
    assert found["rows"][1]["without token 2"].keys() >= {"background", "squared error"}
    asked = len(painter.calls)
    assert run(painter, "--suite", "tokens", "--num", 4, "--metrics", "error")[1]["values"]
    assert painter.calls[asked:] == [7]  # the way between two; the rest is kept
    page = pathlib.Path("found/report.md").read_text()
    for name in ("without_token", "first_tokens", "between", "nearest"):
        assert f"({name}.png)" in page
        assert pathlib.Path(f"found/{name}.png").exists()
    assert run(painter, "--suite", "tokens", "--num", 1, out="b")[0] == 2
    assert run(Painter("ar_diffusion"), "--suite", "tokens", out="c")[0] == 2
    assert "deep tokens" in capsys.readouterr().err
