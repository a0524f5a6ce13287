"""Attention against an explicit softmax; dropout; memory; rotary positions."""

import functools
import types
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_case import explicit_attention, random_qkv
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looped import attention
from looped.attention import SelfAttention, causal_attention, rotary_table, rotate
from looped.config import LoopedConfig
from looped.context import Context
from looped.implementation import PLAIN


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and which of the large ones are still alive."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.largest = 0
        self.seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
                if leaf.numel() >= self.large:
                    self.seen.append(weakref.ref(leaf))
        return result

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.seen)


@pytest.mark.parametrize("shape", [(2, 16, 4, 8), (1, 1, 1, 4), (3, 37, 2, 20), (2, 130, 3, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_agrees_with_explicit_softmax(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = random_qkv(*shape, dtype=dtype)
    upstream = torch.randn(shape, dtype=dtype)
    actual = causal_attention(q, k, v)
    assert actual.dtype == dtype
    gradients = torch.autograd.grad(actual, (q, k, v), upstream)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = explicit_attention(*wide)
    torch.testing.assert_close(actual.double(), truth, atol=tolerance, rtol=tolerance)
    expected = torch.autograd.grad(truth, wide, upstream.double())
    for name, gradient, wanted in zip("qkv", gradients, expected, strict=True):
        torch.testing.assert_close(
            gradient.double(), wanted, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_small_heads_in_half_precision_are_mixed_in_fp32(autocast: bool) -> None:
    q, k, v = random_qkv(2, 33, 3, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = causal_attention(q, k, v)
    assert torch.equal(actual, causal_attention(q.float(), k.float(), v.float()).bfloat16())  # rounded once


def test_writes_no_scores() -> None:
    q, k, v = random_qkv(2, 128, 4, 16)
    scores = 2 * 4 * 128 * 128
    with LargestTensor(scores) as record:
        causal_attention(q, k, v).sum().backward()
    assert q.numel() <= record.largest < scores


def test_dropout_keeps_away_from_what_is_activated_in_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention-3 and 4 are, which refuse dropout."""
    flash_allowed: list[bool] = []

    def record(q: Tensor, *_: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        flash_allowed.append(torch.backends.cuda.flash_sdp_enabled())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q, k, v = random_qkv(1, 4, 1, 64)
    torch.nn.attention.register_flash_attention_impl("a test's", register_fn=lambda: types.SimpleNamespace(remove=dict))
    for activated in (False, True):
        if activated:
            torch.nn.attention.activate_flash_attention_impl("a test's")
        try:
            attention._attend(q, k, v, 0.1)
            attention._attend(q, k, v, 0.0)
        finally:
            torch.nn.attention.restore_flash_attention_impl()
    assert flash_allowed == [True, True, False, True]


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((2, 8, 4), (2, 8, 4)), ((2, 8, 4, 8), (2, 9, 4, 8)), ((2, 8, 4, 8), (2, 8, 2, 8))])
def test_rejects_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"q, k and v must have one shape \[B, T, H, head_dim\]"):
        causal_attention(torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0])
def test_rejects_dropout(dropout_p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
        causal_attention(*random_qkv(1, 4, 1, 4), dropout_p=dropout_p)


# Rotary positions -----------------------------------------------------------------------------------------------------


def test_rotation_is_a_complex_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 50, 3, 16)
    cos, sin = rotary_table(torch.arange(50), 16, 1000.0)
    assert cos.shape == sin.shape == (50, 8)
    assert cos.dtype == sin.dtype == torch.float32

    frequencies = 1000.0 ** (-torch.arange(8, dtype=torch.float64) * 2 / 16)
    phases = torch.polar(torch.ones(50, 8).double(), torch.arange(50).double()[:, None] * frequencies)
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * phases[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1).float()
    torch.testing.assert_close(rotate(x, cos, sin), expected, atol=2e-5, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 40, 1, 32)
    table = rotary_table(torch.arange(40), 32, 10000.0)
    products = torch.einsum("bthd,bshd->ts", rotate(q, *table), rotate(k, *table))
    for distance in (0, 3, 20):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert products[:, 0].std() > 0.1


def test_rotation_is_done_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 1, 64).bfloat16()
    table = rotary_table(torch.arange(4000), 64, 10000.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rotate(x, *table)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, rotate(x.float(), *table).bfloat16())  # rounded once


# The module -----------------------------------------------------------------------------------------------------------


def small_config(**changes: Any) -> LoopedConfig:
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "d_model": 24,
        "n_heads": 3,
        "n_layers": 1,
        "d_ff": 32,
        "max_seq_len": 16,
        "dropout": 0.5,
    }
    return LoopedConfig(**{**shape, **changes})


def test_projection_holds_q_then_k_then_v_with_heads_inside() -> None:
    torch.manual_seed(0)
    module = SelfAttention(small_config()).eval()
    x = torch.randn(2, 7, 24)
    q, k, v = (
        torch.stack([x @ module.qkv.weight[part * 24 + h * 8 : part * 24 + h * 8 + 8].T for h in range(3)], dim=2)
        for part in range(3)
    )
    expected = explicit_attention(q, k, v).reshape(2, 7, 24) @ module.output.weight.T
    mixed, stream = module(x, None, nn.Identity(), Context(PLAIN))
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-5)
    assert stream is x


def test_dropout_acts_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = functools.partial(causal_attention)

    def record(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float) -> Tensor:
        seen.append(dropout_p)
        return original(q, k, v, dropout_p=dropout_p)

    monkeypatch.setattr(attention, "causal_attention", record)
    module = SelfAttention(small_config())
    for training in (True, False):
        module.train(training)(torch.randn(1, 4, 24), None, nn.Identity(), Context(PLAIN))
    assert seen == [0.5, 0.0]
