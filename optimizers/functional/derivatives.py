"""Derivatives of a loss in some parameters, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run compiled models eagerly and attention unfused: neither else has second derivatives.

    Hooks on the modules of a compiled model would not run either.
    """
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        yield


def gradients(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of ``loss`` in each parameter, ``None`` where it has none."""
    wanted = [p for p in params if p.requires_grad]
    if not loss.requires_grad or not wanted:
        return [None] * len(params)
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in params]


class Expansion:
    """A loss around the parameters' present values: value, gradient, products of the Hessian.

    The graph is kept, so that a product costs one backward pass and no forward. Ask before the
    parameters change; parameters that take no part, or are frozen, have the gradient ``None`` and
    products of zero.

    Args:
        loss: 0-D, with its graph.
        params: The parameters.
        count: Called with the number of products that were made.

    Attributes:
        loss: The loss, without its graph.
        grads: Its gradient in each parameter.

    Raises:
        RuntimeError: If an operation of the loss can be differentiated only once.
    """

    def __init__(
        self, loss: Tensor, params: Sequence[Tensor], count: Callable[[int], None] | None = None
    ) -> None:
        self.loss, self._params, self._count = loss.detach().reshape(()), list(params), count
        self._places = [k for k, p in enumerate(params) if p.requires_grad]
        self._wanted = [params[k] for k in self._places]
        self.grads: list[Tensor | None] = [None] * len(params)
        self._curved: list[tuple[int, Tensor]] = []  # a linear loss has no second derivative
        if loss.requires_grad and self._wanted:
            slopes = torch.autograd.grad(loss, self._wanted, create_graph=True, allow_unused=True)
            refuse_single(loss, slopes)
            for k, g in zip(self._places, slopes, strict=True):
                if g is not None:
                    self.grads[k] = g.detach()
                    self._curved += [(k, g)] if g.requires_grad else []

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product of the Hessian with ``vectors``, one for each parameter."""
        if self._count is not None:
            self._count(1)
        return self._products(vectors, many=False)

    def matrix(self, *, chunk: int = 64) -> Tensor:
        """Return the Hessian in the flattened parameters, ``(n, n)``: products with unit vectors.

        Args:
            chunk: How many products are computed at once. Operations without a batching rule are
                differentiated one product at a time.
        """
        sizes = [p.numel() for p in self._params]
        n, first = sum(sizes), self._params[0]
        rows = []
        for start in range(0, n, chunk):
            count = min(chunk, n - start)
            units = first.new_zeros(count, n)
            units.diagonal(start).fill_(1)
            parts = [
                part.reshape(count, *p.shape).to(p)
                for part, p in zip(torch.split(units, sizes, 1), self._params, strict=True)
            ]
            try:
                found = self._products(parts, many=True)
            except RuntimeError:  # a backward without a batching rule
                each = [self._products(one, many=False) for one in zip(*parts, strict=True)]
                found = [torch.stack(part) for part in zip(*each, strict=True)]
            rows.append(torch.cat([h.reshape(count, -1).to(first.device) for h in found], 1))
        if self._count is not None:
            self._count(n)
        return torch.cat(rows)

    def _products(self, vectors: Sequence[Tensor], *, many: bool) -> list[Tensor]:
        products = [torch.zeros_like(v) for v in vectors]
        if self._curved:
            parts = torch.autograd.grad(
                [g for _, g in self._curved],
                self._wanted,
                [vectors[k] for k, _ in self._curved],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=many,
            )
            for k, part in zip(self._places, parts, strict=True):
                products[k] = products[k] if part is None else part.detach()
        return products


# Every function so marked is wrapped by this code.
_ONCE = once_differentiable(lambda ctx: None).__code__


def refuse_single(loss: Tensor, slopes: Sequence[Tensor | None]) -> None:
    """Refuse a loss through an operation that is differentiable once.

    Products would lack this operation's part without a word: its slope has no graph where nothing
    before it varies (it is the last operation, say), and otherwise torch puts a node there that
    raises when it is reached, but the way to the parameters ends before it.
    """
    ends = [loss, *(g for g in slopes if g is not None)]
    nodes = [end.grad_fn for end in ends if end.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        marked = getattr(backward, "__code__", None) is _ONCE
        if marked or node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "the loss cannot be differentiated twice: an operation in it is marked "
                "once_differentiable, so its Hessian is not known. Write its backward in "
                "differentiable operations, or use a rule that needs gradients only."
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def hessian_product(
    loss: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return the product of the Hessian of ``loss`` with ``vectors``, by double backward."""
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    refuse_single(loss, grads)
    pairs = [
        (g, v)
        for g, v in zip(grads, vectors, strict=True)
        if g is not None and g.requires_grad  # a linear loss has no second derivative
    ]
    if not pairs:
        return [torch.zeros_like(p) for p in params]
    products = torch.autograd.grad(
        [g for g, _ in pairs], params, [v for _, v in pairs], allow_unused=True
    )
    return [torch.zeros_like(p) if h is None else h for p, h in zip(params, products, strict=True)]
