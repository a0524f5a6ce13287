import numpy as np
import torch

from train.batches import Windows, batch_indices, spread


def test_windows_overlap_by_the_stride():
    windows = Windows(np.arange(20, dtype=np.uint16), seq_len=4, stride=3)
    assert len(windows) == 6  # the last starts at 15 and ends with the last token
    inputs, targets = windows.gather(np.array([0, 5]))
    assert inputs.tolist() == [[0, 1, 2, 3], [15, 16, 17, 18]]
    assert targets.tolist() == [[1, 2, 3, 4], [16, 17, 18, 19]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_evaluation_windows_predict_every_token_once():
    windows = Windows(np.arange(21), seq_len=4, stride=4)
    _, targets = windows.gather(np.arange(len(windows)))
    assert targets.flatten().tolist() == list(range(1, 21))


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


def test_spread_covers_the_range_evenly():
    assert spread(10, 100).tolist() == list(range(10))
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert len(spread(1000, 37)) == 37
