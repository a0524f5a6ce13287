import numpy as np
import pytest

from train.tasks.p_hop import PHop


@pytest.mark.parametrize("hops", [1, 4, 6])
def test_answers_are_right(hops):
    """Every pointer followed by hand, one hop at a time."""
    task = PHop(8 * (1 + hops))
    inputs, answers = task.sequences(np.random.default_rng(3), 50)
    assert inputs.shape == (50, 8 * (1 + hops))
    assert answers.shape == (50, 8 * hops)
    for sequence, found in zip(inputs.tolist(), answers.tolist(), strict=True):
        function = sequence[:8]
        assert sorted(function) == list(range(8))
        for place, (symbol, answer) in enumerate(zip(sequence[8:], found, strict=True)):
            for _ in range(place // 8 + 1):
                symbol = function[symbol]
            assert answer == symbol


def test_every_symbol_is_asked_once_for_every_number_of_hops_in_orders_of_their_own():
    inputs, _ = PHop(40).sequences(np.random.default_rng(0), 20)
    groups = inputs.reshape(20, 5, 8)
    assert (np.sort(groups) == np.arange(8)).all()
    assert len({tuple(group) for group in groups.reshape(-1, 8).tolist()}) > 95  # of 100: not one order for all


def test_permutations_are_uniform():
    inputs, _ = PHop(16).sequences(np.random.default_rng(0), 8000)
    counts = np.array([np.bincount(inputs[:, place], minlength=8) for place in range(16)])
    assert (abs(counts - 1000) < 150).all()  # five standard deviations


def test_another_hop_is_asked_for_every_200_steps():
    steps = (0, 199, 200, 599, 600, 10**6)
    assert [PHop(40).asked(step) for step in steps] == [8, 8, 16, 24, 32, 32]


def test_accuracy_by_the_number_of_hops():
    right = np.zeros((3, 32), dtype=bool)
    right[:, :8] = True
    right[0, 24:] = True
    assert PHop(40).accuracy(right) == {
        "answers": (24 + 8) / 96, "1 hop": 1.0, "2 hops": 0.0, "3 hops": 0.0, "4 hops": pytest.approx(1 / 3),
    }  # fmt: skip


@pytest.mark.parametrize("seq_len", [8, 20, 128 + 1])
def test_rejects_lengths_that_are_no_groups(seq_len):
    with pytest.raises(ValueError, match=rf"seq_len must be 8 \(1 \+ hops\) with data=p-hop.*Got seq_len={seq_len}\."):
        PHop(seq_len)
