"""What enters a loop: the state that is fed back, what the prelude made of the tokens, and what marks the loop.

    G = H             none        | H + E           add
      = W [H; E]      concat      | a * H + b * E   diagonal: a = exp(-softplus(alpha)), so 0 < a < 1
    Inject_k(H, E) = G + e_k + U_k V_k^T G

concat is Huginn's adapter (arXiv 2502.05171). diagonal is Parcae's (arXiv 2604.12946): its decay a lets the scale of
old states die out. e_k is a loop embedding. U_k V_k^T is a low-rank update of rank `loop_rank`, in the manner of Bae et
al. (arXiv 2410.20672). All start so that they change little: W as nn.Linear starts, a = b = 1/2, e_k = U_k = 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.config import LoopedConfig


class Injection(nn.Module):
    """`Inject_k`, in the state's dtype, under autocast too. It has no parameters but those that its config asks for."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.kind = config.injection
        self.n_loops = config.n_loops
        d_model, rank = config.d_model, config.loop_rank
        if self.kind == "concat":
            self.adapter = nn.Linear(2 * d_model, d_model, bias=False)
        if self.kind == "diagonal":
            self.decay = nn.Parameter(torch.zeros(d_model))  # alpha
            self.gain = nn.Parameter(torch.full((d_model,), 0.5))  # b
        self.loop_embedding = nn.Parameter(torch.zeros(config.n_loops, d_model)) if config.loop_embedding else None
        self.loop_rank = rank
        if rank > 0:
            self.down = nn.Parameter(torch.randn(config.n_loops, rank, d_model) * d_model**-0.5)  # V_k^T
            self.up = nn.Parameter(torch.zeros(config.n_loops, d_model, rank))  # U_k

    def forward(self, state: Tensor, embedded: Tensor | None, loop: int) -> Tensor:
        """state H and embedded E: [B, T, d]. loop counts from 0."""
        entering = self._joined(state, embedded)
        known = min(loop, self.n_loops - 1)  # the loops beyond those trained are like the last
        if self.loop_embedding is not None:
            entering = entering + self.loop_embedding[known]
        if self.loop_rank > 0:
            update = F.linear(F.linear(entering, self.down[known]), self.up[known])
            entering = entering + update
        return entering

    def _joined(self, state: Tensor, embedded: Tensor | None) -> Tensor:
        if self.kind == "none" or embedded is None:
            return state
        if self.kind == "add":
            return state + embedded
        if self.kind == "concat":
            return self.adapter(torch.cat((state, embedded), dim=-1)).to(state.dtype)
        return self.state_decay() * state + self.gain * embedded

    def state_decay(self) -> Tensor:
        """a [d], by which the diagonal injection multiplies the state's channels."""
        return torch.exp(-F.softplus(self.decay))
