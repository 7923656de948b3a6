import json
import math
import os

import numpy as np
import pytest
from PIL import Image

from dicode_jax import cli
from dicode_jax.errors import UserError
from dicode_jax.training import curves
from dicode_jax.training.logs import MAX_NAMES, read_log, read_metrics


@pytest.fixture
def workdir(tmp_path):
    """A run of 200 steps, killed after step 120 and resumed from 100 with other losses."""
    lines = []

    def log(step, loss):
        line = {"step": step, "lr": 1e-3, "loss": loss}
        if step % 50 == 0:
            line["validation_loss"] = 2 * loss
        lines.append(json.dumps(line))

    for step in range(1, 121):
        log(step, 1000.0)
    lines[-1] = lines[-1][:10]  # cut in half by the kill
    for step in range(101, 201):
        log(step, float(step))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_steps_done_twice_count_once_and_the_later_line_counts(workdir, capsys):
    assert cli.main(["metrics", str(workdir), "--last", "101"]) == 0
    lines = rows(capsys.readouterr().out)
    assert lines[0] == ["step", "loss", "validation_loss", "lr"]
    assert lines[1] == ["100", "1000", "2000", "0.001"]
    assert lines[2] == ["101", "101", "-", "0.001"]
    assert [line[0] for line in lines[1:102]] == [str(step) for step in range(100, 201)]
    assert lines[102] == ["200", "logged", "steps,", "1", "to", "200"]


def test_overview_is_means_over_parts_of_the_run(workdir, capsys):
    assert cli.main(["metrics", str(workdir)]) == 0
    lines = rows(capsys.readouterr().out)
    assert len(lines) == 1 + 20 + 2
    assert lines[-1] == ["lines", "passed", "over,", "as", "they", "are", "no", "step's:", "1"]
    assert lines[-3] == ["200", "195.5", "400", "0.001"]  # steps 191 to 200; one validation
    assert lines[10] == ["100", "1000", "2000", "0.001"]
    assert lines[12] == ["120", "115.5", "-", "0.001"]


def test_curves_are_drawn_and_only_a_whole_file_appears(workdir, capsys, monkeypatch):
    out = workdir / "curves.png"
    assert cli.main(["metrics", str(workdir), "--out", str(out)]) == 0
    first = np.asarray(Image.open(out))
    assert first.std() > 5  # something is drawn
    monkeypatch.setattr(curves, "plot", lambda records, path, **_: path.write_bytes(b"x") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["metrics", str(workdir), "--out", str(out)])
    np.testing.assert_array_equal(np.asarray(Image.open(out)), first)
    assert len(list(workdir.glob("*.png"))) == 1


def test_table_breaks_into_blocks_that_fit_the_terminal():
    records = [{"step": 10 * i, "loss": float("nan"), "a": 1.25, "b": i} for i in (1, 2)]
    assert curves.table(records).splitlines()[0].split() == ["step", "loss", "a", "b"]
    narrow = curves.table(records, width=12)
    assert max(map(len, narrow.splitlines())) <= 12
    assert [block.split()[:2] for block in narrow.split("\n\n")] == [
        ["step", "loss"],
        ["step", "a"],
        ["step", "b"],
    ]
    assert "nan" in narrow


def test_a_running_mean_does_not_hide_a_number_that_is_not_finite(tmp_path):
    records = [{"step": i, "loss": math.inf if i == 7 else 1.0} for i in range(300)]
    curves.plot(records, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert curves.summarize(records, 3)[0]["loss"] == math.inf


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no metrics.jsonl in nowhere"),
        (["DIR", "--out", "a.txt"], "the extension '.txt'"),
        (["DIR", "--last", "0"], "want a whole number of at least 1, got 0"),
        (["EMPTY"], "holds no step yet"),
    ],
)
def test_mistakes_cost_one_line(workdir, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    argv = [{"DIR": ".", "EMPTY": "empty"}.get(word, word) for word in argv]
    assert cli.main(["metrics", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert message in err


RIGHT = "".join(json.dumps({"step": i, "loss": i + 1.0}) + "\n" for i in range(3))
NO_STEPS = (
    *("[1]", "5", "null", '{"loss": 1}', '{"step": "a"}', '{"step": true}', '{"step": 0.5}'),
    *('{"step": -1}', '{"step": NaN}', '{"step": ' + "9" * 400 + "}", "[" * 100_000, "\0"),
    *('{"step": 9, "loss": ' + "9" * 400 + "}", '{"step": 9, "loss": 1e999}'),
    *('{"step": 99999999999999999999}', json.dumps({"step": 9} | {f"n{i}": i for i in range(200)})),
    '{"step": 9, "loss": 1' + " " * 2_000_000 + "}",
)


@pytest.mark.parametrize("line", NO_STEPS)
def test_a_line_that_is_no_steps_is_passed_over_and_counted(tmp_path, line, capsys):
    (tmp_path / "metrics.jsonl").write_text(RIGHT + line + "\n" + RIGHT + "\n")
    records, passed_over = read_log(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert passed_over == 1
    assert cli.main(["metrics", str(tmp_path)]) == 0
    assert "no step's: 1\n" in capsys.readouterr().out


def test_a_log_of_bytes_has_no_steps(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" * 2)
    assert cli.main(["metrics", str(tmp_path)]) == 2
    assert "holds no step yet (lines of anything else: 2)" in capsys.readouterr().err


def test_names_of_numbers_are_lines_and_what_is_no_number_is_left_out(tmp_path, capsys):
    forged = {"step": 1, "\x1b[2Ja\nb": 1, "x" * 10**5: 2, "$\\frac": 3, "\ud800": 4}
    others = {"loss": None, "lr": True, "text": "\x1b[2J", "list": [1], "object": {"a": 1}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(forged | others))
    out = tmp_path / "$a^{b$.svg"
    assert cli.main(["metrics", str(tmp_path), "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert len(shown) < 1000
    assert rows(shown)[1] == ["1", "3", "4", "1", "2"]


def test_many_names_of_many_lines_are_passed_over_at_some_point(tmp_path):
    lines = [json.dumps({"step": i, f"n{i}": i}) for i in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    records, passed_over = read_log(tmp_path / "metrics.jsonl")
    assert (len(records), passed_over) == (MAX_NAMES - 1, 1000 - MAX_NAMES + 1)


def test_a_pipe_and_a_device_are_no_logs(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot be read"):
            read_log(path)


@pytest.mark.parametrize("value", [1e308, 9e299, 5e-324, 10**19])
def test_huge_numbers_and_steps_have_a_mean_and_a_curve(tmp_path, value):
    records = [
        {"step": 2**53 - i, "loss": value, "a": value * (-1) ** i} for i in range(200, 0, -1)
    ]
    curves.plot(records, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert curves.summarize(records, 3)[-1]["step"] == 2**53 - 1


def test_metrics_of_a_run_are_read_by_step(workdir):
    assert [record["step"] for record in read_metrics(workdir / "metrics.jsonl")] == [
        *range(1, 201)
    ]
