"""How rows attend that are padded, or that follow others: with a mask, and with the keys and values of a cache.

The cache is one of transformers' own, so that what it does with caches (beams, assisted generation, offloading) works.
Every layer of the prelude, of the coda and of every loop has a place in it, in this order: at loop k a token attends to
the keys of loop k of itself and of all tokens before it, as without a cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from looped.attention import causal_attention
from looped.config import LoopedConfig
from looped.context import Attend, Part


@dataclass(frozen=True)
class Rows:
    """Rows [B, T] of tokens: the `looped.context.Cache` of one forward pass over them.

    mask: [B, 1, T, W] bool, which of the W tokens up to the last one each of the T sees; None where none came before
    the T, and each sees all that are not after it.
    dropout_p: of the attention weights.
    """

    config: LoopedConfig
    mask: Tensor | None
    cache: Cache | None
    dropout_p: float

    def at(self, part: Part, loop: int, layer: int) -> Attend:
        config = self.config
        first = {"prelude": 0, "coda": config.n_prelude, "loop": config.n_prelude + config.n_coda}[part]
        place = first + loop * config.n_layers + layer

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.mask is None:
                if self.cache is not None:
                    self.cache.update(k.transpose(1, 2), v.transpose(1, 2), place)
                return causal_attention(q, k, v, dropout_p=self.dropout_p)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, head_dim]
            if self.cache is not None:
                k, v = self.cache.update(k, v, place)
            mask = F.pad(self.mask, (0, k.shape[2] - self.mask.shape[3]))  # a static cache has room for more
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout_p)
            return mixed.transpose(1, 2)

        return attend


def is_padded_on_the_left(attention_mask: Tensor) -> bool:
    """Whether a token of some row comes after padding [B, T]. What comes after a row's last token is seen by none."""
    return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def positions_of(attention_mask: Tensor) -> Tensor:
    """[B, T] int64: how many tokens are before each; 0 for padding on the left."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def mask_of(attention_mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor:
    """[B or 1, 1, T, W] bool for the last T = length of W = past + length tokens.

    attention_mask: [B, W], 0 for padding; None without any.
    """
    keys = torch.arange(past + length, device=device)
    queries = keys[past:].unsqueeze(1)
    seen = (keys <= queries).unsqueeze(0)
    if attention_mask is not None:
        seen = seen & attention_mask.bool().unsqueeze(1) | (keys == queries)  # a softmax over nothing would be nan
    return seen.unsqueeze(1)
