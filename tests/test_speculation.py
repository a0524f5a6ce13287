"""Speculation is exact: greedy it is what one gets without, and drawn tokens are distributed as the model has it."""

import itertools
from typing import Any

import pytest
import torch
from test_generate import EVERYTHING, PROMPTS, talker
from torch import Tensor

from looped.generate import Options
from looped.generate.rows import Rows
from looped.generate.sampling import Draws
from looped.generate.speculation import speculate, verify


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"inter_loop_norm": True, "readout": "final-only"}], ids=str)
@pytest.mark.parametrize(("draft_loops", "draft_tokens"), [(1, 1), (1, 3), (3, 4)])
def test_greedy_tokens_are_those_without_speculation(
    changes: dict[str, Any], draft_loops: int, draft_tokens: int
) -> None:
    made = talker(**changes)
    options = dict(max_new_tokens=100, n_loops=4, temperature=0)
    found = made.generate(PROMPTS, draft_loops=draft_loops, draft_tokens=draft_tokens, **options)
    plain = made.generate(PROMPTS, **options)
    assert found.tokens == plain.tokens
    assert found.loops == plain.loops
    assert found.drafted > found.kept
    stop = (plain.tokens[0][3], plain.tokens[1][7])
    assert (
        made.generate(PROMPTS, draft_loops=draft_loops, draft_tokens=draft_tokens, stop_tokens=stop, **options).tokens
        == made.generate(PROMPTS, stop_tokens=stop, **options).tokens
    )


def test_a_good_draft_stays() -> None:
    """The second loop that this model lacks changes nothing: every drafted token stays, and fewer steps are needed."""
    made = talker(n_layers=1)
    for block in made.blocks:
        block.attention.output.weight.zero_()
        block.mlp.w2.weight.zero_()
    for temperature in (0.0, 0.7):
        found = made.generate(
            PROMPTS, max_new_tokens=50, n_loops=3, draft_loops=1, temperature=temperature, draft_tokens=3
        )
        assert found.kept == found.drafted == 36  # a round of 4 has 3 drafted tokens; 1 + 12 * 4, and one of none
        assert [len(row) for row in found.tokens] == [50] * 3


class Tables:
    """A decoder whose logits depend on the token before alone: the draft's, and the model's."""

    n_loops = 2

    def __init__(self, draft: Tensor, target: Tensor) -> None:
        self.draft, self.target, self.end = draft, target, 0

    def first_loops(self, tokens: Tensor, n_loops: int) -> tuple[Tensor, Tensor, Tensor]:
        self.end += 1
        return self.draft[tokens], tokens[:, None, None], tokens[:, None, None]

    def other_loops(self, n_loops: int, state: Tensor, embedded: Tensor) -> Tensor:
        return self.target[state[..., 0]]


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "temperature": 0.8}, {"top_p": 0.8}], ids=str)
def test_drawn_tokens_are_distributed_as_without_speculation(options: dict[str, Any]) -> None:
    """All sequences of three tokens of a vocabulary of three, two rows at a time."""
    generator = torch.Generator().manual_seed(4)
    draft, target = torch.randn(2, 3, 3, generator=generator)
    asked = Options(max_new_tokens=3, draft_loops=1, draft_tokens=2, **options)
    n_runs, counts = 2500, torch.zeros(3, 3, 3)
    for seed in range(n_runs):
        rows, draws = Rows(2, 3, ()), Draws(2 * seed, 2, torch.device("cpu"))
        steps = speculate(Tables(draft, target), torch.tensor([0, 0]), draws, rows, asked)  # type: ignore[arg-type]
        for pieces in zip(*(step.tokens for step in steps), strict=True):
            counts[tuple(itertools.chain(*pieces))] += 1
    p = asked.probabilities(target)
    exact = p[0][:, None, None] * p[:, :, None] * p[None, :, :]
    distance = 0.5 * (counts / counts.sum() - exact).abs().sum()
    assert counts[exact == 0].sum() == 0
    # The expected distance of a sample is at most half the root of (outcomes / draws): 0.037.
    assert distance < 0.037
    q = asked.probabilities(draft)
    drafts = q[0][:, None, None] * q[:, :, None] * q[None, :, :]
    assert 0.5 * (drafts - exact).abs().sum() > 0.3  # what the draft alone would have given


def test_verification_is_exact_for_every_outcome() -> None:
    """Two drafted tokens of a vocabulary of two, over a grid of all uniform numbers on which nothing is rounded."""
    q = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    p = torch.tensor([[0.35, 0.65], [0.7, 0.3], [0.25, 0.75]])
    first, pairs, third = torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)
    for x, y in itertools.product(range(2), repeat=2):
        drafted = torch.tensor([[x, y]])
        for numbers in itertools.product((0.125, 0.375, 0.625, 0.875), repeat=3):
            *accepting, drawing = torch.tensor(numbers)
            kept, after = verify(drafted, q[None], p[None], torch.stack(accepting)[None], drawing[None], [False])
            outcome, weight = [x, y][:kept] + after.tolist(), q[0, x] * q[1, y] / 4**3
            first[outcome[0]] += weight
            if len(outcome) > 1:
                pairs[outcome[0], outcome[1]] += weight
            if len(outcome) > 2:
                third[outcome[2]] += weight
    torch.testing.assert_close(first, p[0])
    torch.testing.assert_close(pairs / pairs.sum(1, keepdim=True), p[1].expand(2, 2))
    torch.testing.assert_close(third / third.sum(), p[2])


def test_rows_keep_as_many_as_all_can() -> None:
    sure = torch.eye(3)
    drafted = torch.tensor([[0, 1], [2, 2], [1, 1]])
    draft = sure[drafted]
    target = sure[torch.tensor([[0, 1, 2], [2, 0, 1], [0, 0, 0]])]  # row 0 keeps both, row 1 one, row 2 none
    numbers, last = torch.full((3, 2), 0.5), torch.full((3,), 0.5)
    for finished, kept, after in (
        ([False, False, False], 0, [0, 2, 0]),
        ([False, False, True], 1, [1, 0, 1]),
        ([False, True, True], 2, [2, 1, 0]),
    ):
        found, token = verify(drafted, draft, target, numbers, last, finished)
        assert (found, token.tolist()) == (kept, after)
    # Where p and q differ by their rounding alone, max(p - q, 0) may have nothing to draw from.
    even, almost = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.5 + 1e-7, 0.5]]])
    zero, late = torch.tensor([[0]]), torch.tensor([[1 - 1e-9]], dtype=torch.float64)
    kept, token = verify(zero, almost, even.expand(1, 2, 2), late, late[0], [False])
    assert (kept, token.tolist()) == (0, [1])
