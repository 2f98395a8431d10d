"""Factors of K-FAC as matrices: spectra, division by damped products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.kronecker import eigh
from optimizers.objective import OracleError

# Without damping an eigenvalue below that many roundings of the largest one counts as zero.
_ROUNDING = 8.0


class Spectrum(NamedTuple):
    """Eigenvalues of a factor, and its eigenvectors; ``None`` if it is diagonal."""

    values: Tensor
    basis: Tensor | None


def decompose(matrices: Sequence[Tensor]) -> list[Spectrum]:
    """Return the spectra of stacks ``(count, n, n)``, those of equal size at once."""
    places: dict[Any, list[int]] = {}
    for k, F in enumerate(matrices):
        places.setdefault((F.shape[-1], F.dtype, F.device), []).append(k)
    found: dict[int, Spectrum] = {}
    for members in places.values():
        counts = [len(matrices[k]) for k in members]
        values, Q = eigh(torch.cat([matrices[k] for k in members]))
        parts = zip(members, torch.split(values, counts), torch.split(Q, counts), strict=True)
        found.update((k, Spectrum(d, basis)) for k, d, basis in parts)
    return [found[k] for k in range(len(matrices))]


def total(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of at least one tensor."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def with_one(moment: Tensor, mixed: Tensor | None, rows: int) -> Tensor:
    """Return a moment of rows with the one that a bias sees appended."""
    ones = moment.new_full((1,), rows)
    if mixed is None:
        return torch.cat([moment, ones])
    top = torch.cat([moment, mixed.unsqueeze(1)], 1)
    return torch.cat([top, torch.cat([mixed, ones]).unsqueeze(0)])


def cut(spectrum: Spectrum, damping: float) -> Spectrum:
    """Without damping, set to zero what is rounding beside the largest eigenvalue."""
    values, basis = spectrum
    if damping == 0 and basis is not None:
        least = _ROUNDING * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
        values = values.where(values > least, 0)
    return Spectrum(values, basis)


def divided(M: Tensor, values: Tensor, damping: float) -> Tensor:
    """Return ``M / (values + damping)``; where there is neither, nothing moves."""
    if damping > 0:
        return M / (values + damping)
    return torch.where(values == 0, 0, M / values)


def check_finite(tensors: Sequence[Tensor], rule: str) -> None:
    """Refuse what would stay in the factors.

    Raises:
        OracleError: If an entry is NaN or infinite.
    """
    dense = [t for t in tensors if t.layout is torch.strided]  # others are refused by name
    flags = [t.isfinite().all() for t in dense]
    if not bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        raise OracleError(
            f"{rule} needs a finite loss, gradients and factors and got NaN or infinity, which the "
            "factors would keep; nothing has been changed. Check the inputs, lower lr or raise "
            "damping; in float32 slopes of 1e19 overflow a factor."
        )
