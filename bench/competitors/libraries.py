"""The functions of other libraries that are compared with ours, each called in one place.

A library is imported when its function is called.  Where one is missing, or its own code raises, the implementation
that uses it is skipped and the record says why.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.implementation import why_missing
from bench.shapes import DEVICE

LIGER_MISSING = why_missing("liger_kernel", needs_gpu=True)
LIGER_CUTE_MISSING = LIGER_MISSING or why_missing("cutlass", needs_gpu=True)
QUACK_MISSING = why_missing("quack", needs_gpu=True)
CUT_MISSING = why_missing("cut_cross_entropy")
TORCH_CHUNKED_MISSING = None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"


# Norms: y of x [N, d]; with a residual y and the sum of both ---------------------------------------------------------


def liger_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, in_place=False)


def liger_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


def quack_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=eps)


def quack_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


# Mean cross-entropy of rows [N, d] against a head [V, d], the logits never all in memory ---------------------------


def torch_chunked(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(rows, head, targets, options=nn.LinearCrossEntropyOptions())


def cut_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor, **options: object) -> Tensor:
    """`filter_eps=None` keeps gradients below 2.4e-4: more than a uniform probability at V = 20,000."""
    from cut_cross_entropy import linear_cross_entropy

    if DEVICE.type == "cpu":
        options = {"impl": "torch_compile"} | {k: v for k, v in options.items() if k != "filter_eps"}
    return linear_cross_entropy(rows, head, targets, **options)


def liger_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor, accumulator: torch.dtype | None = None) -> Tensor:
    """accumulator: of dW's sum over its chunks; None: the head's dtype."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(rows, head, targets, accum_dtype=accumulator)


def liger_cute_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Liger's kernels for Hopper: bfloat16, logits computed again in the backward pass, dW rounded to bfloat16 between
    waves of 1024 tokens."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    return LigerFusedScaledCrossEntropySM90Function.apply(rows, head, targets).mean()


def quack_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """quack chooses: on Hopper, for vocabularies of whole tiles, softmax in the products' epilogues."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(rows, head, targets)
