"""``monet-experts COMMAND``: read and edit the experts of a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from monet_train.analysis.commands import collect, profile, select
from monet_train.errors import one_line_errors
from monet_train.parallel.launch import read_launch

EPILOG = """
example: which experts are German, and what is the model without them?
  monet-data shards 'corpus/*.jsonl.zst' --tokenizer runs/nano --out data/labelled
  monet-experts collect runs/nano data/labelled --out atlas
  monet-experts profile atlas --by lang
  monet-experts select atlas --by lang --value de --out german.experts.safetensors
  monet-generate runs/nano --experts german.experts.safetensors --prompt "Die Stadt"
"""


def main() -> None:
    """Console entry ``monet-experts``."""
    one_line_errors(_run, read_launch().rank)()


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="monet-experts", description="Read and edit the experts of a trained Monet.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (collect, profile, select):
        command.add_to(commands)
    arguments = parser.parse_args()
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)
