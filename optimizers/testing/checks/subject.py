"""What is checked, and the small network on which it is checked."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.objective import LossFn, Objective, OracleError
from optimizers.oracle import Needs


class CheckFailed(AssertionError):  # noqa: N818  an outcome
    """The optimizer does not keep this part of the contract."""


class NotApplicable(Exception):  # noqa: N818  an outcome, not an error
    """The check has no meaning for this optimizer; the message says why."""


def require(condition: bool, why: str) -> None:
    """Fail the running check with ``why`` unless ``condition`` holds."""
    if not condition:
        raise CheckFailed(why)


class Net(nn.Module):
    """A two-layer network, 6 to 4 to 6, whose parameters have the shapes that checks want."""

    def __init__(self, dtype: torch.dtype, bias: bool, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(6, 4, bias=False)
        self.second = nn.Linear(4, 6, bias=bias)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, 6)`` to ``(batch, 6)``."""
        outputs: Tensor = self.second(torch.tanh(self.first(x)))
        return outputs


class Case:
    """A network, its batches and the loss: everything a run needs, from a seed."""

    def __init__(
        self,
        needs: Needs,
        *,
        dtype: torch.dtype = torch.float64,
        bias: bool = True,
        seed: int = 0,
        loss_fn: LossFn = nn.functional.mse_loss,
    ) -> None:
        # Building modules draws from the global generator; the caller's stream must not notice.
        with torch.random.fork_rng(devices=[]):
            self.model = Net(dtype, bias, seed)
        self.needs = needs
        self.dtype = dtype
        self.loss_fn = loss_fn
        self.objective = Objective(self.model, loss_fn)

    @property
    def params(self) -> list[nn.Parameter]:
        """The network's parameters, in order."""
        return list(self.model.parameters())

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k-th batch of 8 samples."""
        generator = torch.Generator().manual_seed(1000 + k)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        if self.loss_fn is nn.functional.cross_entropy:
            y = y.softmax(1)
        return x.to(self.dtype), y.to(self.dtype)

    def loss(self, k: int) -> Tensor:
        """Return the loss on the k-th batch, with its graph."""
        x, y = self.batch(k)
        return self.loss_fn(self.model(x), y)

    def closure(self, k: int) -> Callable[[], Any]:
        """Return what ``step`` wants for the k-th batch."""
        if self.needs is Needs.OUTPUTS:
            return self.objective.on(*self.batch(k))
        if self.needs in (Needs.LOSS, Needs.HESSIAN):
            return lambda: self.loss(k)

        def with_backward() -> Tensor:
            self.model.zero_grad()
            loss = self.loss(k)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return with_backward

    def step(self, optimizer: torch.optim.Optimizer, k: int, *, closure: bool = False) -> Any:
        """Take the k-th step, in the plain form where the rule allows it."""
        if self.needs is not Needs.GRADIENTS or closure:
            return optimizer.step(self.closure(k))
        self.closure(k)()
        return optimizer.step()

    def run(self, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[Tensor]:
        """Take several steps and return copies of the parameters."""
        for k in steps:
            self.step(optimizer, k)
        return self.values()

    def values(self) -> list[Tensor]:
        """Return copies of the parameters."""
        return [p.detach().clone() for p in self.params]


class Subject:
    """An optimizer under test: how it is made, and what may be asked of it.

    Args:
        factory: ``factory(params, **kwargs)``: a class or a function.
        kwargs: Arguments of every construction.
        needs: What the rule asks of the objective; read from the class if ``None``.
        name: For the report; the factory's name if ``None``.
    """

    def __init__(
        self,
        factory: Callable[..., torch.optim.Optimizer],
        kwargs: Mapping[str, Any] | None = None,
        *,
        needs: Needs | None = None,
        name: str | None = None,
    ) -> None:
        self.factory = factory
        self.kwargs = dict(kwargs or {})
        self.name = name or getattr(factory, "__name__", type(factory).__name__)
        self.options = _options(factory)
        self.needs = needs or _needs(factory)
        self.takes_vectors = self._accepts([(6, 4), (4, 6), (6,)])
        self.loss_fn = self._loss_fn()

    def _accepts(self, shapes: list[tuple[int, ...]]) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.make([nn.Parameter(torch.zeros(s)) for s in shapes])
        except (ValueError, RuntimeError):
            return False
        return True

    def _loss_fn(self) -> LossFn:
        """Return squared errors, or cross-entropy for a rule that refuses them."""
        if self.needs is Needs.OUTPUTS:
            case = Case(self.needs, bias=self.takes_vectors)
            try:
                case.step(self.make(case.params), 0)
            except OracleError:
                return nn.functional.cross_entropy
        return nn.functional.mse_loss

    def make(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        """Construct the optimizer."""
        return self.factory(params, **{**self.kwargs, **options})

    def has(self, option: str) -> bool:
        """Whether the constructor has an option."""
        return option in self.options

    def case(self, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
        """Return a fresh network with batches that this optimizer can train."""
        return Case(
            self.needs, dtype=dtype, bias=self.takes_vectors, seed=seed, loss_fn=self.loss_fn
        )

    def pair(
        self, *, dtype: torch.dtype = torch.float64, **options: Any
    ) -> tuple[Case, torch.optim.Optimizer]:
        """Return a fresh network and an optimizer on it."""
        case = self.case(dtype=dtype)
        return case, self.make(case.params, **options)

    def only_gradients(self) -> None:
        """Skip the running check for rules that do not read ``.grad``."""
        if self.needs is not Needs.GRADIENTS:
            raise NotApplicable("the rule evaluates the objective itself and reads no .grad")

    def tensors(self, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
        """Return loose parameters for runs on injected gradients."""
        shapes: list[tuple[int, ...]] = [(6, 4), (4, 6)]
        if self.takes_vectors:
            shapes.append((6,))
        generator = torch.Generator().manual_seed(seed)
        return [
            nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
            for s in shapes
        ]


def gradients(params: list[nn.Parameter], k: int, scale: float = 1.0) -> list[Tensor]:
    """Return the k-th set of random gradients for ``params``."""
    generator = torch.Generator().manual_seed(5000 + k)
    return [
        (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for p in params
    ]


def inject(params: list[nn.Parameter], grads: Iterable[Tensor | None]) -> None:
    """Set ``.grad``."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def descend(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: Iterable[int]
) -> list[Tensor]:
    """Step on random gradients and return copies of the parameters."""
    for k in steps:
        inject(params, gradients(params, k))
        optimizer.step()
    return [p.detach().clone() for p in params]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists of tensors agree bit by bit (NaN equals NaN)."""
    return all(
        torch.equal(torch.nan_to_num(a, nan=7e77), torch.nan_to_num(b, nan=7e77))
        for a, b in zip(left, right, strict=True)
    )


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest difference of two lists, relative to the larger of 1 and the values."""
    largest = 0.0
    for a, b in zip(left, right, strict=True):
        if a.numel():
            size = max(1.0, float(b.abs().max()))
            largest = max(largest, float((a.double() - b.double()).abs().max()) / size)
    return largest


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _options(factory: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return set()


def _needs(factory: Callable[..., Any]) -> Needs:
    declared = getattr(factory, "needs", None)
    if isinstance(declared, Needs):
        return declared
    step = getattr(factory, "step", None)
    if step is not None:
        closure = inspect.signature(step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            return Needs.CLOSURE
    return Needs.GRADIENTS
