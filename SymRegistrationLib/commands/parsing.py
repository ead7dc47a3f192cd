"""What the parsers of all commands share. Standard library only, so that help costs nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..job import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as InputError."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message[:1].lower()}{message[1:]}.", f"Try '{self.prog} --help'.")


def command_parser(name: str, usage: str, description: str, examples: str) -> Parser:
    """The parser of ``symreg NAME`` without its arguments; ``usage`` is what follows the name."""
    return Parser(
        f"symreg {name}",
        usage=f"symreg {name} {usage}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output(parser: Any, text: str) -> None:
    """The folder that a command needs, ``-o DIR``."""
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help=text)


def add_verbosity_options(parser: argparse.ArgumentParser) -> None:
    """How a command speaks."""
    group = parser.add_argument_group("what it says")
    group.add_argument("--json", action="store_true", help="one JSON event a line on stdout: progress, result, error")
    group.add_argument("-q", "--quiet", action="store_true", help="only errors")
    group.add_argument("--debug", action="store_true", help="a traceback with an error")


def add_numbers(parser: Any, defaults: Any, table: str) -> None:
    """Options that are numbers, one a line of ``table``: an attribute of ``defaults``, a metavar, and what it is.

    The default of that attribute is the option's, and its type too; without one (None) it is a float, or an int where
    the metavar is N.
    """
    for line in table.strip().splitlines():
        name, metavar, text = line.split(maxsplit=2)
        value = getattr(defaults, name)
        kind = (int if metavar == "N" else float) if value is None else type(value)
        told = "" if value is None else " (default: %(default)g)"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=value, metavar=metavar, help=text + told)


def numbers(kind: type, count: int | None = None) -> Callable[[str], tuple]:
    """A type for arguments such as ``80,96,80`` or ``80x96x80``: ``count`` numbers of a kind, any count where None."""

    def read(text: str) -> tuple:
        try:
            found = tuple(kind(part) for part in text.replace("x", ",").split(","))
        except ValueError:
            found = ()
        if not found or count not in (None, len(found)):
            what = "a list of numbers" if count is None else f"{count} whole numbers"
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} such as 96,112,96")
        return found

    return read
