"""Parameters seen as stacks of matrices, and one polar factor for all of equal shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.linalg import newton_schulz, polar_svd


def matrix_shape(
    shape: Sequence[int], splits: int = 1, flatten: bool = False
) -> tuple[int, int, int]:
    """Return ``(count, rows, columns)`` of a parameter as a stack of matrices.

    Two dimensions are a matrix, or ``splits`` equal blocks of rows (a fused projection). Three
    are a stack of matrices (experts, heads) or, with ``flatten``, like four and more, a
    convolution kernel ``(out, in, *kernel)``, flattened to ``out x (in * kernel)``.

    Raises:
        ValueError: If the shape holds no matrix, or ``splits`` does not divide the rows.
    """
    if len(shape) < 2:
        raise ValueError("vectors and scalars hold no matrix")
    count, rows, columns = 1, shape[0], math.prod(shape[1:])
    if len(shape) == 3 and not flatten:
        count, rows, columns = shape[0], shape[1], shape[2]
    if splits > 1:
        if len(shape) != 2:
            raise ValueError("splits applies to two-dimensional parameters")
        if rows % splits:
            raise ValueError(f"splits must divide the number of rows, {rows}; got {splits}")
        count, rows = splits, rows // splits
    return count, rows, columns


def as_matrices(tensor: Tensor, splits: int = 1, flatten: bool = False) -> Tensor:
    """Return a view (a copy where the memory order forces it) of shape ``(count, rows, columns)``.

    A single matrix keeps its two dimensions, so that one matrix takes the unbatched kernels.
    """
    count, rows, columns = matrix_shape(tensor.shape, splits, flatten)
    if count == 1 and (tensor.ndim != 3 or flatten):
        return tensor.reshape(rows, columns)
    return tensor.reshape(count, rows, columns)


def orthogonalize(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the polar factor of each matrix of one parameter, in the parameter's shape."""
    return _polar(as_matrices(tensor, group["splits"], group["flatten"]), group).reshape(
        tensor.shape
    )


def orthogonalize_all(tensors: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The same for many parameters: matrices of equal shape share one batched iteration."""
    splits, flatten = group["splits"], group["flatten"]
    stacks: dict[tuple[int, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        _, rows, columns = matrix_shape(tensor.shape, splits, flatten)
        # A matrix and its transpose have the same iteration: batch them on the short side.
        stacks.setdefault((min(rows, columns), max(rows, columns)), []).append(index)
    results: list[Tensor | None] = [None] * len(tensors)
    for indices in stacks.values():
        if len(indices) == 1:
            results[indices[0]] = orthogonalize(tensors[indices[0]], group)
            continue
        wide = []
        for index in indices:
            matrices = as_matrices(tensors[index], splits, flatten)
            matrices = matrices if matrices.ndim == 3 else matrices.unsqueeze(0)
            wide.append(matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices)
        factors = _polar(torch.cat(wide), group)
        parts = torch.split(factors, [w.shape[0] for w in wide])
        for index, part in zip(indices, parts, strict=True):
            _, rows, columns = matrix_shape(tensors[index].shape, splits, flatten)
            part = part.mT if rows > columns else part
            results[index] = part.reshape(tensors[index].shape)
    return [result for result in results if result is not None]


def _polar(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    if group["polar"] == "svd":
        return polar_svd(matrices)
    return newton_schulz(
        matrices,
        coefficients=group["ns_coefficients"],
        steps=group["ns_steps"],
        eps=group["eps"],
        eps_mode=group["eps_mode"],
        dtype=getattr(torch, group["ns_dtype"]),
    )


def ns_dtype_name(dtype: Any) -> Any:
    """Return the name of a dtype: groups hold plain values, so that any loader accepts them."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


NS_RANGES = {
    "ns_coefficients": "3 of finite or list of 3 of finite",
    "eps": "(0, inf)",
    "eps_mode": "{clamp, add}",
    "ns_steps": "int [1, 99]",
    "ns_dtype": "{bfloat16, float16, float32, float64}",
    "polar": "{newton_schulz, svd}",
    "splits": "int [1, inf)",
    "flatten": "bool",
}


def check_matrices(group: dict[str, Any], rule: str) -> None:
    """Raise ``ValueError`` unless every parameter is a matrix or a stack of matrices."""
    for p in group["params"]:
        remedy = (
            "Give it to AdamW: optimizers.muon_with_adamw(model) routes every parameter to the "
            "rule that suits it."
        )
        try:
            _, rows, columns = matrix_shape(p.shape, group["splits"], group["flatten"])
            problem = (
                "" if p.numel() == 0 or max(rows, columns) > 1 else "a 1x1 matrix has no shape"
            )
        except ValueError as error:
            problem = str(error)
            if p.ndim >= 2:
                remedy = "Set splits to the number of matrices that are stacked in this parameter."
        if problem:
            raise ValueError(
                f"{rule} orthogonalizes matrices and got a parameter of shape {tuple(p.shape)} "
                f"({problem}). {remedy}"
            )
