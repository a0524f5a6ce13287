"""The calls of `kernels` whose launches bench/offline/compile_survey.py compiles: every option that changes a launch.

Options are crossed with itertools.product; where a launch does not depend on the vocabulary (norms), that is small.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from looped.kernels import (
    VocabularyShard,
    looped_cross_entropy,
    radial_gradient,
    readout_statistics,
    rms_norm_penalty,
    swiglu,
)
from looped.kernels.cross_entropy import LossOptions, RowResults
from looped.kernels.sharded_cross_entropy import finish_rows, form_parts, n_parts

CHANNELS = (512, 768, 2048)
WIDE_CHANNELS = (4096,)
SHAPES = ((512, 20_000), (768, 20_000), (2048, 50_257), (2048, 128_256))  # d, V
# Vocabularies whose rows are one or two blocks, of 128 to 4096 columns.
SMALL_SHAPES = tuple((512, n_columns) for n_columns in (100, 500, 1000, 2000, 4000, 8000))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
YES_NO = (False, True)

Case = tuple[str, Callable[[], None]]


def _gpu(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=trained and dtype.is_floating_point)


def _vectors(length: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The forms of a parameter: absent, float32, of low precision, not trained."""
    forms = {"none": None, "float32": _gpu(length), "frozen": _gpu(length, trained=False)}
    return forms if dtype == torch.float32 else forms | {"low": _gpu(length, dtype=dtype)}


def norms(d: int, dtype: torch.dtype, everything: bool = True, rows: int = 4096) -> None:
    """rms_norm_penalty: dtypes of x, residual and weight, and which of its results have a gradient.

    The decoder's own are y and the sum, without the mean square; its first norm's x is float32 and its y is not.
    """
    weights = _vectors(d, dtype)
    residuals = {"none": None, "float32": _gpu(rows, d), "same": _gpu(rows, d, dtype=dtype)}
    autocasts = (False,) if dtype == torch.float32 else YES_NO
    used = [set(names) for n in (1, 2, 3) for names in itertools.combinations(("y", "mean_square", "residual"), n)]
    if not everything:
        weights, residuals = {"float32": weights["float32"]}, {k: residuals[k] for k in ("none", "float32")}
        used = [{"y"}, {"mean_square"}, {"y", "residual"}, {"y", "mean_square", "residual"}]
    for autocast, residual, weight in itertools.product(autocasts, residuals.values(), weights.values()):
        x = _gpu(rows, d, dtype=torch.float32 if autocast else dtype)
        with torch.autocast("cuda", dtype=dtype) if autocast else nullcontext():
            result = rms_norm_penalty(x, weight, residual=residual)
        for names in used:
            parts = [part for name in names if (part := getattr(result, name)) is not None]
            if len(parts) == len(names):
                torch.autograd.backward(parts, [torch.empty_like(part) for part in parts], retain_graph=True)


def radials(d: int, dtype: torch.dtype, rows: int = 4096) -> None:
    for dtypes in itertools.product({torch.float32, dtype}, repeat=2):
        sum(radial_gradient(*(_gpu(rows, d, dtype=one) for one in dtypes))).sum().backward()


def products_of_gates(d_ff: int, dtype: torch.dtype, rows: int = 4096) -> None:
    """swiglu: two tensors and the halves of one, and which of them has a gradient."""
    trained = ((True, True), (True, False), (False, True))
    pairs = [[_gpu(rows, d_ff, dtype=dtype, trained=on) for on in both] for both in trained]
    for gate, up in (*pairs, _gpu(rows, 2 * d_ff, dtype=dtype).chunk(2, dim=-1)):
        y = swiglu(gate, up)
        y.backward(torch.empty_like(y))


def readout_norms(d: int, dtype: torch.dtype, tokens: int = 1024) -> None:
    """The norms of looped_cross_entropy: form, parameters, penalty, statistics, states with and without a gradient."""
    head, targets = _gpu(1000, d, dtype=dtype), _gpu(tokens, dtype=torch.int64)
    vectors = _vectors(d, dtype)
    norms = [("raw", None, None), ("final-only", vectors["float32"], None)]
    norms += [("rmsnorm", weight, None) for weight in vectors.values()]
    norms += [("layernorm", *both) for both in itertools.product(vectors.values(), vectors.values())]
    for (readout, weight, bias), penalty, statistics, trained in itertools.product(norms, (0.0, 0.01), YES_NO, YES_NO):
        states = [_gpu(tokens, d, dtype=dtype, trained=trained) for _ in range(2)]
        options = {"penalty": penalty, "statistics": statistics, "norm_weight": weight, "norm_bias": bias}
        looped_cross_entropy(states, head, targets, readout=readout, **options).loss.backward()


def losses(d: int, n_columns: int, dtype: torch.dtype, everything: bool = True, tokens: int = 2048) -> None:
    """The loss of looped_cross_entropy: gradient, bias, softcap and statistics."""
    head, targets, weight = _gpu(n_columns, d, dtype=dtype), _gpu(tokens, dtype=torch.int64), _gpu(d)
    states = [_gpu(tokens, d, dtype=dtype) for _ in range(3)]
    flags = list(itertools.product(YES_NO, repeat=4))
    for gradient, bias, softcap, statistics in flags if everything else [flags[i] for i in (8, 9, 14, 15)]:
        with nullcontext() if gradient else torch.no_grad():
            options: dict[str, Any] = {"softcap": 30.0} if softcap else {}
            if bias:
                options["bias"] = _gpu(n_columns, dtype=dtype if softcap else torch.float32)
            loss = looped_cross_entropy(
                states, head, targets, norm_weight=weight, statistics=statistics, label_smoothing=0.1 * bias, **options
            ).loss
        if gradient:
            loss.backward()


def weightings(dtype: torch.dtype, everything: bool = True, tokens: int = 2048, d: int = 512) -> None:
    """The weights and sums of looped_cross_entropy: of loops and of tokens, one loop and many, every reduction."""
    head, targets, weight = _gpu(1000, d, dtype=dtype), _gpu(tokens, dtype=torch.int64), _gpu(d)
    loops = (1, 3, 16) if everything else (3,)  # Triton compiles apart for 1 and for multiples of 16
    for n_loops, reduction, penalty in itertools.product(loops, ("mean", "sum", "none"), (0.0, 0.01)):
        if reduction == "none" and penalty:
            continue
        states = [_gpu(tokens, d, dtype=dtype) for _ in range(n_loops)]
        per_loop = [0.0] * (n_loops - 1) + [1.0]
        for weights in (None, per_loop, _gpu(n_loops), _gpu(n_loops, tokens)):
            options: dict[str, Any] = {"weights": weights, "reduction": reduction, "penalty": penalty}
            options["norm_weight"] = weight
            looped_cross_entropy(states, head, targets, **options).loss.sum().backward()


def trainer_readout(d: int, n_columns: int, everything: bool = True, tokens: int = 2048) -> None:
    """As the trainer calls it: float32 states and parameters, products of autocast's dtype, every readout."""
    states, head, weight = [_gpu(tokens, d) for _ in range(3)], _gpu(n_columns, d), _gpu(d)
    readouts = ("rmsnorm", "layernorm", "raw", "final-only") if everything else ("rmsnorm",)
    dtypes = (torch.bfloat16, torch.float16) if everything else (torch.bfloat16,)
    for readout, dtype, statistics in itertools.product(readouts, dtypes, YES_NO):
        with torch.autocast("cuda", dtype=dtype):
            loss = looped_cross_entropy(
                states, head, _gpu(tokens, dtype=torch.int64), readout=readout,
                norm_weight=None if readout == "raw" else weight,
                norm_bias=_gpu(d) if readout == "layernorm" else None, penalty=0.01, statistics=statistics,
            ).loss  # fmt: skip
        loss.backward()


def statistics(d: int, n_columns: int, dtype: torch.dtype, everything: bool = True) -> None:
    """readout_statistics: bias and softcap."""
    states, head = _gpu(4, 2048, d, dtype=dtype), _gpu(n_columns, d, dtype=dtype)
    targets = _gpu(2048, dtype=torch.int64)
    for has_bias, softcap in itertools.product(YES_NO, YES_NO) if everything else [(False, False)]:
        bias = _gpu(n_columns, dtype=dtype if softcap else torch.float32) if has_bias else None
        readout_statistics(states, head, targets, norm_weight=_gpu(d), bias=bias, softcap=30.0 if softcap else None)


def sharded_losses(n_columns: int, dtype: torch.dtype, everything: bool = True, tokens: int = 2048) -> None:
    """The two passes over a rank's logits, an eighth of all: gradient, bias, softcap, weights and statistics.

    The kernels alone, as there is no process group to exchange what is between them.
    """
    shard = VocabularyShard(n_columns, group="", rank=1, n_ranks=8)
    width = shard.rows.stop - shard.rows.start
    targets, z_loss = _gpu(tokens, dtype=torch.int64), _gpu(trained=False)
    flags = list(itertools.product(YES_NO, repeat=4))
    for gradient, bias, softcap, statistics in flags if everything else [flags[i] for i in (8, 9, 14, 15)]:
        logits = _gpu(tokens, -(-width // 16) * 16, dtype=dtype, trained=False)[:, :width]
        options = LossOptions(softcap=30.0 if softcap else None)
        if bias:
            of_bias = _gpu(width, dtype=dtype if softcap else torch.float32, trained=False)
            options = options._replace(label_smoothing=0.1, z_loss=z_loss, bias=of_bias)
        parts = _gpu(n_parts(statistics=statistics), tokens, trained=False)
        form_parts(logits, targets, options, shard, parts)
        results = RowResults(_gpu(tokens), *((_gpu(3, tokens), _gpu(tokens, dtype=torch.int64)) if statistics else ()))
        finish_rows(
            logits, targets, _gpu(tokens) if bias else None, options, shard, _gpu(8, *parts.shape), results,
            gradient=gradient,
        )  # fmt: skip


def cases(sampled: bool) -> Iterator[Case]:
    """Named calls at every shape and dtype; sampled: those that a quick check takes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if sampled:
        yield "norms d=768 bf16", lambda: norms(768, bf16, everything=False)
        yield "radials d=768 bf16", lambda: radials(768, bf16)
        yield "products of gates d_ff=3072 bf16", lambda: products_of_gates(3072, bf16)
        yield "weightings bf16", lambda: weightings(bf16, everything=False)
        for d, n_columns, dtype in ((768, 20_000, fp32), (2048, 128_256, bf16)):
            yield f"losses d={d} V={n_columns} {dtype}", functools.partial(losses, d, n_columns, dtype, False)
            yield f"statistics d={d} V={n_columns} {dtype}", functools.partial(statistics, d, n_columns, dtype, False)
        for n_columns, dtype in ((20_000, fp32), (128_256, bf16)):
            yield f"sharded V={n_columns // 8}", functools.partial(sharded_losses, n_columns, dtype, False)
        yield "losses d=512 V=50257", functools.partial(losses, 512, 50_257, bf16, False)
        yield "trainer d=768 V=20000", lambda: trainer_readout(768, 20_000, everything=False)
        return
    for dtype in DTYPES:
        yield f"weightings {dtype}", functools.partial(weightings, dtype)
        for d in CHANNELS:
            yield f"norms d={d} {dtype}", functools.partial(norms, d, dtype)
            yield f"radials d={d} {dtype}", functools.partial(radials, d, dtype)
            yield f"readout norms d={d} {dtype}", functools.partial(readout_norms, d, dtype)
        yield f"products of gates d_ff=3072 {dtype}", functools.partial(products_of_gates, 3072, dtype)
        for d in WIDE_CHANNELS:
            yield f"norms d={d} {dtype}", functools.partial(norms, d, dtype, everything=False)
            yield f"radials d={d} {dtype}", functools.partial(radials, d, dtype)
        # Triton compiles apart for numbers of rows that are multiples of 16
        yield f"norms of 4095 rows {dtype}", functools.partial(norms, 768, dtype, everything=False, rows=4095)
        yield f"radials of 4095 rows {dtype}", functools.partial(radials, 768, dtype, rows=4095)
        yield f"weightings of 2047 tokens {dtype}", functools.partial(weightings, dtype, everything=False, tokens=2047)
        yield f"losses of 2047 tokens {dtype}", functools.partial(losses, 768, 20_000, dtype, tokens=2047)
        for d, n_columns in SHAPES + SMALL_SHAPES:
            yield f"losses d={d} V={n_columns} {dtype}", functools.partial(losses, d, n_columns, dtype)
        for _, n_columns in SHAPES + SMALL_SHAPES[2:3]:
            yield f"sharded V={-(-n_columns // 8)} {dtype}", functools.partial(sharded_losses, n_columns, dtype)
        for d, n_columns in SHAPES + SMALL_SHAPES[2:3]:
            yield f"statistics d={d} V={n_columns} {dtype}", functools.partial(statistics, d, n_columns, dtype)
    for d, n_columns in SHAPES[:2]:
        yield f"trainer d={d} V={n_columns}", functools.partial(trainer_readout, d, n_columns)
    for d, n_columns in SHAPES[2:]:
        yield f"trainer d={d} V={n_columns}", functools.partial(trainer_readout, d, n_columns, everything=False)
