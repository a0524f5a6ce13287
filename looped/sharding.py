"""A model on several devices: the same weights on each (DDP), or a share of the weights on each (FSDP2).

Both give every process the mean of the processes' gradients.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from looped.model import LoopedLM

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def replicate(model: LoopedLM, group: "ProcessGroup", *, find_unused: bool) -> DistributedDataParallel:
    """The model as training calls it, in which gradients are averaged; the model itself stays what it is.

    find_unused: whether a step may leave a parameter without a gradient. It stays without one then, as in one process.
    """
    return DistributedDataParallel(
        model, process_group=group, find_unused_parameters=find_unused, gradient_as_bucket_view=True
    )


def share_out(model: LoopedLM, group: "ProcessGroup", dtype: torch.dtype, *, keep: bool = True) -> None:
    """Leave each process its share of every weight, in place: FSDP2 (arXiv 2304.11277 describes its predecessor).

    The products' weights, of attention and MLP, are gathered block by block, in ``dtype``: what autocast makes of them.
    Everything else is gathered as it is, before the first loop, for it is used by all: embedding and head, tied or not,
    norms, injection, gate. So the residual stream keeps its dtype. Gradients are averaged in float32.

    keep: gather a block of the shared stack once in a step and keep it through all loops, forward and backward. Its
    gradient is whole through all loops anyway: it is summed over them.
    """
    from torch.distributed.device_mesh import DeviceMesh  # slow to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type)
    products = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in (*model.prelude, *model.blocks, *model.coda):
        fully_shard([block.attention, block.mlp], mesh=mesh, mp_policy=products, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh)


def own_part(tensor: Tensor) -> Tensor:
    """The elements of a weight that this process holds: all, unless it is shared out."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # slow to import, and who has one has imported it

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
