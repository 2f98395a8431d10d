"""The language of hyperparameter ranges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers import MFAC, OASIS, AdaHessian, InducedMetric, ranges
from optimizers.second_order import KFAC, PSGDKron, SophiaG


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("[0, 1)", [0, 0.5, 0.999], [1, -0.1, float("nan"), "0.5", None, True]),
        ("(0, inf)", [1e-9, 3], [0, float("inf"), -1]),
        ("(0, 1]", [1, 0.5], [0, 1.1]),
        ("int [1, 100)", [1, 99], [0, 100, 5.0, 1.5, "3", (3,)]),
        ("bool", [True, False], [1, 0, None]),
        ("{none, sqrt}", ["none", "sqrt"], ["cubic", None, 1]),
        ("[0, 1] or None", [None, 0.3], [2, "none"]),
        ("finite", [1, -2.5], [float("inf"), float("nan"), "1"]),
        ("2 of [0, 1)", [(0.9, 0.99), [0, 0]], [(0.9,), 0.9, (0.9, 1), (), None]),
        (
            "3 of finite or list of 3 of finite",
            [(1, 2, 3), [(1, 2, 3)] * 2],
            [(1, 2), 3.0, [(1, 2, 3), 4]],
        ),
        ("{all} or list of [0, 1]", ["all", [0.5, 0.5]], [0.5, [2], []]),
    ],
)
def test_rules(rule, good, bad):
    for value in good:
        ranges.check("x", value, rule)
    for value in bad:
        with pytest.raises(ValueError, match="x"):
            ranges.check("x", value, rule)


def test_message_names_rule_and_value():
    with pytest.raises(ValueError, match=r"^momentum must lie in \[0, 1\); got 1.0\.$"):
        ranges.check("momentum", 1.0, "[0, 1)")


def test_sequences_are_checked_entry_by_entry():
    ranges.check("betas", (0.9, 0.99), "2 of [0, 1)")
    with pytest.raises(ValueError, match=r"betas\[1\] must lie in \[0, 1\); got 1.5"):
        ranges.check("betas", (0.9, 1.5), "2 of [0, 1)")
    with pytest.raises(ValueError, match="must hold 2 values"):
        ranges.check("betas", (), "2 of [0, 1)")
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\); got \[0.9\]"):
        ranges.check("momentum", [0.9], "[0, 1)")  # a scalar is no list


def test_numpys_scalars_are_numbers():
    ranges.check("lr", np.float32(0.1), "[0, inf)")
    ranges.check("steps", np.int64(3), "int [1, 9]")


def test_tensors_are_checked_by_value():
    ranges.check("lr", torch.tensor(0.1), "[0, inf)")
    with pytest.raises(ValueError, match="lr must lie in"):
        ranges.check("lr", torch.tensor(-0.1), "[0, inf)")
    with pytest.raises(ValueError, match="one-element"):
        ranges.check("lr", torch.ones(2), "[0, inf)")


def test_a_rule_that_cannot_be_read_is_an_error_of_its_author():
    with pytest.raises(ValueError, match="cannot be read"):
        ranges.check("x", 1.0, "between 0 and 1")


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_half_open_interval_is_what_it_says(value):
    try:
        ranges.check("x", value, "[0, 1)")
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == (0 <= value < 1)


def test_groups_that_must_agree():
    def check(*values):
        ranges.check_alike([{"x": v} for v in values], ["x"], "share it")

    alike = [(1, 1.0), ([1, 2], (1, 2)), (None, None), (torch.ones(2), torch.ones(2).double())]
    for values in alike:
        check(*values)
    for values in [(1, 2), (1, None), ((1, 2), (1, 3)), (torch.ones(2), torch.ones(3)),
                   (torch.zeros(()), 0)]:  # fmt: skip
        with pytest.raises(ValueError, match="x must be the same in all groups, which share it"):
            check(*values)
    with pytest.raises(ValueError, match="got 3 in group 2, 1 in group 0"):
        check(1, 1, 3)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (AdaHessian, {"hessian_every": 3, "seed": 5}),
        (OASIS, {"adaptive": False, "lr": 0.1, "hessian_every": 2}),
        (SophiaG, {"hessian_every": 3}),
        (InducedMetric, {"variant": "rms"}),
        (PSGDKron, {"precond_lr": 0.2}),
        (MFAC, {"damp": 0.1}),
        (KFAC, {"kl_clip": 0.1}),
    ],
)
def test_what_groups_share_is_loaded_over_other_options(rule, options):
    """The loaded groups must agree with each other, and not with those that they replace."""
    params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    groups = [{"params": [p]} for p in params]
    saved = rule(groups, **options).state_dict()
    other = rule([{"params": [p]} for p in params])
    other.load_state_dict(saved)
    for group in other.param_groups:
        assert {name: group[name] for name in options} == options
