"""Random numbers of a step: small batches from a seed, and layers that draw the same twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def draw_small_batch(
    key: Sequence[int], samples: int, size: int, refresh_prob: float
) -> Tensor | None:
    """Toss the coin and draw: a function of the arguments alone.

    Args:
        key: Seed, cycle and, if each block draws for itself, block.
        samples: How many samples there are.
        size: How many to draw, without replacement.
        refresh_prob: Probability of the large batch.

    Returns:
        Indices in increasing order, or ``None`` for the large batch.
    """
    rng = np.random.default_rng(key)
    if rng.random() < refresh_prob:
        return None
    return torch.from_numpy(np.sort(rng.choice(samples, size, replace=False)))


def random_states(tensors: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """Return the states of the global generators of the CPU and of the tensors' devices."""
    return {device: _read(device) for device in {torch.device("cpu"), *(t.device for t in tensors)}}


@contextmanager
def replaying(states: Mapping[torch.device, Tensor]) -> Iterator[None]:
    """Let random layers draw again what they drew from ``states``; afterwards the stream goes on.

    Args:
        states: From :func:`random_states`.
    """
    after = {device: _read(device) for device in states}
    try:
        _write(states)
        yield
    finally:
        _write(after)


def _read(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _write(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        elif device.type == "mps":
            torch.get_device_module(device).set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
