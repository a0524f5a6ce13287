"""`RMSNorm` and `LoopedReadout`: the operations as modules, for models that are built of modules."""

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import FLOAT32_MAX, Readout, States, check_number, check_options, gathered
from .device import accumulator, autocast_dtype, autocasts
from .looped_cross_entropy import LoopedCrossEntropy, looped_cross_entropy, normed
from .rms_norm import RMSNormPenalty, rms_norm_penalty
from .statistics import ReadoutStatistics, readout_statistics
from .vocabulary_shard import VocabularyShard, rows_here

Head = nn.Linear | nn.Embedding
PARAMETERS = ("weight", "bias")  # of a head and of a norm: all that a readout uses


class RMSNorm(nn.RMSNorm):
    """A drop-in for `torch.nn.RMSNorm`: the same constructor, state dict and results, from `rms_norm_penalty`.

    `y = weight * x * (mean(x^2) + eps)^(-1/2)`, the mean over the last dimensions, which are `normalized_shape`.
    eps None: the machine epsilon of the dtype that the mean is formed in, float32 for 16 bits, as in PyTorch.
    y has x's dtype, under autocast too, so that a norm inside the recurrence does not round the state.
    No second derivatives. On a GPU x is float32, bfloat16 or float16.
    """

    def forward(  # type: ignore[override]  # more results where more is asked for
        self, x: Tensor, residual: Tensor | None = None, *, mean_square: bool = False
    ) -> Tensor | RMSNormPenalty:
        """y of x [..., *normalized_shape]; with a residual, or on request, what else the same pass gives.

        residual: of x's shape, added to x before the norm. mean_square: whether it is wanted.
        With either the result is RMSNormPenalty: `y`; `mean_square` [...], float32 and differentiable, of what is
        normed; `residual`, the sum x + residual, or None.
        Raises TypeError and ValueError for a tensor that does not fit, as `rms_norm_penalty` does.
        """
        rows = self._rows("x", x)
        more = None if residual is None else self._rows("residual", residual)
        weight = None if self.weight is None else self.weight.flatten()
        with torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext():
            result = rms_norm_penalty(rows, weight, eps=_eps(self, x.dtype), residual=more)
        y = result.y.view(x.shape)
        if residual is None and not mean_square:
            return y
        total = None if result.residual is None else result.residual.view(x.shape)
        return RMSNormPenalty(y, result.mean_square, total)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """x with the normed dimensions as one."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor. Got {type(x).__name__}.")
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            expected = ", ".join(map(str, self.normalized_shape))
            raise ValueError(f"{name} must have shape [..., {expected}]. Got {tuple(x.shape)}.")
        return x.flatten(-len(self.normalized_shape))


class LoopedReadout(nn.Module):
    """norm, head and cross-entropy of every loop of a recurrent model, by `looped_cross_entropy`.

    The readout borrows the model's own modules: it neither copies nor registers them. So the parameters keep their
    names and stand once in the state dict, and a checkpoint from before the readout still loads. They move, cast,
    shard and train with the model. The model must therefore hold the modules elsewhere. A call raises where a module is
    gone, because nobody else held it or because the model has replaced it. Otherwise a head that no optimizer knows
    would silently never train. A deep copy and a pickle of the model have a readout of their own modules.

    The weights are read at every call; the forward hooks of the two modules do not run.

    Args:
        head: nn.Linear, with or without bias, or the nn.Embedding of a model that ties its embedding.
        norm: what stands before the head, or None for nothing. It may be any module that computes an RMSNorm or a
            LayerNorm of rows [d] from `weight`, `bias` (None where it has none) and `eps` or `variance_epsilon`:
            PyTorch's, `RMSNorm`, those of transformers' Llama, Mistral, T5. It is called once to see whether it does.
            Where the module rounds in between, the readout does not: it sums in float32 and rounds once.
        final_only: no norm before the last loop, and `norm`, an RMSNorm, at the last.
        penalty, weights, label_smoothing, softcap, z_loss, ignore_index, reduction, chunk_rows: as for
            `looped_cross_entropy`, as numbers. They are attributes that may change.
        shard: the head's weight and bias are this process's rows of them (`VocabularyShard.of(V)`), or DTensors that
            are sharded by rows; as for `looped_cross_entropy`. There are no `logits` then.

    Raises:
        TypeError, ValueError: a head or a norm whose result the readout would not reproduce; an option out of range.
    """

    def __init__(
        self,
        head: Head,
        norm: nn.Module | None,
        *,
        final_only: bool = False,
        penalty: float = 0.0,
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk_rows: int | None = None,
        shard: VocabularyShard | None = None,
    ) -> None:
        super().__init__()
        _check_head(head)
        if shard is not None:
            rows_here("head", head.weight, shard)
        self.readout: Readout = "raw" if norm is None else _formula(norm, head.weight)
        if final_only:
            if self.readout != "rmsnorm":
                raise ValueError(f"norm must be an RMSNorm for final_only. Got {type(norm).__name__}.")
            self.readout = "final-only"
        check_number("penalty", penalty, 0)
        check_number("z_loss", z_loss, 0)
        check_options(
            head.weight, penalty=penalty, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss,
            reduction=reduction, n_targets=None, chunk_rows=chunk_rows, ignore_index=ignore_index,
        )  # fmt: skip
        if weights is not None and (isinstance(weights, str) or not isinstance(weights, Sequence)):
            got = type(weights).__name__
            raise TypeError(f"weights must be a sequence of numbers or None; a tensor goes to the call. Got {got}.")
        for loop, weight in enumerate(weights or ()):
            check_number(f"weights[{loop}]", weight, -FLOAT32_MAX)
        self.penalty, self.z_loss, self.label_smoothing, self.softcap = penalty, z_loss, label_smoothing, softcap
        self.ignore_index, self.reduction, self.chunk_rows = ignore_index, reduction, chunk_rows
        self.weights, self.shard = weights, shard
        self._borrow(head, norm)

    # The borrowed modules ---------------------------------------------------------------------------------------------

    def _borrow(self, head: Head, norm: nn.Module | None) -> None:
        self._head: weakref.ref[Head] = weakref.ref(head)
        self._norm = None if norm is None else weakref.ref(norm)

    @property
    def head(self) -> Head:
        """The model's. Raises RuntimeError where it is gone."""
        head = self._head()
        if head is None:
            raise _gone("head")
        return head

    @property
    def norm(self) -> nn.Module | None:
        """The model's, or None. Raises RuntimeError where it is gone."""
        norm = None if self._norm is None else self._norm()
        if norm is None and self._norm is not None:
            raise _gone("norm")
        return norm

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_head": self.head, "_norm": self.norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        head, norm = state.pop("_head"), state.pop("_norm")
        super().__setstate__(state)
        self._borrow(head, norm)

    def extra_repr(self) -> str:
        """The readout, and the penalty where there is one."""
        return f"readout={self.readout!r}" + (f", penalty={self.penalty}" if self.penalty else "")

    # Calls ------------------------------------------------------------------------------------------------------------

    def _parameters_of(self, dtype: torch.dtype) -> dict[str, Any]:
        """The parameters of norm and head for states of `dtype`, by the names of the operations' arguments."""
        parameters: dict[str, Any] = {
            "readout": self.readout,
            "bias": _parameter(self.head, "bias"),
            "shard": self.shard,
        }
        norm = self.norm
        if norm is None:
            return parameters
        weight, bias = (_parameter(norm, name) for name in PARAMETERS)
        return parameters | {"norm_weight": weight, "norm_bias": bias, "eps": _eps(norm, dtype)}

    def forward(
        self,
        states: States,
        targets: Tensor,
        *,
        n_targets: float | Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
        penalty: float | Tensor | None = None,
        statistics: bool = False,
    ) -> LoopedCrossEntropy:
        """The loss of K states [K, ..., d], or K times [..., d], for targets [...]: that of `looped_cross_entropy`.

        n_targets, weights, penalty, statistics: as there. weights and penalty take the place of the constructor's: a
        tensor of weights may be learned, and one of the penalty may follow a schedule in one compiled graph.
        """
        return looped_cross_entropy(
            states, self.head.weight, targets, **self._parameters_of(_dtype(states)), n_targets=n_targets,
            weights=self.weights if weights is None else weights, penalty=self.penalty if penalty is None else penalty,
            label_smoothing=self.label_smoothing, softcap=self.softcap, z_loss=self.z_loss,
            ignore_index=self.ignore_index, reduction=self.reduction, statistics=statistics, chunk_rows=self.chunk_rows,
        )  # fmt: skip

    def statistics(self, states: States, targets: Tensor | None = None) -> ReadoutStatistics:
        """What every loop predicts for every token, without gradients: `readout_statistics` of the states."""
        return readout_statistics(
            states, self.head.weight, targets, **self._parameters_of(_dtype(states)),
            ignore_index=self.ignore_index, softcap=self.softcap,
        )  # fmt: skip

    def logits(self, state: Tensor, *, last: bool = True) -> Tensor:
        """The logits [..., V] of one state [..., d], in the dtype of its products; differentiable.

        last: whether it is the last loop's, the only one that a final-only readout norms.
        """
        if self.shard is not None:
            raise ValueError("logits need the whole head. Got a readout of a shard.")
        norm, dtype, y = self.norm, autocast_dtype(state), state
        if norm is not None:
            weight, bias = (gathered(_parameter(norm, name)) for name in PARAMETERS)
            y = normed(state, self.readout, weight, bias, _eps(norm, state.dtype), final=last)
        head, bias = gathered(self.head.weight), gathered(_parameter(self.head, "bias"))
        logits = F.linear(y.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _dtype(states: States) -> torch.dtype:
    """The states' dtype; float32 where they are none, which the operation then says."""
    first = states if isinstance(states, Tensor) else states[0] if isinstance(states, Sequence) and states else None
    return first.dtype if isinstance(first, Tensor) else torch.float32


# What a module computes -----------------------------------------------------------------------------------------------


def _gone(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} must be held by the model whose readout this is. Got one that is gone: "
        "keep it there under a name, and where it was replaced make a new LoopedReadout."
    )


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _eps(norm: nn.Module, dtype: torch.dtype) -> float:
    """The norm's eps for an input of `dtype`; None means the machine epsilon of its sums, as in PyTorch."""
    eps: Any = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return torch.finfo(accumulator(dtype)).eps if eps is None else eps


def _check_names(name: str, module: nn.Module, known: tuple[str, ...] = PARAMETERS) -> None:
    """Raise where the module has tensors that the readout would not use, outside those of the names `known`."""
    tensors = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    unused = [tensor for tensor in tensors if tensor.split(".")[0] not in known]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        got = f"{type(module).__name__} with {', '.join(unused[:3])}{more}"
        raise ValueError(f"{name} must have no parameters and buffers but weight and bias. Got {got}.")


def _check_head(head: nn.Module) -> None:
    """Raise unless logits = head.weight @ y + head.bias."""
    if getattr(type(head), "forward", None) not in (nn.Linear.forward, nn.Embedding.forward):
        raise TypeError(f"head must be an nn.Linear or nn.Embedding, with its forward. Got {type(head).__name__}.")
    _check_names("head", head, (*PARAMETERS, "parametrizations"))  # which are computed when they are read


class _WithoutHooks(nn.Module):
    """Calls a module's `forward` itself, whose hooks may gather a sharded model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


def _formula(norm: nn.Module, head: Tensor) -> Readout:
    """Which norm the module computes, "rmsnorm" or "layernorm". Raises where it is neither.

    Classes and names do not tell: some norms multiply by 1 + weight, some add eps elsewhere. So the module is called,
    with parameters and rows for which such norms differ, on the head's device (the CPU where that is meta).
    """
    name, d = type(norm).__name__, head.shape[1]
    if not isinstance(norm, nn.Module):
        raise TypeError(f"norm must be a module or None. Got {name}.")
    _check_names("norm", norm)
    if not (hasattr(norm, "eps") or hasattr(norm, "variance_epsilon")):
        raise ValueError(f"norm must have eps or variance_epsilon. Got {name}.")
    device = torch.device("cpu") if head.is_meta else head.device
    ramp = torch.linspace(0, 1, d, dtype=torch.float32, device=device)
    values = {"weight": 0.5 + ramp, "bias": 2 * ramp - 1}
    for key in PARAMETERS:
        parameter = _parameter(norm, key)
        if parameter is None:
            del values[key]
        elif parameter.shape != (d,):
            raise ValueError(f"norm.{key} must have the head's columns ({d},). Got {tuple(parameter.shape)} of {name}.")

    eps = _eps(norm, torch.float32)
    check_number("eps", eps, 0)
    scales = torch.tensor([1.0, 30.0, eps**0.5 or 1.0], device=device)  # in the last row eps weighs
    x = (scales[:, None] * (3 * ramp - 1)).unsqueeze(0)  # [1, 3, d]
    try:
        y = torch.func.functional_call(_WithoutHooks(norm), {f"module.{key}": v for key, v in values.items()}, (x,))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"norm must norm float32 rows of {d} on {device}. {name} raised: {reason}") from error
    weight, bias = values.get("weight"), values.get("bias")
    formulas: tuple[Readout, ...] = ("layernorm", "rmsnorm")
    for formula in formulas:
        wanted = normed(x, formula, weight, bias, eps)
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y.float(), wanted, rtol=1e-2, atol=1e-2):
            return formula
    rule = f"norm must compute an RMSNorm without bias or a LayerNorm of rows of {d}"
    raise ValueError(f"{rule}. Got {name}, which computes something else.")
