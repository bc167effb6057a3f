"""The table of callbacks: those of every run, and those that other packages offer by name.

A package offers a callback as an entry point, so that training does not have to know it::

    [project.entry-points."monet_train.callbacks"]
    monosemanticity = "monet_train.analysis.callback:Monosemanticity"

and a run takes it with ``callbacks=[monosemanticity]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points

from monet_train.errors import UserError
from monet_train.training.callbacks.checkpointing import Checkpointing
from monet_train.training.callbacks.evaluation import Evaluation
from monet_train.training.callbacks.events_file import EventsFile
from monet_train.training.callbacks.metrics_file import MetricsFile
from monet_train.training.callbacks.progress import Progress
from monet_train.training.callbacks.routers import RouterMonitor
from monet_train.training.callbacks.stop_signal import StopSignal
from monet_train.training.callbacks.utilisation import Utilisation
from monet_train.training.callbacks.wandb import Wandb
from monet_train.training.loop import Callback
from monet_train.training.prepared import Prepared

ENTRY_POINTS = "monet_train.callbacks"

# The callbacks of every run. They are called phase by phase (see Phase), and within a phase in this order.
BUILT_IN: tuple[type[Callback], ...] = (
    StopSignal,
    RouterMonitor,
    Utilisation,
    MetricsFile,
    EventsFile,
    Wandb,
    Progress,
    Evaluation,
    Checkpointing,
)


def find_callbacks(names: Sequence[str]) -> list[type[Callback]]:
    """The built-in callbacks, then those of ``names`` (the key ``callbacks``), in that order.

    Raises:
        UserError: no installed package offers a name, or several do; the offer is not a callback of that name;
            two callbacks would have the same name.
    """
    found = list(BUILT_IN)
    for name in names:
        if name in {callback.name for callback in found}:
            raise UserError(f"callbacks={list(names)}: there is a callback called {name} already; leave it out")
        try:
            found.append(_load(name))
        except UserError as error:
            raise UserError(f"callbacks={list(names)}: {error}") from None
    return found


def _load(name: str) -> type[Callback]:
    offers = entry_points(group=ENTRY_POINTS)
    targets = sorted({offer.value for offer in offers if offer.name == name})
    if not targets:
        known = f"use {', '.join(sorted(offers.names))}, or " if offers else ""
        raise UserError(f"{name} is unknown; {known}install the package that offers it")
    if len(targets) > 1:
        raise UserError(f"{' and '.join(targets)} are both called {name}; uninstall one of their packages")
    remedy = "repair that package, or leave the callback out"
    (offer,) = {offer.value: offer for offer in offers if offer.name == name}.values()
    try:
        callback = offer.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"{offer.value} cannot be imported ({error}); {remedy}") from None
    if not (isinstance(callback, type) and issubclass(callback, Callback) and callback.name == name):
        raise UserError(f"{offer.value} is not a Callback with the name {name}; {remedy}")
    return callback


def build_callbacks(prepared: Prepared) -> list[Callback]:
    """The callbacks of a run on this rank."""
    built = [callback.build(prepared) for callback in find_callbacks(prepared.config.callbacks)]
    return [callback for callback in built if callback is not None]
