"""Checks of construction: options, groups, refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimizers.testing.checks.registry import check
from optimizers.testing.checks.subject import (
    CheckFailed,
    NotApplicable,
    Subject,
    descend,
    equal,
    require,
)


def _must_refuse(subject: Subject, option: str, value: Any, names: tuple[str, ...]) -> None:
    """Demand a ValueError that carries the option's name and the value."""
    try:
        subject.make(subject.case().params, **{option: value})
    except ValueError as error:
        text = str(error).lower()
        shown = str(value[0] if isinstance(value, tuple) else value).lower()
        require(any(n in text for n in names), f"the error does not name the option: {error}")
        require(shown in text, f"the error does not show the value: {error}")
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__} instead of ValueError: {error}") from error
    else:
        raise CheckFailed(f"{option}={value} is accepted")


@check
def rejects_negative_lr(subject: Subject) -> None:
    """A negative learning rate is a ValueError that names option and value."""
    _must_refuse(subject, "lr", -1.0, ("lr", "learning rate"))


@check
def rejects_nan_lr(subject: Subject) -> None:
    """A NaN learning rate is a ValueError."""
    _must_refuse(subject, "lr", float("nan"), ("lr", "learning rate"))


@check
def rejects_bad_betas(subject: Subject) -> None:
    """Betas outside [0, 1) and NaN are ValueErrors."""
    if not subject.has("betas"):
        raise NotApplicable("the rule has no betas")
    _must_refuse(subject, "betas", (1.5, 0.9), ("beta",))
    _must_refuse(subject, "betas", (float("nan"), 0.9), ("beta",))


@check
def rejects_bad_momentum(subject: Subject) -> None:
    """A negative or NaN momentum is a ValueError."""
    if not subject.has("momentum"):
        raise NotApplicable("the rule has no momentum")
    _must_refuse(subject, "momentum", -0.5, ("momentum",))
    _must_refuse(subject, "momentum", float("nan"), ("momentum",))


@check
def rejects_negative_weight_decay(subject: Subject) -> None:
    """A negative weight decay is a ValueError."""
    if not subject.has("weight_decay"):
        raise NotApplicable("the rule has no weight decay")
    _must_refuse(subject, "weight_decay", -0.5, ("weight_decay", "weight decay"))


@check
def rejects_bad_lr_in_a_group(subject: Subject) -> None:
    """A group's own learning rate is checked like the default one."""
    case = subject.case()
    groups = [{"params": [p]} for p in case.params]
    groups[0]["lr"] = -1.0  # type: ignore[assignment]
    try:
        subject.make(groups)
    except ValueError:
        return
    raise CheckFailed("a group with lr=-1 is accepted")


@check
def rejects_bad_lr_in_a_late_group(subject: Subject) -> None:
    """A group added later is checked, and a refused one leaves the optimizer as it was."""
    case = subject.case()
    first, *rest = case.params
    optimizer = subject.make([first])
    try:
        optimizer.add_param_group({"params": rest, "lr": -1.0})
    except ValueError:
        require(len(optimizer.param_groups) == 1, "the refused group was added all the same")
        return
    raise CheckFailed("a late group with lr=-1 is accepted")


@check
def rejects_unknown_option(subject: Subject) -> None:
    """A misspelt keyword is a TypeError."""
    try:
        subject.make(subject.case().params, leraning_rate=0.1)
    except TypeError:
        return
    raise CheckFailed("leraning_rate=0.1 is accepted")


@check
def rejects_empty_and_duplicate_parameters(subject: Subject) -> None:
    """No parameters, or one parameter in two groups, is a ValueError."""
    for params in ([], [{"params": [p := subject.case().params[0]]}, {"params": [p]}]):
        try:
            subject.make(params)
        except ValueError:
            continue
        raise CheckFailed("an empty list is accepted" if not params else "a duplicate is accepted")


@check
def accepts_every_form_of_parameters(subject: Subject) -> None:
    """A generator, (name, parameter) pairs and groups make the same optimizer as a list."""
    results = []
    for form in ("list", "generator", "names", "groups"):
        case = subject.case()
        params: Any = case.params
        if form == "generator":
            params = (p for p in case.params)
        elif form == "names":
            params = case.model.named_parameters()
        elif form == "groups":
            params = [{"params": case.model.parameters()}]
        optimizer = subject.make(params)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        require(
            {id(p) for p in held} == {id(p) for p in case.params}, f"{form}: parameters are lost"
        )
        if form == "names":
            names = [n for g in optimizer.param_groups for n in g.get("param_names", [])]
            require(
                sorted(names) == sorted(n for n, _ in case.model.named_parameters()),
                "names: the groups do not carry param_names",
            )
        if form != "groups":  # a rule may give groups a meaning
            results.append(case.run(optimizer, range(3)))
    require(all(equal(results[0], r) for r in results[1:]), "the forms train differently")


@check
def options_live_in_groups(subject: Subject) -> None:
    """Every group has lr, and a learning rate given to a group is the one it gets."""
    case = subject.case()
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(case.params)]
    optimizer = subject.make(groups)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    require(
        rates == [0.01 * (i + 1) for i in range(len(rates))], f"the groups have the rates {rates}"
    )


@check
def group_learning_rate_is_obeyed(subject: Subject) -> None:
    """A group with lr=0 stays, the others move."""
    case = subject.case()
    groups: list[dict[str, Any]] = [{"params": [p]} for p in case.params]
    groups[0]["lr"] = 0.0
    optimizer = subject.make(groups)
    before, after = case.values(), case.run(optimizer, range(5))
    require(torch.equal(before[0], after[0]), "the group with lr=0 moved")
    require(not torch.equal(before[-1], after[-1]), "the other group did not move")


@check
def group_added_later_trains(subject: Subject) -> None:
    """A group added after some steps is trained, and the older one goes on."""
    case = subject.case()
    first, *rest = case.params
    optimizer = subject.make([first])
    case.run(optimizer, range(3))
    optimizer.add_param_group({"params": rest})
    before, after = case.values(), case.run(optimizer, range(3, 9))
    require(
        not any(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "a parameter did not move after the group was added",
    )


@check
def one_group_equals_many(subject: Subject) -> None:
    """Splitting the parameters into groups changes nothing."""
    one = subject.case()
    many = subject.case()
    left = one.run(subject.make(one.params), range(5))
    right = many.run(subject.make([{"params": [p]} for p in many.params]), range(5))
    require(equal(left, right), "one group and one group per parameter train differently")


@check
def parameter_order_is_irrelevant(subject: Subject) -> None:
    """Handing the parameters over in another order changes nothing but the order."""
    one, other = subject.case(), subject.case()
    left = one.run(subject.make(one.params), range(5))
    right = other.run(subject.make(other.params[::-1]), range(5))
    worst = max(
        float((a - b).abs().max()) for a, b in zip(left, right, strict=True)
    )  # sums over parameters may round differently
    require(worst <= 1e-12, f"reversed parameters differ by {worst:.1e}")


@check
def tensor_lr_equals_float_lr(subject: Subject) -> None:
    """A 0-D tensor learning rate trains like the float."""
    lr = float(subject.make(subject.case().params).param_groups[0]["lr"])
    plain = subject.case()
    left = plain.run(subject.make(plain.params, lr=lr), range(5))
    case = subject.case()
    try:
        optimizer = subject.make(case.params, lr=torch.tensor(lr, dtype=torch.float64))
        right = case.run(optimizer, range(5))
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    worst = max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
    require(worst <= 1e-12, f"a tensor learning rate differs by {worst:.1e}")


@check
def tensor_lr_is_not_shared(subject: Subject) -> None:
    """Groups own their learning-rate tensor: changing one changes no other, nor the caller's."""
    lr = torch.tensor(0.01, dtype=torch.float64)
    case = subject.case()
    try:
        optimizer = subject.make([{"params": [p]} for p in case.params], lr=lr)
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    optimizer.param_groups[0]["lr"].fill_(0.5)
    require(float(lr) == 0.01, "the caller's tensor was changed")
    require(float(optimizer.param_groups[1]["lr"]) == 0.01, "the groups share one tensor")


@check
def is_a_torch_optimizer(subject: Subject) -> None:
    """It is a torch.optim.Optimizer, so every scheduler and trainer accepts it."""
    case, optimizer = subject.pair()
    require(isinstance(optimizer, torch.optim.Optimizer), f"it is a {type(optimizer).__name__}")
    require(bool(repr(optimizer)), "it has no repr")
    case.model.zero_grad()
    optimizer.zero_grad(set_to_none=True)


@check
def frozen_parameters_stay(subject: Subject) -> None:
    """A parameter that requires no gradient is held but not moved."""
    case = subject.case()
    case.params[0].requires_grad_(False)
    optimizer = subject.make(case.params)
    before, after = case.values(), case.run(optimizer, range(6))
    require(torch.equal(before[0], after[0]), "the frozen parameter moved")
    require(not torch.equal(before[-1], after[-1]), "the others did not move")


@check
def empty_parameter(subject: Subject) -> None:
    """A parameter without elements (an empty shard) is harmless."""
    subject.only_gradients()
    params = subject.tensors()
    params.append(nn.Parameter(torch.zeros(0, 4, dtype=torch.float64)))
    try:
        descend(subject.make(params), params, range(3))
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
