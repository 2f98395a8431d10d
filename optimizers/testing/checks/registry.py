"""The list of checks; each module of checks adds its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from optimizers.testing.checks.subject import Subject


@dataclass(frozen=True)
class Check:
    """One line of the contract.

    Attributes:
        name: Under which exceptions are declared.
        description: What is demanded.
        function: Raises ``CheckFailed`` or ``NotApplicable``.
        expensive: Whether it takes seconds (it starts processes or compiles).
    """

    name: str
    description: str
    function: Callable[[Subject], None]
    expensive: bool = False


CHECKS: dict[str, Check] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Register a function as a check; its name and the first line of its docstring describe it."""
    return _register(function, expensive=False)


def expensive_check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Register a check that starts processes or compiles."""
    return _register(function, expensive=True)


def _register(function: Callable[[Subject], None], *, expensive: bool) -> Callable[[Subject], None]:
    name = function.__name__
    description = (inspect.getdoc(function) or "").split("\n", 1)[0]
    CHECKS[name] = Check(name, description, function, expensive)
    return function
