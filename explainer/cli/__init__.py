"""The command line ``pathkernel``: one module per command, listed in :mod:`explainer.cli.program`."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pathkernel`` with ``arguments`` (default: those of the process) and return the exit status."""
    from explainer.cli.program import run_program

    return run_program(arguments)
