r"""Proximal operators: :math:`\operatorname{prox}_{\eta r}(z) = \arg\min_u r(u) + \|u-z\|^2/2\eta`.

A threshold is a number or a 0-D tensor (the step times the strength) and is never read back to the
host.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["project_box", "prox_group", "prox_l1"]


def prox_l1(z: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Return the prox of :math:`\lambda\|u\|_1`: every entry is shrunk by ``threshold``.

    Args:
        z: Any shape.
        threshold: :math:`\eta\lambda \ge 0`.
    """
    return z.sign() * (z.abs() - threshold).clamp_min(0)


def prox_group(z: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Return the prox of :math:`\lambda\sum_i\|u_i\|_2`: every row's norm is shrunk.

    The rows :math:`u_i` are what the first dimension counts: the weights of one output for a
    matrix, of one kernel for a convolution, a single entry for a vector.

    Args:
        z: Any shape.
        threshold: :math:`\eta\lambda \ge 0`.
    """
    if z.ndim < 2:
        return prox_l1(z, threshold)
    norms = torch.linalg.vector_norm(z, dim=tuple(range(1, z.ndim)), keepdim=True)
    # A row of zeros has no direction and stays.
    shrunk: Tensor = z * ((norms - threshold).clamp_min(0) / torch.where(norms > 0, norms, 1))
    return shrunk


def project_box(z: Tensor, lower: float, upper: float) -> Tensor:
    r"""Return the prox of the indicator of a box: :math:`\min(\max(z, lower), upper)`.

    Args:
        z: Any shape.
        lower: Least value of an entry, possibly ``-inf``.
        upper: Largest value of an entry, possibly ``inf``.
    """
    return z.clamp(lower, upper)
