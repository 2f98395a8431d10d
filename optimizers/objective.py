"""A model and a loss bound to a batch: what every optimizer can be given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase

from optimizers.functional.derivatives import (
    Expansion,
    gradients,
    hessian_product,
    refuse_single,
    twice_differentiable,
)

LossFn: TypeAlias = Callable[[Any, Any], Tensor]


class OracleError(RuntimeError):
    """The objective cannot answer what the optimizer needs; the message names the remedy."""


@dataclass
class Counts:
    """Evaluations so far, each over the whole batch that the objective is bound to.

    Attributes:
        loss: Forward passes without a backward pass (one for each candidate).
        gradient: Forward and backward passes together.
        vjp: Backward passes of the outputs alone (one for each row of a Jacobian).
        jvp: Forward-mode directional derivatives.
        hvp: Hessian-vector products.
        ggn: Gauss-Newton-vector products.
    """

    loss: int = 0
    gradient: int = 0
    vjp: int = 0
    jvp: int = 0
    hvp: int = 0
    ggn: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def reset(self) -> None:
        """Set every count to zero."""
        for field in fields(self):
            setattr(self, field.name, 0)


class Objective:
    r"""A model and a loss, bound to a batch: the one argument that serves every optimizer.

    ``objective.on(inputs, targets)`` binds a batch. The bound objective is itself a plain torch
    closure (it clears the gradients, runs forward and backward and returns the loss), so
    ``torch.optim.LBFGS`` and ordinary training loops accept it; beyond that it answers losses,
    gradients, Hessian and Gauss-Newton products about *your* parameters, without touching
    ``.grad``. Evaluations are counted in :attr:`counts`, shared by all batches.

    Args:
        model: Maps ``inputs`` to outputs. A tuple of inputs is passed as several arguments.
        loss_fn: Maps ``(outputs, targets)`` to a 0-D loss, averaged over the batch.

    Raises:
        OracleError: When asked before a batch is bound.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> objective = Objective(model, torch.nn.functional.mse_loss)
        >>> batch = objective.on(torch.ones(4, 3), torch.zeros(4, 1))
        >>> bool(batch() == batch.loss())
        True
        >>> objective.counts.gradient, objective.counts.loss
        (1, 1)
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}.")
        self.model = model
        self.loss_fn = loss_fn
        self.counts = Counts()
        self._batch: tuple[Any, Any] | None = None
        self._places: dict[int, list[str]] = {}

    def on(self, inputs: Any, targets: Any) -> Objective:
        """Return this objective bound to a batch; counts and model are shared."""
        bound = Objective.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound._batch = (inputs, targets)
        return bound

    @property
    def inputs(self) -> Any:
        """The inputs of the bound batch."""
        return self._bound()[0]

    @property
    def targets(self) -> Any:
        """The targets of the bound batch."""
        return self._bound()[1]

    def _bound(self) -> tuple[Any, Any]:
        if self._batch is None:
            raise OracleError(
                "this Objective is bound to no batch; pass objective.on(inputs, targets)."
            )
        return self._batch

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The model's positional arguments for the bound batch."""
        inputs = self.inputs
        return inputs if isinstance(inputs, tuple) else (inputs,)

    def outputs(self) -> Any:
        """Run the model on the bound inputs (no count of its own)."""
        return self.model(*self.arguments)

    @property
    def samples(self) -> int | None:
        """The number of samples: the first dimension of every tensor of the bound batch.

        ``None`` if the batch holds no tensor with a dimension.

        Raises:
            OracleError: If the tensors differ in it, so that no sample can be told apart.
        """
        found: set[int] = set()
        each_tensor(self._bound(), lambda t: found.add(len(t)))
        if len(found) > 1:
            raise OracleError(
                "samples cannot be told apart: the tensors of the batch have the first dimensions "
                f"{sorted(found)}. Pass one row for each sample, and keep what all share in the "
                "model."
            )
        return found.pop() if found else None

    def subset(self, indices: Tensor) -> Objective:
        """Return this objective bound to some samples of its batch; counts and model are shared.

        Tensors are indexed in their first dimension, within tuples, lists and dicts too; whatever
        else the batch holds stays as it is. An evaluation of the subset counts like any other.

        Args:
            indices: Integers, shape ``(samples wanted,)``.

        Raises:
            OracleError: If the batch has no samples to choose from.
        """
        if self.samples is None:
            raise OracleError(
                "this Objective's batch has no samples to choose from; bind tensors with one row "
                "for each sample: objective.on(inputs, targets)."
            )
        return self.on(*each_tensor(self._bound(), lambda t: t[indices.to(t.device)]))

    def _checked(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OracleError(
                f"the loss must be a single number; got {got}. Average it over the batch."
            )
        return loss

    def _forward(self) -> Tensor:
        return self._checked(self.loss_fn(self.outputs(), self.targets))

    def __call__(self) -> Tensor:
        """Clear the model's gradients, run forward and backward, return the loss (detached)."""
        with torch.enable_grad():
            self.model.zero_grad(set_to_none=True)
            loss = self._forward()
            if not loss.requires_grad and any(p.requires_grad for p in self.model.parameters()):
                raise OracleError(
                    "the loss has no gradient: something between the parameters and it is not "
                    "differentiable or was detached. Use a rule that needs losses alone."
                )
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        self.counts.gradient += 1
        return loss.detach()

    def loss(self) -> Tensor:
        """Return the loss on the bound batch, without a graph."""
        with torch.no_grad():
            loss = self._forward()
        self.counts.loss += 1
        return loss

    def names(self, params: Sequence[Tensor]) -> list[str]:
        """Return the model's name of each parameter (a tied one has its first name).

        Raises:
            OracleError: If a parameter is not one of the model's.
        """
        return [places[0] for places in self._find(params)]

    def _find(self, params: Sequence[Tensor]) -> list[list[str]]:
        """Return every place that holds each parameter; a module that occurs twice is one place."""
        if not all(id(p) in self._places for p in params):
            self._places.clear()
            for prefix, module in self.model.named_modules():
                for name, p in module.named_parameters(prefix, recurse=False):
                    self._places.setdefault(id(p), []).append(name)
        try:
            return [self._places[id(p)] for p in params]
        except KeyError:
            raise OracleError(
                "a parameter of the optimizer is not a parameter of the Objective's model; "
                "build both from the same model."
            ) from None

    def call(self, params: Sequence[Tensor], values: Sequence[Tensor], *arguments: Any) -> Any:
        """Run the model on ``arguments`` with ``values`` in the place of ``params`` (no count)."""
        # Tied by us: torch's own tying leaves the values behind in a module that occurs twice.
        tied = {
            place: value
            for places, value in zip(self._find(params), values, strict=True)
            for place in places
        }
        return torch.func.functional_call(self.model, tied, arguments, tie_weights=False)

    def gradient(self, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss and its gradient in ``params``; ``.grad`` is not touched."""
        with torch.enable_grad():
            loss = self._forward()
            grads = gradients(loss, params)
        self.counts.gradient += 1
        return loss.detach(), grads

    def hvp(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product of the Hessian of the loss with ``vectors``."""
        with torch.enable_grad(), twice_differentiable():
            products = hessian_product(self._forward(), params, vectors)
        self.counts.hvp += 1
        return products

    def expand(
        self, params: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[Tensor | None], list[list[Tensor]]]:
        """Return the loss, its gradient and the Hessian's products with each probe.

        One forward and one backward pass serve all of them.
        """
        here = self.around(params)
        return here.loss, here.grads, [here.product(probe) for probe in probes]

    def around(self, params: Sequence[Tensor]) -> Expansion:
        """Return the loss around the present values: products one after the other, or the Hessian.

        It must be asked before ``params`` change.
        """
        with torch.enable_grad(), twice_differentiable():
            here = Expansion(self._forward(), params, self._count_products)
        self.counts.gradient += 1
        return here

    def _count_products(self, made: int) -> None:
        self.counts.hvp += made

    def ggn(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        r"""Return the generalized Gauss-Newton product :math:`J^\top H_{out} J v`.

        :math:`J` is the Jacobian of the outputs in ``params`` and :math:`H_{out}` the Hessian of
        the loss in the outputs. One forward pass in dual numbers gives :math:`Jv` and the graph
        for the backward pass; where an operation has no forward derivative, two backward passes
        stand in for it.
        """
        self.names(params)
        with torch.enable_grad(), twice_differentiable():
            outputs, pushed = self._pushed(params, vectors)
            leaf = outputs.detach().requires_grad_()
            loss = self._checked(self.loss_fn(leaf, self.targets))
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            refuse_single(loss, [slope])
            if slope.requires_grad:
                (curved,) = torch.autograd.grad(slope, leaf, pushed)
            else:
                curved = torch.zeros_like(outputs)
            products = torch.autograd.grad(outputs, params, curved, allow_unused=True)
        self.counts.ggn += 1
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, products, strict=True)
        ]

    def _pushed(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the outputs, in the graph, and the product of their Jacobian with vectors."""
        try:
            dual_number: Any = forward_ad.make_dual
            unpacked: Any = forward_ad.unpack_dual
            with forward_ad.dual_level():
                duals = [dual_number(p, v.to(p)) for p, v in zip(params, vectors, strict=True)]
                dual = unpacked(self.call(params, duals, *self.arguments))
            if isinstance(dual.primal, Tensor):
                tangent = dual.tangent
                pushed = torch.zeros_like(dual.primal) if tangent is None else tangent.detach()
                return dual.primal, pushed
        except (RuntimeError, NotImplementedError):  # torch: an operation has no forward derivative
            pass
        outputs = self.outputs()
        refuse_single(outputs, [])
        # J^T u is linear in a dummy u, and its derivative there is J.
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, params, dummy, create_graph=True, allow_unused=True)
        terms = [(g, v) for g, v in zip(pulled, vectors, strict=True) if g is not None]
        (pushed,) = torch.autograd.grad(
            [g for g, _ in terms], dummy, [v for _, v in terms], retain_graph=True
        )
        return outputs, pushed

    def population(
        self, params: Sequence[Tensor], candidates: Sequence[Tensor], *, chunk: int | None = None
    ) -> Tensor:
        """Return the loss of many candidate points on the same batch, shape ``(N,)``.

        Args:
            params: The parameters that vary, ``K`` of them.
            candidates: ``K`` tensors, the k-th of shape ``(N, *params[k].shape)``.
            chunk: How many candidates are evaluated at once; ``None`` for all.

        Raises:
            OracleError: If the model cannot be evaluated for many points at once (it draws random
                numbers, or updates statistics in training mode).
        """
        arguments, targets = self.arguments, self.targets
        self.names(params)
        # Refused before the first evaluation, which would already write the statistics.
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                raise OracleError(
                    f"the model cannot be evaluated for many candidates at once: {name!r} "
                    f"({type(module).__name__}) updates its statistics in training mode. Call "
                    "model.eval()."
                )

        def one(values: list[Tensor]) -> Tensor:
            outputs = self.call(params, values, *arguments)
            return self._checked(self.loss_fn(outputs, targets)).reshape(())

        many = torch.func.vmap(one, randomness="error", chunk_size=chunk)
        try:
            with torch.no_grad():
                losses: Tensor = many(list(candidates))
        except RuntimeError as error:
            if "randomness" in str(error):
                raise OracleError(
                    "the model draws random numbers (dropout in training mode?), so its loss is no "
                    "function of the parameters. Call model.eval()."
                ) from error
            raise OracleError(
                f"the model cannot be evaluated for many candidates at once ({error}). Pass a "
                "plain closure, which is evaluated candidate by candidate."
            ) from error
        self.counts.loss += losses.numel()
        return losses


def each_tensor(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return ``value`` with ``function`` applied to every tensor that has a dimension."""
    if isinstance(value, Tensor):
        return function(value) if value.ndim else value
    if isinstance(value, dict):
        return {key: each_tensor(entry, function) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [each_tensor(entry, function) for entry in value]
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*entries) if named else type(value)(entries)
    return value
