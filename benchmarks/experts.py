"""``python -m benchmarks.experts``: the expert kernels against the plain formula, dense products and a dense MLP.

Every subject computes the same thing on the same real routing (logits of random normal tokens):

- ``native``: the sparse kernels, weights stored as published; for decoding by columns (``store_by_columns``)
- ``masked``: the same with 10% of all experts, drawn at random, switched off
- ``plain``: the definition in eager PyTorch, which is the published layer's formula
- ``compiled``: the same under torch.compile (``--compile``), with its first calls left out
- ``products``: only the matrix products of that formula, the floor of any dense implementation
- ``mlp``: a dense MLP with as many parameters as the expert layer

Workloads: ``layer`` is an expert layer given its gates, ``group`` one router and the expert layers that share it,
with output biases. Ratios are of medians measured in turn in one process. Memory: ``peak`` is the most that tensors
took at once, with gradients of all weights; ``kept`` is what autograd holds on to between forward and backward.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

from benchmarks.timing import Work, bytes_kept_for_backward, environment, medians_in_turn, peak_bytes
from monet_train import kernels
from monet_train.errors import one_line_errors
from monet_train.kernels import AUTO, DenseGates, Gates, Kernels, plain

ROOT = Path(__file__).parents[1]
SIZES = ("nano", "850m", "1.4b", "4.1b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKED = 0.1  # share of the experts that ``masked`` switches off
DECODE_LAYERS = 6  # weights of so many layers in turn: like a model's, they do not all stay in cache
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer; see DESIGN names in :mod:`monet_train.model.config`."""

    d: int
    experts: int
    m: int
    heads: int
    k: int
    group: int  # layers that share a router


def sizes_of(name: str) -> Sizes:
    model = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["model"]
    return Sizes(
        model["hidden_size"], model["moe_experts"], model["moe_dim"], model["moe_heads"], model["moe_topk"],
        model["moe_groups"],
    )  # fmt: skip


class Layer:
    """Weights of one expert layer, and its output from tokens and gates."""

    def __init__(self, decomposition: str, sizes: Sizes, dtype: torch.dtype, by_columns: bool = False) -> None:
        inner = sizes.experts * sizes.m
        d = sizes.d
        if decomposition == "vertical":
            inputs = [(inner // 2, d), (inner // 2,), (inner // 2, d), (inner // 2,)]
            outputs, widths = [(d // 2, inner // 2)] * 4, [d // 2] * 2
        else:
            inputs, outputs, widths = [(inner, d), (inner,)], [(d, inner)], [d]
        self.decomposition = decomposition
        self.inputs = [parameter(*shape, dtype=dtype) for shape in inputs]
        self.outputs = [parameter(*shape, dtype=dtype, by_columns=by_columns) for shape in outputs]
        self.biases = [parameter(sizes.experts, width, dtype=dtype) for width in widths]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.inputs, *self.outputs, *self.biases]

    def experts(self, x: Tensor, g1: Gates, g2: Gates, mask: Tensor | None = None) -> Tensor:
        operation = kernels.vertical_experts if self.decomposition == "vertical" else kernels.horizontal_experts
        return operation(x, g1, g2, mask, *self.inputs, *self.outputs)

    def with_bias(self, x: Tensor, g1: Gates, g2: Gates, r1: Gates, r2: Gates, mask: Tensor | None = None) -> Tensor:
        """``r1``, ``r2``: what the mask leaves of the gates, else the gates."""
        sides = (r1, r2) if self.decomposition == "vertical" else (r2,)
        bias = [kernels.expert_bias(r, b) for r, b in zip(sides, self.biases, strict=True)]
        return self.experts(x, g1, g2, mask) + torch.cat(bias, -1)

    def products(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The matrix products alone; ``hidden`` stands for what the output layers multiply."""
        read = [F.linear(x, weight) for weight in self.inputs if weight.dim() == 2]
        written = [F.linear(hidden, weight) for weight in self.outputs]
        return torch.cat([part.flatten() for part in (*read, *written)])


class DenseMLP:
    """An MLP of as many parameters as an expert layer, with its activation."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        width = sizes.experts * sizes.m
        self.up, self.down = parameter(width, sizes.d, dtype=dtype), parameter(sizes.d, width, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(plain.relu_squared(F.linear(x, self.up)), self.down)


def parameter(*shape: int, dtype: torch.dtype, by_columns: bool = False) -> Tensor:
    values = (0.02 * torch.randn(*shape)).to(dtype)
    return (kernels.store_by_columns(values) if by_columns else values).requires_grad_()


def thresholds(z: Tensor, k: int) -> Tensor:
    """As the router in training mode finds them: from the statistics of this batch."""
    count = z.shape[0] * z.shape[2]
    mean, square = (AUTO.head_moments(z) / count).unbind()
    return plain.activation_threshold(mean, square - mean.square(), k, z.shape[2], EPS).to(z.dtype)


def route(x: Tensor, weight: Tensor, sizes: Sizes, implementation: str) -> Gates:
    logits = plain.router_logits if implementation == "plain" else AUTO.router_logits
    z = logits(x, weight, sizes.heads)
    return Kernels(implementation).route(z, thresholds(z, sizes.k))


def training_step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Work:
    """Forward and backward with a fixed gradient of the output."""
    gradient = torch.randn_like(forward())

    def step() -> None:
        clear_gradients(leaves)
        forward().backward(gradient)

    return step


def clear_gradients(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def inference(forward: Callable[[], Tensor]) -> Work:
    def step() -> None:
        with torch.no_grad():
            forward()

    return step


def measure_layer(decomposition: str, sizes: Sizes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward, forward + backward, and memory, of one layer given its gates."""
    dtype = DTYPES[options.dtype]
    x = torch.randn(options.tokens, sizes.d, dtype=dtype, requires_grad=True)
    layer = Layer(decomposition, sizes, dtype)
    routed1, routed2 = (route(x.detach(), router_weight(sizes, dtype), sizes, "native") for _ in range(2))
    gate_leaves: list[Tensor] = []

    def leaf(values: Tensor) -> Tensor:
        gate_leaves.append(values.detach().requires_grad_())
        return gate_leaves[-1]

    gates: dict[str, tuple[Gates, Gates]] = {
        "native": (routed1.map(leaf), routed2.map(leaf)),
        "plain": (DenseGates(leaf(routed1.dense())), DenseGates(leaf(routed2.dense()))),
    }
    mask = random_mask(sizes)
    inner = layer.outputs[0].shape[1]
    hidden = torch.randn(options.tokens, inner, dtype=dtype, requires_grad=True)
    mlp = DenseMLP(sizes, dtype)
    forwards: dict[str, Callable[[], Tensor]] = {
        "native": lambda: layer.experts(x, *gates["native"]),
        "masked": lambda: layer.experts(x, *gates["native"], mask),
        "plain": lambda: layer.experts(x, *gates["plain"]),
        "products": lambda: layer.products(x, hidden),
        "mlp": lambda: mlp(x),
    }
    if options.compile:
        forwards["compiled"] = torch.compile(forwards["plain"])
    leaves = [x, hidden, mlp.up, mlp.down, *gate_leaves, *layer.parameters]
    found = []
    for mode, wrap in (("forward", inference), ("forward+backward", lambda f: training_step(f, leaves))):
        works = {name: wrap(f) for name, f in forwards.items()}
        found.append(row(f"{decomposition} layer", mode, options.tokens, medians_in_turn(works, options.rounds)))
        found[-1]["peak_bytes"] = {}
        for name, work in works.items():
            clear_gradients(leaves)  # those of another subject would be freed during the work, and lower its peak
            found[-1]["peak_bytes"][name] = peak_bytes(work)
    found[-1]["kept_bytes"] = {
        name: bytes_kept_for_backward(forwards[name], [x, *layer.parameters]) for name in ("native", "plain")
    }
    return found


def measure_group(decomposition: str, sizes: Sizes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward + backward of a routing group: the router and the layers that share it."""
    dtype = DTYPES[options.dtype]
    x = torch.randn(options.tokens, sizes.d, dtype=dtype, requires_grad=True)
    routers = [router_weight(sizes, dtype).requires_grad_() for _ in range(2)]
    layers = [Layer(decomposition, sizes, dtype) for _ in range(sizes.group)]

    def forward(implementation: str, mask: Tensor | None = None) -> Tensor:
        g1, g2 = (route(x, weight, sizes, implementation) for weight in routers)
        r1, r2 = kernels.expert_weights(g1, g2, mask)
        return sum((layer.with_bias(x, g1, g2, r1, r2, mask) for layer in layers), start=x)

    leaves = [x, *routers, *(weight for layer in layers for weight in layer.parameters)]
    mask = random_mask(sizes)
    forwards: dict[str, Callable[[], Tensor]] = {
        "native": lambda: forward("native"),
        "masked": lambda: forward("native", mask),
        "plain": lambda: forward("plain"),
    }
    if options.compile:
        forwards["compiled"] = torch.compile(forwards["plain"])
    subjects = {name: training_step(of, leaves) for name, of in forwards.items()}
    seconds = medians_in_turn(subjects, options.rounds)
    return [row(f"{decomposition} group", "forward+backward", options.tokens, seconds)]


def measure_decode(decomposition: str, sizes: Sizes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One token through layers and groups. Weights by columns for the kernels, as published for the definition."""
    dtype = DTYPES[options.dtype]
    x = torch.randn(1, sizes.d, dtype=dtype)
    routers = [router_weight(sizes, dtype) for _ in range(2)]
    layers = {
        "native": [Layer(decomposition, sizes, dtype, by_columns=True) for _ in range(DECODE_LAYERS)],
        "plain": [Layer(decomposition, sizes, dtype) for _ in range(DECODE_LAYERS)],
    }
    mlps = [DenseMLP(sizes, dtype) for _ in range(DECODE_LAYERS)]
    gates = {name: tuple(route(x, weight, sizes, name) for weight in routers) for name in layers}
    hidden = torch.randn(1, layers["plain"][0].outputs[0].shape[1], dtype=dtype)

    def through_layers(name: str) -> Tensor:
        g1, g2 = gates[name]
        return sum((layer.experts(x, g1, g2) for layer in layers[name]), start=x)

    def through_products() -> Tensor:
        return torch.stack([layer.products(x, hidden).sum() for layer in layers["plain"]])

    def through_group(name: str) -> Tensor:
        g1, g2 = (route(x, weight, sizes, name) for weight in routers)
        return sum((layer.with_bias(x, g1, g2, g1, g2) for layer in layers[name][: sizes.group]), start=x)

    workloads: dict[str, dict[str, Callable[[], Tensor]]] = {
        f"{decomposition} layer": {
            "native": lambda: through_layers("native"),
            "plain": lambda: through_layers("plain"),
            "products": through_products,
            "mlp": lambda: sum((mlp(x) for mlp in mlps), start=x),
        },
        f"{decomposition} group": {"native": lambda: through_group("native"), "plain": lambda: through_group("plain")},
    }
    found = []
    for workload, subjects in workloads.items():
        if options.compile:
            subjects["compiled"] = torch.compile(subjects["plain"])
        seconds = medians_in_turn({name: inference(f) for name, f in subjects.items()}, options.decode_rounds)
        per = DECODE_LAYERS if workload.endswith("layer") else 1
        found.append(row(workload, "decode", 1, {name: value / per for name, value in seconds.items()}))
    return found


def router_weight(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    return (torch.randn(sizes.heads * sizes.experts, sizes.d) * sizes.d**-0.5).to(dtype)


def random_mask(sizes: Sizes) -> Tensor:
    return (torch.rand(1, sizes.experts, sizes.experts) >= MASKED).float()


def row(workload: str, mode: str, tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "workload": workload,
        "mode": mode,
        "tokens": tokens,
        "milliseconds": {name: round(1e3 * value, 3) for name, value in seconds.items()},
        "times_native": {name: round(value / seconds["native"], 2) for name, value in seconds.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line per row: milliseconds of ours, and how many times as long the others took."""
    names = sorted({name for found in rows for name in found["milliseconds"]} - {"native"})
    lines = [["workload", "mode", "tokens", "native ms", *names, "peak MB", "plain", "kept MB", "plain"]]
    for found in rows:
        times = found["times_native"]
        memory = [found.get(kind, {}) for kind in ("peak_bytes", "kept_bytes")]
        lines.append([
            found["workload"], found["mode"], str(found["tokens"]),
            f"{found['milliseconds']['native']:.2f}",
            *(f"{times[name]:.2f}x" if name in times else "" for name in names),
            *(f"{of[name] / 1e6:.1f}" if name in of else "" for of in memory for name in ("native", "plain")),
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--decompositions", nargs="+", choices=("vertical", "horizontal"), default=["vertical", "horizontal"]
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode-rounds", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the definition")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON files")
    return parser.parse_args(arguments)


@one_line_errors
def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    said = Kernels("native").describe(options.device)
    print(said)
    measures = (measure_layer, measure_group, measure_decode)
    for name in options.sizes:
        torch.manual_seed(0)
        conditions = environment(options.device)
        work = [(decomposition, measure) for decomposition in options.decompositions for measure in measures]
        rows: list[dict[str, Any]] = []
        for decomposition, measure in tqdm(work, desc=name, unit="workload", leave=False):
            rows += measure(decomposition, sizes_of(name), options)
        print(f"{name}\n{table(rows)}")
        report = {
            "size": name,
            "dtype": options.dtype,
            "rounds": options.rounds,
            "kernels": said,
            "environment": conditions,
            "rows": rows,
        }
        out = options.out / f"experts-{name}-{options.dtype}-{slug(conditions)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {out}")


def slug(conditions: dict[str, Any]) -> str:
    """The machine, for a file name."""
    words = f"{conditions['processor']} {conditions['threads']} threads".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


if __name__ == "__main__":
    main()
