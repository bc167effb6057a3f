"""Model files of a checkpoint: ``config.json`` and the weights under their published names.

A Hugging Face folder, published or exported, and a step folder of a run have the same ones.
"""

from __future__ import annotations

import json
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from monet_train.checkpoints.layout import CONFIG, SHARDED_WEIGHTS, SINGLE_WEIGHTS
from monet_train.errors import UserError
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from monet_train.tokenizers import StoredTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # as the commands name them
WHOLE = "copy the whole checkpoint again, or give another"

# Fields of a published config.json that are the same for every Monet.
COMMON_FIELDS: dict[str, Any] = {
    "architectures": ["MonetForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "relu2",
    "intermediate_size": None,
    "mlp_bias": None,
    "model_type": "monet",
    "output_router_probs": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
# Fields that have to have these values: with others the weights would load, and compute something else.
ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("relu2", None),
    "attention_bias": (False, None),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises :class:`UserError` naming the file when it is missing or broken."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {WHOLE}") from None
    except ValueError as error:  # broken JSON, or not even text
        raise UserError(f"{file} is not valid JSON ({error}): {WHOLE}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} does not hold a JSON object: {WHOLE}")
    return values


def read_config(folder: Path) -> MonetConfig:
    """The architecture in ``folder/config.json``.

    Raises:
        UserError: the file is missing or broken, is of another architecture, or asks for a variant of Monet that is
            not supported.
    """
    file = folder / CONFIG
    values = read_json(file)
    if values.get("model_type", "monet") != "monet":
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}, not 'monet'")
    for key, supported in ONLY_VALUES.items():
        if values.get(key) not in supported:
            raise UserError(f"{file}: {key}={values[key]!r} is not supported; only {supported[0]!r} is")
    try:
        return MonetConfig.from_dict(values)
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None


def published_config(config: MonetConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of ``config.json`` in the field names of the published checkpoints."""
    values = COMMON_FIELDS | config.to_dict()
    values["num_key_value_heads"] = config.kv_heads
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    values["transformers_version"] = version("transformers")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU: ``model.safetensors`` or its shards (or torch ``.bin``).

    Raises:
        UserError: no weights, a shard is missing, or a file is truncated.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        weights.update(_read_tensors(file))
    return weights


def check_weights(weights: dict[str, Tensor], config: MonetConfig, folder: Path) -> None:
    """Refuse weights that are not exactly those of the architecture.

    Raises:
        UserError: names the file and the first missing, unexpected or mis-shaped key.
    """
    with torch.device("meta"):
        expected = MonetForCausalLM(config).state_dict()
    where = _weights_entry(folder)
    for complaint, names in (
        ("lacks {name}", expected.keys() - weights.keys()),
        ("has {name}, which the architecture of config.json does not have", weights.keys() - expected.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where} {complaint.format(name=min(names))}{more}; is config.json of this checkpoint?")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{where}: {name} has shape {list(weights[name].shape)}, config.json makes {list(tensor.shape)}"
            )


def write_model(folder: Path, state: dict[str, Tensor], config: MonetConfig, tokenizer: StoredTokenizer | None) -> None:
    """Write the whole model into a step folder, so that export and inspection can read it without the run's files.

    Args:
        state: parameters and buffers under their published names, on the CPU.
        tokenizer: copied beside the weights; its special ids go into ``config.json``. None: not known.
    """
    weights = folder / SINGLE_WEIGHTS[0]
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable by its owner alone
    dtype = state["lm_head.weight"].dtype
    token_ids = tokenizer.record.config_ids if tokenizer else {}
    (folder / CONFIG).write_text(json.dumps(published_config(config, dtype) | token_ids, indent=2))
    if tokenizer is not None:
        tokenizer.copy_to(folder)


def _weights_entry(folder: Path) -> Path:
    """The file that the weights are read from, or the index that lists their shards."""
    for name in (SINGLE_WEIGHTS[0], SHARDED_WEIGHTS[0], SINGLE_WEIGHTS[1], SHARDED_WEIGHTS[1]):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights ({SINGLE_WEIGHTS[0]} or {SHARDED_WEIGHTS[0]}): {WHOLE}")


def _weight_files(folder: Path) -> list[Path]:
    entry = _weights_entry(folder)
    if entry.name in SINGLE_WEIGHTS:
        return [entry]
    weight_map = read_json(entry).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{entry} has no weight_map: {WHOLE}")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but {entry.name} lists it: {WHOLE}")
    return files


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be read (truncated?): {first_line}: {WHOLE}") from None
