"""Labels drawn from a network's own softmax, for estimates of its Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from optimizers.curvature import LossForm, read_loss
from optimizers.objective import Objective, OracleError

# Probabilities that are summed at once when labels are drawn.
_CHUNK = 2**22


def draw_labels(logits: Tensor, seed: int, time: int, samples: int = 1) -> Tensor:
    """Return labels from the softmax of logits: a function of the arguments alone.

    The label of a term is the first class up to which the probabilities exceed a uniform number;
    these numbers are the same on every device.

    Args:
        logits: ``(terms, classes)``.
        seed: Of the rule.
        time: The step.
        samples: How many labels each term gets.

    Returns:
        Integers, ``(samples, terms)``.
    """
    terms, classes = logits.shape
    numbers = np.random.default_rng([seed, time]).random((samples, terms))
    uniform = torch.from_numpy(numbers.T.copy()).to(logits.device)
    labels = torch.empty(terms, samples, dtype=torch.long, device=logits.device)
    rows = max(1, _CHUNK // max(1, classes))
    for start in range(0, terms, rows):
        part = slice(start, start + rows)
        # In single precision the sum over a large vocabulary would lose its rare classes.
        sums = torch.softmax(logits[part].double(), 1).cumsum(1)
        found = torch.searchsorted(sums, uniform[part] * sums[:, -1:], right=True)
        labels[part] = found.clamp_(max=classes - 1)
    return labels.T.contiguous()


def cross_entropy_form(objective: Objective, declared: str | None, rule: str) -> LossForm:
    """Return the form of the Objective's loss, a mean of cross-entropies, or refuse it."""
    remedy = (
        f"{rule} draws labels from the softmax of the outputs: of these losses it takes "
        "cross_entropy alone. For another loss use SophiaH or AdaHessian."
    )
    try:
        form = read_loss(objective.loss_fn, declared, rule)
    except OracleError as error:
        raise OracleError(f"{error} {remedy}") from None
    if form.name != "cross_entropy":
        raise OracleError(f"{rule} got an Objective with the loss {form.name}. {remedy}")
    return form


def check_outputs(outputs: Any, targets: Any, rule: str) -> None:
    """Refuse outputs that are no logits ``(samples, classes, ...)`` in one tensor."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or not outputs.is_floating_point():
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise OracleError(
            f"{rule} needs logits in one tensor (samples, classes, ...); got {got}. Let the model "
            "return the logits alone."
        )
    if not isinstance(targets, Tensor):
        raise OracleError(f"{rule} needs targets in one tensor; got {type(targets).__name__}.")


def ignored_terms(targets: Tensor) -> Tensor | None:
    """Return which labels are ignored, the negative ones; probabilities ignore nothing."""
    return None if targets.is_floating_point() else targets < 0


def declared_logits(
    form: LossForm, loss: Any, outputs: Tensor, targets: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """Return logits and targets whose mean of cross-entropies a declared loss is, or refuse it.

    Args:
        form: The declared form.
        loss: The Objective's.
        outputs: Logits, with the classes in dimension 1 or the last one.
        targets: Labels or probabilities.
        rule: The optimizer's name, for messages.

    Returns:
        Both in a form that torch's ``cross_entropy`` takes.
    """
    found = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
    flat = targets.flatten() if ignored_terms(targets) is not None else targets.flatten(0, -2)
    # A thousand roundings of the coarser dtype cover the sums over a batch.
    rounding = min(1e3 * max(torch.finfo(t.dtype).eps for t in (found, outputs)), 0.05)
    tried = []
    for logits, labels in [(outputs, targets), (outputs.flatten(0, -2), flat)]:
        f = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        ignored = ignored_terms(labels)
        y = labels.to(f.dtype) if ignored is None else labels.masked_fill(ignored, -100)
        try:
            value = functional.cross_entropy(f, y, label_smoothing=form.label_smoothing)
        except (RuntimeError, ValueError, IndexError):
            continue  # of other shapes
        size = 1 + f.abs().max() + value.abs()
        if found.numel() == 1 and not bool((found - value).abs() > rounding * size):
            return logits, labels
        tried.append(f"{float(value):.6g}")
    raise OracleError(
        f"loss must be the Objective's loss; got cross_entropy = {' or '.join(tried) or 'nothing'} "
        f"where the Objective has {found.tolist()} (outputs {tuple(outputs.shape)}, targets "
        f"{tuple(targets.shape)}). {rule} takes the mean over all predictions, of logits with the "
        "classes in dimension 1 or the last, without penalties."
    )
