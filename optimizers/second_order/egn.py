"""EGN: the damped Gauss-Newton step of a batch, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Needs, Optimizer, Scope, Signal, State
from optimizers.curvature import OutputModel, check_loss, output_model, read_loss
from optimizers.functional import step_counts
from optimizers.objective import Objective
from optimizers.oracle import Oracle, restored
from optimizers.second_order.jacobian import batch_rows, check_samplewise
from optimizers.second_order.rows import Rows, finite
from optimizers.second_order.separable import AUTOGRAD, separable_model

# The authors' constants of the line search and of the adaptation of the damping.
_ARMIJO, _BACKTRACK, _GROW, _TRIALS = 0.1, 0.8, 1.5, 15
_POOR, _GOOD, _RAISE, _LOWER = 0.25, 0.75, 1.01, 0.99
_DAMPING_LIMITS = (1e-12, 1e12)  # the adaptation never leaves them

_SOLVE_OPTIONS = (
    *("damping", "momentum", "loss", "line_search", "adaptive_damping"),
    *("max_rows", "chunk", "row_memory", "solve_dtype"),
)


class _Move(NamedTuple):
    """How the present step uses the directions, and what the next one starts from."""

    share: float | None = None  # the step size found by the search, over the largest lr
    averaged: bool = True  # whether momentum is applied
    next_size: float | None = None
    damping_scale: float | None = None


class EGN(Optimizer):
    r"""Mini-batch Gauss-Newton (Levenberg-Marquardt), solved exactly in the space of the outputs.

    Use it for regression, physics-informed and other small networks, where few accurate steps
    count: its cost grows with (batch x outputs) cubed. For many classes or outputs use a
    first-order rule or smaller batches. It needs an :class:`~optimizers.Objective`:
    ``optimizer.step(objective.on(inputs, targets))``.

    The rule, with the Jacobian :math:`J` of the batch's outputs in all parameters together, the
    loss's Hessian :math:`Q/N = LL^\top/N` and gradient :math:`-Lq/N` in the outputs (``N`` is the
    batch size ``b``; ``b`` times the outputs for torch's ``mse`` and ``bce``), damping
    :math:`\lambda` and :math:`t = 1, 2, \dots`:

    .. math::
        V &= L^\top J \\
        \delta &= V^\top (V V^\top + N \lambda I)^{-1} q
            \quad\bigl(= -(J^\top Q J / N + \lambda I)^{-1} \nabla F\bigr) \\
        v &\leftarrow \beta v + (1-\beta)\,\delta, \qquad
            d = v / (1 - \beta^t) \quad (d = \delta \text{ if } \beta = 0) \\
        w &\leftarrow (1 - \alpha\,\mathrm{wd})\, w + \alpha d

    For cross-entropy :math:`L_i = \mathrm{diag}(\sqrt{p_i}) - p_i \sqrt{p_i}^\top` and
    :math:`q_i = y_i/\sqrt{p_i} - \sqrt{p_i}`. With fewer parameters than rows the same step comes
    from :math:`(V^\top V + N\lambda I)\,\delta = V^\top q`.

    With ``loss="autograd"`` the loss is any :math:`F = \sum_i l_i(f_i)` of the samples' outputs
    (torch's other losses, weights, a function of your own), :math:`Q_i/N = \nabla^2 l_i` by
    autograd and :math:`L_i = U_i \mathrm{diag}(\sqrt{\mu_i})` by its eigenvalues. A negative
    one counts as zero: :math:`Q_i` is then the nearest positive semidefinite matrix. Slope where
    the loss has no curvature (far from the target with Huber's, everywhere with ``l1_loss``) is a
    rest :math:`r`, the gradient is :math:`-(Lq + r)/N`, and the step is still
    :math:`\delta = -(J^\top Q J / N + \lambda I)^{-1} \nabla F`:

    .. math::
        \delta = V^\top (V V^\top + N\lambda I)^{-1} q + \tfrac{1}{N\lambda}
            \bigl[I - V^\top (V V^\top + N\lambda I)^{-1} V\bigr] J^\top r

    (the second part refined by its residual). It is :math:`-\nabla F/\lambda` where nothing
    curves, so ``damping`` bounds such steps and should not be tiny.

    :math:`\alpha` is ``lr``, or is found by backtracking from
    :math:`\min(1.5\,\alpha_{t-1}, \mathrm{lr})` by factors 0.8, at most 15 trials, until
    :math:`F(w+\alpha d) \le F(w) + 0.1\,\alpha\,\nabla F^\top d + \epsilon_{machine}`. With
    ``adaptive_damping``, :math:`\rho = [F(w + \alpha d) - F(w)] / [\alpha \nabla F^\top d +
    \frac12\alpha^2 d^\top H d]` below 0.25 multiplies the damping by 1.01 and above 0.75 by 0.99.

    Guarantee (derived, not the paper's): for an L-smooth :math:`F`, the whole data as batch and
    :math:`\alpha \le \lambda/L`, :math:`F(w+\alpha\delta) \le F(w) - \frac\alpha2
    \nabla F^\top (H+\lambda I)^{-1} \nabla F`.

    The Jacobian is not formed where the model's parameters stand in linear layers that see one
    vector a sample: there the memory is batch x outputs x widths. Convolutions, normalisations,
    embeddings and layers that act at several places are formed from what enters and leaves them,
    which holds in any model that is made of such layers (checked: the rows must give the
    gradient); other models give their Jacobian sample by sample. Both take batch x outputs x
    parameters. Frozen parameters are left alone and cost nothing.

    Args:
        params: Parameters or groups. All groups are solved together; ``lr`` and ``weight_decay``
            of a group scale its part of the joint direction, the other options must agree.
        lr: Step size :math:`\alpha`, in [0, inf); the largest one with ``line_search`` (whose
            :math:`\alpha` belongs to the group of the largest ``lr``; the others follow in
            proportion).
        damping: :math:`\lambda` in (0, inf), in units of the loss as it is minimised.
        momentum: :math:`\beta` in [0, 1), an average of directions.
        loss: ``None`` reads it from the Objective (torch's ``cross_entropy``,
            ``binary_cross_entropy_with_logits``, ``mse_loss`` and their modules, mean reduction).
            A loss written otherwise is declared: ``"cross_entropy"``, ``"bce"`` (both of logits),
            ``"mse"`` (torch's) or ``"half_mse"``, :math:`\frac1{2b}\sum_i\|f_i-y_i\|^2`. Value and
            slope of the Objective's loss are compared with it at every step. ``"autograd"`` takes
            any loss that is a mean or sum over samples, by one product with its Hessian for each
            output of a sample (checked: samples must not interact).
        line_search: Whether to search :math:`\alpha`; each trial evaluates the loss once.
        adaptive_damping: Whether to adapt ``damping``, within [1e-12, 1e12].
        weight_decay: Decoupled, in [0, inf); search and :math:`\rho` leave it out.
        max_rows: Largest linear system, an int from 1 on.
        chunk: Samples whose Jacobian is computed at once, or ``None`` for all; for models that
            give it sample by sample.
        row_memory: Elements of the rows of convolutions, normalisations, embeddings and layers that
            act at several places which are kept in memory, an int from 0 on (1 GB of float32);
            beyond it they are formed anew for every product, one parameter at a time, which takes
            longer. (With fewer parameters than rows all are formed at once.)
        solve_dtype: ``"float64"`` or ``"float32"``, of the linear system. The rows of a float32
            model by layers are multiplied and factorised in float32 in either case; with
            ``"float64"`` that factor is the preconditioner of an exact solution (conjugate
            gradients to a float64 backward error, or a float64 factor where they do not get there).

    State:
        ``step`` (); with momentum ``exp_avg`` :math:`v` of the parameter's shape, in its dtype
        (float32 for half precision). In ``param_groups[0]``: ``step_size``, :math:`\alpha_{t-1}` of
        the search (at first infinite), and ``damping_scale``, by which adaptation has multiplied
        ``damping``.

    Raises:
        ValueError: If an option lies outside its range, targets do not fit, or the system is
            larger than ``max_rows`` (or the Hessians of ``"autograd"`` than its square).
        OracleError: If the loss cannot be read, couples the samples, has no second derivative or
            depends on the parameters beside the outputs (``"autograd"``), the model has no
            per-sample Jacobian (batch statistics, dropout), or outputs, Jacobian or solution are
            not finite.

    Reference:
        Korbit, Adeoye, Bemporad, Zanon, "Exact Gauss-Newton Optimization for Training Deep Neural
        Networks", 2024. Departures: the symmetric system above instead of their
        :math:`J^\top (Q J J^\top + b\lambda I)^{-1} r` (equal, and positive definite); if all
        trials fail no step is taken (they take the last trial; the next search starts from it in
        both); if the averaged direction does not descend the search uses the plain one; decoupled
        weight decay and the limits of the damping are ours.
    """

    needs = Needs.OUTPUTS
    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "damping": "(0, inf)",
        "momentum": "[0, 1)",
        "loss": "{cross_entropy, bce, mse, half_mse, autograd} or None",
        "line_search": "bool",
        "adaptive_damping": "bool",
        "weight_decay": "[0, inf)",
        "max_rows": "int [1, inf)",
        "chunk": "int [1, inf) or None",
        "row_memory": "int [0, inf)",
        "solve_dtype": "{float64, float32}",
    }

    _move = _Move()  # lives from probe to finish

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        damping: float = 1.0,
        momentum: float = 0.0,
        *,
        loss: str | None = None,
        line_search: bool = False,
        adaptive_damping: bool = False,
        weight_decay: float = 0.0,
        max_rows: int = 8192,
        chunk: int | None = None,
        row_memory: int = 2**28,
        solve_dtype: torch.dtype | str = "float64",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "damping": damping,
                "momentum": momentum,
                "loss": loss,
                "line_search": line_search,
                "adaptive_damping": adaptive_damping,
                "weight_decay": weight_decay,
                "max_rows": max_rows,
                "chunk": chunk,
                "row_memory": row_memory,
                "solve_dtype": str(solve_dtype).removeprefix("torch."),
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse a group that would be solved otherwise than the first."""
        # Numbers of the whole optimizer, not options; they arrive with a loaded state.
        ranges.check_all(group, {"step_size": "(0, inf]", "damping_scale": "(0, inf)"})
        groups = getattr(self, "param_groups", ())
        if any(group is other for other in groups):  # loaded ones are compared at the step
            ranges.check_alike(groups, _SOLVE_OPTIONS, "are solved together")

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the averaged direction, at zero."""
        return {"exp_avg": torch.zeros_like(p)} if group["momentum"] > 0 else {}

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Solve for the directions of all parameters and find the step size."""
        name, objective, options = type(self).__name__, oracle.objective, self.param_groups[0]
        ranges.check_alike(self.param_groups, _SOLVE_OPTIONS, "are solved together")
        members = [(p, g) for g in self.param_groups for p in g["params"] if p.requires_grad]
        if any("exp_avg" not in self.state[p] for p, g in members if g["momentum"] > 0):
            raise ValueError(
                f"momentum must be positive from the start to be used; got {options['momentum']} "
                f"in a running {name}. Build a new one with this momentum; OneCycleLR and CyclicLR "
                "set it by themselves unless cycle_momentum=False."
            )
        model, loss, batch = _modelled(objective, options, [p for p, _ in members], name)
        objective.counts.loss += 1
        groups = {p: g for p, g in members if p.numel()}
        found = {p: torch.zeros_like(p) for p, _ in members if not p.numel()}
        self._move = _Move()
        if groups:
            params = list(groups)
            _check_size(model, params, options["max_rows"])
            rows = batch_rows(
                objective,
                params,
                model,
                batch=batch,
                chunk=options["chunk"],
                rule=name,
                memory=options["row_memory"],
            )
            plain = {
                p: finite(d.to(torch.promote_types(p.dtype, torch.float32)), "direction")
                for p, d in zip(params, rows.solve(_damping(options)), strict=True)
            }
            found |= plain
            if options["line_search"] or options["adaptive_damping"]:
                self._move = self._plan(oracle, loss, groups, plain, rows, model)
        return loss, found.get

    def _plan(
        self,
        oracle: Oracle,
        loss: Tensor,
        groups: dict[Tensor, Group],
        plain: dict[Tensor, Tensor],
        rows: Rows,
        model: OutputModel,
    ) -> _Move:
        """Search the step size and adapt the damping; parameters are restored."""
        options, before, move = self.param_groups[0], float(loss), _Move()
        lrs = {p: float(group["lr"]) for p, group in groups.items()}
        if (largest := max(lrs.values())) == 0:
            return move
        shares = {p: lr / largest for p, lr in lrs.items()}
        steps = {p: self._averaged(p, plain[p], groups[p]) for p in groups}
        slope, pushed = _along(rows, steps, shares)
        if options["line_search"]:
            if slope >= 0 and options["momentum"] > 0:
                move, steps = move._replace(averaged=False), plain
                slope, pushed = _along(rows, steps, shares)
            first = min(_GROW * options["step_size"], largest)
            tolerance = torch.finfo(loss.dtype).eps
            for trial in range(_TRIALS):
                size = first * _BACKTRACK**trial
                after = _loss_at(oracle, steps, {p: lrs[p] * (size / largest) for p in groups})
                if after <= before + _ARMIJO * size * slope + tolerance:
                    break
            else:
                return move._replace(share=0.0, next_size=size)
            move = move._replace(share=size / largest, next_size=size)
        else:
            size, after = largest, _loss_at(oracle, steps, lrs)
        predicted = size * slope + size**2 * float(pushed.square().sum()) / (2 * model.count)
        if options["adaptive_damping"] and predicted != 0:
            scale = _adapted(options, (after - before) / predicted)
            move = move._replace(damping_scale=scale)
        return move

    def _averaged(self, p: Tensor, direction: Tensor, group: Group) -> Tensor:
        """Return the direction after momentum, as ``update`` will compute it."""
        if group["momentum"] == 0:
            return direction
        v, beta = self.state[p]["exp_avg"].lerp(direction, 1 - group["momentum"]), group["momentum"]
        averaged: Tensor = v / (1 - beta ** (self.state[p]["step"].item() + 1))
        return averaged

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Move one parameter along its part ``g`` of the joint direction."""
        direction, (t,) = g, step_counts([state])
        if group["momentum"] > 0:
            v, beta = state["exp_avg"], group["momentum"]
            v.lerp_(g, 1 - beta)
            if self._move.averaged:
                direction = v / (1 - beta**t)
        size = group["lr"] if self._move.share is None else group["lr"] * self._move.share
        if group["weight_decay"] != 0:
            p.mul_(1 - size * group["weight_decay"])
        p.add_(size * direction)

    def finish(self, loss: Tensor | None) -> None:
        """Keep what the next step starts from."""
        if self._move.next_size is not None:
            self.param_groups[0]["step_size"] = self._move.next_size
        if self._move.damping_scale is not None:
            self.param_groups[0]["damping_scale"] = self._move.damping_scale
        self._move = _Move()

    def prepare(self) -> None:
        """Let the first search start from ``lr`` and the damping from ``damping``."""
        self.param_groups[0].setdefault("step_size", math.inf)
        self.param_groups[0].setdefault("damping_scale", 1.0)


def _modelled(
    objective: Objective, options: Group, params: Sequence[Tensor], name: str
) -> tuple[OutputModel, Tensor, int]:
    """Return the loss around the batch's outputs, its value, and the number of samples."""
    loss_fn, declared = objective.loss_fn, options["loss"]
    dtype = getattr(torch, options["solve_dtype"])
    form = None if declared == AUTOGRAD else read_loss(loss_fn, declared, name, _OTHERS)
    check_samplewise(objective.model, name)
    outputs, targets = objective.outputs(), objective.targets
    if form is None:
        room = options["max_rows"] ** 2  # of the largest linear system
        found = separable_model(loss_fn, outputs, targets, name, dtype, params=params, room=room)
    else:
        model = output_model(form, outputs, targets, name, dtype)
        found = model, check_loss(model, loss_fn, outputs, targets, name)
    return *found, len(outputs)


_OTHERS = ' Any other loss that treats the samples one by one works with loss="autograd".'


def _check_size(model: OutputModel, params: Iterable[Tensor], largest: int) -> None:
    """Refuse a linear system that is too large, before its rows are computed."""
    height, width = model.q.numel(), sum(p.numel() for p in params)
    if min(height, width) > largest:
        raise ValueError(
            f"max_rows must be at least the size of the linear system; got {largest} for {height} "
            f"rows (batch x outputs) and {width} parameters. Use a smaller batch or fewer outputs, "
            "raise max_rows (memory grows with its square, time with its cube), or use a rule that "
            "needs gradients only."
        )


def _loss_at(oracle: Oracle, steps: dict[Tensor, Tensor], sizes: dict[Tensor, Any]) -> float:
    """Return the loss after a step, rounded as the step itself will be."""
    with restored(list(steps)):
        for p, step in steps.items():
            p.copy_(p.to(step.dtype) + sizes[p] * step)
        return float(oracle.loss())


def _along(
    rows: Rows, steps: dict[Tensor, Tensor], shares: dict[Tensor, float]
) -> tuple[float, Tensor]:
    r"""Return the loss's slope along a step :math:`s`, and :math:`V s`."""
    vectors = [shares[p] * step for p, step in steps.items()]
    pushed = rows.push(vectors)
    return rows.slope_along(vectors, pushed), pushed


def _damping(options: Group) -> float:
    return float(options["damping"] * options["damping_scale"])


def _adapted(options: Group, gain: float) -> float:
    """Return the new scale: a poor step raises the damping, a good one lowers it."""
    factor = _RAISE if gain < _POOR else _LOWER if gain > _GOOD else 1.0
    low, high = _DAMPING_LIMITS
    scale: float = options["damping_scale"]
    return scale * factor if low <= _damping(options) * factor <= high else scale
