"""How the rows of a batch are obtained: layer by layer where that is exact, else sample by sample.

The inputs of a model's layers and the slopes of the outputs in what leaves them say everything,
at a small part of the Jacobian's cost: for an ``nn.Sequential`` of linear layers and activations
by construction, for other models of known layers after a check. Every other model that treats
its samples one by one gives dense rows, by ``vmap(jacrev)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optimizers.curvature import LossForm, OutputModel
from optimizers.objective import Objective, OracleError, each_tensor
from optimizers.second_order.layers import columns_of, is_altered, observe, watched
from optimizers.second_order.rows import DenseRows, LayeredRows, Rows
from optimizers.second_order.terms import Layer, Shared


def batch_rows(
    objective: Objective,
    params: list[Tensor],
    model: OutputModel,
    *,
    batch: int,
    chunk: int | None,
    rule: str,
    memory: float = math.inf,
) -> Rows:
    """Return the rows of the bound batch; their backward passes are counted as ``vjp``.

    Args:
        objective: Bound to the batch.
        params: The columns.
        model: The loss around the outputs.
        batch: Number of samples.
        chunk: Samples whose Jacobian is computed at once, or ``None`` for all.
        rule: The optimizer's name, for messages.
        memory: Elements of rows of shared layers that are kept.

    Raises:
        OracleError: If the model is no deterministic function of one sample.
    """
    objective.names(params)  # refuses parameters of another model
    rows = _layered_rows(objective, params, model, rule)
    rows = rows or _observed_rows(objective, params, model, batch, memory, rule)
    if rows is not None:
        return rows
    return _dense_rows(objective, params, model, batch, chunk, rule)


def check_samplewise(model: nn.Module, rule: str) -> None:
    """Refuse what has no per-sample Jacobian, or another one at every call.

    Raises:
        OracleError: Naming the module and the remedy.
    """
    for name, module in model.named_modules():
        where = f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise OracleError(
                f"{rule} needs the Jacobian of each sample, and {where} mixes the samples of a "
                "batch. Call model.eval() to use its running statistics, or use GroupNorm or "
                "LayerNorm."
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.training and module.track_running_stats
        ):
            raise OracleError(
                f"{rule} evaluates the model several times in a step, and {where} updates its "
                "statistics each time. Call model.eval(), or set track_running_stats=False."
            )
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        else:
            rate = getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise OracleError(
                f"{rule} needs the same function at every evaluation, and {where} drops at random "
                f"with probability {rate}. Set it to 0 or call model.eval()."
            )


def _layered_rows(
    objective: Objective, params: list[Tensor], model: OutputModel, rule: str
) -> LayeredRows | None:
    """Return the rows of a plain chain of linear layers, or ``None`` if it is not one."""
    chain = _chain(objective.model)
    if chain is None or len(objective.arguments) != 1:
        return None
    positions = {id(p): k for k, p in enumerate(params)}
    values, layers = objective.inputs, []
    if not isinstance(values, Tensor):
        return None
    with torch.enable_grad():
        for module in chain:
            inputs, values = values, module(values)
            if isinstance(module, nn.Linear):
                if inputs.ndim != 2:
                    return None
                weight = positions.pop(id(module.weight), None)
                bias = positions.pop(id(module.bias), None)
                if weight is not None or bias is not None:
                    layers.append((inputs.detach(), values, weight, bias))
        if positions or values.ndim != 2:  # a parameter elsewhere
            return None
        _check_same(values.detach(), model, rule)
        b, c = values.shape
        directions = torch.eye(c, dtype=values.dtype, device=values.device)
        slopes = torch.autograd.grad(
            values,
            [layer[1] for layer in layers],
            directions.unsqueeze(1).expand(c, b, c),
            is_grads_batched=True,
        )
    objective.counts.vjp += c
    return LayeredRows(
        [
            Layer(a, B.movedim(0, 1), weight, bias)
            for (a, _, weight, bias), B in zip(layers, slopes, strict=True)
        ],
        [p.shape for p in params],
        model,
    )


def _observed_rows(
    objective: Objective,
    params: list[Tensor],
    model: OutputModel,
    batch: int,
    memory: float,
    rule: str,
) -> LayeredRows | None:
    """Return the rows of a model of known layers, or ``None`` if it holds other parameters.

    That every use of the parameters was seen, and that no sample looks at another, is checked:
    the rows must give the gradient, and half of the batch the same outputs.
    """
    modules = watched(objective.model, params)
    if modules is None or model.q.shape[0] != batch:
        return None
    with torch.enable_grad():
        seen = observe(modules, objective.outputs, batch)
        if seen is None:
            return None
        values, uses = seen
        if not isinstance(values, Tensor) or values.ndim != 2 or not uses:
            return None
        b, c = values.shape
        directions = torch.eye(c, dtype=values.dtype, device=values.device)
        directions = directions.unsqueeze(1).expand(c, b, c)
        outputs = [use.outputs for use in uses]
        slopes = _slopes(values, outputs, directions)
        slope = model.slope().to(values.dtype)
        gradient = torch.autograd.grad(values, params, slope, allow_unused=True)
    objective.counts.vjp += c + 1
    _check_same(values.detach(), model, rule)
    few = (b + 1) // 2
    half = each_tensor(objective.arguments, lambda a: a[:few] if _is_batched(a, b) else a)
    with torch.no_grad():
        again = objective.model(*half)
    if len(again) != few or not _is_close(again, values.detach()[:few]):
        return None
    positions = {id(p): k for k, p in enumerate(params)}
    known = [p for use in uses for p in use.module.parameters(recurse=False) if id(p) in positions]
    alone = {id(p) for p in known if sum(p is other for other in known) == 1}
    layers: list[Layer | Shared] = []
    for use, B in zip(uses, slopes, strict=True):
        own = [id(p) for p in use.module.parameters(recurse=False) if id(p) in positions]
        if isinstance(use.module, nn.Linear) and B.ndim == 3 and alone.issuperset(own):
            weight, bias = (positions.get(id(p)) for p in (use.module.weight, use.module.bias))
            layers.append(Layer(use.inputs, B, weight, bias))
        else:
            held = [positions[k] for k in dict.fromkeys(own)]
            layers.append(Shared(B, columns_of(use, positions), held))
    if {id(p) for p in known} != set(positions):
        return None
    rows = LayeredRows(layers, [p.shape for p in params], model, memory)
    found = rows.gradient()
    expected = [
        torch.zeros_like(mine) if g is None else g for g, mine in zip(gradient, found, strict=True)
    ]
    largest = max(float(g.abs().max()) for g in expected)
    # A gradient far below the others is rounding of theirs.
    close = (_is_close(m, g, 1e-2 * largest) for m, g in zip(found, expected, strict=True))
    return rows if all(close) else None


def _slopes(values: Tensor, outputs: list[Tensor], directions: Tensor) -> list[Tensor]:
    """Return the slopes ``(b, c, ...)`` of the outputs of a model in those of its layers."""
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(
            values, outputs, directions, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    except RuntimeError:  # a backward without a batching rule
        each = [
            torch.autograd.grad(values, outputs, d, retain_graph=True, allow_unused=True)
            for d in directions
        ]
        columns: Any = zip(*each, strict=True)
        found = [None if part[0] is None else torch.stack(part) for part in columns]
    return [
        values.new_zeros(len(o), len(directions), *o.shape[1:]) if B is None else B.movedim(0, 1)
        for o, B in zip(outputs, found, strict=True)
    ]


def _is_close(found: Tensor, expected: Tensor, least: float = 0.0) -> bool:
    """Whether two results are equal but for a thousand roundings of the coarser."""
    dtypes = (found.dtype, expected.dtype)
    rounding = min(1e3 * max(torch.finfo(dtype).eps for dtype in dtypes), 0.05)
    gap = float((found.reshape(expected.shape) - expected).abs().max())
    return gap <= rounding * (float(expected.abs().max()) + least)


_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Tanhshrink, nn.Identity),
)


def _chain(model: nn.Module) -> list[nn.Module] | None:
    """Return the modules of a plain chain in order, or ``None`` if the model is another thing."""
    chain = _flattened(model)
    linear = [module for module in chain if type(module) is nn.Linear]
    own = [p for module in linear for p in module.parameters()]
    untied = len({id(p) for p in own}) == len(own)
    return chain if linear and untied and all(_is_plain(module) for module in chain) else None


def _flattened(model: nn.Module) -> list[nn.Module]:
    """Return the modules of nested sequences in order."""
    if type(model) is nn.Sequential and not is_altered(model):
        return [module for part in model for module in _flattened(part)]
    return [model]


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer, an activation or a flattening, as torch defines them."""
    if type(module) is nn.Flatten:
        known = (module.start_dim, module.end_dim) == (1, -1)
    else:
        known = type(module) in (nn.Linear, *_ELEMENTWISE)
    # One that works in place would change the inputs of the layer before.
    return known and not getattr(module, "inplace", False) and not is_altered(module)


def _dense_rows(
    objective: Objective,
    params: list[Tensor],
    model: OutputModel,
    batch: int,
    chunk: int | None,
    rule: str,
) -> DenseRows:
    """Return the rows from per-sample Jacobians, ``chunk`` samples at a time."""
    arguments = objective.arguments
    dims = tuple(0 if _is_batched(a, batch) else None for a in arguments)
    single = _single(objective, params, dims, model.form)
    rows = torch.func.vmap(
        torch.func.jacrev(single, has_aux=True),
        in_dims=(None, *dims),
        randomness="error",
        chunk_size=chunk,
    )
    try:
        # The fused attention kernels have no rule for vmap and would run sample by sample.
        with sdpa_kernel(SDPBackend.MATH):
            jacobian, outputs = rows([p.detach() for p in params], *arguments)
    except (RuntimeError, ValueError) as error:
        raise OracleError(
            f"{rule} cannot differentiate the outputs of single samples ({error}). {_SAMPLEWISE}"
        ) from error
    _check_same(outputs, model, rule)
    objective.counts.vjp += model.q.numel() // batch
    return DenseRows(jacobian, [p.shape for p in params], model)


_SAMPLEWISE = (
    "Let the model map each sample alone to its outputs: the first dimension of every tensor it "
    "is given is the batch, nothing is drawn at random (model.eval()), no value is read by .item()."
)


def _check_same(outputs: Tensor, model: OutputModel, rule: str) -> None:
    """Refuse outputs that another evaluation of the model does not repeat."""
    dtypes = (outputs.dtype, model.outputs.dtype)
    rounding = min(1e3 * max(torch.finfo(dtype).eps for dtype in dtypes), 0.05)
    if outputs.numel() != model.outputs.numel():
        raise OracleError(
            f"{rule} got {outputs.numel()} outputs when it evaluated the samples again, one by "
            f"one, and {model.outputs.numel()} for the batch. {_SAMPLEWISE}"
        )
    gap = float((outputs.reshape(model.outputs.shape) - model.outputs).abs().max())
    if not gap <= rounding * (1 + float(model.outputs.abs().max())):
        raise OracleError(
            f"{rule} got other outputs when it evaluated the samples again, one by one, than for "
            f"the batch (by up to {gap:.2g}). {_SAMPLEWISE}"
        )


def _is_batched(argument: Any, batch: int) -> bool:
    return isinstance(argument, Tensor) and argument.ndim > 0 and len(argument) == batch


def _single(
    objective: Objective, params: list[Tensor], dims: tuple[int | None, ...], form: LossForm
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the outputs of one sample as a flat vector, twice."""

    def single(values: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
        sample = tuple(
            a.unsqueeze(0) if dim == 0 else a for a, dim in zip(arguments, dims, strict=True)
        )
        outputs = form.terms(objective.call(params, values, *sample)).reshape(-1)
        return outputs, outputs

    return single
