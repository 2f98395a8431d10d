"""Cyclic block coordinate descent, deterministic (P-CCD) or variance-reduced (VR-CCD)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from optimizers.base import Group, Needs, Optimizer, Scope, Signal, State
from optimizers.layer_dropping.draws import draw_small_batch, random_states, replaying
from optimizers.layer_dropping.drop_muon import as_layers
from optimizers.layer_dropping.flags import refuse_dropped, switched_off
from optimizers.linalg.prox import project_box, prox_group, prox_l1
from optimizers.objective import OracleError
from optimizers.oracle import Oracle, restored

_SHARED = ("small_batch", "refresh_prob", "coin", "seed")


class CyclicBCD(Optimizer):
    r"""Proximal gradient steps on one block (layer) after another, with PAGE's estimator.

    Use it for composite problems (l1, box, row sparsity) whose blocks differ in scale, each with
    its own ``lr``, and for finite sums that must be solved below the noise floor of SGD. Do not
    expect a gain in ordinary network training: on a digits network it does no better than the same
    rule without small batches at equal work, and it diverges at rates that SGD bears (both
    tested), because its correction is only as good as the gradient is smooth. A cycle costs one
    forward pass for each block, two on small batches, and backward passes that stop at the block:
    the other blocks require no gradient meanwhile.

    Minimises :math:`f(x) + \sum_j r_j(x^j)`. Let :math:`x_{k,j}` hold the new blocks
    :math:`1..j-1` of cycle k and the old blocks :math:`j..m`. In turn, for every block:

    .. math::
        g^j &= \nabla^j f_B(x_{k,j}) \quad\text{with probability } p \text{, and the first time} \\
        g^j &= g^j + \nabla^j f_{B'}(x_{k,j}) - \nabla^j f_{B'}(x_{k-1,j}) \quad\text{otherwise} \\
        x^j &\leftarrow \operatorname{prox}_{\eta r_j}\bigl(x^j - \eta\,(g^j + \mathrm{wd}\,x^j)
            \bigr)

    One ``step`` is one cycle. What it is given decides what it can do:

    * ``step(objective.on(inputs, targets))``, an :class:`~optimizers.Objective` whose loss is an
      average over samples: VR-CCD. The bound batch is the large batch :math:`B`, and :math:`B'` is
      drawn from it, so bind all the data if memory allows; bound to part of it, the small batches
      of a cycle come from that part.
    * ``step(closure)``, a closure that returns the loss: the deterministic P-CCD. (One that calls
      ``backward()`` is understood too, and writes ``.grad``.)

    Guarantee of P-CCD (derived, not the paper's): with steps :math:`1/L_j` and convex :math:`r_j`,
    also for nonconvex f, :math:`F(x_k) \le F(x_{k-1}) - \sum_j \frac{L_j}{2}\|x_k^j -
    x_{k-1}^j\|^2` and :math:`\min_{i \le K} \operatorname{dist}^2(0, \partial F(x_i)) \le
    4 (\hat L^2 + L_{\max}^2)(F(x_0) - F^*) / (L_{\min} K)`; :math:`\hat L^2` is the norm of
    :math:`\sum_j \hat Q_j`, where :math:`\|\nabla^j f(x) - \nabla^j f(y)\|^2 \le \|x-y\|_{Q_j}^2`
    and :math:`\hat Q_j` is :math:`Q_j` without the rows and columns of earlier blocks.

    The difference needs the same function at both points. Random layers draw the same numbers
    there, and buffers written at the older point are put back; batch normalisation in training mode
    makes the small batch another function than the large one (a warning says so), and what moves
    parameters between steps (another optimizer, averaging, clipping) spoils the older point.
    ``refresh_prob`` repairs what is amiss. A step holds two more copies of the parameters.

    Args:
        params: Blocks in the order of the cycle: a list of groups, or ``model.named_parameters()``
            (parameters of one module form a block), or ``model.parameters()`` (each parameter of
            two or more dimensions begins a block, vectors join the one before).
        lr: :math:`\eta` in [0, inf), may differ by block; :math:`1/L_j` is the theory's.
        small_batch: Size of :math:`B'`, at least 1 and at most that of :math:`B`; ``None`` is
            :math:`\lfloor\sqrt{|B|}\rfloor`.
        refresh_prob: p in (0, 1]; ``None`` is :math:`|B'|/(|B|+|B'|)`, and 1 for a closure, which
            has no samples to draw from. With 1 nothing is drawn or stored.
        coin: ``"block"``: coin and small batch are drawn for every block (VR-CCD); ``"cycle"``:
            once for all blocks (VRO-CCD).
        prox: ``None``, ``"l1"``, ``"group"`` (the norms of rows, the slices along the first
            dimension; entries of a vector) or ``"box"``; it acts on every parameter of the block,
            so give a bias that should be spared a block of its own.
        strength: :math:`\lambda` in [0, inf), the factor of ``"l1"`` and ``"group"``.
        lower: Of the box, possibly ``-inf``.
        upper: Of the box, possibly ``inf``.
        weight_decay: wd in [0, inf): adds :math:`\frac{\mathrm{wd}}2\|x\|^2` to f.
        seed: Of coins and small batches.
        maximize: Ascend f (the prox stays a penalty).
        foreach: ``False`` computes tensor by tensor, otherwise a block at once.

    State:
        ``step`` (); unless ``refresh_prob`` is 1, ``estimate`` :math:`g^j` (without the decay) and
        ``older``, the value that the last cycle found, both of the parameter's shape, in its dtype
        (float32 for half precision), and ``estimated``, the number of the estimate's cycle (from 1;
        -1 for none): after a missed cycle it is made anew. In ``param_groups[0]``:
        ``cycle``, the count of cycles, which with the seed determines every draw.

    Raises:
        ValueError: If an option lies outside its range, the shared ones differ between groups, a
            block is empty, or ``small_batch`` exceeds the batch.
        OracleError: If small batches are asked of a closure, the loss does not depend on the
            parameters, or a gradient or new value is not finite; nothing has changed then.

    Reference:
        Cai, Song, Wright, Diakonikolas, "Cyclic Block Coordinate Descent With Variance Reduction
        for Composite Nonconvex Optimization", ICML 2023. Departures: big steps of one cycle share
        the bound batch and small ones are drawn from it (no difference if it is all the data); the
        authors' code adds the decay to the estimate, which gives the same steps while wd is
        constant; the loss returned is that of the first block's batch.
    """

    needs = Needs.CLOSURE
    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "small_batch": "int [1, inf) or None",
        "refresh_prob": "(0, 1] or None",
        "coin": "{block, cycle}",
        "prox": "{l1, group, box} or None",
        "strength": "[0, inf) or None",
        "lower": "[-inf, inf)",
        "upper": "(-inf, inf]",
        "weight_decay": "[0, inf)",
        "seed": "int [0, inf)",
        "cycle": "int [0, inf)",
    }

    _estimates: Mapping[Tensor, Tensor] = {}  # the new ones; they live from probe to finish
    _warned = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        *,
        small_batch: int | None = None,
        refresh_prob: float | None = None,
        coin: str = "block",
        prox: str | None = None,
        strength: float | None = None,
        lower: float = 0.0,
        upper: float = math.inf,
        weight_decay: float = 0.0,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            as_layers(params),
            {
                "lr": lr,
                "small_batch": small_batch,
                "refresh_prob": refresh_prob,
                "coin": coin,
                "prox": prox,
                "strength": strength,
                "lower": lower,
                "upper": upper,
                "weight_decay": weight_decay,
                "seed": seed,
                "maximize": maximize,
                "foreach": foreach,
                "cycle": 0,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse a prox without its numbers, and parameters that await another's next step."""
        if group["prox"] in ("l1", "group") and group["strength"] is None:
            raise ValueError(f"strength must be given with prox={group['prox']!r}; got None.")
        if group["lower"] > group["upper"]:
            raise ValueError(
                f"lower must be at most upper; got {group['lower']} and {group['upper']}."
            )
        refuse_dropped(group["params"])

    def prepare(self) -> None:
        """Refuse empty blocks, and blocks that disagree on the draws."""
        first = self.param_groups[0]
        for index, group in enumerate(self.param_groups):
            if not group["params"]:
                raise ValueError(
                    f"a block must hold parameters; got none in group {index}. Leave it out."
                )
            for name in _SHARED:
                if group[name] != first[name]:
                    raise ValueError(
                        f"{name} must agree in all parameter groups; got {first[name]!r} in group "
                        f"0 and {group[name]!r} in group {index}. Give it to the constructor."
                    )

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the estimate, at zero, and the present value; nothing if all batches are big."""
        if group["refresh_prob"] == 1:
            return {}
        return {"estimate": torch.zeros_like(p), "older": p.clone(), "estimated": -1}

    # ------------------------------------------------------------------ the cycle

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Pass over the blocks on the parameters themselves, put them back, return new values."""
        self.prepare()
        samples, small, p_big = self._sizes(oracle)
        options, params = self.param_groups[0], self._all_params()
        loss: Tensor | None = None
        values: dict[Tensor, Tensor] = {}
        estimates: dict[Tensor, Tensor] = {}
        # The older point x_{k-1,j}: block j and the later ones as the last cycle found them, the
        # earlier ones as this cycle found them.
        older = {p: self.state[p]["older"] for p in params} if p_big < 1 else {}
        with restored(params) as start:
            now = dict(zip(params, start, strict=True))
            for index, group in enumerate(self.param_groups):
                block = [p for p in group["params"] if p.requires_grad and p.numel()]
                if block:
                    indices = None
                    if p_big < 1:
                        own = [index] if options["coin"] == "block" else []
                        key = [options["seed"], options["cycle"], *own]
                        indices = draw_small_batch(key, samples, small, p_big)
                    value, new = self._estimate(oracle, block, indices, older)
                    loss = value if loss is None else loss
                    for p, moved in zip(new, _moved(new, group, index), strict=True):
                        p.copy_(moved)
                        values[p] = moved
                    estimates.update(new)
                if older:
                    older.update((p, now[p]) for p in group["params"])
        if not any(p.requires_grad and p.numel() for p in params):
            loss, _ = oracle.gradient([])  # everything is frozen
        elif not values:
            raise OracleError(
                f"{type(self).__name__} got no gradient of any parameter. Return the loss with its "
                "graph (not detached, no float), of the model that holds the parameters."
            )
        self._estimates = estimates
        return loss, values.get

    def _sizes(self, oracle: Oracle) -> tuple[int, int, float]:
        """Return the sizes of large and small batches and the probability of a large one."""
        name, options = type(self).__name__, self.param_groups[0]
        small, p_big = options["small_batch"], options["refresh_prob"]
        samples = oracle.samples if p_big != 1 else None
        if samples is None:
            if p_big == 1 or (p_big is None and small is None):
                return 0, 0, 1.0
            raise OracleError(
                f"{name} with refresh_prob={p_big} and small_batch={small} draws small batches, "
                "and was given no samples to draw from. Build objective = optimizers.Objective("
                "model, loss_fn) once and call optimizer.step(objective.on(inputs, targets)); or "
                "set refresh_prob=1, which takes every gradient from the closure."
            )
        small = math.isqrt(samples) if small is None else small
        if not 1 <= small <= samples:
            raise ValueError(
                f"small_batch must lie in [1, the size of the batch]; got {small} for {samples} "
                "samples. Lower it, or bind larger batches (a DataLoader's drop_last=True)."
            )
        if any("older" not in self.state[p] for p in self._all_params()):
            raise ValueError(
                f"refresh_prob must be below 1 from the start to be used; got {p_big} in a running "
                f"{name} that stores no estimates. Build a new one with it."
            )
        self._watch(oracle)
        return samples, small, small / (samples + small) if p_big is None else p_big

    def _watch(self, oracle: Oracle) -> None:
        """Warn once if the small batch's loss is not the function that the large batch's is."""
        modules = oracle.objective.model.modules()
        if not self._warned and any(isinstance(m, _BatchNorm) and m.training for m in modules):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: the model normalises by batch statistics in training "
                "mode, so a small batch's loss is another function than the large batch's and the "
                "variance is not reduced as it should be. Call eval() on the normalisation, use "
                "another one, or set refresh_prob=1.",
                stacklevel=2,
            )

    def _estimate(
        self,
        oracle: Oracle,
        block: list[Tensor],
        indices: Tensor | None,
        older: dict[Tensor, Tensor],
    ) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        """Return the loss and the new estimate of the gradient of each parameter in use."""
        cycle = self.param_groups[0]["cycle"]  # only an estimate of the cycle before is corrected
        if indices is None or all(self.state[p]["estimated"] != cycle for p in block):
            return self._gradient(oracle, block)
        part, states = oracle.subset(indices), random_states(block)
        loss, new = self._gradient(part, block)
        if any(self.state[p]["estimated"] != cycle for p in new):  # thawed, or in use again
            return self._gradient(oracle, block)
        # Buffers that the model writes at the older point are put back with the parameters.
        with restored([*older, *oracle.objective.model.buffers()]), replaying(states):
            for p, value in older.items():
                p.copy_(value)
            _, old = self._gradient(part, block)
        # The two nearly equal gradients are subtracted first.
        return loss, {p: self.state[p]["estimate"] + (new[p] - old.get(p, 0)) for p in new}

    def _gradient(
        self, oracle: Oracle, block: list[Tensor]
    ) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        """Return the loss and its gradient in one block, in at least float32."""
        mine = set(block)
        with switched_off(p for p in self._all_params() if p not in mine):
            try:
                loss, grads = oracle.gradient(block)
            except RuntimeError as error:
                # A closure's backward() has nothing to do if the loss does not use this block.
                if "does not require grad" in str(error):
                    return None, {}
                raise
        found = {p: g for p, g in zip(block, grads, strict=True) if g is not None}
        if any(g.layout is not torch.strided for g in found.values()):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients; build the layer with "
                "sparse=False."
            )
        return loss, {p: _wide(g) for p, g in found.items()}

    # ------------------------------------------------------------------ the writing

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Write one parameter's new value ``g``, which the cycle has computed."""
        if "older" in state:
            state["older"].copy_(p)
        p.copy_(g)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """Write a block's new values."""
        if all("older" in state for state in states):
            torch._foreach_copy_([state["older"] for state in states], params)
        torch._foreach_copy_(params, grads)

    def finish(self, loss: Tensor | None) -> None:
        """Keep what the next cycle starts from."""
        self.param_groups[0]["cycle"] += 1
        for p in self._all_params():
            state = self.state[p]
            if "older" in state:
                if p in self._estimates:
                    state["estimate"].copy_(self._estimates[p])
                    state["estimated"] = self.param_groups[0]["cycle"]
                else:
                    state["older"].copy_(p)  # it stayed where this cycle found it
        self._estimates = {}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _moved(estimates: Mapping[Tensor, Tensor], group: Group, index: int) -> list[Tensor]:
    """Return the new value of each parameter of a block, or refuse one that is not finite."""
    if not estimates:
        return []
    lr, decay = group["lr"], group["weight_decay"]
    xs, gs = [_wide(p) for p in estimates], list(estimates.values())
    if group["foreach"] is False:
        gs = [-g for g in gs] if group["maximize"] else gs
        gs = [g + decay * x for x, g in zip(xs, gs, strict=True)] if decay != 0 else gs
        zs = [x - lr * g for x, g in zip(xs, gs, strict=True)]
    else:
        gs = list(torch._foreach_neg(gs)) if group["maximize"] else gs
        gs = list(torch._foreach_add(gs, torch._foreach_mul(xs, decay))) if decay != 0 else gs
        zs = list(torch._foreach_sub(xs, torch._foreach_mul(gs, lr)))
    new = [_prox(z, group).to(p.dtype) for p, z in zip(estimates, zs, strict=True)]
    # Before the prox, which may hide an infinity, and after the rounding, which may make one.
    if not all(bool(t.isfinite().all()) for t in (*zs, *new)):
        raise OracleError(
            f"the step of block {index} is not finite, and nothing has been changed. Lower lr, "
            "raise refresh_prob or small_batch, or look for NaN in the data."
        )
    return new


def _prox(z: Tensor, group: Group) -> Tensor:
    """Return the prox of the group's ``r`` with the step ``lr``."""
    lr, kind = group["lr"], group["prox"]
    if kind == "l1":
        return prox_l1(z, lr * group["strength"])
    if kind == "group":
        return prox_group(z, lr * group["strength"])
    if kind == "box":
        inside = project_box(z, group["lower"], group["upper"])
        # A step of length 0 goes nowhere, not even back into the box.
        return torch.where(torch.as_tensor(lr > 0, device=z.device), inside, z)
    return z
