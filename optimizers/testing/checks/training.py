"""Checks of a run: rates, schedulers, random numbers, memory, trouble on the way."""

from __future__ import annotations

import gc
import random
import warnings
from typing import Any

import numpy as np
import torch

from optimizers.oracle import Needs
from optimizers.testing.checks.registry import check
from optimizers.testing.checks.subject import (
    CheckFailed,
    NotApplicable,
    Subject,
    descend,
    distance,
    equal,
    finite,
    gradients,
    inject,
    require,
)


@check
def lr_zero_does_not_move(subject: Subject) -> None:
    """With lr=0, from the start or set later, parameters do not move."""
    case, optimizer = subject.pair(lr=0.0)
    before = case.values()
    require(equal(before, case.run(optimizer, range(3))), "lr=0 from the start moves")
    for group in optimizer.param_groups:
        group["lr"] = float(subject.make(subject.case().params).param_groups[0]["lr"])
    moved = case.run(optimizer, range(3, 9))
    require(not equal(before, moved) and finite(moved), "after lr=0 it does not train any more")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    require(equal(moved, case.run(optimizer, range(9, 12))), "lr set to 0 later still moves")


@check
def dry_step_changes_nothing(subject: Subject) -> None:
    """step() with zero gradients and lr=0, a checkpointer's, does not change what follows."""
    case, optimizer = subject.pair()
    twin, other = subject.pair()
    before = case.values()
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in case.params:
        p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    require(equal(before, case.values()), "it moved the parameters")
    case.model.zero_grad()
    require(
        equal(case.run(optimizer, range(5)), twin.run(other, range(5))),
        "the run after it differs from the run without it",
    )


@check
def late_parameter_starts_afresh(subject: Subject) -> None:
    """A parameter first used at step 51 is updated like a new one."""
    subject.only_gradients()
    params = subject.tensors()
    optimizer = subject.make(params)
    for k in range(50):
        grads = gradients(params, k)
        inject(params, [None, *grads[1:]])
        optimizer.step()
    fresh = subject.tensors()
    other = subject.make(fresh)
    for k in range(50, 53):
        grads = gradients(params, k)
        inject(params, grads)
        inject(fresh, grads)
        optimizer.step()
        other.step()
    worst = distance([params[0].detach()], [fresh[0].detach()])
    require(worst <= 1e-12, f"it differs from a new parameter by {worst:.1e}")


@check
def global_random_state_is_untouched(subject: Subject) -> None:
    """Neither construction nor steps draw from torch's, NumPy's or Python's global generator."""
    case = subject.case()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    case.run(subject.make(case.params), range(5))
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    require(torch.equal(states[0], after[0]), "torch's generator advanced")
    require(states[1] == after[1], "Python's generator advanced")
    require(states[2] == after[2], "NumPy's generator advanced")


@check
def same_seed_same_run(subject: Subject) -> None:
    """Two runs agree bit by bit, whatever the global generators hold."""
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            case = subject.case()
            results.append(case.run(subject.make(case.params), range(8)))
    require(equal(results[0], results[1]), "replicas with other global random states drift apart")


@check
def memory_does_not_grow(subject: Subject) -> None:
    """Steps 20 to 200 create no lasting tensor."""
    case, optimizer = subject.pair()
    case.run(optimizer, range(20))
    before = _live_tensors()
    case.run(optimizer, range(20, 200))
    grown = _live_tensors() - before
    require(grown <= 0, f"{grown} more tensors are alive after 180 steps")


def _live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@check
def schedulers_work(subject: Subject) -> None:
    """LambdaLR from 0, OneCycleLR, CosineAnnealingLR and ReduceLROnPlateau drive it."""
    from torch.optim import lr_scheduler

    def warm_up(k: int) -> float:
        return min(1.0, k / 5)

    for kind in ("lambda", "onecycle", "cosine", "plateau"):
        case, optimizer = subject.pair()
        scheduler: Any
        try:
            if kind == "lambda":
                scheduler = lr_scheduler.LambdaLR(optimizer, warm_up)
            elif kind == "onecycle":
                scheduler = lr_scheduler.OneCycleLR(
                    optimizer, max_lr=0.01, total_steps=20, cycle_momentum=False
                )
            elif kind == "cosine":
                scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
            else:
                scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
            for k in range(12):
                case.step(optimizer, k)
                scheduler.step(1.0) if kind == "plateau" else scheduler.step()
        except Exception as error:
            raise CheckFailed(f"{kind}: {type(error).__name__}: {error}") from error
        require(finite(case.values()), f"{kind}: a parameter is not finite")


@check
def step_hooks_run(subject: Subject) -> None:
    """Hooks before and after a step run once per step."""
    case, optimizer = subject.pair()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    case.step(optimizer, 0)
    require(seen == ["pre", "post"], f"they ran as {seen}")


@check
def grad_scaler_works(subject: Subject) -> None:
    """A GradScaler unscales, steps, and skips the step after an infinite gradient."""
    subject.only_gradients()
    params = subject.tensors(dtype=torch.float32)
    twins = subject.tensors(dtype=torch.float32)
    optimizer, other = subject.make(params), subject.make(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):
        grads = gradients(params, k)
        scaler.scale(torch.zeros(()))  # the scale is created at its first use
        inject(params, [g * 2.0**10 for g in grads])
        inject(twins, grads)
        scaler.step(optimizer)
        scaler.update(2.0**10)
        other.step()
    worst = distance([p.detach() for p in params], [p.detach() for p in twins])
    require(worst <= 1e-5, f"the scaled run differs by {worst:.1e}")
    before = [p.detach().clone() for p in params]
    inject(params, [torch.full_like(p, torch.inf) for p in params])
    scaler.step(optimizer)
    require(equal(before, [p.detach() for p in params]), "the step was taken all the same")


@check
def nan_gradient_stays_local(subject: Subject) -> None:
    """A NaN gradient of one parameter makes no other parameter non-finite."""
    subject.only_gradients()
    params = subject.tensors()
    optimizer = subject.make(params)
    descend(optimizer, params, range(2))
    for k in range(2, 8):
        grads = gradients(params, k)
        grads[0][0, 0] = torch.nan
        inject(params, grads)
        optimizer.step()
    require(finite([p.detach() for p in params[1:]]), "it spread to another parameter")


@check
def non_finite_objective_is_contained(subject: Subject) -> None:
    """A loss that is not finite raises or is survived: parameters stay finite."""
    if subject.needs is Needs.GRADIENTS:
        raise NotApplicable("a NaN gradient propagates to its parameter, as in torch")
    case, optimizer = subject.pair()
    case.run(optimizer, range(2))
    clean = case.batch

    def poisoned(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = clean(k)
        return x, torch.full_like(y, torch.nan)

    case.batch = poisoned  # type: ignore[method-assign]
    before = case.values()
    try:
        case.step(optimizer, 2)
    except (ValueError, RuntimeError):
        require(equal(before, case.values()), "it raised and moved the parameters")
    require(finite(case.values()), "a parameter is not finite")
