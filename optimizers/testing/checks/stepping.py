"""Checks of what a step does, and of what it leaves alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from optimizers.oracle import Needs
from optimizers.testing.checks.registry import check, expensive_check
from optimizers.testing.checks.subject import (
    CheckFailed,
    NotApplicable,
    Subject,
    distance,
    equal,
    finite,
    gradients,
    inject,
    require,
)


@check
def moves_every_parameter(subject: Subject) -> None:
    """With its example arguments ten steps move every parameter and nothing becomes non-finite."""
    case, optimizer = subject.pair()
    before, after = case.values(), case.run(optimizer, range(10))
    require(finite(after), "a parameter is not finite")
    still = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if torch.equal(a, b)]
    require(not still, f"the parameters {still} did not move")


@check
def gradient_is_not_written(subject: Subject) -> None:
    """step() leaves .grad bit for bit as it was, also with maximize and coupled decay."""
    subject.only_gradients()
    variants: list[dict[str, Any]] = [{}]
    if subject.has("maximize"):
        variants.append({"maximize": True})
    if subject.has("weight_decay"):
        variants.append({"weight_decay": 0.1})
    if subject.has("foreach"):
        variants.append({"foreach": False})
    for options in variants:
        params = subject.tensors()
        optimizer = _make_or_skip_foreach(subject, params, options)
        for k in range(3):
            grads = gradients(params, k)
            inject(params, [g.clone() for g in grads])
            optimizer.step()
            left = [p.grad for p in params]
            where = f" with {options}" if options else ""
            require(all(g is not None for g in left), f".grad is None after the step{where}")
            require(
                equal([g for g in left if g is not None], grads),
                f".grad was written{where}; use g.mul(...) in the place of g.mul_(...)",
            )


def _make_or_skip_foreach(
    subject: Subject, params: list[nn.Parameter], options: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        return subject.make(params, **options)
    except Exception as error:
        raise CheckFailed(f"{options}: {type(error).__name__}: {error}") from error


@check
def maximize_is_minimize_of_the_negative(subject: Subject) -> None:
    """maximize=True on -g moves like minimize on g, and the flag lives in the groups."""
    subject.only_gradients()
    if not subject.has("maximize"):
        raise NotApplicable("the rule has no maximize")
    up, down = subject.tensors(), subject.tensors()
    ascent, descent = subject.make(up, maximize=True), subject.make(down)
    require(all("maximize" in g for g in ascent.param_groups), "maximize is not in the groups")
    for k in range(5):
        grads = gradients(up, k)
        inject(up, [-g for g in grads])
        inject(down, grads)
        ascent.step()
        descent.step()
    require(equal([p.detach() for p in up], [p.detach() for p in down]), "they differ")


@check
def none_gradients_are_skipped(subject: Subject) -> None:
    """A parameter without a gradient is not touched, not even by weight decay."""
    subject.only_gradients()
    params = subject.tensors()
    options = {"weight_decay": 0.1} if subject.has("weight_decay") else {}
    optimizer = subject.make(params, **options)
    before = params[0].detach().clone()
    for k in range(3):
        grads: list[Any] = list(gradients(params, k))
        inject(params, [None, *grads[1:]])
        optimizer.step()
    require(torch.equal(params[0].detach(), before), "it moved")
    inject(params, [None] * len(params))
    optimizer.step()  # all None: nothing to do, and no error


@check
def closure_is_called_once(subject: Subject) -> None:
    """step(closure=...) calls it once with gradients enabled and returns its value."""
    if subject.needs is not Needs.GRADIENTS:
        raise NotApplicable("the rule evaluates the objective as often as it needs")
    case, optimizer = subject.pair()
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        case.model.zero_grad()
        loss = case.loss(0)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step: Any = optimizer.step  # torch's annotation asks for a float, its code does not
    returned = step(closure=closure)
    require(calls == [True], f"calls with gradients enabled: {calls}")
    require(returned is not None, "the loss is not returned")


@check
def closure_equals_plain_loop(subject: Subject) -> None:
    """step(closure) and backward() then step() train bit for bit alike."""
    subject.only_gradients()
    plain, left = subject.pair()
    closed, right = subject.pair()
    for k in range(6):
        plain.step(left, k)
        closed.step(right, k, closure=True)
    require(equal(plain.values(), closed.values()), "they differ")


@check
def returns_the_loss(subject: Subject) -> None:
    """step(closure) returns the loss at the point where the step began, or near it."""
    case, optimizer = subject.pair()
    with torch.no_grad():
        start = float(case.loss(0))
    returned = case.step(optimizer, 0, closure=True)
    require(returned is not None, "None is returned")
    require(abs(float(returned) - start) <= 0.5 * abs(start), f"{float(returned)} for {start}")


@check
def raising_closure_changes_nothing(subject: Subject) -> None:
    """A closure that raises leaves parameters and state as they were."""
    case, optimizer = subject.pair()
    case.run(optimizer, range(3))
    before, state = case.values(), copy.deepcopy(optimizer.state_dict())
    flags = [p.requires_grad for p in case.params]
    evaluations = 0

    class StopHere(Exception):  # noqa: N818
        pass

    # The third evaluation raises where the rule makes several: it is in the middle of probing.
    forward = type(case.model).forward

    def failing(self: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        if subject.needs is Needs.GRADIENTS or evaluations == 3:
            raise StopHere
        return forward(self, x)

    case.model.forward = failing.__get__(case.model)  # type: ignore[method-assign]
    try:
        for k in range(3, 6):
            case.step(optimizer, k, closure=True)
            if subject.needs is not Needs.GRADIENTS:  # fewer than three evaluations per step
                before, state = case.values(), copy.deepcopy(optimizer.state_dict())
                flags = [p.requires_grad for p in case.params]
    except StopHere:
        pass
    else:
        raise NotApplicable("the rule evaluates the objective less than once per step")
    finally:
        del case.model.forward
    require(equal(before, case.values()), "a parameter changed")
    require(flags == [p.requires_grad for p in case.params], "a requires_grad flag changed")
    require(_same(state, optimizer.state_dict()), "the state changed")
    require(torch.is_grad_enabled(), "autograd was left switched off")


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and equal([left], [right])
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(
            _same(a, b) for a, b in zip(left, right, strict=True)
        )
    return bool(left == right)


@check
def foreach_equals_plain_loop(subject: Subject) -> None:
    """foreach=True, foreach=None and foreach=False agree to rounding in float64."""
    if not subject.has("foreach"):
        raise NotApplicable("the rule has no foreach option")
    results = []
    for foreach in (False, True, None):
        case = subject.case()
        results.append(case.run(subject.make(case.params, foreach=foreach), range(12)))
    worst = max(distance(results[0], r) for r in results[1:])
    # Twelve steps of a few roundings each.
    require(worst <= 1e-12, f"they differ by {worst:.1e}")


@expensive_check
def compiled_equals_eager(subject: Subject) -> None:
    """compile=True agrees with eager mode and compiles at most two graphs for five rates."""
    if not subject.has("compile"):
        raise NotApplicable("the rule has no compile option")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    results = []
    options = {"foreach": True} if subject.has("foreach") else {}
    for compiled in (False, True):
        params = subject.tensors()
        optimizer = subject.make(params, compile=compiled, **options)
        for k in range(5):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (k + 1)
            inject(params, gradients(params, k))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own notes
                optimizer.step()
        results.append([p.detach().clone() for p in params])
    graphs = counters["stats"]["unique_graphs"]
    groups = len(optimizer.param_groups)
    torch._dynamo.reset()
    worst = distance(results[0], results[1])
    require(worst <= 1e-12, f"they differ by {worst:.1e}")
    require(0 < graphs <= 2 * groups, f"{graphs} graphs were compiled for {groups} groups")
