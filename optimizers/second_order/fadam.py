"""FAdam: Adam read as natural gradient descent with a diagonal empirical Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import ema_, step_counts


class FAdam(Optimizer):
    r"""Precondition by the diagonal Fisher matrix, clip, and only then average.

    Adam with its parts in the order of natural gradients: the momentum is that of preconditioned
    gradients, without bias correction, and the weight decay goes through the same matrix and the
    same clip. Made for losses that are negative log-likelihoods of discrete distributions.

    The rule, for each tensor, with :math:`\mathrm{RMS}(x) = \sqrt{\mathrm{mean}(x^2)}` over the
    whole tensor and :math:`\mathrm{clip}(x) = x / \max(1, \mathrm{RMS}(x)/c)`:

    .. math::
        \hat\beta_2 &= \beta_2 (1 - \beta_2^{t-1}) / (1 - \beta_2^t) \\
        f &\leftarrow \hat\beta_2 f + (1 - \hat\beta_2)\, g^2 \\
        D &= f^p + \min(\epsilon, \epsilon_2 \mathrm{RMS}(g)) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, \mathrm{clip}(g / D) \\
        \theta &\leftarrow \theta - \eta\, (m + \lambda\, \mathrm{clip}(\theta / D))

    :math:`f` is Adam's bias-corrected second moment. The first step has a tenth of Adam's length
    (:math:`\beta_1 = 0.9`): a warm-up that is part of the method. Every step obeys
    :math:`\mathrm{RMS}(m) \le c\,(1-\beta_1^t)` and
    :math:`\mathrm{RMS}(\Delta\theta) \le \eta c (1 + \lambda)`; no rate is known.

    Where few coordinates of a tensor get gradients (embeddings), nearly all of its decay goes into
    the others: put such tensors into a group with ``weight_decay=0``. Tensors that are cut or fused
    otherwise train otherwise.

    Args:
        params: Parameters or groups; complex ones are refused.
        lr: :math:`\eta` in [0, inf).
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon` in [0, inf].
        eps2: :math:`\epsilon_2` in [0, inf]. ``1e-8`` beside the same ``eps`` is the paper's third
            revision, ``1e-3`` beside ``eps=1e-7`` its second.
        clip: :math:`c` in (0, inf].
        weight_decay: :math:`\lambda` in [0, inf). Not comparable with AdamW's: it moves a tensor by
            at most :math:`\eta\lambda c` in RMS, whatever its norm.
        p: Power of the Fisher matrix, in (0, 1]; 1 is the natural gradient itself.
        maximize: Ascend instead of descend.
        foreach: ``False`` loops, otherwise tensors are worked on together.
        compile: Compile the multi-tensor update.

    State:
        ``step`` (), ``momentum`` and ``fim``, of the parameter's shape, at least float32.

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Hwang, "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher
        information", 2024. Public implementations divide by :math:`\max(1, \mathrm{RMS})/c`
        instead, which is the same for c = 1; where D is zero it is the smallest normal number
        here, so that a coordinate without any gradient yet stays (but for its decay).
    """

    # A root mean square is of the whole tensor.
    scope = Scope.MATRIX
    ranges = {
        "betas": "2 of [0, 1)",
        "eps": "[0, inf]",
        "eps2": "[0, inf]",
        "clip": "(0, inf]",
        "weight_decay": "[0, inf)",
        "p": "(0, 1]",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps2: float = 1e-8,
        *,
        clip: float = 1.0,
        weight_decay: float = 0.1,
        p: float = 0.5,
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
                "eps2": eps2,
                "clip": clip,
                "weight_decay": weight_decay,
                "p": p,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the momentum and the Fisher matrix's diagonal, at zero."""
        return {"momentum": torch.zeros_like(p), "fim": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one tensor."""
        (t,), (beta1, beta2) = step_counts([state]), group["betas"]
        m, f = state["momentum"], state["fim"]
        rate = 1 - _decay(beta2, t)
        f.lerp_(g * g, rate)
        D = (f ** group["p"] + _epsilon(_rms(g), group)).clamp_(min=torch.finfo(f.dtype).tiny)
        m.lerp_(_ratio([g], [D], group["clip"])[0], 1 - beta1)
        step = m
        if group["weight_decay"] != 0:
            step = m + group["weight_decay"] * _ratio([p], [D], group["clip"])[0]
        p.sub_(group["lr"] * step)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all tensors: one call for each line."""
        beta1, beta2 = group["betas"]
        m, f = [s["momentum"] for s in states], [s["fim"] for s in states]
        rates = [1 - _decay(beta2, t) for t in step_counts(states)]
        squares = list(torch._foreach_mul(grads, grads))
        if len({rate if isinstance(rate, float) else id(rate) for rate in rates}) == 1:
            torch._foreach_lerp_(f, squares, rates[0])
        else:
            for average, square, rate in zip(f, squares, rates, strict=True):
                average.lerp_(square, rate)
        D = list(torch._foreach_sqrt(f) if group["p"] == 0.5 else torch._foreach_pow(f, group["p"]))
        epsilons = _epsilon(_all_rms(grads), group).unbind()
        torch._foreach_add_(D, [e.to(d.dtype) for e, d in zip(epsilons, D, strict=True)])
        torch._foreach_maximum_(D, torch.finfo(f[0].dtype).tiny)
        ema_(m, _ratio(grads, D, group["clip"]), beta1)
        step = m
        if group["weight_decay"] != 0:
            step = _ratio(params, D, group["clip"])
            torch._foreach_mul_(step, group["weight_decay"])
            torch._foreach_add_(step, m)
        if isinstance(group["lr"], Tensor):
            step = list(torch._foreach_mul(step, group["lr"]))
            torch._foreach_sub_(params, step)
        else:
            torch._foreach_add_(params, step, alpha=-group["lr"])


def _decay(beta2: float, t: Any) -> Any:
    """Return the decay that makes the average Adam's bias-corrected one; 0 at the first step."""
    power = beta2 ** (t.double() if isinstance(t, Tensor) else t)
    # beta2 (1 - beta2^(t-1)) / (1 - beta2^t), also for beta2 = 0.
    return (beta2 - power) / (1 - power)


def _epsilon(rms: Tensor, group: Group) -> Tensor:
    """Return min(eps, eps2 * rms); an infinite eps2 means eps, also of a zero gradient."""
    if group["eps2"] == float("inf"):
        return torch.full_like(rms, group["eps"])
    epsilon: Tensor = (group["eps2"] * rms).clamp(max=group["eps"])
    return epsilon


def _rms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    rms: Tensor = norm / max(1, x.numel()) ** 0.5
    return rms


def _all_rms(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack(list(torch._foreach_norm(tensors)))
    roots = [max(1, x.numel()) ** 0.5 for x in tensors]
    return norms / torch.tensor(roots, dtype=norms.dtype, device=norms.device)


def _ratio(tensors: list[Tensor], D: list[Tensor], clip: float) -> list[Tensor]:
    """Return clip(x / D) for each pair, with D relative to its smallest entry: no overflow."""
    least = [d.amin() if d.numel() else d.new_ones(()) for d in D]
    ratios = list(torch._foreach_div(tensors, list(torch._foreach_div(D, least))))
    bounds = _all_rms(ratios) / clip
    smallest = torch.stack([s.to(bounds.dtype) for s in least])
    torch._foreach_div_(ratios, list(torch.maximum(smallest, bounds).unbind()))
    return ratios
