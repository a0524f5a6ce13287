"""The two ways in which a model computes: with the functions of `kernels`, or in plain PyTorch.

Both compute the same. The plain one is what one would write without this project: it is the baseline that the fused one
is measured against, and its readout is the definition that the kernels are tested against.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from looped.kernels import (
    LoopedCrossEntropy,
    ReadoutStatistics,
    looped_cross_entropy,
    readout_statistics,
    rms_norm_penalty,
    swiglu,
)
from looped.kernels.device import product_autocast
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference
from looped.kernels.statistics import readout_statistics_reference
from looped.kernels.swiglu import swiglu_reference


@dataclass(frozen=True)
class Implementation:
    """The operations of a model in which fused and plain differ.

    add_and_normalise: (x, delta, norm) -> (RMSNorm(x + delta), x + delta), each [B, T, d]. delta may be None, which
        stands for 0. The sum keeps x's dtype.
    glu: (gate, up) -> silu(gate) * up, each [..., d_ff].
    joins: whether a norm and the products that read it are one node of autograd's graph (looped/normed_products.py).
    product_context: the context in which products of a tensor are formed. The fused one turns autocast off on a CPU
        that gains nothing by its dtype.
    readout_loss: takes the arguments of `kernels.looped_cross_entropy`.
    readout_statistics: takes the arguments of `kernels.readout_statistics`.
    """

    add_and_normalise: Callable[[Tensor, Tensor | None, nn.RMSNorm], tuple[Tensor, Tensor]]
    glu: Callable[[Tensor, Tensor], Tensor]
    joins: bool
    product_context: Callable[[Tensor], AbstractContextManager[object]]
    readout_loss: Callable[..., LoopedCrossEntropy]
    readout_statistics: Callable[..., ReadoutStatistics]


# What PyTorch's layers do when they are called, before anybody else has changed it.
FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {kind: kind.forward for kind in (nn.Linear, nn.RMSNorm)}


def does_only(module: nn.Module, forwards: Mapping[type[nn.Module], Callable[..., Any]]) -> bool:
    """Whether calling the module is to call its class's forward, as `forwards` has it, and nothing else."""
    kind = type(module)
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None or hooks
    return kind in forwards and kind.forward is forwards[kind] and not replaced


def _add_and_normalise_fused(x: Tensor, delta: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """One kernel for the sum and its norm. A norm that is more than PyTorch's is called."""
    if not does_only(norm, FORWARDS) or norm.eps is None:
        return _add_and_normalise(x, delta, norm)
    if delta is None:
        return rms_norm_penalty(x, norm.weight, eps=norm.eps).y, x
    normalised, _, total = rms_norm_penalty(delta, norm.weight, eps=norm.eps, residual=x)
    assert total is not None  # a residual was given
    return normalised, total


def _add_and_normalise(x: Tensor, delta: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    x = x if delta is None else x + delta
    return norm(x), x


def _no_context(x: Tensor) -> AbstractContextManager[object]:
    return nullcontext()


FUSED = Implementation(
    add_and_normalise=_add_and_normalise_fused,
    glu=swiglu,
    joins=True,
    product_context=product_autocast,
    readout_loss=looped_cross_entropy,
    readout_statistics=readout_statistics,
)
PLAIN = Implementation(
    add_and_normalise=_add_and_normalise,
    glu=swiglu_reference,
    joins=False,
    product_context=_no_context,
    readout_loss=looped_cross_entropy_reference,
    readout_statistics=readout_statistics_reference,
)
