"""The model against what the published reference answers (tests/golden), to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from monet_train.checkpoints.load import load_pretrained
from monet_train.kernels import extension
from tests.support import GOLDEN

TOLERANCE = 1e-5


@pytest.fixture
def folder(moe_decompose: str) -> Path:
    return GOLDEN / f"tiny_{moe_decompose}"


@pytest.fixture
def answers(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "golden.safetensors")


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each implementation of the expert operations."""
    if request.param == "native" and (reason := extension.missing()):
        pytest.skip(f"native kernels: {reason}")
    return request.param


def test_evaluation(kernels: str, folder: Path, answers: dict[str, Tensor]) -> None:
    ids, model = answers["input_ids"], load_pretrained(folder, kernels=kernels)
    with torch.no_grad():
        out = model(ids, labels=ids, output_router_probs=True, output_hidden_states=True)
    close("eval.logits", out.logits, answers)
    close("eval.loss", out.loss, answers)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for number, state in enumerate(out.hidden_states):
        close(f"eval.hidden.{number}", state, answers)
    assert len(out.router_probs) == model.config.num_hidden_layers
    for layer, gates in enumerate(out.router_probs):
        assert (gates is None) == (not model.config.has_router(layer))
        for side, gate in enumerate(gates or (), start=1):
            expected = answers[f"eval.router.{layer}.g{side}"]
            close(f"eval.router.{layer}.g{side}", gate, answers)
            assert torch.equal(gate == 0, expected == 0)  # the same half-experts, not only nearly the same gates


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_training(recompute: bool, kernels: str, folder: Path, answers: dict[str, Tensor]) -> None:
    ids = answers["input_ids"]
    model = load_pretrained(folder, kernels=kernels, recompute=recompute).train()
    out = model(ids, labels=ids)
    out.loss.backward()
    close("train.logits", out.logits, answers)
    close("train.loss", out.loss, answers)
    gradients = {f"train.grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    buffers = {f"train.buffer.{name}": buffer for name, buffer in model.named_buffers()}
    expected = {name for name in answers if name.startswith(("train.grad.", "train.buffer."))}
    assert gradients.keys() | buffers.keys() == expected
    for name, value in (gradients | buffers).items():
        close(name, value, answers)


def close(name: str, value: Tensor | None, answers: dict[str, Tensor]) -> None:
    assert value is not None, name
    torch.testing.assert_close(value.detach(), answers[name], rtol=0, atol=TOLERANCE, msg=lambda m: f"{name}: {m}")
