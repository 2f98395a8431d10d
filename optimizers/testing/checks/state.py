"""Checks of state: saving, loading, copying."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor

from optimizers.testing.checks.registry import check
from optimizers.testing.checks.subject import (
    Case,
    CheckFailed,
    NotApplicable,
    Subject,
    equal,
    require,
)


def _resumes(
    subject: Subject,
    through: Any,
    *,
    dtype: torch.dtype = torch.float32,
    after: tuple[int, ...] = (0, 1, 5),
) -> None:
    """Demand that a run continued from a stored state is the uninterrupted run, bit by bit."""
    for k in after:
        case, optimizer = subject.pair(dtype=dtype)
        case.run(optimizer, range(k))
        stored = through(optimizer.state_dict())
        dtypes = _dtypes(optimizer)
        twin = subject.case(dtype=dtype)
        twin.model.load_state_dict(case.model.state_dict())
        other = subject.make(twin.params)
        other.load_state_dict(stored)
        if k:
            require(_dtypes(other) == dtypes, "loading changed the dtype of the state")
        left = case.run(optimizer, range(k, k + 5))
        right = twin.run(other, range(k, k + 5))
        require(equal(left, right), f"the run resumed after {k} steps differs")


def _dtypes(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [
        sorted(f"{k}:{v.dtype}" for k, v in optimizer.state[p].items() if isinstance(v, Tensor))
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def _through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@check
def resumes_from_a_state_dict(subject: Subject) -> None:
    """A run continued through state_dict() and load_state_dict() is the uninterrupted run."""
    _resumes(subject, copy.deepcopy)


@check
def resumes_from_a_file(subject: Subject) -> None:
    """The same through torch.save and torch.load(weights_only=True)."""
    try:
        _resumes(subject, _through_file, after=(5,))
    except pickle.UnpicklingError as error:
        raise CheckFailed(f"weights_only refuses it: {error}") from error


@check
def resumes_with_bfloat16_parameters(subject: Subject) -> None:
    """The same with bfloat16 parameters: the state keeps its dtype."""
    _resumes(subject, _through_file, dtype=torch.bfloat16, after=(5,))


@check
def resumes_through_distributed_checkpoint(subject: Subject) -> None:
    """The same through torch.distributed.checkpoint's state dicts, plain and flattened."""
    from torch.distributed.checkpoint import state_dict as dcp

    for flat in (False, True):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        case, optimizer = subject.pair(dtype=torch.float32)
        case.run(optimizer, range(4))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stored = dcp.get_optimizer_state_dict(case.model, optimizer, options=options)
                stored = _through_file(stored)
                twin = subject.case(dtype=torch.float32)
                twin.model.load_state_dict(case.model.state_dict())
                other = subject.make(twin.params)
                dcp.set_optimizer_state_dict(twin.model, other, stored, options=options)
        except Exception as error:
            kind = "flattened" if flat else "plain"
            raise CheckFailed(f"{kind}: {type(error).__name__}: {error}") from error
        left, right = case.run(optimizer, range(4, 8)), twin.run(other, range(4, 8))
        require(equal(left, right), f"the resumed run differs (flattened={flat})")


def _copies_step_alike(subject: Subject, duplicate: Any) -> None:
    case, optimizer = subject.pair()
    case.run(optimizer, range(3))
    try:
        model, other = duplicate((case.model, optimizer))
        twin = Case(subject.needs, bias=subject.takes_vectors, loss_fn=subject.loss_fn)
        twin.model, twin.objective = model, type(twin.objective)(model, twin.objective.loss_fn)
        right = twin.run(other, range(3, 8))
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    left = case.run(optimizer, range(3, 8))
    require(equal(left, right), "the copy trains differently")


@check
def deepcopy_steps_alike(subject: Subject) -> None:
    """A deep copy of model and optimizer goes on like the original."""
    _copies_step_alike(subject, copy.deepcopy)


@check
def pickle_steps_alike(subject: Subject) -> None:
    """A pickled and unpickled pair of model and optimizer goes on like the original."""
    _copies_step_alike(subject, lambda pair: pickle.loads(pickle.dumps(pair)))


@check
def state_is_plain(subject: Subject) -> None:
    """State is a dict of tensors and numbers per parameter, keyed by parameters alone."""
    case, optimizer = subject.pair()
    case.run(optimizer, range(2))
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for key, state in optimizer.state.items():
        require(key in held, f"the state has a key that is no parameter: {type(key).__name__}")
        for name, value in state.items():
            require(
                isinstance(value, (Tensor, int, float)),
                f"state[{name!r}] is a {type(value).__name__}",
            )


@check
def state_is_there_from_the_start(subject: Subject) -> None:
    """State exists before the first step, so that a checkpointer needs no dry step."""
    _, optimizer = subject.pair()
    missing = [
        p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)
    ]
    require(not missing, f"{len(missing)} parameters have no state before the first step")


@check
def misfitting_state_is_refused(subject: Subject) -> None:
    """A state with wrong shapes, missing keys or groups is refused and changes nothing."""
    case, optimizer = subject.pair()
    case.run(optimizer, range(3))
    good = copy.deepcopy(optimizer.state_dict())

    def wrong_shape(state: Any) -> None:
        for value in state["state"].values():
            for key, entry in value.items():
                if isinstance(entry, Tensor) and entry.ndim:
                    value[key] = torch.zeros(7, 7, 7)
                    return
        raise NotApplicable("the rule keeps no tensor of the parameter's shape")

    def wrong_groups(state: Any) -> None:
        state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))

    def bad_rate(state: Any) -> None:
        state["param_groups"][0]["lr"] = float("nan")

    for damage in (wrong_groups, bad_rate, wrong_shape):
        bad = copy.deepcopy(good)
        damage(bad)
        try:
            optimizer.load_state_dict(bad)
        except (ValueError, KeyError):
            now = optimizer.state_dict()
            require(_same_tensors(now, good), f"{damage.__name__}: the refused load changed it")
            continue
        except Exception as error:
            raise CheckFailed(f"{damage.__name__}: {type(error).__name__}: {error}") from error
        raise CheckFailed(f"{damage.__name__} is accepted")


def _same_tensors(left: Any, right: Any) -> bool:
    a = [v for s in left["state"].values() for v in s.values() if isinstance(v, Tensor)]
    b = [v for s in right["state"].values() for v in s.values() if isinstance(v, Tensor)]
    rates = [float(g["lr"]) for g in left["param_groups"]]
    return equal(a, b) and rates == [float(g["lr"]) for g in right["param_groups"]]


@check
def names_are_matched(subject: Subject) -> None:
    """With named parameters, state follows the names when the order changed, or is refused."""
    case = subject.case()
    names = list(case.model.named_parameters())
    # The two matrices change places; one vector of another shape would give it away.
    optimizer = subject.make(names)
    case.run(optimizer, range(3))
    stored = copy.deepcopy(optimizer.state_dict())
    wanted = {n: copy.deepcopy(optimizer.state[p]) for n, p in names}
    if not any(isinstance(v, Tensor) and v.ndim for s in wanted.values() for v in s.values()):
        raise NotApplicable("the rule keeps no tensor of the parameter's shape")
    twin = dict(subject.case().model.named_parameters())
    other = subject.make([(n, twin[n]) for n, _ in names[::-1]])
    try:
        other.load_state_dict(stored)
    except ValueError:
        return
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error
    for name, _ in names:
        for key, value in wanted[name].items():
            if isinstance(value, Tensor):
                got = other.state[twin[name]][key]
                require(
                    got.shape == value.shape and bool((got == value).all()),
                    f"{name!r} got the {key} of another parameter",
                )


@check
def load_hooks_run(subject: Subject) -> None:
    """Hooks around state_dict() and load_state_dict() run."""
    case, optimizer = subject.pair()
    case.run(optimizer, range(2))
    seen: list[str] = []
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    require(seen == ["saved", "loading", "loaded"], f"they ran as {seen}")


@check
def empty_state_round_trip(subject: Subject) -> None:
    """load_state_dict(state_dict()) on a fresh optimizer, as trainers do, changes nothing."""
    case, optimizer = subject.pair()
    twin, other = subject.pair()
    optimizer.load_state_dict(optimizer.state_dict())
    require(
        equal(case.run(optimizer, range(4)), twin.run(other, range(4))), "the run is another one"
    )
