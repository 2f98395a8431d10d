r"""Any loss that treats the samples one by one, around the present outputs, by autograd.

For :math:`F = \sum_i l_i(f_i)` the Hessian in the outputs has one block for each sample, and
``c`` products with it, each for all samples at once, give all of them for ``c`` outputs a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.curvature import LossForm, OutputModel, check_outputs
from optimizers.objective import LossFn, OracleError

AUTOGRAD = "autograd"
"""The name of the form."""


def separable_model(
    loss_fn: LossFn,
    outputs: Any,
    targets: Any,
    rule: str,
    dtype: torch.dtype = torch.float64,
    *,
    params: Sequence[Tensor] = (),
    room: float = float("inf"),
) -> tuple[OutputModel, Tensor]:
    r"""Describe a loss around ``outputs``; return it with the loss's value.

    The eigenvectors ``U`` of a sample's block ``b D_i`` and its eigenvalues :math:`\mu` give
    :math:`L_i = U\,\mathrm{diag}(\sqrt{\max(\mu, 0)})`. The slope's part along an eigenvector
    belongs to :math:`L q` where the eigenvalue is more than rounding of the sample's largest, and
    to the rest elsewhere. Either is exact; a rest that is all rounding is left out.

    Args:
        loss_fn: Maps ``(outputs, targets)`` to one number.
        outputs: ``(b, ...)``.
        targets: Whatever ``loss_fn`` takes.
        rule: The optimizer's name, for messages.
        dtype: Of the result. The loss is differentiated in it too, or in that of the outputs
            where it takes no other.
        params: Of which the loss must be a function through the outputs alone.
        room: Most elements of all blocks together.

    Raises:
        OracleError: If the outputs are no finite tensor, or the loss is no single number, has no
            finite derivatives, couples the samples, or depends on ``params`` in another way.
        ValueError: If the blocks are too large.
    """
    form = LossForm(AUTOGRAD)
    outputs = check_outputs(form, outputs, rule)
    b, c = len(outputs), outputs.numel() // len(outputs)
    if b * c * c > room:
        raise ValueError(
            f"the Hessians of the loss must have at most max_rows^2 = {room:.3g} elements; got {b} "
            f"of size {c} x {c} (outputs of a sample). Use a smaller batch, fewer outputs or a "
            "larger max_rows."
        )
    with torch.enable_grad():
        leaf, loss, finer, value = _evaluated(loss_fn, outputs.detach(), targets, dtype)
        eps = max(torch.finfo(t).eps for t in (leaf.dtype, loss.dtype, dtype))
        slope = _slope(loss, leaf, params, rule)
        if slope.requires_grad:
            blocks = _blocks(slope, leaf, b, c, eps, rule)
        else:
            _check_linear(loss_fn, finer, slope, leaf, eps, rule)
            blocks = leaf.new_zeros(b, c, c)
    g = slope.detach().reshape(b, c).to(dtype) * b
    if not all(bool(t.isfinite().all()) for t in (value, g, blocks)):
        raise OracleError(
            f"{rule} needs finite derivatives of the loss in the outputs and got NaN or infinity; "
            "nothing has been changed. Check the targets, lower lr or raise damping."
        )
    H = blocks.to(dtype) * b
    found, U = torch.linalg.eigh((H + H.mT) / 2)
    mu = found.clamp(min=0)
    scale, rounding = mu.sqrt(), min(10 * c * eps, 0.05)
    along = (U.mT @ g.unsqueeze(2)).squeeze(2)
    curved = mu > rounding * mu[:, -1:]
    q = torch.where(curved, -along / scale, 0)
    rest = -(U @ torch.where(curved, 0, along).unsqueeze(2)).squeeze(2)
    least = rounding * g.norm(dim=1, keepdim=True) + 4 * eps * g.abs().max()
    straight = bool((rest.abs() > least).any())
    f = form.terms(outputs.detach().to(dtype))
    model = OutputModel(
        form, f, value.to(dtype), b, q, scale, basis=U, rest=rest if straight else None
    )
    return model, value


def _evaluated(
    loss_fn: LossFn, outputs: Tensor, targets: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Return outputs, loss and targets, in ``dtype`` if possible, and the loss as it is."""
    leaf = outputs.clone().requires_grad_()
    loss = loss_fn(leaf, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise OracleError(f"the loss must be a single number; got {got}. Average it.")
    value = loss.detach().reshape(())
    if torch.finfo(dtype).eps < torch.finfo(outputs.dtype).eps:
        floating = isinstance(targets, Tensor) and targets.is_floating_point()
        wanted = targets.to(dtype) if floating else targets
        finer = outputs.to(dtype).requires_grad_()
        try:
            return finer, loss_fn(finer, wanted), wanted, value
        except RuntimeError:  # constants in the outputs' dtype
            pass
    return leaf, loss, targets, value


def _slope(loss: Tensor, leaf: Tensor, params: Sequence[Tensor], rule: str) -> Tensor:
    """Return the loss's gradient in the outputs, in the graph."""
    found, *others = [None]
    if loss.requires_grad:
        found, *others = torch.autograd.grad(
            loss.sum(), [leaf, *params], create_graph=True, allow_unused=True
        )
    if any(other is not None for other in others):
        raise OracleError(
            f"{rule} minimises a loss of the outputs alone, and this one depends on the parameters "
            "beside (a penalty?). Leave it out; weight_decay is an option of the rule."
        )
    if found is None:
        raise OracleError(
            f"{rule} needs the loss's gradient, and this one has none in the outputs: something "
            "in it is not differentiable or was detached. Use a rule that needs losses alone."
        )
    return found


def _blocks(slope: Tensor, leaf: Tensor, b: int, c: int, eps: float, rule: str) -> Tensor:
    """Return the Hessian's blocks ``(b, c, c)``, after a check that there is nothing beside."""
    directions = torch.eye(c, dtype=leaf.dtype, device=leaf.device).unsqueeze(1).expand(c, b, c)
    # The numbers of two samples differ in a bit: one of them moves there, the other must not.
    bits = torch.arange((b - 1).bit_length(), device=leaf.device).view(-1, 1, 1)
    still = (torch.arange(b, device=leaf.device).view(-1, 1) >> bits & 1).bool()
    draws = torch.randn(b, c, generator=torch.Generator().manual_seed(0)).to(directions)
    products = _products(slope, leaf, torch.cat([directions, torch.where(still, 0, draws)]))
    if products is None:
        raise OracleError(f"{rule} {_ONCE}")
    # A thousand roundings: what cancels between samples (a shift by the largest) is no coupling.
    gap = torch.where(still, products[c:], 0).abs().sum()
    if bool(gap > min(1e3 * eps, 0.05) * products.abs().max()):
        raise OracleError(
            f"{rule} needs a loss that is a sum or mean over samples, each term a function of one "
            "sample's outputs; this one couples the samples (a product with their second "
            f"derivatives is {float(gap):.2g} where it should be 0). A root or a product of means, "
            "and statistics of the batch, have no place in it."
        )
    return products[:c].permute(1, 2, 0)


def _check_linear(
    loss_fn: LossFn, targets: Any, slope: Tensor, leaf: Tensor, eps: float, rule: str
) -> None:
    """Refuse a slope without a graph that changes with the outputs (but at kinks)."""
    changed = torch.ones_like(leaf, dtype=torch.bool)
    for sign in (-1, 1):
        moved = leaf.detach() + sign * eps ** (1 / 3) * (1 + leaf.detach().abs())
        other = _slope(loss_fn(moved.requires_grad_(), targets), moved, (), rule).detach()
        changed &= (other - slope).abs() > min(1e3 * eps, 0.05) * slope.abs().max()
    if bool(changed.any()):
        raise OracleError(f"{rule} {_ONCE}")


_ONCE = (
    "needs the loss's second derivatives in the outputs, and torch has none for this one. Write it "
    "in operations that can be differentiated twice."
)


def _products(slope: Tensor, leaf: Tensor, directions: Tensor) -> Tensor | None:
    """Return the products ``(m, b, c)`` of the Hessian, or ``None`` if it cannot be had."""
    shaped = directions.reshape(-1, *leaf.shape)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        (found,) = torch.autograd.grad(slope, leaf, shaped, is_grads_batched=True, **options)
    except RuntimeError:  # a backward without a batching rule
        try:
            each = [torch.autograd.grad(slope, leaf, d, **options)[0] for d in shaped]
        except RuntimeError:
            return None
        found = None if each[0] is None else torch.stack(each)
    return torch.zeros_like(directions) if found is None else found.reshape(directions.shape)
