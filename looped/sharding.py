"""A model on several devices: the same weights on each (DDP), or a share of the weights on each (FSDP2).

Both give every process the mean of the processes' gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from looped.kernels.device import product_dtype
from looped.model import LoopedLM
from looped.vocabulary import table_name, whole_vocabulary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule


def replicate(model: LoopedLM, group: "ProcessGroup", *, find_unused: bool) -> DistributedDataParallel:
    """The model as training calls it, in which gradients are averaged; the model itself stays what it is.

    find_unused: whether a step may leave a parameter without a gradient. It stays without one then, as in one process.
    The table of a shared vocabulary has its mean gradient already, and each process has other rows of it.
    """
    if model.shard is not None:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [table_name(model)])
    return DistributedDataParallel(
        model, process_group=group, find_unused_parameters=find_unused, gradient_as_bucket_view=True
    )


def share_out(model: LoopedLM, group: "ProcessGroup", dtype: torch.dtype) -> None:
    """Leave each process its share of every weight, in place, by FSDP2 (Zhao et al., arXiv 2304.11277).

    dtype: that of autocast; float32 for none. The weights of a block's products are gathered together, in the dtype in
    which the model forms these: on a CPU a fused one may choose float32, so that it must be fused by now. Everything
    else is used by all loops and gathered first, as it is: embedding and head, tied or not, norms, injection, gate. So
    the residual stream keeps its dtype. Gradients are averaged in float32.

    What is gathered stays until `reshard`, through all loops, forward and backward. The gradient of the shared stack is
    whole for as long: it is summed over the loops. Gathering a block anew for each loop, forward and backward, would
    move its bytes 2 K times.
    """
    from torch.distributed.device_mesh import DeviceMesh  # slow to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    weight = model.embedding.weight
    if model.fused:
        dtype = product_dtype(weight, dtype)
    mesh = DeviceMesh.from_group(group, weight.device.type)
    products = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in (*model.prelude, *model.blocks, *model.coda):
        fully_shard([block.attention, block.mlp], mesh=mesh, mp_policy=products, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False).set_reshard_after_backward(False)


def _sharded(model: nn.Module) -> list["FSDPModule"]:
    """The parts of a model that are gathered at a time; none unless it is shared out."""
    if not hasattr(model, "unshard"):  # which FSDP2 gives a module
        return []
    from torch.distributed.fsdp import FSDPModule  # slow to import

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let go of the weights that a step has gathered, before the optimiser takes its own part of them."""
    for module in _sharded(model):
        module.reshard()


@contextmanager
def whole(model: LoopedLM) -> Iterator[None]:
    """In which every process has all weights, and calls the model, and its backward pass, by itself. The gradients are
    dropped at the end."""
    modules = _sharded(model)
    for module in modules:
        module.unshard()
        module.set_requires_gradient_sync(False)
    try:
        with whole_vocabulary(model):
            yield
    finally:
        model.zero_grad()
        for module in modules:
            module.set_requires_gradient_sync(True)
        reshard(model)


def own_part(tensor: Tensor) -> Tensor:
    """The elements of a weight that this process holds: all, unless it is shared out."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # slow to import, and who has one has imported it

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
