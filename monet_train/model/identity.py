"""Which model something was found in: distinguishes the same model, a relative and a stranger."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monet_train.errors import UserError
from monet_train.model.wrapped import unwrap

LINEAGE_SIGNS = 1024
RELATED = 0.6  # of the signs agree; those of unrelated models: 0.5, with a standard deviation of 0.016


@dataclass(frozen=True)
class ModelIdentity:
    """The sizes that number and shape the experts, and the lineage of the routers that choose among them.

    ``lineage`` holds the signs of some 1,024 weights of the routers' projections w1 and w2, evenly spaced over all of
    them, as hexadecimal digits; it is empty where a process does not hold these weights whole. A cast to another dtype
    and an export keep every sign. Fine-tuning turns few of them, so a descendant agrees in most; models that were
    trained from other initial weights agree in half. It keeps users from mistakes and proves nothing about origin: two
    runs from the same seed look related, and a model that has changed beyond recognition looks like a stranger.
    """

    num_hidden_layers: int
    hidden_size: int
    moe_dim: int
    moe_heads: int
    moe_experts: int
    moe_groups: int
    moe_decompose: str
    lineage: str

    def layers(self, group: int) -> range:
        """The layers of a routing group."""
        first = group * self.moe_groups
        return range(first, min(first + self.moe_groups, self.num_hidden_layers))

    @property
    def groups(self) -> range:
        """The routing groups."""
        return range(math.ceil(self.num_hidden_layers / self.moe_groups))

    def check(self, other: ModelIdentity, name: str) -> None:
        """Whether what was found in this model holds for ``other``: a relative gets a warning.

        Args:
            name: of what was found, for the message.

        Raises:
            UserError: the other one has other sizes, or is not related.
        """
        sizes = asdict(self)
        sizes.pop("lineage")
        for key, value in sizes.items():
            if value != getattr(other, key):
                raise UserError(
                    f"{name} is for a model with {key}={value}, this one has {key}={getattr(other, key)}; "
                    "use it with the model that it was made for"
                )
        agreement = _agreement(self.lineage, other.lineage)
        if agreement < RELATED:
            raise UserError(
                f"{name} is for another model of the same sizes ({agreement:.0%} of the routers' signs agree, 50% do "
                "by chance); use it with the model that it was made for"
            )
        if agreement < 1:
            warnings.warn(
                f"{name} was made for a relative of this model ({agreement:.1%} of the routers' signs agree): "
                "its experts may have changed since",
                stacklevel=3,
            )


def identify(model: nn.Module) -> ModelIdentity:
    """The identity of a model, which may be wrapped.

    Raises:
        UserError: it is not a Monet.
    """
    monet: Any = unwrap(model)
    c = monet.config
    # by attribute: adapters, pruning and parametrizations move a parameter and leave one of its old name
    decoder = getattr(monet, "model", monet)
    routers = [decoder.layers[layer].router for layer in range(0, c.num_hidden_layers, c.moe_groups)]
    weights = [projection.weight for router in routers for projection in (router.w1, router.w2)]
    size = c.moe_heads * c.moe_experts * c.hidden_size
    whole = all(w.numel() == size and w.device.type != "meta" and not hasattr(w, "full_tensor") for w in weights)
    return ModelIdentity(
        num_hidden_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        moe_dim=c.moe_dim,
        moe_heads=c.moe_heads,
        moe_experts=c.moe_experts,
        moe_groups=c.moe_groups,
        moe_decompose=c.moe_decompose,
        lineage=_signs(weights) if whole else "",
    )


def _signs(weights: list[Tensor]) -> str:
    """The signs of weights that are evenly spaced in each tensor."""
    signs = []
    for weight in weights:
        number = min(math.ceil(LINEAGE_SIGNS / len(weights)), weight.numel())
        places = torch.arange(number, device=weight.device) * weight.numel() // number
        signs.append(torch.signbit(weight.detach().flatten()[places]).cpu().numpy())
    return np.packbits(np.concatenate(signs)).tobytes().hex()


def _agreement(one: str, other: str) -> float:
    """Share of the signs that are the same; 1 where either is not known."""
    if not one or not other:
        return 1.0
    first, second = (np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)) for digits in (one, other))
    return float((first == second).mean()) if len(first) == len(second) else 0.0
