r"""What K-FAC knows of a layer: its gradient as a product of rows, and the factors of the rows.

A layer with rows :math:`a` of inputs (with a 1 for the bias) and rows :math:`g` of slopes has the
gradient :math:`g^\top a`. The weight keeps one factor for each side, whatever the layer: for its
*rows* (the first dimension) and its *columns* (all other dimensions together, and one column for
the bias, whether or not there is one). A vector keeps a 2 x 2 factor for each element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from optimizers.second_order.kfac_factors import Spectrum, cut, divided, total, with_one
from optimizers.second_order.layers import BATCH_NORMS, Use, normalized, patches

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


class Layer:
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

    def fits(self, use: Use) -> bool:
        """Whether inputs and outputs have the shapes of such a layer."""
        raise NotImplementedError

    def inputs(self, use: Use) -> Tensor:
        """Return the inputs as the layer multiplies them."""
        raise NotImplementedError

    def slopes(self, slope: Tensor) -> Tensor:
        """Return slopes arranged to meet the inputs."""
        raise NotImplementedError

    def gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in weight and bias."""
        raise NotImplementedError

    def of_inputs(self, x: Tensor, factors: Factors) -> tuple[dict[str, Tensor], int]:
        """Return the sum of moments of the inputs, and the number of rows."""
        raise NotImplementedError

    def of_slopes(self, x: Tensor, g: Tensor, factors: Factors) -> dict[str, Tensor]:
        """Return the sum of moments that the slopes enter."""
        raise NotImplementedError

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


class Matrix(Layer):
    """A linear layer or a convolution. Inputs ``(b, groups, n, positions)``, slopes ``(b, o, p)``.

    All positions of a linear layer are rows of their own, those of a convolution are divided by
    their number. The groups of a convolution share the columns' factor, the mean over them.
    """

    module: nn.Linear | nn.Conv1d | nn.Conv2d

    @property
    def _groups(self) -> int:
        return 1 if isinstance(self.module, nn.Linear) else self.module.groups

    def fits(self, use: Use) -> bool:
        """Whether inputs and outputs have the shapes of such a layer."""
        x, y = use.inputs, use.outputs
        if isinstance(self.module, nn.Linear):
            o, n = self.weight.shape
            return x.ndim > 0 and x.shape[-1] == n and y.shape == (*x.shape[:-1], o)
        batched = x.ndim == y.ndim == self.weight.ndim
        return batched and len(x) == len(y) and y.shape[1] == len(self.weight)

    def inputs(self, use: Use) -> Tensor:
        """Return the inputs as the layer multiplies them."""
        x = use.inputs.to(self.dtype)
        if isinstance(self.module, nn.Linear):
            return x.reshape(-1, x.shape[-1]).mT[None, None]
        return patches(self.module, x)

    def slopes(self, slope: Tensor) -> Tensor:
        """Return slopes arranged to meet the inputs."""
        if isinstance(self.module, nn.Linear):
            return slope.reshape(-1, slope.shape[-1]).mT[None]
        return slope.flatten(2)

    def gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in weight and bias."""
        parted = self._parted(g)
        return (parted @ x.mT).sum(0).flatten(0, 1), g.sum((0, 2))

    def _parted(self, g: Tensor) -> Tensor:
        """Return slopes as ``(b, groups, o / groups, positions)``."""
        return g.reshape(len(g), self._groups, g.shape[1] // self._groups, g.shape[2])

    def _scale(self, x: Tensor) -> float:
        return 1.0 if isinstance(self.module, nn.Linear) else 1 / x.shape[-1] ** 2

    def of_inputs(self, x: Tensor, factors: Factors) -> tuple[dict[str, Tensor], int]:
        """Return the sum of moments of the inputs, and the number of rows."""
        flat, rows = x.movedim(2, 0).flatten(1), x.shape[0] * x.shape[3]
        if factors[COLUMN].ndim == 1:
            moment = with_one(flat.square().sum(1) / self._groups, None, rows)
        else:
            moment = with_one(flat @ flat.mT / self._groups, flat.sum(1) / self._groups, rows)
        return {COLUMN: moment * self._scale(x)}, rows

    def of_slopes(self, x: Tensor, g: Tensor, factors: Factors) -> dict[str, Tensor]:
        """Return the sum of moments that the slopes enter."""
        parted = self._parted(g).movedim(0, 2).flatten(2)
        if factors[ROW].ndim == 1:
            moment = parted.square().sum(2).flatten()
        else:
            moment = _block_diagonal(parted @ parted.mT)
        return {ROW: moment * self._scale(x)}


class Table(Layer):
    """An embedding: one-hot inputs, whose factor is the frequency of each entry.

    Inputs are indices ``(b,)``, slopes ``(1, d, b)``. Entries that get no gradient by
    ``padding_idx`` are rows of zeros.
    """

    module: nn.Embedding

    def fits(self, use: Use) -> bool:
        """Whether inputs and outputs have the shapes of such a layer."""
        return use.outputs.shape == (*use.inputs.shape, self.weight.shape[1])

    def inputs(self, use: Use) -> Tensor:
        """Return the inputs as the layer multiplies them."""
        return use.inputs.reshape(-1)

    def slopes(self, slope: Tensor) -> Tensor:
        """Return slopes arranged to meet the inputs."""
        return slope.reshape(1, -1, slope.shape[-1]).mT

    def _weights(self, x: Tensor) -> Tensor:
        padding = self.module.padding_idx
        kept = torch.ones_like(x) if padding is None else x != padding
        return kept.to(self.dtype)

    def gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in weight and bias."""
        rows = g[0].mT * self._weights(x).unsqueeze(1)
        return g.new_zeros(self.weight.shape).index_add_(0, x, rows), g.new_zeros(())

    def of_inputs(self, x: Tensor, factors: Factors) -> tuple[dict[str, Tensor], int]:
        """Return the sum of moments of the inputs, and the number of rows."""
        kept = self._weights(x)
        return {ROW: kept.new_zeros(len(self.weight)).index_add_(0, x, kept)}, len(x)

    def of_slopes(self, x: Tensor, g: Tensor, factors: Factors) -> dict[str, Tensor]:
        """Return the sum of moments that the slopes enter."""
        g = g[0] * self._weights(x)
        # There is no bias: its column is carried along and meets nothing.
        if factors[COLUMN].ndim == 1:
            return {COLUMN: with_one(g.square().sum(1), None, len(x))}
        return {COLUMN: with_one(g @ g.mT, g.new_zeros(len(g)), len(x))}

    def matrices(self, factors: Factors) -> dict[str, Tensor]:
        """Return the matrices ``(count, n, n)`` whose eigenvectors are wanted."""
        found = super().matrices(factors)
        return {name: F for name, F in found.items() if name != ROW}

    def spectra(self, factors: Factors, found: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        """Return all spectra; the rows' factor is diagonal, however it is stored."""
        rows = factors[ROW]
        frequencies = rows.diagonal() if rows.ndim == 2 else rows
        return super().spectra({**factors, ROW: frequencies}, found)


class Unit(Layer):
    """A normalisation's scale and shift: for each channel the exact 2 x 2 matrix.

    Inputs are what the scale multiplies, ``(b, positions, channels)``, and so are slopes. The rows
    are gradients of samples (first dimension), summed over their positions.
    """

    factors = (UNIT,)

    @property
    def _channels_last(self) -> bool:
        return isinstance(self.module, (nn.LayerNorm, nn.RMSNorm))

    def fits(self, use: Use) -> bool:
        """Whether inputs and outputs have the shapes of such a layer."""
        shape = use.inputs.shape
        channels = shape[-1:] if self._channels_last else shape[1:2]
        return use.outputs.shape == shape and len(shape) > 1 and channels == self.weight.shape

    def inputs(self, use: Use) -> Tensor:
        """Return the inputs as the layer multiplies them."""
        return self.slopes(normalized(self.module, use.inputs.to(self.dtype)))

    def slopes(self, slope: Tensor) -> Tensor:
        """Return slopes arranged to meet the inputs."""
        if slope.ndim == 2:
            return slope.unsqueeze(1)
        return slope.flatten(1, -2) if self._channels_last else slope.flatten(2).mT

    def gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in weight and bias."""
        return (x * g).sum((0, 1)), g.sum((0, 1))

    def of_inputs(self, x: Tensor, factors: Factors) -> tuple[dict[str, Tensor], int]:
        """Return nothing but the number of rows: inputs and slopes are not parted."""
        return {}, len(x)

    def of_slopes(self, x: Tensor, g: Tensor, factors: Factors) -> dict[str, Tensor]:
        """Return the sum of moments that the slopes enter."""
        rows = torch.stack([(x * g).sum(1), g.sum(1)], -1)
        return {UNIT: torch.einsum("bci,bcj->cij", rows, rows)}

    def direction(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        spectra: Mapping[str, Spectrum],
        damping: float,
    ) -> list[Tensor]:
        """Return the preconditioned gradients of :attr:`trained`."""
        values, Q = cut(spectra[UNIT], damping)
        assert Q is not None
        none = values.new_zeros(len(values))
        pairs = [none if part is None else part.to(values.dtype) for part in (weight, bias)]
        v = Q.mT @ torch.stack(pairs, -1).unsqueeze(-1)
        v = (Q @ divided(v, values.unsqueeze(-1), damping)).squeeze(-1)
        return self._parts(weight, bias, v[:, 0], v[:, 1])


def find_layers(model: nn.Module, params: Sequence[Tensor]) -> list[Layer]:
    """Return the layers of known kinds whose weights are among the parameters.

    Tied weights (those of two modules) have no layer of their own, nor has what is tied to them.
    """
    held = {id(p) for p in params}
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    found: list[Layer] = []
    for module in model.modules():
        kind = _kind(module)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if kind is None or not isinstance(weight, Tensor) or id(weight) not in held:
            continue
        if any(owners[id(p)] > 1 for p in (weight, bias) if p is not None) or not weight.numel():
            continue
        if bias is not None and not (id(bias) in held and bias.requires_grad):
            bias = None
        layer = kind(module, weight, bias)
        if layer.trained:
            found.append(layer)
    return found


def _kind(module: nn.Module) -> type[Layer] | None:
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return Matrix
    if isinstance(module, nn.Embedding):
        return None if module.max_norm or module.scale_grad_by_freq or module.sparse else Table
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return Unit if len(module.normalized_shape) == 1 else None
    return Unit if isinstance(module, (nn.GroupNorm, *BATCH_NORMS)) else None


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return matrices ``(count, n, n)`` as the blocks of one."""
    count, n, _ = blocks.shape
    whole = blocks.new_zeros(count, n, count, n)
    whole.diagonal(dim1=0, dim2=2).copy_(blocks.movedim(0, -1))
    return whole.view(count * n, count * n)
