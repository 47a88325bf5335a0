"""The ``vllm-d2cache`` command: one module a subcommand, loaded when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Subcommand -> one line for the list of them. The module of that name has add_arguments(parser) and run(args).
SUBCOMMANDS = {
    "compare": "run policies and decoders on the same prompts, and compare what they give and take",
    "doctor": "say what is found here and what will not work",
    "frequencies": "count tokens of a text file: the table that decoder pc needs",
    "view": "replay a recorded request: an HTML page, or in the terminal",
}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-d2cache", description="Tools of vllm-d2cache.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, summary in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if argv[:1] == [name]:  # of the others their names are enough; some import torch
            module = import_module(f"{__name__}.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return import_module(f"{__name__}.{args.command}").run(args)
    except UsageError as error:
        print(f"vllm-d2cache {args.command}: {error}", file=sys.stderr)
        return 2
