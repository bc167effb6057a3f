"""Export to a Hugging Face folder that loads in today's transformers, in the published code, and here again.

``monet-export CHECKPOINT OUT`` or :func:`save_pretrained`. The folder carries its own modelling files
(``trust_remote_code=True``), so a user of it needs torch and transformers only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from monet_train.checkpoints.layout import CONFIG, resolve_checkpoint
from monet_train.checkpoints.weights import (
    DTYPES,
    check_weights,
    published_config,
    read_config,
    read_json,
    read_weights,
)
from monet_train.errors import UserError, one_line_errors
from monet_train.interop import hf
from monet_train.interop.card import model_card
from monet_train.interop.export_tokenizer import has_chat_template, write_tokenizer
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from monet_train.model.wrapped import unwrap
from monet_train.tokenizers import Tokenizer, find_tokenizer, load_tokenizer

MAX_SHARD_SIZE = "5GB"
RECORD = "monet_export.json"  # lists the files of an export: what --force may replace
AUTO_MAP = {
    "AutoConfig": "configuration_monet.MonetConfig",
    "AutoModel": "modeling_monet.MonetModel",
    "AutoModelForCausalLM": "modeling_monet.MonetForCausalLM",
}


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    tokenizer_file: str | Path | None = None,
    *,
    force: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """Export a model (whole, in one process) to a Hugging Face folder.

    Args:
        model: a :class:`MonetForCausalLM` of this project; torch.compile and the like may have wrapped it.
        folder: new or empty; with ``force`` an earlier export there is replaced.
        tokenizer_file: a ``tokenizer.json``, a SentencePiece model or a folder with one, to be exported with it.
        max_shard_size: of a file of weights, as transformers writes it (``5GB``).

    Returns:
        the folder.

    Raises:
        UserError: the model is transformers' own, the folder is in use, or the tokenizer does not fit. Nothing is
            changed then.
    """
    own = unwrap(model)
    if not isinstance(own, MonetForCausalLM):
        raise UserError(
            "save_pretrained exports a model of load_pretrained; one that transformers has loaded saves itself: merge "
            "its adapters (model.merge_and_unload()) and call model.save_pretrained(folder)"
        )
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    return write_export(own.config, own.state_dict(), Path(folder), tokenizer, force, max_shard_size)


def write_export(
    config: MonetConfig,
    weights: dict[str, Tensor],
    folder: Path,
    tokenizer: Tokenizer | None,
    force: bool,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """Write a Hugging Face folder, whole or not at all. See :func:`save_pretrained`."""
    _refuse_occupied(folder, force)
    place = folder.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            _write_files(config, weights, new, place.name, tokenizer, max_shard_size)
            if place.exists():
                place.rename(Path(scratch) / "old")
            new.rename(place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    return folder


def cast_weights(weights: dict[str, Tensor], config: MonetConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters in ``dtype``; the routers' statistics keep theirs, since bf16 is too coarse for thresholds."""
    parameters = _parameter_names(config)
    return {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in weights.items()}


def _parameter_names(config: MonetConfig) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in MonetForCausalLM(config).named_parameters()}


def _refuse_occupied(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new folder")
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    if not present:
        return
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} is not empty and not an earlier export; give a new folder")
    foreign = sorted(present - set(read_json(folder / RECORD)["files"]))
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which no export wrote; move it away or give a new folder")
    if not force:
        raise UserError(f"{folder} holds an earlier export; give --force to replace it, or a new folder")


def _write_files(
    config: MonetConfig,
    weights: dict[str, Tensor],
    folder: Path,
    name: str,
    tokenizer: Tokenizer | None,
    max_shard_size: str,
) -> None:
    token_ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, vocab_size=config.vocab_size, context=config.max_position_embeddings)
        token_ids = tokenizer.record.config_ids
    dtype = weights["model.embed_tokens.weight"].dtype
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    _write_json(folder / CONFIG, published_config(config, dtype) | token_ids | {"auto_map": AUTO_MAP})
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, **token_ids, "transformers_version": version("transformers")},
    )
    modelling_files = Path(hf.__file__).parent
    for file in hf.OWN:
        shutil.copyfile(modelling_files / file, folder / file)
    for file, module in hf.SHARED.items():
        assert module.__file__ is not None
        shutil.copyfile(module.__file__, folder / file)
    parameters = sum(tensor.numel() for key, tensor in weights.items() if key in _parameter_names(config))
    card = model_card(name, config, parameters, dtype, has_tokenizer=tokenizer is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    written = [file for file in folder.rglob("*") if file.is_file()]
    files = sorted({RECORD, *(file.relative_to(folder).as_posix() for file in written)})
    for shard in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, shard)  # the writer makes them private to the user
    _write_json(folder / RECORD, {"files": files})


def _write_json(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@one_line_errors
def main() -> None:
    """Console entry ``monet-export``."""
    parser = argparse.ArgumentParser(prog="monet-export", description="Export a checkpoint to a Hugging Face folder.")
    parser.add_argument("checkpoint", help="run folder (newest step), step folder, or Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to write: new or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters (as in the checkpoint)")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json, SentencePiece model or folder (the checkpoint's own)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export in OUT")
    arguments = parser.parse_args()

    source = resolve_checkpoint(arguments.checkpoint)
    config = read_config(source)
    tokenizer_file = arguments.tokenizer or find_tokenizer(source)
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else None
    weights = read_weights(source)
    check_weights(weights, config, source)
    if arguments.dtype:
        weights = cast_weights(weights, config, DTYPES[arguments.dtype])
    write_export(config, weights, arguments.out, tokenizer, arguments.force)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"exported {source} to {arguments.out} ({size / 2**20:,.1f} MiB)")
    if tokenizer is None:
        print("without a tokenizer: the checkpoint holds none and --tokenizer names none")
    elif has_chat_template(arguments.out):
        print('its chat template: apply_chat_template(..., tokenizer_kwargs={"split_special_tokens": False})')


if __name__ == "__main__":
    main()
