"""AdaHessian: Adam with the Hessian's diagonal in the place of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, State
from optimizers.functional import bias_corrections, ema_, step_counts
from optimizers.second_order.hutchinson import (
    HUTCHINSON_RANGES,
    HutchinsonOptimizer,
    spatial_mean,
)


class AdaHessian(HutchinsonOptimizer):
    r"""Adam whose second moment is that of the Hessian's diagonal.

    The rule, with one :math:`z` of -1 and 1 for the whole model and
    :math:`v = |z \odot \nabla^2 F z|`, averaged over the spatial axes of kernels:

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2) v^2 \\
        W &\leftarrow W - \eta\left[\frac{m / (1 - \beta_1^t)}
        {(s / (1 - \beta_2^u))^{k/2} + \epsilon} + \lambda W\right]

    where u counts the refreshes of s, one every ``hessian_every`` steps. On a function with a
    diagonal Hessian v is that diagonal for every z.

    ``step`` takes an ``Objective`` or a closure that returns the loss and does not call
    ``backward``.

    Args:
        params: Parameters or groups; complex ones are refused.
        lr: :math:`\eta` in [0, inf).
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon` in (0, inf).
        weight_decay: :math:`\lambda` in [0, inf), decoupled.
        hessian_power: k in [0, 1]; 0 is momentum without curvature.
        average_kernels: Whether v is averaged over the spatial axes of parameters of three and
            more dimensions.
        hessian_samples: Probes to average in a refresh, an int from 1 on.
        hessian_every: Steps between refreshes, an int from 1 on.
        seed: Of the probes.
        foreach: ``False`` loops, otherwise tensors are worked on together.

    State:
        ``step`` (), ``refreshes`` () (u), ``exp_avg`` and ``exp_hessian_diag_sq``, of the
        parameter's shape, at least float32. In ``param_groups[0]``: ``time``, the count of steps.

    Raises:
        ValueError: If an option lies outside its range, or groups differ in what is probed.
        OracleError: If the objective gives no Hessian products, or loss, gradient or products are
            not finite; nothing has changed then.

    Reference:
        Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, "AdaHessian: An Adaptive Second Order
        Optimizer for Machine Learning", 2021. Their code has no case for three dimensions; kernels
        of one spatial axis are averaged over it here.
    """

    ranges = {
        "betas": "2 of [0, 1)",
        "eps": "(0, inf)",
        "weight_decay": "[0, inf)",
        "hessian_power": "[0, 1]",
        "average_kernels": "bool",
        **HUTCHINSON_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        average_kernels: bool = True,
        hessian_samples: int = 1,
        hessian_every: int = 1,
        seed: int = 0,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "hessian_power": hessian_power,
                "average_kernels": average_kernels,
                "hessian_samples": hessian_samples,
                "hessian_every": hessian_every,
                "seed": seed,
                "foreach": foreach,
            },
        )

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return both averages, at zero."""
        return {
            "exp_avg": torch.zeros_like(p),
            "exp_hessian_diag_sq": torch.zeros_like(p),
            "refreshes": torch.zeros(()),
        }

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one tensor."""
        (t,), (beta1, beta2) = step_counts([state]), group["betas"]
        m, s, v = state["exp_avg"], state["exp_hessian_diag_sq"], self.estimate(state)
        m.lerp_(g, 1 - beta1)
        if v is not None:
            v = spatial_mean(v) if group["average_kernels"] else v
            s.lerp_(v.square().to(s.dtype), 1 - beta2)
            state["refreshes"] += 1
        u = state["refreshes"].item()
        if u == 0:  # it came between two refreshes: no curvature is known yet
            return
        D = (s / (1 - beta2**u)) ** (group["hessian_power"] / 2) + group["eps"]
        step = m / (1 - beta1**t) / D
        if group["weight_decay"] != 0:
            step = step + group["weight_decay"] * p
        p.sub_(group["lr"] * step)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all tensors: one call for each line."""
        beta1, beta2 = group["betas"]
        m, s = ([state[key] for state in states] for key in ("exp_avg", "exp_hessian_diag_sq"))
        ema_(m, grads, beta1)
        found = [self.estimate(state) for state in states]
        drawn = [v for v in found if v is not None]
        if len(drawn) == len(states):
            if group["average_kernels"]:
                drawn = [spatial_mean(v) for v in drawn]
            squares = list(torch._foreach_mul(drawn, drawn))
            ema_(s, [v.to(s[0].dtype) for v in squares], beta2)
            torch._foreach_add_([state["refreshes"] for state in states], 1)
        known = [k for k, state in enumerate(states) if state["refreshes"].item() > 0]
        if not known:
            return
        params, m, s = ([part[k] for k in known] for part in (params, m, s))
        states = [states[k] for k in known]
        corrections = [1 - beta2 ** state["refreshes"].item() for state in states]
        D = list(torch._foreach_div(s, corrections))
        torch._foreach_pow_(D, group["hessian_power"] / 2)
        torch._foreach_add_(D, group["eps"])
        step = list(torch._foreach_div(m, bias_corrections(states, beta1)))
        torch._foreach_div_(step, D)
        if group["weight_decay"] != 0:
            torch._foreach_add_(step, params, alpha=group["weight_decay"])
        torch._foreach_mul_(step, group["lr"])
        torch._foreach_sub_(params, step)
