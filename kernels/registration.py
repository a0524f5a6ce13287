"""How an op is registered with PyTorch: schema, body, fake body, gradient.

`torch.library.Library` itself, not `torch.library.custom_op`: the same guarantees (`opcheck` passes, one graph under
torch.compile) at half of the host's time, which for small tensors is all the time there is.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("looped", "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}  # what runs on a device, by the op's name


AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Run the op without recording it for differentiation."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def register(
    schema: str, body: Callable[..., Any], fake: Callable[..., Any], differentiated: Callable[..., Any] | None = None
) -> Any:
    """Define the op looped::NAME of a schema "NAME(...) -> ..."; returns it.

    body: computes the results on a CPU or GPU.  Neither autograd nor autocast reaches it, so that it is the same
    function wherever it is called.
    fake: gives results of the same shapes and dtypes, without values.
    differentiated: what a call runs that autograd may record, for instance an `autograd.Function`'s `apply`; it calls
    the op by `below_autograd`.  None: the op's results have no gradient.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.looped, name).default

    def without_autocast(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return body(*arguments)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, without_autocast, device)
    torch.library.register_fake(f"looped::{name}", fake, lib=LIBRARY)

    def undifferentiated(*arguments: Any) -> Any:
        return below_autograd(op, *arguments)

    LIBRARY.impl(name, differentiated or undifferentiated, "Autograd")
    BODIES[name] = body
    return op
