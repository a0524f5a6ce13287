"""The decoder's call of flash-attn against the signature of the package that is installed, where one is.

tests/test_attention.py checks values through a stand-in; this checks that the real function takes that call, and that
what the call leaves out (window, soft cap, slopes, probabilities) is off by default.
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

# flash-attn 2: what causal_attention gives, and the defaults that its result relies on
GIVEN = {"dropout_p": 0.0, "causal": True}
DEFAULTS = {
    "softmax_scale": None,  # 1 / sqrt(head_dim)
    "window_size": (-1, -1),  # no window
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_attn_probs": False,  # one tensor, not a tuple
}


def breaches(function: Callable[..., Any]) -> list[str]:
    """How a function's signature breaks the decoder's contract with flash_attn_func."""
    signature = inspect.signature(function)
    found = []
    try:
        signature.bind("q", "k", "v", **GIVEN)
    except TypeError as error:
        found.append(str(error))
    if list(signature.parameters)[:3] != ["q", "k", "v"]:
        found.append(f"q, k, v must come first. Got {list(signature.parameters)[:3]}.")
    for name, default in DEFAULTS.items():
        parameter = signature.parameters.get(name)
        if parameter is not None and parameter.default != default:
            found.append(f"{name} must default to {default}. Got {parameter.default}.")
    return found


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_installed_package():
    from flash_attn import flash_attn_func

    assert breaches(flash_attn_func) == []


def test_documented_signature():
    """As flash-attn 2.8 documents it."""

    def documented(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        pass

    assert breaches(documented) == []


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
