"""`robust completion`: the shell completes commands, flags and methods."""

from __future__ import annotations

import argparse

from robust.completion import SHELLS, script

WORDS = "print a script that completes commands, flags and methods in a shell"
EXAMPLES = """examples:
  robust completion bash     in ~/.bashrc: source <(robust completion bash)
  robust completion zsh      in ~/.zshrc, behind compinit: source <(robust completion zsh)
  robust completion fish     once: robust completion fish > ~/.config/fish/completions/robust.fish"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=list(SHELLS), metavar="SHELL", help=", ".join(SHELLS))


def run(options: argparse.Namespace) -> None:
    from robust.cli import command_parser

    print(script(options.shell, command_parser()), end="")
