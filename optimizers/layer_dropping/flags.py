"""Which parameters are switched off, until the next step or for one evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# By identity and weakly: a parameter that dies is forgotten.
dropped_parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse_dropped(params: Iterable[Tensor]) -> None:
    """Raise ``ValueError`` if a parameter is switched off by an optimizer that drops layers.

    Whoever looks at ``requires_grad`` now would take it for frozen by the user.
    """
    for p in params:
        if not p.requires_grad and p in dropped_parameters:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is dropped for the next step of another "
                "optimizer; call that optimizer's release() first."
            )


@contextmanager
def switched_off(params: Iterable[Tensor]) -> Iterator[None]:
    """Let ``params`` require no gradient inside, so that autograd does no work for them.

    Only what requires one is switched, and every flag comes back on leaving.
    """
    switched = [p for p in params if p.requires_grad]
    for p in switched:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in switched:
            p.requires_grad_(True)
