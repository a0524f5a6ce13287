"""Every global access of a Triton kernel, counted in the interpreter: bytes by argument, bounds, conflicts.

An access counts where its mask is on, and must be of an element of an argument: of the view that was given, not of
what else its storage holds.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter

PADDED = {"logits_ptr"}  # whose rows may be read and written past their columns, up to the next row


@dataclass(frozen=True)
class View:
    """Where the elements of an argument are: the first one's address, their bytes, sizes and strides in elements."""

    start: int
    itemsize: int
    dims: tuple[tuple[int, int], ...]  # (size, stride)

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "View":
        dims = list(zip(tensor.shape, tensor.stride(), strict=True))
        if name in PADDED:
            dims[1] = (dims[0][1], 1)
        return cls(tensor.data_ptr(), tensor.element_size(), tuple(dims))

    def holds(self, addresses: np.ndarray, n_bytes: int) -> np.ndarray:
        """Which addresses are those of elements; of nested strides, as every tensor here has."""
        element, rest = np.divmod(addresses - self.start, self.itemsize)
        inside = (rest == 0) & (element >= 0) & (n_bytes == self.itemsize)
        for size, stride in sorted(self.dims, key=lambda dim: -dim[1]):
            index, element = np.divmod(element, stride) if stride else (np.zeros_like(element), element)
            inside &= index < size
        return inside & (element == 0)


@dataclass
class Launch:
    """One launch: bytes loaded and stored by argument.  Raises AssertionError before an access out of bounds."""

    kernel: str
    views: dict[str, View]
    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    atomics: int = 0
    reads: dict[tuple, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))  # addresses by program
    writes: dict[tuple, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    @property
    def programs(self) -> int:
        return len(self.writes)

    def note(self, program: tuple, pointers: np.ndarray, mask: np.ndarray, n_bytes: int, *, store: bool) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask].astype(np.int64).ravel()
        (self.writes if store else self.reads)[program].append(addresses)
        if store:
            assert len(np.unique(addresses)) == len(addresses), f"{self.kernel}: one store writes an address twice"
        inside = np.zeros(addresses.shape, bool)
        for name, view in self.views.items():
            here = view.holds(addresses, n_bytes) & ~inside
            (self.stored if store else self.loaded)[name] += int(here.sum()) * n_bytes
            inside |= here
        # before the access is made: it could overwrite the interpreter's own memory
        assert inside.all(), f"{self.kernel}, program {program}: {int((~inside).sum())} accesses out of bounds"

    def conflicts(self) -> int:
        """Addresses that one program writes and another reads or writes."""
        written = [np.unique(np.concatenate(parts)) for parts in self.writes.values()]
        owner = np.concatenate(written)
        twice = len(owner) - len(np.unique(owner))
        for program, parts in self.reads.items():
            others = [np.unique(np.concatenate(p)) for other, p in self.writes.items() if other != program]
            if others:
                twice += int(np.isin(np.unique(np.concatenate(parts)), np.concatenate(others)).sum())
        return twice


class Audit:
    """Counts while its patches are on; `launches` in order."""

    def __init__(self, monkeypatch) -> None:
        self.launches: list[Launch] = []
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def note(builder, ptrs, mask, *, store: bool) -> None:
            n_bytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)  # a bool takes a byte
            program = tuple(builder.grid_idx)
            self.launches[-1].note(program, np.asarray(ptrs.data), np.asarray(mask.data, bool), n_bytes, store=store)

        def counted_load(builder, ptrs, mask, *rest):
            note(builder, ptrs, mask, store=False)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            note(builder, ptrs, mask, store=True)
            return store(builder, ptrs, value, mask, *rest)

        def counted_call(executor, *args, **kwargs):
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            views = {name: View.of(name, tensor) for name, tensor in tensors.items()}
            assert len({view.start for view in views.values()}) == len(views), f"arguments overlap: {sorted(views)}"
            self.launches.append(Launch(executor.fn.__name__, views))
            return call(executor, *args, **kwargs)

        def counted_atomic(*_):
            self.launches[-1].atomics += 1
            raise AssertionError("an atomic access")

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        monkeypatch.setattr(builder, "create_atomic_rmw", counted_atomic)
        monkeypatch.setattr(builder, "create_atomic_cas", counted_atomic)
        monkeypatch.setattr(executor, "__call__", counted_call)
