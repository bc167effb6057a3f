"""``monet-experts select``: choose the experts of a label and write them to a file that every command takes."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import torch

from monet_train.analysis.atlas import Atlas
from monet_train.errors import UserError
from monet_train.model.mask import ExpertSet

RULES = ("paper", "fdr", "ratio", "top")  # those of rules.RULES, which needs scipy


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser("select", help="choose the experts of a label, into a file")
    parser.description = (
        "Choose the experts of one value of a label, by the half of the documents that is there to choose by, and "
        "write them with a factor: 0 switches them off. monet-generate --experts, load_pretrained(experts=) and "
        "ExpertSet take the file."
    )
    parser.add_argument("atlas", type=Path, help="folder that monet-experts collect wrote")
    parser.add_argument("--by", required=True, metavar="LABEL", help="label column, as lang")
    parser.add_argument("--value", required=True, help="value of the label, as de")
    parser.add_argument(
        "--rule", choices=RULES, default="ratio",
        help="paper: mean score at least twice the second-highest; fdr: significant at a false discovery rate of 0.05; "
        "ratio: at least 4 times the mean of the others; top: best first (ratio)",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, help="of the rule, instead of the number above")
    parser.add_argument("--budget", type=float, help="at most this share of all experts, best first, as 0.01")
    parser.add_argument("--firings", type=int, default=20, help="tokens that an expert must have fired at (20)")
    parser.add_argument("--documents", type=float, default=5.0, help="effective documents that it must have (5)")
    parser.add_argument("--halves", action="store_true", help="choose half-experts, by their own profiles")
    parser.add_argument("--factor", type=float, default=0.0, help="of the chosen experts; 0: off (0)")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.budget is not None and not 0 < arguments.budget <= 1:
        raise UserError(f"--budget {arguments.budget} is not a share of all experts; give a number up to 1, as 0.01")
    atlas = Atlas(arguments.atlas)
    values = atlas.values(arguments.by)
    if arguments.value not in values:
        near = difflib.get_close_matches(arguments.value, values, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(values)}"
        raise UserError(f"--value {arguments.value}: {arguments.by} has no such value; {hint}")
    chosen = _select(atlas, values.index(arguments.value), arguments)
    if not len(chosen):
        raise UserError(
            f"no expert passes --rule {arguments.rule} for {arguments.by}={arguments.value}: give another --threshold, "
            "ask for less support (--firings, --documents), or collect more tokens"
        )
    chosen.save(arguments.out)
    share = len(chosen) / (len(atlas.groups) * atlas.size**2)
    print(f"{len(chosen):,} experts ({share:.2%}) for {arguments.by}={arguments.value} written to {arguments.out}")


def _select(atlas: Atlas, value: int, arguments: argparse.Namespace) -> ExpertSet:
    identity, together = atlas.manifest.model.identity, None
    said = f"{arguments.by}={arguments.value} by {arguments.rule}"
    for group in atlas.groups:
        sums = atlas.sums(group, arguments.by, arguments.halves)
        from monet_train.analysis.rules import Support, select

        support = Support(arguments.firings, arguments.documents)
        found = select(sums.half(0), value, arguments.rule, arguments.threshold, arguments.budget, support)
        pairs = _pairs(torch.from_numpy(found.experts), atlas.size, arguments.halves)
        chosen = ExpertSet.choose(identity, group, pairs, arguments.factor, description=said)
        together = chosen if together is None else together.union(chosen)
    assert together is not None
    return together


def _pairs(numbers: torch.Tensor, size: int, halves: bool) -> torch.Tensor:
    """Experts (i, j) of flat numbers, [n, 2]; of half-experts all pairs, with -1 for the other side."""
    if not halves:
        return torch.stack([numbers // size, numbers % size], 1)
    every = torch.full_like(numbers, -1)
    first = numbers < size
    return torch.stack([torch.where(first, numbers, every), torch.where(first, every, numbers - size)], 1)
