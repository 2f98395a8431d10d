"""LANTON: layerwise rates that follow each layer's gradient noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, State
from optimizers.functional import decay_, ema_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    check_matrices,
    choose_precision,
    polar_options,
)
from optimizers.orthogonalized.noise import KINDS, NOISE_RANGES, NoiseEstimates, directions
from optimizers.orthogonalized.norms import OF_MATRICES, is_matrix


class LANTON(NoiseEstimates):
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

    ranges = {
        "lr": "[0, inf)",
        "norm": "{auto, " + ", ".join(KINDS) + "}",
        "momentum": "[0, 1)",
        "weight_decay": "[0, inf)",
        "scaled": "bool",
        **NOISE_RANGES,
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
        return {"momentum_buffer": torch.zeros_like(p), **self.noise_state(p, group)}

    def noise_norm(self, p: Tensor, group: Group) -> str:
        """Return the norm of a parameter."""
        norm: str = group["norm"]
        if norm != "auto":
            return norm
        splits = group["splits"] if p.ndim == 2 else 1
        return "spectral" if is_matrix(p, splits, group["flatten"]) else "rms"

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
        kinds: dict[str, list[int]] = {}
        for i, p in enumerate(params):
            kinds.setdefault(self.noise_norm(p, group), []).append(i)
        for kind, members in kinds.items():
            own = directions([momenta[i] for i in members], kind, group)
            for i, d in zip(members, own, strict=True):
                params[i].sub_(group["lr"] * self.share(states[i]) * d)
        self.remember(grads, states, group)
