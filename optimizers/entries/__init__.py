"""The one list of everything in the zoo."""

from __future__ import annotations

from optimizers.entries import (
    first_order,
    forward_only,
    layer_dropping,
    orthogonalized,
    second_order,
    wrappers,
)
from optimizers.spec import Spec

ENTRIES: tuple[Spec, ...] = (
    *first_order.ENTRIES,
    *orthogonalized.ENTRIES,
    *layer_dropping.ENTRIES,
    *second_order.ENTRIES,
    *forward_only.ENTRIES,
    *wrappers.ENTRIES,
)
