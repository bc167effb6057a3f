"""Composing the configuration with Hydra, and turning its errors into one line each."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from monet_train.config.schema import TrainConfig
from monet_train.errors import UserError, one_line_errors

ConfigStore.instance().store(name="schema", node=TrainConfig)


def config_folder() -> Path:
    """The folder of the YAML groups: ``conf/`` of a checkout, or the same installed as a package."""
    spec = importlib.util.find_spec("monet_train.conf")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[2] / "conf"


def compose(overrides: list[str]) -> TrainConfig:
    """The typed configuration for command-line overrides. Raises :class:`UserError` naming the key."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            return to_typed(hydra.compose("train", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None


def to_typed(composed: DictConfig) -> TrainConfig:
    """The dataclasses behind a composed configuration; keys that must be given are."""
    unknown = sorted(set(_dotted(composed)) - set(valid_keys()))  # Hydra's +key=value passes by the schema
    if unknown:
        raise UserError(f"unknown key {unknown[0]}: {_suggestion(unknown[0])}")
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        hint = "; give the folder that monet-data shards wrote" if missing == ["data.path"] else ""
        raise UserError(f"{', '.join(missing)} must be given as {missing[0]}=VALUE{hint}")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    return config


def hydra_main(run: Callable[[TrainConfig], None], rank: int) -> None:
    """Parse the command line with Hydra and call ``run`` with the typed configuration.

    Bad input ends every process with exit status 2 and one line of one of them; see :func:`one_line_errors`.
    """
    from hydra._internal.utils import get_args_parser

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug shows its whole traceback; bad input never gets there

    def checked() -> None:
        arguments = get_args_parser().parse_args()
        shows_only = arguments.cfg or arguments.help or arguments.hydra_help or arguments.info or arguments.multirun
        if shows_only:
            # Hydra also prints by logging, which meets a closed output itself; here is no socket to lose
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        else:
            compose(arguments.overrides)

        refused: list[UserError] = []  # carried past Hydra, which prints a report of its own on any exception

        @hydra.main(config_path=str(config_folder()), config_name="train", version_base="1.3")
        def job(composed: DictConfig) -> None:
            try:
                run(to_typed(composed))
            except UserError as error:
                refused.append(error)

        try:
            job()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from None
        if refused:
            raise refused[0]

    one_line_errors(checked, rank)()


def valid_keys(schema: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration dataclass, sections included."""
    for field in dataclasses.fields(schema):
        name = prefix + field.name
        yield name
        default = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            yield from valid_keys(default, name + ".")


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: the key, what is wrong, the nearest valid one."""
    links: list[BaseException] = [error]
    while (below := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(below)
    text = "\n".join(map(str, links))
    unreadable = next((link.override for link in links if isinstance(link, OverrideParseException)), None)
    if unreadable:
        return f"{unreadable} cannot be read: write key=value, with quotes around special characters in the value"
    overridden = re.search(r"Could not (?:override|append) '([^']+)'|append to config.*?'([^']+)'", text)
    full_key = re.search(r"full_key: (\S+)", text)
    key = (overridden and (overridden[1] or overridden[2])) or (full_key and full_key[1])
    key = key.lstrip("+~") if key else None
    if key and key not in valid_keys():
        return f"unknown key {key}: {_suggestion(key)}"
    group = re.search(r"Could not find '([^']+)'\n+Available options in '([^']+)':\n((?:\s+.*\n?)+)", text)
    if group:
        return f"{group[1]} does not exist; {group[2]} can be {', '.join(group[3].split())}"
    specific = [str(link) for link in links if isinstance(link, ValidationError)] or [str(error)]
    specific = [text for text in specific if "$VALUE" not in text] or specific  # OmegaConf's template of the message
    message = re.sub(r" of type '\w+'| \(type.*$|'?\$VALUE(_TYPE)?'?( of type)?", "", specific[-1].splitlines()[0])
    message = re.sub(r"\s+", " ", message).strip()
    return f"{key}: {message}" if key else message


def _dotted(section: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, section):
        yield f"{prefix}{name}"
        child = section._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _dotted(child, f"{prefix}{name}.")


def _suggestion(key: str) -> str:
    keys = list(valid_keys())
    leaves = {name.rpartition(".")[2]: name for name in keys}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], list(leaves), n=1)]
    return f"did you mean {near[0]}?" if near else "see monet-train --help for all keys"
