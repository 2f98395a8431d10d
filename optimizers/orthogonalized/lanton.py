"""LANTON: layerwise rates that follow each layer's gradient noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, Signal, State
from optimizers.functional import decay_, ema_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.objective import OracleError
from optimizers.oracle import Oracle
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    check_matrices,
    choose_precision,
    matrix_shape,
    polar_options,
)
from optimizers.orthogonalized.norms import BALLS, OF_MATRICES, is_matrix, steepest, unit

KINDS = ("spectral", "sign", "rms", *(ball for ball in BALLS if ball != "spectral"))


class LANTON(Optimizer):
    r"""Steps of a norm ball, shorter for layers whose gradients are noisier than their group's.

    A noisy layer that moves as far as a quiet one never settles. Here each layer's noise is
    estimated in the dual of its own norm, and within a group the quietest layer gets the full
    rate. It pays where noisy layers have less to travel; where all have to travel as far, a fixed
    rate does as well (tested, both). A group is a kind of layer: put layers together whose noise
    may be compared, ideally of one shape, for a nuclear norm grows with the matrix.

    The rule, for each layer :math:`X` with gradient :math:`G_t`, in two passes over a group:

    .. math::
        B &\leftarrow \beta_1 B + (1-\beta_1) G_t, \qquad O = d(B) \\
        H &\leftarrow \beta_2 H + (1-\beta_2) \|G_t - G'\|_*^2 \\
        a &= \alpha / \sqrt{\alpha^2 + H}, \qquad
        \eta_\ell = \eta \sqrt{a / \max_{group} a} \\
        X &\leftarrow (1 - \eta\lambda) X - \eta_\ell O

    where :math:`G'` is the step before's gradient (``"previous"``) or that of another mini-batch
    at the same point (``"independent"``). For :math:`H \gg \alpha^2` the rates go like the noise's
    standard deviation to the power -1/2.

    ==============  ===============================  ==============================
    ``norm``        d(B)                             dual norm
    ``spectral``    :math:`s\, UV^\top`,             :math:`s \|D\|_{nuc}`
                    :math:`s=\sqrt{d_{out}/d_{in}}`
    ``sign``        :math:`\mathrm{sign}(B)/d_{in}`  :math:`\sum|D|/d_{in}`
    ``rms``         :math:`\sqrt n\, B/\|B\|_2`      :math:`\sqrt n \|D\|_2`
    ==============  ===============================  ==============================

    Clipping by a changing factor, and what accumulates between steps, shows up as noise.

    Args:
        params: Parameters; a group is a kind of layer.
        lr: :math:`\eta` in [0, inf).
        norm: ``"spectral"``, ``"sign"`` (embeddings, heads), ``"rms"`` (vectors), ``"auto"``
            (spectral for matrices and rms for vectors, compared apart), or an unscaled ball of
            :class:`NonEuclideanTrustRegion`: ``"frobenius"``, ``"linf"``, ``"l1"``, ``"column"``,
            ``"row"``.
        momentum: :math:`\beta_1` in [0, 1).
        noise_beta: :math:`\beta_2` in [0, 1).
        alpha: :math:`\alpha` in (0, inf], in units of the dual norm: noise below it is ignored,
            and ``inf`` switches the adaptation off. The published value is not known.
        noise: ``"previous"``, or ``"independent"``: then ``step(closure)`` calls the closure twice,
            and it must draw another mini-batch each time.
        weight_decay: Decoupled, in [0, inf), at the base rate.
        scaled: Whether the spectral norm has the factor :math:`s`.
        polar: Back-end of the polar factor, of B and of D; see :class:`Muon`.
        ns_coefficients: See :class:`Muon`.
        ns_steps: See :class:`Muon`.
        ns_dtype: See :class:`Muon`.
        splits: See :class:`Muon`.
        flatten: See :class:`Muon`.
        maximize: Ascend instead of descend.
        foreach: ``False`` loops, otherwise parameters are batched.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape, ``noise`` () (H), and for
        ``"previous"`` also ``previous_grad`` and ``has_previous`` (), all at least float32. A
        parameter without a gradient keeps H and drops its previous gradient, which would measure
        drift.

    Raises:
        ValueError: If an option lies outside its range or a matrix norm is asked of a vector.
        OracleError: If ``noise="independent"`` and no closure is given.

    Reference:
        Hao, Gong, Xu, Wang, Liu, "Noise-Adaptive Layerwise Learning Rates: Accelerating
        Geometry-Aware Optimization for Deep Neural Network Training", 2025. B and H start at zero
        and the first step updates no H (ours; the paper was not available in full, and the form
        of a is a reconstruction). With a Newton-Schulz back-end the dual norm is
        :math:`\langle D, d(D)\rangle`.
    """

    # A rate depends on all layers of the group.
    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "norm": "{auto, " + ", ".join(KINDS) + "}",
        "momentum": "[0, 1)",
        "noise_beta": "[0, 1)",
        "alpha": "(0, inf]",
        "noise": "{previous, independent}",
        "weight_decay": "[0, inf)",
        "scaled": "bool",
        **POLAR_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        norm: str = "auto",
        momentum: float = 0.95,
        noise_beta: float = 0.9,
        alpha: float = 1e-2,
        noise: str = "previous",
        weight_decay: float = 0.1,
        scaled: bool = True,
        polar: str = "auto",
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | str = "auto",
        splits: int = 1,
        flatten: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "norm": norm,
                "momentum": momentum,
                "noise_beta": noise_beta,
                "alpha": alpha,
                "noise": noise,
                "weight_decay": weight_decay,
                "scaled": scaled,
                "maximize": maximize,
                "foreach": foreach,
                **polar_options(
                    polar=polar,
                    ns_coefficients=ns_coefficients,
                    ns_steps=ns_steps,
                    ns_dtype=ns_dtype,
                    splits=splits,
                    flatten=flatten,
                ),
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse matrix norms of vectors."""
        if group["norm"] in OF_MATRICES or group["norm"] == "sign":
            check_matrices(group, f"LANTON with norm={group['norm']!r}")

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the average and the noise, at zero."""
        scalar = p.new_zeros(())
        state: State = {"momentum_buffer": torch.zeros_like(p), "noise": scalar}
        if group["noise"] == "previous":
            state["previous_grad"] = torch.zeros_like(p)
            state["has_previous"] = scalar.clone()
        return state

    # ------------------------------------------------------------------ the rates

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
                    "LANTON with noise='independent' needs two gradients at one point. Pass a "
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
            difference, present = torch.zeros_like(state["momentum_buffer"]), 0.0
            other = second.get(p) if second else state.get("previous_grad")
            usable = g is not None and other is not None and _comparable(g, p)
            if usable and g is not None and other is not None:
                difference = g.to(difference.dtype) - other.to(difference.dtype)
                present = 1.0 if second else state["has_previous"]
            weight = (1 - group["noise_beta"]) * torch.as_tensor(present).to(difference)
            kinds.setdefault(_kind(p, group), []).append((state, difference, weight))
        for kind, members in kinds.items():
            differences = [d for _, d, _ in members]
            duals = [
                (d * o).sum()
                for d, o in zip(differences, _directions(differences, kind, group), strict=True)
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
                kind = _kind(p, group)
                lowest[kind] = torch.minimum(lowest[kind], h) if kind in lowest else h
            shares.append(
                [((1 + lowest[_kind(p, group)]) / (1 + h)) ** 0.25 for p, h in own.items()]
            )
        return shares

    # ------------------------------------------------------------------ the rule

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        self.update_foreach([p], [g], [state], group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters; equal shapes share one polar iteration."""
        momenta = [s["momentum_buffer"] for s in states]
        ema_(momenta, grads, group["momentum"])
        decay_(params, group["lr"], group["weight_decay"])
        sign = -1.0 if group["maximize"] else 1.0  # the gradients come negated, D does not
        kinds: dict[str, list[int]] = {}
        for i, p in enumerate(params):
            kinds.setdefault(_kind(p, group), []).append(i)
        for kind, members in kinds.items():
            own = _directions([momenta[i] for i in members], kind, group)
            for i, d in zip(members, own, strict=True):
                noise, share = self._rates[id(states[i])]
                params[i].sub_(group["lr"] * share * d)
                states[i]["noise"].copy_(noise)
                if "previous_grad" in states[i]:
                    states[i]["previous_grad"].copy_(grads[i]).mul_(sign)
                    states[i]["has_previous"].fill_(1)

    def finish(self, loss: Tensor | None) -> None:
        """Forget the gradients of parameters that have none now."""
        for p in self._dropped:
            if "has_previous" in self.state[p]:
                self.state[p]["has_previous"].zero_()
        self._rates, self._dropped = {}, []

    # Of one step alone.
    _rates: dict[int, tuple[Tensor, Tensor]] = {}
    _dropped: list[Tensor] = []


def _comparable(g: Tensor, p: Tensor) -> bool:
    """Whether the base will accept a gradient; it refuses the others, with its message."""
    return g.layout is torch.strided and g.shape == p.shape


def _kind(p: Tensor, group: Group) -> str:
    """Return the norm of a parameter."""
    norm: str = group["norm"]
    if norm != "auto":
        return norm
    splits = group["splits"] if p.ndim == 2 else 1
    return "spectral" if is_matrix(p, splits, group["flatten"]) else "rms"


def _directions(tensors: list[Tensor], kind: str, group: Group) -> list[Tensor]:
    """Return the steepest directions in the table's norms."""
    if kind == "sign":
        return [t.sign() / max(1, t.shape[-1]) for t in tensors]
    if kind == "rms":
        return [math.sqrt(t.numel()) * unit(t, torch.linalg.vector_norm(t)) for t in tensors]
    directions = steepest(tensors, kind, group)
    if group["scaled"] and kind == "spectral":
        for d in directions:
            _, rows, columns = matrix_shape(d.shape, group["splits"], group["flatten"])
            d.mul_(math.sqrt(rows / max(1, columns)))
    return directions
