"""A model at work on a batch of sequences: what it computes of a prompt and of one more token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looped.cache import KeyValueCache
from looped.context import Context
from looped.graph import Launch, eagerly
from looped.halting import Policy, Seen

if TYPE_CHECKING:
    from looped.model import LoopedLM


@dataclass(frozen=True)
class Exit:
    """A token leaves at the first loop k < K at which the policy's score is at least tau (looped/halting.py)."""

    policy: Policy
    tau: float


class Decoder:
    """Feeds tokens to a model, column by column of a cache, and gives the logits of what comes next.

    end: the column of the next token; what was fed from there on is forgotten.
    launch: what calls the functions whose shapes are the same at every step: `eagerly`, or CUDA graphs. With graphs a
    token attends to all columns of the cache, most of them masked, since the sizes in a graph never change.
    """

    def __init__(self, model: "LoopedLM", cache: KeyValueCache, launch: Launch = eagerly) -> None:
        self.model = model
        self.cache = cache
        self.n_loops = cache.n_loops
        self.end = 0
        self._launch = launch

    def prompt(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after tokens [B, T], all of which take all loops."""
        return self._first_loops(self.n_loops, tokens, *self._advance(tokens.shape[1]))[0]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token of each row, [B]."""
        return self.first_loops(tokens, self.n_loops)[0]

    def step_with_exits(self, tokens: Tensor, exit_: Exit, finished: Tensor) -> tuple[Tensor, list[int]]:
        """Logits [B, V] after one more token of each row, [B], and the loops that each took.

        The loops end when all rows have left. finished: [B] bool, rows whose tokens do not matter, which leave at once.
        """
        columns, width = self._advance(1)
        (embedded,) = self._outlasting(self._enter, tokens.unsqueeze(1), columns, width)
        state, score = self.model.start(embedded), None
        left = finished.unsqueeze(1)
        loops, logits = torch.full_like(tokens, self.n_loops), None
        for loop in range(self.n_loops):
            last = loop == self.n_loops - 1
            state, now, score, leaves = self._outlasting(
                self._loop_and_score, loop, exit_, state, embedded, left, score, columns, width
            )
            leaves = leaves & ~left
            if now is None and (last or bool(leaves.any())):
                (now,) = self._outlasting(self._read, state, left, last, columns, width)
            if now is not None:
                logits = now if logits is None else torch.where(left, logits, now)
            loops = torch.where(leaves.squeeze(1), loop + 1, loops)
            left = left | leaves
            if not last and bool(left.all()):
                self.cache.carry_forward(columns, loop)
                break
        assert logits is not None  # of the last loop, or the one at which all had left
        return logits, loops.tolist()

    def first_loops(self, tokens: Tensor, n_loops: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, V] of a model with this many loops after one more token of each row, [B]; H_n_loops and E, both
        [B, 1, d], for `other_loops`."""
        logits, state, embedded = self._outlasting(self._first_loops, n_loops, tokens.unsqueeze(1), *self._advance(1))
        return logits, state, embedded

    def other_loops(self, n_loops: int, state: Tensor, embedded: Tensor) -> Tensor:
        """Logits [B, T, V] after the last T tokens, which the other loops take in one pass. state, embedded: [B, T, d],
        as `first_loops` has them."""
        length = state.shape[1]
        self.end -= length
        return self._outlasting(self._other_loops, n_loops, state, embedded, *self._advance(length))[0]

    def _advance(self, count: int) -> tuple[Tensor, int]:
        """The next columns, and how many columns they attend to."""
        columns = self.cache.columns(self.end, count)
        self.end += count
        return columns, self.end if self._launch is eagerly else self.cache.capacity

    def _outlasting(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
        """What the function returns when it is launched, as copies: the next launch may overwrite its own."""
        return tuple(None if x is None else x.clone() for x in self._launch(function, *arguments))

    # What is launched: sizes and numbers known beforehand, no value looked at on the host -----------------------------

    def _context(self, rows: Tensor, columns: Tensor, width: int, left: Tensor | None = None) -> Context:
        cached = replace(self.cache.rows(columns, width), left=left)
        return self.model.context(rows, positions=self.cache.positions(columns), cache=cached)

    def _embed(self, tokens: Tensor, columns: Tensor, context: Context) -> Tensor:
        return self.model.embed(tokens, positions=self.cache.positions(columns), context=context)

    def _enter(self, tokens: Tensor, columns: Tensor, width: int) -> tuple[Tensor]:
        return (self._embed(tokens, columns, self._context(tokens, columns, width)),)

    def _loop_and_score(
        self,
        loop: int,
        exit_: Exit,
        state: Tensor,
        embedded: Tensor,
        left: Tensor,
        score: Tensor | None,
        columns: Tensor,
        width: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """H_{loop+1}; logits [B, V] if the policy reads them; the scores and which rows may leave, both [B, 1]."""
        context = self._context(state, columns, width, left)
        before, state = state, self.model.apply_loop(state, loop, embedded, context)
        if loop == self.n_loops - 1:
            return state, None, None, torch.ones_like(left)
        policy = exit_.policy
        read = self.model.read(state, context) if policy.reads or policy.reads_logits else None
        logits = self.model.head_logits(read, final=False) if read is not None and policy.reads_logits else None
        score = policy.score(Seen(before, state, logits, score, read))
        return state, None if logits is None else logits[:, 0], score, score >= exit_.tau

    def _read(self, state: Tensor, left: Tensor, final: bool, columns: Tensor, width: int) -> tuple[Tensor]:
        context = self._context(state, columns, width, left)
        return (self.model.readout_logits(state, final=final, context=context)[:, 0],)

    def _first_loops(self, n_loops: int, tokens: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        context = self._context(tokens, columns, width)
        embedded = self._embed(tokens, columns, context)
        state = self.model.start(embedded)
        for loop in range(n_loops):
            state = self.model.apply_loop(state, loop, embedded, context)
        return self._last_logits(state, context), state, embedded

    def _other_loops(self, n_loops: int, state: Tensor, embedded: Tensor, columns: Tensor, width: int) -> tuple[Tensor]:
        context = self._context(state, columns, width)
        for loop in range(n_loops, self.n_loops):
            state = self.model.apply_loop(state, loop, embedded, context)
        return (self.model.readout_logits(state, context=context),)

    def _last_logits(self, state: Tensor, context: Context) -> Tensor:
        """[B, V] after the last of the rows. The coda reads all of them: those to come attend to its keys."""
        return self.model.head_logits(self.model.read(state, context)[:, -1])
