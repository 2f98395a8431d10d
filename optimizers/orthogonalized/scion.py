"""Scion: steps from norm balls that fit the kind of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import ema_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    check_matrices,
    choose_precision,
    polar_options,
)
from optimizers.orthogonalized.norms import SCALED, is_matrix, scaled_direction


class Scion(Optimizer):
    r"""Every layer moves by the same amount, measured in a norm that fits its kind.

    The one member of this family that needs no AdamW beside it: matrices take the spectral norm,
    embeddings and heads sign or row norms, vectors the root mean square. Rates then carry over
    between widths. Give each kind a group with its ``norm`` and ``scale``.

    The rule, for each parameter :math:`W` with gradient :math:`G`:

    .. math::
        M &\leftarrow \mu M + (1-\mu) G \\
        W &\leftarrow (1-\eta) W \quad\text{(constrained only)} \\
        W &\leftarrow W - \eta\, s\, d(M)

    with the directions d of :func:`optimizers.orthogonalized.norms.scaled_direction` and the
    scale s. In the constrained form a weight in the ball of radius s stays in it.

    Args:
        params: Parameters; the last dimension is the input's.
        lr: :math:`\eta` in [0, inf), below 1 for the constrained form.
        norm: ``"spectral"``, ``"spectral_conv"``, ``"sign"``, ``"col_norm"``, ``"row_norm"``,
            ``"bias_rms"``, or ``"auto"``: by the number of dimensions, convolution for four and
            five, spectral for two and three (a stack), root mean square for vectors, scalars and
            single numbers.
        momentum: :math:`\mu` in [0, 1), the weight of the old average; the authors' argument of
            this name is :math:`1 - \mu`.
        scale: s in (0, inf). The authors' examples: 50 for hidden layers and 3000 for a sign
            head, at rates around :math:`2^{-12}`.
        constrained: Whether to shrink by :math:`1 - \eta` first.
        eps: Added to the denominators of ``col_norm, row_norm, bias_rms``, in (0, inf).
        polar: Back-end of the polar factor, see :class:`Muon`.
        ns_coefficients: See :class:`Muon`.
        ns_steps: See :class:`Muon`.
        ns_dtype: See :class:`Muon`.
        splits: See :class:`Muon`.
        flatten: Whether three dimensions are a kernel ``(out, in, width)``.
        maximize: Ascend instead of descend.
        foreach: ``False`` loops, otherwise parameters are batched.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape, in its dtype (float32 for half
        precision), at zero first as in the authors' code.

    Raises:
        ValueError: If an option lies outside its range, a matrix norm is asked of a vector, or a
            constrained group has ``lr`` of 1 or more.

    Reference:
        Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher, "Training Deep Learning Models
        with Norm-Constrained LMOs", ICML 2025, algorithms 1 and 2; scalings of the authors' code.
        It divides a kernel's direction by the kernel's area; five dimensions are treated alike
        here.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "norm": "{auto, " + ", ".join(SCALED) + "}",
        "momentum": "[0, 1)",
        "scale": "(0, inf)",
        "constrained": "bool",
        **POLAR_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        norm: str = "auto",
        momentum: float = 0.9,
        scale: float = 1.0,
        constrained: bool = False,
        eps: float = 1e-8,
        polar: str = "auto",
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | str = "auto",
        splits: int = 1,
        flatten: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "norm": norm,
                "momentum": momentum,
                "scale": scale,
                "constrained": constrained,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
                **polar_options(
                    polar=polar,
                    ns_coefficients=ns_coefficients,
                    ns_steps=ns_steps,
                    ns_dtype=ns_dtype,
                    splits=splits,
                    flatten=flatten,
                ),
                "eps": eps,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse what does not fit together."""
        norm, lr = group["norm"], group["lr"]
        if norm not in ("auto", "bias_rms"):
            check_matrices(group, f"Scion with norm={norm!r}")
        if norm == "spectral_conv" and any(p.ndim < 3 for p in group["params"]):
            raise ValueError(
                "norm='spectral_conv' needs convolution kernels (out, in, *kernel); use "
                "norm='spectral' for matrices."
            )
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if group["constrained"] and on_host and float(lr) >= 1:
            raise ValueError(
                f"lr must be below 1 in the constrained form, which shrinks by 1 - lr; got "
                f"{float(lr)!r}."
            )

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the average, at zero."""
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        self.update_foreach([p], [g], [state], group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters; equal shapes share one polar iteration."""
        momenta = [s["momentum_buffer"] for s in states]
        ema_(momenta, grads, group["momentum"])
        if group["constrained"]:
            torch._foreach_mul_(params, 1 - group["lr"])
        rate = group["lr"] * group["scale"]
        kinds: dict[str, list[int]] = {}
        for i, m in enumerate(momenta):
            kinds.setdefault(_kind(m, group), []).append(i)
        for norm, members in kinds.items():
            # A kernel (out, in, width) is flattened whatever the option says.
            options = {**group, "flatten": group["flatten"] or norm == "spectral_conv"}
            own = scaled_direction([momenta[i] for i in members], norm, options, group["eps"])
            for i, d in zip(members, own, strict=True):
                params[i].sub_(rate * d)


def _kind(m: Tensor, group: Group) -> str:
    """Return the norm of a parameter."""
    norm: str = group["norm"]
    if norm != "auto":
        return norm
    if m.ndim < 2 or not is_matrix(m, group["splits"] if m.ndim == 2 else 1, group["flatten"]):
        return "bias_rms"
    return "spectral_conv" if m.ndim > 3 or (m.ndim == 3 and group["flatten"]) else "spectral"
