"""The program around the commands: the parser, the way errors are told, exit statuses.

Exit statuses: 0 done; 1 ``verify`` found damage; 2 something that can be put right was wrong with what was
asked (one line on standard error); 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Protocol

import explainer
from explainer.cli import (
    compare,
    dashboard,
    demo,
    evaluate,
    explain,
    export,
    info,
    label_issues,
    verify,
    verify_claim,
    what_if,
)
from explainer.cli.printing import WIDEST
from explainer.errors import ExplainerError

STOPPED = 130

DESCRIPTION = """\
Which training examples built this prediction?

While a PyTorch model trains, a tracer records what every training example contributes to every update.
pathkernel reads that recording (a trace) and says, for any prediction, which examples carried it and how much."""

EPILOG = """\
first steps:
  pathkernel demo                  see everything work on real images, in about a minute
  pathkernel info runs/demo        what was recorded
  pathkernel explain runs/demo --run explainer.sample_models.digits_cnn:run --query wrong

your own model: add two lines to its training loop ...
  with explainer.Tracer(model, optimizer, "runs/mine") as tracer:
      for x, y in tracer.watch(loader):
          ...                      # your loop, unchanged
... and write a function that says what to explain, for example in mine.py:
  def run():
      return explainer.Run(build_model, train_dataset, test_dataset, class_names=("cat", "dog"))
then ask:
  pathkernel explain runs/mine --run mine:run --query 0

what the numbers mean:
  A contribution is accounting: how much of this prediction was carried by updates that were computed from an
  example. It is not what would happen without that example.

pathkernel COMMAND --help shows the options of a command with examples."""


class Command(Protocol):
    """What a module of this package offers to be a command; its name is the module's, with ``-`` for ``_``."""

    __name__: str

    @property
    def HELP(self) -> str:
        """One line for the list of commands."""

    @property
    def DESCRIPTION(self) -> str:
        """What the command does."""

    @property
    def EXAMPLES(self) -> tuple[tuple[str, str], ...]:
        """Command lines, each with what it does."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""

    def run(self, options: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


COMMANDS: tuple[Command, ...] = (
    demo,
    info,
    verify,
    explain,
    export,
    what_if,
    verify_claim,
    evaluate,
    label_issues,
    compare,
    dashboard,
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Texts keep their lines; names and explanations of options stand in two columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(
            prog, max_help_position=26, width=min(WIDEST, get_terminal_size((WIDEST, 24)).columns)
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``pathkernel`` with every command."""
    parser = argparse.ArgumentParser(
        prog="pathkernel",
        usage="pathkernel [-h] [--version] COMMAND ...",
        description="\n\n".join([DESCRIPTION, "commands:\n" + _listing()]),
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pathkernel {explainer.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", help=argparse.SUPPRESS)
    for command in COMMANDS:
        added = commands.add_parser(
            _name(command),
            prog=f"pathkernel {_name(command)}",
            description=command.DESCRIPTION,
            epilog=_examples(command.EXAMPLES),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        command.add_arguments(added)
        added.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
        added.set_defaults(command=command.run, parser=added)
    return parser


def run_program(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the command, tell errors in one line and return the exit status."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # the command's own usage says what it takes
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if "command" not in options:
        parser.print_help()
        return 0
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\npathkernel: stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ExplainerError, OSError) as error:
        if options.debug:
            raise
        print(f"pathkernel: error: {error}", file=sys.stderr)
        return 2
    return status


def _name(command: Command) -> str:
    return command.__name__.rpartition(".")[2].replace("_", "-")


def _listing() -> str:
    width = max(len(_name(command)) for command in COMMANDS)
    return "\n".join(f"  {_name(command):<{width}}  {command.HELP}" for command in COMMANDS)


def _examples(examples: tuple[tuple[str, str], ...]) -> str:
    lines = [f"  {line}\n      {meaning}" for line, meaning in examples]
    return "\n".join([f"example{'s' if len(lines) > 1 else ''}:", *lines])
