"""Completion in a shell: a script made once from the parser and the registries, so that a TAB does not start Python.

The script names what there was when it was made; it is made again after methods were added.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from robust.listing import KINDS
from robust.settings import recipe_names

FLAG_KINDS = {
    "--data": "data",
    "--model": "models",
    "--objective": "objectives",
    "--attack": "attacks",
    "--attacks": "attacks",
    "--verifier": "verifiers",
    "--optimizer": "optimizers",
    "--lr-schedule": "schedules",
    "--eps-schedule": "schedules",
    "--regularizers": "regularizers",
    "--weightings": "weightings",
    "--weight-perturbation": "weight_perturbations",
    "--hooks": "hooks",
}
"""Flags whose value is the text of a method, and the kind of the method."""

FILES = "<files>"
"""Stands for names of files among the words that may follow."""


@dataclass(frozen=True)
class Command:
    """What can follow a command.

    Attributes:
        words: its line in the help. flags: all of them.
        values: what may follow a flag that takes a value, by flag; (FILES,) where any text may.
        places: what may stand where no flag does.
    """

    name: str
    words: str
    flags: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    places: tuple[str, ...]


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell of SHELLS."""
    return SHELLS[shell](_commands(parser))


def _commands(parser: argparse.ArgumentParser) -> list[Command]:
    (sub,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    words = {action.dest: action.help or "" for action in sub._choices_actions}
    return [_command(name, words[name], command) for name, command in sub.choices.items()]


def _command(name: str, words: str, parser: argparse.ArgumentParser) -> Command:
    flags: list[str] = []
    values: dict[str, tuple[str, ...]] = {}
    places: list[str] = []
    for action in parser._actions:
        # Of --eps_schedule and --eps-schedule the shell shows one.
        names = [flag for flag in action.option_strings if flag.startswith("--") and "_" not in flag]
        flags += names
        if not action.option_strings:
            places += _choices(name, action)
        elif action.nargs != 0:
            values.update({flag: _choices(flag, action) for flag in names})
    return Command(name, words, tuple(flags), values, tuple(places))


def _choices(name: str, action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if name in FLAG_KINDS:
        own = (FILES,) if name == "--model" else ()  # a user's network is a file
        return (*KINDS[FLAG_KINDS[name]].names(), *own)
    if name in ("--recipe", "recipes"):
        return tuple(recipe_names())
    metavar = str(action.metavar or "")
    return tuple(metavar.split("|")) if "|" in metavar else (FILES,)


def _bash(commands: list[Command]) -> str:
    cases = []
    for command in commands:
        values = [
            f"        {command.name}:{flag}) {_sets(choices)};;"
            for flag, choices in command.values.items()
            if choices != (FILES,)
        ]
        files = [f"{command.name}:{flag}" for flag, choices in command.values.items() if choices == (FILES,)]
        values += [f"        {'|'.join(files)}) {_sets((FILES,))};;"] if files else []
        cases += [*values, f"        {command.name}:*) {_sets((*command.flags, *command.places))};;"]
    return _BASH.format(commands=_quoted([command.name for command in commands]), cases="\n".join(cases))


def _sets(choices: tuple[str, ...]) -> str:
    """Assignments to the variables of the bash script."""
    words = [word for word in choices if word != FILES]
    return f"words={_quoted(words)}{' files=1' if FILES in choices else ''}"


def _zsh(commands: list[Command]) -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash(commands)


def _fish(commands: list[Command]) -> str:
    lines = ["# Completion of robust for fish.", "complete -c robust -f"]
    for command in commands:
        lines.append(f"complete -c robust -n __fish_use_subcommand -a {command.name} -d {_quoted([command.words])}")
        seen = f"complete -c robust -n '__fish_seen_subcommand_from {command.name}'"
        for flag in command.flags:
            line = f"{seen} -l {flag.removeprefix('--')}"
            choices = command.values.get(flag)
            if choices is not None:
                names = [word for word in choices if word != FILES]
                line += f" -a {_quoted(names)}" if names else ""
                line += " -r -F" if FILES in choices else " -x"
            lines.append(line)
        words = [word for word in command.places if word != FILES]
        if words:
            lines.append(f"{seen} -a {_quoted(words)}")
        if FILES in command.places:
            lines.append(f"{seen} -F")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[list[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def _quoted(words: list[str] | tuple[str, ...]) -> str:
    """Words in one pair of single quotes."""
    return "'" + " ".join(words).replace("'", "'\\''") + "'"


# A method's fields stand behind a colon, at which bash would break the word: completion ends with the name.
_BASH = """# Completion of robust for bash.
_robust() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="" words="" files=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {commands} -- "$current"))
        return
    fi
    # The last flag, since some take several values.
    local place
    for ((place = COMP_CWORD - 1; place > 1; place--)); do
        case "${{COMP_WORDS[place]}}" in
        --*) before="${{COMP_WORDS[place]}}"; break;;
        esac
    done
    case "$current" in -*) before="";; esac
    case "${{COMP_WORDS[1]}}:$before" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ -n "$files" ]; then COMPREPLY+=($(compgen -f -- "$current")); fi
}}
complete -o filenames -F _robust robust
"""
