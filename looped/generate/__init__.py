"""Generation: `model.generate(prompts, ...)`, or `stream(model, prompts, Options(...))` for tokens as they come.

A prompt is computed in one pass, and then one token at a time with the keys and values of those before it
(looped/cache.py). Three ways to take K loops a token, or fewer:

    fixed K        n_loops, whether the model was trained with as many or not.
    early exit     with `exit`, a generated token leaves at the first loop e whose score is high enough. The next token
                   is drawn from the logits of loop e, and loops k > e are not computed. Later tokens see, at loop k,
                   the keys and values of its loop min(k, e), and in the coda those of its reading at e. The tokens of
                   the prompt take all K loops.
    speculation    with `draft_loops`, the model's own first loops draft a few tokens, and the other loops verify them
                   in one pass that goes on from the draft's states. What comes out is distributed exactly as without
                   (`looped.generate.speculation.verify`); with temperature 0 it is the same tokens.

A batch is padded on the left. A row gets the tokens that it would get alone, and draws the same random numbers; with
speculation it is the distribution alone that stays the same. All rows take a step together. A step ends when its last
row leaves; speculation keeps as many tokens as all rows can; generation ends when all rows have stopped. On a GPU a
step (with early exit a loop) is captured once as a CUDA graph, and replayed.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from looped.cache import KeyValueCache
from looped.generate.decoder import Decoder, Exit
from looped.generate.options import Options
from looped.generate.rows import Rows, Step
from looped.generate.sampling import Draws, draw
from looped.generate.speculation import speculate
from looped.graph import CudaGraphs, Launch, eagerly

if TYPE_CHECKING:
    from looped.model import LoopedLM

__all__ = ["Exit", "Generated", "Options", "Step", "generate", "stream"]


class Generated(NamedTuple):
    """The new tokens of every row, and loops, drafted and kept of all steps, as in `Step`."""

    tokens: list[list[int]]
    loops: list[list[int]]
    drafted: int
    kept: int


def generate(model: "LoopedLM", prompts: Tensor | Sequence[Sequence[int]], options: Options) -> Generated:
    """New tokens after each of the prompts. Arguments and errors are those of `stream`."""
    tokens: list[list[int]] = [[] for _ in prompts]
    loops: list[list[int]] = [[] for _ in prompts]
    drafted = kept = 0
    for step in stream(model, prompts, options):
        for whole, part in zip((*tokens, *loops), (*step.tokens, *step.loops), strict=True):
            whole += part
        drafted, kept = drafted + step.drafted, kept + step.kept
    return Generated(tokens, loops, drafted, kept)


def stream(
    model: "LoopedLM",
    prompts: Tensor | Sequence[Sequence[int]],
    options: Options,
    *,
    launch: Launch | None = None,
) -> Iterator[Step]:
    """Tokens as they come, step by step.

    prompts: [B, T] int64, or B lists of token ids, of any lengths. launch: what calls a step's functions; by default
    CUDA graphs on a GPU, and elsewhere nothing special.

    Raises ValueError at once, before any work, for prompts that are empty or not of the vocabulary, stop tokens out of
    it, prompt and new tokens that together exceed learned positions, draft_loops that is not below n_loops, and a model
    in training mode; TypeError for token ids that are not integers.
    """
    rows = [_token_ids(row) for row in prompts]
    _check(model, rows, options)
    device = model.embedding.weight.device
    if launch is None:
        launch = CudaGraphs(device) if device.type == "cuda" else eagerly
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    cache = KeyValueCache(
        model.config,
        len(rows),
        length + options.max_new_tokens - 1,  # the last new token is not fed
        _n_loops(model, options),
        shared=options.shared_cache,
        starts=torch.tensor([length - len(row) for row in rows], device=device),
        device=device,
        dtype=model.embedding.weight.dtype,
    )
    return _steps(Decoder(model, cache, launch), tokens, options)


@torch.no_grad()
def _steps(decoder: Decoder, prompts: Tensor, options: Options) -> Iterator[Step]:
    rows = Rows(len(prompts), options.max_new_tokens, options.stop_tokens)
    draws = Draws(options.seed, len(prompts), prompts.device)
    logits = decoder.prompt(prompts)
    if not bool(logits.isfinite().all()):
        raise ValueError("a model must have finite logits to draw from. Got others after the prompt.")
    loops = [decoder.n_loops] * len(prompts)
    while True:
        tokens = draw(options.probabilities(logits), draws.uniforms(1)[:, 0])
        yield rows.take(tokens.unsqueeze(1), loops)
        if rows.remaining == 0:
            return
        if options.draft_loops is not None:
            yield from speculate(decoder, tokens, draws, rows, options)
            return
        if options.exit is None:
            logits = decoder.step(tokens)
        else:
            finished = torch.tensor(rows.finished, device=tokens.device)
            logits, loops = decoder.step_with_exits(tokens, options.exit, finished)


def _n_loops(model: "LoopedLM", options: Options) -> int:
    return model.config.n_loops if options.n_loops is None else options.n_loops


def _token_ids(row: Tensor | Sequence[int]) -> list[int]:
    ids = row.tolist() if isinstance(row, Tensor) else row
    try:
        return [operator.index(token) for token in ids]
    except TypeError:
        raise TypeError(f"prompts must be rows of integer token ids. Got a row {ids!r:.60}.") from None


def _check(model: "LoopedLM", rows: list[list[int]], options: Options) -> None:
    config, n_loops = model.config, _n_loops(model, options)
    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout and noise. Call model.eval() first.")
    if len(rows) == 0 or min(map(len, rows)) == 0:
        raise ValueError(f"prompts must have at least one row and one token each. Got lengths {[*map(len, rows)]}.")
    for name, ids in [("prompts", row) for row in rows] + [("stop_tokens", options.stop_tokens)]:
        wrong = next((token for token in ids if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name} must be in [0, vocab_size={config.vocab_size}). Got {wrong}.")
    length = max(map(len, rows))
    if config.positions == "learned" and length + options.max_new_tokens > config.max_seq_len:
        raise ValueError(
            "prompt and new tokens must not be more than max_seq_len with learned positions. "
            f"Got {length} and max_new_tokens={options.max_new_tokens}; max_seq_len={config.max_seq_len}."
        )
    if options.draft_loops is not None and options.draft_loops >= n_loops:
        raise ValueError(
            f"draft_loops must be below n_loops. Got draft_loops={options.draft_loops}, n_loops={n_loops}."
        )
