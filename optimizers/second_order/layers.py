"""Layers seen from outside: what enters them, how the outputs depend on what leaves them.

From a layer's inputs and the slopes of the model's outputs in its outputs follow the per-sample
Jacobians in its parameters, whatever model the layer stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# The slopes ``(b, c, *outputs)`` of one use of a layer -> ``(position, (b, c, numel))`` for each
# of its parameters.
Columns = Callable[[Tensor], list[tuple[int, Tensor]]]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Use(NamedTuple):
    """One use of a layer.

    Attributes:
        module: The layer.
        inputs: What it was called with, ``(b, ...)``.
        outputs: What it returned, in the graph.
    """

    module: nn.Module
    inputs: Tensor
    outputs: Tensor


def watched(model: nn.Module, params: Sequence[Tensor]) -> list[nn.Module] | None:
    """Return the layers that hold the parameters, or ``None`` if not all are in known layers."""
    wanted = {id(p) for p in params}
    found: list[nn.Module] = []
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)} & wanted
        if not own:
            continue
        if not _is_known(module) or is_altered(module):
            return None
        found.append(module)
    return found


def record(
    modules: Sequence[nn.Module],
    run: Callable[[], Any],
    accepts: Callable[[Tensor, Tensor], bool],
) -> tuple[Any, list[Use], list[nn.Module]]:
    """Run something and watch layers; the hooks are gone afterwards, also after an exception.

    Args:
        modules: The layers.
        run: Called once.
        accepts: Whether a use, by its input and output, is one that the caller understands.

    Returns:
        What ``run`` returned, every accepted use in order, and the layers that were also used
        otherwise (by keyword, with several arguments, with an input that was later overwritten).
    """
    uses: list[Use] = []
    versions: list[int] = []
    odd: list[nn.Module] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        plain = len(arguments) == 1 and isinstance(arguments[0], Tensor)
        if not plain or not isinstance(output, Tensor) or not accepts(arguments[0], output):
            odd.append(module)
            return None
        uses.append(Use(module, arguments[0].detach(), output))
        versions.append(arguments[0]._version)
        # What follows may work in place: it gets a copy, the graph keeps this one.
        return output.clone()

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    changed = [use.inputs._version != seen for use, seen in zip(uses, versions, strict=True)]
    odd += [use.module for use, overwritten in zip(uses, changed, strict=True) if overwritten]
    return result, uses, odd


def observe(
    modules: Sequence[nn.Module], run: Callable[[], Any], batch: int
) -> tuple[Any, list[Use]] | None:
    """Run the model; return its outputs and every use of the layers, or ``None`` if one is odd."""

    def accepts(x: Tensor, output: Tensor) -> bool:
        batched = len(x) == batch and len(output) == batch and output.ndim >= 2
        return output.requires_grad and batched

    outputs, uses, odd = record(modules, run, accepts)
    return None if odd else (outputs, uses)


def columns_of(use: Use, positions: dict[int, int]) -> Columns:
    """Return how slopes become the Jacobian in the parameters of a use.

    Args:
        use: One use of a known layer.
        positions: Where each parameter, by identity, is among those that are asked for.
    """
    module, x = use.module, use.inputs
    weight = positions.get(id(module.weight))
    bias = positions.get(id(getattr(module, "bias", None)))

    def columns(B: Tensor) -> list[tuple[int, Tensor]]:
        found = []
        if weight is not None:
            found.append(
                (weight, _in_weight(module, x.to(B.dtype) if x.is_floating_point() else x, B))
            )
        if bias is not None:
            found.append((bias, _in_bias(module, B)))
        return found

    return columns


def _in_weight(module: nn.Module, x: Tensor, B: Tensor) -> Tensor:
    """Return the Jacobian ``(b, c, numel)`` in the weight."""
    b, c = B.shape[:2]
    if isinstance(module, nn.Linear):
        B, x = B.reshape(b, c, -1, B.shape[-1]), x.reshape(b, -1, x.shape[-1])
        left = B.transpose(2, 3).reshape(b, -1, B.shape[2])  # (b, c * out, positions)
        return torch.bmm(left, x).view(b, c, -1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        seen = patches(module, x)  # (b, groups, in * kernel, positions)
        groups, size = seen.shape[1:3]
        B = B.reshape(b, c, groups, -1, seen.shape[3]).transpose(1, 2)
        left = B.reshape(b, groups, -1, seen.shape[3])  # (b, groups, c * out, positions)
        J = (left @ seen.mT).view(b, groups, c, -1, size)
        return J.transpose(1, 2).reshape(b, c, -1)
    if isinstance(module, nn.Embedding):
        rows, width = module.num_embeddings, module.embedding_dim
        index, B = x.reshape(b, -1), B.reshape(b, c, -1, width)
        if module.padding_idx is not None:
            B = B * (index != module.padding_idx).to(B.dtype)[:, None, :, None]
        J = B.new_zeros(b, c, rows, width)
        return J.scatter_add_(2, index[:, None, :, None].expand_as(B), B).flatten(2)
    product = B * normalized(module, x).unsqueeze(1)
    return _over_positions(module, product)


def _in_bias(module: nn.Module, B: Tensor) -> Tensor:
    """Return the Jacobian ``(b, c, numel)`` in the bias."""
    if isinstance(module, nn.Linear):
        return B.flatten(2, -2).sum(2) if B.ndim > 3 else B
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return B.flatten(3).sum(3)
    return _over_positions(module, B)


def patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Return what each output position sees, ``(b, groups, in / groups * kernel, positions)``."""
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
        padding = (0,) * len(module.kernel_size)
    options: list[tuple[int, ...]] = [
        tuple(int(v) for v in value)
        for value in (module.kernel_size, module.dilation, padding, module.stride)
    ]
    if x.ndim == 3:
        x = x.unsqueeze(2)
        options = [(fill, *value) for value, fill in zip(options, (1, 1, 0, 1), strict=True)]
    kernel, dilation, around, stride = options
    seen = functional.unfold(x, kernel, dilation, around, stride)
    return seen.view(len(x), module.groups, seen.shape[1] // module.groups, seen.shape[2])


def normalized(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a normalisation multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, tuple(module.normalized_shape), eps=module.eps)
    assert isinstance(module, BATCH_NORMS)
    if module.training or module.running_mean is None:  # by the batch's own statistics
        return functional.batch_norm(x, None, None, training=True, eps=module.eps)
    return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


def _over_positions(module: nn.Module, B: Tensor) -> Tensor:
    """Sum ``(b, c, *outputs)`` over everything that shares a parameter element."""
    b, c = B.shape[:2]
    if isinstance(module, nn.LayerNorm):
        size = 1
        for length in module.normalized_shape:
            size *= length
        return B.reshape(b, c, -1, size).sum(2)
    return B.reshape(b, c, B.shape[2], -1).sum(3)


def _is_known(module: nn.Module) -> bool:
    """Whether it is a layer whose Jacobian is written here, as torch defines it."""
    if type(module) in (nn.Conv1d, nn.Conv2d):
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    if type(module) in BATCH_NORMS:
        return not module.training and getattr(module, "running_mean", None) is not None
    return type(module) in (nn.Linear, nn.LayerNorm, nn.GroupNorm)


def is_altered(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return "forward" in module.__dict__ or bool(hooked)
