"""Sophia: momentum over a diagonal curvature, clipped element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optimizers.base import Group, Needs, Signal, State
from optimizers.curvature import LossForm
from optimizers.functional import decay_, ema_
from optimizers.oracle import Oracle
from optimizers.second_order.bartlett import (
    check_outputs,
    cross_entropy_form,
    declared_logits,
    draw_labels,
    ignored_terms,
)
from optimizers.second_order.hutchinson import HUTCHINSON_RANGES, HutchinsonOptimizer

_RANGES = {
    "betas": "2 of [0, 1)",
    "eps": "(0, inf)",
    "weight_decay": "[0, inf)",
    **HUTCHINSON_RANGES,
}


class SophiaOptimizer(HutchinsonOptimizer):
    """Base of both forms: averages of gradient and curvature, and the clipped step."""

    ranges = _RANGES

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return both averages, at zero."""
        return {"exp_avg": torch.zeros_like(p), "hessian_diag": torch.zeros_like(p)}

    def divisors(self, h: list[Tensor], group: Group) -> list[Tensor]:
        """Return what the momenta are divided by, positive."""
        raise NotImplementedError  # each of the two forms has its own, and there is no third

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one tensor."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        m, h, v = state["exp_avg"], state["hessian_diag"], self.estimate(state)
        m.lerp_(g, 1 - beta1)
        if v is not None:
            h.lerp_(v.to(h.dtype), 1 - beta2)
        (D,) = self.divisors([h], group)
        if group["weight_decay"] != 0:
            p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * (m / D).clamp(-1, 1))

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all tensors: one call for each line."""
        beta1, beta2 = group["betas"]
        m, h = ([state[key] for state in states] for key in ("exp_avg", "hessian_diag"))
        ema_(m, grads, beta1)
        found = [self.estimate(state) for state in states]
        if any(v is not None for v in found):
            pairs = [(a, v.to(a.dtype)) for a, v in zip(h, found, strict=True) if v is not None]
            ema_([a for a, _ in pairs], [v for _, v in pairs], beta2)
        steps = list(torch._foreach_div(m, self.divisors(h, group)))
        torch._foreach_clamp_max_(steps, 1)
        torch._foreach_clamp_min_(steps, -1)
        torch._foreach_mul_(steps, group["lr"])
        decay_(params, group["lr"], group["weight_decay"])
        torch._foreach_sub_(params, steps)


class SophiaH(SophiaOptimizer):
    r"""Clipped Newton steps with a diagonal Hessian from random probes.

    For any twice differentiable loss; for cross-entropy :class:`SophiaG` costs less and its
    curvature is never negative. A refresh takes one Hessian product, every ``hessian_every``-th
    step; between refreshes a step takes one gradient. No entry moves by more than ``lr`` (beside
    the decay), and where the curvature is small or negative the step is the sign of the momentum.

    The rule, with a Gaussian u through the whole model and the first refresh at the first step:

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        h &\leftarrow \beta_2 h + (1 - \beta_2)\, u \odot \nabla^2 F u
            \quad\text{(at refreshes)} \\
        W &\leftarrow (1 - \eta\lambda) W
            - \eta\,\mathrm{clip}\bigl(m / \max(\gamma h, \epsilon),\, 1\bigr)

    with :math:`\mathrm{clip}(x, 1) = \max(\min(x, 1), -1)` and no correction of bias. ``gamma``
    is tuned so that the paper's share of entries, 10 to 50 percent, is not clipped.

    Guarantee (derived, not the paper's): on a quadratic with the diagonal a, with
    :math:`\beta_1 = 0` and :math:`D = \max(\gamma h, \epsilon) \ge \eta a`, the distance
    :math:`|e|` of each entry from the optimum becomes
    :math:`\max(|e| - \eta, (1 - \eta a / D) |e|)`, whatever the probes. For :math:`D = a` and
    :math:`\eta \le 1` each step multiplies the gap :math:`F - F^*` by :math:`(1-\eta)^2` from the
    step :math:`(\max_i |e_i| - 1)_+ / \eta` on: the condition number plays no part.

    ``step`` takes an ``Objective`` or a closure that returns the loss and does not call
    ``backward``.

    Args:
        params: Parameters or groups; complex ones are refused.
        lr: :math:`\eta` in [0, inf).
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        gamma: :math:`\gamma` in [0, inf); 0 is sign descent with momentum.
        eps: :math:`\epsilon` in (0, inf).
        weight_decay: :math:`\lambda` in [0, inf), decoupled.
        hessian_samples: Probes to average in a refresh, an int from 1 on.
        hessian_every: Steps between refreshes, an int from 1 on.
        seed: Of the probes.
        foreach: ``False`` loops, otherwise tensors are worked on together.

    State:
        ``step`` (), ``exp_avg`` (m) and ``hessian_diag`` (h), of the parameter's shape, at least
        float32. In ``param_groups[0]``: ``time``, the count of steps.

    Raises:
        ValueError: If an option lies outside its range, or groups differ in what is probed.
        OracleError: If the objective gives no Hessian products, or loss, gradient or products are
            not finite; nothing has changed then.

    Reference:
        Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for
        Language Model Pre-training", ICLR 2024, algorithms 1 and 3. A packaged form clips at
        another threshold and averages a Hessian that is nine steps old; here it is the paper's.
    """

    kind = "gaussian"
    ranges = {"gamma": "[0, inf)", **_RANGES}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        *,
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        hessian_samples: int = 1,
        hessian_every: int = 10,
        seed: int = 0,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "gamma": gamma,
                "eps": eps,
                "weight_decay": weight_decay,
                "hessian_samples": hessian_samples,
                "hessian_every": hessian_every,
                "seed": seed,
                "foreach": foreach,
            },
        )

    def divisors(self, h: list[Tensor], group: Group) -> list[Tensor]:
        r"""Return :math:`\max(\gamma h, \epsilon)`."""
        D = list(torch._foreach_mul(h, group["gamma"]))
        torch._foreach_clamp_min_(D, group["eps"])
        return D


class SophiaG(SophiaOptimizer):
    r"""Clipped steps with the Gauss-Newton diagonal of cross-entropy, from drawn labels.

    For classifiers and language models. A refresh takes one backward pass more, every
    ``hessian_every``-th step; between refreshes a step takes one gradient. It needs an
    :class:`~optimizers.Objective`: ``optimizer.step(objective.on(inputs, targets))``, whose loss
    is a mean of cross-entropies. No entry moves by more than ``lr`` (beside the decay), and where
    the curvature is small the step is the sign of the momentum.

    The rule, with B predictions in the mean and labels :math:`\hat y \sim
    \mathrm{softmax}(\mathrm{logits})`, the first refresh at the first step:

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        h &\leftarrow \beta_2 h + (1 - \beta_2)\, B\, \hat g \odot \hat g, \qquad
            \hat g = \nabla \tfrac1B \textstyle\sum_n \mathrm{CE}(f_n, \hat y_n)
            \quad\text{(at refreshes)} \\
        W &\leftarrow (1 - \eta\lambda) W
            - \eta\,\mathrm{clip}\bigl(m / (\rho h + \epsilon),\, 1\bigr)

    with :math:`\mathrm{clip}(x, 1) = \max(\min(x, 1), -1)` and no correction of bias. By
    Bartlett's identities :math:`E\,B \hat g \odot \hat g` is the diagonal of the Gauss-Newton
    matrix. ``rho`` is tuned so that the paper's share of entries, 10 to 50 percent, is not
    clipped.

    Args:
        params: Parameters or groups; complex ones are refused.
        lr: :math:`\eta` in [0, inf).
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        rho: :math:`\rho` in [0, inf); 0 is sign descent with momentum.
        eps: :math:`\epsilon` in (0, inf).
        weight_decay: :math:`\lambda` in [0, inf), decoupled.
        batch_size: B, an int from 1 on; ``None`` counts the predictions (samples times positions,
            without those whose target is negative: ignored).
        loss: ``None`` reads it from the Objective (torch's ``cross_entropy`` and its module, mean
            reduction, smoothed or not, labels or probabilities; classes in dimension 1).
            ``"cross_entropy"`` declares a loss that is written otherwise, also with the classes
            last, as language models have them; its value is compared at refreshes.
        hessian_samples: Sets of labels to average in a refresh, an int from 1 on.
        hessian_every: Steps between refreshes, an int from 1 on.
        seed: Of the labels.
        foreach: ``False`` loops, otherwise tensors are worked on together.

    State:
        ``step`` (), ``exp_avg`` (m) and ``hessian_diag`` (h), of the parameter's shape, at least
        float32. In ``param_groups[0]``: ``time``, the count of steps.

    Raises:
        ValueError: If an option lies outside its range, or groups differ in what all share.
        OracleError: If the loss is no mean of cross-entropies, or loss, gradient or estimate are
            not finite; nothing has changed then.

    Reference:
        Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for
        Language Model Pre-training", ICLR 2024, algorithms 2 and 3, with the constants and the
        :math:`\epsilon` of the authors' code. Departure from that code: B stands in the average,
        as in the paper, and not in the step, so that batches may differ in size; labels are drawn
        on the batch of the step, before it.
    """

    needs = Needs.OUTPUTS
    shared = (*SophiaOptimizer.shared, "batch_size", "loss")
    ranges = {
        "rho": "[0, inf)",
        "batch_size": "int [1, inf) or None",
        "loss": "{cross_entropy} or None",
        **_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        *,
        rho: float = 0.04,
        eps: float = 1e-15,
        weight_decay: float = 0.1,
        batch_size: int | None = None,
        loss: str | None = None,
        hessian_samples: int = 1,
        hessian_every: int = 10,
        seed: int = 0,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "rho": rho,
                "eps": eps,
                "weight_decay": weight_decay,
                "batch_size": batch_size,
                "loss": loss,
                "hessian_samples": hessian_samples,
                "hessian_every": hessian_every,
                "seed": seed,
                "foreach": foreach,
            },
        )

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Ask for the gradient and, when it is due, for those to drawn labels."""
        objective, plan, name = oracle.objective, self.param_groups[0], type(self).__name__
        form = cross_entropy_form(objective, plan["loss"], name)
        params = [p for p in self._all_params() if p.requires_grad]
        self._estimates = {}
        if not self.due():
            loss, grads = oracle.gradient(params)
            found = dict(zip(params, grads, strict=True))
            self.check(loss, found)
            return loss, found.get
        with torch.enable_grad():
            outputs = objective.outputs()
            check_outputs(outputs, objective.targets, name)
            loss = objective.loss_fn(outputs, objective.targets)
            logits, targets = outputs, objective.targets
            if plan["loss"] is not None:
                logits, targets = declared_logits(form, loss, outputs, targets, name)
            found = dict(zip(params, _slopes(loss, params, keep=True), strict=True))
            objective.counts.gradient += 1
            self.check(loss.detach(), found)
            self._estimate(form, logits, targets, params)
            objective.counts.vjp += self.samples()
        self.check_estimates()
        return loss.detach(), found.get

    def _estimate(
        self, form: LossForm, logits: Tensor, targets: Tensor, params: list[Tensor]
    ) -> None:
        """Keep the average of ``B * g * g`` over several sets of labels."""
        plan, samples = self.param_groups[0], self.samples()
        ignored = ignored_terms(targets)
        drawn = draw_labels(form.terms(logits.detach()), plan["seed"], plan["time"], samples)
        shape = (logits.shape[0], *logits.shape[2:])
        count: Any = plan["batch_size"]
        if count is None:
            count = drawn.shape[1] if ignored is None else (~ignored).sum()
        squares: dict[Tensor, Tensor] = {}
        for k, labels in enumerate(drawn.view(samples, *shape)):
            drawn_targets = labels if ignored is None else labels.masked_fill(ignored, -100)
            loss = functional.cross_entropy(logits, drawn_targets, ignore_index=-100)
            for p, g in zip(params, _slopes(loss, params, keep=k + 1 < samples), strict=True):
                if g is not None:
                    wide = g.to(torch.promote_types(g.dtype, torch.float32))
                    v = wide.square().mul_(count).div_(samples)
                    squares[p] = squares[p].add_(v) if p in squares else v
        self._estimates = {id(self.state[p]): v for p, v in squares.items()}

    def divisors(self, h: list[Tensor], group: Group) -> list[Tensor]:
        r"""Return :math:`\rho h + \epsilon`."""
        D = list(torch._foreach_mul(h, group["rho"]))
        torch._foreach_add_(D, group["eps"])
        return D


def _slopes(loss: Tensor, params: list[Tensor], *, keep: bool) -> list[Tensor | None]:
    """Return the gradient in each parameter, ``None`` where it has none."""
    if not params or not loss.requires_grad:
        return [None] * len(params)
    return list(torch.autograd.grad(loss, params, retain_graph=keep, allow_unused=True))
