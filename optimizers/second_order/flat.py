"""The parameters of an optimizer as one vector, for rules that solve for all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from optimizers.base import Group
from optimizers.functional.derivatives import Expansion
from optimizers.objective import OracleError
from optimizers.second_order.window import home

Member = tuple[Tensor, float]


def members(groups: Iterable[Group]) -> list[Member]:
    """Return the parameters that can move, each with its rate: trainable, not empty, lr not 0."""
    rated = [(p, float(group["lr"])) for group in groups for p in group["params"]]
    return [(p, lr) for p, lr in rated if p.requires_grad and p.numel() and lr > 0]


class Flat:
    """Some parameters, in order, as one vector; each moves by its rate times its part of a step.

    A parameter whose gradient is ``None`` takes no part in the objective and in the vector.

    Args:
        chosen: The parameters and their rates.
        grads: Their gradients at the present point.
        dtype: Of the vector; by default the widest of the parameters', at least float32.

    Attributes:
        params: Those that take part.
        kept: Their positions among ``chosen``.
        gradient: Theirs, as one vector.
    """

    def __init__(
        self,
        chosen: Sequence[Member],
        grads: Sequence[Tensor | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.kept = [k for k, g in enumerate(grads) if g is not None]
        self._chosen = [p for p, _ in chosen]
        self.params = [chosen[k][0] for k in self.kept]
        self._rates = [chosen[k][1] for k in self.kept]
        self._sizes = [p.numel() for p in self.params]
        self.device = home(chosen[0][0].device)
        self.dtype = torch.float32 if dtype is None else dtype
        for p in self.params if dtype is None else ():
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.gradient = self.join([grads[k] for k in self.kept])

    def __len__(self) -> int:
        return sum(self._sizes)

    def join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one vector of a tensor for each parameter; ``None`` stands for zeros."""
        parts = [
            torch.zeros(n, dtype=self.dtype, device=self.device)
            if t is None
            else t.detach().reshape(-1).to(self.device, self.dtype)
            for t, n in zip(tensors, self._sizes, strict=True)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector in the shapes, dtypes and places of the parameters."""
        parts = zip(torch.split(vector, self._sizes), self.params, strict=True)
        return [part.reshape(p.shape).to(p.device, p.dtype) for part, p in parts]

    def product(self, here: Expansion, vector: Tensor) -> Tensor:
        """Return the Hessian's product with a vector."""
        mine = dict(zip(self.kept, self.split(vector), strict=True))
        every = enumerate(self._chosen)
        found = here.product([mine[k] if k in mine else torch.zeros_like(p) for k, p in every])
        return self.join([found[k] for k in self.kept])

    def matrix(self, here: Expansion) -> Tensor:
        """Return the Hessian, symmetric."""
        H = here.matrix().to(self.device, self.dtype)
        if len(self.kept) < len(self._chosen):
            index = self.positions([p.numel() for p in self._chosen], self.kept)
            H = H[index][:, index]
        return (H + H.mT) / 2

    def positions(self, sizes: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """Return where the elements of the chosen parts lie in a vector of parts of such sizes."""
        index = torch.split(torch.arange(sum(sizes), device=self.device), list(sizes))
        return torch.cat([index[k] for k in chosen])

    def values(self) -> list[Tensor]:
        """Return copies of the parameters."""
        return [p.detach().clone() for p in self.params]

    def moved(self, start: Sequence[Tensor], step: Tensor) -> list[Tensor]:
        """Return ``start`` plus rate times step, rounded once to the parameters' dtypes."""
        parts = zip(start, torch.split(step, self._sizes), self._rates, strict=True)
        return [
            (p.to(self.device, self.dtype) + lr * s.reshape(p.shape)).to(p.device, p.dtype)
            for p, s, lr in parts
        ]

    def write(self, values: Sequence[Tensor]) -> None:
        """Set the parameters."""
        for p, value in zip(self.params, values, strict=True):
            p.copy_(value)


def refuse_non_finite(what: str, tensor: Tensor, rule: str) -> None:
    """Refuse a loss, gradient or matrix that is not finite, before anything has changed.

    Raises:
        OracleError: Naming it.
    """
    if not bool(tensor.isfinite().all()):
        raise OracleError(
            f"{rule} needs a finite {what} and got NaN or infinity; nothing has been changed. "
            "Check the inputs, or start where the loss is finite."
        )
