"""Composing the configuration with Hydra, and turning its errors into one line each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from monet_train.config.overrides import Groups, key_type, parse_overrides, unknown_key
from monet_train.config.schema import TrainConfig
from monet_train.errors import UserError

PRIMARY = "train"  # conf/train.yaml
VERSION_BASE = "1.3"  # the version of Hydra whose defaults are meant

ConfigStore.instance().store(name="schema", node=TrainConfig)


def config_folder() -> Path:
    """The folder of the YAML groups: ``conf/`` of a checkout, or the same installed as a package."""
    spec = importlib.util.find_spec("monet_train.conf")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[2] / "conf"


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> TrainConfig:
    """The typed configuration for command-line overrides.

    Args:
        config_dir: a folder with further options for the groups, as ``experiment/mine.yaml``.

    Raises:
        UserError: one line that names the key or file, and the remedy.
    """
    with composition(config_dir) as loader:
        parse_overrides(overrides, groups(loader))
        return to_typed(hydra.compose(PRIMARY, list(overrides)))


@contextmanager
def composition(config_dir: Path | None = None) -> Iterator[ConfigLoader]:
    """Hydra, ready to compose within the ``with`` block, where its errors become one line each."""
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir} is not a folder; give one that holds, say, experiment/NAME.yaml")
    version.setbase(VERSION_BASE)
    search_path = create_config_search_path(str(config_folder()))
    if config_dir is not None:
        search_path.prepend(provider="command-line", path=f"file://{config_dir.resolve()}")
    GlobalHydra.instance().clear()
    with explained():
        Hydra.create_main_hydra2(task_name=PRIMARY, config_search_path=search_path)
        try:
            yield GlobalHydra.instance().config_loader()
        finally:
            GlobalHydra.instance().clear()


@contextmanager
def explained() -> Iterator[None]:
    """Hydra's and OmegaConf's errors in the ``with`` block become one line each."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None
    except YAMLError as error:
        raise UserError(f"a configuration file is not valid YAML: {error}") from None


def groups(loader: ConfigLoader) -> Groups:
    """The configuration groups and their options."""
    defaults = OmegaConf.load(config_folder() / f"{PRIMARY}.yaml").defaults
    names = [name for entry in defaults if isinstance(entry, DictConfig) for name in map(str, entry)]
    return {name: loader.get_group_options(name, ObjectType.CONFIG) for name in names if "override " not in name}


def to_typed(composed: DictConfig) -> TrainConfig:
    """The dataclasses behind a composed configuration, with all keys that must be given."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        hint = "; give the folder that monet-data shards wrote" if missing == ["data.path"] else ""
        raise UserError(f"{', '.join(missing)} must be given as {missing[0]}=VALUE{hint}")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    return config


def explain(error: Exception) -> str:
    """One line for an error that a YAML file or an interpolation caused: overrides were checked before."""
    links: list[BaseException] = [error]
    while (below := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(below)
    for link in reversed(links):
        if isinstance(link, MissingConfigException) and link.missing_cfg_file is not None:
            options = f"; there are {', '.join(link.options)}" if link.options else ""
            return f"{link.missing_cfg_file} does not exist{options}"
    for link in reversed(links):
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            if isinstance(link, ConfigKeyError | ConfigAttributeError) and key_type(link.full_key) is None:
                return unknown_key(link.full_key)
            return f"{link.full_key}: {str(link).splitlines()[0]}"
    return " ".join(str(error).split())
