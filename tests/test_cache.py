"""The cache against the model without one, the rules for shared slots and for tokens that left, and what it rejects."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_decoder import HEADS, LENGTH, D, config, model, tokens
from torch import Tensor

from looped.cache import KeyValueCache
from looped.context import Attend, Part
from looped.model import LoopedLM

SHAPES: list[dict[str, Any]] = [
    {},
    {"positions": "rotary", "inter_loop_norm": True, "block_norm": "sandwich"},
    {"n_prelude": 1, "n_coda": 1, "injection": "concat", "start": "zero", "block_norm": "sandwich-sum"},
    {"positions": "rotary", "n_prelude": 2, "n_coda": 2, "injection": "diagonal", "loop_embedding": True},
    {"injection": "add", "loop_rank": 2, "readout": "final-only", "tied": False},
]


def decoder(**changes: Any) -> LoopedLM:
    """Its loop embeddings and updates are away from 0, where they would not show."""
    made = model(**changes).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "injection" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return made


def run(made: LoopedLM, cache: KeyValueCache, rows: Tensor, first: int, n_loops: int) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] in columns first, ..."""
    columns = cache.columns(first, rows.shape[1])
    positions = cache.positions(columns)
    context = made.context(rows, positions=positions, cache=cache.rows(columns, first + rows.shape[1]))
    embedded = made.embed(rows, positions=positions, context=context)
    state = made.start(embedded)
    for loop in range(n_loops):
        state = made.apply_loop(state, loop, embedded, context)
    return made.readout_logits(state, context=context)


def uncached(made: LoopedLM, rows: Tensor, n_loops: int) -> Tensor:
    logits = made(rows, n_loops=n_loops, logits=True).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("n_loops", [1, 2, 5])
def test_pieces_of_any_length_give_the_logits_of_the_whole(changes: dict[str, Any], n_loops: int) -> None:
    made, rows = decoder(**changes), tokens(3, 13)
    cache = KeyValueCache(made.config, 3, 14, n_loops)
    found = [run(made, cache, piece, first, n_loops) for piece, first in pieces(rows, (4, 1, 1, 5, 1, 1))]
    torch.testing.assert_close(torch.cat(found, dim=1), uncached(made, rows, n_loops), atol=2e-5, rtol=1e-4)


def pieces(rows: Tensor, lengths: tuple[int, ...]) -> list[tuple[Tensor, int]]:
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [(rows[:, first : first + n], first) for first, n in zip(firsts, lengths, strict=True)]


def test_the_width_may_be_left_open() -> None:
    made, rows = decoder(), tokens(2, 6)
    cache = KeyValueCache(made.config, 2, 12, 2)
    columns = cache.columns(0, 6)
    assert cache.rows(columns).mask.shape == (2, 1, 6, 12)
    context = made.context(rows, cache=cache.rows(columns))
    state = made.apply_loop(made.embed(rows, context=context), 0, None, context)
    torch.testing.assert_close(state, made(rows, n_loops=1).states[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_rows_padded_on_the_left_are_as_if_alone(changes: dict[str, Any]) -> None:
    """What stands in the padding does not matter, and the first token has position 0."""
    made, length, n_loops = decoder(**changes), 9, 3
    rows = tokens(3, length)
    starts = torch.tensor([4, 0, 8])
    cache = KeyValueCache(made.config, 3, length, n_loops, starts=starts)
    found = torch.cat([run(made, cache, piece, first, n_loops) for piece, first in pieces(rows, (7, 1, 1))], dim=1)
    assert cache.rows(cache.columns(0, length)).mask.any(-1).all()  # nothing is averaged over nothing
    assert found.isfinite().all()
    for row, start in enumerate(starts.tolist()):
        alone = uncached(made, rows[row : row + 1, start:], n_loops)
        torch.testing.assert_close(found[row : row + 1, start:], alone, atol=2e-5, rtol=1e-4)


# Shared slots, from their rule alone ----------------------------------------------------------------------------------


class Recomputed:
    """Attends over the whole sequence, to the keys of this loop of the tokens in the same piece and to those of the
    last loop, found by an earlier pass, of those in pieces before."""

    def __init__(self, piece: Tensor, last: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.same = piece.unsqueeze(1) == piece  # [T, T]
        self.last = last
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, part: Part, loop: int, layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.found[layer] = k, v  # the last loop's in the end
            old_k, old_v = self.last.get(layer, (k, v))
            scores = torch.where(self.same, product(q, k), product(q, old_k)) / q.shape[-1] ** 0.5
            causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)  # [B, H, T, T]
            same = weights * self.same
            return mix(same, v) + mix(weights - same, old_v)

        return attend


def product(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("changes", SHAPES[:2], ids=str)
def test_shared_slots_hold_the_last_loop_of_earlier_tokens(changes: dict[str, Any]) -> None:
    made, rows, n_loops, lengths = decoder(**changes), tokens(2, 10), 4, (5, 1, 3, 1)
    cache = KeyValueCache(made.config, 2, 10, n_loops, shared=True)
    assert n_loops * cache.n_bytes == KeyValueCache(made.config, 2, 10, n_loops).n_bytes
    found = torch.cat([run(made, cache, piece, first, n_loops) for piece, first in pieces(rows, lengths)], dim=1)

    piece = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    last: dict[int, tuple[Tensor, Tensor]] = {}
    for _ in lengths:  # every pass makes the keys of one more piece final
        recomputed = Recomputed(piece, last)
        context = replace(made.context(rows), cache=recomputed)
        state = made.embed(rows)
        for loop in range(n_loops):
            state = made.apply_loop(state, loop, None, context)
        last = recomputed.found
    torch.testing.assert_close(found, made.readout_logits(state), atol=2e-5, rtol=1e-4)
    assert (found - uncached(made, rows, n_loops)).abs().max() > 1e-2  # and is not the model's own function


# Tokens that left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_token_that_left_keeps_its_keys(shared: bool) -> None:
    cache = KeyValueCache(config(n_coda=1), 3, 4, 4, shared=shared)
    columns = cache.columns(2, 1)
    rows = cache.rows(columns, 3)
    for loop in range(3):  # the fourth does not run
        left = torch.tensor([[loop > 0], [loop > 1], [False]])  # after the first loop, the second, the third
        number = torch.full((3, 1, HEADS, D // HEADS), loop + 1.0)
        for layer in range(2):
            replace(rows, left=left).at("loop", loop, layer)(number, number, -number)
    cache.carry_forward(columns, 2)
    for loop in range(4):
        for layer in range(2):
            keys, values = cache.slot("loop", loop, layer)
            expected = [1.0, 2.0, 3.0] if shared else [min(loop + 1.0, exit_) for exit_ in (1.0, 2.0, 3.0)]
            assert keys[:, 2, 0, 0].tolist() == expected
            assert torch.equal(values, -keys)
            assert not keys[:, [0, 1, 3]].any()
    read_once = torch.full((3, 1, HEADS, D // HEADS), 5.0)
    rows.at("coda", 0, 0)(read_once, read_once, read_once)
    replace(rows, left=torch.tensor([[True], [False], [False]])).at("coda", 0, 0)(*[2 * read_once] * 3)
    assert cache.slot("coda", 0, 0)[0, :, 2, 0, 0].tolist() == [5.0, 10.0, 10.0]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_dtype_is_rounded_to() -> None:
    made, rows = decoder(), tokens(2, 6)
    cache = KeyValueCache(made.config, 2, 6, 2, dtype=torch.bfloat16)
    found, exact = run(made, cache, rows, 0, 2), uncached(made, rows, 2)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 2), "batch_size must be at least 1. Got batch_size=0."),
        ((2, 0, 2), "capacity must be at least 1. Got capacity=0."),
        ((2, 4, 0), "n_loops must be at least 1. Got n_loops=0."),
        ((2, LENGTH + 1, 2), "capacity must be at most max_seq_len with learned positions. Got capacity=17, max"),
    ],
)
def test_cache_rejects_sizes(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyValueCache(config(), *sizes)


def test_rotary_positions_may_be_exceeded() -> None:
    assert KeyValueCache(config(positions="rotary", d_model=24, n_heads=3), 1, LENGTH + 5, 1).capacity == LENGTH + 5


def test_cache_rejects_columns_beyond_its_capacity() -> None:
    cache = KeyValueCache(config(), 1, 5, 2)
    with pytest.raises(ValueError, match=r"beyond its 5 columns. Got 2 columns from column 4."):
        cache.columns(4, 2)
    with pytest.raises(ValueError, match="Got 1 columns from column -1"):
        cache.columns(-1, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_cache_rejects_more_loops_than_it_holds(shared: bool) -> None:
    made, rows = decoder(), tokens(1, 3)
    cache = KeyValueCache(made.config, 1, 5, 2, shared=shared)
    wanted = "Got loop layer 0 at loop 3; the cache has 2 layers and 2 loops" + " that share them" * shared
    with pytest.raises(ValueError, match=wanted):
        run(made, cache, rows, 0, 3)


def test_cache_rejects_another_model_or_batch() -> None:
    cache = KeyValueCache(config(), 2, 5, 2)
    for batch in (1, 3):
        with pytest.raises(ValueError, match=rf"with \[B, T\] = \[{batch}, 3\]. Got \[2, 3\]"):
            run(decoder(), cache, tokens(batch, 3), 0, 2)
    made, rows = decoder(), tokens(1, 3)
    context = made.context(rows, cache=cache.rows(cache.columns(0, 3)))
    with pytest.raises(ValueError, match=r"must be \[2, 3, 3, 8\]. Got \[1, 3, 3, 8\]"):
        made.apply_loop(made.embed(rows), 0, None, context)
    with pytest.raises(ValueError, match=r"must be \[2, 3, 3, 8\]. Got \[2, 3, 2, 12\]"):
        run(decoder(n_heads=2), cache, tokens(2, 3), 0, 2)
    with pytest.raises(ValueError, match="Got loop layer 2 at loop 1; the cache has 2 layers and 2 loops"):
        run(decoder(n_layers=3), cache, tokens(2, 3), 0, 2)
    with pytest.raises(ValueError, match="Got prelude layer 0 at loop 1; the cache has 0 layers and 1 loops"):
        run(decoder(n_prelude=1), cache, tokens(2, 3), 0, 2)


def test_cache_rejects_other_starts() -> None:
    with pytest.raises(ValueError, match=r"starts must have shape \[B\] = \[2\]. Got \[1\]."):
        KeyValueCache(config(), 2, 5, 2, starts=torch.tensor([3]))
