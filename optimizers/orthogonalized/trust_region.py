"""The trust-region gradient method with momentum, in the norm of your choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import uniform_count
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    check_matrices,
    choose_precision,
    polar_options,
)
from optimizers.orthogonalized.norms import BALLS, OF_MATRICES, is_matrix, steepest


class NonEuclideanTrustRegion(Optimizer):
    r"""A step of fixed length, in a chosen norm, against the average gradient.

    One rule with three well-known members: Muon without Nesterov (spectral norm), normalised SGD
    with momentum (Frobenius) and signSGD with momentum (:math:`\ell_\infty`). Take it to compare
    norms, or for its guarantees; with a constant rate it circles the minimum at a distance of the
    order of the rate, so let the rate decay.

    The rule, for each parameter :math:`x` with gradient :math:`g`, momentum
    :math:`\mu = 1 - \alpha`, radius :math:`\eta = lr \cdot scale` and decay
    :math:`\beta = lr \cdot weight\_decay`:

    .. math::
        m &\leftarrow \mu m + (1-\mu) g \qquad (m = g \text{ at first}) \\
        x^+ &\in \arg\min \{\langle m, x\rangle + R(x) : \|x - (1-\beta)x_k\| \le \eta\}

    Without R that is :math:`x^+ = (1-\beta) x - \eta\, d(m)` with the norm's steepest direction d
    (:func:`optimizers.orthogonalized.norms.steepest`): :math:`UV^\top`, :math:`m/\|m\|`,
    :math:`\mathrm{sign}(m)`, the sign of the largest entry, unit columns or unit rows.
    With ``extrapolate`` the gradient is taken at
    :math:`y = x_k + \frac{\mu}{1-\mu}(x_k - x_{k-1})`: between steps the parameters hold y, and
    :meth:`eval_params` is a context in which they hold x, the weights to deploy.

    If the gradient is L-Lipschitz from the norm to its dual and the noise is at most
    :math:`\sigma` in the Frobenius norm, of which the dual norm is at most :math:`\rho` times,
    then

    .. math::
        E \min_{k \le K} \|\nabla f(x_k)\|_* \le \frac{\Delta_0}{\eta K}
        + \frac{2\rho\sigma}{\alpha K} + 2\sqrt\alpha\rho\sigma + \frac{3 L \eta}{2}
        + \frac{2 L \eta}{\alpha}

    and for star-convex f, with exact gradients, :math:`\alpha = 1`, :math:`\eta = \beta D` and
    :math:`D \ge \|x^*\|, \|x_0\|`:
    :math:`f(x_k) - f^* \le (1-\beta)^k (f(x_0) - f^*) + 2 L \beta D^2` (derived).

    Args:
        params: Parameters. The norm is that of each parameter (of each matrix in a stack for
            ``spectral, column, row``), so that of all is their maximum.
        lr: :math:`\eta` for ``scale=1``, in [0, inf).
        norm: ``"spectral"``, ``"frobenius"``, ``"linf"``, ``"l1"``, ``"column"``, ``"row"``, or
            ``"auto"``: spectral for matrices, Frobenius for vectors. May differ by group.
        momentum: :math:`\mu` in [0, 1), the weight of the old average.
        scale: Factor of the radius, in (0, inf).
        weight_decay: In [0, inf), with ``lr * weight_decay < 1``. From a point with
            :math:`\|x\| \le scale/weight\_decay` all iterates stay in that ball.
        extrapolate: Take gradients at the extrapolated point.
        init: ``"gradient"``: the average starts with the first gradient (the paper, one gradient
            a step); ``"zeros"``: it starts at zero, as Muon's.
        regularizer: R, for ``norm="linf"``: ``None``, ``"l1"`` (``strength`` times the sum of
            absolute values) or ``"box"`` (all entries in ``[lower, upper]``; a point outside is
            clipped first).
        strength: Of ``"l1"``, in [0, inf).
        lower: Of ``"box"``.
        upper: Of ``"box"``.
        polar: Back-end of the spectral direction, see :class:`Muon`.
        ns_coefficients: See :class:`Muon`.
        ns_steps: See :class:`Muon`.
        ns_dtype: See :class:`Muon`.
        splits: See :class:`Muon`; for ``spectral, column, row``.
        flatten: See :class:`Muon`.
        maximize: Ascend instead of descend.
        foreach: ``False`` loops, otherwise parameters are batched.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape; with ``extrapolate`` also
        ``iterate``, x. All at least float32.

    Raises:
        ValueError: If an option lies outside its range, a matrix norm is asked of a vector, a
            regularizer of another norm, or ``lr * weight_decay`` is not below 1.

    Reference:
        Kovalev, "Understanding Gradient Orthogonalization for Deep Learning via Non-Euclidean
        Trust-Region Optimization", 2025, algorithms 1 to 3. The closed forms of the composite
        step are derived here: for ``l1`` the minimiser nearest to the centre.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "norm": "{auto, " + ", ".join(BALLS) + "}",
        "momentum": "[0, 1)",
        "scale": "(0, inf)",
        "weight_decay": "[0, inf)",
        "extrapolate": "bool",
        "init": "{gradient, zeros}",
        "regularizer": "{l1, box} or None",
        "strength": "[0, inf)",
        "lower": "[-inf, inf]",
        "upper": "[-inf, inf]",
        **POLAR_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        norm: str = "auto",
        momentum: float = 0.9,
        scale: float = 1.0,
        weight_decay: float = 0.0,
        extrapolate: bool = False,
        init: str = "gradient",
        regularizer: str | None = None,
        strength: float = 0.0,
        lower: float = -float("inf"),
        upper: float = float("inf"),
        polar: str = "auto",
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | str = "auto",
        splits: int = 1,
        flatten: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "norm": norm,
                "momentum": momentum,
                "scale": scale,
                "weight_decay": weight_decay,
                "extrapolate": extrapolate,
                "init": init,
                "regularizer": regularizer,
                "strength": strength,
                "lower": lower,
                "upper": upper,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
                **polar_options(
                    polar=polar,
                    ns_coefficients=ns_coefficients,
                    ns_steps=ns_steps,
                    ns_dtype=ns_dtype,
                    splits=splits,
                    flatten=flatten,
                ),
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse what does not fit together."""
        if group["norm"] in OF_MATRICES:
            check_matrices(group, f"NonEuclideanTrustRegion with norm={group['norm']!r}")
        if group["regularizer"] is not None and group["norm"] != "linf":
            raise ValueError(
                f"regularizer={group['regularizer']!r} needs norm='linf', whose step has a closed "
                f"form for it; got norm={group['norm']!r}."
            )
        if group["lower"] > group["upper"]:
            raise ValueError(
                f"lower must be at most upper; got {group['lower']!r} and {group['upper']!r}."
            )
        lr, decay = group["lr"], group["weight_decay"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if on_host and float(lr) * decay >= 1:
            raise ValueError(
                f"lr * weight_decay must be below 1; got {float(lr)!r} * {decay!r}. Lower one of "
                "them."
            )

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the average, at zero, and where extrapolating the iterate."""
        state: State = {"momentum_buffer": torch.zeros_like(p)}
        if group["extrapolate"]:
            state["iterate"] = p.detach().clone()
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        self.update_foreach([p], [g], [state], group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters; equal shapes share one polar iteration."""
        momenta = [s["momentum_buffer"] for s in states]
        _average_(momenta, grads, states, group)
        radius = group["lr"] * group["scale"]
        shrink = 1 - group["lr"] * group["weight_decay"]
        directions = self._directions(momenta, group)
        for p, state, m, d in zip(params, states, momenta, directions, strict=True):
            if not group["extrapolate"]:
                _move_(p, m, d, radius, shrink, group)
                continue
            # Until the first step the model may still be loaded: x is where it is then.
            x = state["iterate"]
            x.copy_(torch.where(state["step"] <= 1, p, x))
            last = x.clone()
            _move_(x, m, d, radius, shrink, group)
            ahead = group["momentum"] / (1 - group["momentum"])
            p.copy_(x + ahead * (x - last))

    def _directions(self, momenta: list[Tensor], group: Group) -> list[Tensor]:
        if group["norm"] != "auto":
            return steepest(momenta, group["norm"], group)
        result = list(momenta)
        for norm in ("spectral", "frobenius"):
            wanted = norm == "spectral"
            own = [
                i
                for i, m in enumerate(momenta)
                if is_matrix(m, group["splits"] if m.ndim == 2 else 1, group["flatten"]) == wanted
            ]
            found = steepest([momenta[i] for i in own], norm, group) if own else []
            for i, d in zip(own, found, strict=True):
                result[i] = d
        return result

    def eval_params(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameters hold x; that matters with ``extrapolate``."""
        return self._at_iterates()

    @contextlib.contextmanager
    def _at_iterates(self) -> Iterator[None]:
        moved = [
            (p, p.detach().clone(), self.state[p]["iterate"])
            for group in self.param_groups
            for p in group["params"]
            if group["extrapolate"] and self._has_history(p)
        ]
        with torch.no_grad():
            for p, _, x in moved:
                p.copy_(x)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, y, _ in moved:
                    p.copy_(y)


def _average_(
    momenta: list[Tensor], grads: list[Tensor], states: list[State], group: Group
) -> None:
    """``m <- momentum * m + (1 - momentum) * g``; the first one is the gradient itself."""
    weight = 1 - group["momentum"]
    if group["init"] == "zeros":
        torch._foreach_lerp_(momenta, grads, weight)
        return
    count = uniform_count(states)
    if count is not None:
        torch._foreach_lerp_(momenta, grads, 1.0 if count == 1 else weight)
        return
    for m, g, state in zip(momenta, grads, states, strict=True):
        later = (state["step"] > 1).to(m.dtype)
        m.lerp_(g, 1 - later * (1 - weight))


def _move_(p: Tensor, m: Tensor, d: Tensor, radius: Any, shrink: Any, group: Group) -> None:
    """Take the step from ``p``, in place."""
    kind = group["regularizer"]
    if kind == "box":
        p.clamp_(group["lower"], group["upper"])
    p.mul_(shrink)
    if kind == "l1":
        p.copy_(_l1_step(p, m, radius, group["strength"]))
    else:
        p.sub_(radius * d)
    if kind == "box":
        p.clamp_(group["lower"], group["upper"])


def _l1_step(centre: Tensor, m: Tensor, radius: Any, strength: float) -> Tensor:
    """Minimise ``m u + strength |u|`` over ``|u - centre| <= radius``, nearest to the centre.

    On the whole line the minimisers are an interval ``[low, high]``: the answer is the centre,
    projected on it and then on the ball.
    """
    inf = float("inf")
    low = torch.where(m >= strength, -inf, torch.where(m >= -strength, 0.0, inf))
    high = torch.where(m <= -strength, inf, torch.where(m <= strength, 0.0, -inf))
    best = torch.minimum(torch.maximum(centre, low), high)
    return torch.minimum(torch.maximum(best, centre - radius), centre + radius)
