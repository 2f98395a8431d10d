r"""What K-FAC knows of a layer: its gradient as a product of rows, and the factors of the rows.

A layer with rows :math:`a` of inputs (with a 1 for the bias) and rows :math:`g` of slopes has the
gradient :math:`g^\top a`. The weight keeps one factor for each side, whatever the layer: for its
*rows* (the first dimension) and its *columns* (all other dimensions together, and one column for
the bias, whether or not there is one). A vector keeps a 2 x 2 factor for each element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from optimizers.second_order.kfac_factors import Spectrum, cut, divided, total
from optimizers.second_order.layers import Use

ROW, COLUMN, UNIT = "row_factor", "column_factor", "unit_factor"
Factors: TypeAlias = Mapping[str, Tensor]


class Evidence(NamedTuple):
    """One use of a layer and the slopes that belong to it.

    Attributes:
        use: The use.
        slope: Of the loss, in the outputs of the use.
        fisher: Slopes whose second moments make the factors; their moments are added up.
    """

    use: Use
    slope: Tensor
    fisher: Sequence[Tensor]


class Moments(NamedTuple):
    """What all uses of a layer say together.

    Attributes:
        means: Second moment of the rows, for each factor; empty if there were no rows.
        weight: Gradient of the weight that the rows give, in the weight's shape.
        bias: Gradient of the bias.
        size: What rounding in these gradients is relative to.
        coarse: The least precise dtype on the way.
    """

    means: dict[str, Tensor]
    weight: Tensor
    bias: Tensor
    size: Tensor
    coarse: torch.dtype


class Layer(ABC):
    """A layer whose gradient is preconditioned.

    Args:
        module: The layer.
        weight: Its weight, which keeps the factors.
        bias: Its bias, if it is trained.
    """

    factors: tuple[str, ...] = (ROW, COLUMN)

    def __init__(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        self.module, self.weight, self.bias = module, weight, bias
        self.dtype = torch.promote_types(weight.dtype, torch.float32)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that move."""
        both = [self.weight, *([] if self.bias is None else [self.bias])]
        return [p for p in both if p.requires_grad]

    @property
    def coupled(self) -> bool:
        """Whether weight and bias move, and are preconditioned as one matrix."""
        return len(self.trained) == 2

    @abstractmethod
    def fits(self, use: Use) -> bool:
        """Whether inputs and outputs have the shapes of such a layer."""

    @abstractmethod
    def inputs(self, use: Use) -> Tensor:
        """Return the inputs as the layer multiplies them."""

    @abstractmethod
    def slopes(self, slope: Tensor) -> Tensor:
        """Return slopes arranged to meet the inputs."""

    @abstractmethod
    def gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in weight and bias."""

    @abstractmethod
    def of_inputs(self, x: Tensor, factors: Factors) -> tuple[dict[str, Tensor], int]:
        """Return the sum of moments of the inputs, and the number of rows."""

    @abstractmethod
    def of_slopes(self, x: Tensor, g: Tensor, factors: Factors) -> dict[str, Tensor]:
        """Return the sum of moments that the slopes enter."""

    def collect(self, evidence: Sequence[Evidence], factors: Factors) -> Moments:
        """Return the moments of all uses, whose rows are pooled.

        Args:
            evidence: At least one use.
            factors: The present factors: their shapes say which are diagonal.
        """
        sums: dict[str, list[Tensor]] = {name: [] for name in self.factors}
        weights, biases, sizes, count = [], [], [], 0
        for use, slope, fisher in evidence:
            x, g = self.inputs(use), self.slopes(slope.to(self.dtype))
            in_weight, in_bias = self.gradient(x, g)
            weights.append(in_weight)
            biases.append(in_bias)
            square = x.square().sum() if x.is_floating_point() else g.new_zeros(())
            sizes.append(torch.linalg.vector_norm(g) * (square + g.numel()).sqrt())
            found, rows = self.of_inputs(x, factors)
            count += rows
            for name, value in found.items():
                sums[name].append(value)
            for other in fisher:
                g = self.slopes(other.to(self.dtype))
                for name, value in self.of_slopes(x, g, factors).items():
                    sums[name].append(value)
        means = {name: total(terms) / count for name, terms in sums.items()} if count else {}
        weight = total(weights).view(self.weight.shape)
        dtypes = [self.weight.dtype, *(use.outputs.dtype for use, _, _ in evidence)]
        coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return Moments(means, weight, total(biases), total(sizes), coarse)

    def matrices(self, factors: Factors) -> dict[str, Tensor]:
        """Return the matrices ``(count, n, n)`` whose eigenvectors are wanted."""
        wanted = {}
        for name in self.factors:
            if factors[name].ndim > 1:
                wanted[name] = self._decoupled(factors[name]) if name != ROW else factors[name]
        return {name: F if F.ndim == 3 else F.unsqueeze(0) for name, F in wanted.items()}

    def _decoupled(self, factor: Tensor) -> Tensor:
        """Return the factor without what joins the bias to the weight if only one of them moves."""
        if self.coupled:
            return factor
        factor = factor.clone()
        factor[..., -1, :-1] = factor[..., :-1, -1] = 0
        return factor

    def spectra(self, factors: Factors, found: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        """Return all spectra, with those of diagonal factors and without rounding's signs."""
        every = {name: found.get(name, Spectrum(factors[name], None)) for name in self.factors}
        return {name: Spectrum(s.values.clamp(min=0), s.basis) for name, s in every.items()}

    def direction(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        spectra: Mapping[str, Spectrum],
        damping: float,
    ) -> list[Tensor]:
        """Return the preconditioned gradients of :attr:`trained`.

        Args:
            weight: Gradient of the weight, or ``None`` if it does not move.
            bias: Gradient of the bias, or ``None``.
            spectra: Of every factor.
            damping: Added to the products of eigenvalues.
        """
        rows, columns = (cut(spectra[name], damping) for name in (ROW, COLUMN))
        M = columns.values.new_zeros(len(rows.values), len(columns.values))
        if weight is not None:
            M[:, :-1] = weight.reshape(len(M), -1)
        if bias is not None:
            M[:, -1] = bias
        # V = Q_G [(Q_G^T M Q_A) / (d_G d_A^T + damping)] Q_A^T
        if rows.basis is not None:
            M = rows.basis.mT @ M
        if columns.basis is not None:
            M = M @ columns.basis
        M = divided(M, torch.outer(rows.values, columns.values), damping)
        if rows.basis is not None:
            M = rows.basis @ M
        if columns.basis is not None:
            M = M @ columns.basis.mT
        weights = M[:, :-1].contiguous().view(self.weight.shape)
        return self._parts(weight, bias, weights, M[:, -1].contiguous())

    @staticmethod
    def _parts(
        weight: Tensor | None, bias: Tensor | None, in_weight: Tensor, in_bias: Tensor
    ) -> list[Tensor]:
        parts = [] if weight is None else [in_weight]
        return parts if bias is None else [*parts, in_bias]
