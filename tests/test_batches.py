from unittest import mock

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.text import batches
from train.text.batches import Windows, batch_indices, evaluation_windows, share, spread


def test_windows_overlap_by_the_stride():
    windows = Windows(np.arange(20, dtype=np.uint16), seq_len=4, stride=3)
    assert len(windows) == 6  # the last starts at 15 and ends with the last token
    inputs, targets = windows.gather(np.array([0, 5]))
    assert inputs.tolist() == [[0, 1, 2, 3], [15, 16, 17, 18]]
    assert targets.tolist() == [[1, 2, 3, 4], [16, 17, 18, 19]]
    assert inputs.dtype == targets.dtype == torch.int64


@settings(max_examples=200, deadline=None)
@given(seq_len=st.integers(1, 9), extra=st.integers(0, 40), limit=st.none() | st.integers(1, 60))
def test_every_target_is_evaluated_once(seq_len, extra, limit):
    n_tokens = seq_len + 1 + extra
    windows, indices = evaluation_windows(np.arange(n_tokens, dtype=np.uint16), seq_len, limit)
    inputs, targets = windows.gather(indices)
    assert inputs.shape == targets.shape == (len(indices), seq_len)
    counted = targets != -100
    assert torch.equal(inputs[counted] + 1, targets[counted])
    assert (inputs[~counted] == n_tokens - 1).all()
    found = targets[counted].tolist()
    if limit is None or limit >= n_tokens - 1:
        assert found == list(range(1, n_tokens))
        assert (~counted).sum() < seq_len
    else:
        assert counted.all()
        assert found == sorted(set(found))
        assert len(found) == max(1, limit // seq_len) * seq_len
        steps = np.diff(indices)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_too_few_tokens_make_no_window():
    assert len(Windows(np.arange(4), seq_len=4, stride=1)) == 0
    assert len(Windows(np.arange(5), seq_len=4, stride=9)) == 1


def test_batches_are_a_function_of_seed_and_step():
    def epochs(seed):
        steps = [batch_indices(10, seed=seed, step=step, batch_size=4) for step in range(10)]
        return np.concatenate(steps).reshape(4, 10)

    first = epochs(42)
    assert np.array_equal(first, epochs(42))
    assert np.array_equal(batch_indices(10, seed=42, step=7, batch_size=4), first.flatten()[28:32])
    for epoch in first:
        assert sorted(epoch) == list(range(10))  # every window once, even though batches straddle epochs
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, epochs(101))


@settings(max_examples=60, deadline=None)
@given(
    n_windows=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4),
    held=st.booleans(),
)
def test_processes_see_every_window_of_an_epoch_once(n_windows, batch_size, worlds, held):
    """However many there are, and where their number changes in mid-run."""
    epochs = 3
    seen = []
    with mock.patch.object(batches, "HELD_IN_MEMORY", 1 << 24 if held else 0):
        for step in range(-(-epochs * n_windows // batch_size)):
            world = worlds[step * len(worlds) * batch_size // (epochs * n_windows) % len(worlds)]
            indices = batch_indices(n_windows, seed=3, step=step, batch_size=batch_size)
            for rank in range(world):
                seen.extend(indices[share(batch_size, rank=rank, world=world)].tolist())
    for epoch in range(epochs):
        assert sorted(seen[epoch * n_windows : (epoch + 1) * n_windows]) == list(range(n_windows))


def test_the_order_of_many_windows_is_computed_place_by_place(monkeypatch):
    n = 10**9 + 7
    indices = batch_indices(n, seed=42, step=3, batch_size=4096)  # numpy's permutation would take 8 GB
    assert len(set(indices.tolist())) == 4096
    assert 0 <= indices.min() < n / 1000
    assert n * 0.999 < indices.max() < n
    assert not np.array_equal(indices, batch_indices(n, seed=43, step=3, batch_size=4096))
    monkeypatch.setattr(batches, "HELD_IN_MEMORY", 0)
    n = 20_000
    orders = [batches._shuffled(n, 42, epoch, np.arange(n)) for epoch in range(3)]
    for order, other in zip(orders, [np.arange(n), *orders], strict=False):
        assert sorted(order) == list(range(n))
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.04  # 5.6 standard deviations
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04


def test_the_order_of_few_windows_stays():
    assert batch_indices(1000, seed=42, step=124, batch_size=8).tolist() == [526, 141, 706, 548, 609, 961, 973, 648]


def test_spread_covers_the_range_evenly():
    assert spread(10, 100).tolist() == list(range(10))
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert len(spread(1000, 37)) == 37
