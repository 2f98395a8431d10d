"""Optimizers by name: of the registry, of a module, or a callable."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from optimizers.registry import SPECS, get_spec

__all__ = ["Builder", "OptimizerLike", "load_object", "optimizer_label", "resolve_optimizer"]

OptimizerLike: TypeAlias = str | Callable[..., torch.optim.Optimizer]
"""A registry name, ``module:Class``, or a callable ``(model, **options) -> optimizer``."""

Builder: TypeAlias = Callable[..., torch.optim.Optimizer]


def optimizer_label(optimizer: OptimizerLike) -> str:
    """Return the name under which an optimizer's results are kept.

    Args:
        optimizer: A registry name, ``module:Class`` or a callable.

    Returns:
        The string itself, or the callable's ``__name__``.
    """
    if isinstance(optimizer, str):
        return optimizer
    return str(getattr(optimizer, "__name__", type(optimizer).__name__))


def load_object(path: str) -> Any:
    """Import ``module:attribute``.

    Args:
        path: Dotted module name, a colon, and a dotted attribute.

    Returns:
        The object.

    Raises:
        LookupError: There is no such module or attribute; near attributes are suggested.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise LookupError(f"cannot import {module_name!r} of {path!r}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise LookupError(f"{module_name!r} has no attribute {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def resolve_optimizer(optimizer: OptimizerLike) -> Builder:
    """Return a function ``(model, **options) -> optimizer``.

    Args:
        optimizer: A registry name (built by its ``Spec``, so that Muon comes with AdamW for the
            parameters that are no matrices), ``module:Class`` (constructed from
            ``model.parameters()``), or a callable, returned as is.

    Returns:
        The builder.

    Raises:
        LookupError: No such name; the message suggests near ones.
    """
    if not isinstance(optimizer, str):
        return optimizer
    if ":" in optimizer:
        cls = load_object(optimizer)

        def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = cls(model.parameters(), **options)
            return made

        return build
    if optimizer not in SPECS and isinstance(getattr(torch.optim, optimizer, None), type):
        raise LookupError(
            f"there is no optimizer {optimizer!r} in the zoo; for torch's own write "
            f"'torch.optim:{optimizer}'."
        )
    return get_spec(optimizer).build
