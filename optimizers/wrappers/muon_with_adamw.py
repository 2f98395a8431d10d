"""Muon for the hidden matrices of a model and AdamW for everything else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimizers import ranges
from optimizers.orthogonalized import Muon
from optimizers.wrappers.roles import classify
from optimizers.wrappers.routed import INNER_RANGES, InnerGroups, Routed, Rule


def muon_with_adamw(
    model: nn.Module,
    lr: float | Tensor = 0.02,
    *,
    adamw_lr: float = 3e-4,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    maximize: bool = False,
    example_inputs: Any = None,
    roles: Mapping[str, str] | None = None,
    rule: Callable[..., torch.optim.Optimizer] = Muon,
    **muon: Any,
) -> Routed:
    """Return Muon for the hidden matrices of a model and AdamW for everything else.

    Hidden and packed matrices go to :class:`Muon`; embeddings, tied weights, heads, the first
    convolution, thin matrices, and vectors go to ``torch.optim.AdamW`` (fused). What could not be
    classified goes to AdamW with a warning that names it. OneCycleLR and CyclicLR need
    ``cycle_momentum=False``.

    Args:
        model: The model.
        lr: Muon's rate. A scheduler moves both rates together.
        adamw_lr: AdamW's rate.
        weight_decay: Decoupled decay of every matrix and table; vectors get none.
        betas: Of AdamW.
        eps: Of AdamW.
        maximize: Ascend instead of descend, in both rules.
        example_inputs: Inputs of one forward pass from which head and first convolution are read;
            see :func:`classify`.
        roles: Roles that you know better, by glob pattern of the name; see :func:`classify`.
        rule: What the matrices get instead of :class:`Muon`, such as :class:`NorMuon`: called
            with groups that may hold ``splits`` and ``flatten``, ``lr``, ``weight_decay`` and
            ``maximize``.
        **muon: Further options of the rule (``momentum``, ``adjust_lr_fn`` ...).

    Raises:
        ValueError: For an option outside its range, or a model without trainable parameters.
        TypeError: For an option that Muon does not have, or parameters in the place of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"muon_with_adamw sorts the parameters of a model; got a {type(model).__name__}. Pass "
            "the model itself, not model.parameters()."
        )
    weights = classify(model, example_inputs=example_inputs, roles=roles)
    unclear = [w for w in weights if w.role == "unclassified"]
    if unclear:
        listing = "; ".join(f"{w.name} {tuple(w.parameter.shape)}: {w.reason}" for w in unclear)
        warnings.warn(
            f"these parameters could not be classified and go to AdamW: {listing}. Say what they "
            'are with roles={"pattern": "hidden"}.',
            stacklevel=2,
        )
    if not any(w.role in ("hidden", "packed") for w in weights):
        warnings.warn(
            "the model has no hidden matrix: every parameter goes to AdamW.", stacklevel=2
        )
    ranges.check_all(
        {"lr": lr, "adamw_lr": adamw_lr, "weight_decay": weight_decay, "betas": betas, "eps": eps},
        {"lr": "(0, inf)", "adamw_lr": "[0, inf)", **INNER_RANGES},
    )

    def build_muon(groups: InnerGroups) -> torch.optim.Optimizer:
        return rule(groups, lr=lr, weight_decay=weight_decay, maximize=maximize, **muon)

    def build_adamw(groups: InnerGroups) -> torch.optim.Optimizer:
        parameters = [p for group in groups for _, p in group["params"]]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.AdamW(
            groups, lr=adamw_lr, betas=betas, eps=eps, maximize=maximize, fused=fused or None
        )

    return Routed(
        weights,
        [
            Rule(
                "muon",
                build_muon,
                wants=lambda w: w.role in ("hidden", "packed"),
                options=lambda w: {"splits": w.splits, "flatten": w.flatten},
            ),
            Rule(
                "adamw",
                build_adamw,
                wants=lambda w: True,
                options=lambda w: {"weight_decay": 0.0 if w.role == "vector" else weight_decay},
            ),
        ],
    )
