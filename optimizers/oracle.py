"""What a step may ask of the objective: gradients, losses, curvature products, outputs.

An optimizer declares what it ``needs``; :func:`as_oracle` turns whatever the caller handed to
``step`` (nothing, a closure or an :class:`Objective`) into an :class:`Oracle` that answers it,
or raises an :class:`OracleError` that names the remedy, before anything has changed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from optimizers.functional.derivatives import (
    Expansion,
    gradients,
    hessian_product,
    twice_differentiable,
)
from optimizers.objective import Objective, OracleError


class Needs(enum.Enum):
    """What a rule asks of the objective at each step.

    ``GRADIENTS``: one gradient, as ``loss.backward()`` leaves it. ``CLOSURE``: gradients at
    several points. ``LOSS``: values alone, at several points. ``HESSIAN``: Hessian products.
    ``OUTPUTS``: the network's outputs, their Jacobian and the targets.
    """

    GRADIENTS = "gradients"
    CLOSURE = "closure"
    LOSS = "loss"
    HESSIAN = "hessian"
    OUTPUTS = "outputs"


class Oracle:
    """What ``probe`` may ask. Each method answers or raises :class:`OracleError`.

    Args:
        optimizer: The optimizer's name, for messages.
    """

    def __init__(self, optimizer: str) -> None:
        self.optimizer = optimizer

    @property
    def objective(self) -> Objective:
        """The caller's :class:`Objective`, for rules that need the outputs."""
        raise self._refusal("the network's outputs", _OBJECTIVE)

    @property
    def samples(self) -> int | None:
        """The number of samples that :meth:`subset` may choose from; ``None`` if there are none."""
        return None

    def subset(self, indices: Tensor) -> Oracle:
        """Return the oracle of some samples of the batch."""
        raise self._refusal("samples to choose from", _OBJECTIVE)

    def evaluate(self) -> Tensor | None:
        """Let the closure (if any) fill ``.grad``; return its loss."""
        raise self._refusal("gradients", _OBJECTIVE)

    def gradient(self, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss and the gradient at the parameters' present values."""
        raise self._refusal("gradients at several points", _BACKWARD_CLOSURE)

    def loss(self) -> Tensor:
        """Return the loss at the parameters' present values, without a graph."""
        raise self._refusal("the loss itself", _LOSS_CLOSURE)

    def population(
        self, params: Sequence[Tensor], candidates: Sequence[Tensor], *, chunk: int | None = None
    ) -> Tensor:
        """Return the losses of ``N`` candidate points, shape ``(N,)``; parameters stay as is."""
        raise self._refusal("the loss at many points", _LOSS_CLOSURE)

    def hvp(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product of the loss's Hessian with ``vectors``."""
        raise self._refusal("Hessian products", _LOSS_CLOSURE)

    def expand(
        self, params: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[Tensor | None], list[list[Tensor]]]:
        """Return the loss, its gradient and the Hessian's products with each probe, at one pass."""
        raise self._refusal("Hessian products", _LOSS_CLOSURE)

    def around(self, params: Sequence[Tensor]) -> Expansion:
        """Return the loss around the present values, for products one after the other."""
        raise self._refusal("Hessian products", _LOSS_CLOSURE)

    def trials(self, params: Sequence[Tensor]) -> AbstractContextManager[list[Tensor]]:
        """Return a context for evaluations elsewhere, as :func:`restored`.

        An Objective's model gets its buffers back too: statistics of points that were only tried
        are not the model's.
        """
        return restored(params)

    def ggn(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Gauss-Newton product with ``vectors``."""
        raise self._refusal("Gauss-Newton products", _OBJECTIVE)

    def _refusal(self, what: str, remedy: str) -> OracleError:
        return OracleError(f"{self.optimizer} needs {what}. {remedy}")


_OBJECTIVE = (
    "Build objective = optimizers.Objective(model, loss_fn) once and call "
    "optimizer.step(objective.on(inputs, targets)) for each batch."
)
_LOSS_CLOSURE = (
    "Do not call backward(); pass a closure that returns the loss:\n"
    "    def closure():\n"
    "        return loss_fn(model(inputs), targets)\n"
    "and call optimizer.step(closure), or step(Objective(model, loss_fn).on(inputs, targets))."
)
_BACKWARD_CLOSURE = (
    "Pass a closure that clears the gradients, calls loss.backward() and returns the loss, or "
    "step(Objective(model, loss_fn).on(inputs, targets))."
)


class _StoredGradients(Oracle):
    """``loss.backward()`` has been called: the gradients lie in ``.grad``."""

    def evaluate(self) -> Tensor | None:
        return None


class _FromObjective(Oracle):
    """An :class:`Objective` answers everything."""

    def __init__(self, optimizer: str, objective: Objective) -> None:
        super().__init__(optimizer)
        objective.inputs  # noqa: B018  refuses an unbound objective before anything changes
        self._objective = objective

    @property
    def objective(self) -> Objective:
        return self._objective

    @property
    def samples(self) -> int | None:
        return self._objective.samples

    def subset(self, indices: Tensor) -> Oracle:
        return _FromObjective(self.optimizer, self._objective.subset(indices))

    def evaluate(self) -> Tensor | None:
        return self._objective()

    def gradient(self, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        return self._objective.gradient(params)

    def loss(self) -> Tensor:
        return self._objective.loss()

    def population(
        self, params: Sequence[Tensor], candidates: Sequence[Tensor], *, chunk: int | None = None
    ) -> Tensor:
        return self._objective.population(params, candidates, chunk=chunk)

    def hvp(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._objective.hvp(params, vectors)

    def expand(
        self, params: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[Tensor | None], list[list[Tensor]]]:
        return self._objective.expand(params, probes)

    def around(self, params: Sequence[Tensor]) -> Expansion:
        return self._objective.around(params)

    def trials(self, params: Sequence[Tensor]) -> AbstractContextManager[list[Tensor]]:
        return restored([*params, *self._objective.model.buffers()])

    def ggn(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._objective.ggn(params, vectors)


class _FromClosure(Oracle):
    """A plain closure: with ``backward()`` it gives gradients, without it losses and products."""

    def __init__(self, optimizer: str, closure: Callable[[], Any], params: list[Tensor]) -> None:
        super().__init__(optimizer)
        self._closure = closure
        self._params = params

    def evaluate(self) -> Any:
        with torch.enable_grad():
            loss = self._closure()
        forgot = isinstance(loss, Tensor) and loss.requires_grad
        if forgot and all(p.grad is None for p in self._params):
            raise self._refusal("gradients and the closure left none", _BACKWARD_CLOSURE)
        return loss

    def gradient(self, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """A closure that returns the loss and leaves ``backward()`` to us is answered as well."""
        before = [p.grad for p in params]
        for p in params:
            p.grad = None  # an old one must not be taken for the answer
        try:
            with torch.enable_grad():
                loss = self._closure()
                # The next call overwrites .grad, so what is returned must be a copy.
                found = [None if p.grad is None else p.grad.clone() for p in params]
                if isinstance(loss, Tensor):
                    if loss.requires_grad and all(g is None for g in found):
                        found = self._differentiated(loss, params)
                    loss = loss.detach()
        finally:
            for p, g in zip(params, before, strict=True):
                if p.grad is None:
                    p.grad = g
        return loss, found

    def _differentiated(self, loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
        self._scalar(loss)
        try:
            return gradients(loss, params)
        except RuntimeError as error:
            if "second time" in str(error):  # backward() was called, and its result cleared
                raise self._refusal(
                    "gradients and the closure left none", _BACKWARD_CLOSURE
                ) from error
            raise

    def loss(self) -> Tensor:
        with torch.no_grad():
            try:
                loss = self._closure()
            except RuntimeError as error:
                if "does not require grad" in str(error):
                    raise self._refusal("losses, not gradients", _LOSS_CLOSURE) from error
                raise
        return self._scalar(loss)

    def _scalar(self, loss: Any) -> Tensor:
        if loss is None:
            raise self._refusal("the closure to return the loss", _LOSS_CLOSURE)
        # A plain float is a double, of which torch would keep single precision.
        value = loss if isinstance(loss, Tensor) else torch.as_tensor(loss, dtype=torch.float64)
        if value.numel() != 1:
            raise OracleError(
                f"{self.optimizer} needs a closure that returns one number; got a tensor of "
                f"shape {tuple(value.shape)}. Average the loss over the batch."
            )
        return value.detach().reshape(())

    def population(
        self, params: Sequence[Tensor], candidates: Sequence[Tensor], *, chunk: int | None = None
    ) -> Tensor:
        with restored(params):
            losses = []
            for members in zip(*(c.unbind(0) for c in candidates), strict=True):
                for p, value in zip(params, members, strict=True):
                    p.copy_(value)
                losses.append(self.loss())
        return torch.stack(losses)

    def hvp(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        products: list[Tensor] = self._with_graph(
            lambda loss: hessian_product(loss, params, vectors)
        )
        return products

    def expand(
        self, params: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[Tensor | None], list[list[Tensor]]]:
        here = self.around(params)
        return here.loss, here.grads, [here.product(probe) for probe in probes]

    def around(self, params: Sequence[Tensor]) -> Expansion:
        def use(loss: Tensor) -> Expansion:
            self._scalar(loss)
            return Expansion(loss, params)

        here: Expansion = self._with_graph(use)
        return here

    def _with_graph(self, use: Callable[[Tensor], Any]) -> Any:
        with torch.enable_grad(), twice_differentiable():
            loss = self._closure()
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise self._refusal("a loss with its graph", _LOSS_CLOSURE)
            try:
                return use(loss)
            except RuntimeError as error:
                if "second time" in str(error):  # the closure called backward()
                    raise self._refusal("a loss with its graph", _LOSS_CLOSURE) from error
                raise


@contextmanager
def without_cast_cache() -> Iterator[None]:
    """Let autocast cast the parameters at every evaluation.

    Within one autocast region torch keeps the casts of the first evaluation, so that an evaluation
    at other values would answer for the first ones. On leaving, casts from before are forgotten:
    the step changes the parameters.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()


@contextmanager
def restored(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put ``params`` back to their present bits on leaving, also after an exception.

    The context's value is the list of the copies that they are put back to.
    """
    saved = [p.detach().clone(memory_format=torch.preserve_format) for p in params]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for p, value in zip(params, saved, strict=True):
                p.copy_(value)


# What to hand to step() when nothing was handed over.
_REMEDIES = {
    Needs.CLOSURE: _BACKWARD_CLOSURE,
    Needs.LOSS: _LOSS_CLOSURE,
    Needs.HESSIAN: _LOSS_CLOSURE,
    Needs.OUTPUTS: _OBJECTIVE,
}


def as_oracle(
    closure: Callable[[], Any] | None, needs: Needs, optimizer: str, params: list[Tensor]
) -> Oracle:
    """Turn what was handed to ``step`` into an oracle for ``needs``, or refuse.

    Args:
        closure: ``None``, a plain closure or a bound :class:`Objective`.
        needs: What the rule asks.
        optimizer: The rule's name, for messages.
        params: The optimizer's parameters.

    Raises:
        OracleError: If the objective cannot answer; nothing has been changed then.
        TypeError: If ``closure`` is neither ``None`` nor callable.
    """
    if closure is not None and needs != Needs.LOSS and torch.is_inference_mode_enabled():
        raise OracleError(
            f"{optimizer} differentiates the loss, which torch.inference_mode() forbids. Leave "
            "the inference mode around step(); only rules that need losses alone work under it."
        )
    if isinstance(closure, Objective):
        return _FromObjective(optimizer, closure)
    if closure is None:
        if needs == Needs.GRADIENTS:
            return _StoredGradients(optimizer)
        raise OracleError(
            f"{optimizer} evaluates the objective itself, and step() was given nothing to "
            f"evaluate. {_REMEDIES[needs]} Under mixed precision use bfloat16 autocast without a "
            "GradScaler."
        )
    if not callable(closure):
        raise TypeError(f"closure must be callable or None; got {type(closure).__name__}.")
    if needs == Needs.OUTPUTS:
        raise OracleError(
            f"{optimizer} needs the network's outputs and targets, which a plain closure does "
            f"not show. {_OBJECTIVE}"
        )
    return _FromClosure(optimizer, closure, params)
