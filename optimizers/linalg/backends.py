r"""One function for all polar factors: a back-end by name, or by the error that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from optimizers.linalg.coefficients import (
    MUON_COEFFICIENTS,
    Row,
    divided,
    odd_coefficients,
    quintic_coefficients,
    rows_of,
    worst_error,
)
from optimizers.linalg.polar import (
    CORRECTION,
    newton_schulz,
    polar_eigh,
    polar_svd,
    quintic_step,
)
from optimizers.linalg.speed import half_from
from optimizers.linalg.stacks import iterate

METHODS = ("auto", "newton_schulz", "polar_express", "gram", "refined", "eigh", "svd")

# The error of Muon's five steps on a full spectrum.
MUON_ERROR = 0.2
# In the Gram form a bfloat16 phase of two steps overshoots its interval by up to 3 %: rows divided
# by 1.01 ended as high as 3.8 on flat spectra of short side 32, divided by 1.03 never above 1.25.
_SLACK = 1.03
# Degrees 9, 5 and 9: eleven products where torch takes fifteen, and by the tight scaling closer
# to the polar factor on Gaussian matrices and on logarithmic spectra of condition 10 to 10^6. On
# short sides torch's Frobenius norm is nearer to the spectral norm: a twelfth product is needed.
# Where one direction outweighs all others a hundredfold, both are farther: nothing is tight there.
_FAST = divided(odd_coefficients((5, 3, 5), 5e-3, cushion=0.01), _SLACK)
_FAST_SHORT = divided(odd_coefficients((5, 5, 5), 2.6e-3, cushion=0.003), _SLACK)
_SHORT_BELOW = 256
_SAFETY = 1.01
# The smallest singular value, relative to the scaling, for which an error is promised.
_LOWER = 1e-3


def polar(
    G: Tensor,
    *,
    method: str = "auto",
    error: float = MUON_ERROR,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    eps_mode: str = "clamp",
) -> Tensor:
    r"""Return the polar factor :math:`U V^\top` of each matrix, exactly or approximately.

    ==================  =========================================================================
    ``newton_schulz``   the plain loop with Muon's quintic, in torch's order of operations
    ``polar_express``   the composition of optimal quintics, any number of steps
    ``gram``            the same composition, iterated on the Gram matrix where that is cheaper
    ``refined``         ``gram``, then one correcting step in float32 (orthogonal to
                        :math:`\tfrac52 e^3` for an error e before; the singular vectors stay
                        those of the low precision)
    ``eigh``            exact: float64 eigendecomposition of the Gram matrix
    ``svd``             exact: singular value decomposition, the reference
    ``auto``            by ``error``: three optimal polynomials of degree 5 and 9 from a tight
                        scaling (0.2, Muon's own level), five to eight quintics, or ``eigh``
                        (below 1e-2 on a CPU, 1e-6 elsewhere)
    ==================  =========================================================================

    Args:
        G: Matrices ``(..., rows, columns)``.
        method: See the table.
        error: For ``auto``, the largest :math:`|\sigma' - 1|` wanted for singular values above
            ``1e-3`` of the scaling (the Frobenius norm, or a bound 3 to 7 times closer to the
            spectral norm), in (0, 1).
        coefficients: A triple or rows of triples instead of the method's own.
        steps: Number of steps; 5 if ``None``.
        dtype: Arithmetic of the iteration. ``None``: bfloat16 for ``newton_schulz`` and, for the
            others, whichever of bfloat16 and float32 this device multiplies faster at this size
            (measured once); float64 stays float64.
        eps: For ``newton_schulz``, see :func:`newton_schulz`.
        eps_mode: For ``newton_schulz``.

    Returns:
        The factors: in the working precision of the iteration, or in ``G``'s for exact methods.

    Raises:
        ValueError: If ``G`` has fewer than two dimensions, or an argument lies outside its range.
        TypeError: If ``G`` is not of a floating-point type.

    Reference:
        Jordan et al., "Muon", 2024; Amsel, Persson, Musco, Gower, "The Polar Express", 2025; the
        Gram form with restarts: Dao AI Lab, "Gram Newton-Schulz", 2026.
    """
    if G.ndim < 2:
        raise ValueError(f"G must have at least two dimensions; got shape {tuple(G.shape)}.")
    if not G.is_floating_point():
        raise TypeError(f"G must be of a floating-point type; got {G.dtype}.")
    if G.numel() == 0:
        return G.clone()
    stack = G.reshape(-1, *G.shape[-2:]) if G.ndim != 2 else G
    ((_, factor),) = polar_many(
        [stack],
        method=method,
        error=error,
        coefficients=coefficients,
        steps=steps,
        dtype=dtype,
        eps=eps,
        eps_mode=eps_mode,
    )
    # A copy: the memory of an iteration is used again.
    return factor.reshape(G.shape).clone()


def polar_many(
    matrices: Sequence[Tensor],
    *,
    method: str = "auto",
    error: float = MUON_ERROR,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    half_side: int | None = None,
    eps: float = 1e-7,
    eps_mode: str = "clamp",
    source: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the polar factors of many tensors of one device, batched wherever that pays.

    Args:
        matrices: Tensors ``(rows, columns)`` or ``(count, rows, columns)``.
        method: As for :func:`polar`, with ``error, coefficients, steps, dtype, eps, eps_mode``.
        error: See :func:`polar`.
        coefficients: See :func:`polar`.
        steps: See :func:`polar`.
        dtype: See :func:`polar`.
        half_side: The short side from which on bfloat16 is used; measured if ``None``.
        eps: See :func:`polar`.
        eps_mode: See :func:`polar`.
        source: Called with an index for the matrix itself when its turn comes; ``matrices`` then
            only tell shapes and types.

    Yields:
        Each index with its factor, in no particular order. The factor's memory may be used again
        for the next one: use it first, or copy it.

    Raises:
        ValueError: If ``method`` or ``error`` lies outside its range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if not 0 < error < 1:
        raise ValueError(f"error must lie in (0, 1); got {error!r}.")
    fetch = source or matrices.__getitem__
    free = method == "auto" and coefficients is None and steps is None
    # Below a percent float32 is needed, where a CPU's eigendecomposition is faster than the
    # iteration (measured: 0.4 to 0.9 of its time on squares, wide and thin matrices).
    if free and error < (1e-2 if matrices and matrices[0].is_cpu else 1e-6):
        method = "eigh"
    if method in ("eigh", "svd"):
        exact = polar_eigh if method == "eigh" else polar_svd
        for i in range(len(matrices)):
            yield i, exact(fetch(i))
        return
    if method == "newton_schulz":
        table = MUON_COEFFICIENTS if coefficients is None else coefficients
        for i in range(len(matrices)):
            # Each tensor by itself, bit by bit as torch does it.
            yield (
                i,
                newton_schulz(
                    fetch(i),
                    coefficients=table,
                    steps=steps or 5,
                    eps=eps,
                    eps_mode=eps_mode,
                    dtype=dtype or torch.bfloat16,
                ),
            )
        return
    rows, tight = _rows(method, error, coefficients, steps)
    for (working, short), members in _parts(matrices, dtype, half_side, error, method).items():
        factors = iterate(
            [matrices[i] for i in members],
            _FAST_SHORT if short and rows is _FAST else rows,
            dtype=working,
            tight=tight,
            # A given table is applied as it stands, after the Frobenius norm.
            safety=1.0 if coefficients is not None else _SAFETY,
            gram=False if method == "polar_express" else None,
            source=lambda k, members=members: fetch(members[k]),  # type: ignore[misc]
        )
        for k, factor in factors:
            yield members[k], _corrected(factor) if method == "refined" else factor


def _rows(
    method: str,
    error: float,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None,
    steps: int | None,
) -> tuple[Sequence[Row], bool]:
    """Return the rows to apply and whether the scaling is the tight one."""
    if coefficients is not None:
        return rows_of(coefficients, steps or 5), False
    if method == "auto" and steps is None:
        if error >= MUON_ERROR:
            return _FAST, True
        for count in range(5, 9):
            rows = quintic_coefficients(_LOWER, count)
            if worst_error(rows, _LOWER) <= error:
                return divided(rows, _SLACK), True
    rows = quintic_coefficients(_LOWER, steps or 5)
    slack = _SAFETY if method == "polar_express" else _SLACK
    return divided(rows, slack), method in ("auto", "refined")


def _parts(
    matrices: Sequence[Tensor],
    dtype: torch.dtype | None,
    half_side: int | None,
    error: float,
    method: str,
) -> dict[tuple[torch.dtype, bool], list[int]]:
    """Return which matrices are worked on in which precision, those of short sides apart."""
    parts: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, matrix in enumerate(matrices):
        n, working = min(matrix.shape[-2:]), dtype
        if working is None:
            working = torch.float64 if matrix.dtype is torch.float64 else torch.float32
            # bfloat16 rounds at 4e-3: a smaller error is out of its reach.
            if working is torch.float32 and not (method == "auto" and error < 1e-2):
                side = half_from(matrix.device) if half_side is None else half_side
                if n >= side:
                    working = torch.bfloat16
        parts.setdefault((working, n < _SHORT_BELOW), []).append(i)
    return parts


def _corrected(X: Tensor) -> Tensor:
    X = X if X.dtype is torch.float64 else X.float()
    return quintic_step(X, CORRECTION, transposed=X.shape[-2] > X.shape[-1])
