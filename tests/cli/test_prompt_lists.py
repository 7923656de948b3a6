"""Lists of prompts: what they hold, how videos are called, and that a stopped run goes on."""

import json
import os

import pytest

from dicode_jax.cli import prompt_lists
from dicode_jax.cli.prompt_lists import Entry, Manifest, paint_all, plan, read_prompts
from dicode_jax.errors import UserError


def entries(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_prompts(tmp_path / name)


def test_a_list_is_read_by_its_extension(tmp_path):
    (tmp_path / "a.png").touch()
    image = {"image": str(tmp_path / "a.png")}
    assert entries(tmp_path, "a.txt", "\ufeffa cat\n\n  ein großer Hund \r\n") == [
        Entry(prompt="a cat"),
        Entry(prompt="ein großer Hund"),
    ]
    text = 'prompt,seed,dimension,image\n"a cat, running",7,motion,\n,,,a.png\n'
    assert entries(tmp_path, "a.csv", text) == [
        Entry(prompt="a cat, running", seed=7, extra={"dimension": "motion"}),
        Entry(prompt="", options=image),
    ]
    text = '{"prompt": "a cat", "num_clips": 3, "name": "c", "id": [1]}\n\n{"prompt": "b"}'
    assert entries(tmp_path, "a.jsonl", text) == [
        Entry(prompt="a cat", name="c", options={"num_clips": 3}, extra={"id": [1]}),
        Entry(prompt="b"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.md", "a cat", "a list of prompts is one of: .txt, .csv, .jsonl"),
        ("a.txt", " \n", "holds no prompt"),
        ("a.csv", "text\na cat\n", "no column `prompt`"),
        ("a.csv", "prompt,seed\na cat\n", "line 2 has another number of columns"),
        ("a.csv", "prompt,seed\na cat,one\n", "line 2: seed: want a whole number"),
        ("a.csv", "prompt,seed\n,3\n", "line 2 has no prompt"),
        ("a.csv", "prompt,image\ncat,b.png\n", "line 2: there is no file .*b.png"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: prompt is not text"),
        ("a.jsonl", '["a cat"]\n', "line 1 holds no JSON object"),
        ("a.jsonl", '{"prompt": "a \\ud800 cat"}', "line 1: prompt holds half of a character"),
        ("a.jsonl", '{"prompt": "a", "num_clips": true}', "num_clips: want a whole number"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        entries(tmp_path, name, text)


def test_names_tell_prompts_apart_and_seeds_do_not_depend_on_the_place():
    prompts = [
        "a cat",
        "A cat",
        "a cat!",
        "a-cat",
        "a " + "very " * 40 + "old cat",
        "猫 が走る",
        "!",
    ]
    tasks = plan([Entry(prompt=p) for p in prompts], seed=3, num_videos_per_prompt=2)
    assert [task.seed for task in tasks] == [3, 4] * len(prompts)
    names = [task.file for task in tasks]
    assert len(set(names)) == len(names)
    assert names[:2] == ["a-cat_3.mp4", "a-cat_4.mp4"]
    assert max(len(name.encode()) for name in names) < 230
    short = plan([Entry(prompt=prompts[3])], seed=3)
    assert short[0].file == names[6]
    assert plan([Entry(prompt="x", name="n", seed=9)], suffix=".gif")[0].file == "n_9.gif"
    by_index = plan([Entry(prompt="x")], name=lambda entry, index, seed: f"{entry.prompt}-{index}")
    assert by_index[0].file == "x-0.mp4"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([Entry(prompt="x")] * 2, {}, "two videos would be called x_0.mp4"),
        ([Entry(prompt="x", name="../a")], {}, "no video can be called"),
        ([Entry(prompt="x")], {"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ([Entry(prompt="x")], {"seed": 2**32 - 1, "num_videos_per_prompt": 2}, "seed"),
    ],
)
def test_an_impossible_plan_is_refused(given, options, message):
    with pytest.raises(UserError, match=message):
        plan(given, **options)


SETTINGS = {"model": "shapes", "interval": (0, 1)}


def painter(stop_at=None):
    painted = []

    def paint(task, path):
        if len(painted) == stop_at:
            raise KeyboardInterrupt
        if task.prompt == "bad":
            raise UserError("cannot be spelled")
        painted.append(task.file)
        path.write_text(task.prompt)
        return {"frames": 16}

    return paint, painted


def test_a_run_that_was_stopped_goes_on_and_paints_nothing_twice(tmp_path):
    out = tmp_path / "videos"
    tasks = plan([Entry(prompt=p, extra={"id": p}) for p in "abc"], num_videos_per_prompt=2)
    paint, first = painter(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        paint_all(tasks, out, SETTINGS, paint)
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"file": "b_1.mp4", "pro')  # a kill within a line
    (out / "b_1.mp4").touch()  # and between the video and its line
    paint, second = painter()
    said = []
    assert paint_all(tasks, out, SETTINGS, paint, say=said.append) == [out / t.file for t in tasks]
    assert first + second == [task.file for task in tasks]
    assert "3 of 6 videos are there already" in said[0]
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [task.file for task in tasks]
    assert lines[0] == {
        "file": "a_0.mp4",
        "prompt": "a",
        "seed": 0,
        "options": {},
        "settings": {"model": "shapes", "interval": [0, 1]},
        "frames": 16,
        "extra": {"id": "a"},
    }


def test_videos_of_other_settings_and_of_strangers_are_not_replaced(tmp_path):
    tasks = plan([Entry(prompt="a")])
    paint, painted = painter()
    (tmp_path / "a_0.mp4").write_text("mine")
    with pytest.raises(UserError, match=r"a_0.mp4 is there and manifest.jsonl is not"):
        paint_all(tasks, tmp_path, SETTINGS, paint)
    assert [path.name for path in tmp_path.iterdir()] == ["a_0.mp4"]
    (tmp_path / "a_0.mp4").unlink()
    paint_all(tasks, tmp_path, SETTINGS, paint)
    with pytest.raises(UserError, match=r"made with other settings, as manifest\.jsonl"):
        paint_all(tasks, tmp_path, SETTINGS | {"model": "other"}, paint)
    assert painted == ["a_0.mp4"]
    with Manifest(tmp_path), pytest.raises(UserError, match="another process is writing"):
        paint_all(tasks, tmp_path, SETTINGS, paint)
    (tmp_path / "b_0.mp4").write_text("mine")
    os.utime(tmp_path / "b_0.mp4", (1, 1))  # no kill left it: the manifest was written to since
    with pytest.raises(UserError, match=r"b_0.mp4 is there and manifest.jsonl does not know it"):
        paint_all(plan([Entry(prompt=p) for p in "ab"]), tmp_path, SETTINGS, paint)
    assert (tmp_path / "b_0.mp4").read_text() == "mine"
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is not the line of a video"):
        paint_all(tasks, tmp_path, SETTINGS, paint)


def test_a_prompt_that_cannot_be_painted_does_not_stop_the_others(tmp_path):
    paint, painted = painter()
    with pytest.raises(UserError, match=r"1 of 3 videos are not made: bad_0.mp4: cannot be spell"):
        paint_all(plan([Entry(prompt=p) for p in ("a", "bad", "c")]), tmp_path, {}, paint)
    assert painted == ["a_0.mp4", "c_0.mp4"]
    assert set(Manifest(tmp_path).__enter__().lines) == {"a_0.mp4", "c_0.mp4"}
    assert prompt_lists.MANIFEST in {path.name for path in tmp_path.iterdir()}
