"""DropLayers: any optimizer, updating a random suffix of the layers and skipping the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimizers import checkpoint, ranges
from optimizers.layer_dropping.drop_muon import as_layers
from optimizers.layer_dropping.flags import dropped_parameters, refuse_dropped
from optimizers.layer_dropping.sampling import (
    SAMPLING_RULE,
    cutoff_probabilities,
    draw_cutoff,
)
from optimizers.oracle import Needs

_RANGES = {
    "drop_sampling": SAMPLING_RULE,
    "drop_smoothness": "list of (0, inf) or None",
    "drop_shift": "[0, inf)",
    "drop_progress": "[0, 1]",
    "drop_seed": "int [0, inf)",
    "drop_cutoff": "int [0, inf)",
    "drop_draws": "int [0, inf)",
}


class DropLayers(torch.optim.Optimizer):
    r"""Any optimizer that updates layers ``s..b`` for a cut-off ``s`` drawn anew each step.

    What :class:`DropMuon` does to Muon, for every rule that works from gradients: layers before
    the cut-off run no backward, get no update and keep their state, momentum included. A step
    costs less and more steps are needed; the saved work is
    :func:`optimizers.layer_dropping.costs.measure_costs`' to tell, and whether it pays is yours
    to measure.

    .. math::
        s \sim p, \qquad x_i \leftarrow \mathrm{inner}(x_i, g_i)\ (i \ge s), \qquad
        x_i \leftarrow x_i\ (i < s)

    The flags are :class:`DropMuon`'s: from the end of the first step on, the parameters that the
    next step leaves alone require no gradient; only flags that you left on are switched,
    :meth:`release` or leaving ``with optimizer.dropping():`` gives them back. Several backward
    passes before a step accumulate for one plan. Under DistributedDataParallel set
    ``find_unused_parameters=True``; ranks draw alike.

    Args:
        inner: Any :class:`torch.optim.Optimizer` that works from ``.grad``. Its groups are this
            one's: schedulers see them.
        layers: The parameters of each layer, from input to output, as a list of lists, or
            ``model.named_parameters()`` (those of one module form a layer). ``None``: the inner
            optimizer's groups, if it has several, else each parameter of two or more dimensions
            begins a layer. Parameters of ``inner`` that no layer names are always updated.
        sampling: As for :class:`DropMuon`.
        smoothness: As for :class:`DropMuon`.
        shift: As for :class:`DropMuon`.
        seed: As for :class:`DropMuon`.

    State:
        What the inner rule keeps; the plan is in ``param_groups[0]``, under keys that begin with
        ``drop_``.

    Raises:
        TypeError: If ``inner`` is no optimizer.
        ValueError: If the inner rule needs more than gradients, a layer is empty or holds a
            parameter twice or one that is not the inner rule's, or an option is out of range.

    Reference:
        The sampling is that of Gruntkowska, Maziane, Qu, Richtárik, "Drop-Muon: Update Less,
        Converge Faster", 2025; for other rules than Muon it is ours.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        layers: Iterable[Any] | None = None,
        *,
        sampling: str | Sequence[float] = "uniform",
        smoothness: Sequence[float] | None = None,
        shift: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"inner must be an optimizer; got a {type(inner).__name__}.")
        needs = getattr(inner, "needs", Needs.GRADIENTS)
        if needs is not Needs.GRADIENTS or isinstance(inner, torch.optim.LBFGS):
            raise ValueError(
                f"{type(inner).__name__} evaluates the objective itself; DropLayers needs a rule "
                "that works from the gradients of one backward pass."
            )
        own = {id(p): (i, j) for i, g in enumerate(inner.param_groups)
               for j, p in enumerate(g["params"])}  # fmt: skip
        self._layers = [[own[id(p)] for p in layer] for layer in _layers(inner, layers, own)]
        options = {
            "drop_sampling": sampling if isinstance(sampling, str) else list(sampling),
            "drop_smoothness": None if smoothness is None else list(smoothness),
            "drop_shift": shift,
            "drop_progress": 0.0,
            "drop_seed": seed,
            "drop_cutoff": 0,
            "drop_draws": 0,
        }
        ranges.check_all(options, _RANGES)
        refuse_dropped([p for g in inner.param_groups for p in g["params"]])
        self.inner = inner
        self._dropped: list[tuple[int, int]] = []
        self._building = True
        super().__init__(inner.param_groups, dict(inner.defaults))
        self._building = False
        self._share()
        inner.param_groups[0].update(options)
        plan = self.param_groups[0]
        plan["drop_cutoff"] = draw_cutoff(self.probabilities, seed, 0)

    # ------------------------------------------------------------------ the plan

    @property
    def probabilities(self) -> list[float]:
        """The probability of each layer to be the cut-off, as of now."""
        plan = self.param_groups[0]
        return cutoff_probabilities(
            plan["drop_sampling"],
            len(self._layers),
            progress=plan["drop_progress"],
            shift=plan["drop_shift"],
            smoothness=plan["drop_smoothness"],
        )

    def active(self) -> list[int]:
        """Return the layers that the next step updates."""
        return list(range(self.param_groups[0]["drop_cutoff"], len(self._layers)))

    def set_progress(self, progress: float) -> None:
        """Tell ``"epoch_shift"`` which part of the training is done; the next draw uses it.

        Raises:
            ValueError: If ``progress`` lies outside [0, 1].
        """
        ranges.check("progress", progress, "[0, 1]")
        self.param_groups[0]["drop_progress"] = float(progress)

    def release(self) -> None:
        """Give back every ``requires_grad`` flag; the next step's end drops layers again."""
        for i, j in self._dropped:
            p = self.param_groups[i]["params"][j]
            p.requires_grad_(True)
            if p in dropped_parameters:
                del dropped_parameters[p]
        self._dropped = []

    @contextlib.contextmanager
    def dropping(self) -> Iterator[DropLayers]:
        """Return a context that drops layers inside and gives every flag back on leaving."""
        self._set_flags()
        try:
            yield self
        finally:
            self.release()

    def _at(self, place: tuple[int, int]) -> Tensor:
        p: Tensor = self.param_groups[place[0]]["params"][place[1]]
        return p

    def _inactive(self) -> list[tuple[int, int]]:
        cutoff = self.param_groups[0]["drop_cutoff"]
        return [place for layer in self._layers[:cutoff] for place in layer]

    def _set_flags(self) -> None:
        self.release()
        places = [q for q in self._inactive() if self._at(q).requires_grad]
        off = {id(self._at(q)) for q in places}
        left = [p for g in self.param_groups for p in g["params"]]
        if not any(p.requires_grad and id(p) not in off for p in left):
            # Some layer must keep its graph, or backward() has nothing to do and raises.
            last = next((layer for layer in reversed(self._layers) if set(layer) & set(places)), [])
            places = [q for q in places if q not in last]
        for q in places:
            self._at(q).requires_grad_(False)
            dropped_parameters[self._at(q)] = True
        self._dropped = places

    # ------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active layers with the inner rule, then plan the next step.

        If the inner rule raises, plan and flags stay as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif checkpoint.is_dry_step(self.param_groups):
            return None
        # A dropped layer's gradient, if there is one, is old: the inner rule must not see it.
        hidden = [(self._at(q), self._at(q).grad) for q in self._inactive()]
        for p, _ in hidden:
            p.grad = None
        try:
            self.inner.state = self.state
            self.inner.step()
        finally:
            for p, g in hidden:
                p.grad = g
        plan = self.param_groups[0]
        plan["drop_draws"] += 1
        plan["drop_cutoff"] = draw_cutoff(self.probabilities, plan["drop_seed"], plan["drop_draws"])
        self._set_flags()
        return loss

    def eval_params(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameters hold the weights to deploy."""
        context: Any = getattr(self.inner, "eval_params", contextlib.nullcontext)
        inner: contextlib.AbstractContextManager[None] = context()
        return inner

    # ------------------------------------------------------------------ groups and state

    def _share(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner rule; it becomes a layer after the others."""
        if self._building:
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        index = len(self.inner.param_groups) - 1
        own = [(index, j) for j in range(len(self.inner.param_groups[index]["params"]))]
        sampling = self.param_groups[0]["drop_sampling"]
        if isinstance(sampling, str) and sampling != "cost_aware":
            self._layers.append(own)  # else it is always updated: no probability was given for it
        self._share()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; a state that is refused changes nothing.

        Raises:
            ValueError: If groups, state or plan do not fit.
        """
        loaded = checkpoint.read(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = checkpoint.read(result)
        plan = loaded["param_groups"][0] if loaded["param_groups"] else {}
        if not set(_RANGES) <= set(plan):
            raise ValueError(
                "the loaded state holds no plan of dropped layers; it was written without "
                "DropLayers. Load it into the inner rule before wrapping that."
            )
        ranges.check_all(plan, _RANGES, " (in the loaded state)")
        if plan["drop_cutoff"] >= len(self._layers):
            raise ValueError(
                f"the loaded plan cuts at layer {plan['drop_cutoff']}, and there are "
                f"{len(self._layers)}."
            )
        self.inner.load_state_dict(loaded)
        self._share()
        if self.param_groups[0]["drop_draws"] > 0:
            self._set_flags()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copy the inner rule too; it shares groups and state with this object."""
        own = ("inner", "_layers", "_dropped", "_building")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __repr__(self) -> str:
        return f"DropLayers({self.inner!r}, {len(self._layers)} layers)"


def _layers(
    inner: torch.optim.Optimizer, layers: Iterable[Any] | None, own: Mapping[int, Any]
) -> list[list[Tensor]]:
    """Return the layers' parameters, refusing what is not the inner rule's."""
    groups = inner.param_groups
    if layers is None:
        if len(groups) > 1:
            return [list(group["params"]) for group in groups]
        layers = groups[0]["params"]
    if isinstance(layers, (nn.Module, Tensor)):
        raise TypeError(
            f"layers must be lists of parameters or named parameters; got a "
            f"{type(layers).__name__}. Pass model.named_parameters()."
        )
    entries = list(layers)
    if entries and isinstance(entries[0], (list, tuple)) and not isinstance(entries[0][0], str):
        found = [list(layer) for layer in entries]
    else:
        found = [
            [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            for group in as_layers(entries)
        ]
    members = [p for layer in found for p in layer]
    if not found or not all(found):
        raise ValueError("layers must hold at least one parameter each.")
    if len({id(p) for p in members}) != len(members):
        raise ValueError("a parameter appears in two layers; give tied weights to the first one.")
    strangers = [tuple(p.shape) for p in members if id(p) not in own]
    if strangers:
        raise ValueError(
            f"layers name parameters that the inner optimizer does not have: {strangers[:3]}."
        )
    return found
