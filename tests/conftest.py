"""Backends of the kernels' tests: the CPU implementation, and the Triton kernels (natively on a GPU, else interpreted).

Triton decides when a kernel is *defined* whether it will be interpreted, and the ops decide when they are *called*
whether a CPU tensor goes to Triton; so without a GPU the variable is set while the kernels are imported and again by
the fixture for the tests that want it.
"""

import functools
import gc
import inspect
import os

import numpy as np
import pytest
import torch

for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]  # the programs that tests start are no workers
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from looped.kernels import (  # noqa: E402, F401
    cross_entropy_triton,
    radial_triton,
    row_norm_triton,
    row_weights_triton,
    swiglu_triton,
)

os.environ.pop("TRITON_INTERPRET", None)
os.environ.pop("PYTHONUNBUFFERED", None)  # programs write as they do for a user

patch_language = interpreter._patch_lang


def patch_language_once(function):
    """The interpreter does it for every function that a kernel calls, where nothing is left to be patched."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return patch_language(function)
    return interpreter._LangPatchScope()


@functools.cache
def builtins(package):
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package, builder, scope):
    """As the interpreter does, whose search takes longer than many a kernel."""
    for name in builtins(package):
        if tl.core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_lang, interpreter._patch_builtin = patch_language_once, patch_builtins


def pytest_collection_finish() -> None:
    """What is imported now stays: nothing looks through it for garbage, which is most of the time of a collection."""
    gc.freeze()


truncating_convert = interpreter._convert_float


def rounding_convert(data, source, target, rounding_mode):
    """float32 to bfloat16 rounded to nearest even, as hardware does; the interpreter truncates."""
    if source == tl.float32 and target == tl.bfloat16:
        # ascontiguousarray copies what torch may not alias; values go through torch, whose rounding is right
        rounded = torch.from_numpy(np.ascontiguousarray(data).copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    return truncating_convert(data, source, target, rounding_mode)


def fused_multiply_add(_, x, y, z):
    """x * y + z, rounded once, as hardware does; the interpreter rounds the product too."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


@pytest.fixture(params=["cpu", "triton"])
def backend(request, monkeypatch) -> str:
    """Runs the test on both implementations."""
    if request.param == "triton" and not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(interpreter, "_convert_float", rounding_convert)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused_multiply_add)
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return torch.device("cuda" if backend == "triton" and HAS_GPU else "cpu")


@pytest.fixture
def poisoned():
    """Every uninitialised buffer is filled with nan, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def no_picture():
    """Runs draw no report.png, which takes as long as all else that they do here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.picture.draw", lambda *arguments: None)
        yield
