"""The kinds of layers that K-FAC knows, and where a model has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optimizers.second_order.kfac_factors import Spectrum, cut, divided, with_one
from optimizers.second_order.kfac_layers import COLUMN, ROW, UNIT, Factors, Layer
from optimizers.second_order.layers import BATCH_NORMS, Use, normalized, patches


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
