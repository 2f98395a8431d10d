"""Checks of dtypes, shapes, memory layouts and extreme numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.oracle import Needs
from optimizers.testing.checks.registry import check
from optimizers.testing.checks.subject import (
    CheckFailed,
    NotApplicable,
    Subject,
    descend,
    distance,
    finite,
    gradients,
    inject,
    require,
)


def _trains_in(subject: Subject, dtype: torch.dtype) -> None:
    try:
        case, optimizer = subject.pair(dtype=dtype)
        before, after = case.values(), case.run(optimizer, range(10))
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    require(finite(after), "a parameter is not finite")
    require(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing moved")


@check
def float64_parameters(subject: Subject) -> None:
    """float64 parameters train."""
    _trains_in(subject, torch.float64)


@check
def bfloat16_parameters(subject: Subject) -> None:
    """bfloat16 parameters train and stay finite."""
    _trains_in(subject, torch.bfloat16)


@check
def float16_parameters(subject: Subject) -> None:
    """float16 parameters train and stay finite."""
    _trains_in(subject, torch.float16)


@check
def float32_agrees_with_float64(subject: Subject) -> None:
    """Three steps from the same point agree to 1 percent of the displacement."""
    moves = []
    for dtype in (torch.float64, torch.float32):
        case, optimizer = subject.pair(dtype=dtype)
        start = case.values()
        end = case.run(optimizer, range(3))
        moves.append([(b - a).double() for a, b in zip(start, end, strict=True)])
    gap = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(*moves, strict=True)))
    size = math.sqrt(sum(float((a**2).sum()) for a in moves[0]))
    require(gap <= 0.01 * size, f"the displacements differ by {gap / size:.1%}")


def _shape_is_handled(subject: Subject, shape: tuple[int, ...]) -> None:
    """Demand that a shape trains, or is refused with a ValueError that shows the shape."""
    subject.only_gradients()
    p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    try:
        optimizer = subject.make([p])
    except ValueError as error:
        require(
            str(tuple(shape))[:-1].rstrip(",") in str(error) or "torch.Size" in str(error),
            f"the refusal does not show the shape: {error}",
        )
        return
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    try:
        (after,) = descend(optimizer, [p], range(3))
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    require(finite([after]), "it became non-finite")
    require(not torch.equal(after, torch.ones_like(after)), "it did not move")


@check
def zero_dimensional_parameter(subject: Subject) -> None:
    """A scalar parameter trains, or is refused clearly at construction."""
    _shape_is_handled(subject, ())


@check
def vector_parameter(subject: Subject) -> None:
    """A vector trains, or is refused clearly at construction."""
    _shape_is_handled(subject, (5,))


@check
def degenerate_matrices(subject: Subject) -> None:
    """1x1, 1xn and nx1 matrices train, or are refused clearly at construction."""
    for shape in ((1, 1), (1, 5), (5, 1)):
        _shape_is_handled(subject, shape)


@check
def higher_dimensional_parameters(subject: Subject) -> None:
    """3-, 4- and 5-dimensional weights train, or are refused clearly at construction."""
    for shape in ((2, 3, 4), (4, 3, 2, 2), (3, 2, 2, 2, 2)):
        _shape_is_handled(subject, shape)


def _kernels(subject: Subject, seed: int = 3) -> Tensor:
    """Return a weight of the largest number of dimensions that the rule takes, up to 4."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    try:
        subject.make([nn.Parameter(weight.clone())])
    except (ValueError, RuntimeError):
        return weight.reshape(4, 12).contiguous()
    return weight


def _layout_is_irrelevant(subject: Subject, start: Tensor, strided: Tensor, grads: Any) -> None:
    subject.only_gradients()
    results = []
    for value in (start, strided):
        p = nn.Parameter(value)
        optimizer = subject.make([p])
        try:
            for k in range(4):
                p.grad = grads(k, p)
                optimizer.step()
        except Exception as error:
            raise CheckFailed(f"{type(error).__name__}: {error}") from error
        results.append(p.detach().clone())
    worst = distance([results[0]], [results[1]])
    require(worst <= 1e-12, f"the memory layout changes the result by {worst:.1e}")


def _random_gradient(k: int, p: nn.Parameter) -> Tensor:
    return gradients([p], k)[0]


@check
def non_contiguous_parameter(subject: Subject) -> None:
    """A transposed parameter trains like a contiguous one."""
    start = _kernels(subject).reshape(4, 12)

    def same_layout(k: int, p: nn.Parameter) -> Tensor:
        return torch.empty_like(p).copy_(_random_gradient(k, p))

    _layout_is_irrelevant(subject, start.clone(), start.T.contiguous().T, same_layout)


@check
def channels_last_parameter(subject: Subject) -> None:
    """A channels_last kernel trains like a contiguous one."""
    start = _kernels(subject)
    if start.ndim != 4:
        raise NotApplicable("the rule takes no convolution kernels")
    _layout_is_irrelevant(
        subject,
        start.clone(),
        start.clone().contiguous(memory_format=torch.channels_last),
        lambda k, p: torch.empty_like(p).copy_(_random_gradient(k, p)),
    )


@check
def non_contiguous_gradient(subject: Subject) -> None:
    """A gradient of another memory layout than its parameter is read right."""
    subject.only_gradients()
    start = _kernels(subject).reshape(4, 12)
    results = []
    for transpose in (False, True):
        p = nn.Parameter(start.clone())
        optimizer = subject.make([p])
        for k in range(4):
            g = _random_gradient(k, p)
            p.grad = g.T.contiguous().T if transpose else g
            try:
                optimizer.step()
            except Exception as error:
                raise CheckFailed(f"{type(error).__name__}: {error}") from error
        results.append(p.detach().clone())
    worst = distance([results[0]], [results[1]])
    require(worst <= 1e-12, f"the memory layout changes the result by {worst:.1e}")


@check
def expanded_gradient(subject: Subject) -> None:
    """The expanded gradient of p.sum().backward() is read right and not written."""
    subject.only_gradients()
    p = nn.Parameter(_kernels(subject).reshape(4, 12))
    optimizer = subject.make([p])
    for _ in range(3):
        p.grad = None
        p.sum().backward()  # type: ignore[no-untyped-call]
        try:
            optimizer.step()
        except Exception as error:
            raise CheckFailed(f"{type(error).__name__}: {error}") from error
    require(finite([p.detach()]), "it became non-finite")


@check
def zero_gradients_are_harmless(subject: Subject) -> None:
    """Zero gradients give no NaN, and real ones after them train."""
    subject.only_gradients()
    params = subject.tensors()
    optimizer = subject.make(params)
    for _ in range(5):
        inject(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
    before = [p.detach().clone() for p in params]
    require(finite(before), "zero gradients made a parameter non-finite")
    after = descend(optimizer, params, range(8))
    require(finite(after), "the first real gradients made a parameter non-finite")
    moves = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    require(min(moves) > 0, "a parameter does not move any more")
    require(max(moves) < 1e3, f"a parameter jumped by {max(moves):.1e}")


@check
def extreme_gradients_stay_finite(subject: Subject) -> None:
    """Gradients of magnitude 1e-25 and 1e15 in float32 leave finite parameters."""
    subject.only_gradients()
    for scale in (1e-25, 1e15):
        params = subject.tensors(dtype=torch.float32)
        optimizer = subject.make(params)
        for k in range(4):
            inject(params, gradients(params, k, scale))
            optimizer.step()
        require(finite([p.detach() for p in params]), f"not finite at magnitude {scale:g}")
        descend(optimizer, params, range(4, 8))
        require(finite([p.detach() for p in params]), f"not finite after magnitude {scale:g}")


@check
def dead_rows_and_rank_one(subject: Subject) -> None:
    """Gradients with a zero row, a zero column or rank one leave finite parameters."""
    subject.only_gradients()
    for kind in ("row", "column", "rank one"):
        params = subject.tensors(dtype=torch.float32)
        optimizer = subject.make(params)
        for k in range(4):
            grads = gradients(params, k)
            for g in grads:
                if g.ndim == 2:
                    if kind == "row":
                        g[0] = 0
                    elif kind == "column":
                        g[:, 0] = 0
                    else:
                        g.copy_(torch.outer(g[:, 0], g[0]))
            inject(params, grads)
            optimizer.step()
        require(finite([p.detach() for p in params]), f"not finite with {kind}")


@check
def sparse_gradients_are_refused_or_used(subject: Subject) -> None:
    """A sparse gradient is a RuntimeError that says sparse, before anything moves; or it works."""
    subject.only_gradients()
    table = nn.Embedding(6, 4, sparse=True, dtype=torch.float64)
    dense = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
    optimizer = subject.make([dense, table.weight])
    table(torch.tensor([1, 3])).sum().backward()
    dense.grad = torch.ones_like(dense)
    before = dense.detach().clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        require("sparse" in str(error), f"the message does not say sparse: {error}")
        require(torch.equal(dense.detach(), before), "another parameter moved before the refusal")
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error


@check
def complex_parameters_are_refused_or_used(subject: Subject) -> None:
    """Complex parameters train like real pairs, or are refused in words that say complex."""
    subject.only_gradients()
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    p = nn.Parameter(start.clone())
    pair = nn.Parameter(torch.view_as_real(start).clone())
    try:
        # A throw-away step first: some rules refuse only then, and the pair has another shape.
        trial = nn.Parameter(start.clone())
        trial.grad = torch.zeros_like(trial)
        subject.make([trial]).step()
        optimizer = subject.make([p])
        other = subject.make([pair])
        for k in range(4):
            generator = torch.Generator().manual_seed(k)
            g = torch.randn(4, 3, generator=generator, dtype=torch.complex128)
            p.grad, pair.grad = g, torch.view_as_real(g).clone()
            optimizer.step()
            other.step()
    except (ValueError, RuntimeError) as error:
        require("complex" in str(error).lower(), f"the message does not say complex: {error}")
        return
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    worst = distance([torch.view_as_real(p.detach())], [pair.detach()])
    require(worst <= 1e-12, f"complex and real pairs differ by {worst:.1e}")


@check
def state_is_at_least_float32(subject: Subject) -> None:
    """The state of half-precision parameters is kept in float32, so that small updates count."""
    case, optimizer = subject.pair(dtype=torch.bfloat16)
    case.run(optimizer, range(2))
    low = sorted(
        {
            f"{key}: {value.dtype}"
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        }
    )
    require(not low, f"kept in half precision: {', '.join(low)}")


@check
def works_under_inference_mode(subject: Subject) -> None:
    """A rule that needs losses alone works under torch.inference_mode(); others say they do not."""
    case, optimizer = subject.pair()
    if subject.needs is Needs.GRADIENTS:
        raise NotApplicable("backward() itself is impossible under inference_mode")
    try:
        with torch.inference_mode():
            case.step(optimizer, 0)
    except RuntimeError as error:
        require(subject.needs is not Needs.LOSS, f"a rule of losses refused: {error}")
        require("inference" in str(error), f"the refusal does not say why: {error}")
