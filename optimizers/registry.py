"""The one list of everything in the zoo; tests, tables, benchmarks and notebooks iterate it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from optimizers.base import Optimizer
from optimizers.entries import ENTRIES
from optimizers.spec import FAMILIES, KINDS, Spec

SPECS: Mapping[str, Spec] = MappingProxyType({spec.name: spec for spec in ENTRIES})


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
