"""Positive semidefinite stand-ins for the Hessian of a batch, over all parameters together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.functional.derivatives import refuse_single, twice_differentiable
from optimizers.objective import Objective, OracleError
from optimizers.second_order.jacobian import check_samplewise


def gauss_newton(objective: Objective, params: Sequence[Tensor]) -> Tensor:
    r"""Return the Gauss-Newton matrix :math:`J^\top H_{out} J`, ``(n, n)``, of any loss.

    From the Jacobian of the outputs, in one batched backward pass, or from n products where the
    batch has more outputs than there are parameters.

    Raises:
        OracleError: If the outputs are no tensor, or a parameter is not the model's.
    """
    objective.names(params)
    n = sum(p.numel() for p in params)
    with torch.enable_grad(), twice_differentiable():
        outputs = objective.outputs()
        if not isinstance(outputs, Tensor):
            raise OracleError(
                f"the outputs must be one tensor; got {type(outputs).__name__}. Let the model "
                "return the predictions alone."
            )
        m = outputs.numel()
        if m > n:
            return _from_products(objective, params, n)
        units = torch.eye(m, dtype=outputs.dtype, device=outputs.device)
        rows = _batched(outputs, params, units.reshape(m, *outputs.shape))
        J = torch.cat([r.reshape(m, -1).to(params[0]) for r in rows], 1)
        objective.counts.vjp += m
        leaf = outputs.detach().requires_grad_()
        loss = objective.loss_fn(leaf, objective.targets)
        (slope,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        refuse_single(loss, [slope])
        if not slope.requires_grad:  # a linear loss
            return J.new_zeros(n, n)
        columns = J.mT.reshape(n, *outputs.shape).to(outputs)
        (curved,) = _batched(slope, [leaf], columns)
    return curved.reshape(n, m).to(J) @ J


def _from_products(objective: Objective, params: Sequence[Tensor], n: int) -> Tensor:
    sizes, rows = [p.numel() for p in params], []
    for k in range(n):
        unit = params[0].new_zeros(n)
        unit[k] = 1
        parts = zip(torch.split(unit, sizes), params, strict=True)
        found = objective.ggn(params, [u.reshape(p.shape).to(p) for u, p in parts])
        rows.append(torch.cat([h.reshape(-1).to(params[0]) for h in found]))
    return torch.stack(rows)


def _batched(values: Tensor, leaves: Sequence[Tensor], seeds: Tensor) -> list[Tensor]:
    """Return the backward passes of many seeds, one by one where they cannot be batched."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(values, leaves, seeds, is_grads_batched=True, **options)
    except RuntimeError:
        each = [torch.autograd.grad(values, leaves, seed, **options) for seed in seeds]
        columns: Any = zip(*each, strict=True)
        found = [None if part[0] is None else torch.stack(part) for part in columns]
    return [
        leaf.new_zeros(len(seeds), *leaf.shape) if g is None else g.detach()
        for g, leaf in zip(found, leaves, strict=True)
    ]


def sample_gradients(
    objective: Objective, params: Sequence[Tensor], mean: Sequence[Tensor], rule: str
) -> list[Tensor]:
    """Return the gradients of the samples' losses, ``(samples, *p.shape)`` for each parameter.

    Args:
        objective: Bound to the batch; its loss is a mean over samples.
        params: The parameters.
        mean: The gradient of the batch, which those of the samples must average to.
        rule: The optimizer's name, for messages.

    Raises:
        OracleError: If the loss is not the mean of losses of single samples.
    """
    check_samplewise(objective.model, rule)
    samples = objective.samples
    if not samples:
        raise OracleError(f"{rule} needs samples to tell apart. {_REMEDY}")
    arguments, targets = objective.arguments, objective.targets
    if isinstance(targets, Tensor) or targets is None:
        ends = (targets,)
    else:
        raise OracleError(f"{rule} needs targets in one tensor. {_REMEDY}")
    dims = tuple(0 if isinstance(a, Tensor) and a.ndim else None for a in (*arguments, *ends))

    def single(values: list[Tensor], *sample: Any) -> Tensor:
        whole = [a if d is None else a.unsqueeze(0) for a, d in zip(sample, dims, strict=True)]
        outputs = objective.call(params, values, *whole[:-1])
        loss: Tensor = objective.loss_fn(outputs, whole[-1])
        return loss.reshape(())

    each = torch.func.vmap(torch.func.grad(single), in_dims=(None, *dims), randomness="error")
    try:
        found: list[Tensor] = each([p.detach() for p in params], *arguments, *ends)
    except (RuntimeError, ValueError) as error:
        raise OracleError(
            f"{rule} cannot differentiate the losses of single samples ({error}). {_REMEDY}"
        ) from error
    objective.counts.gradient += 1
    largest = max(float(g.abs().max()) for g in found)
    # A model may compute in a coarser dtype than that of a parameter.
    coarse = max(torch.finfo(g.dtype).eps for g in found)
    for g, expected in zip(found, mean, strict=True):
        gap = float((g.mean(0) - expected).abs().max())
        # A thousand roundings cover the sums over a batch.
        if not gap <= min(1e3 * coarse, 0.05) * largest:
            raise OracleError(
                f"{rule} got another gradient from the samples one by one than from the batch (by "
                f"up to {gap:.2g}), so the loss is no mean over samples. {_REMEDY}"
            )
    return found


_REMEDY = (
    "Let the loss be the mean over the batch, the first dimension of every tensor the samples, and "
    "let the model map each sample alone, without drawing random numbers (model.eval())."
)
