"""PolyStep: parameters move along polytope vertices by the losses measured there."""

from __future__ import annotations

import sys
import warnings
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Needs, Optimizer, Scope, Signal, State
from optimizers.forward_only.polytopes import (
    MAX_CUBE_DIM,
    Schedule,
    barycentres,
    check_schedule,
    distance_at,
    jitter,
    rotated_vertices,
    value_at,
)
from optimizers.forward_only.subspace import (
    Block,
    candidates,
    chunk_size,
    common_dtype,
    coordinate_count,
    projection,
    working,
)
from optimizers.objective import OracleError
from optimizers.oracle import Oracle

# Median spread / epsilon above which one vertex takes all (the rest weighs exp(-100)), and largest
# one below which moves are under 1e-5 of the radius, the size of float32 noise.
_HARD, _SOFT = 100.0, 1e-5

# All parameters are one problem, so these must agree in all groups.
_SHARED = (
    *("epsilon", "step_radius", "probe_radius", "polytope", "particle_dim", "rank", "num_probe"),
    *("probe_jitter", "scale_cost", "seed", "chunk", "maximize"),
)


class PolyStep(Optimizer):
    r"""Forward-only: particles of a few coordinates move towards the polytope vertices of low loss.

    For losses without a useful derivative: spikes, rounding, argmax, hard routing, plateaus. Not
    where a gradient exists (a backward pass replaces thousands of forwards), not for noisy losses
    (see below), not for more than some 10^4 coordinates. A step costs **P V K forward passes**,
    :math:`P = \lceil n/d \rceil` for n coordinates: ``2 n K`` with the orthoplex, ``n (d+1)/d K``
    with the simplex, ``n 2^d/d K`` with the cube. Whether it leads evolution strategies at
    equal numbers of forward passes is not tested here.

    All trainable parameters, in order, are one vector of coordinates, cut into particles
    :math:`x_i \in R^d` (padded with zeros). At step t = 0, 1, ..., with fresh rotations
    :math:`R_i` uniform on SO(d), template vertices :math:`u_v` and :math:`s_k = k/(K+1)`:

    .. math::
        u_{iv} &= R_i u_v \\
        C_{iv} &= \tfrac1K \textstyle\sum_k L(x_i \to x_i + \rho_t s_k u_{iv}) \\
        w_{iv} &= \mathrm{softmax}_v(-C_{iv}/\epsilon_t) \\
        \delta_i &= r_t \textstyle\sum_v w_{iv} u_{iv} \\
        v &\leftarrow \beta v + \delta, \qquad x \leftarrow x + \eta v

    With K = 1 the loss is measured at *half* the probe radius. For small radii every template
    makes the gradient step of rate **lr_eff = r s rho / (d epsilon)**, s = 1/2, in physical radii;
    0.25 to 1.6 in the paper's runs, but 0.05 with the defaults (0.0125 with a rank), which are
    the code's: if the loss hardly moves, raise ``step_radius``, then ``probe_radius``. Opposite
    vertices of the orthoplex tie at the minimum of a quadratic, so it converges there; the simplex
    stalls at a distance. On a constant loss nothing moves. All of these are derived.

    With ``rank=q`` the coordinates of a matrix are those of a random subspace of
    ``min(q (d_out + d_in), numel)`` dimensions, :math:`\theta = \theta_0 + M x`; vectors keep all
    of theirs. The steps are added to the parameters themselves (the paper keeps
    :math:`\theta_0` and x), so what you load or write into them between steps is honoured and
    nothing else needs to be told. M takes ``numel x coordinates`` floats and is rebuilt from the
    seed, not stored.

    The loss must be a function of the parameters: ``model.eval()`` for dropout and batch
    statistics (an ``Objective`` refuses them otherwise; a plain closure cannot be looked into).
    An ``Objective`` evaluates candidates in batches and writes nothing; a plain closure is called
    once per candidate, with parameters restored bit by bit.

    A cost that is not finite counts as ``2 max|C| + 1``; if none is finite the step raises. A step
    that would overflow a parameter is not taken. ``step`` returns the mean of the finite costs,
    which is not the loss at either end of the step.

    Args:
        params: Parameters or groups. Groups differ in ``lr`` and ``momentum`` alone.
        lr: :math:`\eta` in [0, inf), multiplies the displacement; 1 is the paper's rule.
        epsilon: :math:`\epsilon` in (0, inf), in units of the loss, or a schedule:
            ``("constant", a)``, ``("cosine", a, b, T)`` from a to b in T steps, or
            ``("linear", a, decay, b)`` for ``max(a - decay t, b)``.
        step_radius: :math:`r` as a multiple of epsilon, in (0, inf), or as a schedule, which is a
            distance and not multiplied. The length of a move is below it (without momentum).
        probe_radius: :math:`\rho`, likewise. The probes, at half of it for K = 1, must reach
            beyond a plateau.
        polytope: ``"orthoplex"``, ``"simplex"`` (cheaper and biased) or ``"cube"``.
        particle_dim: d, at least 1 (at most 12 for the cube); ``None`` is 2, or 8 with a rank.
        rank: q, at least 1; ``None`` moves in the full space. 2 to 8 is usual.
        num_probe: K, at least 1.
        probe_jitter: j in [0, 1): the probe radius times 1 + U[-j, j]; the theory wants it.
        momentum: :math:`\beta` in [0, 1). A move may then exceed the radius.
        scale_cost: ``None``, or ``"mean"`` to divide the costs by the mean of their magnitudes.
        seed: Of rotations, subspace and jitter.
        chunk: How many candidates are in memory at once; ``None`` is 64, or fewer so that those of
            the largest parameter fit 64 MiB.
        maximize: Ascend instead of descend.

    State:
        ``step`` (); with momentum ``velocity`` of the parameter's shape. In ``param_groups[0]``:
        ``time``, the count t of steps, which with the seed determines every draw.

    Raises:
        ValueError: If an option lies outside its range, or differs between the groups.
        OracleError: At a step, if no candidate has a finite loss; nothing has changed then.

    Reference:
        An T. Le, "Training Non-Differentiable Networks via Optimal Transport", 2026. Softmax
        solver. Departures: momentum is constant (the paper raises it over the run); without
        amortisation, biased rotations, absorption (here the same as clearing the velocity) and
        adaptive radii; the paper's code uses two-sided Sinkhorn in the full space.
    """

    needs = Needs.LOSS
    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "polytope": "{orthoplex, simplex, cube}",
        "particle_dim": "int [1, inf) or None",
        "rank": "int [1, inf) or None",
        "num_probe": "int [1, inf)",
        "probe_jitter": "[0, 1)",
        "momentum": "[0, 1)",
        "scale_cost": "{mean} or None",
        "seed": "int [0, inf)",
        "chunk": "int [1, inf) or None",
        "time": "int [0, inf)",
    }

    # Caches: rebuilt from the seed; which warnings have been given.
    _bases: dict[Any, Tensor] | None = None
    _warned: frozenset[str] = frozenset()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        epsilon: Schedule = 0.1,
        step_radius: Schedule = 1.0,
        probe_radius: Schedule = 2.0,
        polytope: str = "orthoplex",
        particle_dim: int | None = None,
        rank: int | None = None,
        num_probe: int = 1,
        probe_jitter: float = 0.0,
        momentum: float = 0.0,
        scale_cost: str | None = None,
        seed: int = 0,
        chunk: int | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "epsilon": epsilon,
                "step_radius": step_radius,
                "probe_radius": probe_radius,
                "polytope": polytope,
                "particle_dim": particle_dim,
                "rank": rank,
                "num_probe": num_probe,
                "probe_jitter": probe_jitter,
                "momentum": momentum,
                "scale_cost": scale_cost,
                "seed": seed,
                "chunk": chunk,
                "maximize": maximize,
                "time": 0,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse schedules that are none, and cubes with too many vertices."""
        for name in ("epsilon", "step_radius", "probe_radius"):
            check_schedule(name, group[name])
        if group["polytope"] == "cube" and _dimension(group) > MAX_CUBE_DIM:
            raise ValueError(
                f"particle_dim must be at most {MAX_CUBE_DIM} for the cube, which has "
                f"2**particle_dim vertices; got {_dimension(group)}."
            )

    def prepare(self) -> None:
        """Refuse groups that disagree: all parameters are one problem."""
        self._agree()
        self._bases = None

    def _agree(self) -> None:
        first = self.param_groups[0]
        for name in _SHARED:
            for index, group in enumerate(self.param_groups):
                # A file may turn a tuple into a list.
                if _plain(group[name]) != _plain(first[name]):
                    raise ValueError(
                        f"{name} must agree in all parameter groups, which are one problem; got "
                        f"{first[name]!r} in group 0 and {group[name]!r} in group {index}. Give "
                        "it to the constructor; only lr and momentum may differ."
                    )

    # ------------------------------------------------------------------ the rule

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Measure the losses around every particle and return where to go."""
        self._agree()
        plan = self.param_groups[0]
        blocks = self._blocks()
        if not blocks:
            return oracle.loss(), lambda p: None
        t, seed = plan["time"], plan["seed"]
        epsilon = value_at(plan["epsilon"], t)
        radius = distance_at(plan["step_radius"], epsilon, t)
        reach = distance_at(plan["probe_radius"], epsilon, t)
        reach *= jitter(plan["probe_jitter"], seed, t)
        d = _dimension(plan)
        directions = rotated_vertices(plan["polytope"], -(-blocks[-1].stop // d), d, seed, t)
        directions = directions.to(blocks[0].p.device, common_dtype(blocks))

        losses = self._measure(oracle, blocks, reach * directions)
        finite = losses.isfinite()
        if not finite.any():
            raise OracleError(
                f"{type(self).__name__} needs a finite loss and none of {losses.numel()} "
                "candidates has one; start where the loss is finite, or lower probe_radius."
            )
        costs = -losses if plan["maximize"] else losses
        costs = torch.where(finite, costs, 2 * costs[finite].abs().max() + 1)
        if plan["scale_cost"] == "mean":
            scale = costs.abs().mean()
            costs = costs / torch.where(scale > 0, scale, 1)
        self._watch(costs, epsilon)

        steps = (radius * barycentres(costs, directions, epsilon)).reshape(-1)
        moves = {id(block.p): block.displacement(steps) for block in blocks}
        if self._overflows(moves):
            self._warn(
                "overflow",
                "the step would make a parameter non-finite and is not taken; lower lr.",
            )
            moves = {}
        return losses[finite].mean(), lambda p: moves.get(id(p))

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the velocity, at zero; nothing without momentum."""
        return {"velocity": torch.zeros_like(p)} if group["momentum"] > 0 else {}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Move one parameter; ``g`` is its displacement."""
        if group["momentum"] > 0:
            if "velocity" not in state:  # a scheduler raised the momentum from 0
                state["velocity"] = torch.zeros_like(p)
            g = state["velocity"].mul_(group["momentum"]).add_(g)
        else:
            state.pop("velocity", None)
        p.add_(group["lr"] * g)

    def finish(self, loss: Tensor | None) -> None:
        """Advance the time, which schedules and draws are functions of."""
        self.param_groups[0]["time"] += 1

    # ------------------------------------------------------------------ the measurement

    def _blocks(self) -> list[Block]:
        """Return the trainable parameters with their coordinates."""
        plan = self.param_groups[0]
        rank = plan["rank"]
        chosen = [(i, p) for i, p in enumerate(self._all_params()) if p.requires_grad and p.numel()]
        stops = list(accumulate(coordinate_count(p.shape, rank) for _, p in chosen))
        return [
            Block(p, start, stop, self._basis(i, p))
            for (i, p), start, stop in zip(chosen, [0, *stops], stops, strict=False)
        ]

    def _basis(self, index: int, p: Tensor) -> Tensor | None:
        plan = self.param_groups[0]
        if plan["rank"] is None or p.ndim < 2:
            return None
        if self._bases is None:
            self._bases = {}
        key = (index, p.shape, p.dtype, p.device, plan["rank"], plan["seed"])
        if key not in self._bases:
            M = torch.from_numpy(projection(p.shape, plan["rank"], plan["seed"], index))
            self._bases[key] = M.T.to(working(p)).contiguous()
        return self._bases[key]

    def _measure(self, oracle: Oracle, blocks: list[Block], reach: Tensor) -> Tensor:
        """Return the costs (P, V) at ``s_k reach`` around each particle; ``reach`` is (P, V, d)."""
        plan = self.param_groups[0]
        P, V, _ = reach.shape
        K = plan["num_probe"]
        losses = []
        for low, offsets in candidates(reach, K, plan["chunk"] or chunk_size(blocks)):
            high = low + offsets.shape[1]
            # Other parameters stay as they are, and without a dimension for the candidates.
            touched = [block for block in blocks if block.start < high and low < block.stop]
            values = [block.moved(offsets, low) for block in touched]
            losses.append(oracle.population([block.p for block in touched], values))
        costs = torch.cat(losses).reshape(P, V, K)
        dtype = torch.promote_types(costs.dtype, torch.float32)
        return costs.to(reach.device, dtype).mean(-1)

    def _overflows(self, moves: dict[int, Tensor]) -> bool:
        """Whether the step would make a parameter non-finite."""
        bad = []
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in moves:
                    step = moves[id(p)]
                    if group["momentum"] > 0 and "velocity" in self.state[p]:
                        step = step + group["momentum"] * self.state[p]["velocity"]
                    target = (working(p) + group["lr"] * step).to(p.dtype)
                    bad.append(not target.isfinite().all())
        return any(bad)

    def _watch(self, costs: Tensor, epsilon: float) -> None:
        """Warn when the costs say little: all equal, or far from epsilon in scale."""
        spread = (costs.amax(1) - costs.amin(1)) / epsilon
        largest, median = float(spread.max()), float(spread.median())
        if largest == 0:
            self._warn(
                "flat",
                "all candidates of this step have equal losses around every particle, so nothing "
                "moves; raise probe_radius above the width of the loss's plateaus.",
            )
        elif median > _HARD:
            self._warn(
                "hard",
                f"the losses around a particle differ by {median:.0e} epsilon in the median, so "
                "each goes to its best vertex; raise epsilon, or lower probe_radius.",
            )
        elif largest < _SOFT:
            self._warn(
                "soft",
                f"the losses around a particle differ by {largest:.0e} epsilon at most, so hardly "
                "anything moves; lower epsilon, or raise probe_radius.",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned |= {kind}
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=_caller_level())


def _dimension(group: Group) -> int:
    """Return d, by default 2 in the full space and 8 in a subspace."""
    if group["particle_dim"] is not None:
        return int(group["particle_dim"])
    return 2 if group["rank"] is None else 8


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _caller_level() -> int:
    """Return the ``stacklevel``, as seen from the caller, of the first frame outside the library.

    Between it and the rule lie a varying number of wrappers of torch's (schedulers add theirs).
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("optimizers", "torch"):
            break
        level, frame = level + 1, frame.f_back
    return level
