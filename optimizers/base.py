"""The common base class: one ``step`` for every rule, and the traps of torch closed once.

``step`` probes the objective, hands each parameter's signal to the rule and lets the rule
finish. A rule overrides some of eight hooks (``probe, init_state, update, update_foreach,
finish, prepare, eval_params, validate``) and nothing else.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, ClassVar, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from optimizers import checkpoint, distributed, ranges
from optimizers.exchange import Batch, everywhere, local_batches, whole_batches
from optimizers.oracle import Needs, Oracle, as_oracle, without_cast_cache

__all__ = ["Group", "Needs", "Optimizer", "Scope", "Signal", "State"]

State: TypeAlias = dict[str, Any]
Group: TypeAlias = dict[str, Any]
Signal: TypeAlias = Callable[[Tensor], "Tensor | None"]


class Scope(enum.Enum):
    """How much of the model a rule must see to update one parameter."""

    ELEMENT = "element"
    MATRIX = "matrix"
    LAYER = "layer"
    MODEL = "model"


# Checked in every group of every rule that has the key.
_COMMON_RANGES: Mapping[str, str] = {
    "lr": "[0, inf)",
    "maximize": "bool",
    "foreach": "bool or None",
    "compile": "bool",
}
# Keys that torch and its schedulers put beside a rule's own.
_FOREIGN_KEYS = frozenset(
    {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr"}
    | {"max_momentum", "base_momentum"}
)


class Optimizer(torch.optim.Optimizer):
    r"""Base of every optimizer in this library: a :class:`torch.optim.Optimizer`.

    A concrete rule declares its class attributes, passes its options to ``__init__`` as
    ``defaults`` and overrides the hooks it needs:

    * ``probe(oracle) -> (loss, signal)``: ask the objective; ``signal(p)`` is what ``update``
      gets for parameter ``p`` (by default its gradient), or ``None`` to leave it alone.
    * ``init_state(p, group) -> dict``: tensors and numbers kept for ``p``.
    * ``update(p, g, state, group)``: the rule for one tensor, in place; reads like the paper.
    * ``update_foreach(params, grads, states, group)``: its fast twin for a list of tensors of
      one device and dtype. Must not raise on valid input.
    * ``finish(loss)``: after all groups: plan the next step.
    * ``prepare()``: make the plan that the groups hold effective; after construction, after a
      group was added, after loading. Apart from ``finish`` because loading must not plan anew.
    * ``eval_params()``: a context in which the parameters hold the weights to deploy.
    * ``validate(group)``: refuse options or shapes that ``ranges`` cannot express.

    Conventions: ``state["step"]`` is a 0-D float32 tensor that counts the updates of that
    parameter and already includes the present one inside ``update``. Half-precision parameters
    are updated in float32 (state included) and rounded once; complex parameters arrive as real
    pairs where the rule treats every element alike and are refused otherwise. ``.grad`` is never
    written. A step that raises leaves parameters and state as they were. What belongs to the whole
    optimizer (a seed and a count of draws, a plan, a damping) lives as numbers in
    ``param_groups[0]``; a group key with a leading underscore describes this process alone and
    is not loaded.

    Sharded parameters (``DTensor``, as ``fully_shard`` makes them): a rule for elements gets this
    rank's part; a rule for matrices or layers gets them whole, on one rank each, and must not write
    its group or raise there; all ranks step and load together. Rules for models refuse them.

    A non-finite gradient makes that parameter (or, for ``Scope.MODEL``, nothing: the rule
    refuses) non-finite, as in torch, and no other.

    Args:
        params: Parameters, ``(name, parameter)`` pairs or dicts of groups, as in torch.
        defaults: Every public option with its default; groups override them.

    Raises:
        ValueError: If an option lies outside its range, in any group, also one added later.
        TypeError: If ``params`` is a module or a tensor.
    """

    needs: ClassVar[Needs] = Needs.GRADIENTS
    scope: ClassVar[Scope] = Scope.ELEMENT
    ranges: ClassVar[Mapping[str, str]] = {}

    # Attributes are caches: deepcopy and pickle drop them and these values take over.
    _ready: bool = True
    _compiled: Callable[..., None] | None = None
    # Options that a class mixed in before a rule adds to the rule's.
    _mixed_in: Mapping[str, Any] = {}

    @property
    def _layouts(self) -> dict[int, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype, by identity, of each parameter for which state was made."""
        known: dict[int, tuple[torch.Size, torch.dtype]] = self.__dict__.setdefault("_known", {})
        return known

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("step", "load_state_dict", "add_param_group"):
            if name in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__} must not override {name}; override the hooks (probe, "
                    "init_state, update, update_foreach, finish, prepare, eval_params, validate) "
                    "instead."
                )

    def __init__(self, params: Any, defaults: Mapping[str, Any]) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params must be an iterable of parameters; got the module "
                f"{type(params).__name__}. Pass model.parameters()."
            )
        own = {name: _own(value) for name, value in {**defaults, **self._mixed_in}.items()}
        self._check_values({"params": [], **own})
        self._ready = False
        super().__init__(params, {**own, "format_version": checkpoint.FORMAT_VERSION})
        self._ready = True
        self.prepare()

    # ------------------------------------------------------------------ the hooks

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Ask the objective; return the loss and the signal of each parameter."""
        return oracle.evaluate(), _stored_gradient

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the state of a new parameter, beside ``step``."""
        return {}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Update one parameter in place; ``g`` must not be written."""
        raise NotImplementedError(  # a rule without an update is an error of its author
            f"{type(self).__name__} must define update()."
        )

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """Update a list of parameters of one device and dtype in place."""
        for p, g, state in zip(params, grads, states, strict=True):
            self.update(p, g, state, group)

    def finish(self, loss: Tensor | None) -> None:
        """Plan the next step; runs once after all groups."""

    def prepare(self) -> None:
        """Make the stored plan effective; must not change anything when called twice."""

    def validate(self, group: Group) -> None:
        """Refuse what ``ranges`` cannot say: options that exclude each other, shapes.

        Runs for the defaults (with no parameters), for every group, also one added later, and
        for every loaded group; raises ``ValueError``.
        """

    def eval_params(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameters hold the weights to deploy."""
        return contextlib.nullcontext()

    # ------------------------------------------------------------------ the template

    @final
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, or ``None`` without a closure.

        Args:
            closure: As the rule's ``needs`` say: nothing after ``loss.backward()``, a closure, or
                an :class:`~optimizers.oracle.Objective` bound to a batch.

        Raises:
            OracleError: If the objective cannot answer; the message names the remedy.
            RuntimeError: For sparse gradients, or gradients of another shape.
        """
        if closure is None and checkpoint.is_dry_step(self.param_groups):
            return None
        params = self._all_params()
        oracle = as_oracle(closure, self.needs, type(self).__name__, params)
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p):  # cleared, or partly loaded
                    self._make_state(p, group)
        # A rule that evaluates at several points must not get casts of the first one.
        once = closure is None or self.needs is Needs.GRADIENTS
        with contextlib.nullcontext() if once else without_cast_cache():
            loss, signal = self.probe(oracle)
        # Everything that can be refused is refused here, before the first write.
        batches = [batch for group in self.param_groups for batch in self._batches(group, signal)]
        for batch in batches:
            torch._foreach_add_([state["step"] for state in batch.states], 1)
        if self.scope is Scope.ELEMENT:
            ready = local_batches(batches)
        else:
            ready = whole_batches(batches, layers=self.scope is Scope.LAYER)
        for batch in ready:
            self._apply(batch)
        self.finish(loss)
        return loss

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _batches(self, group: Group, signal: Signal) -> Iterable[Batch]:
        """Collect the group's signals, refuse what cannot be used, split by device and dtype."""
        name, layouts = type(self).__name__, self._layouts
        parts: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for p in group["params"]:
            g = signal(p)
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"{name} does not support sparse gradients; use torch.optim.SparseAdam for "
                    "this parameter, or build the layer with sparse=False."
                )
            if g.shape != p.shape:
                raise RuntimeError(
                    f"{name} got a gradient of shape {tuple(g.shape)} for a parameter of shape "
                    f"{tuple(p.shape)}."
                )
            layout = (p.shape, p.dtype)
            if layouts.setdefault(id(p), layout) != layout:
                raise RuntimeError(
                    f"a parameter changed from {layouts[id(p)]} to {layout} after {name} made its "
                    "state; build the optimizer after changing the model."
                )
            g = distributed.aligned(g, p, name)
            key = (p.device, p.dtype, distributed.mesh_of(p))
            ps, gs = parts.setdefault(key, ([], []))
            ps.append(p)
            gs.append(g if g.dtype == p.dtype else g.to(p.dtype))
        return [Batch(ps, gs, [self.state[p] for p in ps], group) for ps, gs in parts.values()]

    def _apply(self, batch: Batch) -> None:
        params, grads, states, group = batch
        dtype, targets = params[0].dtype, params
        if dtype.is_complex:
            targets = params = [torch.view_as_real(p) for p in params]
            grads = [torch.view_as_real(g.resolve_conj()) for g in grads]
        if group.get("maximize", False) and self.needs is Needs.GRADIENTS:
            grads = list(torch._foreach_neg(grads))
        if dtype in _LOW_PRECISION:
            params = [_working(p) for p in params]
            grads = [_working(g) for g in grads]
        if group.get("compile", False):
            # The rate travels as a tensor: a number would be fixed in the graph and recompiled.
            options = {k: v for k, v in group.items() if k not in _FOREIGN_KEYS}
            if not isinstance(options["lr"], Tensor):
                options["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
            self._compiled_update()(params, grads, states, options)
        elif group.get("foreach") is False:
            for p, g, state in zip(params, grads, states, strict=True):
                self.update(p, g, state, group)
        else:
            self.update_foreach(params, grads, states, group)
        if targets is not params:
            torch._foreach_copy_(targets, params)

    def _compiled_update(self) -> Callable[..., None]:
        if self._compiled is None:
            self._compiled = torch.compile(self.update_foreach, dynamic=False)
        return self._compiled

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Add a group: its options are checked and its state made at once.

        Args:
            param_group: ``params`` and any option of the rule; the caller's dict is not changed.

        Raises:
            TypeError: If it is no dict, or a key is nearly but not quite an option's name.
            ValueError: If an option or a parameter is refused; the optimizer is unchanged then.
        """
        if not isinstance(param_group, Mapping):
            raise TypeError(f"param_group must be a dict; got {type(param_group).__name__}.")
        if "params" not in param_group:
            raise ValueError("a param_group must have the key 'params'.")
        self._check_keys(param_group)
        group = dict(param_group)
        if isinstance(group["params"], Iterable) and not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
            tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            if len({id(p) for p in tensors}) != len(tensors):
                raise ValueError(
                    "a parameter appears twice in one group and would be updated twice; "
                    "pass each parameter once."
                )
        super().add_param_group(group)
        group = self.param_groups[-1]
        made: list[Tensor] = []
        try:
            for key, value in group.items():
                if key not in _FOREIGN_KEYS:
                    group[key] = _own(value)
            group["format_version"] = checkpoint.FORMAT_VERSION
            self._check_values(group, f" (in parameter group {len(self.param_groups) - 1})")
            for p in group["params"]:
                self._check_param(p)
            if self.scope is Scope.LAYER:
                distributed.check_layer(group["params"], type(self).__name__)
            for p in group["params"]:
                self._make_state(p, group)
                made.append(p)
            if self._ready:
                self.prepare()
        except Exception:
            self.param_groups.pop()
            for p in made:
                self.state.pop(p, None)
            raise

    def _check_values(self, group: Group, where: str = "") -> None:
        """Check every option of a group against the rule's ranges and its own conditions."""
        ranges.check_all(group, {**_COMMON_RANGES, **self.ranges}, where)
        self.validate(group)

    def _check_keys(self, group: Mapping[str, Any]) -> None:
        known = set(self.defaults) | _FOREIGN_KEYS
        for key in group:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.8)
            if key not in known and near:
                raise TypeError(
                    f"{type(self).__name__} has no option {key!r}; did you mean {near[0]!r}?"
                )

    def _check_param(self, p: Tensor) -> None:
        """Refuse a parameter that the rule cannot update."""
        name = type(self).__name__
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"{name} got an uninitialised parameter; run one batch through the model, or "
                "otherwise materialise it, first."
            )
        if p.is_meta:
            raise ValueError(
                f"{name} got a parameter on the meta device; materialise it first "
                "(model.to_empty(device=...))."
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(f"{name} updates floating-point parameters; got {p.dtype}.")
        if p.layout is not torch.strided:
            raise ValueError(f"{name} updates dense parameters; got the layout {p.layout}.")
        if p.is_complex() and self.scope is not Scope.ELEMENT:
            raise ValueError(
                f"{name} does not support complex parameters; give this one (shape "
                f"{tuple(p.shape)}) to an element-wise rule."
            )
        if distributed.is_sharded(p) and self.scope is Scope.MODEL:
            raise ValueError(
                f"{name} must see the whole model and got a shard (DTensor); give sharded "
                "parameters to another rule, or keep the model unsharded."
            )
        distributed.check(p, name, whole=self.scope is not Scope.ELEMENT)

    def _fresh_state(self, p: Tensor, group: Group) -> State:
        """Return the state of a parameter that has not been updated yet."""
        # State made under inference_mode could never be updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            proxy = distributed.as_real(p) if p.is_complex() else p.detach()
            # A rule that sees whole matrices at a step sees them here too, one after the other.
            whole = self.scope is not Scope.ELEMENT
            state = self.init_state(_working(everywhere(proxy) if whole else proxy), group)
            state = distributed.adopt(state, proxy, type(self).__name__, whole)
            step = torch.zeros((), dtype=torch.float32, device=distributed.local(p).device)
        return {"step": step, **state}

    def _make_state(self, p: Tensor, group: Group) -> None:
        self.state[p] = self._fresh_state(p, group)
        self._layouts[id(p)] = (p.shape, p.dtype)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, of this class or of its twin in torch.

        State keeps the dtype that the rule gave it (torch would cast it to the parameter's) and
        moves to the parameter's device. Where both sides carry parameter names, state follows the
        names. Loading is data only, and a state that is refused changes nothing.

        Args:
            state_dict: As from :meth:`state_dict`, possibly through ``torch.save`` and
                ``torch.load(weights_only=True)``.

        Raises:
            ValueError: Naming what does not fit (groups, names, keys, shapes, ranges, version).
        """
        loaded = checkpoint.read(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = checkpoint.read(result)
        groups, packed = checkpoint.decode(loaded, self.param_groups, type(self).__name__)
        state: defaultdict[Tensor, State] = defaultdict(dict)
        empty = not any(values for part in packed for values in part)
        for index, group in enumerate(groups):
            self._check_values(group, f" (in loaded parameter group {index})")
            for p, values in zip(group["params"], packed[index], strict=True):
                if not values and not empty and self._has_history(p):
                    raise ValueError(
                        f"the loaded state lacks the parameter of shape {tuple(p.shape)}, whose "
                        "state here would be lost. A checkpointer leaves out parameters that "
                        "require no gradient: call release() of an optimizer that drops layers "
                        "before saving and loading, or build a new optimizer."
                    )
                template = self._fresh_state(p, group)
                foreign = checkpoint.is_foreign(loaded)
                state[p] = checkpoint.fill(template, values, p, foreign)
        self._layouts.clear()
        before = {"state": self.state, "param_groups": self.param_groups}
        self.__setstate__({"state": state, "param_groups": groups})
        try:
            self.prepare()
        except Exception:  # the loaded groups do not fit each other
            self.__setstate__(before)
            self.prepare()
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _has_history(self, p: Tensor) -> bool:
        """Whether the parameter has been updated here."""
        step = self.state.get(p, {}).get("step")
        return step is not None and bool(step > 0)


_LOW_PRECISION = frozenset({torch.float16, torch.bfloat16})


def _working(tensor: Tensor) -> Tensor:
    """Return the tensor in at least float32."""
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def _stored_gradient(p: Tensor) -> Tensor | None:
    return p.grad


def _own(value: Any) -> Any:
    """Copy a default so that no two groups share a tensor or a mutable value."""
    if isinstance(value, Tensor):
        own = value.detach().clone()
        return own.reshape(()) if own.numel() == 1 else own
    # NumPy's scalars would make a checkpoint that weights_only=True refuses.
    return value.item() if isinstance(value, np.generic) else deepcopy(value)
