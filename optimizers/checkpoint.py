"""Checkpoints: reading a state, validated as a whole before anything changes; dry steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from optimizers import distributed

FORMAT_VERSION = 1
"""Written into each group as ``format_version``; raised when stored state changes meaning."""

# Switches of torch's own optimizers that say how, not what, is computed.
_TORCH_SWITCHES = frozenset({"fused", "capturable", "differentiable", "amsgrad", "foreach"})


def is_dry_step(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step without closure is a checkpointer's: rates 0, gradients zero or absent.

    Such a step exists to create state, which is there from the start, so nothing may change: no
    parameter, no state, no counter, no random number.
    """
    for group in groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return False  # reading it would stall the device
        if lr != 0:
            return False
    grads = (p.grad for group in groups for p in group["params"])
    return not distributed.any_nonzero(g for g in grads if g is not None)


def is_foreign(state_dict: Mapping[str, Any]) -> bool:
    """Whether the state was written by another library (it carries no format version)."""
    return not any("format_version" in group for group in state_dict["param_groups"])


def read(state_dict: Any) -> dict[str, Any]:
    """Return a shallow copy of a stored state, after a look at its outer form.

    Raises:
        ValueError: If it is not what ``optimizer.state_dict()`` returns.
    """
    remedy = "pass what optimizer.state_dict() returned."
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the state to load is a {type(state_dict).__name__}; {remedy}")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if key not in state_dict:
            raise ValueError(f"the state to load has no key {key!r}; {remedy}")
        if not isinstance(state_dict[key], kind):
            raise ValueError(f"{key!r} of the state to load is {state_dict[key]!r:.60}; {remedy}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(f"parameter group {index} of the state has no 'params'; {remedy}")
    return dict(state_dict)


def decode(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[dict[str, Any]], list[list[Mapping[str, Any] | None]]]:
    """Match a stored state with the optimizer's groups.

    Args:
        state_dict: The stored state.
        groups: The optimizer's present groups.
        name: The optimizer's name, for messages.

    Returns:
        The new groups, and for each the stored state of its parameters in the groups' order
        (``None`` where nothing was stored).

    Raises:
        ValueError: If they do not fit.
    """
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"the loaded state has {len(saved_groups)} parameter groups, {name} has {len(groups)}."
        )
    foreign = is_foreign(state_dict)
    known: set[Any] = set()
    new_groups, states = [], []
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        version = saved.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"the loaded state has format {version!r}, this library reads up to "
                f"{FORMAT_VERSION}; upgrade it."
            )
        ids = list(saved["params"])
        if len(ids) != len(group["params"]):
            raise ValueError(
                f"parameter group {index} of the loaded state has {len(ids)} parameters, that of "
                f"{name} has {len(group['params'])}."
            )
        known.update(ids)
        ids = _in_order(ids, saved.get("param_names"), group.get("param_names"), index)
        new_groups.append(_merge(saved, group, foreign))
        states.append([saved_state.get(i) for i in ids])
    stray = set(saved_state) - known
    if stray:
        raise ValueError(f"the loaded state holds entries of no parameter: {sorted(stray)!r}.")
    return new_groups, states


def by_name(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the stored state with each group's parameters in the order of the present names."""
    ordered = []
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        ids = _in_order(
            list(saved["params"]), saved.get("param_names"), group.get("param_names"), index
        )
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        ordered.append({**saved, **names, "params": ids})
    return {**state_dict, "param_groups": ordered}


def _in_order(ids: list[Any], saved: Any, names: Any, index: int) -> list[Any]:
    """Return the stored ids in the order of the optimizer's own names, where both have names."""
    if saved is None or names is None:
        return ids
    saved, names = [_bare(name) for name in saved], [_bare(name) for name in names]
    if saved == names:
        return ids
    missing, unexpected = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
    if missing or unexpected:
        raise ValueError(
            f"the names of parameter group {index} do not match: missing in the loaded state "
            f"{missing[:5]}, unexpected in it {unexpected[:5]}."
        )
    by_name = dict(zip(saved, ids, strict=True))
    return [by_name[name] for name in names]


def _bare(name: str) -> str:
    """Return a name without what wrappers (DDP, torch.compile) put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _merge(saved: Mapping[str, Any], group: Mapping[str, Any], foreign: bool) -> dict[str, Any]:
    """Return the group with the stored options laid over the present ones."""
    merged = dict(group)
    for key, value in saved.items():
        if key in ("params", "param_names", "format_version") or key.startswith("_"):
            continue
        if foreign and key in _TORCH_SWITCHES:
            continue
        merged[key] = value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
    if "param_names" in saved and "param_names" not in group:
        merged["param_names"] = list(saved["param_names"])
    return merged


def fill(
    template: dict[str, Any], values: Mapping[str, Any] | None, p: Tensor, foreign: bool
) -> dict[str, Any]:
    """Return ``values`` in the shapes, dtypes and layout of a fresh state.

    Args:
        template: A fresh state of the parameter; it is filled in place and returned.
        values: The stored state, or ``None`` to keep the fresh one.
        p: The parameter, for messages.
        foreign: Whether the state was written by another library, which may keep no ``step``.

    Raises:
        ValueError: If keys, shapes or kinds differ.
    """
    if not values:
        return template
    refuse_misfit(template, values, p, foreign)
    for key, value in values.items():
        fresh = template[key]
        if isinstance(fresh, Tensor):
            with torch.no_grad():
                distributed.copy_(fresh, torch.as_tensor(value))
        else:
            template[key] = deepcopy(value)
    return template


def refuse_misfit(
    template: Mapping[str, Any], values: Mapping[str, Any], p: Tensor, foreign: bool
) -> None:
    """Raise ``ValueError`` unless ``values`` has the keys, shapes and kinds of ``template``."""
    where = f"of a parameter of shape {tuple(p.shape)}"
    missing, unexpected = set(template) - set(values), set(values) - set(template)
    if foreign:
        missing -= {"step"}
    if missing or unexpected:
        raise ValueError(
            f"the loaded state {where} does not fit: missing {sorted(missing)}, unexpected "
            f"{sorted(unexpected)}. It was written by another rule or with other options."
        )
    for key, value in values.items():
        fresh = template[key]
        if not isinstance(fresh, Tensor):
            if not isinstance(value, type(fresh)):
                raise ValueError(f"the loaded {key!r} {where} is a {type(value).__name__}.")
            continue
        if not isinstance(value, (Tensor, int, float)):
            raise ValueError(f"the loaded {key!r} {where} is a {type(value).__name__}.")
        shape = value.shape if isinstance(value, Tensor) else torch.Size()
        if shape != fresh.shape:
            raise ValueError(
                f"the loaded {key!r} {where} has shape {tuple(shape)}; "
                f"expected {tuple(fresh.shape)}."
            )
