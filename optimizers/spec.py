"""What the registry knows of one entry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optimizers.base import Needs, Scope

FAMILIES = ("first_order", "second_order", "orthogonalized", "forward_only", "layer_dropping")
KINDS = ("optimizer", "wrapper", "trainer", "utility")


def _plain(cls: Callable[..., Any], model: nn.Module, options: Mapping[str, Any]) -> Any:
    return cls(model.named_parameters(), **options)


@dataclass(frozen=True)
class Spec:
    """What the zoo knows of one entry.

    Attributes:
        cls: The class.
        family: One of :data:`FAMILIES`.
        reference: Authors, title, year.
        example: Arguments with which it makes progress on a small problem.
        state_floats: Floats kept for each parameter element, as text.
        kind: One of :data:`KINDS`.
        evidence: What is proven, by kind (``oracle, reduction, rate, claim``), with where.
        exceptions: Conformance checks that it is declared not to pass, each with its reason.
        builder: ``(cls, model, options) -> optimizer`` for a whole model, where
            ``cls(model.named_parameters(), **options)`` is not the way.
    """

    cls: type[torch.optim.Optimizer]
    family: str
    reference: str
    example: Mapping[str, Any] = field(default_factory=dict)
    state_floats: str = "0"
    kind: str = "optimizer"
    evidence: Mapping[str, str] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    builder: Callable[[Any, nn.Module, Mapping[str, Any]], Any] = _plain

    def __post_init__(self) -> None:
        if self.family not in FAMILIES or self.kind not in KINDS:
            raise ValueError(f"{self.name}: unknown family {self.family!r} or kind {self.kind!r}.")

    @property
    def name(self) -> str:
        """The class's name, under which it is found."""
        return self.cls.__name__

    @property
    def needs(self) -> Needs:
        """What it asks of the objective."""
        needs: Needs = getattr(self.cls, "needs", Needs.GRADIENTS)
        return needs

    @property
    def scope(self) -> Scope:
        """How much of the model it must see."""
        scope: Scope = getattr(self.cls, "scope", Scope.ELEMENT)
        return scope

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n", 1)[0]

    def build(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """Construct it for a whole model, whatever that takes; ``options`` are its arguments."""
        optimizer: torch.optim.Optimizer = self.builder(self.cls, model, options)
        return optimizer
