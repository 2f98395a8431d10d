"""Polar factors for rules that go on computing with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from optimizers.base import Group
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    matrix_shape,
    orthogonalize_each,
    polar_options,
)

# In such a rule ``eps`` is that of its own denominators; the iteration keeps its defaults.
_FIXED = {key: polar_options()[key] for key in ("eps", "eps_mode")}

FACTOR_RANGES = {key: rule for key, rule in POLAR_RANGES.items() if key not in _FIXED}


def factor_options(**options: Any) -> dict[str, Any]:
    """Return the keys that :func:`polar_options` returns, but for the iteration's ``eps``."""
    return {k: v for k, v in polar_options(**options).items() if k not in _FIXED}


def iteration_options(group: Group) -> Group:
    """Return the group with the iteration's own ``eps``, whichever way the rule keeps its."""
    return group if "eps_mode" in group else {**group, **_FIXED}


def polar_factors(
    tensors: Sequence[Tensor], group: Group, source: Callable[[int], Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and the polar factors of each parameter that is not empty.

    Rows and columns of zeros stay exactly zero: a decomposition leaves round-off in them, which
    a division by its own mean square would blow up.

    Args:
        tensors: What is orthogonalized; or only its shapes and dtypes, where there is a source.
        group: The options.
        source: Called with an index for the tensor itself when its turn comes, so that momenta
            that look ahead need not all exist at once.

    Yields:
        Each index with its factors ``(count, rows, columns)``, in the tensor's dtype. Use them
        before asking for the next: their memory is used again.
    """
    fetch = source or tensors.__getitem__
    # The products of an iteration keep zeros; a decomposition does not.
    exact = group["polar"] in ("eigh", "svd")
    for i, factor in orthogonalize_each(tensors, iteration_options(group), source):
        O = stack(factor, group).to(tensors[i].dtype)
        yield i, _without_empty(O, stack(fetch(i), group)) if exact else O


def polar_factor(tensor: Tensor, group: Group) -> Tensor:
    """Return the polar factors ``(count, rows, columns)`` of one parameter."""
    for _, O in polar_factors([tensor], group):
        return O
    return stack(tensor, group)  # empty


def stack(tensor: Tensor, group: Group) -> Tensor:
    """Return a parameter-shaped tensor as ``(count, rows, columns)``, also for one matrix."""
    return tensor.reshape(matrix_shape(tensor.shape, group["splits"], group["flatten"]))


def _without_empty(O: Tensor, U: Tensor) -> Tensor:
    present = U != 0
    return O * (present.any(-1, keepdim=True) & present.any(-2, keepdim=True))
