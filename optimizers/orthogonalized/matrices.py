"""Parameters seen as stacks of matrices, and the options of their polar factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.linalg import METHODS, MUON_COEFFICIENTS, polar_many
from optimizers.linalg.speed import half_from
from optimizers.linalg.workspace import room


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
    return orthogonalize_all([tensor], group)[0]


def orthogonalize_all(tensors: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The same for many parameters of one device, batched by the back-end where that pays.

    The results are in the working precision of the back-end.
    """
    results = list(tensors)
    for i, factor in orthogonalize_each(tensors, group):
        results[i] = factor.clone()
    return results


def orthogonalize_each(
    tensors: Sequence[Tensor],
    group: dict[str, Any],
    source: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and the polar factor of each parameter, in the order of the batches.

    Args:
        tensors: What is orthogonalized; or only its shapes, where there is a ``source``.
        group: The options.
        source: Called with an index for the tensor itself when its turn comes.

    Yields:
        Each index with its factor. Use the factor, or copy it, before asking for the next: its
        memory is used again.
    """
    splits, flatten = group["splits"], group["flatten"]
    fetch = source or tensors.__getitem__
    full = [i for i, tensor in enumerate(tensors) if tensor.numel()]
    matrices = [as_matrices(tensors[i], splits, flatten) for i in full]
    factors = polar_many(
        matrices,
        source=lambda k: as_matrices(fetch(full[k]), splits, flatten),
        **_method(group),
    )
    for k, factor in factors:
        yield full[k], factor.reshape(tensors[full[k]].shape)


def _method(group: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`polar_many` that a group's options mean."""
    method, steps = group["polar"], group["ns_steps"]
    coefficients: Any = group["ns_coefficients"]
    torchs = steps == 5 and list(coefficients) == list(MUON_COEFFICIENTS)
    if torchs:
        # Nothing was asked for: the back-end may choose its own table.
        coefficients = None if method != "newton_schulz" else MUON_COEFFICIENTS
        steps = None if method == "auto" else steps
    return {
        "method": method,
        "coefficients": coefficients,
        "steps": steps,
        "dtype": None if group["ns_dtype"] == "auto" else getattr(torch, group["ns_dtype"]),
        "half_side": group["ns_half_side"],
        "eps": group["eps"],
        "eps_mode": group["eps_mode"],
    }


def polar_options(
    *,
    polar: str = "auto",
    ns_steps: int = 5,
    ns_dtype: torch.dtype | str = "auto",
    ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
    eps: float = 1e-7,
    eps_mode: str = "clamp",
    splits: int = 1,
    flatten: bool = False,
) -> dict[str, Any]:
    """Return the keys that every orthogonalizing rule keeps in its groups, with defaults."""
    return {
        "polar": polar,
        "ns_steps": ns_steps,
        # Groups hold plain values, so that any loader accepts them.
        "ns_dtype": str(ns_dtype).removeprefix("torch."),
        "ns_half_side": None,
        "ns_coefficients": ns_coefficients,
        "eps": eps,
        "eps_mode": eps_mode,
        "splits": splits,
        "flatten": flatten,
    }


def choose_precision(groups: Sequence[dict[str, Any]]) -> None:
    """Measure, once, what ``"auto"`` means here, and keep the answer with the options.

    In the group it travels with a checkpoint, so that a run that is resumed in another process or
    on another machine is the same run.
    """
    for group in groups:
        if group["ns_half_side"] is None and group["params"]:
            group["ns_half_side"] = half_from(group["params"][0].device)


def ratio(rows: int, columns: int, adjust: str | None) -> float:
    r"""Return the step's factor r(A, B) for a matrix ``A x B``.

    ``None`` or ``"original"``: :math:`\sqrt{\max(1, A/B)}`; ``"match_rms_adamw"``:
    :math:`0.2\sqrt{\max(A, B)}`; ``"none"``: 1.
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust == "none" or columns == 0:
        return 1.0
    return math.sqrt(max(1, rows / columns))


def descend_(p: Tensor, direction: Tensor, scale: float, group: dict[str, Any]) -> None:
    """``p <- (1 - lr * weight_decay) * p - lr * scale * direction``, or with cautious decay."""
    lr, decay = group["lr"], group["weight_decay"]
    if decay != 0 and group.get("cautious", False):
        _add_(p, torch.where(direction * p >= 0, p, 0), -lr * decay)
    elif decay != 0:
        p.mul_(1 - lr * decay)
    _add_(p, direction, -lr * scale)


def _add_(p: Tensor, o: Tensor, factor: Any) -> None:
    """``p <- p + factor * o`` for a float or a 0-D tensor factor."""
    if o.dtype is not p.dtype:
        # First of all: the product must not round to half precision.
        o = room(tuple(o.shape), p.dtype, o.device, "direction").copy_(o)
    if isinstance(factor, Tensor):
        p.addcmul_(o, factor.to(p.dtype))
    else:
        p.add_(o, alpha=factor)


POLAR_RANGES = {
    "polar": "{" + ", ".join(METHODS) + "}",
    "ns_coefficients": "3 of finite or list of 3 of finite",
    "ns_steps": "int [1, 99]",
    "ns_dtype": "{auto, bfloat16, float16, float32, float64}",
    "ns_half_side": "int [1, inf) or None",
    "eps": "(0, inf)",
    "eps_mode": "{clamp, add}",
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
