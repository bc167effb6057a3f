"""The Monet in a model that a library has wrapped."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn

from monet_train.errors import UserError


class Monet(Protocol):
    """A model of this project, or one that transformers has loaded."""

    config: Any  # with the field names of the published configurations

    def set_expert_mask(self, group: int, mask: Tensor, layer: int | None = None) -> None: ...

    def clear_expert_mask(self, group: int | None = None) -> None: ...


def unwrap(model: nn.Module) -> Monet:
    """A Monet, or the one in it that peft, torch.compile, DeepSpeed, DistributedDataParallel or the like has wrapped.

    A wrapper holds the model as one of its modules, under a name of its own; what it passes on is up to it.

    Raises:
        UserError: there is none.
    """
    for module in model.modules():  # from the outside in: before a base model that could do the same
        if hasattr(type(module), "set_expert_mask"):
            return cast(Monet, module)
    raise UserError(
        f"{type(model).__name__} holds no Monet: give a model of load_pretrained, or one that transformers has loaded "
        "from an export"
    )
