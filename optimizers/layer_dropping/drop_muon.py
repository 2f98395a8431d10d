"""Drop-Muon: Muon that updates a random suffix of the layers and skips the rest's backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, Signal, State
from optimizers.functional import decay_, ema_
from optimizers.layer_dropping.flags import dropped_parameters, refuse_dropped
from optimizers.layer_dropping.sampling import (
    SAMPLING_RULE,
    cutoff_probabilities,
    draw_cutoff,
)
from optimizers.linalg import MUON_COEFFICIENTS, dual_norm_spectral
from optimizers.oracle import Oracle
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    as_matrices,
    check_matrices,
    choose_precision,
    matrix_shape,
    orthogonalize_all,
    polar_options,
)
from optimizers.orthogonalized.norms import BALLS, OF_MATRICES, dual_norm, steepest


class DropMuon(Optimizer):
    r"""Muon on layers ``s..b`` for a cut-off ``s`` drawn anew each step; a group is a layer.

    The layers below the cut-off keep weights and momentum, and their backward pass is not run:
    the next step's layers are drawn when a step ends, and until then the parameters of the others
    require no gradient, so the ordinary loop (zero_grad, forward, backward, step) stops at the
    cut-off by itself. Each step is cheaper and more steps are needed; on a small convolutional
    network and on ten dense layers no distribution gained time to an accuracy
    (``benchmarks/drop_muon.py``), so measure before you rely on a gain. Use it where the backward
    pass of the early layers dominates.

    The rule, for each matrix :math:`W` of an active layer with gradient :math:`G`:

    .. math::
        M &\leftarrow \mu M + (1-\mu) G \\
        O &= \mathrm{NS}(M) \\
        W &\leftarrow W - \eta\, O \quad\text{(lmo)} \\
        W &\leftarrow W - \eta\, \langle M, O\rangle\, O \quad\text{(sharp)}

    and for a vector the same in the Euclidean norm, NS(m) = m/||m||; with another ``norm`` NS and
    the factor are its steepest direction and dual norm. With the exact polar factor,
    momentum 0 and ``sharp`` steps of :math:`\eta = 1/L_i`, layer-wise smoothness gives
    :math:`E f(X^+) \le f(X) - \sum_i q_i \|\nabla_i f\|_*^2/(2L_i)` with inclusion probabilities
    :math:`q_i` (derived).

    The flags: only parameters that you left trainable are switched, and :meth:`release` (or
    leaving ``with optimizer.dropping():``) gives every flag back; do so before another optimizer
    takes the model over. To freeze a layer yourself, call ``release()`` first; the next plan
    respects your flags. Activation checkpointing must be the non-reentrant one. Construction
    switches no flag, so the first backward pass is a full one (only the planned layers are
    updated), and a checkpointer that looks at the flags sees the model as it is; before loading a
    distributed checkpoint into an optimizer that has stepped, call ``release()``.

    Args:
        params: Layers from input to output: a list of groups, or ``model.named_parameters()``
            (parameters of one module form a layer), or ``model.parameters()`` (each parameter of
            two or more dimensions begins a layer, vectors join the one before).
        lr: :math:`\eta` in [0, inf); may differ by layer. About 0.02 for ``lmo``; ``1/L_i`` for
            ``sharp``.
        momentum: :math:`\mu` in [0, 1), the weight of the old momentum.
        weight_decay: Decoupled decay of active layers, in [0, inf) (ours; the paper has none).
        sampling: ``"uniform"``, ``"full"`` (then this is Muon without Nesterov), ``"epoch_shift"``
            or the probabilities of the cut-offs, one per layer, the first one positive, or
            ``"cost_aware"``: the cheapest ones for ``smoothness``, see
            :func:`optimizers.layer_dropping.sampling.optimal_probabilities`.
        smoothness: :math:`L_i` of each layer in its norm, for ``"cost_aware"``.
        shift: Sharpness of ``"epoch_shift"``, in [0, inf).
        step_rule: ``"lmo"`` or ``"sharp"``.
        norm: Of a layer: ``"auto"`` (spectral for matrices, Euclidean for vectors), or one of
            :data:`optimizers.orthogonalized.norms.BALLS`; may differ by layer.
        seed: Of the draws. All ranks must share it, and do by default.
        ns_coefficients: As for :class:`Muon`, with ``eps, eps_mode, ns_steps, ns_dtype, polar``.
        eps: See :class:`Muon`.
        ns_steps: See :class:`Muon`.
        eps_mode: See :class:`Muon`.
        ns_dtype: See :class:`Muon`.
        polar: See :class:`Muon`.
        maximize: Ascend instead of descend.
        foreach: ``False`` loops, otherwise equal shapes within a layer are batched.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape; zero at the start (the paper
        leaves the first value open). In ``param_groups[0]``: ``cutoff`` (the plan), ``draws``.

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Gruntkowska, Maziane, Qu, Richtárik, "Drop-Muon: Update Less, Converge Faster", 2025,
        algorithm 1 with randomized progressive training.
    """

    scope = Scope.LAYER
    ranges = {
        "lr": "[0, inf)",
        "momentum": "[0, 1)",
        "weight_decay": "[0, inf)",
        "sampling": SAMPLING_RULE,
        "smoothness": "list of (0, inf) or None",
        "shift": "[0, inf)",
        "step_rule": "{lmo, sharp}",
        "norm": "{auto, " + ", ".join(BALLS) + "}",
        "seed": "int [0, inf)",
        "progress": "[0, 1]",
        **{name: rule for name, rule in POLAR_RANGES.items() if name not in ("splits", "flatten")},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        sampling: str | Sequence[float] = "uniform",
        smoothness: Sequence[float] | None = None,
        shift: float = 0.5,
        step_rule: str = "lmo",
        norm: str = "auto",
        seed: int = 0,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        eps_mode: str = "clamp",
        ns_dtype: torch.dtype | str = "auto",
        polar: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            as_layers(params),
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "sampling": sampling,
                "smoothness": smoothness,
                "shift": shift,
                "step_rule": step_rule,
                "norm": norm,
                "seed": seed,
                "progress": 0.0,
                "cutoff": -1,
                "draws": 0,
                **polar_options(
                    polar=polar,
                    ns_steps=ns_steps,
                    ns_dtype=ns_dtype,
                    ns_coefficients=ns_coefficients,
                    eps=eps,
                    eps_mode=eps_mode,
                ),
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    # ------------------------------------------------------------------ the plan

    @property
    def probabilities(self) -> list[float]:
        """The probability of each layer to be the cut-off, as of now."""
        plan = self.param_groups[0]
        return cutoff_probabilities(
            plan["sampling"],
            len(self.param_groups),
            progress=plan["progress"],
            shift=plan["shift"],
            smoothness=plan["smoothness"],
        )

    def active(self) -> list[int]:
        """Return the layers that the next step updates."""
        return list(range(self.param_groups[0]["cutoff"], len(self.param_groups)))

    def set_progress(self, progress: float) -> None:
        """Tell ``"epoch_shift"`` which part of the training is done; the next draw uses it.

        Raises:
            ValueError: If ``progress`` lies outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1]; got {progress!r}.")
        self.param_groups[0]["progress"] = float(progress)

    def release(self) -> None:
        """Give back every ``requires_grad`` flag; the next step's end drops layers again."""
        for group in self.param_groups:
            for p, dropped in zip(group["params"], group.get("_dropped", ()), strict=False):
                if dropped:
                    p.requires_grad_(True)
                    if p in dropped_parameters:
                        del dropped_parameters[p]
            group["_dropped"] = [False] * len(group["params"])

    @contextmanager
    def dropping(self) -> Iterator[DropMuon]:
        """Return a context that drops layers inside and gives every flag back on leaving."""
        self._set_flags()
        try:
            yield self
        finally:
            self.release()

    def validate(self, group: Group) -> None:
        """Refuse matrix norms of vectors, and what another optimizer has switched off."""
        if group["norm"] in OF_MATRICES:
            check_matrices(group, f"DropMuon with norm={group['norm']!r}")
        own = {
            id(p)
            for g in getattr(self, "param_groups", ())
            for p, dropped in zip(g["params"], g.get("_dropped", ()), strict=False)
            if dropped
        }
        refuse_dropped([p for p in group["params"] if id(p) not in own])

    def prepare(self) -> None:
        """Check the probabilities against the layers, draw if nothing is planned, set flags."""
        choose_precision(self.param_groups)
        plan = self.param_groups[0]
        p = self.probabilities
        if not 0 <= plan["cutoff"] < len(self.param_groups):
            plan["cutoff"] = draw_cutoff(p, plan["seed"], plan["draws"])
        if plan["draws"] > 0:
            self._set_flags()
        else:
            self.release()

    def finish(self, loss: Tensor | None) -> None:
        """Draw the next step's cut-off and switch the flags."""
        plan = self.param_groups[0]
        plan["draws"] += 1
        plan["cutoff"] = draw_cutoff(self.probabilities, plan["seed"], plan["draws"])
        self._set_flags()

    def _set_flags(self) -> None:
        self.release()
        trainable = [
            i for i, g in enumerate(self.param_groups) if any(p.requires_grad for p in g["params"])
        ]
        # Some layer must keep its graph, or backward() has nothing to do and raises.
        last = max(trainable, default=0)
        for group in self.param_groups[: min(self.param_groups[0]["cutoff"], last)]:
            # Only what the user left trainable is switched off, and remembered.
            group["_dropped"] = [p.requires_grad for p in group["params"]]
            for p in group["params"]:
                if p.requires_grad:
                    p.requires_grad_(False)
                    dropped_parameters[p] = True

    # ------------------------------------------------------------------ the rule

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Take the gradients of the active layers; a dropped layer's stale one is not used."""
        active = {id(p) for i in self.active() for p in self.param_groups[i]["params"]}
        return oracle.evaluate(), lambda p: p.grad if id(p) in active else None

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the momentum, at zero."""
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        m = state["momentum_buffer"]
        m.lerp_(g, 1 - group["momentum"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        (direction,) = _directions([m], group)
        p.sub_(group["lr"] * direction)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for a whole layer."""
        ms = [s["momentum_buffer"] for s in states]
        ema_(ms, grads, group["momentum"])
        decay_(params, group["lr"], group["weight_decay"])
        steps = _directions(ms, group)
        torch._foreach_sub_(params, torch._foreach_mul(steps, group["lr"]))


def as_layers(params: Any) -> Any:
    """Return parameters as groups, one for each layer, from input to output."""
    if isinstance(params, (Tensor, torch.nn.Module)):
        return params  # refused by the base, with its message
    entries = list(params)
    if not entries or isinstance(entries[0], dict):
        return entries
    layers: list[tuple[str | None, list[Any]]] = []
    for entry in entries:
        if isinstance(entry, tuple):
            module = entry[0].rpartition(".")[0]
            begins = not layers or layers[-1][0] != module
        else:
            module, begins = None, not layers or getattr(entry, "ndim", 2) >= 2
        if begins:
            layers.append((module, []))
        layers[-1][1].append(entry)
    return [{"params": members} for _, members in layers]


def _is_matrix(p: Tensor) -> bool:
    if p.ndim < 2:
        return False
    _, rows, columns = matrix_shape(p.shape)
    return rows * columns > 1


def _directions(momenta: list[Tensor], group: Group) -> list[Tensor]:
    """Return each parameter's step before the rate, in the momentum's dtype."""
    sharp = group["step_rule"] == "sharp"
    if (norm := group["norm"]) != "auto":
        directions = steepest(momenta, norm, group)
        if not sharp:
            return directions
        pairs = zip(momenta, directions, strict=True)
        return [dual_norm(m, norm, d, group) * d for m, d in pairs]
    matrices = [i for i, m in enumerate(momenta) if _is_matrix(m)]
    factors = orthogonalize_all([momenta[i] for i in matrices], group)
    directions = list(momenta)
    for i, factor in zip(matrices, factors, strict=True):
        factor = factor.to(momenta[i].dtype)
        if sharp:
            m, o = as_matrices(momenta[i]), as_matrices(factor)
            factor = (dual_norm_spectral(m, o)[..., None, None] * o).reshape(factor.shape)
        directions[i] = factor
    if not sharp:
        for i, m in enumerate(momenta):
            if not _is_matrix(m):
                norm = torch.linalg.vector_norm(m)
                # The zero vector has no direction: 0/1, without reading the norm.
                directions[i] = m / torch.where(norm > 0, norm, 1)
    return directions
