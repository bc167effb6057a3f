"""Text generation with this project's own model: ``monet-generate CHECKPOINT_OR_HF --prompt TEXT``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from monet_train.checkpoints.layout import resolve_checkpoint
from monet_train.checkpoints.load import load_pretrained
from monet_train.checkpoints.weights import DTYPES
from monet_train.errors import UserError, one_line_errors
from monet_train.model.attention import KVCache
from monet_train.model.transformer import MonetForCausalLM
from monet_train.model.wrapped import unwrap
from monet_train.tokenizers import Tokenizer, find_tokenizer, load_tokenizer

UNDECODED = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not complete yet


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most probable one."""

    temperature: float = 0.8
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the most probable tokens that together have this probability

    def validate(self) -> None:
        """Raises :class:`UserError` naming the option."""
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature} must not be negative")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [V] -> probabilities [V] of the tokens that are drawn from (temperature above 0)."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.numel():
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        ordered, order = logits.softmax(-1).sort(descending=True)
        # a token stays when those before it have less than top_p together: the first one always does
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
        return torch.zeros_like(ordered).scatter(0, order, ordered / ordered.sum())


@torch.inference_mode()
def generate_tokens(
    model: MonetForCausalLM,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Iterable[int] = (),
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Continue a prompt, token by token.

    Ends before a token of ``stop``, after ``max_new_tokens``, or where the model's context is full. The draws are
    made on the CPU, so that a seed means the same on every device.

    Raises:
        UserError: the model is transformers' own, which would pass over the cache of this one.
    """
    if not isinstance(unwrap(model), MonetForCausalLM):
        raise UserError(
            "generate_tokens takes a model of load_pretrained; one that transformers has loaded has generate()"
        )
    stop = set(stop)
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache() if use_cache else None
    tokens = list(prompt)
    fresh = tokens
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(prompt))):
        logits = model(torch.tensor([fresh], device=device), cache=cache).logits[0, -1].cpu()
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(sampling.probabilities(logits), 1, generator=generator))
        if token in stop:
            return
        yield token
        tokens.append(token)
        fresh = [token] if use_cache else tokens


def stream_text(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The prompt's text, then pieces of text as the tokens come; a character only once all its bytes have."""
    seen = list(prompt)
    text = tokenizer.decode(seen)
    printed = len(text)
    yield text
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        complete = len(text.rstrip(UNDECODED))
        if complete > printed:
            yield text[printed:complete]
            printed = complete
    yield text[printed:]


def choose_device(name: str) -> torch.device:
    """``auto``: a GPU where there is one. Raises :class:`UserError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(name)


@one_line_errors
def main() -> None:
    """Console entry ``monet-generate``."""
    parser = argparse.ArgumentParser(prog="monet-generate", description="Continue a text.")
    parser.add_argument("checkpoint", help="run folder (newest step), step folder, or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to add at most (128)")
    parser.add_argument(
        "--temperature", type=float, default=Sampling.temperature, help="of the draws; 0: the likeliest token (0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=Sampling.top_k, help="draw from the k likeliest tokens; 0: from all (0)"
    )
    parser.add_argument(
        "--top-p", type=float, default=Sampling.top_p, help="draw from the likeliest that together have p (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--no-cache", action="store_true", help="recompute all tokens at every step")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters (as stored)")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json, SentencePiece model or folder (the checkpoint's own)"
    )
    parser.add_argument("--experts", type=Path, help="expert set to mask: a file that ExpertSet.save wrote (none)")
    arguments = parser.parse_args()

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    sampling.validate()
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens} must be at least 1")
    device = choose_device(arguments.device)
    folder = resolve_checkpoint(arguments.checkpoint)
    tokenizer_file = arguments.tokenizer or find_tokenizer(folder)
    if tokenizer_file is None:
        raise UserError(f"{folder} holds no tokenizer; name one with --tokenizer")
    tokenizer = load_tokenizer(tokenizer_file)
    (prompt,) = tokenizer.encode([arguments.prompt])
    if not prompt:
        raise UserError("--prompt is empty; give the beginning of a text")
    model = load_pretrained(folder, dtype=DTYPES.get(arguments.dtype), device=device, experts=arguments.experts)
    model.store_for_decoding()
    if len(prompt) >= model.config.max_position_embeddings:
        raise UserError(
            f"--prompt has {len(prompt)} tokens, the model reads {model.config.max_position_embeddings}; shorten it"
        )
    if max(prompt) >= model.config.vocab_size:
        raise UserError(
            f"{tokenizer_file} is not the tokenizer of {folder} (its ids exceed the vocabulary): give --tokenizer"
        )

    stop = [tokenizer.record.eos_id]
    tokens = generate_tokens(
        model, prompt, arguments.max_new_tokens, sampling, stop, arguments.seed, not arguments.no_cache
    )
    for piece in stream_text(tokenizer, prompt, tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
