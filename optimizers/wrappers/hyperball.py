"""Hyperball: the steps of any optimizer, on the sphere of each matrix's initial norm."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from optimizers import checkpoint, distributed, ranges
from optimizers.base import Optimizer
from optimizers.oracle import Needs
from optimizers.wrappers.routed import Routed, _make_state

_RADIUS = "hyperball.radius"
_RANGES = {
    "lr": "[0, inf)",
    "hyperball_radius": "(0, inf) or None",
    "hyperball_project": "{matrices, all, none}",
}
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class Hyperball(torch.optim.Optimizer):
    r"""Any optimizer with the norms of its matrices held fixed: ``lr`` is the relative step.

    In the place of weight decay, which ends in a balance of norms that depends on rate and decay:
    here the norm is what it was at the start, and the rate says by how much a matrix turns. Around
    :class:`Muon` this is MuonH, around ``torch.optim.Adam`` AdamH. Not for badly scaled
    initialisations, for the scale stays: deep ReLU networks with torch's default (a gain of
    :math:`1/\sqrt 3` where they need :math:`\sqrt 2`) do not train; initialise them after He, or
    give a target radius.

    With the step :math:`D` that the inner rule makes of a matrix :math:`W` of norm R:

    .. math::
        N = W + \eta R\, D / \|D\|_F, \qquad W \leftarrow R\, N / \|N\|_F

    so successive W differ by an angle of at most :math:`\arcsin\eta` (for :math:`\eta < 1`). A
    matrix that the inner rule does not move stays as it is, bit by bit. Norms are those of whole
    parameters, also of stacks and kernels.

    D is read off the parameters, so it has their rounding: an inner rule whose own steps are many
    times shorter than :math:`\eta R` (plain SGD) loses digits, and in bfloat16 (without float32
    master weights) small steps are lost as always.

    The groups are the inner rule's; schedulers work on their ``lr``, at which the inner rule takes
    its step, too. A group may have its own ``hyperball_radius`` and ``hyperball_project``. If a
    step raises, the parameters are put back.

    Args:
        inner: Any :class:`torch.optim.Optimizer`, of any needs, without weight decay: it would
            only turn the step. The closure is passed on to it.
        radius: R, in (0, inf); ``None``: each parameter's norm at construction.
        project: What is held on its sphere: ``"matrices"`` (two dimensions and more; vectors
            follow the inner rule), ``"all"`` or ``"none"``. Single numbers never are.

    State:
        What the inner rule keeps, and for each parameter on a sphere ``hyperball.radius``, a
        number.

    Raises:
        TypeError: If ``inner`` is no optimizer.
        ValueError: For a weight decay, a parameter that is zero, or an option out of its range.

    Example:
        >>> import torch, optimizers
        >>> from optimizers.wrappers import Hyperball
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = Hyperball(torch.optim.SGD([w], lr=0.1))
        >>> w.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> optimizer.step()
        >>> round(float(w.detach().norm()), 6)
        1.414214

    Reference:
        Wen, Dang, Lyu, Ma, Liang, "Fantastic Pretraining Optimizers and Where to Find Them II:
        Hyperball Optimization", 2026. There the norm of the update is divided by
        :math:`\max(\|D\|_F, 10^{-10})`; here a step is zero or counts, however small.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        radius: float | None = None,
        project: str = "matrices",
    ) -> None:
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"inner must be an optimizer; got a {type(inner).__name__}.")
        if isinstance(inner, Routed):
            raise ValueError(
                "Hyperball takes a group's lr for its relative step, and Routed's groups show the "
                "rate of the first rule; put Hyperball around a rule inside: "
                "Rule(name, lambda groups: Hyperball(Muon(groups, weight_decay=0.0)), ...)."
            )
        options = {"hyperball_radius": radius, "hyperball_project": project}
        radii = {}
        for index, group in enumerate(inner.param_groups):
            where = f" (in parameter group {index})"
            radii.update(_checked({**inner.defaults, **options, **group}, where))
        self.inner = inner
        self.needs: Needs = getattr(inner, "needs", Needs.GRADIENTS)
        _make_state(inner)
        self._building = True
        self._waiting: dict[Tensor, float] = {}
        super().__init__(inner.param_groups, {**inner.defaults, **options})
        self._building = False
        self.param_groups = inner.param_groups
        self._collect(radii)

    # ------------------------------------------------------------------ stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the inner rule take its step, then replace it by one of the length ``lr`` * R.

        Args:
            closure: As the inner rule wants it.
        """
        if closure is None and checkpoint.is_dry_step(self.param_groups):
            if not isinstance(self.inner, Optimizer) and not any(self.state.values()):
                self._lend()
                self.inner.step()  # torch's rules make their state there, for a checkpointer
                self._collect(self._radii(), made=True)
            return None
        for index, group in enumerate(self.param_groups):
            _refuse_decay(group, f" (in parameter group {index})")
        self._lend()
        params = [p for group in self.param_groups for p in group["params"]]
        before = {p: p.detach().clone() for p in params}
        known = self._radii()
        radii = {
            p: known.get(p) or _radius(p, group)
            for group in self.param_groups
            for p in group["params"]
            if _is_projected(p, group)
        }
        step: Any = self.inner.step
        try:
            loss = step() if closure is None else step(closure)
        except BaseException:
            with torch.no_grad():
                for p, value in before.items():
                    p.copy_(value)
            raise
        self._collect(radii, made=True)
        for group in self.param_groups:
            parts: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p in radii:
                    key = (p.device, p.dtype, distributed.mesh_of(p))
                    parts.setdefault(key, []).append(p)
            for part in parts.values():
                starts, lengths = [before[p] for p in part], [radii[p] for p in part]
                _turn_(part, starts, lengths, group["lr"])
        return loss

    def eval_params(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameters hold the weights to deploy."""
        context: Any = getattr(self.inner, "eval_params", contextlib.nullcontext)
        inner: contextlib.AbstractContextManager[None] = context()
        return inner

    # ------------------------------------------------------------------ groups and state

    def _lend(self) -> None:
        """Hand groups and state to the inner rule: its own part of the state, no more.

        Most of torch's rules make their state when they find none for a parameter.
        """
        own: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for group in self.param_groups:
            for p in group["params"]:
                if values := _without_radius(self.state.get(p, {})):
                    own[p] = values
        self.inner.state = own
        self.inner.param_groups = self.param_groups

    def _collect(self, radii: Mapping[Tensor, float], *, made: bool = False) -> None:
        """Take the inner rule's state back; in place, for the mapping may be another's as well.

        The radii wait apart until the inner rule has made its state: a checkpointer takes the step
        that makes it only where it finds none.
        """
        members = [p for group in self.param_groups for p in group["params"]]
        made = made or any(self.inner.state.get(p) for p in members)
        self._waiting = {} if made else dict(radii)
        for p in members:
            values = dict(self.inner.state.get(p, {}))
            if made and p in radii:
                values[_RADIUS] = radii[p]
            if values:
                self.state[p] = values

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner rule.

        Raises:
            ValueError: As at construction; nothing is added then.
        """
        if self._building:
            super().add_param_group(param_group)
            return
        if "params" not in param_group:
            raise ValueError("a param_group must have the key 'params'.")
        group = dict(param_group)
        members = group["params"]
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        for key in ("hyperball_radius", "hyperball_project"):
            group.setdefault(key, self.defaults[key])
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        where = f" (in parameter group {len(self.param_groups)})"
        radii = _checked({**self.inner.defaults, **group, "params": tensors}, where)
        self._lend()
        self.inner.add_param_group(group)
        _make_state(self.inner)
        self._collect({**self._radii(), **radii})

    def _radii(self) -> dict[Tensor, float]:
        kept = {p: state[_RADIUS] for p, state in self.state.items() if _RADIUS in state}
        return {**self._waiting, **kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; a state that is refused changes nothing.

        Raises:
            ValueError: If groups, names, options or state do not fit.
        """
        loaded = checkpoint.read(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = checkpoint.read(result)
        groups, packed = checkpoint.decode(loaded, self.param_groups, "Hyperball")
        radii: dict[Tensor, float] = {}
        for index, (group, states) in enumerate(zip(groups, packed, strict=True)):
            where = f" (in loaded parameter group {index})"
            ranges.check_all(group, _RANGES, where)
            _refuse_decay(group, where)
            for p, values in zip(group["params"], states, strict=True):
                radii.update(self._loaded_radius(p, values or {}, group))
                stored = _without_radius(values or {})
                present = _without_radius(self.state.get(p, {}))
                if stored and present:  # torch's rules would take any shape here
                    checkpoint.refuse_misfit(present, stored, p, foreign=False)
        ordered = checkpoint.by_name(loaded, self.param_groups)
        # A copy: torch's rules would go on working in the stored tensors themselves.
        state = {i: deepcopy(_without_radius(s)) for i, s in ordered["state"].items()}
        ordered["state"] = {i: values for i, values in state.items() if values}
        self._lend()
        before = dict(self.inner.__dict__)
        try:
            self.inner.load_state_dict(ordered)
        except Exception:
            self.inner.__dict__.update(before)
            raise
        self.param_groups = self.inner.param_groups
        self.state.clear()
        _make_state(self.inner)
        self._collect(radii, made=bool(state))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_radius(
        self, p: Tensor, values: Mapping[str, Any], group: Mapping[str, Any]
    ) -> dict[Tensor, float]:
        """Return the radius of a parameter that is on a sphere."""
        if not _is_projected(p, group):
            return {}
        if _RADIUS in values:
            ranges.check(_RADIUS, values[_RADIUS], "(0, inf)")
            return {p: float(values[_RADIUS])}
        if values:
            raise ValueError(
                f"the loaded state of a parameter of shape {tuple(p.shape)} has no {_RADIUS!r}: it "
                "was written without Hyperball. Load it into the inner rule before wrapping that."
            )
        return {p: self._radii().get(p) or _radius(p, group)}

    def __getstate__(self) -> dict[str, Any]:
        """Copy the inner rule too; it shares groups and state with this object."""
        own = {"inner": self.inner, "needs": self.needs, "_building": False}
        return {**super().__getstate__(), **own, "_waiting": self._waiting}

    def __repr__(self) -> str:
        return f"Hyperball({self.inner!r})"


def _checked(group: Mapping[str, Any], where: str) -> dict[Tensor, float]:
    """Return the radii of a group whose options are in order."""
    if "lr" not in group:
        raise ValueError(f"Hyperball needs the inner rule's lr as its relative step{where}.")
    ranges.check_all(group, _RANGES, where)
    _refuse_decay(group, where)
    return {p: _radius(p, group) for p in group["params"] if _is_projected(p, group)}


def _refuse_decay(group: Mapping[str, Any], where: str) -> None:
    decay = group.get("weight_decay", 0)
    if decay != 0 and any(_is_projected(p, group) for p in group["params"]):
        raise ValueError(
            f"weight_decay must be 0 inside Hyperball, which keeps the norms itself; got {decay!r}"
            f"{where}. Set it to 0, or take the group out with hyperball_project='none'."
        )


def _is_projected(p: Tensor, group: Mapping[str, Any]) -> bool:
    project = group["hyperball_project"]
    # The sphere of a single number is two points, between which no step leads.
    return p.numel() > 1 and (project == "all" or (project == "matrices" and p.ndim >= 2))


def _radius(p: Tensor, group: Mapping[str, Any]) -> float:
    """Return the radius of the sphere on which a parameter is to stay."""
    if p.is_meta or torch.nn.parameter.is_lazy(p):
        raise ValueError("Hyperball got a parameter without values; materialise it first.")
    with torch.no_grad():
        norm = float(_norms([_working(p.detach())])[0])
    if not 0 < norm < float("inf"):
        raise ValueError(
            f"Hyperball keeps the norm of a parameter, and one of shape {tuple(p.shape)} has the "
            f"norm {norm}. Initialise it, or put it into a group with hyperball_project='none'."
        )
    radius = group["hyperball_radius"]
    return norm if radius is None else float(radius)


@torch.no_grad()
def _turn_(
    params: Sequence[Tensor], starts: Sequence[Tensor], radii: Sequence[float], lr: Any
) -> None:
    """Replace each step ``p - start`` by one of the length ``lr * radius``, then project.

    No number is read back to the host.
    """
    works = [_working(p.detach()) for p in params]
    # What lies on this rank; only norms need the others.
    own = [distributed.local(work) for work in works]
    origins = [distributed.local(_working(start)) for start in starts]
    torch._foreach_sub_(own, origins)
    lengths = torch.stack(_norms(works))
    rates = torch.where(lengths > 0, lr * torch.stack(_over(radii, lengths.unbind())), 0)
    torch._foreach_mul_(own, rates.unbind())
    torch._foreach_add_(own, origins)
    lengths = torch.stack(_norms(works))
    # What did not move is not touched: a projection would round it.
    moved = (rates != 0) & (lengths > 0)
    scales = torch.where(moved, torch.stack(_over(radii, lengths.unbind())), 1)
    torch._foreach_mul_(own, scales.unbind())
    if params[0].dtype in _LOW_PRECISION:
        torch._foreach_copy_([distributed.local(p.detach()) for p in params], own)


def _over(radii: Sequence[float], lengths: Sequence[Tensor]) -> list[Tensor]:
    """Return ``radius / length`` for each pair."""
    ratios = list(torch._foreach_reciprocal(list(lengths)))
    torch._foreach_mul_(ratios, list(radii))
    return ratios


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of whole tensors, also of those spread over ranks."""
    norms = torch._foreach_norm(list(tensors))
    return [norm.full_tensor() if distributed.is_sharded(norm) else norm for norm in norms]


def _working(tensor: Tensor) -> Tensor:
    """Return the tensor in at least float32."""
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def _without_radius(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != _RADIUS}
