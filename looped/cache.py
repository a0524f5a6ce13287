"""Keys and values of tokens seen before, so that generation computes every token once.

A row of a cache is a sequence; a column is a place in it. A batch of sequences of different lengths is padded on the
left, so that all rows end in the same column: row b has its first token in column `starts[b]`, and that token has
position 0. Nothing attends to the padding.

Every layer of the prelude, of every loop and of the coda has a slot: keys and values of all columns. A token is at loop
k when the layers of loop k compute it.

    own slots       a slot for each (loop, layer): at loop k a token attends to the keys of loop k of itself and of all
                    tokens before it. It is what the model does without a cache.
    shared slots    a slot for each layer, which every loop overwrites. At loop k a token attends to the keys of loop k
                    of itself and of the tokens that are computed together with it, as a prompt's are, and to the keys
                    of the *last* loop of all tokens computed before. It takes a K-th of the memory, and is another
                    function than the model's own (Ouro's reuse of the last step, arXiv 2510.25741; Huginn's sharing
                    with a budget of one, 2502.05171).
    prelude, coda   a slot for each layer. A token's keys in the coda are those of the loop at which it was read last.

A token that leaves early, after loop e, has at loop k the keys and values of loop min(k, e), and in the coda those of
its reading at loop e. `CachedRows.left` and `carry_forward` see to that.

Sizes never change, and columns are tensors: a CUDA graph can hold a step that reads and writes a cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.config import LoopedConfig, at_least
from looped.context import Attend, Part


class KeyValueCache:
    """Slots for `batch_size` rows of `capacity` columns, for n_loops loops of a model of this shape.

    starts: [B] int64, the column of every row's first token; 0 where it is not given.
    """

    def __init__(
        self,
        config: LoopedConfig,
        batch_size: int,
        capacity: int,
        n_loops: int,
        *,
        shared: bool = False,
        starts: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raises ValueError unless the sizes are at least 1, and the learned positions enough for the capacity."""
        at_least(1, batch_size=batch_size, capacity=capacity, n_loops=n_loops)
        if config.positions == "learned" and capacity > config.max_seq_len:
            raise ValueError(
                "capacity must be at most max_seq_len with learned positions. "
                f"Got capacity={capacity}, max_seq_len={config.max_seq_len}."
            )
        if starts is not None and starts.shape != (batch_size,):
            raise ValueError(f"starts must have shape [B] = [{batch_size}]. Got {list(starts.shape)}.")
        self.config = config
        self.batch_size = batch_size
        self.capacity = capacity
        self.n_loops = n_loops
        self.shared = shared
        self.starts = torch.zeros(batch_size, dtype=torch.int64, device=device) if starts is None else starts
        heads = (batch_size, capacity, config.n_heads, config.head_dim)
        # Zeros: a column without a token is multiplied with 0, which must not meet what happens to be in the memory.
        sizes: dict[Part, tuple[int, int]] = {
            "prelude": (1, config.n_prelude),
            "loop": (1 if shared else n_loops, config.n_layers),
            "coda": (1, config.n_coda),
        }
        self._slots = {  # of each part [2, loops, layers, B, capacity, H, head_dim]: keys, then values
            part: torch.zeros(2, *size, *heads, device=device, dtype=dtype) for part, size in sizes.items()
        }

    @property
    def n_bytes(self) -> int:
        return sum(slots.numel() * slots.element_size() for slots in self._slots.values())

    def columns(self, first: int, count: int) -> Tensor:
        """[count] int64: columns first, first + 1, ... Raises ValueError if the cache does not have them."""
        if first < 0 or first + count > self.capacity:
            raise ValueError(
                f"a cache must not be written beyond its {self.capacity} columns. "
                f"Got {count} columns from column {first}."
            )
        return torch.arange(first, first + count, device=self.starts.device)

    def positions(self, columns: Tensor) -> Tensor:
        """[B, T] int64, of the tokens in columns [T]; 0 for padding."""
        return (columns - self.starts.unsqueeze(1)).clamp(min=0)

    def rows(self, columns: Tensor, width: int | None = None) -> "CachedRows":
        """How tokens [B, T] in columns [T] attend.

        width: how many columns are looked at; must be above every one of `columns`. None for all, as the columns'
        values are not known on the host.
        """
        keys = torch.arange(self.capacity if width is None else width, device=columns.device)
        queries = columns.unsqueeze(1)  # [T, 1]
        seen = (keys <= queries) & (keys >= self.starts.view(-1, 1, 1))  # [B, T, W]
        # Padding sees itself: a softmax over nothing would be nan.
        return CachedRows(self, columns, (seen | (keys == queries)).unsqueeze(1))

    def slot(self, part: Part, loop: int, layer: int) -> Tensor:
        """Keys and values [2, B, capacity, H, head_dim] of one layer. Raises ValueError if the cache has no such layer
        or loop."""
        slots = self._slots[part]
        n_loops = self.n_loops if part == "loop" else 1
        if not (0 <= loop < n_loops and 0 <= layer < slots.shape[2]):
            raise ValueError(
                f"a cache must have the loops and layers that are run. Got {part} layer {layer} at loop {loop + 1}; "
                f"the cache has {slots.shape[2]} layers and {n_loops} loops{' that share them' * self.shared}."
            )
        return slots[:, 0 if slots.shape[1] == 1 else loop, layer]

    def carry_forward(self, columns: Tensor, loop: int) -> None:
        """Gives the tokens in columns [T] their keys and values of `loop` at all loops after it, none of which ran."""
        slots = self._slots["loop"]
        rest = slots.shape[1] - loop - 1
        if rest > 0:
            last = slots[:, loop : loop + 1].index_select(4, columns)
            slots[:, loop + 1 :].index_copy_(4, columns, last.expand(-1, rest, -1, -1, -1, -1, -1))


@dataclass(frozen=True)
class CachedRows:
    """Tokens [B, T] in columns [T] of a cache: the `looped.context.Cache` of one forward pass over them.

    mask: [B, 1, T, W] bool, which of the first W columns each token sees.
    left: [B, T] bool, the tokens that left before the loop at hand, whose keys and values it must not change; None if
    none has.
    """

    cache: KeyValueCache
    columns: Tensor
    mask: Tensor
    left: Tensor | None = None

    def at(self, part: Part, loop: int, layer: int) -> Attend:
        """Raises ValueError as `KeyValueCache.slot` does. What it returns raises it for rows of another model."""
        slot = self.cache.slot(part, loop, layer)
        before = slot if loop == 0 else self.cache.slot(part, loop - 1, layer)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._check(k)
            for place, kept, new in zip(slot, before, (k, v), strict=True):
                new = new.to(place.dtype)
                if self.left is not None:
                    new = torch.where(self.left[..., None, None], kept.index_select(1, self.columns), new)
                place.index_copy_(1, self.columns, new)
            keys, values = slot[:, :, : self.mask.shape[-1]].transpose(2, 3)  # [B, H, W, head_dim] each
            query = q.to(keys.dtype).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
            return mixed.transpose(1, 2).to(q.dtype)

        return attend

    def _check(self, k: Tensor) -> None:
        config = self.cache.config
        wanted = (self.cache.batch_size, len(self.columns), config.n_heads, config.head_dim)
        if k.shape != wanted:
            raise ValueError(
                "a cache must be of the model and the batch that use it: keys [B, T, H, head_dim] must be "
                f"{list(wanted)}. Got {list(k.shape)}."
            )
