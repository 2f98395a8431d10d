"""Multi-tensor building blocks: one call for a whole list of tensors.

Kernels end in ``_`` when they write in place. A learning rate may be a float or a 0-D tensor
and is never read back to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def ema_(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Exponential moving average: ``a <- decay * a + (1 - decay) * v``, for each pair."""
    torch._foreach_lerp_(averages, values, 1 - decay)


def decay_(params: list[Tensor], lr: Any, weight_decay: float) -> None:
    """Decoupled weight decay: ``p <- (1 - lr * weight_decay) * p``, for each parameter."""
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)


def step_counts(states: Sequence[Mapping[str, Any]]) -> list[float] | list[Tensor]:
    """Return the number of updates of each parameter, this one included.

    On the CPU they are plain numbers. On an accelerator, and while a graph is being compiled,
    they stay 0-D tensors: reading them would stall the device or fix the number in the graph.
    """
    steps: list[Tensor] = [state["step"] for state in states]
    if torch.compiler.is_compiling() or not steps or steps[0].device.type != "cpu":
        return steps
    return [step.item() for step in steps]


def uniform_count(states: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the common number of updates, or ``None`` if they differ or are not on the host."""
    counts = step_counts(states)
    if not counts or isinstance(counts[0], Tensor):
        return None
    first = counts[0]
    return first if all(count == first for count in counts) else None


def bias_corrections(
    states: Sequence[Mapping[str, Any]], decay: float
) -> list[float] | list[Tensor]:
    """Return ``1 - decay ** t`` for each parameter, with its own count ``t``."""
    counts = step_counts(states)
    # The tensor form raises in float32, where 1 - 0.999 keeps four digits; float64 keeps all.
    return [
        1 - (decay ** count.double() if isinstance(count, Tensor) else decay**count)
        for count in counts
    ]
