"""Rules with an estimate of the Hessian's diagonal by random probes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Needs, Optimizer, Scope, Signal, State
from optimizers.objective import OracleError
from optimizers.oracle import Oracle

HUTCHINSON_RANGES = {
    "hessian_samples": "int [1, inf)",
    "hessian_every": "int [1, inf)",
    "seed": "int [0, inf)",
}


def draw_probes(
    params: list[Tensor], seed: int, time: int, samples: int, kind: str = "rademacher"
) -> list[list[Tensor]]:
    """Return probes for all parameters: a function of the arguments alone.

    Args:
        params: What they are shaped like.
        seed: Of the rule.
        time: The step.
        samples: How many.
        kind: ``"rademacher"``, entries of -1 and 1, or ``"gaussian"``.
    """
    number = int(np.random.SeedSequence([seed, time]).generate_state(1, np.uint64)[0] >> 1)
    generators = {d: torch.Generator(d).manual_seed(number) for d in {p.device for p in params}}
    probes = []
    for _ in range(samples):
        probe = []
        for p in params:
            options = {"generator": generators[p.device], "device": p.device}
            if kind == "gaussian":
                z = torch.randn(p.shape, **options)  # type: ignore[call-overload]
            else:
                z = torch.randint(0, 2, p.shape, **options) * 2 - 1  # type: ignore[call-overload]
            probe.append(z.to(p.dtype))
        probes.append(probe)
    return probes


class HutchinsonOptimizer(Optimizer):
    r"""Base of rules that know :math:`v = z \odot \nabla^2 F z` of a random z beside the gradient.

    :math:`E v = \mathrm{diag}\,\nabla^2 F`. One probe goes through the whole model. A rule reads
    :meth:`estimate` in ``update``; it is ``None`` on steps without a refresh. The draws are a
    function of ``seed`` and of ``time``, the count of steps, which lie in ``param_groups[0]``.
    """

    needs = Needs.HESSIAN
    scope = Scope.MODEL
    kind = "rademacher"
    shared: tuple[str, ...] = tuple(HUTCHINSON_RANGES)  # options in which groups must not differ

    def prepare(self) -> None:
        """Let the count of steps start, and refuse groups that would be probed apart."""
        self.param_groups[0].setdefault("time", 0)
        ranges.check_alike(self.param_groups, self.shared, "are probed together")

    def due(self) -> bool:
        """Whether this step draws probes."""
        plan = self.param_groups[0]
        every: int = plan["hessian_every"]
        return bool(plan["time"] % every == 0)

    def samples(self) -> int:
        """Return how many probes this step draws."""
        return int(self.param_groups[0]["hessian_samples"])

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Ask for the gradient and, when it is due, for products with probes."""
        params = [p for p in self._all_params() if p.requires_grad]
        plan = self.param_groups[0]
        products: list[list[Tensor]] = []
        if self.due():
            probes = draw_probes(params, plan["seed"], plan["time"], self.samples(), self.kind)
            loss, grads, products = oracle.expand(params, probes)
        else:
            loss, grads = oracle.gradient(params)
        found = dict(zip(params, grads, strict=True))
        self.check(loss, found)
        self._estimates = {}
        if products:
            for k, p in enumerate(params):
                parts = [
                    z[k].to(_wide(p)) * h[k].to(_wide(p))
                    for z, h in zip(probes, products, strict=True)
                ]
                self._estimates[id(self.state[p])] = torch.stack(parts).mean(0)
        self.check_estimates()
        return loss, found.get

    def check(self, loss: Tensor, grads: dict[Tensor, Tensor | None]) -> None:
        """Refuse a loss or gradient that is not finite: it would stay in the averages."""
        if not bool(loss.isfinite()):
            raise OracleError(
                f"{type(self).__name__} got the loss {float(loss)}; nothing has been changed. "
                "Lower lr or look at the batch."
            )
        self._check_finite([g for g in grads.values() if g is not None], "a gradient")

    def check_estimates(self) -> None:
        """Refuse estimates that are not finite."""
        self._check_finite(list(self._estimates.values()), "a curvature estimate")

    def _check_finite(self, tensors: list[Tensor], what: str) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() and tensor.layout is torch.strided:
                by_device.setdefault(tensor.device, []).append(tensor)
        for members in by_device.values():  # one answer is read back from each device
            peaks = torch._foreach_norm(members, math.inf)
            if not bool(torch.stack([peak.isfinite() for peak in peaks]).all()):
                self._estimates = {}
                raise OracleError(
                    f"{type(self).__name__} got {what} with NaN or infinity; nothing has been "
                    "changed. Lower lr or look at the batch."
                )

    def estimate(self, state: State) -> Tensor | None:
        """Return this step's v of a parameter."""
        return self._estimates.get(id(state))

    def finish(self, loss: Tensor | None) -> None:
        """Count the step."""
        self.param_groups[0]["time"] += 1
        self._estimates = {}

    # Of one step alone.
    _estimates: dict[int, Tensor] = {}


def spatial_mean(v: Tensor) -> Tensor:
    """Return ``|v|`` averaged over the spatial axes of a kernel ``(out, in, *kernel)``.

    What has fewer than three dimensions stays as it is.
    """
    if v.ndim < 3:
        return v
    return v.abs().mean(tuple(range(2, v.ndim)), keepdim=True).expand_as(v)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
