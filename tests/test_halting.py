import math

import pytest
import torch

from looped.halting import (
    ENTROPY,
    MARGIN,
    STATE_CHANGE,
    TOP_PROBABILITY,
    Seen,
    calibrate,
    exit_loops,
    gate_policy,
    policy_named,
)


def by_hand(margin: list[list[float]], tau: float) -> list[int]:
    """Of [K][tokens] margins, token by token."""
    n_loops = len(margin)
    return [
        next((k + 1 for k in range(n_loops - 1) if margin[k][token] >= tau), n_loops) for token in range(len(margin[0]))
    ]


def outcome(loss: torch.Tensor, margin: torch.Tensor, tau: float) -> tuple[float, float]:
    """Mean loops, and mean loss above that at K, of [K, tokens] each."""
    exits = torch.tensor(by_hand(margin.tolist(), tau))
    halted = loss[exits - 1, torch.arange(loss.shape[1])]
    return exits.double().mean().item(), (halted.mean() - loss[-1].mean()).item()


def test_a_token_leaves_at_the_first_loop_that_is_clear_enough():
    margin = torch.tensor([[0.5, 2.0, 0.1, 1.0], [3.0, 0.0, 0.2, 0.0], [0.0, 0.0, 9.0, 0.0]])
    assert exit_loops(margin, 1.0).tolist() == [2, 1, 3, 1]  # equal to tau is enough
    assert exit_loops(margin, 0.0).tolist() == [1, 1, 1, 1]
    assert exit_loops(margin, math.inf).tolist() == [3, 3, 3, 3]
    assert exit_loops(margin.view(3, 2, 2), 1.0).tolist() == [[2, 1], [3, 1]]
    assert exit_loops(margin[:1], -1.0).tolist() == [1, 1, 1, 1]  # K = 1


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("n_loops", [1, 2, 4])
def test_tau_against_every_tau(seed, n_loops):
    """Margins on a coarse grid, so that many are equal, and losses in no order, so that perplexity is not monotone."""
    generator = torch.Generator().manual_seed(seed)
    margin = torch.randint(0, 6, (n_loops, 9), generator=generator) / 2
    loss = 3 + torch.randn(n_loops, 9, generator=generator, dtype=torch.float64) * 0.3
    tolerance = 1.0 + 0.05 * (seed % 4)
    tau = calibrate(loss, margin, tolerance)
    feasible = []
    for candidate in [*margin.flatten().tolist(), math.inf]:
        loops, excess = outcome(loss, margin, candidate)
        if excess <= math.log(tolerance) + 1e-12:
            feasible.append(loops)
    loops, excess = outcome(loss, margin, tau)
    assert excess <= math.log(tolerance) + 1e-12
    assert loops == min(feasible)


def test_perplexity_need_not_be_monotone():
    """The middle tau costs too much, the lowest does not: stopping there is better for the other token."""
    loss = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    margin = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    assert outcome(loss, margin, 2.0)[1] == 1.0
    assert outcome(loss, margin, 1.0)[1] == 0.5
    assert calibrate(loss, margin, tolerance=math.e) == 1.0
    assert calibrate(loss, margin, tolerance=math.exp(0.6)) == 1.0


def test_equal_margins_leave_together():
    """Either token alone could leave for the price; both cannot, and no tau tells them apart."""
    loss = torch.tensor([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    margin = torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert calibrate(loss, margin, tolerance=math.exp(0.4)) == 2.0
    assert calibrate(loss, margin, tolerance=math.exp(0.7)) == 1.0


def test_where_nothing_is_allowed_every_token_takes_all_loops():
    loss = torch.tensor([[5.0, 5.0], [1.0, 1.0]])
    margin = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    tau = calibrate(loss, margin)
    assert tau == math.inf
    assert exit_loops(margin, tau).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("loss", "score", "tolerance", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), 1.01, r"one shape \[K, ...\] .* Got loss \[2, 3\], score \[3, 2\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), 1.01, "at least one loop and token"),
        (torch.zeros(3), torch.zeros(3), 1.01, r"Got loss \[3\]"),
        (torch.full((2, 1), math.nan), torch.zeros(2, 1), 1.01, "must be finite"),
        (torch.zeros(2, 1), torch.full((2, 1), math.inf), 1.01, "must be finite"),
        (torch.zeros(2, 1), torch.zeros(2, 1), 0.99, "tolerance must be at least 1. Got tolerance=0.99"),
    ],
)
def test_calibrate_rejects(loss, score, tolerance, message):
    with pytest.raises(ValueError, match=message):
        calibrate(loss, score, tolerance)


def test_exit_loops_rejects():
    with pytest.raises(ValueError, match=r"at least one loop.*Got shape \[0, 2\]"):
        exit_loops(torch.zeros(0, 2), 1.0)
    with pytest.raises(ValueError, match=r"tau must be a number or inf. Got tau=nan"):
        exit_loops(torch.zeros(2, 2), math.nan)


# Policies -------------------------------------------------------------------------------------------------------------


def seen(tokens: int = 5, **changes) -> Seen:
    generator = torch.Generator().manual_seed(0)
    before, state = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    return Seen(before, state, torch.randn(tokens, 7, generator=generator, dtype=torch.float64))._replace(**changes)


def test_scores_token_by_token():
    looked_at = seen()
    scores = {policy: policy.score(looked_at).tolist() for policy in (MARGIN, TOP_PROBABILITY, ENTROPY, STATE_CHANGE)}
    for token, (before, state, logits) in enumerate(zip(*(rows.tolist() for rows in looked_at[:3]), strict=True)):
        weights = [math.exp(z) for z in logits]
        p = [weight / sum(weights) for weight in weights]
        change = math.dist(before, state) / math.hypot(*state)
        assert scores[MARGIN][token] == pytest.approx(sorted(logits)[-1] - sorted(logits)[-2])
        assert scores[TOP_PROBABILITY][token] == pytest.approx(max(p))
        assert scores[ENTROPY][token] == pytest.approx(sum(each * math.log(each) for each in p))
        assert scores[STATE_CHANGE][token] == pytest.approx(-change)


def test_a_gates_score_is_how_probable_it_is_to_have_stopped():
    """Of four loops: the sum of Ouro's p_k = lambda_k prod_{j < k} (1 - lambda_j) so far."""
    generator = torch.Generator().manual_seed(0)
    exit_logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    policy = gate_policy(lambda read: read[:, 0])
    score, expected = None, torch.zeros(5, dtype=torch.float64)
    stops = exit_logits.sigmoid()
    for loop in range(4):
        score = policy.score(seen(score=score, read=exit_logits[loop, :, None]))
        expected += stops[loop] * (1 - stops[:loop]).prod(0)
        torch.testing.assert_close(score, expected)


def test_scores_are_of_fp32_and_finite():
    half = seen(state=torch.zeros(5, 6, dtype=torch.bfloat16), logits=torch.full((5, 7), 3e4, dtype=torch.bfloat16))
    half.logits[:, 0] = -3e4
    for policy in (MARGIN, TOP_PROBABILITY, ENTROPY, STATE_CHANGE):
        score = policy.score(half._replace(before=torch.ones(5, 6, dtype=torch.bfloat16)))
        assert score.dtype == torch.float32
        assert score.isfinite().all()


def test_a_policy_by_its_name():
    assert [policy_named(name).name for name in ("margin", "top-probability", "entropy", "state-change")] == [
        "margin", "top-probability", "entropy", "state-change",
    ]  # fmt: skip
    assert policy_named("gate", lambda read: read[..., 0]).name == "gate"
    with pytest.raises(ValueError, match=r"^policy must be one of margin, .*, state-change. Got policy='mood'.$"):
        policy_named("mood")
    with pytest.raises(ValueError, match=r"^policy gate needs a model with an exit gate. Got policy='gate'.$"):
        policy_named("gate")
