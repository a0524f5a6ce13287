"""Arrays in several files: token ids too many for one, written so that a killed process loses the last file at most.

A split has files ``<split>-00000.tokens``, -00001 and so on: its token ids, one file after the other. The .bounds files
beside them have, as int64, where in the split each document begins, and at the end its length.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from looped.whole_file import digest_of, replacing

SHARD_BYTES = 1 << 28  # of token ids, after which a new file begins


class Shards:
    """Arrays of one dimension, one after the other, as one array that can be read at any positions."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """What is at ``positions``, integers of any shape, from 0 on. Raises IndexError beyond the end."""
        positions = np.asarray(positions)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"positions must be from 0 to {len(self) - 1}. Got {positions.min()}..{positions.max()}.")
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        found = np.empty(positions.shape, dtype=self.dtype)
        for number in np.flatnonzero(np.bincount(numbers.ravel(), minlength=1)):
            here = numbers == number
            found[here] = self.parts[number][positions[here] - self._starts[number]]
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Shard:
    """A file of tokens that is whole, and the one of bounds.

    tokens: of this file. end: tokens of the split up to here. groups: of the text, done up to here. lossless: whether
    its tokens stand for the bytes of the text. digests: of both files, by name.
    """

    tokens: int
    end: int
    groups: int
    lossless: bool
    digests: dict[str, str]


def names_of(split: str, number: int) -> tuple[str, str, str]:
    """Files of a shard: its tokens, its bounds, and what is kept about it until all are there."""
    name = f"{split}-{number:05d}"
    return f"{name}.tokens", f"{name}.bounds", f"{name}.shard.json"


def finished(directory: Path, split: str) -> list[Shard]:
    """The shards that are there, up to the first that is not as it was written."""
    shards: list[Shard] = []
    while True:
        try:
            content = json.loads((directory / names_of(split, len(shards))[2]).read_text(encoding="utf-8"))
            shard = Shard(**content)
            if any(digest_of(directory / name) != digest for name, digest in shard.digests.items()):
                return shards
        except (OSError, ValueError, TypeError, AttributeError):
            return shards
        shards.append(shard)


class ShardWriter:
    """Writes shard ``number`` of a split, which begins at token ``start`` of it."""

    def __init__(self, directory: Path, split: str, number: int, start: int) -> None:
        self._directory = directory
        self._names = names_of(split, number)
        scratch = [directory / f"{name}.{os.getpid()}" for name in self._names[:2]]
        self._files = [open(path, "wb") for path in scratch]  # noqa: SIM115  closed by finish or abandon
        self._digests = [hashlib.blake2b(digest_size=16) for _ in self._files]
        self.start, self.end = start, start
        self._lossless = True
        if start == 0:
            self._write(1, np.zeros(1, dtype=np.int64))

    @property
    def full(self) -> bool:
        return self._files[0].tell() >= SHARD_BYTES

    def add(self, tokens: np.ndarray, ends: np.ndarray, *, lossless: bool) -> None:
        """``ends``: where in ``tokens`` a document ends, each one beyond its last token."""
        self._write(0, tokens)
        self._write(1, ends.astype(np.int64) + self.end)
        self.end += len(tokens)
        self._lossless = self._lossless and lossless

    def finish(self, groups: int) -> Shard:
        """Give the files their names. ``groups``: of the text, done with this shard."""
        digests = {}
        for file, name, digest in zip(self._files, self._names, self._digests, strict=False):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, self._directory / name)
            digests[name] = digest.hexdigest()
        shard = Shard(self.end - self.start, self.end, groups, self._lossless, digests)
        with replacing(self._directory / self._names[2]) as scratch:
            scratch.write_text(json.dumps(asdict(shard)), encoding="utf-8")
        return shard

    def abandon(self) -> None:
        """Remove what has been written."""
        for file in self._files:
            if not file.closed:
                file.close()
                Path(file.name).unlink(missing_ok=True)

    def _write(self, which: int, values: np.ndarray) -> None:
        content = values.tobytes()
        self._files[which].write(content)
        self._digests[which].update(content)
