"""K-FAC: gradients preconditioned by a Kronecker product for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Needs, Optimizer, Scope, Signal, State
from optimizers.objective import Objective
from optimizers.oracle import Oracle
from optimizers.second_order.kfac_factors import Spectrum, check_finite, decompose
from optimizers.second_order.kfac_kinds import find_layers
from optimizers.second_order.kfac_layers import COLUMN, ROW, UNIT, Layer
from optimizers.second_order.kfac_slopes import evaluate, explained

_SHARED = ("kl_clip", "factor_update_steps", "inverse_update_steps", "fisher", "loss", "seed")
# What ``status`` says of a layer.
_PASSED, _ALONE, _COUPLED = 0, 1, 2


@dataclass
class _Plan:
    """What becomes of one layer in this step.

    Attributes:
        layer: The layer.
        state: Its weight's.
        factors: Its averages after this step, where they change.
        status: After this step.
        kept: New eigendecompositions, to be stored.
    """

    layer: Layer
    state: State
    factors: dict[str, Tensor]
    status: int
    kept: dict[str, Spectrum] = field(default_factory=dict)

    @property
    def present(self) -> dict[str, Tensor]:
        """Its factors after this step."""
        state: dict[str, Tensor] = self.state
        return {name: self.factors.get(name, state[name]) for name in self.layer.factors}


class KFAC(Optimizer):
    r"""SGD with momentum on gradients preconditioned by K-FAC, the empirical Fisher by default.

    Use it where few, well scaled steps count and layers are linear or convolutional, up to some
    thousand units wide: a step costs one eigendecomposition for each side of each weight, unless
    ``inverse_update_steps`` spares it. It evaluates the loss itself: with
    ``objective = Objective(model, loss_fn)``, call ``optimizer.step(objective.on(inputs,
    targets))``. Layers are found in the Objective's model at each step and are watched during its
    evaluation alone. Gradients of several batches or processes are not joined.

    The rule, for a layer with input rows :math:`a` (with a 1 for the bias), slopes :math:`g` of the
    mean loss in its outputs, and the gradient :math:`\nabla = [\nabla_W | \nabla_b]`:

    .. math::
        A &\leftarrow \rho A + (1 - \rho)\,\mathrm{mean}(a a^\top), \qquad
        G \leftarrow \rho G + (1 - \rho)\,\mathrm{mean}(g g^\top), \qquad A_0 = G_0 = I \\
        A &= Q_A \mathrm{diag}(d_A) Q_A^\top, \quad G = Q_G \mathrm{diag}(d_G) Q_G^\top,
        \qquad d \ge 0 \\
        V &= Q_G \bigl[(Q_G^\top \nabla Q_A) / (d_G d_A^\top + \gamma)\bigr] Q_A^\top \\
        \nu &= \min\bigl(1, \sqrt{\kappa / |\textstyle\sum \mathrm{lr}^2
        \langle V, \nabla\rangle|}\bigr) \\
        m &\leftarrow \mu m + \nu V + \lambda w, \qquad w \leftarrow w - \mathrm{lr}\, m

    The sum is over all preconditioned layers. Hence (derived) without momentum and decay the step
    :math:`\delta` obeys :math:`\delta^\top (F + \gamma I)\,\delta =
    \nu^2 \sum \mathrm{lr}^2 \langle V, \nabla\rangle \le \kappa`, where F has the blocks
    :math:`A \otimes G` as last decomposed.

    Slopes of a mean over ``b`` samples carry ``1/b`` and G carries :math:`1/b^2`: the damping acts
    like :math:`b^2\gamma` on a Fisher matrix of samples, so it depends on the batch size, and where
    F is far below :math:`\gamma` the rule is SGD with the step :math:`\mathrm{lr}/\gamma`, held by
    the clip.

    What is preconditioned:

    * ``Linear``: every vector that enters is a row, positions of a sequence included.
    * ``Conv1d``, ``Conv2d``: a row is what one position sees; a and g are divided by the number of
      positions. Groups share one A, the mean over them, and G has no entries between groups.
    * ``Embedding``: A is diagonal, the frequencies; entries at ``padding_idx`` are rows of zeros.
    * ``LayerNorm``, ``RMSNorm`` (over one dimension), ``GroupNorm``, ``BatchNorm``: for each
      channel the exact 2 x 2 Fisher matrix of scale and shift, with gradients summed over the
      positions of a sample (first dimension).
    * A layer that is used several times pools the rows of all uses.

    Everything else gets plain SGD with momentum, without factor :math:`\nu`: other modules, weights
    that two modules share, biases whose weight is not in the optimizer, and layers whose rows do
    not give the gradient (this is checked whenever factors are refreshed; it is so for weights that
    are also used outside of their layer, or behind hooks that change the output). Where only the
    weight or only the bias is trained, the other's part of A is left out. What took no part in the
    loss is left alone.

    Args:
        params: Parameters or groups; sharded and complex ones are refused.
        lr: In [0, inf).
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda` in [0, inf), added to the preconditioned gradient.
        damping: :math:`\gamma` in [0, inf). With 0, directions in which a factor is singular (to
            rounding) do not move.
        factor_decay: :math:`\rho` in [0, 1].
        kl_clip: :math:`\kappa` in (0, inf), or ``None`` not to clip.
        factor_update_steps: Steps between refreshes of the factors, an int from 1 on.
        inverse_update_steps: Steps between eigendecompositions, an int from 1 on. From 2 on they
            are kept in the state. Diagonal and 2 x 2 factors are used as they are.
        fisher: Which slopes make G. ``"empirical"``: those of the loss itself, with the data's
            labels; that is no natural gradient. ``"sampled"``: those for labels that the model's
            own distribution draws. ``"exact"``: all columns of a root of the loss's Hessian in the
            outputs, one more backward pass for each output. The last two make G that of the
            Gauss-Newton matrix (over :math:`b^2`), in expectation or exactly.
        loss: For the last two, what the Objective's loss is; ``None`` reads it from torch's
            ``cross_entropy``, ``binary_cross_entropy_with_logits`` and ``mse_loss``; else
            ``"cross_entropy"``, ``"bce"``, ``"mse"`` or ``"half_mse"``.
        max_side: An int from 0 on; the factor of a longer side keeps its diagonal alone. Memory
            is taken for every weight before its layer is known: for large embeddings, and what is
            not preconditioned, make a group with a smaller one.
        seed: Of sampled labels, an int from 0 on.

    State:
        ``step`` (); with momentum ``momentum_buffer``, of the parameter's shape. For weights
        ``(o, ...)`` with n elements in a row: ``row_factor`` (o, o) (G; of an embedding A),
        ``column_factor`` (n + 1, n + 1) (A; of an embedding G), of a side above ``max_side`` its
        diagonal; with ``inverse_update_steps`` > 1 ``..._basis`` and ``..._values`` of each. For
        vectors of c elements ``unit_factor`` (c, 2, 2). ``status``, an int: 0 if the weight's
        gradient is passed through, 1 if it is preconditioned, 2 if together with its bias. At least
        float32. In ``param_groups[0]``: ``time``, the count of steps.

    Raises:
        ValueError: If an option lies outside its range, or groups differ in what all share.
        OracleError: If the loss has no gradient, loss, gradients, factors or directions are not
            finite, or the loss cannot be read where its distribution is needed. Parameters and
            state stay; running statistics of the model have seen the batch.

    Reference:
        Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", ICML 2015; Grosse, Martens, "A Kronecker-factored Approximate Fisher Matrix for
        Convolution Layers", ICML 2016; in the form of Pauloski et al., "Convolutional Neural
        Network Training with Distributed K-FAC", SC 2020 (one damping of the products, clip).
        Groups of convolutions, embeddings, normalisations, ``"exact"`` and ``max_side`` are ours
        to add.
    """

    needs = Needs.OUTPUTS
    scope = Scope.MODEL
    ranges = {
        "momentum": "[0, 1)",
        "weight_decay": "[0, inf)",
        "damping": "[0, inf)",
        "factor_decay": "[0, 1]",
        "kl_clip": "(0, inf) or None",
        "factor_update_steps": "int [1, inf)",
        "inverse_update_steps": "int [1, inf)",
        "fisher": "{empirical, sampled, exact}",
        "loss": "{cross_entropy, bce, mse, half_mse} or None",
        "max_side": "int [0, inf)",
        "seed": "int [0, inf)",
    }

    # From probe to finish.
    _plans: Sequence[_Plan] = ()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 0.001,
        factor_decay: float = 0.95,
        kl_clip: float | None = 0.001,
        *,
        factor_update_steps: int = 1,
        inverse_update_steps: int = 1,
        fisher: str = "empirical",
        loss: str | None = None,
        max_side: int = 8192,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "damping": damping,
                "factor_decay": factor_decay,
                "kl_clip": kl_clip,
                "factor_update_steps": factor_update_steps,
                "inverse_update_steps": inverse_update_steps,
                "fisher": fisher,
                "loss": loss,
                "max_side": max_side,
                "seed": seed,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse a group that disagrees with the others."""
        ranges.check_all(group, {"time": "int [0, inf)"})
        groups = getattr(self, "param_groups", ())
        if any(group is other for other in groups):  # loaded ones are compared at the step
            ranges.check_alike(groups, _SHARED, "share one evaluation")

    def prepare(self) -> None:
        """Let the count of steps start."""
        self.param_groups[0].setdefault("time", 0)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the factors that the shape has room for, at the identity."""
        state: State = {}
        if group["momentum"] > 0:
            state["momentum_buffer"] = torch.zeros_like(p)
        one = p.new_ones(())
        if p.ndim == 1:
            state[UNIT] = torch.diag(one.expand(2)).repeat(len(p), 1, 1)
        elif p.ndim > 1:
            sides = {ROW: len(p), COLUMN: math.prod(p.shape[1:]) + 1}
            for name, size in sides.items():
                if size > group["max_side"]:
                    state[name] = one.repeat(size)
                    continue
                state[name] = torch.diag(one.expand(size))
                if group["inverse_update_steps"] > 1:
                    state[f"{name}_basis"] = state[name].clone()
                    state[f"{name}_values"] = one.repeat(size)
        if p.ndim:
            state["status"] = _PASSED
        return state

    # ------------------------------------------------------------------ what is asked

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Evaluate once, average the factors and precondition; nothing is written."""
        self._plans = ()
        ranges.check_alike(self.param_groups, _SHARED, "share one evaluation")
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, group in groups.items():
            _check_state(self.state[p], group)
        oracle.objective.names(list(groups))  # refuses parameters of another model
        loss, signals, plans = self._observe(oracle.objective, groups)
        live = [plan for plan in plans if plan.status != _PASSED]
        products, made = [], []
        for plan, spectra in zip(live, self._spectra(live), strict=True):
            layer = plan.layer
            own = [signals[p] for p in layer.trained]
            parts = dict(zip(map(id, layer.trained), own, strict=True))
            directions = layer.direction(
                parts.get(id(layer.weight)),
                parts.get(id(layer.bias)),
                layer.spectra(plan.present, spectra),
                groups[layer.weight]["damping"],
            )
            for p, g, v in zip(layer.trained, own, directions, strict=True):
                products.append(groups[p]["lr"] ** 2 * (v * g.to(v.dtype)).sum())
                signals[p] = v
                made.append(v)
        clip = self.param_groups[0]["kl_clip"]
        if products and clip is not None:
            total = torch.stack([product.to(products[0]) for product in products]).sum()
            products.append(total)
            scale = (clip / total.abs()).sqrt().clamp(max=1)
            for v in made:
                v.mul_(scale.to(v))
        changed = [factor for plan in plans for factor in plan.factors.values()]
        check_finite([loss, *signals.values(), *changed, *products], type(self).__name__)
        self._plans = plans
        return loss, signals.get

    def _observe(
        self, objective: Objective, groups: dict[Tensor, Group]
    ) -> tuple[Tensor, dict[Tensor, Tensor], list[_Plan]]:
        """Return loss, gradients of what took part, and what becomes of each layer."""
        first, trained = self.param_groups[0], [p for p in groups if p.requires_grad]
        layers = find_layers(objective.model, list(groups))
        refresh = first["time"] % first["factor_update_steps"] == 0
        loss, grads, evidence = evaluate(
            objective,
            trained,
            layers if refresh else [],
            fisher=first["fisher"],
            declared=first["loss"],
            key=(first["seed"], first["time"]),
            rule=type(self).__name__,
        )
        found = {p: g for p, g in zip(trained, grads, strict=True) if g is not None}
        # What took no part is left alone.
        layers = [layer for layer in layers if all(p in found for p in layer.trained)]
        if not refresh:
            known = [(layer, self.state[layer.weight]) for layer in layers]
            plans = [_Plan(layer, s, {}, _status(layer)) for layer, s in known if s["status"]]
            return loss, found, plans
        moments = []
        for layer in layers:
            seen = evidence.get(id(layer))
            moments.append(layer.collect(seen, self.state[layer.weight]) if seen else None)
        sound = explained(layers, moments, found)
        plans = []
        for layer, told, right in zip(layers, moments, sound, strict=True):
            state, rho = self.state[layer.weight], groups[layer.weight]["factor_decay"]
            if told is None or not right:
                plans.append(_Plan(layer, state, {}, _PASSED))
                continue
            factors = {
                name: rho * _part(state[name], mean) + (1 - rho) * mean
                for name, mean in told.means.items()
            }
            plans.append(_Plan(layer, state, factors, _status(layer)))
        return loss, found, plans

    def _spectra(self, plans: Sequence[_Plan]) -> list[dict[str, Spectrum]]:
        """Return the eigendecompositions of each layer, new ones where they are due."""
        found: list[dict[str, Spectrum]] = [{} for _ in plans]
        wanted = []
        for k, plan in enumerate(plans):
            for name, factor in plan.layer.matrices(plan.present).items():
                if name == UNIT or self._is_due(plan):
                    wanted.append((k, name, factor))
                else:
                    state = plan.state
                    found[k][name] = Spectrum(state[f"{name}_values"], state[f"{name}_basis"])
        new = decompose([factor for _, _, factor in wanted])
        for (k, name, _), (values, basis) in zip(wanted, new, strict=True):
            assert basis is not None
            one = name != UNIT
            found[k][name] = Spectrum(values[0], basis[0]) if one else Spectrum(values, basis)
            if f"{name}_basis" in plans[k].state:
                plans[k].kept[name] = found[k][name]
        return found

    def _is_due(self, plan: _Plan) -> bool:
        first = self.param_groups[0]
        return bool(
            first["time"] % first["inverse_update_steps"] == 0
            or plan.status != plan.state["status"]  # the kept basis is of another matrix
        )

    # ------------------------------------------------------------------ the rule

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Take the step of SGD with momentum along the preconditioned gradient."""
        if group["weight_decay"] != 0:
            g = g + group["weight_decay"] * p
        if group["momentum"] > 0:
            g = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
        p.sub_(group["lr"] * g)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The same for all tensors at once."""
        if group["weight_decay"] != 0:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        if group["momentum"] > 0:
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_sub_(params, torch._foreach_mul(grads, group["lr"]))

    def finish(self, loss: Tensor | None) -> None:
        """Keep the factors and their eigenvectors."""
        for plan in self._plans:
            state = plan.state
            for name, factor in plan.factors.items():
                _part(state[name], factor).copy_(factor)
            for name, spectrum in plan.kept.items():
                state[f"{name}_values"].copy_(spectrum.values)
                state[f"{name}_basis"].copy_(spectrum.basis)
            state["status"] = plan.status
        self._plans = ()
        self.param_groups[0]["time"] += 1


def _status(layer: Layer) -> int:
    return _COUPLED if layer.coupled else _ALONE


def _part(stored: Tensor, factor: Tensor) -> Tensor:
    """Return the part of a stored factor that changes: of an embedding's matrix the diagonal."""
    return stored.diagonal() if factor.ndim < stored.ndim else stored


def _check_state(state: State, group: Group) -> None:
    """Refuse options that ask for state which a running optimizer lacks."""
    if group["momentum"] > 0 and "momentum_buffer" not in state:
        raise ValueError(
            f"momentum must be positive from the start to be used; got {group['momentum']} in a "
            "running KFAC. Build a new one with this momentum; OneCycleLR and CyclicLR set it by "
            "themselves unless cycle_momentum=False."
        )
    square = [name for name in (ROW, COLUMN) if name in state and state[name].ndim == 2]
    if group["inverse_update_steps"] > 1 and any(f"{name}_basis" not in state for name in square):
        raise ValueError(
            "inverse_update_steps must be above 1 from the start to be used; got "
            f"{group['inverse_update_steps']} in a running KFAC, which keeps no eigenvectors. "
            "Build a new one with it."
        )
