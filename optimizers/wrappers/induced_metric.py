"""InducedMetricOn: the metric of the loss's graph, on top of any preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optimizers import checkpoint, distributed, ranges
from optimizers.base import Optimizer
from optimizers.oracle import Needs
from optimizers.wrappers.routed import Routed, _make_state

_RANGES = {
    "induced_xi": "[0, inf)",
    "induced_beta": "[0, 1)",
    "induced_weight_decay": "[0, inf)",
    "induced_metric": "finite",
    "induced_steps": "int [0, inf)",
}
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class InducedMetricOn(torch.optim.Optimizer):
    r"""Any optimizer whose whole step is shortened where gradient and direction are large.

    :class:`InducedMetric` for a preconditioner of your choice. The graph of the loss over
    parameters with the metric P has the metric :math:`P + \xi \nabla L \nabla L^\top`; its inverse
    shortens :math:`P^{-1} m` by one number for the whole model. With the inner rule's step from
    :math:`\theta` to :math:`\theta'` at the rate :math:`\eta`, and its direction
    :math:`u = (\theta - \theta') / \eta`,

    .. math::
        s \leftarrow \beta s + (1 - \beta)\, \xi \textstyle\sum g\, u, \qquad
        \kappa = \frac{1}{1 + |s| / (1 - \beta^t)}, \qquad
        \theta \leftarrow (1 - \eta\lambda)\theta - \eta\kappa u

    For a rule without momentum :math:`\sum g\,u = g^\top P^{-1} g`, as published: around
    ``torch.optim.SGD`` this is ``InducedMetric(variant="base", momentum=0)``, around
    ``torch.optim.Adam`` without a first moment ``"rms"``. Momentum of the inner rule is part of u.
    Without averages (:math:`\beta = 0`) a step obeys :math:`\xi \sum g\,\Delta\theta\,/\eta < 1`.

    u is read off the parameters, so it has their rounding. A tensor whose gradient is not finite
    leaves the sum. If the inner step raises, the parameters are put back. Each step reads one
    number back to the host.

    Args:
        inner: Any :class:`torch.optim.Optimizer` that works from ``.grad``, without weight decay.
            Its groups are this one's: schedulers see them.
        xi: :math:`\xi` in [0, inf). The sum grows with the model: networks want small values.
        beta: :math:`\beta` in [0, 1), of the metric's average.
        weight_decay: Decoupled, :math:`\lambda` in [0, inf), of all groups, not shortened.

    State:
        What the inner rule keeps; the average s and the count t are ``induced_metric`` and
        ``induced_steps`` in ``param_groups[0]``, beside the options.

    Raises:
        TypeError: If ``inner`` is no optimizer.
        ValueError: For a rule that evaluates the objective itself, decays weights, or deploys
            other weights than it steps on; for shards; if an option lies outside its range.

    Example:
        >>> import torch
        >>> from optimizers.wrappers import InducedMetricOn
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = InducedMetricOn(torch.optim.SGD([w], lr=1.0), xi=0.04, beta=0.0)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> w.detach()  # half of the gradient: 0.04 * 25 = 1
        tensor([-1.5000, -2.0000])

    Reference:
        Harvey, "The Optimiser Hidden in Plain Sight: Training with the Loss Landscape's Induced
        Metric", 2025, which states the factor for any preconditioner. That with momentum g meets
        the averaged direction is our choice.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        xi: float = 0.1,
        beta: float = 0.8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"inner must be an optimizer; got a {type(inner).__name__}.")
        name = type(inner).__name__
        needs = getattr(inner, "needs", Needs.GRADIENTS)
        if needs is not Needs.GRADIENTS or isinstance(inner, torch.optim.LBFGS):
            raise ValueError(
                f"{name} evaluates the objective itself; InducedMetricOn needs a rule that works "
                "from the gradients of one backward pass."
            )
        if isinstance(inner, Routed):
            raise ValueError(
                "the groups of Routed show the rate of the first rule alone; put InducedMetricOn "
                "around a rule inside of it."
            )
        if isinstance(inner, Optimizer) and type(inner).eval_params is not Optimizer.eval_params:
            raise ValueError(
                f"{name} deploys other weights than it steps on, which a shortened step would not "
                "reach; use a rule without averages of weights."
            )
        for index, group in enumerate(inner.param_groups):
            _check_group(group, f" (in parameter group {index})")
        options = {
            "induced_xi": xi,
            "induced_beta": beta,
            "induced_weight_decay": weight_decay,
            "induced_metric": 0.0,
            "induced_steps": 0,
        }
        ranges.check_all(options, _RANGES)
        self.inner = inner
        _make_state(inner)
        self._building = True
        super().__init__(inner.param_groups, dict(inner.defaults))
        self._building = False
        self._share()
        # Numbers of its own: a tensor would be shared with a caller's or another optimizer's.
        inner.param_groups[0].update(options)

    # ------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the inner rule take its step, then shorten it.

        Args:
            closure: Clears the gradients, calls ``loss.backward()`` and returns the loss; or
                ``None`` after ``loss.backward()``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif checkpoint.is_dry_step(self.param_groups):
            if not isinstance(self.inner, Optimizer) and not any(self.state.values()):
                self.inner.step()  # torch's rules make their state there, for a checkpointer
                self._share()
            return None
        for index, group in enumerate(self.param_groups):
            _check_group(group, f" (in parameter group {index})")
        moving = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        before = [p.detach().clone() for p, _ in moving]
        self.inner.state = self.state
        try:
            self.inner.step()
        except BaseException:
            for (p, _), start in zip(moving, before, strict=True):
                p.copy_(start)
            raise
        plan = self.param_groups[0]
        steps = [_difference(p, start) for (p, _), start in zip(moving, before, strict=True)]
        parts = [
            _product(step, p, group["lr"]) for step, (p, group) in zip(steps, moving, strict=True)
        ]
        total = 0.0
        if parts:
            products = torch.stack([part.to(parts[0].device) for part in parts])
            # Not finite too where the rate is zero and there is no direction.
            total = float(torch.where(products.isfinite(), products, 0).sum())
        if not any(bool(group["lr"] != 0) for _, group in moving):
            return loss  # at the rate zero there is no direction to be read, and no step
        beta = plan["induced_beta"]
        metric = beta * plan["induced_metric"] + (1 - beta) * plan["induced_xi"] * total
        count = plan["induced_steps"] + 1
        plan.update(induced_metric=metric, induced_steps=count)
        kappa = 1 / (1 + abs(metric) / (1 - beta**count))
        if kappa == 1 and plan["induced_weight_decay"] == 0:
            return loss  # the inner rule, bit by bit
        for step, start, (p, group) in zip(steps, before, moving, strict=True):
            keep = 1 - group["lr"] * plan["induced_weight_decay"]
            p.copy_(_working(start) * keep + step * kappa)
        return loss

    # ------------------------------------------------------------------ groups and state

    def _share(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner rule.

        Raises:
            ValueError: As at construction; nothing is added then.
        """
        if self._building:
            super().add_param_group(param_group)
            return
        where = f" (in parameter group {len(self.param_groups)})"
        members = param_group.get("params", [])
        members = [members] if isinstance(members, Tensor) else list(members)
        tensors = [p[1] if isinstance(p, tuple) else p for p in members]
        _check_group({**self.inner.defaults, **param_group, "params": tensors}, where)
        self.inner.add_param_group({**param_group, "params": members})
        _make_state(self.inner)
        self._share()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; a state that is refused changes nothing.

        Raises:
            ValueError: If groups, state or the metric do not fit.
        """
        loaded = checkpoint.read(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = checkpoint.read(result)
        groups, packed = checkpoint.decode(loaded, self.param_groups, "InducedMetricOn")
        plan = groups[0]
        if not set(_RANGES) <= set(loaded["param_groups"][0]):
            raise ValueError(
                "the loaded state holds no metric; it was written without InducedMetricOn. Load "
                "it into the inner rule before wrapping that."
            )
        ranges.check_all(plan, _RANGES, " (in the loaded state)")
        for index, (group, states) in enumerate(zip(groups, packed, strict=True)):
            _check_group(group, f" (in loaded parameter group {index})")
            for p, values in zip(group["params"], states, strict=True):
                if values and self.state[p]:  # torch's rules would take any shape here
                    checkpoint.refuse_misfit(self.state[p], values, p, foreign=False)
        ordered = checkpoint.by_name(loaded, self.param_groups)
        self.inner.load_state_dict(ordered)
        self._share()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copy the inner rule too; it shares groups and state with this object."""
        return {**super().__getstate__(), "inner": self.inner, "_building": False}

    def __repr__(self) -> str:
        return f"InducedMetricOn({self.inner!r})"


def _check_group(group: Mapping[str, Any], where: str) -> None:
    """Refuse a group whose step is not the rate times a direction."""
    if "lr" not in group:
        raise ValueError(f"InducedMetricOn needs the inner rule's lr to read its direction{where}.")
    ranges.check_all(group, {"lr": "[0, inf)"}, where)
    if group.get("weight_decay", 0) != 0:
        raise ValueError(
            f"weight_decay must be 0 inside InducedMetricOn, whose factor is for the gradient's "
            f"part alone; got {group['weight_decay']!r}{where}. Set it to 0 and pass "
            "InducedMetricOn(..., weight_decay=...)."
        )
    if any(distributed.is_sharded(p) for p in group["params"]):
        raise ValueError(
            f"InducedMetricOn must see the whole model and got a shard (DTensor){where}; keep the "
            "model unsharded."
        )


def _working(tensor: Tensor) -> Tensor:
    """Return the tensor in at least float32."""
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def _difference(p: Tensor, start: Tensor) -> Tensor:
    return _working(p.detach()) - _working(start)


def _product(step: Tensor, p: Tensor, lr: Any) -> Tensor:
    """Return the inner product of gradient and direction, in double precision."""
    assert p.grad is not None
    g = p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
    product = (g.to(step.dtype) * step.conj()).sum()
    if product.is_complex():
        product = product.real
    found: Tensor = -product.to(torch.float64) / lr
    return found
