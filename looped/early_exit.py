"""Early exit for whole sequences: the loops of a token that has stopped are not computed.

Each loop is applied to the tokens that are still active, and to no others. Then a policy gives them scores
(looped/halting.py), and those that leave get their logits. A token leaves at the first loop e < K whose score is at
least tau, and at K otherwise.

The rule for what was not computed: at loop k a query attends, in every layer, to the keys and values that each token
had at its loop min(k, e). They cost one buffer a layer, [B, T, H, head_dim] each, which the active tokens overwrite at
every loop. The coda has such buffers too, so that a token read at loop k sees what the coda made of H_min(k, e). Later
tokens' states thus differ a little from those that all loops of all tokens give. No token sees a later one.

The active tokens of all sequences stand in one row [1, N], so that norms, projections and MLP take N tokens and no
more. For attention the queries are padded to [B, A], A the most that one sequence has left, and masked. Which tokens
leave is decided on the host: one copy of N booleans a loop, which a GPU's host waits for.

A policy that reads logits costs a readout of every active token at every loop. Any other costs one head product a
token. The coda, if there is one, is then applied to all active tokens: at every loop for the gate, and for the state's
change only at the loops where a token leaves.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.attention import causal_attention
from looped.config import at_least
from looped.context import Attend, Part
from looped.halting import Policy, Seen, check_tau
from looped.model import LoopedLM


class Exits(NamedTuple):
    """loops: [B, T] int64, 1 to K, after which each token left. logits: [B, T, V], of its state then."""

    loops: Tensor
    logits: Tensor


@torch.no_grad()
def run_with_exits(model: LoopedLM, tokens: Tensor, policy: Policy, tau: float, *, n_loops: int | None = None) -> Exits:
    """Up to K = n_loops loops of tokens [B, T], each until it leaves. Default: the trained n_loops.

    A state is read as training reads it: the `final-only` readout normalises loop K alone.
    Raises ValueError for a tau that is nan, n_loops < 1 or a model in training mode, and for tokens as
    `LoopedLM.forward` does.
    """
    n_loops = model.config.n_loops if n_loops is None else n_loops
    _check(model, tau, n_loops)
    embedded = model.embed(tokens)
    keys, device = LatestKeys(*tokens.shape), tokens.device
    active = torch.arange(tokens.numel())  # places in the flattened batch, on the host
    embedded = embedded.flatten(0, 1).unsqueeze(0)
    state, score = model.start(embedded), None
    left: list[tuple[int, Tensor, Tensor]] = []
    for loop in range(n_loops):
        context = model.context(state, positions=keys.choose(active, device), cache=keys)
        before, state = state, model.apply_loop(state, loop, embedded, context)
        if loop == n_loops - 1:
            left.append((n_loops, active, model.readout_logits(state, context=context)))
            break
        read = model.read(state, context) if policy.reads or policy.reads_logits else None
        logits = model.head_logits(read, final=False) if read is not None and policy.reads_logits else None
        score = policy.score(Seen(before, state, logits, score, read))
        leaves = (score[0] >= tau).cpu()
        if not leaves.any():
            continue
        leaving, staying = (where.nonzero().flatten() for where in (leaves, ~leaves))
        if logits is None:
            read = model.read(state, context) if read is None else read
            logits = model.head_logits(read[:, leaving.to(device)], final=False)
        else:
            logits = logits[:, leaving.to(device)]
        left.append((loop + 1, active[leaving], logits))
        active = active[staying]
        if len(active) == 0:
            break
        state, embedded, score = (rows[:, staying.to(device)] for rows in (state, embedded, score))
    return _in_place(left, tokens)


def _check(model: LoopedLM, tau: float, n_loops: int) -> None:
    check_tau(tau)
    at_least(1, n_loops=n_loops)
    if model.training:
        raise ValueError("model must be in evaluation mode: dropout and noise would change the exits. Call .eval().")


def _in_place(left: list[tuple[int, Tensor, Tensor]], tokens: Tensor) -> Exits:
    """The loop, places [n] and logits [1, n, V] of those that left together, each at its token's place."""
    loops = torch.empty(tokens.numel(), dtype=torch.int64)
    logits = left[0][2][0]
    if len(left) > 1:
        logits = logits.new_empty(tokens.numel(), logits.shape[-1])
    for loop, places, of_places in left:
        loops[places] = loop
        if len(left) > 1:
            logits[places.to(tokens.device)] = of_places[0]
    return Exits(loops.view(tokens.shape).to(tokens.device), logits.view(*tokens.shape, -1))


class LatestKeys:
    """Keys and values of all B * T tokens, of the last loop that each has been through; a `Cache`."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.kept: dict[tuple[Part, int], tuple[Tensor, Tensor]] = {}  # of a layer: [B * T, H, head_dim] each

    def choose(self, active: Tensor, device: torch.device) -> Tensor:
        """Say which tokens the rows are from now on: their places [N] in the flattened batch, rising, on the host.

        Returns the rows' positions in their sequences, [1, N].
        """
        sequences, positions = active // self.length, active % self.length
        self.all_active = len(active) == self.batch * self.length
        if not self.all_active:
            counts = torch.bincount(sequences, minlength=self.batch)
            most = int(counts.max())
            first = (counts.cumsum(0) - counts)[sequences]
            slots = sequences * most + torch.arange(len(active)) - first
            last_seen = torch.zeros(self.batch * most, dtype=torch.int64)  # a slot that is filled up sees token 0
            last_seen[slots] = positions
            self.active, self.slots, last_seen = active.to(device), slots.to(device), last_seen.to(device)
            self.visible = torch.arange(self.length, device=device) <= last_seen.view(self.batch, 1, most, 1)
        return positions.unsqueeze(0).to(device)

    def at(self, part: Part, loop: int, layer: int) -> Attend:
        return partial(self._attend, (part, layer))

    def _attend(self, layer: tuple[Part, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [1, N, H, head_dim]. Returns the same shape."""
        sequences = (self.batch, self.length, *q.shape[2:])
        if self.all_active:
            self.kept[layer] = k[0], v[0]
            return causal_attention(*(rows.view(sequences) for rows in (q, k, v))).reshape(q.shape)
        keys, values = self.kept[layer]
        keys[self.active], values[self.active] = k[0], v[0]
        most = self.visible.shape[2]
        queries = q.new_zeros(self.batch * most, *q.shape[2:])
        queries[self.slots] = q[0]
        q, k, v = (
            rows.transpose(1, 2)
            for rows in (queries.view(self.batch, most, *q.shape[2:]), keys.view(sequences), values.view(sequences))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible)  # [B, H, A, head_dim]
        return mixed.transpose(1, 2).flatten(0, 1)[self.slots].unsqueeze(0)
