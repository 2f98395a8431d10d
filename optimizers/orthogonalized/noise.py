"""The gradient noise of each layer, estimated in its dual norm, and the rates that follow it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, Signal, State
from optimizers.functional import decay_
from optimizers.objective import OracleError
from optimizers.oracle import Oracle
from optimizers.orthogonalized.adamuon import AdaMuon
from optimizers.orthogonalized.dion2 import Dion2
from optimizers.orthogonalized.factors import iteration_options
from optimizers.orthogonalized.matrices import matrix_shape
from optimizers.orthogonalized.muon import Muon
from optimizers.orthogonalized.norms import BALLS, steepest, unit
from optimizers.orthogonalized.normuon import NorMuon

KINDS = ("spectral", "sign", "rms", *(ball for ball in BALLS if ball != "spectral"))
NOISE_RANGES = {
    "noise_beta": "[0, 1)",
    "alpha": "(0, inf]",
    "noise": "{previous, independent}",
}


class NoiseEstimates(Optimizer):
    """What LANTON knows of each layer's noise: see there for the rule.

    A rule calls :meth:`noise_state` in ``init_state``, takes :meth:`share` of a layer's rate in
    ``update_foreach``, and calls :meth:`remember` at its end.
    """

    # A rate depends on all layers of the group.
    scope = Scope.MODEL

    def noise_norm(self, p: Tensor, group: Group) -> str:
        """Return the norm, one of ``KINDS``, in whose dual a parameter's noise is measured."""
        raise NotImplementedError  # a rule without a norm is an error of its author

    def noise_state(self, p: Tensor, group: Group) -> State:
        """Return what the estimate of a parameter's noise starts from."""
        scalar = p.new_zeros(())
        state: State = {"noise": scalar}
        if group["noise"] == "previous":
            state["previous_grad"] = torch.zeros_like(p)
            state["has_previous"] = scalar.clone()
        return state

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Take the gradients, and from two of them each layer's noise and rate.

        Nothing is written here: what may still be refused must find the state as it was.
        """
        loss = oracle.evaluate()
        params = self._all_params()
        first = {p: p.grad for p in params}
        second: dict[Tensor, Tensor | None] = {}
        if any(group["noise"] == "independent" for group in self.param_groups):
            first = {p: g if g is None else g.clone() for p, g in first.items()}
            if oracle.evaluate() is None:
                raise OracleError(
                    f"{type(self).__name__} with noise='independent' needs two gradients at one "
                    "point. Pass a "
                    "closure that draws a mini-batch each time it is called, clears the "
                    "gradients, calls loss.backward() and returns the loss."
                )
            second = {p: p.grad for p in params}
        self._rates = {}
        self._dropped = [p for p in params if first[p] is None]
        for group in self.param_groups:
            self._plan(group, first, second)
        return loss, first.__getitem__

    def _plan(
        self, group: Group, first: dict[Tensor, Tensor | None], second: dict[Tensor, Tensor | None]
    ) -> None:
        """Compute each layer's new noise and its share of the rate."""
        kinds: dict[str, list[tuple[State, Tensor, Tensor]]] = {}
        for p in group["params"]:
            state, g = self.state[p], first[p]
            difference, present = torch.zeros_like(p, dtype=state["noise"].dtype), 0.0
            other = second.get(p) if second else state.get("previous_grad")
            usable = g is not None and other is not None and _comparable(g, p)
            if usable and g is not None and other is not None:
                difference = g.to(difference.dtype) - other.to(difference.dtype)
                present = 1.0 if second else state["has_previous"]
            weight = (1 - group["noise_beta"]) * torch.as_tensor(present).to(difference)
            kinds.setdefault(self.noise_norm(p, group), []).append((state, difference, weight))
        for kind, members in kinds.items():
            differences = [d for _, d, _ in members]
            duals = [
                (d * o).sum()
                for d, o in zip(differences, directions(differences, kind, group), strict=True)
            ]
            noises = [
                # Without a second gradient H stays: a lerp of weight zero.
                torch.lerp(state["noise"], dual.square().to(state["noise"]), weight.to(dual))
                for (state, _, weight), dual in zip(members, duals, strict=True)
            ]
            shares = [torch.rsqrt(1 + h / group["alpha"] ** 2) for h in noises]
            stacked = torch.stack([a.to(shares[0]) for a in shares])
            # A layer whose noise is not a number must not decide for the others.
            largest = torch.where(stacked.isnan(), 0, stacked).amax()
            for (state, _, _), h, a in zip(members, noises, shares, strict=True):
                self._rates[id(state)] = (h, (a / largest.to(a)).sqrt())

    def rates(self) -> list[list[Tensor]]:
        """Return each parameter's share of its group's rate, in (0, 1], as of its noise now."""
        shares = []
        for group in self.param_groups:
            own = {p: self.state[p]["noise"] / group["alpha"] ** 2 for p in group["params"]}
            lowest: dict[str, Tensor] = {}
            for p, h in own.items():
                kind = self.noise_norm(p, group)
                lowest[kind] = torch.minimum(lowest[kind], h) if kind in lowest else h
            shares.append(
                [
                    ((1 + lowest[self.noise_norm(p, group)]) / (1 + h)) ** 0.25
                    for p, h in own.items()
                ]
            )
        return shares

    def share(self, state: State) -> Tensor:
        """Return a layer's share of the rate in this step."""
        return self._rates[id(state)][1]

    def remember(self, grads: list[Tensor], states: list[State], group: Group) -> None:
        """Keep the noise of this step, and the gradients for the next one."""
        sign = -1.0 if group["maximize"] else 1.0  # the gradients come negated, D does not
        for g, state in zip(grads, states, strict=True):
            state["noise"].copy_(self._rates[id(state)][0])
            if "previous_grad" in state:
                state["previous_grad"].copy_(g).mul_(sign)
                state["has_previous"].fill_(1)

    def finish(self, loss: Tensor | None) -> None:
        """Forget the gradients of parameters that have none now."""
        for p in self._dropped:
            if "has_previous" in self.state[p]:
                self.state[p]["has_previous"].zero_()
        self._rates, self._dropped = {}, []

    # Of one step alone.
    _rates: dict[int, tuple[Tensor, Tensor]] = {}
    _dropped: list[Tensor] = []


class NoiseAdaptive(NoiseEstimates):
    r"""LANTON's rates on top of another rule for matrices: mix it in before the rule.

    A step of the rule from :math:`W` ends at :math:`W'`. Here it ends at

    .. math::
        \bar W + \sqrt{a / \max_{group} a}\; (W' - \bar W), \qquad
        \bar W = (1 - \eta\lambda) W

    with LANTON's :math:`a` of each layer's noise: the quietest layer of a group moves as the rule
    says, and all weights decay at the base rate. Where nothing is noisy, with one layer in a
    group, or with ``alpha=inf`` it is the rule, bit by bit. ``W'`` is read off the parameters, so
    a shortened step has their rounding.

    Args:
        params: See the rule; a group is a kind of layer.
        args: The rule's.
        noise_norm: In whose dual norm noise is measured, as LANTON's ``norm``; ``"spectral"`` is
            that of the orthogonalizing rules.
        noise_beta: As LANTON's.
        alpha: As LANTON's.
        noise: As LANTON's.
        options: The rule's, without ``cautious`` and ``compile``.

    State:
        The rule's, and LANTON's ``noise`` and ``previous_grad``.

    Raises:
        ValueError: For the rule's reasons, and for ``cautious`` or ``compile``.
        OracleError: If ``noise="independent"`` and no closure is given.

    Example:
        >>> import torch
        >>> from optimizers.orthogonalized import NoiseAdaptive, NorMuon
        >>> class Quiet(NoiseAdaptive, NorMuon):
        ...     pass
        >>> optimizer = Quiet([torch.nn.Parameter(torch.eye(3))], lr=0.02, alpha=0.1)

    Reference:
        Hao, Gong, Xu, Wang, Liu, "Noise-Adaptive Layerwise Learning Rates", 2025, where the rule
        is momentum and the steepest direction (:class:`LANTON`); with other rules ours.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.ranges = {**cls.ranges, **NOISE_RANGES, "noise_norm": "{" + ", ".join(KINDS) + "}"}

    def __init__(
        self,
        params: Any,
        *args: Any,
        noise_norm: str = "spectral",
        noise_beta: float = 0.9,
        alpha: float = 1e-2,
        noise: str = "previous",
        **options: Any,
    ) -> None:
        self._mixed_in = {
            "noise_norm": noise_norm,
            "noise_beta": noise_beta,
            "alpha": alpha,
            "noise": noise,
        }
        super().__init__(params, *args, **options)

    def validate(self, group: Group) -> None:
        """Refuse what cannot be combined."""
        super().validate(group)
        for option, why in (
            ("cautious", "the rule's decay must be the plain one, which is not shortened"),
            ("compile", "a layer's share of the rate is looked up by layer"),
        ):
            if group.get(option, False):
                raise ValueError(
                    f"{option} must be False in {type(self).__name__}: {why}; got "
                    f"{group[option]!r}."
                )

    def noise_norm(self, p: Tensor, group: Group) -> str:
        """Return the group's."""
        norm: str = group["noise_norm"]
        return norm

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the rule's state, and that of the noise."""
        return {**super().init_state(p, group), **self.noise_state(p, group)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter, and the share of its step."""
        start = p.clone()
        super().update(p, g, state, group)
        self._shorten_([p], [start], [g], [state], group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, and the share of each step."""
        starts = [p.clone() for p in params]
        super().update_foreach(params, grads, states, group)
        self._shorten_(params, starts, grads, states, group)

    def _shorten_(
        self,
        params: list[Tensor],
        starts: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: Group,
    ) -> None:
        decay_(starts, group["lr"], group.get("weight_decay", 0.0))
        for p, start, state in zip(params, starts, states, strict=True):
            # A share of one leaves p as it is, bit by bit.
            torch.lerp(start, p, self.share(state).to(p.dtype), out=p)
        self.remember(grads, states, group)


class NoiseAdaptiveMuon(NoiseAdaptive, Muon):
    """Muon with LANTON's layerwise rates; see :class:`NoiseAdaptive` and :class:`Muon`."""


class NoiseAdaptiveNorMuon(NoiseAdaptive, NorMuon):
    r"""NorMuon with LANTON's layerwise rates.

    NorMuon's step ends at :math:`W'`, here at :math:`\bar W + \sqrt{a / \max a}\,(W' - \bar W)`
    with :math:`\bar W = (1 - \eta\lambda) W` and LANTON's :math:`a` of each layer's noise; see
    :class:`NoiseAdaptive`, of which this is the rule on :class:`NorMuon`.

    Args:
        params: Matrices, as for NorMuon; a group is a kind of layer.
        args: NorMuon's.
        noise_norm: In whose dual norm noise is measured, as LANTON's ``norm``.
        noise_beta: In [0, 1).
        alpha: In (0, inf], in units of the dual norm: noise below it is ignored.
        noise: ``"previous"`` or ``"independent"``.
        options: NorMuon's, without ``cautious`` and ``compile``.

    State:
        NorMuon's, ``noise`` () and, for ``"previous"``, ``previous_grad`` and ``has_previous`` ().

    Raises:
        ValueError: If an option lies outside its range, or for ``cautious`` or ``compile``.

    Reference:
        Hao, Gong, Xu, Wang, Liu, "Noise-Adaptive Layerwise Learning Rates", 2025; on NorMuon (Li
        et al., 2025) ours.
    """


class NoiseAdaptiveAdaMuon(NoiseAdaptive, AdaMuon):
    """AdaMuon with LANTON's layerwise rates; see :class:`NoiseAdaptive` and :class:`AdaMuon`."""


class NoiseAdaptiveDion2(NoiseAdaptive, Dion2):
    """Dion2 with LANTON's layerwise rates; see :class:`NoiseAdaptive` and :class:`Dion2`."""


def _comparable(g: Tensor, p: Tensor) -> bool:
    """Whether the base will accept a gradient; it refuses the others, with its message."""
    return g.layout is torch.strided and g.shape == p.shape


def directions(tensors: list[Tensor], kind: str, group: Group) -> list[Tensor]:
    """Return the steepest directions in the table's norms."""
    if kind == "sign":
        return [t.sign() / max(1, t.shape[-1]) for t in tensors]
    if kind == "rms":
        return [math.sqrt(t.numel()) * unit(t, torch.linalg.vector_norm(t)) for t in tensors]
    directions = steepest(tensors, kind, iteration_options(group))
    if group.get("scaled", True) and kind == "spectral":
        for d in directions:
            _, rows, columns = matrix_shape(d.shape, group["splits"], group["flatten"])
            d.mul_(math.sqrt(rows / max(1, columns)))
    return directions
