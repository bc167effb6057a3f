"""``monet-experts COMMAND``: read the experts of a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from monet_train.analysis.plan import DEFAULT_TOKENS_PER_LABEL, WINDOW, Request, make_plan
from monet_train.errors import UserError, one_line_errors
from monet_train.model.config import MonetConfig

EPILOG = """
example:
  monet-data shards 'corpus/*.jsonl.zst' --tokenizer runs/nano --out data/labelled
  monet-experts collect runs/nano data/labelled --out atlas
"""


def main() -> None:
    """Console entry ``monet-experts``."""
    from monet_train.parallel.launch import read_launch

    one_line_errors(_run, read_launch().rank)()


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="monet-experts", description="Read and edit the experts of a trained Monet.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_collect(commands.add_parser("collect", help="read labelled text once and write an atlas of every expert"))
    arguments = parser.parse_args()
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)


def _add_collect(parser: argparse.ArgumentParser) -> None:
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
        help=f"of every value of every column, or all; documents are chosen by content hash ({DEFAULT_TOKENS_PER_LABEL:,})",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=_tokens, help="in all (no limit)")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"tokens that the model reads at once ({WINDOW})")
    parser.add_argument("--groups", type=_numbers, help="routing groups, as 0,2 (all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--estimate", action="store_true", help="only tell what it will take")
    parser.set_defaults(run=_collect)


def _collect(arguments: argparse.Namespace) -> None:
    from monet_train.analysis.collect import Worker, collect
    from monet_train.analysis.estimate import check_memory, estimate, said
    from monet_train.checkpoints.load import load_pretrained
    from monet_train.data.shards import find_shards
    from monet_train.parallel.agreement import agree
    from monet_train.parallel.launch import read_launch, resolve_device, start_process_group, stop_process_group

    request = Request(arguments.labels, arguments.tokens_per_label, arguments.max_tokens, arguments.window)
    launch = read_launch()
    device = resolve_device(arguments.device, launch)
    with ExitStack() as resources:
        start_process_group(launch, device)
        resources.callback(stop_process_group)
        model = agree(lambda: load_pretrained(arguments.model, device=device))
        config, show = model.config, launch.is_main
        groups = agree(lambda: _check_request(request, arguments.groups, config))
        plan = agree(lambda: make_plan(arguments.source, request, config.vocab_size, show))
        agree(lambda: check_memory(config, plan, len(groups), launch.local_size))
        manifest = find_shards(arguments.source[0]).manifest
        assert manifest is not None  # make_plan has refused shards without one
        if show:
            print(said(plan, estimate(model, plan, groups, launch.world_size)), flush=True)
        if arguments.estimate:
            return
        worker = Worker(launch.rank, launch.world_size)
        collect(model, plan, request, manifest.tokenizer.sha256, arguments.out, groups, worker, show=show)
        if show:
            print(f"written to {arguments.out}")


def _check_request(request: Request, groups: list[int] | None, config: MonetConfig) -> list[int]:
    """The routing groups that are asked for."""
    context, available = config.max_position_embeddings, range(len(config.router_layers))
    if not 1 <= request.window <= context:
        raise UserError(f"--window {request.window} is not possible; use 1 to {context}, the context of the model")
    for group in groups or ():
        if group not in available:
            raise UserError(f"--groups {group} is not a routing group; use some of 0 to {len(available) - 1}")
    return sorted(set(groups)) if groups else list(available)


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
