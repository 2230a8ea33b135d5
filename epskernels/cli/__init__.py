"""The command line: `epskernels demo`, `sample`, `calibrate` and `info`.

Each command is a module with TEXTS for the help, add_arguments(parser) and run(args). `common.py` is what they share.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from . import calibrate, demo, info, sample
from .common import UsageError, first_line

__all__ = ["build_parser", "main"]

COMMANDS = {"info": info, "demo": demo, "sample": sample, "calibrate": calibrate}  # in the order of --help


def build_parser() -> argparse.ArgumentParser:
    """The parser of `epskernels`, with one parser for each command."""
    parser = argparse.ArgumentParser(
        prog="epskernels", description="Fused sampling steps for diffusion models, with Epsilon Scaling."
    )
    parser.add_argument("--version", action="version", version=f"epskernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, **command.TEXTS}
        command.add_arguments(commands.add_parser(name, **options))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0, 1 for what failed, 2 for bad arguments, 130 for Ctrl-C.

    argv: default the process's. Raises SystemExit for --help and for arguments that the parser refuses.
    """
    out = _Stream(sys.stdout)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(_Stream(sys.stderr)):
        args = build_parser().parse_args(argv)
        status = _run(args)
        if out.kept and args.command != "info":  # which can be asked again
            print(
                f"epskernels {args.command}: stdout cannot be written: {out.error}\n{out.kept}", end="", file=sys.stderr
            )
            if isinstance(out.error, OSError) and not isinstance(out.error, BrokenPipeError):
                status = status or 1
        return status


def _run(args: argparse.Namespace) -> int:
    """Runs the command, and prints its error as one line. Returns the exit status."""
    path = list(sys.path)
    try:
        COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print(f"epskernels {args.command}: interrupted", file=sys.stderr)
        return 130
    except (UsageError, RuntimeError, ValueError, OSError, MemoryError, ImportError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"epskernels {args.command}: {_as_option(first_line(error), args)}{notes}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        sys.path[:] = path  # load_function puts the current folder there
    return 0


def _as_option(said: str, args: argparse.Namespace) -> str:
    """An error that begins with the name of an argument: with that of the option, where there is one, and it has a value."""
    name, colon, _ = said.partition(":")
    value = getattr(args, "label" if name == "class" else name, None)
    return f"--{said}" if colon and value is not None else said


class _Stream:
    """stdout or stderr, or None, while a command works. Writing to it never raises.

    kept: the text that could not be written. error: why, or None.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.kept = ""
        self.error: Exception | str | None = None if stream else "closed"

    def write(self, text: str) -> int:
        if self.error is None:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            try:
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
                self.stream.flush()
                return len(text)
            except (OSError, ValueError) as error:  # a full disk, a pipe that nobody reads; closed
                self.error = error
                self._lead_nowhere()
        self.kept += text
        return len(text)

    def _lead_nowhere(self) -> None:
        """Otherwise Python fails at the same stream again when the process ends."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def flush(self) -> None:
        """Does nothing: every write has flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
