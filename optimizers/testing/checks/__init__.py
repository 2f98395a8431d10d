"""Conformance checks for any torch optimizer, ours or yours.

>>> import torch
>>> from optimizers.testing.checks import check_optimizer
>>> report = check_optimizer(torch.optim.SGD, lr=1e-2, only=["closure_is_called_once"])
>>> report.ok
True

Each check is one line of a contract: drop-in behaviour, purity, exact resume, safety at the edges.
A failure says why. A rule that rightly deviates declares the check with its reason; a declared
check that passes after all is reported as a failure, so that declarations stay true.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from optimizers.oracle import Needs
from optimizers.testing.checks import (
    construction,
    numbers,
    processes,
    state,
    stepping,
    training,
)
from optimizers.testing.checks.registry import CHECKS, Check
from optimizers.testing.checks.subject import CheckFailed, NotApplicable, Subject

__all__ = ["CHECKS", "Check", "Report", "Result", "check_optimizer", "pytest_params", "run_check"]

_MODULES = (construction, stepping, training, numbers, state, processes)


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes:
        name: The check's name.
        status: ``"pass"``, ``"fail"``, ``"declared"`` (fails, and is declared to) or
            ``"not applicable"``.
        why: What went wrong, the declared reason, or why the check does not apply.
    """

    name: str
    status: str
    why: str = ""


@dataclass
class Report:
    """The outcomes of all checks of one optimizer."""

    optimizer: str
    results: list[Result] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed undeclared."""
        return not self.failures

    @property
    def failures(self) -> list[Result]:
        """The checks that failed and were not declared."""
        return [r for r in self.results if r.status == "fail"]

    def count(self, status: str) -> int:
        """Return how many checks ended with a status."""
        return sum(r.status == status for r in self.results)

    @property
    def summary(self) -> str:
        """One line: how many checks ended how, and which failed."""
        kinds = ("pass", "fail", "declared", "not applicable")
        counts = ", ".join(f"{self.count(k)} {k}" for k in kinds if self.count(k) or k == "fail")
        failed = ", ".join(r.name for r in self.failures)
        return f"{self.optimizer}: {counts}" + (f"; failed: {failed}" if failed else "")

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.results), default=0)
        rows = [
            f"  {r.name.ljust(width)}  {r.status.ljust(14)}  {r.why}".rstrip() for r in self.results
        ]
        return "\n".join([*rows, self.summary])


def run_check(
    check: Check, subject: Subject, exceptions: Mapping[str, str] | None = None
) -> Result:
    """Run one check.

    Args:
        check: The check.
        subject: The optimizer.
        exceptions: Declared exceptions, by the check's name, with their reasons.
    """
    reason = (exceptions or {}).get(check.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning is no breach of the contract
            check.function(subject)
    except NotApplicable as outcome:
        return Result(check.name, "not applicable", str(outcome))
    except CheckFailed as outcome:
        why = str(outcome)
    except Exception as error:  # the optimizer itself raised: that is what is being checked
        why = f"{type(error).__name__}: {error}"
    else:
        if reason is not None:
            return Result(check.name, "fail", f"declared as an exception, but passes: {reason}")
        return Result(check.name, "pass")
    why = why.split("\n", 1)[0][:300]
    if reason is not None:
        return Result(check.name, "declared", f"{reason} ({why})")
    return Result(check.name, "fail", why)


def check_optimizer(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    *,
    needs: Needs | None = None,
    exceptions: Mapping[str, str] | None = None,
    only: Iterable[str] | None = None,
    expensive: bool = True,
    progress: Callable[[Result], None] | None = None,
    **kwargs: Any,
) -> Report:
    """Run the checks on an optimizer.

    Args:
        optimizer: A class, a factory ``f(params, **kwargs)``, or a name of the registry (whose
            example arguments and declared exceptions are then used).
        needs: What it asks of the objective; read from the class if ``None``.
        exceptions: Declared exceptions, by the check's name, with their reasons.
        only: Names of the checks to run; all if ``None``.
        expensive: Whether to run the checks that start processes or compile.
        progress: Called with each result as it arrives.
        **kwargs: Arguments of every construction, such as ``lr``.

    Raises:
        LookupError: If a name in ``only`` or ``exceptions``, or the optimizer's, is unknown.
        ValueError: If it cannot be constructed or take a single step.
    """
    if isinstance(optimizer, str):
        from optimizers.registry import get_spec

        spec = get_spec(optimizer)
        if spec.kind != "optimizer":
            raise LookupError(
                f"{spec.name} is a {spec.kind} and is not made from parameters alone; check a "
                "factory f(params, lr=...) that builds it."
            )
        kwargs = {**spec.example, **kwargs}
        exceptions = {**spec.exceptions, **(exceptions or {})}
        optimizer = spec.cls
    names = list(CHECKS) if only is None else list(only)
    unknown = sorted({*names, *(exceptions or {})} - set(CHECKS))
    if unknown:
        raise LookupError(f"there are no checks named {unknown}; known: {', '.join(CHECKS)}.")
    subject = Subject(optimizer, kwargs, needs=needs)
    _must_run(subject)
    report = Report(str(subject.name))
    for name in names:
        if CHECKS[name].expensive and not expensive and only is None:
            continue
        result = run_check(CHECKS[name], subject, exceptions)
        report.results.append(result)
        if progress is not None:
            progress(result)
    return report


def _must_run(subject: Subject) -> None:
    """Say once, before seventy checks would, that the optimizer cannot take a step."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case, optimizer = subject.pair()
            case.step(optimizer, 0)
    except Exception as error:
        raise ValueError(
            f"{subject.name} takes no step with the arguments {subject.kwargs}: "
            f"{type(error).__name__}: {error}"
        ) from error


def pytest_params(expensive: bool = True) -> list[Any]:
    """Return the checks as ``pytest.param`` entries, named, for ``pytest.mark.parametrize``.

    Example::

        @pytest.mark.parametrize("check", pytest_params())
        def test_contract(check):
            result = run_check(check, Subject(MyOptimizer, {"lr": 1e-3}))
            assert result.status in ("pass", "not applicable"), result.why
    """
    import pytest

    return [pytest.param(c, id=name) for name, c in CHECKS.items() if expensive or not c.expensive]
