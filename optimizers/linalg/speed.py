"""What a device multiplies fast: measured once for each kind of device, then remembered."""

from __future__ import annotations

import functools
import time

import torch

NEVER = 2**31 - 1
"""A short side that no matrix has: half precision is never used."""

# Half precision must be faster by this much, or the more accurate type is taken.
_MARGIN = 1.5
_SIDES = (64, 128, 256, 512)


def half_from(device: torch.device) -> int:
    """Return the short side from which on bfloat16 products are clearly faster than float32's.

    Among several processes the capabilities of the device decide instead of a clock: the ranks
    must agree, or their parameters would drift apart.

    Args:
        device: Where the matrices live.

    Returns:
        64, 128, 256, 512, or :data:`NEVER`.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized()
    if several and distributed.get_world_size() > 1:
        return _by_capability(device.type)
    return _measured(device.type)


def _by_capability(device_type: str) -> int:
    if device_type == "cuda":
        return 128 if torch.cuda.get_device_capability()[0] >= 8 else NEVER
    if device_type == "cpu":
        return 128 if _has_bf16_products() else NEVER
    return NEVER


def _has_bf16_products() -> bool:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@functools.cache
def _measured(device_type: str) -> int:
    if device_type == "meta":
        return NEVER
    smallest = NEVER
    with torch.no_grad():
        for side in reversed(_SIDES):
            try:
                full = _seconds(side, torch.float32, device_type)
                half = _seconds(side, torch.bfloat16, device_type, patience=3 * full)
            except RuntimeError:  # the device has no such product
                return NEVER
            if full < _MARGIN * half:
                break
            smallest = side
    return smallest


def _seconds(
    side: int, dtype: torch.dtype, device_type: str, patience: float = float("inf")
) -> float:
    """Return the shortest time of a batched product; give up on a slow one after the first."""
    X = torch.ones(2, side, side, device=device_type).to(dtype)
    out = torch.empty_like(X)
    best = float("inf")
    for attempt in range(6):
        _synchronize(device_type)
        start = time.perf_counter()
        torch.bmm(X, X, out=out)
        _synchronize(device_type)
        if attempt:  # the first one warms up
            best = min(best, time.perf_counter() - start)
            if best > patience:
                break
    return best


def _synchronize(device_type: str) -> None:
    if device_type != "cpu":
        torch.accelerator.synchronize()
