"""What a step costs when the layers before the cut-off run no backward: measured, and expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.layer_dropping.flags import switched_off
from optimizers.layer_dropping.sampling import inclusion_probabilities


class StepCosts(NamedTuple):
    """Floating-point operations of one step.

    Attributes:
        forward: Of the forward pass, which is always run whole: c_0.
        backward: For each layer, what its backward adds to that of the layers after it: c_i.
    """

    forward: float
    backward: list[float]

    def expected(self, probabilities: Sequence[float]) -> float:
        r"""Return :math:`c_0 + \sum_i q_i c_i` for probabilities of the cut-off layer."""
        q = inclusion_probabilities(probabilities)
        if len(q) != len(self.backward):
            raise ValueError(
                f"probabilities must be one per layer ({len(self.backward)}); got {len(q)}."
            )
        return self.forward + sum(a * c for a, c in zip(q, self.backward, strict=True))

    def saving(self, probabilities: Sequence[float]) -> float:
        """Return the expected cost over that of full steps."""
        return self.expected(probabilities) / (self.forward + sum(self.backward))


def measure_costs(loss: Callable[[], Tensor], layers: Sequence[Sequence[Tensor]]) -> StepCosts:
    """Count the operations of forward and backward for every cut-off, as autograd runs them.

    Only products and convolutions are counted (torch's counter); for the other operations of a
    network they are a good measure. Nothing is changed: no gradient is left in ``.grad``.

    Args:
        loss: Runs the model and returns the loss with its graph.
        layers: The parameters of each layer, from input to output.

    Raises:
        ValueError: If there are no layers.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer.")
    trained = [p for layer in layers for p in layer if p.requires_grad]
    totals = []
    forward = _count(loss, [])
    for cutoff in range(len(layers)):
        before = [p for layer in layers[:cutoff] for p in layer]
        with switched_off(before):
            left = [p for p in trained if p.requires_grad]
            totals.append(_count(loss, left) - forward if left else 0.0)
    later = [*totals[1:], 0.0]
    return StepCosts(forward, [a - b for a, b in zip(totals, later, strict=True)])


def _count(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    counter: Any = FlopCounterMode(display=False)
    with counter, torch.enable_grad():
        value = loss()
        if params:
            torch.autograd.grad(value, list(params), allow_unused=True)
    return float(counter.get_total_flops())
