"""The overrides of the command line, compared with the schema before Hydra composes anything.

Hydra would accept some of it (a deleted key, a key that nothing reads) and explain the rest in paragraphs of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import is_dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from monet_train.config.schema import MISSING, TrainConfig
from monet_train.errors import UserError
from monet_train.typed import describe, field_types, leaves, show

Groups = Mapping[str, list[str]]  # the options of each configuration group


def parse_overrides(overrides: Iterable[str], groups: Groups, sweeper: ConfigLoader | None = None) -> list[Override]:
    """The overrides of a command line, each checked against the schema and the groups of ``conf/``.

    Args:
        sweeper: given if a key may have several values, as in ``optimizer.lr=1e-3,2e-3``; it resolves the ``glob(*)``
            of a group.

    Raises:
        UserError: one line that names the first invalid override, and the remedy.
    """
    parser = OverridesParser.create(config_loader=sweeper)
    parsed = []
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:
            raise UserError(_unreadable(text)) from None
        _check_name(override, groups)
        if not override.is_sweep_override():
            _check_value(override, groups)
        elif sweeper is not None:
            if not override.is_discrete_sweep():
                raise UserError(f"{text} gives no list of values: write them out, as {override.key_or_group}=A,B")
        else:
            raise UserError(
                f"{text} gives several values: add -m to train one run for each, write [A,B] for a list, or put quotes "
                "inside the shell's for a text with a comma"
            )
        parsed.append(override)
    return parsed


def unknown_key(key: str) -> str:
    """The line for a key that the schema does not have, with the nearest that it has."""
    names = [name for name in keys() if "." not in key or not is_dataclass(key_type(name))]
    last = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    near = near or [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1)]
    return f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else "see monet-train --help for all keys")


def keys(kind: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration dataclass, sections included."""
    for name, type_ in field_types(kind).items():
        yield prefix + name
        if isinstance(type_, type) and is_dataclass(type_):
            yield from keys(type_, f"{prefix}{name}.")


def key_type(key: str) -> Any:
    """The type of a key's value; a section's is a dataclass. None where the schema has no such key."""
    kind: Any = TrainConfig
    for part in key.split("."):
        kind = field_types(kind).get(part) if isinstance(kind, type) and is_dataclass(kind) else None
    return kind


def wrong_type(key: str, value: Any) -> str:
    """The line for a value that is not of the key's type."""
    kind = key_type(key)
    if is_dataclass(kind):
        return f"{key}={show(value)}: {key} is a section; set one of its keys, as {next(_leaf_keys(key))}=VALUE"
    return f"{key}={show(value)} is not {describe(kind)}"


def _unreadable(text: str) -> str:
    if text.startswith("-"):
        return f"{text} is not an option of monet-train: see monet-train --help; a key is set by key=value"
    key, _, value = text.partition("=")
    quoted = f""": '{key}="{value}"'""" if key and value and not set(value) & set("[]{}()'\"") else ""
    return f"{text} cannot be read: write key=value, with quotes around special characters in the value{quoted}"


def _check_name(override: Override, groups: Groups) -> None:
    """Refuse a key or group that is not there, and the ways of Hydra that would add or delete one."""
    text, name = str(override.input_line), override.key_or_group
    if name == "hydra" or name.startswith(("hydra.", "hydra/")):
        raise UserError(
            f"{text}: monet-train reads no settings of Hydra; leave it out (run.dir says where a run lives)"
        )
    if override.package is not None:
        raise UserError(f"{text}: a group has one place; write {name}=OPTION")
    if not name:
        raise UserError(_unreadable(text))
    is_key = key_type(name) is not None
    if not is_key and name not in groups:
        raise UserError(unknown_key(name))
    if override.is_delete():
        raise UserError(f"{text}: {_instead_of_deleting(name, groups)}")
    is_choice = name in groups and not (is_key and isinstance(override.value(), dict))
    if override.is_add() or (override.is_force_add() and is_choice):
        raise UserError(f"{text}: {name} is there already; write {text.lstrip('+')}")


def _instead_of_deleting(name: str, groups: Groups) -> str:
    if name in groups:
        return f"a group cannot be deleted; leave it out, or choose one with {name}={'|'.join(groups[name])}"
    if is_dataclass(key_type(name)):
        return f"a section cannot be deleted; set its keys instead, as {next(_leaf_keys(name))}=VALUE"
    return f"a key cannot be deleted; give it another value, as {name}={_off(name)}"


def _off(key: str) -> str:
    """The value that comes closest to deleting a key: null if it may have that, else its default."""
    if type(None) in getattr(key_type(key), "__args__", ()):
        return "null"
    default = dict(leaves(TrainConfig))[key].default
    return "VALUE" if default in (NO_DEFAULT, MISSING) else show(default)


def _leaf_keys(section: str) -> Iterator[str]:
    return (key for key, _ in leaves(key_type(section), f"{section}."))


def _check_value(override: Override, groups: Groups) -> None:
    name, value = override.key_or_group, override.value()
    if name in groups and not (key_type(name) and isinstance(value, dict)):
        for option in value if isinstance(value, list) else [value]:
            if str(option) not in groups[name]:
                raise UserError(f"{name}/{show(option)} does not exist; {name} can be {', '.join(groups[name])}")
        return
    check_values(name, value)


def check_values(key: str, value: Any) -> None:
    """Refuse a value, or values below a section, that the schema cannot hold.

    Raises:
        UserError: one line that names the key, and what is wrong.
    """
    if isinstance(value, Mapping) and is_dataclass(key_type(key)):
        for name, inner in value.items():
            if key_type(f"{key}.{name}") is None:
                raise UserError(unknown_key(f"{key}.{name}"))
            check_values(f"{key}.{name}", inner)
        return
    scratch = OmegaConf.structured(TrainConfig)
    try:
        OmegaConf.update(scratch, key, value)
    except OmegaConfBaseException:
        raise UserError(wrong_type(key, value)) from None
