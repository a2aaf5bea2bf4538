"""The command `kdcache`: find the subcommand, run it, turn errors into one sentence.

Exit status: 0 done, 1 a check found damage or a capture set units aside, 2 wrong usage, config, input or cache, or a training
whose numbers are no longer finite, 130 and 143 interrupted. stdout carries results, stderr everything else. Only the module of
the chosen subcommand is imported, so that `--help` is instant.
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
from typing import Protocol, cast

from kdcache import __version__
from kdcache.errors import KdcacheError
from kdcache.extras import needed_for
from kdcache.shown import say

COMMANDS = {
    "capture": ("capture", "run a teacher over text and write what it says into a cache"),
    "info": ("info", "say what a cache holds"),
    "fold": ("fold", "make what is published so far visible to readers"),
    "verify": ("verify", "re-read a whole cache and check every promise it makes"),
    "repair": (
        "repair",
        "set damaged units of a cache aside, so that they can be made again",
    ),
    "doctor": ("doctor", "say what any cache is, ours or another tool's, and what is wrong with it"),
    "convert": ("convert", "write another tool's cache as one of ours"),
    "derive": ("derive", "make a cache of other caches: choose, filter, join, reduce, mix; no teacher is asked"),
    "train": ("train", "train a student from a cache"),
    "evaluate": ("evaluate", "compare students with their teacher on held-out text"),
}
"""name -> (module in `kdcache.cli.commands`, one line of help)."""

_EXTRAS = {"train": "train", "evaluate": "train"}
"""What brings all that a command needs."""


class Command(Protocol):
    """What the module of a subcommand holds."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit status."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. Usage mistakes and `--help` leave through SystemExit, as argparse has it."""
    # Before anything imports torch: it would otherwise print where it binds memory, into every command's output.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError):  # where stderr is no file
            faulthandler.enable()  # a process that dies in native code, as of a file cut while it is mapped, says where
    if argv is None:
        sys.excepthook = _show_bug
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    parser, subparsers = _parser()
    command = None
    if chosen is not None:
        command = cast("Command", import_module(f"kdcache.cli.commands.{COMMANDS[chosen][0]}"))
        command.add_arguments(subparsers[chosen])
    args = parser.parse_args(arguments)
    if command is None:
        parser.print_help()
        return 2
    return run_command(command, args)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback as Python prints it, without what a file's text in it would do to a terminal."""
    say("".join(traceback.format_exception(kind, error, trace)), sys.stderr)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of every error"
    )
    parser = argparse.ArgumentParser(
        prog="kdcache",
        parents=[shared],
        description="Run a teacher model once, offline; train any number of students from its cache as if it were live.",
        epilog="`kdcache COMMAND --help` says more about a command.",
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


def run_command(command: Command, args: argparse.Namespace) -> int:
    """Run a command; its exit status, or that of the error it raised. What is no KdcacheError is a bug and is raised."""
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
        # The reader of our stdout has gone (`| head`). Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
