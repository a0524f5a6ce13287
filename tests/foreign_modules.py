"""Norms, heads and a recurrent model as other people write them."""

import torch
import torch.nn.functional as F
from torch import nn

from looped.kernels import LoopedReadout, RMSNorm

D, VOCABULARY = 24, 37


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Norms that others write ----------------------------------------------------------------------------------------------


class LlamaNorm(nn.Module):
    """transformers' LlamaRMSNorm."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.variance_epsilon = 1e-4

    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


class CohereNorm(LlamaNorm):
    """A LayerNorm without bias."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OnePlusWeight(LlamaNorm):
    """Gemma's, whose weight starts at 0."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class OnePlusLayerNorm(nn.LayerNorm):
    """Nemotron's: PyTorch's class and parameters, another result."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class EpsBesideTheRoot(LlamaNorm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class SquaredWeight(LlamaNorm):
    """The same as long as the weight is 1."""

    def forward(self, x):
        return super().forward(x) * self.weight


class PartialNorm(LlamaNorm):
    """pRMSNorm: the scale of the first quarter of the channels."""

    def forward(self, x):
        part = x[..., : max(1, x.shape[-1] // 4)]
        return self.weight * x * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class BiasedNorm(LlamaNorm):
    def __init__(self, d):
        super().__init__(d)
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return super().forward(x) + self.bias


class ScaledNorm(LlamaNorm):
    """A parameter more, which starts where it does nothing."""

    def __init__(self, d):
        super().__init__(d)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class PairNorm(LlamaNorm):
    def forward(self, x):
        return super().forward(x), x


NORMS = {
    "nn.RMSNorm": lambda: nn.RMSNorm(D, eps=1e-3),
    "nn.RMSNorm without eps": lambda: nn.RMSNorm(D),
    "RMSNorm": lambda: RMSNorm(D, eps=1e-3),
    "RMSNorm without weight": lambda: RMSNorm(D, elementwise_affine=False),
    "Llama": lambda: LlamaNorm(D),
    "nn.LayerNorm": lambda: nn.LayerNorm(D),
    "nn.LayerNorm without bias": lambda: nn.LayerNorm(D, bias=False),
    "nn.LayerNorm without parameters": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "Cohere": lambda: CohereNorm(D),
    "none": lambda: None,
}
HEADS = {
    "nn.Linear": lambda: nn.Linear(D, VOCABULARY),
    "nn.Linear without bias": lambda: nn.Linear(D, VOCABULARY, bias=False),
    "nn.Embedding": lambda: nn.Embedding(VOCABULARY, D),
}


class Model(nn.Module):
    """A recurrent model of someone else's: one layer K times, a norm, a head, and a readout of the two."""

    def __init__(self, norm="nn.RMSNorm", head="nn.Linear", n_loops=3, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.n_loops = nn.Linear(D, D), n_loops
        self.norm, self.lm_head = NORMS[norm](), HEADS[head]()
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 1.0)
        self.readout = LoopedReadout(self.lm_head, self.norm, **options)

    def states(self, x):
        states = []
        for _ in range(self.n_loops):
            x = x + torch.tanh(self.layer(x))
            states.append(x)
        return states

    def plain(self, states, targets, penalty=0.0, final_only=False, softcap=None):
        """The mean loss as one writes it with modules."""
        losses = []
        for loop, state in enumerate(states):
            y = state if self.norm is None or (final_only and loop < len(states) - 1) else self.norm(state)
            head = self.lm_head
            logits = F.linear(y, head.weight) if isinstance(head, nn.Embedding) else head(y)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            losses.append(F.cross_entropy(logits.flatten(0, -2).to(torch.float32), targets.flatten()))
        return torch.stack(losses).mean() + penalty * torch.stack(states).float().square().mean()

    def forward(self, x, targets):
        return self.readout(self.states(x), targets).loss


def batch(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, D, generator=generator)
    targets = torch.randint(VOCABULARY, (2, 5), generator=generator)
    targets[0, 1] = -100
    return x.to(device, dtype), targets.to(device)
