"""Every command that writes a model folder goes through the guard, and ends without litter."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_pipeline

from dicode_jax.errors import UserError
from dicode_jax.stages.dicode import language_model
from dicode_jax.storage import weights

ROOT = pathlib.Path(weights.__file__).parents[2]


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_a_pipeline_is_saved_over_a_pipeline_and_over_nothing_else(pipe, tmp_path):
    mine = tmp_path / "mine"
    (mine / "decoder").mkdir(parents=True)
    (mine / "config.json").write_text('{"n_embd": 8}')
    (mine / "decoder/model.safetensors").write_text("downloaded for hours")
    before = contents(mine)
    with pytest.raises(UserError, match="is not a model that was written here"):
        pipe.save_pretrained(mine)
    assert contents(mine) == before
    for _ in range(2):
        pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which was not written here"):
        pipe.save_pretrained(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["mine", "model"]


def test_a_tokenizer_is_written_whole_beside_a_link(pipe, tmp_path):
    (tmp_path / "shared.json").write_text("old")
    (tmp_path / "tokenizer.json").symlink_to("shared.json")
    pipe.text.save(tmp_path)
    assert os.readlink(tmp_path / "tokenizer.json") == "shared.json"
    assert language_model.TextTokenizer.from_file(tmp_path).vocab_size == pipe.text.vocab_size


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM] * 9, 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT] * 2, 130),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGTERM, signal.SIGINT], 143),
    ],
)
def test_signals_during_a_conversion_leave_nothing(tmp_path, numbers, status):
    code = (
        "import shutil, signal, sys, time\n"
        # Which children of nohup, and of a process in the background, ignore.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from convert.engine import command\n"
        "remove = shutil.rmtree\n"
        "def slowly(*args, **options):\n"
        "    print('removing', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    remove(*args, **options)\n"
        "shutil.rmtree = slowly\n"
        "def main(args):\n"
        "    with command.output_folder(args.out) as folder:\n"
        "        (folder / 'model.safetensors').write_text('half')\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "options = command.parser('convert.test', '', source='a file', required=False)\n"
        "sys.exit(command.run(main, options, ['--out', sys.argv[1]]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(numbers[0])
    assert process.stdout.readline() == "removing\n"
    for number in numbers[1:]:  # schedulers repeat themselves, and so do people
        process.send_signal(number)
        time.sleep(0.001)
    _, error = process.communicate("\n", timeout=60)
    assert not os.listdir(tmp_path)
    assert process.returncode == status
    assert error == "python -m convert.test: interrupted, nothing half-written is left\n"
