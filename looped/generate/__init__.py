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
                   (`looped.generate.sampling.verify`); with temperature 0 it is the same tokens.

A batch is padded on the left and every row is as if alone, its random numbers included. All rows take a step together:
a step ends when its last row leaves, speculation keeps as many tokens as all rows can, and generation ends when all
rows have stopped. On a GPU a step (with early exit a loop) is captured once as a CUDA graph, and replayed.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from looped.cache import KeyValueCache
from looped.generate.decoder import Decoder, Exit
from looped.generate.sampling import Draws, Sampling, draw, verify
from looped.graph import CudaGraphs, Launch, eagerly
from looped.halting import check_tau

if TYPE_CHECKING:
    from looped.model import LoopedLM

__all__ = ["Exit", "Generated", "Options", "Step", "generate", "stream"]


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """How to generate. Raises ValueError if a value breaks a rule, naming the option, the rule and the value.

    max_new_tokens: of every row, unless a stop token comes first. n_loops: K, by default the trained number.
    temperature, top_k, top_p: as in `Sampling`. seed: row b draws as a batch of one with seed + b does.
    stop_tokens: end a row, and are its last token. exit: leave loops early. shared_cache: one set of keys and values
    for all loops, which is another function than the model's own (looped/cache.py).
    draft_loops: loops that draft, at least 1 and fewer than n_loops; None for no speculation. draft_tokens: how many
    tokens are drafted at a time.
    """

    max_new_tokens: int = 64
    n_loops: int | None = None
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    exit: Exit | None = None
    shared_cache: bool = False
    draft_loops: int | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "n_loops", "draft_loops", "draft_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1. Got {name}={value}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63. Got seed={self.seed}.")
        if self.exit is not None:
            check_tau(self.exit.tau)
        for name, value in (("exit", self.exit), ("shared_cache", self.shared_cache)):
            if self.draft_loops is not None and value:
                raise ValueError(f"draft_loops must not be given with {name}: it would not be exact. Got both.")


class Step(NamedTuple):
    """What a step has brought every row: no token if the row has stopped before.

    loops: of the logits that each token was drawn from. drafted, kept: tokens of every row that were drafted, and that
    stayed.
    """

    tokens: list[list[int]]
    loops: list[list[int]]
    drafted: int = 0
    kept: int = 0


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
    rows = Rows(len(prompts), options)
    draws = Draws(options.seed, len(prompts), prompts.device)
    logits = decoder.prompt(prompts)
    if not bool(logits.isfinite().all()):
        raise ValueError("a model must have finite logits to draw from. Got others after the prompt.")
    loops = torch.full_like(prompts[:, 0], decoder.n_loops)
    while True:
        tokens = draw(options.probabilities(logits), draws.uniforms(1)[:, 0])
        yield rows.take(tokens.unsqueeze(1), loops)
        if rows.remaining == 0:
            return
        if options.draft_loops is not None:
            yield from _speculate(decoder, tokens, draws, rows, options)
            return
        if options.exit is None:
            logits = decoder.step(tokens)
        else:
            finished = torch.tensor(rows.finished, device=tokens.device)
            logits, loops = decoder.step_with_exits(tokens, options.exit, finished)


def _speculate(decoder: Decoder, tokens: Tensor, draws: Draws, rows: "Rows", options: Options) -> Iterator[Step]:
    """tokens: [B], the last of every row, which have not been fed."""
    assert options.draft_loops is not None
    loops = torch.full_like(tokens, decoder.n_loops)
    while rows.remaining > 0:
        n = min(options.draft_tokens, rows.remaining - 1)
        start = decoder.end
        drafted, distributions, states, embedded = [tokens], [], [], []
        uniforms = draws.uniforms(2 * n + 1)
        for i in range(n + 1):  # the last token is fed and its successor not drafted
            logits, *fed = decoder.first_loops(drafted[-1], options.draft_loops)
            states.append(fed[0])
            embedded.append(fed[1])
            if i < n:
                distributions.append(options.probabilities(logits))
                drafted.append(draw(distributions[-1], uniforms[:, i]))
        logits = decoder.other_loops(options.draft_loops, torch.cat(states, dim=1), torch.cat(embedded, dim=1))
        target = options.probabilities(logits)
        kept = 0
        if n == 0:
            tokens = draw(target[:, 0], uniforms[:, -1])
        else:
            draft = torch.stack(distributions, dim=1)
            kept, tokens = verify(
                torch.stack(drafted[1:], dim=1), draft, target, uniforms[:, n:-1], uniforms[:, -1], rows.finished
            )
        decoder.end = start + 1 + kept
        yield rows.take(torch.stack([*drafted[1 : kept + 1], tokens], dim=1), loops, drafted=n, kept=kept)


class Rows:
    """Which rows of a batch have stopped, and how many tokens the others may still have."""

    def __init__(self, batch_size: int, options: Options) -> None:
        self.finished = [False] * batch_size
        self._remaining = options.max_new_tokens
        self._stop = frozenset(options.stop_tokens)

    @property
    def remaining(self) -> int:
        """New tokens that a row may still have; 0 if all rows have stopped."""
        return 0 if all(self.finished) else self._remaining

    def take(self, tokens: Tensor, loops: Tensor, *, drafted: int = 0, kept: int = 0) -> Step:
        """The step of new tokens [B, n], each after loops [B]; those after a stop token are left out."""
        self._remaining -= tokens.shape[1]
        taken: list[list[int]] = []
        for row, ids in enumerate(tokens.tolist()):
            end = next((i + 1 for i, token in enumerate(ids) if token in self._stop), len(ids))
            taken.append([] if self.finished[row] else ids[:end])
            self.finished[row] |= bool(taken[row]) and taken[row][-1] in self._stop
        counts = [[number] * len(ids) for number, ids in zip(loops.tolist(), taken, strict=True)]
        return Step(taken, counts, drafted, kept)


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
