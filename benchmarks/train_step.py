"""``python -m benchmarks.train_step``: whole training steps, native kernels against the plain definition.

The same model, initial weights, tokens and optimizer under DeepSpeed's engine, once with each implementation; a step
is everything that training does: forward, loss, backward, clipping, AdamW. The first steps are compared loss by loss,
then steps are timed in turn. ``--profile`` prints where the native step's time goes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import environment, medians_in_turn
from monet_train.config.compose import compose
from monet_train.config.schema import TrainConfig
from monet_train.errors import UserError, one_line_errors
from monet_train.kernels import Kernels
from monet_train.model.sharding import build_model
from monet_train.parallel.groups import Topology
from monet_train.parallel.launch import Launch, resolve_device, start_process_group, stop_process_group
from monet_train.planning.devices import peak_flops
from monet_train.planning.flops import training_flops_per_token
from monet_train.training.callbacks.utilisation import work_done
from monet_train.training.engine import build_engine, set_learning_rate
from monet_train.training.objective import LanguageModelling
from monet_train.training.schedules import learning_rate

ROOT = Path(__file__).parents[1]
COMPARED_STEPS = 20
IMPLEMENTATIONS = ("native", "plain")


class Stepper:
    """One engine, stepping through batches that are a function of the step's number alone."""

    def __init__(self, config: TrainConfig, topology: Topology, device: torch.device) -> None:
        self.config = config
        self.device = device
        model = build_model(
            config.model,
            topology,
            device,
            seed=config.train.seed,
            kernels=Kernels(config.kernels),
            recompute=config.train.recompute,
        )
        self.engine = build_engine(model, config, topology)
        self.engine.train()
        self.objective = LanguageModelling(config.train.uniformity_weight, config.train.ambiguity_weight)
        self.step = 0
        self.active: list[list[float]] = []  # of every router in the last micro-step: half-experts per token, by side

    def __call__(self) -> float:
        """One optimizer step; its cross-entropy."""
        rate = learning_rate(self.step, self.config.optimizer.lr, 300, self.config.schedule)
        set_learning_rate(self.engine, rate)
        losses = []
        for tokens in batches(self.step, self.config, self.device):
            output = self.engine(tokens[:, :-1], targets=tokens[:, 1:], keep_logits=False)
            total, metrics = self.objective(output, torch.tensor(tokens[:, 1:].numel(), dtype=torch.float64))
            self.engine.backward(total)
            self.engine.step()
            losses.append(metrics[0])
        self.active = [router.active.tolist() for router in output.routers]
        self.step += 1
        return torch.stack(losses).mean().item()


def batches(step: int, config: TrainConfig, device: torch.device) -> list[Tensor]:
    """Micro-batches of tokens drawn by Zipf's law, which text follows roughly; [micro-batch, S + 1] each."""
    generator = torch.Generator().manual_seed(step)
    weights = 1.0 / torch.arange(1, config.model.vocab_size + 1)
    shape = (config.train.global_batch_size, config.train.seq_length + 1)
    tokens = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
    return list(tokens.to(device).split(config.train.micro_batch_size))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each implementation (7)")
    parser.add_argument("--profile", action="store_true", help="print the native step's profile")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/)")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as train.precision=bf16")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compare, time and report."""
    configs = {
        name: compose(["data.path=unused", "zero.stage=0", *options.overrides, f"kernels={name}"])
        for name in IMPLEMENTATIONS
    }
    config = configs["native"]
    launch = Launch(rank=0, world_size=1, local_rank=0)
    device = resolve_device(config.train.device, launch)
    said, conditions = Kernels("native").describe(device), environment(device)
    start_process_group(launch, device)
    topology = Topology(tensor_size=1)
    steppers = {name: Stepper(each, topology, device) for name, each in configs.items()}
    losses = {name: [stepper() for _ in range(COMPARED_STEPS)] for name, stepper in steppers.items()}
    deviation = max(abs(a - b) / b for a, b in zip(losses["native"], losses["plain"], strict=True))
    subjects: dict[str, Callable[[], object]] = dict(steppers)
    seconds = medians_in_turn(subjects, options.rounds)
    if options.profile:
        print_profile(steppers["native"])
    stop_process_group()
    flops = {"dense": training_flops_per_token(config.model, config.train.seq_length)}
    for name, stepper in steppers.items():
        work = work_done(configs[name], device)
        flops[name] = work.flops_per_token(config.model, config.train.seq_length, stepper.active)
    peak = peak_flops(device, config.train.precision)
    tokens = config.train.global_batch_size * config.train.seq_length
    speed = {name: tokens / value for name, value in seconds.items()}
    return {
        "environment": conditions,
        "kernels": said,
        "overrides": options.overrides,
        "tokens_a_step": tokens,
        "flops_a_token": flops,
        "seconds": seconds,
        "tokens_per_second": speed,
        "mfu": peak and {name: flops["dense"] * value / peak for name, value in speed.items()},
        "hfu": peak and {name: flops[name] * value / peak for name, value in speed.items()},
        "native_over_plain": seconds["plain"] / seconds["native"],
        "largest_loss_deviation": deviation,
        "compared_steps": COMPARED_STEPS,
    }


def print_profile(step: Callable[[], object]) -> None:
    """The operations of one step by their own time."""
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=48))


@one_line_errors
def main() -> None:
    """Console entry."""
    options = parse()
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds} must be at least 1")
    report = measure(options)
    dense = report["flops_a_token"]["dense"] / 1e6
    print(f"{report['kernels']}\n{'':>8}  s/step  tokens/s  MFLOP/token (dense {dense:,.0f})")
    for name in IMPLEMENTATIONS:
        share = f"  mfu {report['mfu'][name]:.1%}, hfu {report['hfu'][name]:.1%}" if report["mfu"] else ""
        print(f"{name:>8}  {report['seconds'][name]:6.3f}  {report['tokens_per_second'][name]:8,.0f}  "
              f"{report['flops_a_token'][name] / 1e6:11,.0f}{share}")  # fmt: skip
    print(
        f"native is {report['native_over_plain']:.2f} times as fast; largest loss deviation over "
        f"{COMPARED_STEPS} steps {report['largest_loss_deviation']:.1e}"
    )
    machine = f"{report['environment']['processor']} {report['environment']['threads']} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join([machine, *options.overrides]).lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / f"train-step-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
