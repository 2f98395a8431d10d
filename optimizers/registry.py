"""The one list of everything in the zoo; tests, tables, benchmarks and notebooks iterate it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from optimizers.base import Needs, Optimizer, Scope
from optimizers.first_order import AMSGrad
from optimizers.forward_only import PolyStep
from optimizers.layer_dropping import DropMuon
from optimizers.orthogonalized import Muon
from optimizers.second_order import EGN
from optimizers.wrappers import Routed, muon_with_adamw

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


def _routed_muon(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    return muon_with_adamw(model, **options)


_HALF_PRECISION = (
    "the iteration runs in bfloat16, whose rounding depends on how the compiler fuses it; with "
    "ns_dtype=float64 they agree (tested)"
)

SPECS: Mapping[str, Spec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            Spec(
                AMSGrad,
                family="first_order",
                reference="Reddi, Kale, Kumar: On the Convergence of Adam and Beyond, ICLR 2018",
                example={"lr": 1e-2},
                state_floats="3",
                evidence={
                    "oracle": "tests/test_amsgrad.py::test_matches_the_oracle",
                    "reduction": "tests/test_amsgrad.py: AdaGrad, Adam, torch's amsgrad",
                    "rate": "tests/test_amsgrad.py::test_regret_bound",
                    "claim": "converges on Reddi's counter-examples, where Adam does not",
                },
            ),
            Spec(
                Muon,
                family="orthogonalized",
                reference="Jordan et al.: Muon, an optimizer for hidden layers, 2024",
                example={"lr": 2e-2},
                state_floats="1",
                evidence={
                    "oracle": "tests/test_muon.py::test_matches_the_oracle",
                    "reduction": "tests/test_muon.py: torch.optim.Muon bit by bit",
                    "rate": "tests/test_muon.py::test_descent_inequality",
                },
                exceptions={"compiled_equals_eager": _HALF_PRECISION},
                builder=_routed_muon,
            ),
            Spec(
                DropMuon,
                family="layer_dropping",
                reference="Gruntkowska et al.: Drop-Muon, Update Less, Converge Faster, 2025",
                example={"lr": 2e-2},
                state_floats="1",
                evidence={
                    "oracle": "tests/test_drop_muon.py::test_matches_the_oracle",
                    "reduction": "tests/test_drop_muon.py: Muon when nothing is dropped",
                    "rate": "tests/test_drop_muon.py::test_expected_decrease",
                    "claim": "tests/test_drop_muon.py: dropped layers run no backward; a gain in "
                    "time to a loss is not established",
                },
                exceptions={
                    "one_group_equals_many": "a group is a layer",
                    "parameter_order_is_irrelevant": "the order of the layers is the method",
                    "compiled_equals_eager": _HALF_PRECISION,
                    "late_parameter_starts_afresh": "which layers a step updates depends on how "
                    "many steps were taken before",
                },
            ),
            Spec(
                EGN,
                family="second_order",
                reference="Korbit et al.: Exact Gauss-Newton Optimization for Training Deep Neural "
                "Networks, 2024",
                example={"lr": 0.5, "damping": 0.1},
                state_floats="0, 1 with momentum",
                evidence={
                    "oracle": "tests/test_egn.py::test_matches_the_oracle",
                    "reduction": "tests/test_egn.py: SGD, normalised LMS, least squares, the "
                    "paper's form",
                    "rate": "tests/test_egn.py::test_descent_inequality_on_logistic_regression "
                    "(derived)",
                    "claim": "tests/test_egn.py"
                    "::test_beats_tuned_first_order_rules_on_digits_in_fifty_steps",
                },
            ),
            Spec(
                PolyStep,
                family="forward_only",
                reference="An T. Le: Training Non-Differentiable Networks via Optimal Transport, "
                "2026",
                example={"epsilon": 0.3},
                state_floats="0, 1 with momentum",
                evidence={
                    "oracle": "tests/test_polystep.py::test_matches_the_oracle",
                    "reduction": "tests/test_polystep.py: closed form on linear losses, gradient "
                    "step for small radii",
                    "rate": "tests/test_polystep.py: fixed point of the orthoplex (derived)",
                    "claim": "tests/test_polystep.py: trains a staircase network without a "
                    "gradient; the lead over evolution strategies is not tested",
                },
                exceptions={
                    "parameter_order_is_irrelevant": "the vector of all parameters is cut into "
                    "particles in the order given",
                },
            ),
            Spec(
                Routed,
                family="orthogonalized",
                kind="wrapper",
                reference="the division of labour of Jordan et al.: Muon, 2024",
                example={"lr": 2e-2, "adamw_lr": 1e-2},
                state_floats="1 (Muon) or 2 (AdamW)",
                evidence={"reduction": "tests/test_routed.py: its inner rules apart, bit by bit"},
                builder=_routed_muon,
            ),
        )
    }
)


def list_optimizers(family: str | None = None) -> list[str]:
    """Return the names in the zoo, in the registry's order.

    Args:
        family: One of :data:`FAMILIES`, or ``None`` for all.

    Raises:
        LookupError: If there is no such family.
    """
    family = family.replace("-", "_") if family is not None else None
    if family is not None and family not in FAMILIES:
        raise LookupError(_unknown("family", family, FAMILIES))
    return [name for name, spec in SPECS.items() if family in (None, spec.family)]


def get_spec(name: str) -> Spec:
    """Return the record of an optimizer.

    Raises:
        LookupError: If there is none of that name; similar names are suggested.
    """
    try:
        return SPECS[name]
    except KeyError:
        raise LookupError(_unknown("optimizer", name, SPECS)) from None


def get_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of an optimizer.

    Raises:
        LookupError: If there is none of that name; similar names are suggested.
    """
    return get_spec(name).cls


def markdown_table() -> str:
    """Return the table of all entries, as it stands in the README."""
    lines = [
        "| optimizer | family | kind | needs | sees | floats per parameter | reference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{s.name}` | {s.family.replace('_', '-')} | {s.kind} | {s.needs.value} "
        f"| {s.scope.value} | {s.state_floats} | {s.reference} |"
        for s in SPECS.values()
    ]
    return "\n".join(lines)


def _unknown(what: str, name: str, known: Any) -> str:
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(lowered[n]) for n in near)}?" if near else ""
    return f"there is no {what} {name!r}; {hint or 'known: ' + ', '.join(known) + '.'}"


__all__ = [
    "FAMILIES",
    "KINDS",
    "SPECS",
    "Optimizer",
    "Spec",
    "get_optimizer",
    "get_spec",
    "list_optimizers",
    "markdown_table",
]
