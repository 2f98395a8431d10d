"""What each parameter of a model is for: the facts on which routing decides."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.layer_dropping.flags import refuse_dropped

ROLES = (
    "hidden",  # a matrix between hidden layers
    "packed",  # several such matrices stacked in one weight, to be treated apart
    "embedding",  # a look-up table
    "head",  # feeds the model's output
    "tied",  # one weight in two places, of which one is a look-up
    "first_conv",  # the convolution that sees the input
    "thin",  # a matrix too small or too elongated to orthogonalize with profit
    "vector",  # biases, gains, scalars
    "unclassified",  # none of the above could be established
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_FUSED_NAME = re.compile(r"(?:^|[._])(qkv|in_proj|c_attn|query_key_value)")
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}

# Below and beyond these, orthogonalizing costs more than it gives (the bounds timm uses).
_SHORTEST, _LONGEST_RATIO = 4, 128


@dataclass(frozen=True)
class Weight:
    """One parameter with the role it plays.

    Attributes:
        name: Its (first) name in the model.
        parameter: The parameter.
        role: One of :data:`ROLES`.
        reason: Why, in words.
        splits: Number of equal row blocks that are matrices of their own.
        flatten: Whether three dimensions are a convolution kernel, not a stack of matrices.
    """

    name: str
    parameter: nn.Parameter
    role: str
    reason: str
    splits: int = 1
    flatten: bool = False


def classify(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    roles: Mapping[str, str] | None = None,
) -> list[Weight]:
    """Establish the role of every trainable parameter of a model; frozen ones are left out.

    Roles come from the modules that own a parameter, not from its shape alone. Which layer is
    the head and which convolution is first is read from one forward pass if ``example_inputs``
    are given, else assumed from the order in which the layers were registered (the reason says
    so).

    Args:
        model: The model.
        example_inputs: Inputs of one forward pass (a tuple for several arguments); it runs
            without gradients in evaluation mode and leaves the model as it was.
        roles: Roles that you know better: glob patterns of parameter names to roles. The first
            pattern that matches wins.

    Returns:
        One record for each parameter, in the model's order; a tied parameter once.

    Raises:
        ValueError: If a role is unknown, a pattern of ``roles`` matches no parameter, or a
            parameter is dropped for the next step of an optimizer that drops layers.
    """
    refuse_dropped(model.parameters())
    owners = _owners(model)
    order = _execution_order(model, example_inputs)
    head, first_conv, how = _ends(model, order)
    overrides = dict(roles or {})
    for pattern, role in overrides.items():
        if role not in ROLES:
            raise ValueError(f"roles[{pattern!r}] must be one of {ROLES}; got {role!r}.")
        if not any(fnmatch.fnmatch(name, pattern) for name, _ in model.named_parameters()):
            raise ValueError(f"roles has the pattern {pattern!r}, which matches no parameter.")
    weights = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        users = owners[id(parameter)]
        given = next((p for p in overrides if fnmatch.fnmatch(name, p)), None)
        if given is not None:
            role, reason, splits = overrides[given], f"given as {given!r}", 1
            found = _role(name, parameter, users, head, first_conv, how)
            if role == "packed":
                splits = found[2] if found[0] == "packed" else 3
        else:
            role, reason, splits = _role(name, parameter, users, head, first_conv, how)
        flatten = isinstance(users[0][1], nn.Conv1d) and parameter.ndim == 3
        weights.append(Weight(name, parameter, role, reason, splits, flatten))
    return weights


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return for each parameter the modules that hold it, with the name they hold it under."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{own_name}" if module_name else own_name
            owners.setdefault(id(parameter), []).append((full, module))
    return owners


def _execution_order(model: nn.Module, example_inputs: Any) -> list[nn.Module] | None:
    """Return the weighted leaf modules in the order of one forward pass."""
    if example_inputs is None:
        return None
    order: list[nn.Module] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        order.append(module)

    kinds = (nn.Linear, *_CONVOLUTIONS, *_LOOKUPS)
    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    modes = [(module, module.training) for module in model.modules()]
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        model.eval()
        with torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return order


def _ends(
    model: nn.Module, order: list[nn.Module] | None
) -> tuple[nn.Module | None, nn.Module | None, str]:
    """Return the head, the first convolution, and how they were found."""
    how = "in a traced forward pass"
    if order is None:
        order, how = list(model.modules()), "in registration order (no example_inputs to trace)"
    dense = [m for m in order if isinstance(m, (nn.Linear, *_CONVOLUTIONS))]
    convolutions = [m for m in order if isinstance(m, _CONVOLUTIONS)]
    before = order[: order.index(convolutions[0])] if convolutions else []
    first = convolutions[0] if convolutions else None
    if any(isinstance(m, _LOOKUPS) for m in before):
        first = None  # a convolution over embeddings sees no raw input
    return (dense[-1] if dense else None), first, how


def _role(
    name: str,
    parameter: Tensor,
    users: list[tuple[str, nn.Module]],
    head: nn.Module | None,
    first_conv: nn.Module | None,
    how: str,
) -> tuple[str, str, int]:
    """Return (role, reason, splits) of one parameter."""
    modules = [module for _, module in users]
    owner = modules[0]
    if parameter.ndim < 2:
        return "vector", "bias, gain or scalar", 1
    if parameter.is_complex():
        return "unclassified", "complex, for which Muon has no rule", 1
    if len(users) > 1 and any(isinstance(m, _LOOKUPS) for m in modules):
        return "tied", "shared by " + " and ".join(n for n, _ in users), 1
    if isinstance(owner, _LOOKUPS):
        return "embedding", f"the table of an {type(owner).__name__}", 1
    if any(m is head for m in modules):
        return "head", f"the last layer {how}", 1
    if any(m is first_conv for m in modules):
        return "first_conv", f"the first convolution {how}", 1
    if isinstance(owner, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        return _matrix(parameter, 3, "query, key and value projections in one weight")
    if isinstance(owner, nn.LSTM) and "weight_hr" in name:
        return _matrix(parameter, 1, "the projection of an LSTM")
    for kind, gates in _GATES.items():
        if isinstance(owner, kind):
            return _matrix(parameter, gates, f"{gates} gates of {type(owner).__name__}")
    if isinstance(owner, nn.Linear):
        fused = _FUSED_NAME.search(name)
        if fused is not None:
            if owner.out_features == 3 * owner.in_features:
                return _matrix(parameter, 3, f"three projections fused, by its name {name!r}")
            return (
                "unclassified",
                "seems to fuse projections of unequal size; give its role in roles=",
                1,
            )
        return _matrix(parameter, 1, "a linear layer between hidden layers")
    if isinstance(owner, nn.Bilinear):
        return _matrix(parameter, 1, "a stack of bilinear forms")
    if isinstance(owner, _CONVOLUTIONS):
        if owner.groups > 1:
            return "thin", "a grouped convolution: its rows see different inputs", 1
        return _matrix(parameter.flatten(1), 1, "a convolution between hidden layers")
    if isinstance(owner, _TRANSPOSED):
        return "unclassified", "a transposed convolution stores (in, out); give its role", 1
    if isinstance(owner, nn.MultiheadAttention):
        return _matrix(parameter, 1, "a projection of attention")
    if isinstance(owner, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return "vector", f"the gain of a {type(owner).__name__}", 1
    return (
        "unclassified",
        f"held by {type(owner).__name__} itself, which says nothing of its use",
        1,
    )


def _matrix(parameter: Tensor, splits: int, reason: str) -> tuple[str, str, int]:
    """Return hidden or packed, or thin where a polar factor is not worth its cost."""
    if parameter.ndim == 3 and splits == 1:
        rows, columns = parameter.shape[1], parameter.shape[2]
    else:
        rows, columns = parameter.shape[0] // splits, math.prod(parameter.shape[1:])
    short, long = min(rows, columns), max(rows, columns)
    if short < _SHORTEST or long > _LONGEST_RATIO * short:
        return "thin", f"{rows} x {columns} is too small or too elongated", 1
    return ("packed" if splits > 1 else "hidden"), reason, splits
