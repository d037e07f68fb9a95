"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..checkpoints import NAMINGS, convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 when it was refused (the reason is on stderr), or 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        reason = f"no such file: {error}" if isinstance(error, FileNotFoundError) else str(error)
        print(f"anyflow {options.command}: {reason}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anyflow", description="Any-step flow maps of diffusers models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    names = "\n".join(f"  {name:<14}{naming.used_by}" for name, naming in NAMINGS.items())
    command = commands.add_parser(
        "convert",
        help="rename the delta embedders of a checkpoint",
        description="Write SRC to the file DST, its delta embedders named as another trainer expects.",
        epilog=f"namings:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="SRC", help="a safetensors file, or a directory that holds a checkpoint")
    command.add_argument("target", metavar="DST", help="the safetensors file to write")
    command.add_argument("--to", required=True, choices=tuple(NAMINGS), help="the naming of DST")
    command.add_argument("--family", help="class of the model; by default what SRC says, else WanTransformer3DModel")
    command.add_argument("--gate-value", type=float, help="for a student file, where SRC does not tell it")
    command.add_argument(
        "--deltatime-type", choices=("r", "t-r"), help="for a student file, where SRC does not tell it"
    )
    command.set_defaults(run=_convert)
    return parser


def _convert(options: argparse.Namespace) -> int:
    path = convert(
        options.source,
        options.target,
        options.to,
        family=options.family,
        gate_value=options.gate_value,
        deltatime_type=options.deltatime_type,
    )
    print(f"wrote {path}")
    return 0
