r"""Norm balls: their steepest directions and dual norms, for parameters seen as matrices.

:math:`d(m)` maximises :math:`\langle m, d\rangle` over the unit ball, so that
:math:`\langle m, d(m)\rangle = \|m\|_*`, and :math:`d(0) = 0`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.linalg import dual_norm_spectral
from optimizers.orthogonalized.matrices import as_matrices, matrix_shape, orthogonalize_all

BALLS = ("spectral", "frobenius", "linf", "l1", "column", "row")
# Balls of matrices: a vector has no rows and columns.
OF_MATRICES = frozenset({"spectral", "column", "row"})


def is_matrix(p: Tensor, splits: int = 1, flatten: bool = False) -> bool:
    """Whether a parameter holds matrices that are more than one number."""
    if p.ndim < 2:
        return False
    _, rows, columns = matrix_shape(p.shape, splits, flatten)
    return rows * columns > 1


def unit(x: Tensor, norm: Tensor, eps: float = 0.0) -> Tensor:
    """Return ``x / (norm + eps)``, zero where both vanish, without reading the norm."""
    return x / (norm + eps) if eps else x / torch.where(norm == 0, 1, norm)


def steepest(momenta: Sequence[Tensor], norm: str, group: dict[str, Any]) -> list[Tensor]:
    """Return d(m) of each tensor, in its shape and dtype.

    Args:
        momenta: Of one device and dtype.
        norm: One of :data:`BALLS`.
        group: The options of the polar factor, ``splits`` and ``flatten``.
    """
    if norm == "spectral":
        factors = orthogonalize_all(momenta, group)
        return [o.to(m.dtype) for o, m in zip(factors, momenta, strict=True)]
    if norm == "linf":
        return list(torch._foreach_sign(list(momenta)))
    if norm == "frobenius":
        norms = torch._foreach_norm(list(momenta))
        return [unit(m, n) for m, n in zip(momenta, norms, strict=True)]
    if norm == "l1":
        return [_largest_entry(m) for m in momenta]
    dim = -2 if norm == "column" else -1
    result = []
    for m in momenta:
        matrices = as_matrices(m, group["splits"], group["flatten"])
        lengths = torch.linalg.vector_norm(matrices, dim=dim, keepdim=True)
        result.append(unit(matrices, lengths).reshape(m.shape))
    return result


def _largest_entry(m: Tensor) -> Tensor:
    if m.numel() == 0:
        return m.clone()
    flat = m.reshape(-1)
    index = flat.abs().argmax(keepdim=True)  # the first of equal ones
    direction = torch.zeros_like(flat).scatter_(0, index, flat.gather(0, index).sign())
    return direction.reshape(m.shape)


def dual_norm(m: Tensor, norm: str, direction: Tensor, group: dict[str, Any]) -> Tensor:
    r"""Return :math:`\|m\|_*`, a 0-D tensor.

    Args:
        m: The tensor.
        norm: One of :data:`BALLS`.
        direction: d(m), which the spectral norm's dual is read from.
        group: ``splits`` and ``flatten``.
    """
    if norm == "spectral":
        return dual_norm_spectral(m.reshape(1, -1), direction.reshape(1, -1))
    if norm == "linf":
        return m.abs().sum()
    if norm == "l1":
        return m.abs().amax() if m.numel() else m.new_zeros(())
    size: Tensor
    if norm == "frobenius":
        size = torch.linalg.vector_norm(m)
    else:
        matrices = as_matrices(m, group["splits"], group["flatten"])
        size = torch.linalg.vector_norm(matrices, dim=-2 if norm == "column" else -1).sum()
    return size


# ------------------------------------------------------------------ Scion's scaled directions

SCALED = ("spectral", "spectral_conv", "sign", "col_norm", "row_norm", "bias_rms")


def scaled_direction(
    momenta: Sequence[Tensor], norm: str, group: dict[str, Any], eps: float = 1e-8
) -> list[Tensor]:
    r"""Return Scion's direction of each tensor ``(d_out, d_in)``.

    =================  =================================================================
    ``spectral``       :math:`\sqrt{d_{out}/d_{in}}\, U V^\top` of each matrix
    ``spectral_conv``  :math:`\sqrt{C_{out}/C_{in}}/k^2\, U V^\top` of ``C_out x (C_in k^2)``
    ``sign``           :math:`\mathrm{sign}(m)/d_{in}`
    ``col_norm``       columns divided by their root mean square over :math:`d_{out}`
    ``row_norm``       rows divided by :math:`\|row\| \sqrt{d_{in}}`
    ``bias_rms``       the whole divided by its root mean square
    =================  =================================================================
    """
    if norm in ("spectral", "spectral_conv"):
        directions = steepest(momenta, "spectral", group)
        for d in directions:
            d.mul_(_spectral_scale(d, norm, group))
        return directions
    return [_scaled(m, norm, eps) for m in momenta]


def _spectral_scale(d: Tensor, norm: str, group: dict[str, Any]) -> float:
    if norm == "spectral_conv":
        return math.sqrt(d.shape[0] / max(1, d.shape[1])) / math.prod(d.shape[2:])
    _, rows, columns = matrix_shape(d.shape, group["splits"], group["flatten"])
    return math.sqrt(rows / max(1, columns))


def _scaled(m: Tensor, norm: str, eps: float) -> Tensor:
    if m.numel() == 0:
        return m.clone()
    if norm == "sign":
        return m.sign().div_(m.shape[-1])
    if norm == "bias_rms":
        return unit(m, torch.linalg.vector_norm(m) / math.sqrt(m.numel()), eps)
    if norm == "col_norm":
        rms = torch.linalg.vector_norm(m, dim=-2, keepdim=True) / math.sqrt(m.shape[-2])
        return unit(m, rms, eps)
    length = torch.linalg.vector_norm(m, dim=-1, keepdim=True)
    return unit(m, length * math.sqrt(m.shape[-1]), eps)
