"""KFAC: the contract with options beside the defaults, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from optimizers import Objective, OracleError
from optimizers.second_order import KFAC
from optimizers.testing.checks import CHECKS, run_check
from optimizers.testing.checks.subject import Subject
from tests.kfac_cases import ENTROPY, X, Y, chain, randomize

torch.set_num_threads(1)

# --- the contract with other options -------------------------------------------------------------

OPTIONS = {"inverse_update_steps": 3, "factor_update_steps": 2, "fisher": "sampled"}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["default", "kept and sampled"])
@pytest.mark.parametrize(
    "check",
    [
        *("resumes_from_a_file", "resumes_with_bfloat16_parameters", "pickle_steps_alike"),
        *("resumes_through_distributed_checkpoint", "names_are_matched", "same_seed_same_run"),
        *("global_random_state_is_untouched", "raising_closure_changes_nothing"),
    ],
)
def test_contract(check: str, options: dict) -> None:
    result = run_check(CHECKS[check], Subject(KFAC, options))
    assert result.status == "pass", result.why


def test_labels_are_a_function_of_seed_and_step() -> None:
    def run(seed: int) -> list[Tensor]:
        model = chain()
        optimizer = KFAC(model.parameters(), fisher="sampled", seed=seed)
        for _ in range(3):
            optimizer.step(Objective(model, ENTROPY).on(X, Y))
        return [p.detach() for p in model.parameters()]

    one, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, r"damping must lie in \[0, inf\); got -1.0"),
        ({"damping": math.nan}, "damping must lie in"),
        ({"factor_decay": 1.5}, r"factor_decay must lie in \[0, 1\]; got 1.5"),
        ({"kl_clip": 0.0}, r"kl_clip must be \(0, inf\) or None; got 0.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must lie in"),
        ({"fisher": "true"}, "fisher must be one of"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"factor_update_steps": 0}, "factor_update_steps must lie in"),
        ({"inverse_update_steps": 2.5}, "inverse_update_steps must lie in"),
        ({"max_side": -1}, "max_side must lie in"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_options_out_of_range(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(chain().parameters(), **options)


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(1))


REFUSALS = {
    "inputs not finite": (chain, ENTROPY, X / 0, Y, {}, OracleError, "nothing has been changed"),
    "slopes overflow": (
        lambda: chain().float(),
        lambda f, y: 1e30 * ENTROPY(f, y),
        X.float(),
        Y,
        {},
        OracleError,
        "nothing has been changed",
    ),
    "diagonal factors overflow": (
        lambda: chain().float(),
        lambda f, y: 1e30 * ENTROPY(f, y),
        X.float(),
        Y,
        {"max_side": 0},
        OracleError,
        "nothing has been changed",
    ),
    "the sum of the clip overflows": (
        lambda: chain().float(),
        lambda f, y: 1e18 * ENTROPY(f, y),
        X.float(),
        Y,
        {"factor_decay": 1.0, "lr": 1e4},
        OracleError,
        "nothing has been changed",
    ),
    "loss per sample": (
        chain,
        lambda f, y: ENTROPY(f, y, reduction="none"),
        X,
        Y,
        {},
        OracleError,
        "single number",
    ),
    "loss detached": (
        chain,
        lambda f, y: ENTROPY(f.detach(), y),
        X,
        Y,
        {},
        OracleError,
        "no gradient",
    ),
    "loss unknown": (
        chain,
        lambda f, y: ENTROPY(f, y),
        X,
        Y,
        {"fisher": "sampled"},
        OracleError,
        "must know the loss",
    ),
    "another loss": (
        chain,
        lambda f, y: ENTROPY(f, y) * 2,
        X,
        Y,
        {"fisher": "exact", "loss": "cross_entropy"},
        OracleError,
        "minimise another function",
    ),
    "exact pixels": (
        lambda: randomize(Picture()),
        ENTROPY,
        X,
        torch.zeros(6, 3, dtype=torch.long),
        {"fisher": "exact"},
        OracleError,
        'fisher="sampled"',
    ),
    "sparse": (
        lambda: randomize(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))),
        ENTROPY,
        Y,
        Y,
        {},
        RuntimeError,
        "SparseAdam",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case: str) -> None:
    build, loss_fn, x, y, options, error, message = REFUSALS[case]
    model = build()
    optimizer = KFAC(model.parameters(), **options)
    before = [p.detach().clone() for p in model.parameters()]
    stored = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(error, match=message):
        optimizer.step(Objective(model, loss_fn).on(x, y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for key, values in stored.items():
        for name, value in values.items():
            now = optimizer.state_dict()["state"][key][name]
            assert torch.equal(torch.as_tensor(now), torch.as_tensor(value)), name
    assert optimizer.param_groups[0]["time"] == 0


def test_a_plain_closure_and_parameters_of_another_model_are_refused() -> None:
    model = chain()
    with pytest.raises(OracleError, match=r"objective.on\(inputs, targets\)"):
        KFAC(model.parameters()).step(lambda: ENTROPY(model(X), Y))
    with pytest.raises(OracleError, match="build both from the same model"):
        KFAC(chain().parameters()).step(Objective(model, ENTROPY).on(X, Y))


def test_groups_share_what_is_evaluated_together() -> None:
    model = chain()
    a, b, *rest = model.parameters()
    with pytest.raises(ValueError, match=r"kl_clip must be the same .* got 1.0 in group 1"):
        KFAC([{"params": [a]}, {"params": [b], "kl_clip": 1.0}])
    optimizer = KFAC([{"params": [a, b], "damping": 0.5}, {"params": rest, "lr": 0.01}])
    optimizer.step(Objective(model, ENTROPY).on(X, Y))
    optimizer.param_groups[1]["fisher"] = "sampled"
    with pytest.raises(ValueError, match="fisher must be the same"):
        optimizer.step(Objective(model, ENTROPY).on(X, Y))


@pytest.mark.parametrize(
    ("options", "name"), [({"momentum": 0.0}, "momentum"), ({}, "inverse_update_steps")]
)
def test_options_that_need_state_are_refused_later(options, name: str) -> None:
    model = chain()
    optimizer = KFAC(model.parameters(), **options)
    bound = Objective(model, ENTROPY).on(X, Y)
    optimizer.step(bound)
    optimizer.param_groups[0][name] = 0.9 if name == "momentum" else 3
    with pytest.raises(ValueError, match=f"{name} must be .* from the start"):
        optimizer.step(bound)
