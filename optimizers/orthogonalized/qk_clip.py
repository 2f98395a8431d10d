"""QK-clip: projections of queries and keys, shrunk where attention logits grew too large."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers import distributed


@torch.no_grad()
def qk_clip_(
    q_weight: Tensor,
    k_weight: Tensor,
    s_max: Tensor | Sequence[float] | float,
    tau: float = 100.0,
    *,
    n_heads: int,
    n_kv_heads: int | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    q_rope_weight: Tensor | None = None,
) -> Tensor:
    r"""Shrink query and key projections in place until the attention logits are within ``tau``.

    To be called after an optimizer's step, with the largest logits that the forward pass before it
    saw: :math:`S_h = \max_{ij} q_i^\top k_j / \sqrt d` for each head, over the batch (and over all
    ranks). The logits of head h are multiplied by :math:`\gamma_h = \min(1, \tau / S_h)`; nothing
    is clipped when no logit exceeds ``tau``. For attention without normalised queries and keys
    (QK-norm undoes any scaling of the weights).

    With a key head for each query head both are multiplied by :math:`\sqrt{\gamma_h}`. Where a
    group g of query heads shares a key head, its key gets :math:`\sqrt{\max_{h \in g}\gamma_h}` and
    each query the rest, :math:`\gamma_h / \sqrt{\max_{h \in g} \gamma_h}`. Then every head shrinks
    by exactly its own factor, and no weight ever grows; any other share of the keys would let the
    others' queries grow or leave some logits too large.

    Args:
        q_weight: ``(n_heads * d, features)``: a weight, or a view of the rows of a fused one.
        k_weight: ``(n_kv_heads * d, features)``, changed in place like all of these.
        s_max: The largest logit of each head, ``(n_heads,)``, or one number for all. On the
            weights' device nothing is read back to the host. A head whose maximum is not finite is
            left alone.
        tau: Largest logit allowed, in (0, inf]; ``inf`` clips nothing.
        n_heads: Number of query heads.
        n_kv_heads: Number of key heads, a divisor of ``n_heads``; query heads
            ``g * n_heads / n_kv_heads`` and on belong to key head g. ``None``: ``n_heads``.
        q_bias: ``(n_heads * d,)``, the bias of the queries.
        k_bias: ``(n_kv_heads * d,)``, the bias of the keys.
        q_rope_weight: For multi-head latent attention, ``(n_heads * d_rope, features)``: the rotary
            part of the queries, multiplied by :math:`\gamma_h`, since the rotary key that it meets
            is shared by all heads and stays. ``q_weight`` and ``k_weight`` are then the
            projections to the content parts.

    Returns:
        :math:`\gamma`, ``(n_heads,)``.

    Raises:
        ValueError: If shapes do not fit the heads, or ``tau`` is not positive.

    Reference:
        Kimi Team, "Kimi K2: Open Agentic Intelligence", 2025; the grouped form is derived here.
    """
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    _check(q_weight, k_weight, q_bias, k_bias, q_rope_weight, tau, n_heads, n_kv_heads)
    wide = torch.float64 if q_weight.dtype is torch.float64 else torch.float32
    largest = torch.as_tensor(s_max, dtype=wide, device=q_weight.device)
    if largest.shape not in ((), (1,), (n_heads,)):
        raise ValueError(
            f"s_max must hold one number for each of the {n_heads} heads, or one for all; got the "
            f"shape {tuple(largest.shape)}."
        )
    largest = largest.expand(n_heads)
    # Compared as written: NaN and what is below tau are left alone, and so is infinity.
    clipped = (largest > tau) & (largest < math.inf)
    gamma = torch.where(clipped, tau / torch.where(clipped, largest, 1), 1)
    k_factor = gamma.view(n_kv_heads, -1).amax(1).sqrt()
    q_factor = gamma / k_factor.repeat_interleave(n_heads // n_kv_heads)
    for weight, factor in (
        (q_weight, q_factor),
        (q_bias, q_factor),
        (k_weight, k_factor),
        (k_bias, k_factor),
        (q_rope_weight, gamma),
    ):
        if weight is not None:
            _scale_(weight, factor)
    return gamma


def _scale_(weight: Tensor, factor: Tensor) -> None:
    """Multiply equal blocks of rows by one factor each."""
    rows = factor.repeat_interleave(weight.shape[0] // len(factor))
    rows = rows.view(-1, *[1] * (weight.ndim - 1))
    if distributed.is_sharded(weight):
        laid_out = distributed.adopt({"rows": rows.expand(weight.shape)}, weight, "qk_clip_", True)
        rows, weight = distributed.local(laid_out["rows"]), distributed.local(weight)
    weight.detach().mul_(rows)


def _check(
    q_weight: Tensor,
    k_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    q_rope_weight: Tensor | None,
    tau: float,
    n_heads: int,
    n_kv_heads: int,
) -> None:
    """Raise ``ValueError`` for what does not fit; nothing has been changed then."""
    if not tau > 0:
        raise ValueError(f"tau must lie in (0, inf]; got {tau!r}.")
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"n_kv_heads must divide n_heads, both positive; got {n_kv_heads} and {n_heads}."
        )
    for name, weight, heads in (
        ("q_weight", q_weight, n_heads),
        ("k_weight", k_weight, n_kv_heads),
        ("q_rope_weight", q_rope_weight, n_heads),
    ):
        if weight is not None and (weight.ndim != 2 or weight.shape[0] % heads):
            raise ValueError(
                f"{name} must be a matrix of {heads} equal blocks of rows, one for each head; got "
                f"the shape {tuple(weight.shape)}."
            )
    q_size, k_size = len(q_weight) // n_heads, len(k_weight) // n_kv_heads
    if q_size != k_size:
        raise ValueError(
            f"query and key heads must have the same size; got {q_size} and {k_size} rows for each "
            f"of {n_heads} and {n_kv_heads} heads: check n_kv_heads."
        )
    for name, bias, weight in (("q_bias", q_bias, q_weight), ("k_bias", k_bias, k_weight)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} must have the shape ({len(weight)},) of its weight's rows; got "
                f"{tuple(bias.shape)}."
            )
