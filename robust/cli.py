"""The command line: `robust train | certify | attack | ... | recipes`; `robust --help` lists the commands.

Entry points stay thin: they read settings, call the library and print where the results are. A command is a file of
`robust/commands`, named as it is called: WORDS (its line in the help), EXAMPLES, `add_flags(parser)` and
`run(options)`, which returns what --json prints where the command has that flag (`robust.flags.add_json`); GOES_ON =
False where an interrupted command begins anew. Flags are run-level only; a method's hyper-parameters are fields of
its text, such as `--objective mtl_ibp:ibp_weight=0.01`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from robust import commands as folder
from robust.allocator import keep_freed_memory
from robust.crew import CrewError
from robust.files import FileInUse, encode
from robust.interruption import termination_interrupts
from robust.run_setup import TrainingError

USER_ERRORS = (ValueError, OSError, TrainingError, FileInUse, CrewError)
"""Errors whose message is meant for the user: one line, without the traceback that --debug shows."""

EXAMPLES = """examples:
  robust train --recipe digits_mtl_ibp         a certifiably robust classifier in under a minute
  robust certify runs/digits_mtl_ibp/checkpoint.safetensors
  robust methods attacks                       which attacks there are, and their fields
  robust doctor                                whether everything here works"""

EXIT_CODES = """exit codes:
  0    done
  1    robust doctor: a check failed
  2    a mistake in what was asked for, or a file, a disk or a device that cannot be used: one line says which
  130  interrupted (Ctrl-C, SIGTERM); the same command goes on where it stopped, but for masking and vnnlib"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; EXIT_CODES says what it returns."""
    # A shell's >&- leaves None in their place.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # One that cannot spell the sign of L∞ shows its number instead of breaking off there.
            stream.reconfigure(errors="backslashreplace")
    options = _parse(arguments)
    code = 0
    keep_freed_memory()
    try:
        with termination_interrupts():
            if getattr(options, "json", False):
                with contextlib.redirect_stdout(sys.stderr):
                    result = options.run(options)
                if result:  # nothing from the processes of torchrun that do not lead
                    print(encode(result))
            else:
                result = options.run(options)
        code = 1 if isinstance(result, Mapping) and result.get("failed") else 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`robust recipes | head`). What is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        if options.debug:
            raise
        print(f"robust: {' '.join(_words(error).split())}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        if options.debug:
            raise
        print("robust: the GPU's memory is full; give a smaller --batch-size (train: --micro_batch)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # torchrun interrupts all its processes; one of them says so
            goes_on = "; the same command goes on where it stopped" if options.goes_on else ""
            print(f"robust: interrupted{goes_on}", file=sys.stderr)
        return 130
    return code


def _words(error: BaseException) -> str:
    """The error's message; the system's own errors with the file first, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    advice = {
        errno.ENOSPC: "free some space, or give --out a folder on another disk; the same command goes on",
        errno.EDQUOT: "free some space, or give --out a folder elsewhere; the same command goes on",
        errno.EACCES: "give a place that you may read and write, with --out or --root",
        errno.EPERM: "give a place that you may read and write, with --out or --root",
        errno.EROFS: "give --out a folder that can be written",
        errno.ENOTDIR: "a part of that path is a file; give --out another folder",
        errno.EEXIST: "a file is there; give --out another folder",
        errno.EISDIR: "expected a file",
        errno.ENOENT: "there is no such file or folder",
    }.get(error.errno or 0)
    return f"{error.filename}: {error.strerror}{f'; {advice}' if advice else ''}"


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            options.parser.error(f"unexpected argument {word!r}")
        near = difflib.get_close_matches(word, options.parser._option_string_actions, n=1)
        options.parser.error(f"no flag {word}{f' (did you mean {near[0]}?)' if near else ''}")
    return options


def command_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="robust",
        description="Train, attack and certify robust image classifiers.",
        epilog=f"{EXAMPLES}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name in sorted(module.name for module in pkgutil.iter_modules(folder.__path__)):
        _add(commands, name)
    return parser


def _add(commands: Any, name: str) -> None:
    command = importlib.import_module(f"{folder.__name__}.{name}")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=command.WORDS,
        description=command.WORDS[0].upper() + command.WORDS[1:] + ".",
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=command.run, parser=parser, goes_on=getattr(command, "GOES_ON", True))
