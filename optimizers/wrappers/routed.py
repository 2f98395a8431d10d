"""One optimizer for a whole model: each parameter goes to the rule that suits it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizers import checkpoint, ranges
from optimizers.oracle import Needs
from optimizers.wrappers.roles import Weight, classify

InnerGroups = list[dict[str, Any]]

# What torch checks in its constructors and nowhere else.
INNER_RANGES = {
    "lr_scale": "[0, inf)",
    "weight_decay": "[0, inf)",
    "betas": "2 of [0, 1)",
    "eps": "[0, inf)",
    "momentum": "[0, inf)",
}


@dataclass(frozen=True)
class Rule:
    """A rule inside :class:`Routed`.

    Attributes:
        name: How the rule is called in tables and groups.
        build: ``build(groups) -> optimizer``, for a list of parameter groups whose ``params`` are
            ``(name, parameter)`` pairs. Any :class:`torch.optim.Optimizer` that works from
            ``.grad``.
        wants: Whether the rule takes a parameter; the first rule that does gets it.
        options: Options of the group into which a parameter goes; parameters with equal options
            share a group.
    """

    name: str
    build: Callable[[InnerGroups], torch.optim.Optimizer]
    wants: Callable[[Weight], bool]
    options: Callable[[Weight], Mapping[str, Any]] = lambda weight: {}


class Routed(torch.optim.Optimizer):
    r"""Several rules behind one optimizer: one scheduler, one ``state_dict``, one ``step``.

    Each parameter goes to the first rule that wants it; the closure is evaluated once. The rules'
    groups are this optimizer's groups. All groups show one learning rate, that of the first rule,
    and carry ``lr_scale``, the ratio of their own to it: whatever a scheduler does to ``lr``,
    multiplicative or not, the ratio stays. A group's rate in effect is ``lr * lr_scale``.

    ``print(optimizer)`` shows who got which rule and why. Parameters that require no gradient at
    construction are left out; hand them to :meth:`add_param_group` when you thaw them. OneCycleLR
    and CyclicLR need ``cycle_momentum=False``: the rules' momenta mean different things.

    Args:
        weights: A model (its parameters are classified by :func:`classify`) or a list of
            :class:`Weight`.
        rules: The rules, in order of preference.

    State:
        What the inner rules keep, in one mapping.

    Raises:
        ValueError: If a parameter is wanted by no rule, two rules share a name, or a rule needs
            more than gradients.

    Example:
        >>> import torch, optimizers
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> optimizer = optimizers.muon_with_adamw(model, lr=0.02)
        >>> [group["rule"] for group in optimizer.param_groups]
        ['muon', 'adamw', 'adamw']

    Reference:
        The division of labour is that of Jordan et al., "Muon", 2024.
    """

    def __init__(self, weights: nn.Module | Iterable[Weight], rules: Sequence[Rule]) -> None:
        if isinstance(weights, nn.Module):
            weights = classify(weights)
        weights = list(weights)
        if len({rule.name for rule in rules}) != len(rules):
            raise ValueError(
                f"rules must have different names; got {[rule.name for rule in rules]}."
            )
        self._inner: dict[str, torch.optim.Optimizer] = {}
        self._why = {w.name: (w.role, w.reason) for w in weights}
        for rule, groups in _distribute(weights, rules).items():
            inner = rule.build(groups)
            _refuse_unless_gradients(inner, rule.name)
            self._inner[rule.name] = inner
        base_lr = next(iter(self._inner.values())).param_groups[0]["lr"]
        groups = []
        for name, inner in self._inner.items():
            for group in inner.param_groups:
                group["rule"] = name
                group["lr_scale"] = _ratio(group["lr"], base_lr, name)
                group["lr"] = _copy(base_lr)
                groups.append(group)
            _make_state(inner)
        self._building = True
        super().__init__(groups, {"lr": base_lr})
        self._building = False
        self._share_state()

    # ------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure once, then let every rule take its step.

        Raises:
            RuntimeError: For sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif checkpoint.is_dry_step(self.param_groups):
            return None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        "Routed does not support sparse gradients; build the layer with "
                        "sparse=False, or give it an optimizer of its own."
                    )
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr * group["lr_scale"]
            for inner in self._inner.values():
                inner.state = self.state  # one mapping, also if a caller put in another
                inner.step()
        finally:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr
        return loss

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to one of the rules, named by its key ``rule``.

        Raises:
            ValueError: If ``rule`` is missing or unknown.
        """
        if self._building:
            super().add_param_group(param_group)
            return
        if "params" not in param_group:
            raise ValueError("a param_group must have the key 'params'.")
        group = dict(param_group)
        name = group.pop("rule", None)
        if name not in self._inner:
            raise ValueError(
                f"the group must name its rule, one of {list(self._inner)}; got {name!r}."
            )
        members = group["params"]
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        named = all(isinstance(p, tuple) for p in group["params"])
        if not named and any("param_names" in g for g in self.param_groups):
            raise ValueError(
                "the other groups have names; pass (name, parameter) pairs, such as "
                "list(layer.named_parameters())."
            )
        taken = {id(p) for g in self.param_groups for p in g["params"]}
        if any(id(p[1] if isinstance(p, tuple) else p) in taken for p in group["params"]):
            raise ValueError("some parameters appear in more than one parameter group")
        reference = next(g for g in self.param_groups if g["rule"] == name)
        scale = reference["lr_scale"]
        if (lr := group.pop("lr", None)) is not None:
            ranges.check("lr", lr, "[0, inf)")
            # Against the rate that the schedule started from, where there is a schedule.
            scale = _ratio(lr, reference.get("initial_lr", reference["lr"]), name)
        inner = self._inner[name]
        inner.add_param_group({**group, "lr": _copy(reference["lr"])})
        added = inner.param_groups[-1]
        added["rule"], added["lr_scale"] = name, scale
        if "initial_lr" in reference:
            added.setdefault("initial_lr", reference["initial_lr"])
        _make_state(inner)
        self.param_groups.append(added)

    def _share_state(self) -> None:
        """Let all rules keep their state in one mapping, which is this optimizer's."""
        shared: defaultdict[Tensor, Any] = defaultdict(dict)
        for inner in self._inner.values():
            shared.update(inner.state)
        for inner in self._inner.values():
            inner.state = shared
        self.state = shared

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; a state that is refused changes nothing.

        Raises:
            ValueError: If groups, rules, names or state do not fit.
        """
        loaded = checkpoint.read(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = checkpoint.read(result)
        groups, packed = checkpoint.decode(loaded, self.param_groups, "Routed")
        rules = [group["rule"] for group in self.param_groups]
        if [group["rule"] for group in groups] != rules:
            raise ValueError(
                f"the loaded state has the rules {[g['rule'] for g in groups]}, this optimizer "
                f"has {rules}."
            )
        for index, (group, states) in enumerate(zip(groups, packed, strict=True)):
            where = f" (in loaded parameter group {index})"
            ranges.check_all(group, {"lr": "[0, inf)", **INNER_RANGES}, where)
            for p, values in zip(group["params"], states, strict=True):
                # torch's rules take any shape here and write past its end at the next step.
                if values and self.state.get(p):
                    checkpoint.refuse_misfit(self.state[p], values, p, foreign=False)
        ordered = checkpoint.by_name(loaded, self.param_groups)
        before = {name: dict(inner.__dict__) for name, inner in self._inner.items()}
        try:
            for name, inner in self._inner.items():
                own = [g for g in ordered["param_groups"] if g["rule"] == name]
                ids = {i for g in own for i in g["params"]}
                # A copy: torch's rules would go on working in the stored tensors themselves.
                state = {i: deepcopy(s) for i, s in ordered["state"].items() if i in ids}
                inner.load_state_dict({"state": state, "param_groups": own})
        except Exception:
            for name, inner in self._inner.items():
                inner.__dict__.update(before[name])
            raise
        taken = {name: iter(inner.param_groups) for name, inner in self._inner.items()}
        self.param_groups = [next(taken[name]) for name in rules]
        for inner in self._inner.values():
            _make_state(inner)
        self._share_state()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copy the inner rules too; they share groups and state with this object."""
        return {
            **super().__getstate__(),
            "_inner": self._inner,
            "_why": self._why,
            "_building": False,
        }

    # ------------------------------------------------------------------ explaining

    def table(self) -> str:
        """Return who got which rule, at which rate, and why, as text."""
        rows = [("parameter", "shape", "rule", "rate", "role", "why")]
        for group in self.param_groups:
            rate = f"{float(group['lr'] * group['lr_scale']):.3g}"
            names = group.get("param_names") or [f"#{i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                role, why = self._why.get(name, ("given", "added by hand"))
                shape = "x".join(map(str, p.shape)) or "()"
                rows.append((name, shape, group["rule"], rate, role, why))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Routed(\n{self.table()}\n)"


def _distribute(weights: list[Weight], rules: Sequence[Rule]) -> dict[Rule, InnerGroups]:
    """Return for each rule that got something its groups, by equal options."""
    groups: dict[Rule, dict[str, dict[str, Any]]] = {}
    for weight in weights:
        rule = next((rule for rule in rules if rule.wants(weight)), None)
        if rule is None:
            raise ValueError(
                f"no rule wants {weight.name!r} ({weight.role}: {weight.reason}); add a rule that "
                "takes it, or freeze it."
            )
        options = dict(rule.options(weight))
        group = groups.setdefault(rule, {}).setdefault(repr(options), {"params": [], **options})
        group["params"].append((weight.name, weight.parameter))
    if not groups:
        raise ValueError("optimizer got an empty parameter list: nothing in the model is trainable")
    # In an order that the order of the modules does not decide: names then match on loading.
    return {
        rule: [groups[rule][key] for key in sorted(groups[rule])]
        for rule in rules
        if rule in groups
    }


def _refuse_unless_gradients(inner: torch.optim.Optimizer, name: str) -> None:
    needs = getattr(inner, "needs", Needs.GRADIENTS)
    if needs is not Needs.GRADIENTS or isinstance(inner, torch.optim.LBFGS):
        raise ValueError(
            f"the rule {name!r} ({type(inner).__name__}) needs more than gradients; Routed "
            "evaluates the closure once and hands its gradients to every rule."
        )


def _ratio(lr: Any, base: Any, rule: str) -> float:
    if not float(base) > 0:
        raise ValueError(
            f"the ratio of the rate of the rule {rule!r} to {float(base)} is not defined; build "
            "the optimizer with positive rates and let a scheduler start from 0."
        )
    return float(lr) / float(base)


def _copy(lr: Any) -> Any:
    return lr.detach().clone() if isinstance(lr, Tensor) else lr


def _make_state(inner: torch.optim.Optimizer) -> None:
    """Create the state of torch's Adam and AdamW, which they would create at their first step.

    A checkpointer looks at the state to learn what to load; half of a state would be half loaded.
    """
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in inner.param_groups:
        on_device = group["fused"] or group["capturable"]
        for p in group["params"]:
            if inner.state.get(p):
                continue
            step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else None)
            state = {
                "step": step,
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p)
            inner.state[p] = {
                key: value.detach() if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


__all__ = ["Routed", "Rule"]
