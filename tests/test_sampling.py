"""Distributions against the rules by hand, draws against the cumulative distribution."""

import pytest
import torch

from looped.generate import Options
from looped.generate.sampling import Draws, draw

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log() + 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.1, 0.3, 0.1]),
        ({"temperature": 0.5}, [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 1e30}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"top_k": 3}, [5 / 9, 1 / 9, 3 / 9, 0]),  # of two equal ones the smaller
        ({"top_k": 9}, [0.5, 0.1, 0.3, 0.1]),
        ({"top_p": 0.45}, [1, 0, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0, 0.375, 0]),  # the one that crosses the bound stays
        ({"top_p": 0.85}, [5 / 9, 1 / 9, 3 / 9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # of what top_k has left
        ({"top_k": 2, "top_p": 0.6, "temperature": 2.0}, [0.5**0.5 / (0.5**0.5 + 0.3**0.5), 0, 0.4364916, 0]),
    ],
    ids=str,
)
def test_probabilities(options, expected):
    found = Options(**options).probabilities(torch.stack([LOGITS, LOGITS.flip(0), LOGITS.double() * 0]))
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float32), atol=2e-6, rtol=0)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    assert found[1, 3] == found[1].max()


def test_draws_invert_the_cumulative_distribution():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(6, 6), numbers).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(7 * probabilities.expand(6, 6), numbers).tolist() == [1, 1, 3, 3, 4, 4]
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    third = torch.full((1000, 3), 1 / 3)
    assert torch.bincount(draw(third, grid)).tolist() == [333, 334, 333]


def test_a_rows_numbers_do_not_depend_on_the_others():
    device = torch.device("cpu")
    batch, single = Draws(5, 3, device), Draws(7, 1, device)
    for _ in range(3):
        numbers = batch.uniforms(2)
        assert numbers.shape == (3, 2)
        assert torch.equal(numbers[2], single.uniforms(2)[0])
        assert len(numbers.unique()) == 6
        assert ((numbers >= 0) & (numbers < 1)).all()


def test_a_tiny_temperature_does_not_overflow():
    assert Options(temperature=1e-37).probabilities(torch.tensor([99.0, 100.0])).tolist() == [0, 1]


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.26}], ids=str)
def test_of_equal_tokens_the_smaller_stay(options):
    """top_p is reached exactly by two of four."""
    assert Options(**options).probabilities(torch.zeros(4)).tolist() == [0.5, 0.5, 0, 0]
    assert Options(top_k=7).probabilities(torch.zeros(5000)).nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-50, 1e-300])
def test_a_temperature_too_small_for_float32_takes_the_most_probable(temperature: float) -> None:
    torch.set_flush_denormal(True)
    try:
        p = Options(temperature=temperature).probabilities(torch.tensor([1.0, 3.0, 2.0, 3.0]))
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(p, torch.tensor([0.0, 0.5, 0.0, 0.5]))
