"""Gradient descent in the metric that the graph of the loss induces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Optimizer, Scope, Signal, State
from optimizers.functional import bias_corrections, decay_, ema_
from optimizers.objective import OracleError
from optimizers.oracle import Oracle


class InducedMetric(Optimizer):
    r"""A smooth clipping of the whole gradient, by the metric of the loss's own graph.

    The graph of the loss, :math:`w \mapsto (w, \sqrt\xi L(w))`, is a surface, whose metric
    :math:`I + \xi \nabla L \nabla L^\top` keeps the gradient's direction and divides it by
    :math:`1 + \xi\|\nabla L\|^2`. One number for the whole model.

    The rule, with sums over all parameters of the optimizer:

    .. math::
        r &\leftarrow \beta_r r + (1 - \beta_r) g^2, \qquad
        d = \sqrt{r / (1 - \beta_r^t)} + \epsilon \quad\text{(rms; else } d = 1) \\
        s &\leftarrow \beta s + (1 - \beta)\, \xi \textstyle\sum g^2 / d, \qquad
        \hat s = s / (1 - \beta^t) \\
        \kappa &= 1 / (1 + \hat s) \quad\text{or, for log,}\quad L / (L^2 + \hat s) \\
        m &\leftarrow \mu m + (1 - \mu) g, \qquad \hat m = m / (1 - \mu^t) \\
        \theta &\leftarrow (1 - \eta\lambda)\theta - \eta\kappa\, \hat m / d

    ``log`` descends :math:`\log L` on the graph of :math:`\sqrt\xi \log L` and needs a positive
    loss; ``rms`` puts the graph over Adam's diagonal metric, and is AdamW for :math:`\xi = 0`.
    Without averages a step of ``base`` or ``log`` is at most :math:`\eta / (2\sqrt\xi)` long,
    whatever the gradient, and on an L-smooth function with :math:`\eta \le 1/L` a ``base`` step
    obeys :math:`f(\theta^+) \le f(\theta) - \frac\eta2 \|g\|^2 / (1 + \xi\|g\|^2)` (both derived;
    no rate is published).

    Args:
        params: Parameters or groups; complex ones are refused.
        lr: :math:`\eta` in [0, inf).
        xi: :math:`\xi` in [0, inf), on the sum of squares over the whole model: networks want 1e-9
            to 1e-2.
        variant: ``"base"``, ``"log"`` or ``"rms"``; the same in all groups.
        momentum: :math:`\mu` in [0, 1).
        beta: :math:`\beta` in [0, 1), of the metric's average. :math:`\xi` is inside of it.
        beta_rms: :math:`\beta_r` in [0, 1).
        eps: :math:`\epsilon` in (0, inf).
        weight_decay: Decoupled, in [0, inf), not multiplied by :math:`\kappa`.
        maximize: Ascend instead of descend.
        foreach: ``False`` loops, otherwise tensors are worked on together.

    State:
        ``step`` (), ``momentum_buffer`` and for ``rms`` ``square_avg``, of the parameter's shape,
        and ``metric`` (), the average s, which each parameter counts from its own first step.

    Raises:
        ValueError: If an option lies outside its range, or groups differ in ``variant``.
        OracleError: If ``log`` gets no closure, and so no loss, or one that is not positive.

    Reference:
        Harvey, "The Optimiser Hidden in Plain Sight: Training with the Loss Landscape's Induced
        Metric", 2025. A tensor whose gradient is not finite leaves the sum (ours), so that it
        spoils itself alone.
    """

    # One number for all parameters.
    scope = Scope.MODEL
    ranges = {
        "xi": "[0, inf)",
        "variant": "{base, log, rms}",
        "momentum": "[0, 1)",
        "beta": "[0, 1)",
        "beta_rms": "[0, 1)",
        "eps": "(0, inf)",
        "weight_decay": "[0, inf)",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        *,
        xi: float = 0.1,
        variant: str = "base",
        momentum: float = 0.9,
        beta: float = 0.8,
        beta_rms: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "xi": xi,
                "variant": variant,
                "momentum": momentum,
                "beta": beta,
                "beta_rms": beta_rms,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def prepare(self) -> None:
        """Refuse groups that measure in different metrics."""
        ranges.check_alike(self.param_groups, ["variant"], "share one metric")

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the averages, at zero."""
        state: State = {"momentum_buffer": torch.zeros_like(p), "metric": p.new_zeros(())}
        if group["variant"] == "rms":
            state["square_avg"] = torch.zeros_like(p)
        return state

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Take the gradients, and the square of their length in the metric."""
        loss = oracle.evaluate()
        if self.param_groups[0]["variant"] == "log":
            if loss is None:
                raise OracleError(
                    "InducedMetric with variant='log' needs the loss of the batch. Pass a closure "
                    "that clears the gradients, calls loss.backward() and returns the loss: "
                    "optimizer.step(closure)."
                )
            value = float(loss)
            if not 0 < value < float("inf"):
                raise OracleError(
                    f"InducedMetric with variant='log' needs a positive loss; got {value}. "
                    "Add a constant that bounds it from below, or use another variant."
                )
        parts = [
            self._square(p, p.grad, group)
            for group in self.param_groups
            for p in group["params"]
            # The base refuses the others, with its message.
            if p.grad is not None and p.grad.layout is torch.strided and p.grad.shape == p.shape
        ]
        if parts:
            device = parts[0].device
            squares = torch.stack([part.to(device, parts[0].dtype) for part in parts])
            self._total = torch.where(squares.isfinite(), squares, 0).sum()
        if loss is not None:  # closures may return a plain number
            plain = not isinstance(loss, Tensor)
            self._loss = torch.tensor(loss, dtype=torch.float64) if plain else loss.detach()
        return loss, lambda p: p.grad

    def _square(self, p: Tensor, g: Tensor, group: Group) -> Tensor:
        """Return one parameter's part of the sum; the state is not written."""
        wide = self.state[p]["momentum_buffer"].dtype
        g = g.to(wide)
        if group["variant"] != "rms":
            norm: Tensor = torch.linalg.vector_norm(g)
            return norm.square()
        square = g * g
        t = self.state[p]["step"] + 1
        d = _root(self.state[p]["square_avg"].lerp(square, 1 - group["beta_rms"]), t, group)
        return (square / d).sum()

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one tensor."""
        t, m = state["step"], state["momentum_buffer"]
        m.lerp_(g, 1 - group["momentum"])
        direction = m / (1 - group["momentum"] ** t.item())
        if group["variant"] == "rms":
            state["square_avg"].lerp_(g * g, 1 - group["beta_rms"])
            direction = direction / _root(state["square_avg"], t, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * self._scale(state, 1 - group["beta"] ** t.item(), group) * direction)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all tensors: one call for each line."""
        m = [s["momentum_buffer"] for s in states]
        ema_(m, grads, group["momentum"])
        corrections = bias_corrections(states, group["beta"])
        scales = [self._scale(s, c, group) for s, c in zip(states, corrections, strict=True)]
        unbiased = bias_corrections(states, group["momentum"])
        scales = [group["lr"] * k / c for k, c in zip(scales, unbiased, strict=True)]
        direction = list(torch._foreach_mul(m, [k.to(m[0].dtype) for k in scales]))
        if group["variant"] == "rms":
            r = [s["square_avg"] for s in states]
            ema_(r, list(torch._foreach_mul(grads, grads)), group["beta_rms"])
            d = list(torch._foreach_div(r, bias_corrections(states, group["beta_rms"])))
            torch._foreach_sqrt_(d)
            torch._foreach_add_(d, group["eps"])
            torch._foreach_div_(direction, d)
        decay_(params, group["lr"], group["weight_decay"])
        torch._foreach_sub_(params, direction)

    def _scale(self, state: State, correction: Any, group: Group) -> Tensor:
        """Average the metric of this step; return kappa."""
        total = self._total.to(state["metric"])
        state["metric"].lerp_(group["xi"] * total, 1 - group["beta"])
        s: Tensor = state["metric"] / correction
        if group["variant"] != "log":
            return 1 / (1 + s)
        assert self._loss is not None  # refused before
        loss = self._loss.to(s)
        return loss / (loss.square() + s)

    def finish(self, loss: Tensor | None) -> None:
        """Forget the step's numbers."""
        self._total, self._loss = torch.zeros(()), None

    # Of one step alone.
    _total: Tensor = torch.zeros(())
    _loss: Tensor | None = None


def _root(r: Tensor, t: Tensor, group: Group) -> Tensor:
    """Return the diagonal metric of a corrected second moment."""
    correction = 1 - group["beta_rms"] ** t.to(torch.float64)
    d: Tensor = (r / correction.to(r.dtype)).sqrt() + group["eps"]
    return d
