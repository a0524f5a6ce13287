"""How an op is registered with PyTorch: schema, body, fake body, gradient.

`torch.library.Library` itself, not `torch.library.custom_op`: the same guarantees (`opcheck` passes, one graph under
torch.compile) at half of the host's time, which for small tensors is all the time there is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

LIBRARY = torch.library.Library("looped", "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}  # what runs on a device, by the op's name


AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype}


def recording(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for where functorch transforms nothing, without what takes the host 2 us to find that out."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def refuse_create_graph() -> None:
    """Raise in a backward pass that is itself recorded: a second one would take its results for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError("the fused kernels have no second derivatives, and create_graph must be False. Got True.")


class Op:
    """An op of this package; calling it is calling the op, by the shortest way that does the same.

    Eager calls with plain tensors need nothing of PyTorch's dispatcher but what `differentiated` and `body` do; going
    through it would take the host as long as a kernel's launch.  Everything else does go through it: tracing, tensor
    subclasses, modes and transforms.
    """

    def __init__(
        self, name: str, body: Callable[..., Any], differentiated: Callable[..., Any] | None, carrier: type | None
    ) -> None:
        self.registered = getattr(torch.ops.looped, name).default
        self.body, self.differentiated, self.carrier = body, differentiated, carrier

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not is_plain(arguments, self.carrier):
            return self.registered(*self.flat(arguments))
        if self.differentiated is not None and torch.is_grad_enabled():
            return self.differentiated(*arguments)
        return self._run(arguments)

    def below_autograd(self, *arguments: Any) -> Any:
        """Run the op without recording it for differentiation."""
        if torch.compiler.is_compiling() or not is_plain(arguments, self.carrier):
            with torch._C._AutoDispatchBelowAutograd():
                return self.registered(*self.flat(arguments))
        return self._run(arguments)

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                return self.body(*arguments)
        return self.body(*arguments)

    def flat(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as the schema has them."""
        return arguments if self.carrier is None else (*arguments[:-1], *arguments[-1].flat())

    def whole(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as `body` has them, from those of the schema."""
        return arguments if self.carrier is None else (*arguments[:-2], self.carrier.of(*arguments[-2:]))  # type: ignore


def is_plain(arguments: Iterable[Any], carrier: type | None = None) -> bool:
    """Whether no mode or transform is active and all tensors are PyTorch's own; and those of lists have values."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for argument in arguments:
        kind = type(argument)
        if kind is list:
            if any(type(x) not in PLAIN or x.is_meta for x in argument):
                return False
        elif kind not in PLAIN and kind is not carrier:
            return False
    return True


def register(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    differentiated: Callable[..., Any] | type[torch.autograd.Function] | None = None,
    carrier: type | None = None,
) -> Op:
    """Define the op looped::NAME of a schema "NAME(...) -> ...".

    body: computes the results on a CPU or GPU.  Neither autograd nor autocast reaches it, so that it is the same
    function wherever it is called.
    fake: gives results of the same shapes and dtypes, without values.
    differentiated: what a call runs that autograd may record: an `autograd.Function`, or what applies one; it calls the
    op's `below_autograd`.  None: the op's results have no gradient.
    carrier: the class of the functions' last argument, if a schema cannot hold it.  Its `flat` gives the two last
    arguments of the schema, its `of` is the way back.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    quickly = differentiated
    if isinstance(differentiated, type) and issubclass(differentiated, torch.autograd.Function):
        quickly, differentiated = recording(differentiated), differentiated.apply
    op = Op(name, body, quickly, carrier)

    def on_device(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return body(*op.whole(arguments))

    def recorded(*arguments: Any) -> Any:
        if differentiated is not None:
            return differentiated(*op.whole(arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return op.registered(*arguments)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, on_device, device)
    torch.library.register_fake(f"looped::{name}", lambda *arguments: fake(*op.whole(arguments)), lib=LIBRARY)
    LIBRARY.impl(name, recorded, "Autograd")
    BODIES[name] = on_device
    return op
