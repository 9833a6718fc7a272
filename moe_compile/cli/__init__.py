"""The command `moe-compile`."""

import argparse
from collections.abc import Sequence

from moe_compile.cli import fuzz


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = argparse.ArgumentParser(prog="moe-compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fuzz.add(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
