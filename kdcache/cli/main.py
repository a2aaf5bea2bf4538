"""The command `kdcache`: find the subcommand, run it, turn errors into one sentence.

Exit status: 0 done; 1 a check found damage, or a capture set units aside; 2 wrong usage, config, input or cache, or a training
whose numbers are no longer finite; 130 and 143 interrupted. Results go to stdout, everything else to stderr. Only the module of
the chosen subcommand is imported, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import NoReturn, Protocol, cast

from kdcache import __version__
from kdcache.errors import KdcacheError
from kdcache.extras import needed_for
from kdcache.shown import say

COMMANDS = {
    "capture": ("capture", "run a teacher over text and cache its distributions"),
    "info": ("info", "show what a cache contains: teacher, amount of text, size"),
    "fold": ("fold", "make everything published so far visible to readers"),
    "verify": ("verify", "read a whole cache again and check everything it claims"),
    "repair": (
        "repair",
        "set damaged units of a cache aside, so that they can be captured again",
    ),
    "doctor": ("doctor", "examine any cache, ours or another tool's, and report what is wrong with it"),
    "convert": ("convert", "convert another tool's cache to a kdcache cache"),
    "derive": ("derive", "make a cache from caches, without a teacher: choose, filter, join, reduce, mix"),
    "export": ("export", "hand a cache's hidden states to a trainer of drafters: speculators, SpecForge"),
    "train": ("train", "train a student from a cache"),
    "student": ("student", "make a student of a teacher's layers and of part of their width, as a model's folder"),
    "evaluate": ("evaluate", "compare students with their teacher on held-out text"),
}
"""name -> (module in `kdcache.cli.commands`, one line of help)."""

_EXTRAS = {"train": "train", "student": "train", "evaluate": "train"}
"""command -> the extra that installs everything it needs."""


class Command(Protocol):
    """What the module of a subcommand provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return the exit status."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. Usage errors and `--help` raise SystemExit, as argparse does."""
    # Before anything imports torch, which would otherwise print where it binds memory into every command's output.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError):  # where stderr is not a file
            faulthandler.enable()  # a process that dies in native code, e.g. when a mapped file is truncated, reports where
    if argv is None:
        sys.excepthook = _show_bug
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    parser, subparsers = _parser()
    command = None
    if chosen is not None:
        command = cast("Command", import_module(f"kdcache.cli.commands.{COMMANDS[chosen][0]}"))
        command.add_arguments(subparsers[chosen])
        subparsers[chosen].usage = _usage(subparsers[chosen])
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(parser if chosen is None else subparsers[chosen], unknown)
    if command is None:
        parser.print_help()
        return 2
    return run_command(command, args)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, with control characters from a file's text escaped."""
    say("".join(traceback.format_exception(kind, error, trace)), sys.stderr)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of every error"
    )
    parser = argparse.ArgumentParser(
        prog="kdcache",
        parents=[shared],
        description="Run a teacher model once, offline, and train any number of students from its cache as if it were live.",
        epilog="`kdcache COMMAND --help` explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"kdcache {__version__}")
    choices = parser.add_subparsers(title="commands", metavar="COMMAND")
    names = {
        name: choices.add_parser(
            name, parents=[shared], help=text, description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )
        for name, (_, text) in COMMANDS.items()
    }  # fmt: skip
    return parser, names


def _usage(parser: argparse.ArgumentParser) -> str:
    """One line of usage: what has to be given. The options are listed below it."""
    given = []
    for action in parser._actions:
        if not action.option_strings:
            given.append(f"{action.metavar} [{action.metavar} ...]" if action.nargs == "+" else str(action.metavar))
        elif action.required:
            given.append(f"{action.option_strings[0]} {action.metavar}")
    return " ".join([parser.prog, *given, "[options]"])


def _refuse_unknown(parser: argparse.ArgumentParser, arguments: list[str]) -> NoReturn:
    """Exit as argparse does, with the command's own usage and a way on."""
    has_config = "--set" in parser._option_string_actions
    hint = ", and --set FIELD=VALUE sets a field of the config" if has_config else ""
    parser.error(f"unrecognized arguments: {' '.join(arguments)}; `{parser.prog} --help` lists the options{hint}")


def run_command(command: Command, args: argparse.Namespace) -> int:
    """Run a command and return its exit status, or that of a KdcacheError. Any other error is a bug and propagates."""
    name = getattr(command, "__name__", "").rpartition(".")[2]
    try:
        with needed_for(f"kdcache {name}", _EXTRAS.get(name)):
            return command.run(args)
    except KdcacheError as error:
        if getattr(args, "verbose", False):
            say(traceback.format_exc(), sys.stderr)
        say(f"kdcache: error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        say(f"\nkdcache: interrupted{': ' if interrupt.args else ''}{interrupt}", sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
