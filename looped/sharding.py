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


def own_part(tensor: Tensor) -> Tensor:
    """The elements of a weight that this process holds: all, unless it is shared out."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # slow to import, and who has one has imported it

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
