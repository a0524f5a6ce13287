"""Inputs of one readout, run through the op and through plain PyTorch."""

import torch
from numerics import assert_no_worse_than

from looped.kernels import looped_cross_entropy
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
READOUTS = ["rmsnorm", "layernorm", "raw", "final-only"]


class Case:
    """Inputs of one call; `to(dtype)` gives the same numbers in another dtype."""

    def __init__(self, shape, device="cpu", dtype=torch.float32, readout="rmsnorm", seed=0, ignored=0, **options):
        n_loops, n_tokens, d, vocabulary = shape
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(size, generator=generator).to(device, dtype)

        self.tensors = {"states": random(n_loops, n_tokens, d) * 3, "head": random(vocabulary, d) * (2 / d**0.5)}
        if readout != "raw":
            self.tensors["norm_weight"] = random(d) + 1
        if readout == "layernorm":
            self.tensors["norm_bias"] = random(d)
        if options.pop("bias", False):
            self.tensors["bias"] = random(vocabulary)
        weights = options.pop("weights", None)
        if weights == "token":
            self.tensors["weights"] = random(n_loops, n_tokens).float().abs()
        elif weights == "loop":
            self.tensors["weights"] = random(n_loops).float().abs()
        elif weights is not None:
            options["weights"] = weights
        self.targets = torch.randint(vocabulary, (n_tokens,), generator=generator).to(device)
        self.targets[:ignored] = -100
        self.options = {"readout": readout, **options}

    def run(self, function, dtype=None, *, sequence=False, upstream=1.0, frozen=(), **more):
        """loss, per_loop and the gradients of every tensor that is not frozen, with the whole result last."""
        tensors = {k: v.detach().to(dtype or v.dtype).requires_grad_(k not in frozen) for k, v in self.tensors.items()}
        arguments = dict(tensors)
        states = arguments.pop("states")
        states = list(states.unbind(0)) if sequence else states
        result = function(states, arguments.pop("head"), self.targets, **arguments, **(self.options | more))
        loss, per_loop = result[:2]
        if not isinstance(upstream, torch.Tensor):
            upstream = torch.full_like(loss, upstream)
        inputs = [t for k, t in tensors.items() if k not in frozen]
        gradients = torch.autograd.grad(loss, inputs, upstream.to(loss), allow_unused=True)
        names = [k for k in tensors if k not in frozen]
        return {"loss": loss, "per_loop": per_loop, **dict(zip(names, gradients, strict=True))}, result

    def check(self, *, sequence=False, upstream=1.0, frozen=(), factor=2.0, **more):
        """The op against plain PyTorch in the same dtype, truth being float64."""
        actual, result = self.run(looped_cross_entropy, sequence=sequence, upstream=upstream, frozen=frozen, **more)
        plain, _ = self.run(looped_cross_entropy_reference, upstream=upstream, frozen=frozen)
        truth, _ = self.run(looped_cross_entropy_reference, torch.float64, upstream=upstream, frozen=frozen)
        read = ~actual["per_loop"].isnan()
        for values in (actual, plain, truth):
            values["per_loop"] = values["per_loop"][read]
        for name, value in truth.items():
            if value is None or actual[name] is None:
                assert value is None or value.abs().max() == 0, name
                assert actual[name] is None or actual[name].abs().max() == 0, name
                continue
            assert actual[name].dtype == plain[name].dtype, name
            assert_no_worse_than(
                actual[name], plain[name], value, dtype=self.tensors["states"].dtype, factor=factor, name=name
            )
        return result
