"""Generation with our own model: the cache, sampling, streaming text, the command."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from monet_train import ExpertSet
from monet_train.checkpoints.load import load_pretrained
from monet_train.errors import UserError
from monet_train.interop.generate import Sampling, generate_tokens, main, stream_text
from monet_train.model.identity import identify
from monet_train.tokenizers import load_tokenizer
from tests.support import GOLDEN
from tests.support.commands import exit_status

GREEDY = Sampling(temperature=0)


def test_the_cache_changes_nothing(golden_folder: Path, answers: dict[str, Tensor]) -> None:
    model = load_pretrained(golden_folder)
    prompt = answers["input_ids"][0, :9].tolist()
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=20, top_p=0.9)):
        cached = list(generate_tokens(model, prompt, 20, sampling, seed=3))
        assert len(cached) == 20
        assert cached == list(generate_tokens(model, prompt, 20, sampling, seed=3, use_cache=False))


def test_greedy_takes_the_likeliest_token(golden_folder: Path, answers: dict[str, Tensor]) -> None:
    model = load_pretrained(golden_folder)
    prompt = answers["input_ids"][1].tolist()
    expected = answers["eval.logits"][1, -1].argmax().item()
    assert next(generate_tokens(model, prompt, 1, GREEDY)) == expected
    assert next(generate_tokens(model, prompt, 1, Sampling(temperature=1.0, top_k=1))) == expected


def test_the_seed_decides_the_draws() -> None:
    model = load_pretrained(GOLDEN / "tiny_vertical")
    draws = [list(generate_tokens(model, [5, 6], 20, Sampling(1.0), seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_generation_ends_at_a_stop_token_and_at_the_end_of_the_context() -> None:
    model = load_pretrained(GOLDEN / "tiny_vertical")
    endless = list(generate_tokens(model, [5, 6], 1000, GREEDY))
    assert len(endless) == model.config.max_position_embeddings - 2
    stop = endless[7]
    assert list(generate_tokens(model, [5, 6], 1000, GREEDY, stop=[stop])) == endless[: endless.index(stop)]


def test_probabilities_keep_what_top_k_and_top_p_ask_for() -> None:
    shares = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = shares.log()

    def kept(**options: float) -> list[float]:
        return Sampling(**{"temperature": 1.0, **options}).probabilities(logits).tolist()

    assert kept() == pytest.approx(shares.tolist())
    assert kept(top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert kept(top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert kept(top_p=0.8) == pytest.approx([0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9])
    assert kept(top_p=0.01) == [0, 1, 0, 0]
    assert kept(temperature=0.5) == pytest.approx((shares**2 / (shares**2).sum()).tolist())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint carries a SentencePiece model."""
    run = tmp_path_factory.mktemp("run")
    step = shutil.copytree(GOLDEN / "tiny_horizontal", run / "checkpoints" / "step_00000010")
    (step.parent / "latest").write_text("step_00000010")
    SentencePieceTrainer.train(
        sentence_iterator=iter((GOLDEN.parents[1] / "LICENSE").read_text().split("\n")),
        model_prefix=str(step / "tokenizer"), vocab_size=256, model_type="bpe", character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    (step / "tokenizer.vocab").unlink()
    return run


def test_text_streams_by_whole_characters(tmp_path: Path) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the prompt of def and end", "a prompt of one line"]), vocab_size=285,
        model_prefix=str(tmp_path / "bytes"), model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "bytes.model")
    text = "the prompt 🙂 def 日本 end"
    (ids,) = tokenizer.encode([text])
    pieces = list(stream_text(tokenizer, ids[:2], ids[2:]))
    assert "".join(pieces) == text
    assert "🙂" in pieces and not any("\ufffd" in piece for piece in pieces)
    unfinished = ids[: ids.index(tokenizer.processor.piece_to_id("<0x9F>")) + 1]
    assert "".join(stream_text(tokenizer, unfinished[:1], unfinished[1:])).startswith("the prompt \ufffd")


def test_command_continues_the_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for options in (["--temperature", "0"], ["--temperature", "0", "--no-cache"], ["--seed", "1"], ["--seed", "2"]):
        assert exit_status(main, "monet-generate", run, "--prompt", "def test", "--max-new-tokens", "12", *options) == 0
        outputs.append(capsys.readouterr().out)
    assert all(output.startswith("def test") and len(output) > len("def test\n") for output in outputs)
    assert outputs[0] == outputs[1]
    assert all(one != other for one, other in itertools.combinations(outputs[1:], 2))


def test_command_masks_experts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = ExpertSet(identify(load_pretrained(run)), {}).inverted()
    outputs = []
    for factor in (1.0, 0.0):
        file = everything.with_factor(factor).save(tmp_path / "all.experts.safetensors")
        options = ["--prompt", "def test", "--temperature", "0", "--max-new-tokens", "12"]
        for arguments in (options, [*options, "--experts", file]):
            assert exit_status(main, "monet-generate", run, *arguments) == 0
            outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "def test " * 60], "--prompt has"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0 must not be negative"),
        (["--prompt", "a", "--top-p", "0"], "--top-p 0.0 must be above 0"),
        (["--prompt", "a", "--top-k", "-2"], "--top-k -2 must not be negative"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--prompt", "a", "--tokenizer", "absent.model"], "absent.model is not a file"),
        (["--prompt", "a", "--experts", "absent.safetensors"], "absent.safetensors is not a file"),
    ],
)
def test_command_refuses_in_one_line(
    run: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_status(main, "monet-generate", run, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_command_asks_for_a_tokenizer_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, "monet-generate", GOLDEN / "tiny_vertical", "--prompt", "a") == 2
    assert "holds no tokenizer; name one with --tokenizer" in capsys.readouterr().err


def test_sampling_refuses_by_the_name_of_the_option() -> None:
    with pytest.raises(UserError, match="--top-p 2"):
        Sampling(top_p=2).validate()
