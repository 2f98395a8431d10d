"""OASIS: a diagonal Hessian estimate, and a step size that needs no tuning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Signal, State
from optimizers.functional import step_counts
from optimizers.oracle import Oracle
from optimizers.second_order.hutchinson import (
    HUTCHINSON_RANGES,
    HutchinsonOptimizer,
    spatial_mean,
)


class OASIS(HutchinsonOptimizer):
    r"""Steps scaled by the Hessian's diagonal, at a rate that adapts itself.

    The scaling is :math:`\hat D = \max(|D|, \alpha)` with the average D of Hutchinson probes
    :math:`v = z \odot \nabla^2 F z`, one z of -1 and 1 for the whole model. The adaptive rate is
    that of Malitsky and Mishchenko in the scaled norm:

    .. math::
        D_k &= \beta_2 D_{k-1} + (1 - \beta_2) v_k \\
        \eta_k &= \min\left\{\sqrt{1 + \theta_{k-1}}\,\eta_{k-1},\;
        \tfrac12 \|w_k - w_{k-1}\|_{\hat D_k} / \|g_k - g'_{k-1}\|_{\hat D_k^{-1}}\right\},
        \qquad \theta_k = \eta_k / \eta_{k-1} \\
        w_{k+1} &= w_k - \mathrm{lr}\,\eta_k\, g_k / \hat D_k

    after a first step of size ``init_lr``, with :math:`\theta_0 = \infty` and norms over the
    whole model. :math:`g'_{k-1}` is the gradient at the point before: the stored one where every
    step sees the same data, or with ``same_batch`` that of this step's batch, which costs another
    gradient; between different batches the difference is noise, and the rate collapses.

    With ``adaptive=False`` :math:`\eta` is ``lr``:
    :math:`m \leftarrow \beta_1 m + (1-\beta_1) g` and
    :math:`w \leftarrow (1 - \eta\lambda) w - \eta\, m / (1-\beta_1^t) / \hat D`.

    Guarantees (derived): for a convex F and a frozen D (:math:`\beta_2 = 1`),
    :math:`\min_i F(w_i) - F^* \le C / (2 S_k)` with :math:`S_k = \eta_1\theta_1 +
    \sum_1^k \eta_i` and :math:`C = \|w_1 - w^*\|_{\hat D}^2 + \frac12\|w_1 - w_0\|_{\hat D}^2
    + 2\eta_1\theta_1 (F(w_0) - F^*)`, and :math:`\eta_k \ge 1/(2 L_D)`; with the fixed rate
    :math:`\alpha/L` and strong convexity :math:`\mu`, each step multiplies the gap by at most
    :math:`1 - \alpha\mu / (L \max\hat D)`, whatever the probes.

    ``step`` takes an ``Objective`` or a closure that returns the loss and does not call
    ``backward``.

    Args:
        params: Parameters or groups; complex ones are refused.
        lr: In [0, inf): a factor on the adaptive rate (1 is the paper's), or the fixed rate.
        betas: :math:`\beta_1` in [0, 1), which must be 0 with the adaptive rate, and
            :math:`\beta_2` in [0, 1]; 1 keeps the first D.
        alpha: :math:`\alpha` in (0, inf), a curvature: a loss that is scaled by c wants
            :math:`c\alpha`.
        adaptive: Whether the rate adapts itself.
        init_lr: First rate of the adaptive form, in (0, inf); used once.
        weight_decay: Decoupled, in [0, inf); with a fixed rate alone.
        same_batch: Whether the adaptive rate takes both gradients on this step's batch.
        warmup_samples: Probes at the first point whose average is the first D; 0 starts from the
            D in the state, which is zero. A parameter that takes part later starts from its first
            v.
        average_kernels: Whether :math:`|v|` is averaged over the spatial axes of kernels.
        hessian_samples: Probes to average in a refresh, an int from 1 on.
        hessian_every: Steps between refreshes, an int from 1 on; others leave D as it is.
        seed: Of the probes.

    State:
        ``step`` (), ``hessian_diag`` (D) of the parameter's shape, at least float32; with
        :math:`\beta_1 > 0` ``exp_avg``; in the adaptive form ``previous`` and, without
        ``same_batch``, ``previous_grad``. In ``param_groups[0]``: ``time``, and of the adaptive
        form ``last_lr`` :math:`\eta_k` and ``theta``.

    Raises:
        ValueError: If an option lies outside its range, options exclude each other, or groups
            differ in what all share.
        OracleError: If the objective gives no Hessian products, or loss, gradient or products are
            not finite; nothing has changed then.

    Reference:
        Jahani, Rusakov, Shi, Richtarik, Mahoney, Takac, "Doubly Adaptive Scaled Algorithm for
        Machine Learning Using Second-Order Information", ICLR 2022. D starts from an average of
        probes (the paper takes it as given); a public implementation averages an old v into D on
        steps without a refresh, here D stays.
    """

    shared = (
        *HutchinsonOptimizer.shared,
        *("adaptive", "init_lr", "same_batch", "warmup_samples"),
    )
    ranges = {
        "betas": "2 of [0, 1]",
        "alpha": "(0, inf)",
        "adaptive": "bool",
        "init_lr": "(0, inf)",
        "weight_decay": "[0, inf)",
        "same_batch": "bool",
        "warmup_samples": "int [0, inf)",
        "average_kernels": "bool",
        **HUTCHINSON_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.0, 0.999),
        alpha: float = 1e-3,
        *,
        adaptive: bool = True,
        init_lr: float = 1e-3,
        weight_decay: float = 0.0,
        same_batch: bool = False,
        warmup_samples: int = 100,
        average_kernels: bool = False,
        hessian_samples: int = 1,
        hessian_every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "adaptive": adaptive,
                "init_lr": init_lr,
                "weight_decay": weight_decay,
                "same_batch": same_batch,
                "warmup_samples": warmup_samples,
                "average_kernels": average_kernels,
                "hessian_samples": hessian_samples,
                "hessian_every": hessian_every,
                "seed": seed,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse what the rules do not go together with."""
        if group["betas"][0] == 1:
            raise ValueError(f"betas must be in [0, 1) x [0, 1]; got {group['betas']!r}.")
        if group["adaptive"] and (group["betas"][0] > 0 or group["weight_decay"] > 0):
            raise ValueError(
                "betas must be (0, ...) and weight_decay 0 for the adaptive rate, which is derived "
                f"for the gradient alone; got {group['betas']!r} and {group['weight_decay']!r}. "
                "Set adaptive=False and give lr, or leave them out."
            )

    def _check_running(self, group: Group) -> None:
        """Refuse options that a scheduler has made such as no new optimizer would take."""
        remedy = "OneCycleLR and CyclicLR set it by themselves unless cycle_momentum=False."
        try:
            self.validate(group)
        except ValueError as error:
            raise ValueError(f"{error} {remedy}") from None
        if group["betas"][0] > 0 and any("exp_avg" not in self.state[p] for p in group["params"]):
            raise ValueError(
                "the first of betas must be positive from the start to be used; got "
                f"{group['betas']!r} in a running OASIS. Build a new one with it; {remedy}"
            )

    def prepare(self) -> None:
        """Let the count of steps start, and the adaptive rate from its first value."""
        super().prepare()
        first = self.param_groups[0]
        first.setdefault("last_lr", first["init_lr"])
        first.setdefault("theta", math.inf)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return D, and what the form keeps, at zero."""
        state: State = {"hessian_diag": torch.zeros_like(p)}
        if group["betas"][0] > 0:
            state["exp_avg"] = torch.zeros_like(p)
        if group["adaptive"]:
            state["previous"] = torch.zeros_like(p)
            if not group["same_batch"]:
                state["previous_grad"] = torch.zeros_like(p)
        return state

    # ------------------------------------------------------------------ what is asked

    def _starting(self) -> bool:
        plan = self.param_groups[0]
        return bool(plan["time"] == 0 and plan["warmup_samples"] > 0)

    def due(self) -> bool:
        """Whether this step draws probes; the adaptive form's first one only to start D."""
        plan = self.param_groups[0]
        if plan["time"] == 0 and plan["adaptive"]:
            return self._starting()
        return super().due() or self._starting()

    def samples(self) -> int:
        """Return how many probes this step draws."""
        plan = self.param_groups[0]
        return int(plan["warmup_samples"]) if self._starting() else super().samples()

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Ask for gradient and probes, and find the rate."""
        for group in self.param_groups:
            self._check_running(group)
        loss, signal = super().probe(oracle)
        plan = self.param_groups[0]
        self._rate, self._theta = plan["last_lr"], plan["theta"]
        if plan["adaptive"] and plan["time"] > 0:
            self._adapt(oracle, signal)
        return loss, signal

    def _adapt(self, oracle: Oracle, signal: Signal) -> None:
        """Set the step's rate; nothing is written."""
        members = [(p, g) for g in self.param_groups for p in g["params"] if p.requires_grad]
        # A parameter that came later has no point before.
        members = [(p, group) for p, group in members if self.state[p]["step"].item() > 0]
        others = {p: self.state[p].get("previous_grad") for p, _ in members}
        if self.param_groups[0]["same_batch"]:
            params = [p for p, _ in members]
            with oracle.trials(params):
                for p in params:
                    p.copy_(self.state[p]["previous"])
                _, found = oracle.gradient(params)
            others = dict(zip(params, found, strict=True))
        sums = []
        for p, group in members:
            state, g, before = self.state[p], signal(p), others[p]
            if g is None or before is None:
                continue
            D = self._scaling(state, group)
            step = p.to(D.dtype) - state["previous"]
            slope = g.to(D.dtype) - before.to(D.dtype)
            sums.append(torch.stack([(D * step * step).sum(), (slope * slope / D).sum()]))
        wide = [pair.to(sums[0].device, torch.float64) for pair in sums]
        moved, changed = torch.stack(wide).sum(0).tolist() if wide else (0.0, 0.0)  # one read
        grown = math.sqrt(1 + self._theta) * self._rate
        ratio = math.sqrt(moved) / math.sqrt(changed) / 2 if changed > 0 else math.inf
        rate = min(grown, ratio)
        if not math.isfinite(rate) or moved == 0:  # where nothing moved nothing is learnt
            rate = self._rate
        self._theta = rate / self._rate if self._rate > 0 else math.inf
        self._rate = rate

    def _averaged(self, state: State, group: Group) -> Tensor:
        """Return D after this step's refresh, without writing it."""
        D: Tensor = state["hessian_diag"]
        v = self.estimate(state)
        if v is None:
            return D
        v = spatial_mean(v) if group["average_kernels"] else v
        if self._starting():
            return v.to(D.dtype)
        v = v.to(D.dtype)
        averaged = D.lerp(v, 1 - group["betas"][1])
        if self.param_groups[0]["warmup_samples"] == 0:
            return averaged
        # A parameter that was not there, or frozen, at the first point starts from its first v:
        # its D is zero, and a small part of v would count as no curvature at all.
        return torch.where(D.any(), averaged, v)

    def _scaling(self, state: State, group: Group) -> Tensor:
        return self._averaged(state, group).abs().clamp_(min=group["alpha"])

    # ------------------------------------------------------------------ the rule

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one tensor."""
        D = self._averaged(state, group)
        state["hessian_diag"].copy_(D)
        scale = D.abs().clamp_(min=group["alpha"])
        if group["adaptive"]:
            state["previous"].copy_(p)
            if "previous_grad" in state:
                state["previous_grad"].copy_(g)
            p.sub_(group["lr"] * self._rate * g / scale)
            return
        (t,), beta1 = step_counts([state]), group["betas"][0]
        if group["weight_decay"] != 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        direction = g
        if beta1 > 0:
            state["exp_avg"].lerp_(g, 1 - beta1)
            direction = state["exp_avg"] / (1 - beta1**t)
        p.sub_(group["lr"] * direction / scale)

    def finish(self, loss: Tensor | None) -> None:
        """Keep the rate for the next step."""
        plan = self.param_groups[0]
        if plan["adaptive"]:
            plan["last_lr"], plan["theta"] = self._rate, self._theta
        super().finish(loss)

    # Of one step alone.
    _rate: float = 0.0
    _theta: float = math.inf
