import numpy as np
import pytest

from train.tasks.addition import Addition


def number(digits: list[int]) -> int:
    return int("".join(map(str, reversed(digits))))


@pytest.mark.parametrize("digits", [1, 6, 20])
def test_sums_are_right(digits):
    inputs, answers = Addition(3 * digits + 1).sequences(np.random.default_rng(3), 200)
    assert inputs.shape == (200, 3 * digits + 1)
    assert answers.shape == (200, digits + 1)
    assert (inputs[:, 2 * digits :] == 10).all()
    for sequence, found in zip(inputs.tolist(), answers.tolist(), strict=True):
        assert number(found) == number(sequence[:digits]) + number(sequence[digits : 2 * digits])


def test_lengths_are_uniform_and_digits_too():
    inputs, _ = Addition(10).sequences(np.random.default_rng(0), 6000)
    for operand in (inputs[:, :3], inputs[:, 3:6]):
        shares = (operand > 0).mean(0)  # of places: 0.9 of the lengths 1..3 that reach them
        assert shares == pytest.approx([0.9, 0.6, 0.3], abs=0.03)
        assert np.bincount(operand[:, 0]) / 6000 == pytest.approx(np.full(10, 0.1), abs=0.02)


def test_a_sum_is_right_when_all_its_digits_are():
    right = np.ones((4, 3), dtype=bool)
    right[0, 2] = right[1, :2] = False
    assert Addition(7).accuracy(right) == {"answers": 0.5, "digits": 0.75}


@pytest.mark.parametrize("seq_len", [1, 3, 128])
def test_rejects_lengths_that_are_no_sums(seq_len):
    with pytest.raises(ValueError, match=rf"seq_len must be 3 digits \+ 1 with data=addition.*Got seq_len={seq_len}\."):
        Addition(seq_len)
