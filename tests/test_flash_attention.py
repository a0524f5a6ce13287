"""Which implementation of attention serves, and what it is given, with stub packages in place of flash-attn."""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looped import attention, flash_attention
from looped.attention import causal_attention
from looped.flash_attention import FLASH_2, FLASH_4, SDPA, attention_implementation, flash_implementation

# What the two packages look like, with functions that record their calls. Both take [B, T, H, head_dim].
FUNCTION = """
import torch.nn.functional as F

calls = []

def flash_attn_func({parameters}):
    for x in (q, k, v):  # what the kernels take
        assert x.dtype == q.dtype and x.element_size() == 2 and x.stride(-1) == 1
    calls.append(({named}, tuple(q.shape)))
    layout = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*layout, is_causal=causal, scale=softmax_scale).transpose(1, 2)
    return {result}
"""
TWO = FUNCTION.format(
    parameters="q, k, v, dropout_p=0.0, softmax_scale=None, causal=False",
    named="dropout_p, causal",
    result="out",
)
FOUR = FUNCTION.format(
    parameters="q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False",
    named="causal",
    result="out, None",
)
BROKEN = "import a_library_that_is_not_there\n"


def install(site: Path, distribution: str, version: str, module: str, source: str) -> None:
    information = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    file = site / module
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


def install_2(site: Path, version: str = "2.8.3.post1+cu12torch2.11", source: str = TWO) -> None:
    install(site, "flash-attn", version, "flash_attn/__init__.py", source)


def install_4(site: Path, version: str = "4.0.0b19", source: str = FOUR) -> None:
    """As its wheel is, without flash_attn/__init__.py."""
    install(site, "flash-attn-4", version, "flash_attn/cute/__init__.py", source)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.device]:
    """Makes any device a GPU of a capability, of a CUDA build (hip: of a ROCm build)."""

    def make(capability: tuple[int, int], cuda: str | None = "12.8", hip: str | None = None) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda")

    return make


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A directory for packages, with nothing of flash-attn installed beside it."""

    def forget() -> None:
        flash_attention._flash_2_serves.cache_clear()
        flash_attention._flash_4_head_dim.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    with monkeypatch.context() as patch:
        directory = tmp_path / "site"
        directory.mkdir()
        patch.setattr(sys, "path", [str(directory), *(p for p in sys.path if not list(Path(p).glob("flash_attn*")))])
        forget()
        yield directory
    forget()


def chosen(device: torch.device, head_dim: int = 64) -> tuple[str, str, str]:
    """With dropout; without; without under torch.compile."""
    asked = ((0.1, False), (0.0, False), (0.0, True))
    dropping, plain, compiled = (flash_implementation(device, head_dim, *each) for each in asked)
    return dropping, plain, compiled


NEITHER, ONLY_2, ONLY_4, BOTH = (), (install_2,), (install_4,), (install_2, install_4)


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        (NEITHER, (7, 5), (SDPA, SDPA, SDPA)),
        (NEITHER, (8, 0), (SDPA, SDPA, SDPA)),
        (NEITHER, (10, 0), (SDPA, SDPA, SDPA)),
        (ONLY_2, (7, 5), (SDPA, SDPA, SDPA)),
        (ONLY_2, (8, 0), (FLASH_2, FLASH_2, FLASH_2)),
        (ONLY_2, (9, 0), (FLASH_2, FLASH_2, FLASH_2)),
        (ONLY_2, (10, 0), (FLASH_2, FLASH_2, FLASH_2)),
        (ONLY_2, (12, 1), (FLASH_2, FLASH_2, FLASH_2)),
        (ONLY_2, (11, 0), (SDPA, SDPA, SDPA)),
        (ONLY_4, (7, 5), (SDPA, SDPA, SDPA)),
        (ONLY_4, (8, 0), (SDPA, SDPA, SDPA)),
        (ONLY_4, (9, 0), (SDPA, FLASH_4, SDPA)),
        (ONLY_4, (10, 0), (SDPA, FLASH_4, SDPA)),
        (BOTH, (7, 5), (SDPA, SDPA, SDPA)),
        (BOTH, (8, 9), (FLASH_2, FLASH_2, FLASH_2)),
        (BOTH, (9, 0), (FLASH_2, FLASH_4, FLASH_2)),
        (BOTH, (10, 3), (FLASH_2, FLASH_4, FLASH_2)),
    ],
)
def test_what_serves(site, gpu, installed, capability, expected):
    for each in installed:
        each(site)
    assert chosen(gpu(capability)) == expected


@pytest.mark.parametrize(
    ("install", "version", "build", "expected"),
    [
        (install_2, "2.7.2", {"capability": (9, 0)}, FLASH_2),
        (install_2, "2.7.2", {"capability": (10, 0)}, SDPA),  # before there was code for it
        (install_2, "2.7.4.post1", {"capability": (10, 0)}, FLASH_2),
        (install_2, "2.8.3", {"capability": (12, 0), "cuda": "12.6"}, SDPA),  # whose compiler knows no 12.0
        (install_2, "1.0.9", {"capability": (8, 0)}, SDPA),
        (install_2, "3.1.0", {"capability": (9, 0)}, SDPA),  # a generation whose functions nobody has seen
        (install_2, "2.8.3", {"capability": (9, 4), "cuda": None, "hip": "6.4"}, FLASH_2),
        (install_4, "4.0.0b19", {"capability": (9, 4), "cuda": None, "hip": "6.4"}, SDPA),
        (install_4, "0.0.1", {"capability": (9, 0)}, SDPA),  # the name's placeholder
    ],
)
def test_versions_and_builds(site, gpu, install, version, build, expected):
    install(site, version)
    assert chosen(gpu(**build))[1] == expected


@pytest.mark.parametrize(("capability", "head_dim", "expected"), [((9, 0), 256, FLASH_4), ((10, 0), 192, FLASH_2)])
def test_large_heads(site, gpu, capability, head_dim, expected):
    for each in BOTH:
        each(site)
    assert chosen(gpu(capability), head_dim) == (FLASH_2, expected, FLASH_2)


def test_what_is_activated_in_sdpa_goes_before_flash_attn_and_never_with_dropout(site, gpu):
    for each in BOTH:
        each(site)
    name = "another test's"
    nn.attention.register_flash_attention_impl(name, register_fn=lambda: types.SimpleNamespace(remove=dict))
    nn.attention.activate_flash_attention_impl(name)
    try:
        device = gpu((9, 0))
        assert chosen(device) == (FLASH_2, SDPA, SDPA)
        assert attention_implementation(device, torch.bfloat16, 64, 0.0) == f"{SDPA}, {name} activated"
        assert attention_implementation(torch.device("cpu"), torch.float32, 64, 0.0) == SDPA
    finally:
        nn.attention.restore_flash_attention_impl()


def test_an_import_name_without_its_distribution_is_nothing(site, gpu):
    """flash_attn as a directory of something else, as `import flash_attn` would accept it."""
    (site / "flash_attn" / "data").mkdir(parents=True)
    assert chosen(gpu((9, 0))) == (SDPA, SDPA, SDPA)


@pytest.mark.parametrize(
    ("install", "distribution", "dropout"), [(install_2, "flash-attn", 0.1), (install_4, "flash-attn-4", 0.0)]
)
def test_a_broken_installation_is_an_error_of_one_line(site, gpu, install, distribution, dropout):
    install(site, source=BROKEN)
    with pytest.raises(ImportError, match="a_library_that_is_not_there") as raised:
        attention_implementation(gpu((9, 0)), torch.float16, 64, dropout)
    assert str(raised.value).startswith(f"{distribution} must be importable")
    assert "\n" not in str(raised.value)
    assert attention_implementation(gpu((7, 5)), torch.float16, 64, dropout) == SDPA  # which it is not made for


def test_what_a_log_says(site, gpu):
    for each in BOTH:
        each(site)
    device = gpu((9, 0))
    for arguments, expected in (
        ((device, torch.bfloat16, 64, 0.0), "flash-attn-4 4.0.0b19"),
        ((device, torch.bfloat16, 64, 0.2), "flash-attn 2.8.3.post1+cu12torch2.11"),
        ((device, torch.float32, 64, 0.0), SDPA),
        ((device, torch.float16, 60, 0.0), SDPA),
        ((torch.device("cpu"), torch.bfloat16, 64, 0.0), SDPA),
        ((torch.device("cpu"), torch.bfloat16, 64, 0.2), "blocks with dropout, on the CPU"),
    ):
        assert attention_implementation(*arguments) == expected
    assert attention_implementation(device, torch.bfloat16, 64, 0.0, compiled=True).startswith("flash-attn 2.8.3")


@pytest.mark.parametrize(
    ("cuda", "dtype", "head_dim", "qualifies"),
    [
        (True, torch.bfloat16, 64, True),
        (True, torch.float16, 256, True),
        (True, torch.float32, 64, False),
        (True, torch.bfloat16, 264, False),
        (True, torch.bfloat16, 60, False),
        (False, torch.bfloat16, 64, False),
    ],
)
def test_which_tensors_qualify(cuda, dtype, head_dim, qualifies):
    assert flash_attention.qualifies_for_flash_attention(cuda, dtype, head_dim) is qualifies


# The calls ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(site, gpu, monkeypatch) -> Callable[[], tuple[list[Any], list[Any]]]:
    """Both installed, and CPU tensors that pass for those of a GPU 9.0; gives the calls so far of each."""
    for each in BOTH:
        each(site)
    gpu((9, 0))
    monkeypatch.setattr(attention, "qualifies_for_flash_attention", lambda _, dtype, __: dtype == torch.bfloat16)

    def read() -> tuple[list[Any], list[Any]]:
        loaded = [sys.modules.get(name) for name in ("flash_attn", "flash_attn.cute")]
        two, four = ([] if module is None else getattr(module, "calls", []) for module in loaded)
        return two, four

    return read


def random_qkv(seq_len: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The strided views of a fused projection that the decoder gives, before they are taken apart."""
    torch.manual_seed(0)
    return torch.randn(2, seq_len, 3, 4, 16, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("seq_len", [1, 37])
@pytest.mark.parametrize("dropout", [0.0, 0.125])
def test_layout_arguments_values_and_gradients(calls, seq_len, dropout):
    qkv = random_qkv(seq_len)
    mixed = causal_attention(*qkv.unbind(2), dropout_p=dropout)
    shape = (2, seq_len, 4, 16)
    assert calls() == (([(0.125, True, shape)], []) if dropout else ([], [(True, shape)]))
    assert (mixed.dtype, mixed.shape) == (torch.bfloat16, shape)
    wide = qkv.detach().float().requires_grad_()
    q, k, v = wide.transpose(1, 3).unbind(2)  # [B, H, T, head_dim]
    scores = q @ k.transpose(-1, -2) / 4 + torch.full((seq_len, seq_len), -torch.inf).triu(1)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    upstream = torch.randn(shape).bfloat16()
    mixed.backward(upstream)
    expected.backward(upstream.float())
    torch.testing.assert_close(mixed.float(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(qkv.grad.float(), wide.grad, atol=4e-2, rtol=2e-2)


def test_left_alone_when_the_tensors_do_not_qualify(calls):
    causal_attention(*random_qkv(12, torch.float32).unbind(2))
    assert calls() == ([], [])


@torch._dynamo.config.patch(recompile_limit=64)  # the stubs' lists of calls, which grow, are seen by the compiler
def test_a_constant_of_compilation(calls):
    """In one graph, also when head size and dropout are no longer constants; and never flash-attn 4."""
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, fullgraph=True, backend="eager")
    for head_dim in (16, 32, 64):
        for dropout in (0.0, 0.1, 0.2):
            q, k, v = torch.randn(3, 2, 12, 4, head_dim, dtype=torch.bfloat16)
            actual = compiled(q, k, v, dropout_p=dropout)
            torch.testing.assert_close(actual, causal_attention(q, k, v, dropout_p=dropout))
    two, four = calls()
    assert len(two) == 9 + 6
    assert len(four) == 3
