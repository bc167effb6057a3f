"""``monet-experts profile``: which experts belong to which label, and how much of that chance would give."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monet_train.analysis.atlas import Atlas
from monet_train.durable import write_atomically


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser("profile", help="count the experts of every label, with support and chance beside")
    parser.description = (
        "Count the experts of every value of a label. The paper's rule (mean score at least twice the second-highest) "
        "on one half of the documents, how many the other half confirms, and how many chance would give; beside it, "
        "the experts that Benjamini-Hochberg leaves at a false discovery rate, by p-values over documents."
    )
    parser.add_argument("atlas", type=Path, help="folder that monet-experts collect wrote")
    parser.add_argument("--by", required=True, metavar="LABEL", help="label column, as lang")
    parser.add_argument("--ratio", type=float, default=2.0, help="of the paper's rule (2)")
    parser.add_argument("--firings", type=int, default=20, help="tokens that an expert must have fired at (20)")
    parser.add_argument("--documents", type=float, default=5.0, help="effective documents that it must have (5)")
    parser.add_argument("--fdr", type=float, default=0.05, help="false discovery rate (0.05)")
    parser.add_argument("--halves", action="store_true", help="half-experts instead of experts")
    parser.add_argument("--out", type=Path, help="also write the figures, as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    atlas = Atlas(arguments.atlas)
    values = atlas.values(arguments.by)
    groups = [atlas.sums(group, arguments.by, arguments.halves) for group in atlas.groups]
    from monet_train.analysis.profiles import profile
    from monet_train.analysis.rules import Support

    support = Support(arguments.firings, arguments.documents)
    report = profile(groups, atlas.groups, values, arguments.ratio, support, arguments.fdr)
    print(f"{'half-experts' if arguments.halves else 'experts'} by {arguments.by}")
    for found in report:
        print(table([asdict(row) for row in found.values]))
        print(
            f"group {found.group}: of {found.experts:,}, {found.supported:,} have the support; the paper's rule labels "
            f"{found.labelled:,} (by chance {found.labelled_by_chance:,.0f}), the other half confirms "
            f"{found.replicated:,} (by chance {found.replicated_by_chance:,.0f}); mean selectivity "
            f"{found.selectivity:.2f}, information {found.information:.1e} bits (by chance "
            f"{found.information_by_chance:.1e})\n"
        )
    if arguments.out:
        write_atomically(arguments.out, (json.dumps([asdict(found) for found in report], indent=1) + "\n").encode())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned columns, numbers to the right."""
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [[f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if number else cell.ljust(width)
                  for number, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )  # fmt: skip
