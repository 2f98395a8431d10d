"""The language of hyperparameter ranges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers import ranges


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
