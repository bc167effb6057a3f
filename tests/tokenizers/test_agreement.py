"""One text, the same ids: in shards, in monet-generate, and in what transformers makes of an export."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForCausalLM

from monet_train.checkpoints.load import load_pretrained
from monet_train.checkpoints.weights import read_config, write_model
from monet_train.data.megatron import IndexedDataset
from monet_train.data.shards import find_shards
from monet_train.errors import UserError
from monet_train.interop import generate
from monet_train.interop.export import main as export_main
from monet_train.interop.export import save_pretrained
from monet_train.model.transformer import MonetForCausalLM
from monet_train.tokenizers import find_tokenizer, load_tokenizer
from tests.support import GOLDEN, REPOSITORY
from tests.support.commands import command, exit_status
from tests.support.corpora import real_texts, text_of
from tests.support.tokenizers import SELF_WILLED, byte_level, self_willed

pytestmark = pytest.mark.slow

NAMES = (
    "</s>", "<s>", "<unk>", "[SEP]", "[CLS]", "[MASK]", "<mask>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>",
    "<|code|>", "<|tool|>", "<|x|>", "<|absent|>", "<|ghost|>", "Über", "<0x0A>",
)  # fmt: skip
TEXTS = [
    *(text_of(i) for i in range(7)),
    *(text[:1500] for text in real_texts()),
    "Fußgängerübergänge 2024, ¿qué? Ελληνικά 한국어 ภาษาไทย 🙂\r\n\t  end  ",
    *(char * n for char in "-= \n" for n in (7, 23, 50)),  # where a unigram model has equally probable segmentations
    *(form.format(name) for name in NAMES for form in ("{0}", "a{0}b {0} c", " {0} ", "\n{0}\n", "{0}{0}<s>")),
]
AUTO_TOKENIZER = """
import json, sys
from transformers import AutoTokenizer

texts, answers = json.load(open(sys.argv[1])), {}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    tokenizer.save_pretrained(folder + " saved")
    again = AutoTokenizer.from_pretrained(folder + " saved")
    assert [again(text, verbose=False)["input_ids"] for text in texts] == ids, "saved by transformers and loaded"
    answers[folder] = {"ids": ids, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "size": len(tokenizer)}
json.dump(answers, sys.stdout)
"""


def model_of(vocabulary: int) -> MonetForCausalLM:
    """A small model with that many embeddings, initialised at random."""
    config = dataclasses.replace(read_config(GOLDEN / "tiny_vertical"), vocab_size=vocabulary)
    torch.manual_seed(0)
    model = MonetForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers by name: what SELF_WILLED has, and SentencePiece models."""
    folder = tmp_path_factory.mktemp("tokenizers")
    files = {name: self_willed(name, folder / name) for name in SELF_WILLED}
    for name, options in {
        "sentencepiece": {},
        "sentencepiece with symbols": {"user_defined_symbols": ["\n", "<|code|>"]},
        "sentencepiece without spaces": {"remove_extra_whitespaces": True},
        "sentencepiece unigram": {"model_type": "unigram"},
    }.items():
        given: dict[str, Any] = {
            "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "minloglevel": 2, **options,
        }  # fmt: skip
        lines = iter("\n".join(real_texts()).split("\n"))
        SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / name), **given)
        files[name] = folder / f"{name}.model"
    return files


@pytest.fixture(scope="module")
def exports(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export with each of them."""
    model, folder = model_of(800), tmp_path_factory.mktemp("exports")
    return {name: save_pretrained(model, folder / name, file) for name, file in files.items()}


@pytest.fixture(scope="module")
def rebuilt(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The ids that AutoTokenizer gives for each export, in a fresh process."""
    texts = tmp_path_factory.mktemp("texts") / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    folders = [str(folder) for folder in exports.values()]
    answers = json.loads(command([sys.executable, "-c", AUTO_TOKENIZER, str(texts), *folders]).stdout)
    return {name: answers[str(folder)] for name, folder in exports.items()}


KINDS = [
    *SELF_WILLED, "sentencepiece", "sentencepiece with symbols", "sentencepiece without spaces",
    "sentencepiece unigram",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_shards_generation_and_transformers_agree(
    kind: str,
    files: dict[str, Path],
    exports: dict[str, Path],
    rebuilt: dict[str, dict[str, Any]],
    data,
    tmp_path: Path,
) -> None:
    texts = [text for text in TEXTS if text.strip()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "shards"
    arguments = ("shards", tmp_path / "a.jsonl", "--tokenizer", files[kind], "--out", out, "--workers", 1)
    assert data(*arguments)[0] == 0
    shard = IndexedDataset(str(out / "shard-00000"))
    tokenizer = load_tokenizer(exports[kind])
    assert [shard[i].tolist()[:-1] for i in range(len(shard))] == tokenizer.encode(texts)
    answer = rebuilt[kind]
    for text, ids, expected in zip(TEXTS, answer["ids"], tokenizer.encode(TEXTS), strict=True):
        assert ids == expected, text
    record = load_tokenizer(out).record
    config = json.loads((exports[kind] / "config.json").read_text())
    assert (answer["bos"], answer["eos"]) == (record.bos_id, record.eos_id)
    assert (config["bos_token_id"], config["eos_token_id"]) == (record.bos_id, record.eos_id)
    assert answer["size"] <= record.vocabulary_size


def test_what_a_template_puts_around_a_text_is_not_in_a_prompt(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, outputs = model_of(800), []
    description = json.loads(files["llama 3"].read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_text(json.dumps({**description, "post_processor": None}))
    for tokenizer in (files["llama 3"], plain):
        folder = save_pretrained(model, tmp_path / f"of {tokenizer.name}", tokenizer)
        arguments = (folder, "--tokenizer", tokenizer, "--prompt", "def f", "--temperature", 0, "--max-new-tokens", 9)
        assert exit_status(generate.main, "monet-generate", *arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_chat_template_is_kept(exports: dict[str, Path], files: dict[str, Path]) -> None:
    """Its control tokens are read as such on request: the name of one in a text is text otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exports["llama 3"], trust_remote_code=True)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenizer_kwargs={"split_special_tokens": False}
    )["input_ids"]
    assert ids == [*load_tokenizer(files["llama 3"]).encode(["hi"])[0], tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert tokenizer.model_max_length == 4000


def test_everyone_takes_the_same_of_two_files(
    files: dict[str, Path], data, jsonl: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a folder with both files every command takes the SentencePiece model."""
    both = tmp_path / "both"
    both.mkdir()
    (both / "tokenizer.model").write_bytes(files["sentencepiece"].read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (both / name).write_bytes((files["llama 3"].parent / name).read_bytes())
    expected = load_tokenizer(files["sentencepiece"]).encode(["some text"])
    assert load_tokenizer(both).encode(["some text"]) == expected
    out = tmp_path / "shards"
    assert data("shards", jsonl / "part-0.jsonl", "--tokenizer", both, "--out", out, "--workers", 1)[0] == 0
    assert find_tokenizer(out) == out / "tokenizer.model" and not (out / "tokenizer.json").exists()
    checkpoint = save_pretrained(model_of(800), tmp_path / "checkpoint")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((both / name).read_bytes())
    assert exit_status(export_main, "monet-export", checkpoint, tmp_path / "export") == 0
    assert load_tokenizer(tmp_path / "export" / "tokenizer.json").encode(["some text"]) == expected
    options = ("--prompt", "some text", "--temperature", 0, "--max-new-tokens", 5)
    capsys.readouterr()
    outputs = []
    for folder in (checkpoint, tmp_path / "export"):
        assert exit_status(generate.main, "monet-generate", folder, *options) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_shards_and_checkpoints_keep_every_companion(files: dict[str, Path], data, jsonl: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    byte_level(source, "<A>")
    names = {"eos_token": "<A>", "bos_token": {"content": "<A>"}}
    (source / "special_tokens_map.json").write_text(json.dumps(names))
    (source / "tokenizer_config.json").write_text('{"model_max_length": 99}')
    (source / "added_tokens.json").write_text('{"<A>": 380}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    expected = {file.relative_to(source): file.read_bytes() for file in source.rglob("*") if file.is_file()}
    out = tmp_path / "shards"
    arguments = ("shards", jsonl / "part-0.jsonl", "--tokenizer", source, "--out", out, "--workers", 1)
    assert data(*arguments)[0] == 0
    (out / "special_tokens_map.json").unlink()
    assert data(*arguments)[0] == 0, "a missing companion is restored"
    shard_set = find_shards(out)
    model = model_of(381)
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    write_model(checkpoint, model.state_dict(), model.config, shard_set.tokenizer)
    for folder in (out, checkpoint):
        assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert load_tokenizer(checkpoint).record == shard_set.manifest.tokenizer
    assert read_config(checkpoint).eos_token_id == read_config(checkpoint).bos_token_id == 380
    export = tmp_path / "export"
    for options in ((), ("--force",)):
        assert exit_status(export_main, "monet-export", checkpoint, export, *options) == 0
    assert (export / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert load_tokenizer(export).encode(["a<A>"]) == load_tokenizer(source).encode(["a<A>"])


def test_a_tokenizer_without_a_begin_token_gets_none(files: dict[str, Path], tmp_path: Path) -> None:
    name = "gpt2 of another split"
    record = load_tokenizer(files[name]).record
    assert (record.bos_id, record.eos_id) == (None, 0)
    model = model_of(800)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    folder = save_pretrained(model, tmp_path / "export", files[name])
    for file in ("config.json", "generation_config.json"):
        values = json.loads((folder / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (None, 0)
    assert load_pretrained(folder).config.bos_token_id is None
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined when no `input_ids` are provided"):
        loaded.generate(max_new_tokens=2)
    loaded.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert (again.config.bos_token_id, again.config.eos_token_id) == (None, 0)
    assert json.loads((save_pretrained(again, tmp_path / "2") / "config.json").read_text())["bos_token_id"] is None


def test_a_published_checkpoint_keeps_its_ids(tmp_path: Path) -> None:
    folder = save_pretrained(load_pretrained(GOLDEN / "tiny_vertical"), tmp_path / "export")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((folder / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2)


def test_a_tokenizer_model_that_is_not_sentencepiece_names_the_file_beside_it(
    files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")  # of the package tiktoken
    (tmp_path / "tokenizer.json").write_bytes(files["llama 3"].read_bytes())
    with pytest.raises(UserError, match=r"is not a SentencePiece model .*: give .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_ids_of_a_loaded_tokenizer_fit_the_shards(files: dict[str, Path]) -> None:
    """Documents end with the end-of-text token and have no other special one."""
    tokenizer = load_tokenizer(files["bert"])
    tokens, lengths = tokenizer.encode_documents(["one two", "", "[SEP] three"])
    ends = np.cumsum(lengths) - 1
    assert (tokens[ends] == tokenizer.record.eos_id).all() and lengths[1] == 1
    assert (tokens == tokenizer.record.eos_id).sum() == 3


def imported(file: Path) -> set[str]:
    """The modules that a file imports, for type checking too."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_the_library_does_not_import_data_preparation() -> None:
    files = [*(REPOSITORY / "monet_train").rglob("*.py")]
    assert files and not [file for file in files if any(name.startswith("data_prep") for name in imported(file))]
    above = ("kernels", "parallel", "model", "config", "planning", "checkpoints", "data", "interop", "training")
    for file in (REPOSITORY / "monet_train" / "tokenizers").glob("*.py"):
        assert not [
            name for name in imported(file) if name.startswith(tuple(f"monet_train.{package}" for package in above))
        ]
