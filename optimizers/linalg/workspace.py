"""Memory that is used again: on a CPU, mapping a large temporary costs as much as filling it."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    """Return uninitialised memory; on a CPU that of the last call with this name.

    Valid until the next call with the same name and dtype in this thread. Elsewhere, and while a
    graph is compiled, it is new memory, which their allocators provide at no cost.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Of the tensor.
        name: Rooms of different names do not overlap.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    kept: dict[tuple[str, torch.dtype], Tensor] = _kept.__dict__.setdefault("rooms", {})
    size = math.prod(shape)
    flat = kept.get((name, dtype))
    if flat is None or flat.numel() < size:
        # Made under inference_mode it could not be written outside of it.
        with torch.inference_mode(False):
            flat = kept[name, dtype] = torch.empty(size, dtype=dtype)
    return flat[:size].view(shape)
