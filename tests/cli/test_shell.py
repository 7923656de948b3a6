"""The command line as a process of its own, and what its help says."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dicode_jax import cli
from dicode_jax.pipelines import options


def run(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", "dicode_jax.cli", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from dicode_jax import cli; status = cli.main(['--help']); "
        "heavy = {'jax', 'av', 'numpy', 'flax', 'tokenizers'} & set(sys.modules); "
        "sys.exit(status or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("generate", "reconstruct", "encode", "decode", "info"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["generate", "reconstruct", "decode", "warmup"])
def test_help_says_what_each_preset_is(capsys, command):
    assert cli.main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in options.QUALITIES:
        assert f"{name}: {options.described(name)}" in shown


def test_the_exit_status_reaches_the_shell(tmp_path):
    done = run("generate", "", "--out", "a.mp4", cwd=tmp_path, env=environment())
    assert done.returncode == 2
    assert done.stderr == "dicode: error: the prompt is empty; say what to show\n"
    assert not done.stdout


def test_a_missing_command_and_an_unknown_one():
    assert "required: COMMAND" in run().stderr
    done = run("paint")
    assert done.returncode == 2
    assert "invalid choice: 'paint'" in done.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_writing_leaves_nothing(tmp_path, number, status):
    code = (
        "import signal, sys, time, numpy as np\n"
        # Children of a process in the background ignore Ctrl-C, those of nohup SIGHUP.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from dicode_jax import cli; main = sys.modules['dicode_jax.cli.main']\n"
        "from dicode_jax.media import video\n"
        "def frames():\n"
        "    for i in range(1000):\n"
        "        if i == 3: print('writing', flush=True)\n"
        "        time.sleep(0.02)\n"
        "        yield np.full((16, 16, 3), i % 250, np.uint8)\n"
        "main.COMMANDS['info'] = lambda args: video.write_video('a.mp4', frames())\n"
        "sys.exit(cli.main(['info']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == "dicode: error: stopped\n"
    assert not os.listdir(tmp_path)


def environment():
    root = pathlib.Path(cli.__file__).parents[2]
    return os.environ | {"PYTHONPATH": str(root)}
