"""Every global access of a Triton kernel, counted in the interpreter: bytes by argument, bounds, conflicts.

An access counts where its mask is on.  Attribution goes by storage, so every argument of a launch needs its own.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter


@dataclass
class Launch:
    """One launch: bytes loaded and stored by argument.  Raises AssertionError before an access out of bounds."""

    kernel: str
    spans: dict[str, tuple[int, int]]  # of each argument's storage
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
        for name, (start, stop) in self.spans.items():
            here = (addresses >= start) & (addresses + n_bytes <= stop)
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
            n_bytes = ptrs.get_element_ty().primitive_bitwidth // 8
            program = tuple(builder.grid_idx)
            self.launches[-1].note(program, np.asarray(ptrs.data), np.asarray(mask.data, bool), n_bytes, store=store)

        def counted_load(builder, ptrs, mask, *rest):
            note(builder, ptrs, mask, store=False)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            note(builder, ptrs, mask, store=True)
            return store(builder, ptrs, value, mask, *rest)

        def counted_call(executor, *args, **kwargs):
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
            spans = {name: (s.data_ptr(), s.data_ptr() + s.nbytes()) for name, s in storages.items()}
            assert len(set(spans.values())) == len(spans), f"arguments share a storage: {sorted(spans)}"
            self.launches.append(Launch(executor.fn.__name__, spans))
            return call(executor, *args, **kwargs)

        def counted_atomic(*_):
            self.launches[-1].atomics += 1
            raise AssertionError("an atomic access")

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        monkeypatch.setattr(builder, "create_atomic_rmw", counted_atomic)
        monkeypatch.setattr(builder, "create_atomic_cas", counted_atomic)
        monkeypatch.setattr(executor, "__call__", counted_call)
