"""The only file that knows ``DTensor``: what a rule may do with a sharded parameter."""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, which holds a part of a parameter on each rank."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that lives on this rank, else the tensor itself.

    The returned tensor shares memory, so an in-place update of it updates the parameter.
    Right for rules that treat every element alike; a rule that must see a whole matrix
    gathers it first or refuses.
    """
    if is_sharded(tensor):
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part
    return tensor
