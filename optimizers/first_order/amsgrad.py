"""AMSGrad and AdamNC: Adam whose per-coordinate rates cannot grow again."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, State
from optimizers.functional import bias_corrections, step_counts, uniform_count


class AMSGrad(Optimizer):
    r"""Adam with the running maximum of the second moment, as the paper states it.

    Use it where rare large gradients matter (Adam forgets them and may converge to the worst
    point) or where a proof needs rates that never grow. On networks expect what Adam gives. One
    exploding gradient freezes its coordinate for good; :meth:`reset_max` undoes that.

    The rule, for each element and ``t = 1, 2, ...``, with :math:`m_0=v_0=\hat v_0=0`:

    .. math::
        m_t &= \beta_{1t} m_{t-1} + (1-\beta_{1t})\, g_t \\
        v_t &= \beta_{2t} v_{t-1} + (1-\beta_{2t})\, g_t^2 \\
        \hat v_t &= \max(\hat v_{t-1}, v_t) \\
        x_{t+1} &= x_t - \alpha_t\, m_t / (\sqrt{\hat v_t} + \epsilon)

    with :math:`\alpha_t` = ``lr`` or ``lr / sqrt(t)``. The paper has no bias correction and
    :math:`\epsilon = 0` (``eps=0`` is allowed; 0/0 is then a zero step). With
    ``beta2_schedule="1-1/t"`` it is AdamNC: :math:`\beta_{2t} = 1 - 1/t` and no maximum.

    ``bias_correction="torch"`` is ``torch.optim.Adam(amsgrad=True)``: the step is
    ``lr / (1 - beta1**t)`` and the denominator :math:`\sqrt{\hat v_t / (1-\beta_2^t)} + \epsilon`.
    That is *not* the paper's monotone rule: dividing the maximum by the growing
    :math:`1-\beta_2^t` lets the effective rate grow again.

    The projection onto a feasible set that the theory uses is a step hook:
    ``optimizer.register_step_post_hook(lambda *_: x.data.clamp_(-1, 1))``.

    Args:
        params: Parameters or groups.
        lr: Learning rate :math:`\alpha`, in [0, inf).
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1); the theory needs
            :math:`\beta_1 < \sqrt{\beta_2}` (a warning says so).
        eps: :math:`\epsilon` in [0, inf), added after the root.
        weight_decay: In [0, inf); added to the gradient as ``weight_decay * x`` ...
        decoupled_weight_decay: ... or, if true, applied as ``x <- (1 - alpha_t * weight_decay) x``.
        bias_correction: ``"none"`` (the paper) or ``"torch"``.
        lr_decay: ``"none"`` or ``"sqrt"`` (:math:`\alpha_t = \alpha/\sqrt t`).
        beta1_decay: ``None``, a factor :math:`\lambda` in (0, 1] for
            :math:`\beta_{1t} = \beta_1 \lambda^{t-1}`, or ``"1/t"`` for :math:`\beta_1 / t`.
        beta2_schedule: ``None`` or ``"1-1/t"`` (AdamNC).
        maximize: Ascend instead of descend.
        foreach: ``None`` takes the fastest path (torch's fused kernel where its arithmetic is
            this rule's, else multi-tensor), ``True`` multi-tensor, ``False`` a plain loop.
        compile: Compile the multi-tensor update.

    State:
        ``step`` (), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v` and, without
        ``beta2_schedule``, ``max_exp_avg_sq`` :math:`\hat v`, of the parameter's shape, in its
        dtype (float32 for half precision).

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, algorithms 2, 3.
    """

    ranges = {
        "lr": "[0, inf)",
        "betas": "2 of [0, 1)",
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "decoupled_weight_decay": "bool",
        "bias_correction": "{none, torch}",
        "lr_decay": "{none, sqrt}",
        "beta1_decay": "(0, 1] or {1/t} or None",
        "beta2_schedule": "{1-1/t} or None",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        bias_correction: str = "none",
        lr_decay: str = "none",
        beta1_decay: float | str | None = None,
        beta2_schedule: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "bias_correction": bias_correction,
                "lr_decay": lr_decay,
                "beta1_decay": beta1_decay,
                "beta2_schedule": beta2_schedule,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse a correction that has no meaning; warn where the theory is void."""
        beta1, beta2 = group["betas"]
        if group["beta2_schedule"] is not None and group["bias_correction"] != "none":
            raise ValueError(
                "bias_correction must be 'none' with beta2_schedule (the average is unbiased "
                f"already); got {group['bias_correction']!r}."
            )
        if group["beta1_decay"] is not None and group["bias_correction"] != "none":
            raise ValueError(
                "bias_correction must be 'none' with beta1_decay (it corrects constant betas); "
                f"got {group['bias_correction']!r}."
            )
        if group["beta2_schedule"] is None and beta1 > 0 and beta1 >= math.sqrt(beta2):
            warnings.warn(
                f"betas {(beta1, beta2)} violate beta1 < sqrt(beta2): the convergence theory of "
                "AMSGrad does not cover them.",
                stacklevel=2,
            )

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the moments, at zero."""
        state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if group["beta2_schedule"] is None:
            state["max_exp_avg_sq"] = torch.zeros_like(p)
        return state

    def reset_max(self) -> None:
        """Forget the maximum: set it to the present second moment in every parameter."""
        for state in self.state.values():
            if "max_exp_avg_sq" in state:
                state["max_exp_avg_sq"].copy_(state["exp_avg_sq"])

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Algorithm 2 (or 3) for one tensor."""
        (t,) = step_counts([state])
        lr, beta1, beta2 = _schedules(t, group)
        if group["weight_decay"] != 0:
            if group["decoupled_weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            else:
                g = g + group["weight_decay"] * p
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).add_(g * g * (1 - beta2))
        if "max_exp_avg_sq" in state:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        denominator = v.sqrt()
        if group["bias_correction"] == "torch":
            denominator /= (1 - group["betas"][1] ** t) ** 0.5
            lr = lr / (1 - group["betas"][0] ** t)
        denominator += group["eps"]
        if group["eps"] == 0:
            denominator.masked_fill_(denominator == 0, 1)  # there m = 0: a zero step
        p.sub_(lr * (m / denominator))

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """Algorithm 2 (or 3) for all tensors: fused where possible, else multi-tensor."""
        if _fusable(params, grads, states, group) and _fused(params, grads, states, group):
            return
        per_tensor = [_schedules(t, group) for t in step_counts(states)]
        lrs = [lr for lr, _, _ in per_tensor]
        if group["weight_decay"] != 0:
            if group["decoupled_weight_decay"]:
                torch._foreach_mul_(params, [1 - lr * group["weight_decay"] for lr in lrs])
            else:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        m = [s["exp_avg"] for s in states]
        v = [s["exp_avg_sq"] for s in states]
        _lerp_(m, grads, [1 - beta1 for _, beta1, _ in per_tensor])
        decays = [beta2 for _, _, beta2 in per_tensor]
        if _uniform(decays):  # without a temporary
            torch._foreach_mul_(v, decays[0])
            torch._foreach_addcmul_(v, grads, grads, 1 - decays[0])
        else:
            _lerp_(v, torch._foreach_mul(grads, grads), [1 - beta2 for beta2 in decays])
        if group["beta2_schedule"] is None:
            maxima = [s["max_exp_avg_sq"] for s in states]
            torch._foreach_maximum_(maxima, v)
            v = maxima
        denominators = torch._foreach_sqrt(v)
        if group["bias_correction"] == "torch":
            beta1, beta2 = group["betas"]
            torch._foreach_div_(denominators, [c**0.5 for c in bias_corrections(states, beta2)])
            lrs = [lr / c for lr, c in zip(lrs, bias_corrections(states, beta1), strict=True)]
        torch._foreach_add_(denominators, group["eps"])
        if group["eps"] == 0:
            for d in denominators:
                d.masked_fill_(d == 0, 1)
        if any(isinstance(lr, Tensor) for lr in lrs):
            steps = torch._foreach_div(m, denominators)
            torch._foreach_mul_(steps, lrs)
            torch._foreach_sub_(params, steps)
        else:  # without a temporary
            torch._foreach_addcdiv_(params, m, denominators, [-lr for lr in lrs])


def _schedules(t: Any, group: Group) -> tuple[Any, Any, Any]:
    """Return (alpha_t, beta_1t, beta_2t); ``t`` is a number or a 0-D tensor."""
    lr: Any = group["lr"]
    beta1, beta2 = group["betas"]
    if group["lr_decay"] == "sqrt":
        lr = lr / t**0.5
    if group["beta1_decay"] == "1/t":
        beta1 = beta1 / t
    elif group["beta1_decay"] is not None:
        beta1 = beta1 * group["beta1_decay"] ** (t - 1)
    if group["beta2_schedule"] == "1-1/t":
        beta2 = 1 - 1 / t
    return lr, beta1, beta2


def _uniform(values: list[Any]) -> bool:
    """Whether all are one number."""
    return all(not isinstance(v, Tensor) and v == values[0] for v in values)


def _lerp_(averages: list[Tensor], values: Any, weights: list[Any]) -> None:
    """``a <- a + w (v - a)`` with one weight per tensor."""
    if _uniform(weights):
        torch._foreach_lerp_(averages, values, weights[0])
        return
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, weights)
    torch._foreach_add_(averages, differences)


def _fusable(params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> bool:
    """Whether torch's fused Adam computes exactly this rule on these tensors."""
    return (
        group["foreach"] is None
        and group["eps"] > 0  # the kernel has no rule for 0/0
        and not torch.compiler.is_compiling()
        and params[0].device.type in ("cpu", "cuda")
        # The kernel walks memory: all tensors of a parameter must be laid out alike.
        and all(p.is_contiguous() and g.is_contiguous() for p, g in zip(params, grads, strict=True))
        and all(s["exp_avg"].is_contiguous() for s in states)
    )


def _fused(params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> bool:
    """Run torch's fused Adam kernel; ``False`` if schedules differ between the tensors."""
    steps = [s["step"] for s in states]
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if group["lr_decay"] != "none" or group["beta1_decay"] or group["beta2_schedule"]:
        t = uniform_count(states)
        if t is None:
            return False
        lr, beta1, beta2 = _schedules(t, group)
    if group["bias_correction"] == "none":
        # The kernel divides by 1 - beta**step, which is exactly 1 at an infinite count.
        steps = [torch.full_like(steps[0], math.inf)] * len(steps)
    amsgrad = group["beta2_schedule"] is None
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        params,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if amsgrad else [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=amsgrad,
        maximize=False,
    )
    return True
