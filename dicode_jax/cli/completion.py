"""`dicode completion`: what a shell needs to complete commands, options and their values."""

import argparse
import shlex
from collections.abc import Callable, Iterator

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_dicode() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" last="${{COMP_WORDS[COMP_CWORD-1]}}" words="" at="" i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$at ${{COMP_WORDS[i]}}" in
{places}
    esac
  done
  case "$at $last" in
{values}
    *)
      case "$at" in
{options}
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _dicode dicode
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `completion` to the parser of `dicode`."""
    sub = command(
        "completion",
        "print what lets a shell complete this command",
        'For bash and zsh: eval "$(dicode completion bash)" in the file that the shell starts '
        "with. For fish: dicode completion fish | source",
    )
    sub.add_argument("shell", choices=SHELLS)


def completion(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Prints the script of a shell, made of what the parser knows."""
    if args.shell == "fish":
        print("\n".join(_fish(parser)))
        return
    print((_ZSH if args.shell == "zsh" else "") + _bash(parser), end="")


def _parsers(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, list, list]]:
    """Path of commands, names of the commands below, and options, of every parser."""
    below, actions = {}, []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
        elif action.option_strings:
            actions.append(action)
    yield path, list(below), actions
    for name, sub in below.items():
        yield from _parsers(sub, f"{path} {name}")


def _bash(parser: argparse.ArgumentParser) -> str:
    places, values, options = [], [], []
    for path, below, actions in _parsers(parser):
        if path:
            places.append(f'      "{path}") at="{path}" ;;')
        flags = [flag for action in actions for flag in action.option_strings if flag[:2] == "--"]
        options.append(f'        "{path}") words="{" ".join([*below, *flags])}" ;;')
        for action in actions:
            patterns = "|".join(f'"{path} {flag}"' for flag in action.option_strings)
            if action.nargs != 0:  # what follows it, or a file
                choices = " ".join(map(str, action.choices or ()))
                values.append(f'    {patterns}) words="{choices}" ;;')
    return _BASH.format(
        places="\n".join(places), values="\n".join(values), options="\n".join(options)
    )


def _fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    for path, below, actions in _parsers(parser):
        words = path.split()
        there = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words)
        tops = " ".join(name for name in below)
        where = there or "__fish_use_subcommand"
        if below and words:
            where = f"{there}; and not __fish_seen_subcommand_from {tops}"
        for name in below:
            yield f"complete -c dicode -f -n {shlex.quote(where)} -a {name}"
        for action in actions:
            names = [f"-l {flag[2:]}" for flag in action.option_strings if flag.startswith("--")]
            value = "" if action.nargs == 0 else " -r"
            if action.choices:
                value = f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
            yield f"complete -c dicode -n {shlex.quote(there or 'true')} {' '.join(names)}{value}"
