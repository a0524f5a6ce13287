"""The decoder's calls of flash-attn against the signatures of the packages that are installed, where any are.

tests/test_flash_attention.py checks values through stubs; this checks that the real functions take those calls, and
that what the calls leave out (window, soft cap, slopes, sinks, probabilities) is off by default.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from looped.flash_attention import DISTRIBUTIONS, FLASH_2, FLASH_4, MODULES, _release

# what causal_attention gives, and the defaults that its result relies on
GIVEN = {FLASH_2: {"dropout_p": 0.0, "causal": True}, FLASH_4: {"causal": True}}
DEFAULTS = {
    FLASH_2: {
        "softmax_scale": None,  # 1 / sqrt(head_dim)
        "window_size": (-1, -1),  # no window
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_attn_probs": False,  # one tensor, not a tuple
    },
    FLASH_4: {
        "qv": None,
        "softmax_scale": None,
        "window_size": (None, None),
        "learnable_sink": None,
        "softcap": 0.0,
        "score_mod": None,
        "mask_mod": None,
    },
}


def breaches(function: Callable[..., Any], name: str = FLASH_2) -> list[str]:
    """How a function's signature breaks the decoder's contract with the flash_attn_func of FLASH_2 or FLASH_4."""
    signature = inspect.signature(function)
    found = []
    try:
        signature.bind("q", "k", "v", **GIVEN[name])
    except TypeError as error:
        found.append(str(error))
    if list(signature.parameters)[:3] != ["q", "k", "v"]:
        found.append(f"q, k, v must come first. Got {list(signature.parameters)[:3]}.")
    for option, default in DEFAULTS[name].items():
        parameter = signature.parameters.get(option)
        if parameter is not None and parameter.default != default:
            found.append(f"{option} must default to {default}. Got {parameter.default}.")
    return found


@pytest.mark.parametrize("name", [FLASH_2, FLASH_4])
def test_installed_package(name):
    if not _release(name):
        pytest.skip(f"{DISTRIBUTIONS[name]} is not installed")
    assert breaches(importlib.import_module(MODULES[name]).flash_attn_func, name) == []


def test_documented_signatures():
    """As flash-attn 2.8 and flash-attn-4 4.0.0b36 document them."""

    def documented(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        pass

    def documented_4(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        pass

    assert breaches(documented) == []
    assert breaches(documented_4, FLASH_4) == []
    assert breaches(documented, FLASH_4) == ["window_size must default to (None, None). Got (-1, -1)."]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda q, k, v, causal=False: None, "unexpected keyword argument 'dropout_p'"),
        (lambda q, k, v, *, cu_seqlens, dropout_p=0.0, causal=False: None, "missing a required argument"),
        (lambda qkv, k, v, dropout_p=0.0, causal=False: None, "q, k, v must come first"),
        (lambda q, k, v, dropout_p=0.0, causal=False, softcap=30.0: None, "softcap must default to 0.0. Got 30.0"),
    ],
)
def test_other_signatures(changed, message):
    assert any(message in breach for breach in breaches(changed))
