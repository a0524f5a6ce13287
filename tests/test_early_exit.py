"""Loops that are left out, against the rule as it is stated, computed for whole sequences at every loop."""

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from tiny_decoder import LAYERS, V, model, tokens
from torch import Tensor

from looped.early_exit import run_with_exits
from looped.halting import ENTROPY, MARGIN, STATE_CHANGE, WITHOUT_A_GATE, Policy, Seen, gate_policy
from looped.model import LoopedLM

N_LOOPS = 4
VARIANTS: list[dict[str, Any]] = [
    {},
    {"positions": "rotary", "inter_loop_norm": True, "readout": "final-only", "embedding_std": 0.2},
    {"injection": "concat", "n_prelude": 1, "n_coda": 2, "start": "zero", "block_norm": "sandwich"},
    {"positions": "rotary", "injection": "diagonal", "n_coda": 1, "loop_rank": 2, "loop_embedding": True},
]


def gate(decoder: LoopedLM) -> Policy:
    weight = torch.linspace(-1, 1, decoder.config.d_model)
    return gate_policy(lambda read: (read * weight.to(read.dtype)).mean(-1))


def policies(decoder: LoopedLM) -> list[Policy]:
    return [*WITHOUT_A_GATE, gate(decoder)]


class EveryLoop:
    """Keys and values [B, T, H, head_dim] of all tokens at all loops; at loop k, those of loop min(k, e) are seen."""

    def __init__(self, exits: Tensor) -> None:
        self.exits = exits  # 1 to K; K for those that have not left
        self.history: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}

    def at(self, part: str, loop: int, layer: int):
        return partial(self.attend, self.history.setdefault((part, layer), []))

    def attend(self, history: list[tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        history.append((k, v))
        loop = (self.exits.clamp(max=len(history)) - 1)[None, :, :, None, None]
        keys, values = (torch.stack(kept).take_along_dim(loop, 0)[0] for kept in zip(*history, strict=True))
        scores = torch.einsum("bqhc,bkhc->bhqk", q, keys) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(later, -math.inf).softmax(-1), values)


@torch.no_grad()
def by_the_rule(decoder: LoopedLM, inputs: Tensor, policy: Policy, tau: float, n_loops: int) -> tuple[Tensor, Tensor]:
    """Exit loops and logits: all tokens go through all loops and the coda, and what has left is not looked at."""
    exits = torch.full(inputs.shape, n_loops)
    gone = torch.zeros(inputs.shape, dtype=torch.bool)
    context = decoder.context(inputs, cache=EveryLoop(exits))
    embedded = decoder.embed(inputs)
    state, score, at_exit = decoder.start(embedded), None, None
    for loop in range(n_loops):
        before, state = state, decoder.apply_loop(state, loop, embedded, context)
        last = loop == n_loops - 1
        read = decoder.read(state, context)
        logits = decoder.head_logits(read, final=last)
        at_exit = logits if at_exit is None else torch.where(gone.unsqueeze(-1), at_exit, logits)
        if not last:
            score = policy.score(Seen(before, state, logits, score, read))
            exits[~gone & (score >= tau)] = loop + 1
            gone |= score >= tau
    return exits, at_exit


def a_tau(decoder: LoopedLM, inputs: Tensor, policy: Policy) -> float:
    """One at which tokens leave at several loops, between two scores that they have if none leaves."""
    scores = []

    def remember(seen: Seen) -> Tensor:
        scores.append(policy.score(seen))
        return scores[-1]

    run_with_exits(decoder, inputs, dataclasses.replace(policy, score=remember), math.inf, n_loops=N_LOOPS)
    distinct = torch.stack(scores).double().unique()
    place = int(0.6 * len(distinct))
    return float(distinct[place - 1 : place + 1].mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_it_is_the_rule(changes: dict[str, Any], dtype: torch.dtype) -> None:
    decoder = model(**changes, n_loops=N_LOOPS).to(dtype).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith(("loop_embedding", "up")):
            torch.nn.init.normal_(parameter, std=0.5)
    inputs = tokens(3, 11)
    seen_exits = set()
    for policy in policies(decoder):
        tau = a_tau(decoder, inputs, policy)
        exits = run_with_exits(decoder, inputs, policy, tau)
        loops, logits = by_the_rule(decoder, inputs, policy, tau, N_LOOPS)
        assert torch.equal(exits.loops, loops), policy.name
        assert len(exits.loops.unique()) > 1, policy.name
        seen_exits |= set(exits.loops.unique().tolist())
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(exits.logits, logits, atol=tolerance, rtol=tolerance)
    assert seen_exits == {1, 2, 3, 4}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_with_an_infinite_threshold_it_is_the_model(changes: dict[str, Any]) -> None:
    decoder = model(**changes, fused=True).eval()
    inputs = tokens()
    for policy in (MARGIN, STATE_CHANGE):
        for tau, expected in ((math.inf, 3), (-math.inf, 1)):
            exits = run_with_exits(decoder, inputs, policy, tau)
            assert (exits.loops == expected).all()
            state = decoder(inputs, n_loops=expected).states[-1]
            torch.testing.assert_close(exits.logits, decoder.readout_logits(state, final=expected == 3))
        assert (run_with_exits(decoder, inputs, policy, -math.inf, n_loops=1).loops == 1).all()
        assert (run_with_exits(decoder, inputs, policy, math.inf, n_loops=7).loops == 7).all()


def test_a_gates_score_is_of_the_models_own_distribution() -> None:
    decoder = model(exit_gate=True, n_coda=1, n_loops=N_LOOPS).double().eval()
    assert decoder.exit_gate is not None
    torch.nn.init.normal_(decoder.exit_gate.weight)
    inputs, policy, scores = tokens(), gate_policy(decoder.exit_logit), []

    def remember(seen: Seen) -> Tensor:
        scores.append(policy.score(seen))
        return scores[-1]

    run_with_exits(decoder, inputs, dataclasses.replace(policy, score=remember), math.inf)
    with torch.no_grad():
        stopped = decoder.exit_probabilities(decoder(inputs).states).cumsum(0)[:-1]
    torch.testing.assert_close(torch.stack(scores).view(stopped.shape), stopped)


def test_a_token_depends_on_no_later_one() -> None:
    decoder = model(positions="rotary", n_coda=1, n_loops=N_LOOPS).double().eval()
    inputs = tokens(3, 11)
    for policy in policies(decoder):
        tau = a_tau(decoder, inputs, policy)
        whole, prefix = (run_with_exits(decoder, rows, policy, tau) for rows in (inputs, inputs[:, :6]))
        assert torch.equal(whole.loops[:, :6], prefix.loops)
        torch.testing.assert_close(whole.logits[:, :6], prefix.logits, atol=1e-12, rtol=1e-12)


def test_what_has_left_is_not_computed() -> None:
    """Rows of the MLP: one for each loop that a token stays, in the coda too where the policy needs what it makes. Rows
    of the head: one a token unless logits decide."""
    decoder = model(n_loops=N_LOOPS, n_coda=1, tied=False).eval()
    inputs, rows = tokens(3, 11), {"mlp": 0, "coda": 0, "head": 0}

    def count(name: str, _: torch.nn.Module, arguments: Any) -> None:
        rows[name] += arguments[0].shape[:-1].numel()

    for name, blocks in (("mlp", decoder.blocks), ("coda", decoder.coda)):
        for block in blocks:
            block.mlp.register_forward_pre_hook(partial(count, name))
    original = decoder.head_logits

    def head_logits(read: Tensor, *, final: bool = True) -> Tensor:
        rows["head"] += read.shape[:-1].numel()
        return original(read, final=final)

    decoder.head_logits = head_logits  # type: ignore[method-assign]
    for policy in (ENTROPY, STATE_CHANGE, gate(decoder)):
        tau = a_tau(decoder, inputs, policy)
        rows.update(mlp=0, coda=0, head=0)
        loops = run_with_exits(decoder, inputs, policy, tau).loops
        assert rows["mlp"] == LAYERS * int(loops.sum()) < LAYERS * N_LOOPS * inputs.numel()
        assert rows["coda"] <= int(loops.sum())
        assert rows["head"] == (int(loops.sum()) if policy.reads_logits else inputs.numel())


def test_under_autocast() -> None:
    decoder = model(positions="rotary", n_coda=1).eval()
    inputs = tokens()
    tau = a_tau(decoder, inputs, STATE_CHANGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exits = run_with_exits(decoder, inputs, STATE_CHANGE, tau)
    assert exits.logits.shape == (*inputs.shape, V)
    assert len(exits.loops.unique()) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": math.nan}, "tau must be a number or inf. Got tau=nan"),
        ({"n_loops": 0}, "n_loops must be at least 1. Got n_loops=0"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens must have shape \[B, T\]. Got \[3\]"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {"tokens": tokens(), "policy": MARGIN, "tau": 0.0, **changes}
    with pytest.raises(ValueError, match=message):
        run_with_exits(model().eval(), **arguments)


def test_dropout_does_not_decide() -> None:
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        run_with_exits(model(), tokens(), MARGIN, 0.0)
