"""``monet-experts collect``: read labelled text once and write an atlas of every expert."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from monet_train.analysis.plan import DEFAULT_TOKENS_PER_LABEL, SAVE_SECONDS, WINDOW, Request, make_plan
from monet_train.errors import UserError
from monet_train.model.config import MonetConfig


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser("collect", help="read labelled text once and write an atlas of every expert")
    parser.description = (
        "Read labelled text once and write an atlas: for every expert its usage, its scores by label, and the text it "
        "fires at. A collection that was stopped goes on with the same command. Several processes: torchrun "
        "--nproc_per_node N -m monet_train.analysis collect ..., or slurm/collect.sh."
    )
    parser.add_argument("model", help="run folder (newest step), step folder, or Hugging Face folder")
    parser.add_argument("source", nargs="+", type=Path, help="shard folder of monet-data, whose labels are used")
    parser.add_argument("--out", type=Path, required=True, help="folder of the atlas")
    parser.add_argument("--labels", type=_names, help="columns to describe experts by, as lang,domain (all)")
    parser.add_argument(
        "--tokens-per-label", type=_tokens, default=DEFAULT_TOKENS_PER_LABEL,
        help=f"of every value of every column, or all; chosen by content hash ({DEFAULT_TOKENS_PER_LABEL:,})",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=_tokens, help="in all (no limit)")
    parser.add_argument("--window", type=int, help=f"tokens that the model reads at once ({WINDOW}, or its context)")
    parser.add_argument("--groups", type=_numbers, help="routing groups, as 0,2 (all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--save-minutes", type=float, default=SAVE_SECONDS / 60,
        help=f"between two saves of what was read: a kill loses no more ({SAVE_SECONDS / 60:.0f})",
    )  # fmt: skip
    parser.add_argument("--estimate", action="store_true", help="only tell what it will take")
    parser.set_defaults(run=_collect)


def _collect(arguments: argparse.Namespace) -> None:
    from monet_train.analysis.collect import Worker, check_out, collect
    from monet_train.analysis.estimate import check_memory, estimate, said
    from monet_train.analysis.same_tokenizer import check_same_tokenizer
    from monet_train.checkpoints.layout import resolve_checkpoint
    from monet_train.checkpoints.load import load_pretrained
    from monet_train.data.shards import find_shards
    from monet_train.parallel.agreement import agree
    from monet_train.parallel.launch import read_launch, resolve_device, start_process_group, stop_process_group

    launch = read_launch()
    device = resolve_device(arguments.device, launch)
    with ExitStack() as resources:
        start_process_group(launch, device)
        resources.callback(stop_process_group)
        model = agree(lambda: load_pretrained(arguments.model, device=device))
        config, show = model.config, launch.is_main
        request = agree(lambda: _request(arguments, config))
        groups = agree(lambda: _groups(arguments.groups, config))
        agree(lambda: check_out(arguments.out))
        agree(lambda: check_same_tokenizer(resolve_checkpoint(arguments.model), find_shards(arguments.source[0])))
        plan = agree(lambda: make_plan(arguments.source, request, config.vocab_size, show))
        agree(lambda: check_memory(config, plan, len(groups), launch.local_size))
        if show:
            print(said(plan, estimate(model, plan, groups, launch.world_size)), flush=True)
        if arguments.estimate:
            return
        worker = Worker(launch.rank, launch.world_size)
        save_seconds = 60 * arguments.save_minutes
        collect(model, plan, arguments.out, groups, worker, save_seconds=save_seconds, show=show)
        if show:
            print(f"written to {arguments.out}")


def _request(arguments: argparse.Namespace, config: MonetConfig) -> Request:
    context = config.max_position_embeddings
    window = min(WINDOW, context) if arguments.window is None else arguments.window
    if not 1 <= window <= context:
        raise UserError(f"--window {window} is not possible; use 1 to {context}, the context of the model")
    return Request(arguments.labels, arguments.tokens_per_label, arguments.max_tokens, window)


def _groups(asked: list[int] | None, config: MonetConfig) -> list[int]:
    """The routing groups that are asked for."""
    available = range(len(config.router_layers))
    for group in asked or ():
        if group not in available:
            raise UserError(f"--groups {group} is not a routing group; use some of 0 to {len(available) - 1}")
    return sorted(set(asked)) if asked else list(available)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _tokens(text: str) -> int | None:
    """A positive number, or None for all."""
    if text == "all":
        return None
    number = int(text.replace("_", "").replace(",", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1, or all")
    return number
