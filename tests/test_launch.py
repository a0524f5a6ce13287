"""The launch of a kernel: which compiled kernel serves which arguments.  No kernel runs."""

import pytest
import torch
import triton

from looped.kernels.launch import launch


class Kernel(triton.JITFunction):
    """A kernel that notes the arguments that it is compiled for; what it compiles to does nothing."""

    def __init__(self) -> None:
        self.compiled_for: list[tuple] = []

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, grid):
        def run(*arguments, **_):
            self.compiled_for.append(arguments)
            return {grid: lambda *_: None}

        return run


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(torch.version, "hip", None)
    return Kernel()


def words(first: int) -> torch.Tensor:
    """Four words, the first of them so many after an address that is a multiple of 64."""
    memory = torch.empty(64)
    start = -memory.data_ptr() % 64 // 4 + first
    return memory[start : start + 4]


def run(kernel: Kernel, *arguments) -> None:
    tensors = [x for x in arguments if x is None or isinstance(x, torch.Tensor)]
    launch(kernel, (1, 1, 1), tensors, *arguments[len(tensors) :], num_warps=4)


def test_a_kernel_is_compiled_once_for_arguments_of_a_kind(kernel):
    for x, y in ((words(0), words(4)), (words(4), words(0)), (words(8), words(8))):
        run(kernel, x, y, 7, 1)
    assert len(kernel.compiled_for) == 1
    for x in (words(0).half(), None):
        run(kernel, words(0), x, 7, 1)
    for numbers in ((8, 1), (7, 1.0), (7, True)):
        run(kernel, words(0), words(0), *numbers)
    for first in (1, 3):
        run(kernel, words(first), words(0), 7, 1)
    assert len(kernel.compiled_for) == 7


@pytest.mark.parametrize(("first", "second"), [((0, 1), (1, 0)), ((1, 0), (0, 1)), ((2, 3), (3, 0)), ((0, 2), (2, 2))])
def test_a_kernel_for_aligned_tensors_is_not_launched_on_others(kernel, first, second):
    """Triton reads and writes 16 bytes at once where an address is a multiple of 16, and faults where it is not."""
    run(kernel, *map(words, first))
    run(kernel, *map(words, second))
    aligned = [tuple(x.data_ptr() % 16 == 0 for x in arguments) for arguments in kernel.compiled_for]
    assert aligned[-1] == tuple(word % 4 == 0 for word in second)
