"""One evaluation for K-FAC: loss, gradient, and the slopes in what the layers return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from optimizers.curvature import OutputModel, check_loss, output_model, read_loss
from optimizers.objective import Objective, OracleError
from optimizers.second_order.bartlett import draw_labels
from optimizers.second_order.kfac_layers import Evidence, Layer, Moments
from optimizers.second_order.layers import record


class Evaluation(NamedTuple):
    """What one forward pass and its backward passes gave.

    Attributes:
        loss: 0-D.
        grads: Gradient of each parameter, ``None`` if it took no part.
        evidence: The uses of each layer that was seen, by identity; layers with a use that is not
            understood are missing.
    """

    loss: Tensor
    grads: list[Tensor | None]
    evidence: dict[int, list[Evidence]]


def evaluate(
    objective: Objective,
    params: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    fisher: str,
    declared: str | None,
    key: tuple[int, int],
    rule: str,
) -> Evaluation:
    """Evaluate the objective once and watch the layers.

    Args:
        objective: Bound to the batch.
        params: What is differentiated in; all require gradients.
        layers: What is watched.
        fisher: ``"empirical"``, ``"sampled"`` or ``"exact"``.
        declared: The loss as the user declares it, or ``None`` to read it.
        key: Seed and time, of which sampled labels are a function.
        rule: The optimizer's name, for messages.

    Raises:
        OracleError: If the loss is no single number with a gradient, or cannot be read where its
            model distribution is needed.
    """
    form = None
    if fisher != "empirical" and layers:
        form = read_loss(objective.loss_fn, declared, rule)

    def run() -> tuple[Any, Any]:
        outputs = objective.outputs()
        return outputs, objective.loss_fn(outputs, objective.targets)

    # Hooks on the modules of a compiled model would not run.
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        (outputs, loss), uses, odd = record(
            [layer.module for layer in layers], run, lambda x, y: True
        )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OracleError(
                f"the loss must be a single number; got {got}. Average it over the batch."
            )
        if not loss.requires_grad and params:
            raise OracleError(
                "the loss has no gradient: something between the parameters and it is not "
                "differentiable or was detached. Use a rule that needs losses alone."
            )
        uses = [use for use in uses if use.outputs.requires_grad]
        leaves = [use.outputs for use in uses]
        found = (
            torch.autograd.grad(
                loss, [*params, *leaves], allow_unused=True, retain_graph=form is not None
            )
            if params
            else ()
        )
        grads: list[Tensor | None] = list(found[: len(params)])
        slopes = found[len(params) :]
        columns: list[Tensor] = []
        if form is not None:
            model = output_model(form, outputs, objective.targets, rule)
            check_loss(model, objective.loss_fn, outputs, objective.targets, rule)
            columns = _columns(model, outputs, fisher, key, rule)
        others = [
            torch.autograd.grad(outputs, leaves, column, retain_graph=True, allow_unused=True)
            for column in columns
            if leaves
        ]
    objective.counts.gradient += 1
    objective.counts.vjp += len(others)
    seen: dict[int, list[Evidence]] = {}
    for k, (use, slope) in enumerate(zip(uses, slopes, strict=True)):
        if slope is None:  # it led nowhere
            continue
        fits = [slope]
        if form is not None:
            fits = [torch.zeros_like(slope) if s[k] is None else s[k] for s in others]
        seen.setdefault(id(use.module), []).append(Evidence(use, slope, fits))
    evidence = {}
    for layer in layers:
        own = seen.get(id(layer.module), [])
        if own and layer.module not in odd and all(layer.fits(e.use) for e in own):
            evidence[id(layer)] = own
    return Evaluation(loss.detach().reshape(()), grads, evidence)


def explained(
    layers: Sequence[Layer],
    moments: Sequence[Moments | None],
    gradients: Mapping[Tensor, Tensor],
) -> list[bool]:
    """Whether the rows of each layer give its gradient: to 1 percent, and rounding of the sums.

    Args:
        layers: The layers.
        moments: What was seen of each; of what was not seen the answer means nothing.
        gradients: From autograd, of every parameter that moves.
    """
    answers = []
    for layer, told in zip(layers, moments, strict=True):
        right = torch.ones((), dtype=torch.bool, device=layers[0].weight.device)
        if told is not None:
            share = max(1e-2, 8 * torch.finfo(told.coarse).eps)
            rounding = 64 * torch.finfo(layer.dtype).eps * told.size
            for p in layer.trained:
                mine, wanted = told.weight if p is layer.weight else told.bias, gradients[p]
                if wanted.layout is torch.strided:
                    gap = (mine - wanted.to(layer.dtype)).abs().max()
                    right = right & (gap <= share * wanted.abs().max() + rounding).to(right.device)
        answers.append(right)
    # Read at once: one stall for all layers.
    return torch.stack(answers).tolist() if answers else []


def _columns(
    model: OutputModel, outputs: Tensor, fisher: str, key: tuple[int, int], rule: str
) -> list[Tensor]:
    r"""Return slopes in the outputs whose second moments are, or estimate, the loss's Hessian.

    For ``b`` samples and a mean over ``N`` terms they are :math:`\ell / \sqrt{bN}` with
    :math:`E\,\ell\ell^\top = LL^\top`: like the slopes of a mean over samples they carry ``1/b``.
    """
    size = (len(outputs) * model.count) ** -0.5
    if fisher == "sampled":
        return [_arranged(_drawn(model, *key) * size, model, outputs)]
    if outputs.ndim > 2:
        raise OracleError(
            f'fisher="exact" of {rule} needs outputs of one or two dimensions, (batch, outputs); '
            f'got {tuple(outputs.shape)}. Use fisher="sampled".'
        )
    columns = []
    for j in range(model.outputs.shape[1]):
        L = torch.zeros_like(model.scale)
        L[:, j] = model.scale[:, j]
        if model.mean is not None:  # L = (I - p 1^T) diag(s)
            L -= model.mean * model.scale[:, j : j + 1]
        columns.append(_arranged(L * size, model, outputs))
    return columns


def _drawn(model: OutputModel, seed: int, time: int) -> Tensor:
    """Return the slopes of each term for a label drawn from the model's own distribution."""
    f = model.outputs
    if model.mean is not None:
        labels = draw_labels(f, seed, time)[0]
        return model.mean - functional.one_hot(labels, f.shape[1])
    rng = np.random.default_rng([seed, time])
    if model.form.name == "bce":
        p = torch.sigmoid(f)
        return p - (torch.from_numpy(rng.random(tuple(f.shape))).to(p) < p).to(p.dtype)
    return model.scale * torch.from_numpy(rng.standard_normal(tuple(f.shape))).to(f)


def _arranged(terms: Tensor, model: OutputModel, outputs: Tensor) -> Tensor:
    """Return ``(terms, c)`` in the shape and dtype of the outputs."""
    terms = terms.to(outputs.dtype)
    if model.form.name == "cross_entropy":
        return terms.view(len(outputs), *outputs.shape[2:], outputs.shape[1]).movedim(-1, 1)
    return terms.view(outputs.shape)
