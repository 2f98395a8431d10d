"""Gradients of the validation loss in hyperparameters, by implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.functional.derivatives import refuse_single
from optimizers.objective import OracleError
from optimizers.oracle import Needs

_RANGES = {
    "terms": "int [0, inf)",
    "hvp_lr": "(0, inf) or None",
    "damping": "[0, inf)",
    "method": "{neumann, cg}",
}
# No term of a convergent series is longer than the one before; some growth is left to Hessians
# whose smallest eigenvalues are a little negative.
_GROWTH = 10.0
# Below it the residual of conjugate gradients is rounding.
_SOLVED = 4.0


def hypergradient(
    training: Tensor,
    validation: Tensor,
    params: Iterable[Tensor],
    hyperparams: Iterable[Tensor],
    *,
    terms: int = 3,
    hvp_lr: float | None = None,
    damping: float = 0.0,
    method: str = "neumann",
) -> list[Tensor]:
    r"""Return the derivative of the validation loss of the *trained* weights in hyperparameters.

    Where the weights :math:`w` minimise the training loss :math:`L_T(w, \varphi)`, they are a
    function of the hyperparameters with :math:`dw/d\varphi = -H^{-1} \partial_w\partial_\varphi
    L_T`, and the validation loss changes by

    .. math::
        h = \partial_\varphi L_V - (\partial_\varphi \partial_w L_T)\, v_2, \qquad
        v_2 \approx (H + \delta I)^{-1} \partial_w L_V, \qquad H = \partial_w^2 L_T

    ``neumann`` takes :math:`v_2 = \alpha \sum_{j=0}^{K} (I - \alpha(H + \delta I))^j
    \partial_w L_V`: K products with the Hessian, and memory for two vectors whatever K.
    :math:`K = 0` is the method T1-T2; at a minimum K terms are back-propagation through
    :math:`K + 1` steps of gradient descent; for :math:`\mu I \preceq H \preceq L I` and
    :math:`\alpha = 1/L` the error of :math:`v_2` is at most
    :math:`(1 - \mu/L)^{K+1} \|\partial_w L_V\| / \mu`. ``cg`` takes K iterations of conjugate
    gradients, which need no rate and far fewer products where H is ill conditioned, but a
    positive definite :math:`H + \delta I`.

    Both losses keep their graphs: call ``backward`` on neither before. One graph of the training
    loss, and so one batch, serves all products.

    Args:
        training: :math:`L_T`, one number, with its graph down to both kinds of parameters.
        validation: :math:`L_V`, one number, with its graph.
        params: The weights, near a minimum of the training loss; away from it h is biased.
        hyperparams: :math:`\varphi`: what the training loss depends on differentiably, as
            logarithms of weight decays, weights of samples, augmentations. Learning rates are none.
        terms: K, at least 0.
        hvp_lr: :math:`\alpha` in :math:`(0, 2/\lambda_{max})`, the rate of the inner descent;
            ``neumann`` needs it.
        damping: :math:`\delta` in [0, inf), for losses that are not convex.
        method: ``"neumann"`` or ``"cg"``.

    Returns:
        h, one tensor for each hyperparameter.

    Raises:
        ValueError: If an option lies outside its range, or a parameter is given as both.
        OracleError: If a loss is no number with a graph, the training loss can be differentiated
            only once, a hyperparameter takes part in neither
            loss, the series diverges, conjugate gradients meet negative curvature, or h is not
            finite.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> phi = torch.tensor([0.5], requires_grad=True)
        >>> training = ((w - 2 * phi) ** 2).sum()  # minimised by w = 2 phi
        >>> h = hypergradient(training, (w**2).sum(), [w], [phi], hvp_lr=0.5)
        >>> float(h[0])  # of (2 phi)^2
        4.0

    Reference:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020, algorithms 1 to 3; Luketina et al., "Scalable
        Gradient-Based Tuning of Continuous Regularization Hyperparameters", ICML 2016, for K = 0.
        Departures: algorithm 3 of the first as printed subtracts the terms and leaves out the
        factor :math:`\alpha`; the series needs both otherwise. The damping is ours.
    """
    options = {"terms": terms, "hvp_lr": hvp_lr, "damping": damping, "method": method}
    ranges.check_all(options, _RANGES, "")
    weights, varied = _checked(params, "params"), _checked(hyperparams, "hyperparams")
    if {id(p) for p in weights} & {id(p) for p in varied}:
        raise ValueError("params and hyperparams must differ; a tensor was given as both.")
    if method == "neumann" and hvp_lr is None:
        raise ValueError(
            "hvp_lr must be given for method='neumann': the rate of the inner gradient descent, "
            "below 2 over the largest eigenvalue of the Hessian. method='cg' needs none."
        )
    for name, loss in (("training", training), ("validation", validation)):
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise OracleError(
                f"the {name} loss must be one number with its graph; return loss_fn(...) without "
                "backward(), detach() or item()."
            )
    outer = _grads(validation, [*weights, *varied], create_graph=False)
    first = [_or_zeros(g, p) for g, p in zip(outer, weights, strict=False)]
    direct = outer[len(weights) :]
    slopes = _grads(training, weights, create_graph=True)
    try:
        refuse_single(training, slopes)
    except RuntimeError as error:
        raise OracleError(f"the training loss: {error}") from None
    curved = [(g, k) for k, g in enumerate(slopes) if g is not None and g.requires_grad]

    def product(v: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor | None]:
        if not curved:  # linear in the weights
            return [None] * len(of)
        return list(
            torch.autograd.grad(
                [g for g, _ in curved],
                of,
                [v[k] for _, k in curved],
                retain_graph=True,
                allow_unused=True,
            )
        )

    def hessian(v: Sequence[Tensor]) -> list[Tensor]:
        images = [_or_zeros(h, p) for h, p in zip(product(v, weights), weights, strict=True)]
        if damping:
            torch._foreach_add_(images, list(v), alpha=damping)
        return images

    with torch.no_grad():
        if method == "neumann":
            assert hvp_lr is not None
            solved = _neumann(hessian, first, terms, hvp_lr)
        else:
            solved = _conjugate_gradients(hessian, first, terms)
        mixed = product(solved, varied)
    found = []
    for k, (own, through, p) in enumerate(zip(direct, mixed, varied, strict=True)):
        if own is None and through is None:
            raise OracleError(
                f"hyperparameter {k} (shape {tuple(p.shape)}) takes part in neither loss, or only "
                "in the optimizer (a learning rate has no implicit gradient), or in the training "
                "loss apart from the weights. Use it in the training loss, or leave it out."
            )
        found.append(_or_zeros(own, p) - _or_zeros(through, p))
    if not all(bool(h.isfinite().all()) for h in found):
        raise OracleError("the hypergradient is not finite; check both losses and the weights.")
    return found


class IFTHypergradient:
    r"""An outer optimizer: tunes hyperparameters by :func:`hypergradient`.

    Not a :class:`torch.optim.Optimizer`, for it needs two losses. An ordinary optimizer trains the
    weights between its steps, and an ordinary optimizer moves the hyperparameters: it finds their
    hypergradient in ``.grad``.

    Args:
        params: The weights.
        outer: An optimizer over the hyperparameters, of stored gradients (``torch.optim.RMSprop``).
        terms: As in :func:`hypergradient`; so are the next three.
        hvp_lr: The rate of the series.
        damping: Added to the Hessian.
        method: ``"neumann"`` or ``"cg"``.

    Attributes:
        options: The last four by name; they may be changed between steps, as the rate where the
            Hessian grows with the hyperparameters.

    Raises:
        TypeError: If ``outer`` is no optimizer.
        ValueError: If an option lies outside its range, a weight is one of the hyperparameters, or
            ``outer`` evaluates an objective itself.

    Example:
        >>> import torch
        >>> w = torch.zeros(1, requires_grad=True)
        >>> phi = torch.ones(1, requires_grad=True)
        >>> inner = torch.optim.SGD([w], lr=0.25)
        >>> tuner = IFTHypergradient([w], torch.optim.SGD([phi], lr=0.1), hvp_lr=0.25)
        >>> training = lambda: ((w - 2 * phi) ** 2).sum()
        >>> for _ in range(100):
        ...     inner.zero_grad()
        ...     training().backward()
        ...     inner.step()
        ...     _ = tuner.step(training, lambda: ((w - 3) ** 2).sum())
        >>> round(float(phi.detach()), 4)
        1.5
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        outer: torch.optim.Optimizer,
        *,
        terms: int = 3,
        hvp_lr: float | None = None,
        damping: float = 0.0,
        method: str = "neumann",
    ) -> None:
        if not isinstance(outer, torch.optim.Optimizer):
            raise TypeError(f"outer must be an optimizer; got a {type(outer).__name__}.")
        needs = getattr(outer, "needs", Needs.GRADIENTS)
        if needs is not Needs.GRADIENTS or isinstance(outer, torch.optim.LBFGS):
            raise ValueError(
                f"outer must work from stored gradients; got {type(outer).__name__}, which "
                "evaluates an objective itself. Use torch.optim.RMSprop, for one."
            )
        self.params = _checked(params, "params")
        self.outer = outer
        self.options: dict[str, Any] = {
            "terms": terms,
            "hvp_lr": hvp_lr,
            "damping": damping,
            "method": method,
        }
        ranges.check_all(self.options, _RANGES, "")
        if {id(p) for p in self.params} & {id(p) for p in self.hyperparams}:
            raise ValueError("a weight of the inner problem must not be one of outer's parameters.")

    @property
    def hyperparams(self) -> list[Tensor]:
        """The parameters of the outer optimizer."""
        return [p for group in self.outer.param_groups for p in group["params"]]

    def step(self, training: Callable[[], Tensor], validation: Callable[[], Tensor]) -> Tensor:
        """Move the hyperparameters; return the validation loss before. Weights stay.

        Args:
            training: Returns the training loss of one batch with its graph, without ``backward``.
            validation: The same for the validation loss. Both run the model once: statistics of
                batch normalisation take part in training mode, so call ``model.eval()``.

        Raises:
            OracleError: As :func:`hypergradient`; nothing has changed then.
        """
        with torch.enable_grad():
            loss = validation()
            found = hypergradient(training(), loss, self.params, self.hyperparams, **self.options)
        for p, h in zip(self.hyperparams, found, strict=True):
            p.grad = h
        self.outer.step()
        return loss.detach()


def _checked(tensors: Iterable[Tensor], name: str) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be an iterable of tensors; got one tensor. Pass [tensor].")
    found = list(tensors)
    if not found or not all(isinstance(p, Tensor) and p.requires_grad for p in found):
        raise ValueError(
            f"{name} must be one tensor or more that require gradients; leave frozen ones out."
        )
    return found


def _grads(loss: Tensor, of: Sequence[Tensor], *, create_graph: bool) -> list[Tensor | None]:
    with torch.enable_grad():
        try:
            return list(
                torch.autograd.grad(
                    loss, of, create_graph=create_graph, retain_graph=True, allow_unused=True
                )
            )
        except RuntimeError as error:
            if "second time" in str(error):
                raise OracleError(
                    "a loss has lost its graph: backward() was called on it. Evaluate it anew."
                ) from error
            raise


def _or_zeros(g: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if g is None else g.detach()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors."""
    parts = [torch.vdot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]
    device, dtype = parts[0].device, parts[0].dtype
    return torch.stack([part.to(device, dtype) for part in parts]).sum()


def _neumann(
    hessian: Callable[[Sequence[Tensor]], list[Tensor]],
    first: list[Tensor],
    terms: int,
    rate: float,
) -> list[Tensor]:
    """Return ``rate`` times the sum of the series."""
    v, total = [x.clone() for x in first], [x.clone() for x in first]
    squares = [_dot(v, v)]
    for _ in range(terms):
        torch._foreach_sub_(v, hessian(v), alpha=rate)
        torch._foreach_add_(total, v)
        squares.append(_dot(v, v))
    lengths = torch.stack(squares).sqrt().tolist()  # read once, after the last term
    if not all(length <= _GROWTH * lengths[0] for length in lengths):
        raise OracleError(
            f"the Neumann series diverges: its terms grew from {lengths[0]:.3g} to "
            f"{max(lengths):.3g}. Lower hvp_lr (now {rate:g}) below 2 over the largest eigenvalue "
            "of the Hessian; for negative eigenvalues add damping."
        )
    torch._foreach_mul_(total, rate)
    return total


def _conjugate_gradients(
    hessian: Callable[[Sequence[Tensor]], list[Tensor]], b: list[Tensor], iterations: int
) -> list[Tensor]:
    """Return the iterate after some steps from zero."""
    x = [torch.zeros_like(t) for t in b]
    r, p = [t.clone() for t in b], [t.clone() for t in b]
    square = float(_dot(r, r))
    enough = (_SOLVED * torch.finfo(b[0].dtype).eps) ** 2 * square
    for _ in range(iterations):
        if square <= enough:
            break
        image = hessian(p)
        curvature = float(_dot(p, image))
        if not curvature > 0:
            raise OracleError(
                f"conjugate gradients need a positive definite Hessian; the curvature along a "
                f"direction is {curvature:.3g}. Add damping, or use method='neumann'."
            )
        step = square / curvature
        torch._foreach_add_(x, p, alpha=step)
        torch._foreach_sub_(r, image, alpha=step)
        last, square = square, float(_dot(r, r))
        torch._foreach_mul_(p, square / last)
        torch._foreach_add_(p, r)
    return x
