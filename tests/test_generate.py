"""Generated tokens against the model without a cache, early exit against its rule, batches against single rows."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_tape import install
from test_cache import SHAPES, Recomputed, decoder, run
from test_early_exit import EveryLoop
from tiny_decoder import V, tokens
from torch import Tensor

from looped.cache import KeyValueCache
from looped.generate import Exit, Options, generate, stream
from looped.generate.sampling import Draws, draw
from looped.graph import WARM_UP, CudaGraphs
from looped.halting import ENTROPY, MARGIN, STATE_CHANGE, Policy, Seen, gate_policy
from looped.model import LoopedLM

PROMPTS = [[5, 9, 2, 40, 7], [11], [60, 0, 3]]
NEW = 200
EVERYTHING = SHAPES[3] | {"n_layers": 1, "block_norm": "sandwich"}


def talker(**changes: Any) -> LoopedLM:
    """With a head of its own, without which it would say one token again and again. In double precision: what is drawn
    does not depend on rounding."""
    return decoder(**{**changes, "tied": False, "max_seq_len": 5 + NEW}).double()


def expected_tokens(logits: Tensor, options: Options, row: int) -> list[int]:
    """What a row must draw, if logits [n, V] are those before each of its new tokens."""
    draws = Draws(options.seed + row, 1, logits.device)
    uniforms = torch.cat([draws.uniforms(1)[0] for _ in range(len(logits))])
    return draw(options.probabilities(logits), uniforms).tolist()


@pytest.mark.parametrize(
    ("changes", "n_loops"),
    [
        *(({}, k) for k in range(1, 9)),
        *((EVERYTHING, k) for k in range(1, 9)),
        *((changes, 3) for changes in SHAPES[1:]),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_model_without_a_cache(changes: dict[str, Any], n_loops: int) -> None:
    """Three prompts of different lengths in a batch, and each row alone through the model: 200 tokens."""
    made, options = talker(**changes), Options(max_new_tokens=NEW, n_loops=n_loops, seed=3)
    found = generate(made, PROMPTS, options)
    assert found.loops == [[n_loops] * NEW] * 3
    for row, (prompt, new) in enumerate(zip(PROMPTS, found.tokens, strict=True)):
        logits = made(torch.tensor([prompt + new]), n_loops=n_loops, logits=True).logits
        assert logits is not None
        assert new == expected_tokens(logits[0, len(prompt) - 1 : -1], options, row)
        assert len(set(new)) > V / 2


def test_shared_slots_are_those_of_the_cache() -> None:
    """Not the model's own function, but that of looped/cache.py, which its tests compare with its rule."""
    made = talker()
    cache = KeyValueCache(made.config, 1, 20, 4, shared=True, dtype=torch.float64)
    rows, logits = [PROMPTS[0]], run(made, cache, torch.tensor([PROMPTS[0]]), 0, 4)
    new: list[int] = []
    for column in range(5, 20):
        new.append(int(logits[0, -1].argmax()))
        logits = run(made, cache, torch.tensor([new[-1:]]), column, 4)
    shared = made.generate(rows, max_new_tokens=15, n_loops=4, temperature=0, shared_cache=True).tokens
    assert shared == [new]
    assert shared != made.generate(rows, max_new_tokens=15, n_loops=4, temperature=0).tokens


# Early exit -----------------------------------------------------------------------------------------------------------


def by_the_rule(made: LoopedLM, row: Tensor, exits: Tensor, n_loops: int) -> tuple[list[Tensor], list[Tensor]]:
    """States H_0..H_K and what is read of loops 1..K of a row [1, T], all loops of all tokens computed at once.

    At loop k a token sees the keys of loop min(k, e) of those before it; in the coda, of their reading at loop e.
    """
    context = made.context(row, cache=EveryLoop(exits))
    embedded = made.embed(row)
    states = [made.start(embedded)]
    for loop in range(n_loops):
        states.append(made.apply_loop(states[-1], loop, embedded, context))
    at_exit = torch.stack(states).take_along_dim(exits[None, :, :, None], 0)[0]
    together, alone = torch.zeros(row.shape[1]), torch.arange(row.shape[1])
    coda = Recomputed(together, {})
    made.read(at_exit, replace(context, cache=coda))
    alone_after_them = replace(context, cache=Recomputed(alone, coda.found))
    return states, [made.read(state, alone_after_them) for state in states[1:]]


def logits_by_the_rule(made: LoopedLM, read: list[Tensor]) -> list[Tensor]:
    return [made.head_logits(each, final=loop == len(read)) for loop, each in enumerate(read, 1)]


def exits_by_the_rule(made: LoopedLM, states: list[Tensor], read: list[Tensor], exit_: Exit) -> Tensor:
    """[1, T]: the loop, 1 to K, at which every token of a row leaves."""
    n_loops, logits, score = len(read), logits_by_the_rule(made, read), None
    exits = torch.full(read[0].shape[:2], n_loops)
    for loop in range(n_loops - 1):
        score = exit_.policy.score(Seen(states[loop], states[loop + 1], logits[loop], score, read[loop]))
        exits[(exits == n_loops) & (score >= exit_.tau)] = loop + 1
    return exits


GATE = gate_policy(lambda read: 0.3 * read[..., 0] - 1)


@pytest.mark.parametrize(
    ("changes", "exit_", "new"),
    [
        ({}, Exit(MARGIN, 0.3), NEW),
        (EVERYTHING, Exit(STATE_CHANGE, -0.3), NEW),
        (EVERYTHING, Exit(ENTROPY, -3.9), 60),
        (SHAPES[2], Exit(GATE, 0.6), 60),
        ({"readout": "final-only", "embedding_std": 0.1}, Exit(MARGIN, 0.05), 60),
        ({"readout": "final-only", "embedding_std": 0.1}, Exit(STATE_CHANGE, -0.7), 60),
    ],
    ids=["margin", "state-change", "entropy", "gate", "final-only", "final-only-state"],
)
def test_exits_are_those_of_the_rule(changes: dict[str, Any], exit_: Exit, new: int) -> None:
    """Given the tokens and exits that were found, the rule gives them again."""
    made, n_loops = talker(**changes), 6
    options = Options(max_new_tokens=new, n_loops=n_loops, seed=5, exit=exit_)
    found = generate(made, PROMPTS, options)
    for row, (prompt, generated, loops) in enumerate(zip(PROMPTS, found.tokens, found.loops, strict=True)):
        assert loops[0] == n_loops  # the prompt takes them all
        assert len(set(loops)) > 2
        fed = torch.tensor([prompt + generated[:-1]])
        exits = torch.tensor([[n_loops] * (len(prompt) - 1) + loops])
        states, read = by_the_rule(made, fed, exits, n_loops)
        expected = exits_by_the_rule(made, states, read, exit_)
        expected[:, : len(prompt)] = n_loops
        assert expected.tolist() == exits.tolist()
        at_exit = torch.stack(logits_by_the_rule(made, read)).take_along_dim(exits[None, :, :, None] - 1, 0)[0, 0]
        assert generated == expected_tokens(at_exit[len(prompt) - 1 :], options, row)


def test_later_loops_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ran = talker(), []
    original = LoopedLM.apply_loop

    def record(self: LoopedLM, state: Tensor, loop: int, *others: Any) -> Tensor:
        ran.append(loop)
        return original(self, state, loop, *others)

    monkeypatch.setattr(LoopedLM, "apply_loop", record)
    options = dict(max_new_tokens=30, n_loops=5, exit=Exit(MARGIN, 0.3))
    found = made.generate(PROMPTS, **options)
    assert ran == ran_of(found.loops)  # a step ends when its last row leaves
    ran.clear()
    found = made.generate(PROMPTS, stop_tokens=found.tokens[0][:1] + found.tokens[1][4:5], **options)
    assert len(found.tokens[0]) == 1
    assert ran == ran_of(found.loops)  # a row that has stopped keeps nobody waiting


def ran_of(loops: list[list[int]]) -> list[int]:
    longest = [max(each) for each in itertools.zip_longest(*loops, fillvalue=0)]
    assert min(longest) < 5
    return [loop for n in longest for loop in range(n)]


# Batches, stop tokens, streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("exit_", [None, Exit(MARGIN, 0.3), Exit(STATE_CHANGE, -0.3)], ids=["fixed", "margin", "state"])
def test_a_batch_gives_what_single_rows_give(temperature: float, exit_: Exit | None) -> None:
    made = talker(**EVERYTHING)
    options = dict(max_new_tokens=40, n_loops=4, temperature=temperature, exit=exit_, stop_tokens=(7, 20, 33))
    batch = made.generate(PROMPTS, seed=8, **options)
    for row, prompt in enumerate(PROMPTS):
        single = made.generate([prompt], seed=8 + row, **options)
        assert batch.tokens[row] == single.tokens[0]
        assert batch.loops[row] == single.loops[0]


def test_rows_end_with_their_stop_token() -> None:
    made = talker()
    free = made.generate(PROMPTS, max_new_tokens=30).tokens
    stop = (free[0][4], free[2][9])
    stopped = made.generate(PROMPTS, max_new_tokens=30, stop_tokens=stop).tokens
    for row, all_ in zip(stopped, free, strict=True):
        end = next((i + 1 for i, token in enumerate(all_) if token in stop), 30)
        assert row == all_[:end]
    assert len({len(row) for row in stopped}) > 1
    steps = list(stream(made, PROMPTS, Options(max_new_tokens=30, stop_tokens=stop)))
    assert len(steps) == max(map(len, stopped))
    assert [[token for step in steps for token in step.tokens[row]] for row in range(3)] == stopped


def test_a_tensor_of_prompts_and_seeds() -> None:
    made, rows = talker(), tokens(2, 4)
    first = made.generate(rows, max_new_tokens=20, seed=1)
    assert first == made.generate(rows.tolist(), max_new_tokens=20, seed=1)
    torch.rand(3)  # of the generator that others use
    assert first == made.generate(rows, max_new_tokens=20, seed=1)
    assert first.tokens != made.generate(rows, max_new_tokens=20, seed=9).tokens
    assert len(made.generate(rows).tokens[0]) == Options().max_new_tokens


# CUDA graphs, on their stand-in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "n_graphs"),
    [
        ({}, 1),  # the step
        ({"exit": Exit(MARGIN, 0.3)}, 1 + 3),  # what comes before the loops, each loop
        ({"exit": Exit(STATE_CHANGE, -0.3)}, 1 + 3),
        ({"draft_loops": 2}, 2),  # the draft's loops, the others
    ],
    ids=["fixed", "margin", "state", "speculation"],
)
def test_graphed_steps_are_eager_steps(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], n_graphs: int) -> None:
    tapes = install(monkeypatch)
    made = talker(**EVERYTHING)
    options = Options(max_new_tokens=60, n_loops=3, seed=2, **changes)
    eager = list(stream(made, PROMPTS, options))
    assert tapes == []
    assert list(stream(made, PROMPTS, options, launch=CudaGraphs(torch.device("cpu")))) == eager
    assert len(tapes) >= n_graphs
    if not changes:
        assert [tape.replays for tape in tapes] == [59 - WARM_UP]


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0. Got temperature=-0.1."),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0. Got temperature=nan."),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0. Got temperature=inf."),
        ({"top_k": 0}, "top_k must be at least 1. Got top_k=0."),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1. Got top_p=0.0."),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1. Got top_p=1.1."),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1. Got max_new_tokens=0."),
        ({"n_loops": 0}, "n_loops must be at least 1. Got n_loops=0."),
        ({"draft_loops": 0}, "draft_loops must be at least 1. Got draft_loops=0."),
        ({"draft_tokens": 0}, "draft_tokens must be at least 1. Got draft_tokens=0."),
        ({"seed": -1}, r"seed must be at least 0 and below 2\^63. Got seed=-1."),
        ({"exit": Exit(MARGIN, float("nan"))}, "tau must be a number or inf. Got tau=nan."),
        ({"exit": Exit(MARGIN, 1.0), "draft_loops": 1}, "draft_loops must not be given with exit"),
        ({"shared_cache": True, "draft_loops": 1}, "draft_loops must not be given with shared_cache"),
        ({"draft_loops": 3}, "draft_loops must be below n_loops. Got draft_loops=3, n_loops=3."),
        ({"stop_tokens": (3, V)}, rf"stop_tokens must be in \[0, vocab_size={V}\). Got {V}."),
        (
            {"max_new_tokens": NEW + 1},
            "prompt and new tokens must not be more than max_seq_len with learned pos",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # options have addresses in them
)
def test_generate_rejects_options(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = talker()
    monkeypatch.setattr(LoopedLM, "embed", None)  # nothing is computed
    with pytest.raises(ValueError, match=message):
        stream(made, PROMPTS, Options(**options))


@pytest.mark.parametrize("name", ["max_new_tokens", "n_loops", "top_k", "seed", "draft_loops", "draft_tokens"])
def test_options_that_are_no_integers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer. Got {name}=1.5."):
        Options(**{name: 1.5})


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, r"at least one row and one token each. Got lengths \[\]"),
        ([[1], []], ValueError, r"at least one row and one token each. Got lengths \[1, 0\]"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"Got lengths \[0, 0\]"),
        ([[1, V]], ValueError, rf"prompts must be in \[0, vocab_size={V}\). Got {V}."),
        ([[1, -1]], ValueError, r"prompts must be in .* Got -1."),
        ([[1, 0.5]], TypeError, r"prompts must be rows of integer token ids. Got a row \[1, 0.5\]"),
        (torch.zeros(2, 3), TypeError, r"prompts must be rows of integer token ids. Got a row \[0.0, 0.0"),
        ([1, 2], TypeError, "prompts must be rows of integer token ids. Got a row 1"),
        (torch.tensor([1, 2]), TypeError, "prompts must be rows of integer token ids. Got a row 1"),
        ("word", TypeError, "prompts must be rows of integer token ids. Got a row 'w'"),
    ],
    ids=str,
)
def test_generate_rejects_prompts(prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        talker().generate(prompts)


def test_generate_rejects_models() -> None:
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        talker().train().generate(PROMPTS)
    broken = talker()
    broken.readout_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="a model must have finite logits"):
        broken.generate(PROMPTS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top'"):
        talker().generate(PROMPTS, top=3)


def test_rotary_positions_may_be_exceeded() -> None:
    made = talker(positions="rotary")
    assert len(made.generate(PROMPTS[:1], max_new_tokens=NEW + 10, n_loops=1).tokens[0]) == NEW + 10


def test_the_policy_sees_what_it_may_look_at() -> None:
    """H_{k-1}, H_k, logits if it reads them, and its own last score; one token of every row."""
    seen: list[Seen] = []

    def score(what: Seen) -> Tensor:
        seen.append(what)
        return torch.full(what.state.shape[:-1], float(len(seen)))

    for reads_logits in (False, True):
        seen.clear()
        talker().generate(PROMPTS, max_new_tokens=2, n_loops=3, exit=Exit(Policy("mine", reads_logits, score), 9.0))
        assert [None if what.score is None else what.score.flatten().tolist() for what in seen] == [None, [1.0] * 3]
        assert torch.equal(seen[1].before, seen[0].state)
        assert seen[0].state.shape[:2] == (3, 1)
        for what in seen:
            assert (what.logits is not None) == reads_logits
            assert what.logits is None or what.logits.shape == (3, 1, V)


@pytest.mark.parametrize(
    ("options", "message"), [({"exit": "margin:1"}, "exit must be an Exit"), ({"top_k": True}, "top_k")]
)
def test_options_reject_other_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Options(**options)
