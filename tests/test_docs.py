"""Every command and every Python block of the documentation could run as it is written."""

import re

import documented
import documented_runs
import pytest
from source_tree import ROOT

COMMANDS = documented.commands()
SNIPPETS = list(documented.snippets())


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("command", "is_whole"),
    [(command, is_whole) for _, command, is_whole in COMMANDS],
    ids=[f"{where}: {command[:60]}" for where, command, _ in COMMANDS],
)
def test_a_documented_command_parses(command, is_whole):
    documented.check(command, is_whole=is_whole)


@pytest.mark.parametrize("code", [code for _, code in SNIPPETS], ids=[at for at, _ in SNIPPETS])
def test_a_documented_snippet_compiles_and_its_imports_exist(code):
    documented.check_snippet(code)


def test_a_conversion_is_shown_in_one_manner():
    """`python -m convert NAME SOURCE`: the older forms work and are not shown."""
    older = [
        (where, command)
        for where, command, _ in COMMANDS
        if "python -m convert." in command or {"--ckpt", "--models"} & set(command.split())
    ]
    assert not older


def test_commands_and_snippets_are_found():
    places = {where for where, *_ in COMMANDS}
    assert {"README.md", "scaling.md", "configs/llama_3b.py", "train/encode.py"} <= places
    assert len(COMMANDS) > 80
    assert sum(command.startswith("python -m train.ar") for _, command, _ in COMMANDS) > 15
    assert len(SNIPPETS) >= 5


TRAIN = "python -m train.ar --config configs/shapes_ar.py --workdir runs/ar"


@pytest.mark.parametrize(
    "command",
    [
        f"{TRAIN} --log-evry 5",
        f"{TRAIN} --optim.lrr 3e-4",
        f"{TRAIN} --model.body.num-layer 2",
        f"{TRAIN} --num_keyframes 4",
        f"{TRAIN} --num-keyframes four",
        "python -m train.ar --config configs/shapes_arr.py --workdir runs/ar",
        "python -m train.ar --config configs/shapes_autoencoder.py --workdir runs/ar",
        "python -m train.arr --config configs/shapes_ar.py --workdir runs/ar",
        "python -m train.encode --config configs/shapes_ar.py --outt cache",
        "dicode export a --out b --sett generation.var-scale=0.1",
        "python -m convert.divot --ckpt a.bin --outt b",
        "python -m convert divott a.bin --out b",
        "python -m convert NAME a.bin --outt b",
        "python -m train.ar",
        "python -m benchmarks.kill_test --evry 2",
        "dicode generate red --out a.mp4 --num-clip 2",
        "dicode generate red",
        "dicode data inspekt VIDEOS",
        "make tests",
        "make test PYTEST_ARG=x",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises(documented.Wrong):
        documented.check(command)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dicode info [PATH]    # what it is", ["dicode", "info", "PATH"]),
        ("python -m a.b --x $i > log-$i.txt 2>&1 &", ["python", "-m", "a.b", "--x", "1"]),
        ("dicode a --n ${#HOSTS[@]} --y '2 3' && c", ["dicode", "a", "--n", "1", "--y", "2 3"]),
        ('python -m a.b --id $i" > log.txt', ["python", "-m", "a.b", "--id", "1"]),
    ],
)
def test_words_of_a_command_are_the_shells(command, words):
    assert documented.words_of(command) == words


def test_what_a_sentence_names_need_not_be_whole_but_right():
    documented.check("dicode metrics", is_whole=False)
    documented.check("python -m train.encode", is_whole=False)
    with pytest.raises(documented.Wrong):
        documented.check("dicode metrics")
    with pytest.raises(documented.Wrong):
        documented.check("dicode metrics --lst 3", is_whole=False)


@pytest.mark.parametrize(
    "code",
    [
        "x = (1",
        "from dicode_jax.data.clips import read_klip\nread_klip()",
        "import dicode_jax.dada\ndicode_jax",
        "import functools",
    ],
)
def test_a_wrong_snippet_is_found(code):
    with pytest.raises(documented.Wrong):
        documented.check_snippet(code)


WHOLE = {}  # place -> its commands, in order
for at, line, whole in COMMANDS:
    if whole and documented_runs.why_not(line) is None:
        WHOLE.setdefault(at, []).append(line)
# Places whose commands take more than about ten seconds in all.
LONG = {
    "README.md",
    "conversion.md",
    "evaluation.md",
    "training.md",
    "dicode_jax/assets/shapes/README.md",
}


def without_size(line):
    return re.sub(r"gpt2[_-](small|medium|large|xl)", "gpt2", line).lower().replace("3b", "1b")


# Configs that differ in size are shrunk to the same one: one of them is run.
RUN = {tuple(map(without_size, lines)): place for place, lines in WHOLE.items()}.values()


@pytest.mark.parametrize(
    "place", [pytest.param(x, marks=pytest.mark.slow) if x in LONG else x for x in RUN]
)
def test_documented_commands_run_one_after_the_other(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in WHOLE[place]:
        documented_runs.run(command)


def test_a_config_file_can_be_inspected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data.md says so in a comment
    documented_runs.run(f"dicode data inspect {ROOT}/configs/shapes_ar.py --limit 2")


def test_what_is_not_run_are_the_commands_that_a_reason_is_for():
    for pattern in documented_runs.NOT_RUN:
        assert any(re.search(pattern, line) for _, line, _ in COMMANDS), f"{pattern}: idle"
    left = {line for _, line, whole in COMMANDS if whole and documented_runs.why_not(line)}
    elsewhere = r"--sharding|--coordinator|/shared/|ar_diffusion|landiff|clips/captions"
    assert not [x for x in left if " train." in x and not re.search(elsewhere, x)]
    elsewhere = r"converted/d|runs/dit|landiff|--videos|--suite t|data (cut|filter)|dicode app"
    assert not [x for x in left if x.startswith("dicode") and not re.search(elsewhere, x)]


@pytest.mark.parametrize(
    "command",
    [  # what each of these lacks is found beyond the parser
        "python -m train.encode --config configs/gpt2_small.py --data.path VIDEOS --out cache",
        "python -m train.ar --config configs/clips_ar.py --workdir a --packed",
        "python -m train.ar --config configs/clips_ar.py --workdir a --data.kind tar",
        "dicode metrics runs/nothing",
        "dicode export runs/nothing --out model",
    ],
)
def test_a_command_that_fails_beyond_the_parser_is_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(documented.Wrong):
        documented_runs.run(command)
