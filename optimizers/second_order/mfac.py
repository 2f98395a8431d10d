"""M-FAC: the inverse of the empirical Fisher matrix of the last gradients, without the matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Optimizer, Scope, Signal, State
from optimizers.objective import OracleError
from optimizers.oracle import Oracle
from optimizers.second_order.window import (
    BLOCK,
    Elimination,
    Joint,
    agrees,
    arithmetic,
    gram_matrix,
    home,
    inner,
    newest_column,
    products,
    rounding,
    rows_of,
)

_SHARED = ("ngrads", "damp", "max_norm")  # one window, so these must agree in all groups
_LARGE = 8 * 2**30  # bytes of window from which on a warning is given


class _Move(NamedTuple):
    """What a step has solved and its end writes down."""

    slot: int
    row: Tensor  # the products of the new gradient with the window
    raised: float
    gram: Tensor | None  # if it had to be made anew
    parts: dict[int, tuple[Tensor, Tensor]]  # of g and s, by the identity of the state
    absent: list[State]  # of parameters without a gradient
    windows: tuple[Tensor, ...]  # of all parameters


class MFAC(Optimizer):
    r"""M-FAC: a natural-gradient step with the empirical Fisher matrix of the last m gradients.

    Use it for fine-tuning and for small and medium networks: a step costs two passes over the
    window, and the window is ``ngrads`` floats for each parameter (1024 of them by default: 4 kB
    for each weight). Where that does not fit take ``ngrads=32``, ``window_dtype="bfloat16"`` or a
    first-order rule. A small ``damp`` with correlated gradients makes steps of length
    :math:`\|g\|/\lambda`: tune it with ``lr``, or set ``max_norm``.

    All parameters of all groups are one vector w. With the window :math:`G \in R^{m \times d}`
    (``m = ngrads``, at first zeros), :math:`\lambda` = ``damp`` and j = t mod m at step t = 0, 1,
    ...:

    .. math::
        g &= \nabla L(w) + \mathrm{wd}\, w, \qquad G_j \leftarrow g \\
        s &= \Bigl(\lambda I + \tfrac1m G^\top G\Bigr)^{-1} g = m\, G^\top c, \qquad
            (G G^\top + m \lambda I)\, c = e_j \\
        v &\leftarrow \mu v + (1-\mu) s, \qquad w \leftarrow w - \eta v

    The divisor is m also while the window fills. :math:`GG^\top` is kept in float64 and gets one
    new row a step; c comes from Cholesky factors in float64. The first step is
    :math:`m\,g/(m\lambda + \|g\|^2)`: with the default m as long as :math:`\mathrm{lr}\cdot
    1024/\|g\|`, which a warm-up or ``max_norm`` tames.

    Guarantee (derived, not the paper's): :math:`g^\top s \ge \|g\|^2/(\lambda + \max_i\|g_i\|^2)`,
    :math:`\|s\| \le \|g\|/\lambda` and :math:`g^\top s \le m`; for an L-smooth F, its full gradient
    and :math:`\eta \le \lambda/L`, :math:`F(w - \eta s) \le F(w) - \frac\eta2 g^\top s`.

    In single precision :math:`GG^\top` is known to some :math:`10^{-6}` of its trace. Where
    :math:`\lambda` is so small that this spoils the solution (:math:`g^\top s`, computed from s,
    is off by an eighth), the damping is raised until it does not, for the rest of 64 slots:
    ``param_groups[0]["raised"]`` shows by how much. ``window_dtype="float64"`` resolves more. In a
    ``bfloat16`` window the rounded gradients take the place of the gradients, also of g; products
    are summed as in float32, so definiteness does not suffer.

    A parameter without a gradient counts as zeros in the window and does not move; if none has
    one, nothing happens. Groups may be added at any time: their parameters count as zeros before.
    On an accelerator a step waits twice for a few numbers: it must refuse what is not finite.

    Args:
        params: Parameters or groups. ``lr``, ``momentum``, ``weight_decay``, ``window_dtype`` and
            ``sparse`` may differ between groups.
        lr: Learning rate :math:`\eta`, in [0, inf).
        momentum: :math:`\mu` in [0, 1), of the preconditioned directions, without bias correction.
        weight_decay: :math:`\mathrm{wd}` in [0, inf), coupled: it enters the window.
        ngrads: m, an int from 1 on.
        damp: :math:`\lambda` in (0, inf).
        window_dtype: ``"float32"``, ``"bfloat16"``, ``"float64"``, or ``None`` for that of the
            parameter (float32 for half precision).
        sparse: Whether entries that are exactly 0 at construction are left out: they keep no
            window and never change. Load the weights first, also before resuming.
        max_norm: Largest :math:`\|s\|` (all parameters together), in (0, inf), or ``None``.
        foreach: ``None`` or ``True`` for lists of tensors at once, ``False`` for one after the
            other; equal to rounding.

    State:
        ``step`` (); ``window`` (m, ...) of the parameter's shape in the window's dtype; with
        momentum ``exp_avg`` v in the parameter's dtype (float32 for half precision). With
        ``sparse`` these two have one entry for each of the entries ``kept``, int64 indices. In
        ``param_groups[0]``: ``gram`` (m, m) in float64, ``count`` t, ``raised``.

    Raises:
        ValueError: If an option lies outside its range, or groups disagree on ``ngrads``,
            ``damp`` or ``max_norm``.
        OracleError: If a gradient is not finite: it would stay in the window for m steps. Nothing
            has changed then.

    Reference:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information", 2021, the dynamic algorithm; the authors' code for the order of decay,
        window and momentum. Departures: the closed form above instead of their recursion (equal;
        theirs loses digits to cancellation); m need not divide by 32 or end at 1024; momentum and
        decay are options of a group; parameters without gradient stay; a damping lost in
        rounding is raised; ``max_norm`` is ours.
    """

    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "momentum": "[0, 1)",
        "weight_decay": "[0, inf)",
        "ngrads": "int [1, inf)",
        "damp": "(0, inf)",
        "window_dtype": "{float64, float32, bfloat16} or None",
        "sparse": "bool",
        "max_norm": "(0, inf) or None",
    }

    _move: _Move | None = None  # lives from probe to finish
    _kept: Elimination | None = None
    _windows: tuple[Tensor, ...] = ()  # those whose Gram matrix the groups hold

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        ngrads: int = 1024,
        damp: float = 1e-5,
        window_dtype: torch.dtype | str | None = None,
        sparse: bool = False,
        max_norm: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "ngrads": ngrads,
                "damp": damp,
                "window_dtype": window_dtype
                if window_dtype is None
                else str(window_dtype).removeprefix("torch."),
                "sparse": sparse,
                "max_norm": max_norm,
                "foreach": foreach,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse a group that disagrees with the others, and numbers that fit no window."""
        ranges.check_all(group, {"count": "int [0, inf)", "raised": "[0, inf)"})
        gram, expected = group.get("gram"), (group["ngrads"], group["ngrads"])
        if gram is not None and tuple(getattr(gram, "shape", ())) != expected:
            raise ValueError(
                f"gram must have the shape {expected}, ngrads squared; got "
                f"{tuple(getattr(gram, 'shape', ()))}. ngrads of a running MFAC cannot be changed."
            )
        groups = getattr(self, "param_groups", ())
        if any(group is other for other in groups):  # loaded ones are compared at the step
            ranges.check_alike(groups, _SHARED, "share one window")

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the parameter's part of the window, at zero."""
        state: State = {}
        shape = p.shape
        if group["sparse"]:
            state["kept"] = p.reshape(-1).nonzero().squeeze(1)
            shape = state["kept"].shape
        name = group["window_dtype"]
        dtype = p.dtype if name is None else getattr(torch, name)
        state["window"] = torch.zeros((group["ngrads"], *shape), dtype=dtype, device=p.device)
        if group["momentum"] > 0:
            state["exp_avg"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
        return state

    def prepare(self) -> None:
        """Give the first group what belongs to the whole window."""
        plan, params = self.param_groups[0], self._all_params()
        gram = plan.get("gram")
        where = home(params[0].device) if params else torch.device("cpu")
        if gram is None:
            m = plan["ngrads"]
            plan["gram"] = torch.zeros(m, m, dtype=torch.float64, device=where)
        elif (gram.device, gram.dtype) != (where, torch.float64):
            plan["gram"] = gram.to(where, torch.float64)
        plan.setdefault("count", 0)
        plan.setdefault("raised", 0.0)
        self._kept, self._windows = None, ()
        size = sum(self.state[p]["window"].nbytes for p in params)
        if size > _LARGE:
            warnings.warn(
                f"the window of MFAC takes {size / 2**30:.0f} GiB (ngrads={plan['ngrads']}); "
                'lower ngrads or take window_dtype="bfloat16".',
                stacklevel=3,
            )

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Multiply the new gradient with the window and solve for the coefficients."""
        loss, self._move = oracle.evaluate(), None
        ranges.check_alike(self.param_groups, _SHARED, "share one window")
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        found = [(p, p.grad, group) for p, group in every if p.grad is not None]
        for p, g, group in found:
            _check_member(p, g, self.state[p], group)
        if not found:
            return loss, _gradient
        plan = self.param_groups[0]
        windows = tuple(self.state[p]["window"] for p, _ in every)
        gram, made = plan["gram"], self._made_anew(windows, plan)
        if made is not None:
            gram, self._kept = made, None
        slot = plan["count"] % len(gram)
        entries = [_entries(p, g, self.state[p], group) for p, g, group in found]
        rings = [rows_of(self.state[p]["window"]) for p, _, _ in found]
        row = products(rings, entries, slot, gram.device)
        if not math.isfinite(row.sum().item()):
            raise _refusal([g for _, g, _ in found])
        # A raised damping is tried without at the next block, whose factor is new anyway.
        raised = plan["raised"] if slot % BLOCK else 0.0
        gamma = max(rounding(window.dtype) for window in windows)
        # Single precision has no coefficients beyond that.
        damp = max(float(plan["damp"]), *(4 / torch.finfo(g.dtype).max for g in entries))
        joint = Joint(rings, entries, slot)
        column, self._kept = newest_column(
            gram, row, slot, damp, raised, gamma, joint.slope, self._kept
        )
        steps = joint.direction(column)
        if plan["max_norm"] is not None:
            size = math.sqrt(sum(inner(s, s) for s in steps))
            if size > plan["max_norm"]:
                torch._foreach_mul_(steps, plan["max_norm"] / size)
        states = [id(self.state[p]) for p, _, _ in found]
        parts = dict(zip(states, zip(entries, steps, strict=True), strict=True))
        absent = [self.state[p] for p, _ in every if p.grad is None]
        self._move = _Move(slot, row, column.raised, made, parts, absent, windows)
        return loss, _gradient

    def _made_anew(self, windows: tuple[Tensor, ...], plan: Group) -> Tensor | None:
        """Return the Gram matrix if the kept one is not that of the windows (cleared state)."""
        known = self._windows
        if len(known) == len(windows) and all(map(_same, known, windows)):
            return None
        if plan["count"] == 0 or (not known and agrees(plan["gram"], windows)):
            return None
        parts = [gram_matrix(rows_of(w)).to(plan["gram"].device) for w in windows]
        made = reduce(torch.add, parts)
        if not bool(made.isfinite().all()):
            raise OracleError(
                "the window of gradients holds NaN or infinity; nothing has been changed. Load a "
                "sound state, or build a new optimizer."
            )
        return made

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Store one parameter's gradient and move it by its part of the joint direction."""
        step = self._stored(p, state)
        if group["momentum"] > 0:
            step = state["exp_avg"].lerp_(step, 1 - group["momentum"])
        p.sub_(group["lr"] * _whole(step, p, state))

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The same with the element-wise part for all parameters at once."""
        lr = group["lr"]
        steps = [self._stored(p, state) for p, state in zip(params, states, strict=True)]
        if group["momentum"] > 0:
            averages = [state["exp_avg"] for state in states]
            torch._foreach_lerp_(averages, steps, 1 - group["momentum"])
            steps = averages
        steps = [_whole(s, p, state) for s, p, state in zip(steps, params, states, strict=True)]
        if isinstance(lr, Tensor):
            torch._foreach_sub_(params, torch._foreach_mul(steps, lr))
        else:
            torch._foreach_sub_(params, steps, alpha=lr)

    def _stored(self, p: Tensor, state: State) -> Tensor:
        """Write the window's row and return s, in the shape and dtype of the average."""
        assert self._move is not None  # probe has solved
        row = state["window"][self._move.slot]
        g, s = self._move.parts[id(state)]
        row.copy_(g.view(row.shape))
        return s.view(row.shape).to(p.dtype)

    def finish(self, loss: Tensor | None) -> None:
        """Keep the new row of the Gram matrix and go on to the next slot."""
        if (move := self._move) is None:
            return
        plan, self._move = self.param_groups[0], None
        if move.gram is not None:
            plan["gram"].copy_(move.gram)
        plan["gram"][move.slot] = plan["gram"][:, move.slot] = move.row
        plan["count"] += 1
        plan["raised"] = move.raised
        self._windows = move.windows
        for state in move.absent:
            state["window"][move.slot] = 0


def _gradient(p: Tensor) -> Tensor | None:
    return p.grad


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b


def _entries(p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
    """Return the gradient with decay as a row of the window holds it, ready to be multiplied."""
    work = torch.promote_types(p.dtype, torch.float32)
    g = g.to(p.dtype).to(work)
    if group["weight_decay"] != 0:
        g = g.add(p.to(work), alpha=group["weight_decay"])
    g = g.reshape(-1)
    if "kept" in state:
        g = g[state["kept"]]
    dtype = state["window"].dtype
    return g.to(dtype).to(arithmetic(dtype))


def _whole(step: Tensor, p: Tensor, state: State) -> Tensor:
    """Return a step in the parameter's shape, zero where nothing is kept."""
    if "kept" not in state:
        return step
    whole = step.new_zeros(p.numel())
    whole[state["kept"]] = step
    return whole.view(p.shape)


def _check_member(p: Tensor, g: Tensor, state: State, group: Group) -> None:
    """Refuse what cannot be multiplied, before anything is written."""
    if g.layout is not torch.strided:
        raise RuntimeError(
            "MFAC does not support sparse gradients; give this parameter to "
            "torch.optim.SparseAdam, or build the layer with sparse=False."
        )
    if len(state["window"]) != group["ngrads"]:
        raise ValueError(
            f"ngrads of a running MFAC cannot be changed; got {group['ngrads']} for a window of "
            f"{len(state['window'])}. Build a new optimizer."
        )
    if group["momentum"] > 0 and "exp_avg" not in state:
        raise ValueError(
            f"momentum must be positive from the start to be used; got {group['momentum']} in a "
            "running MFAC. Build a new one with this momentum; OneCycleLR and CyclicLR set it by "
            "themselves unless cycle_momentum=False."
        )


def _refusal(grads: Sequence[Tensor]) -> OracleError:
    if all(bool(g.isfinite().all()) for g in grads):
        return OracleError(
            "the squared norm of the gradient overflows; nothing has been changed. Scale the loss "
            'down, or take window_dtype="float64".'
        )
    return OracleError(
        "MFAC needs finite gradients and got NaN or infinity, which would stay in the window for "
        "ngrads steps; nothing has been changed. Skip this step, or lower lr or raise damp."
    )
