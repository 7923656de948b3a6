"""What a shell completes: asked of bash itself, from the script that the command prints."""

import re
import shutil
import subprocess

import pytest

from dicode_jax import cli
from dicode_jax.cli.main import COMMANDS


def script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["gen"], ["generate"]),
        ([""], [*COMMANDS, "--help", "--version"]),
        (["generate", "a cat", "--num-vid"], ["--num-videos-per-prompt"]),
        (["generate", "--quality", ""], ["draft", "standard", "best"]),
        (["generate", "--out", "ou"], []),  # a file, which the shell completes
        (["decode", "--lag"], []),
        (["data", ""], ["inspect", "cut", "filter", "--help"]),
        (["data", "inspect", "--she"], ["--sheet"]),
        (["completion", "bash", "--h"], ["--help"]),
    ],
)
def test_bash_completes_commands_options_and_values(capsys, typed, found):
    words = " ".join(f"'{word}'" for word in ["dicode", *typed])
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _dicode; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "-c", f"{script(capsys, 'bash')}\n{ask}"], capture_output=True, text=True
    )
    assert not done.stderr
    assert sorted(done.stdout.split()) == sorted(found)


def test_zsh_and_fish_know_the_same_options(capsys):
    bash, zsh, fish = (script(capsys, shell) for shell in ("bash", "zsh", "fish"))
    assert zsh.endswith(bash)
    assert "bashcompinit" in zsh
    wanted = {flag[2:] for flag in re.findall(r"--[a-z][\w-]+", bash)}
    assert set(re.findall(r" -l (\S+)", fish)) == wanted
    assert "complete -c dicode -f -n __fish_use_subcommand -a interpolate" in fish
