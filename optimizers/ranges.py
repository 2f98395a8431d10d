"""A small language for the values that a hyperparameter may take.

A rule is a string, so that it can be printed in an error, in a docstring and in
``python -m optimizers show``:

* ``"[0, 1)"``: a number in the interval; ``inf`` is allowed as an open end. NaN lies in none.
* ``"int [1, 100)"``: an integer in the interval (``bool`` is no number here).
* ``"bool"``: ``True`` or ``False``.
* ``"{none, sqrt}"``: one of the words.
* ``"finite"``: a finite number.
* ``"2 of [0, 1)"``: a tuple or list of two such values; ``"list of ..."``: of one or more.
* ``... or None``: the same, or ``None``; alternatives are joined by ``" or "``.

A one-element tensor is checked by its value.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

_SEQUENCE = re.compile(r"^(list|\d+) of (.+)$")
_INTERVAL = re.compile(r"^(int )?([\[(])\s*([^,]+?)\s*,\s*([^,]+?)\s*([\])])$")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _in_interval(value: Any, match: re.Match[str]) -> bool:
    whole, left, low, high, right = match.groups()
    if not _is_number(value) or (whole and not isinstance(value, numbers.Integral)):
        return False
    # Written so that NaN fails both comparisons.
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    return bool(above and below)


def _matches(value: Any, rule: str) -> bool:
    if rule == "None":
        return value is None
    if rule == "bool":
        return isinstance(value, bool)
    sequence = _SEQUENCE.match(rule)
    if sequence is not None:
        return _problem("x", value, sequence) is None
    if rule == "finite":
        return _is_number(value) and math.isfinite(value)
    if rule.startswith("{"):
        return isinstance(value, str) and value in [w.strip() for w in rule[1:-1].split(",")]
    match = _INTERVAL.match(rule)
    if match is None:
        raise ValueError(f"the range {rule!r} cannot be read; see optimizers.ranges.")
    return _in_interval(value, match)


def _problem(name: str, value: Any, sequence: re.Match[str]) -> str | None:
    """Return what is wrong with a value that should be a sequence, or ``None``."""
    count, inner = sequence.groups()
    if not isinstance(value, (tuple, list)):
        return f"{name} must be {sequence.group()}; got {value!r}."
    if not value or (count != "list" and len(value) != int(count)):
        wanted = "at least one value" if count == "list" else f"{count} values"
        return f"{name} must hold {wanted}; got {value!r}."
    try:
        for index, entry in enumerate(value):
            check(f"{name}[{index}]", entry, inner)
    except ValueError as error:
        return str(error)
    return None


def check(name: str, value: Any, rule: str) -> None:
    """Raise ``ValueError`` unless ``value`` obeys ``rule``.

    Args:
        name: The hyperparameter's name, for the message.
        value: The value; a tensor by its single entry.
        rule: The range, in the language of this module.

    Raises:
        ValueError: Naming the hyperparameter, the rule and the value.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a one-element tensor; "
                f"got a tensor of shape {tuple(value.shape)}."
            )
        # A value on an accelerator is trusted: reading it would stall the device.
        if value.device.type != "cpu":
            return
        value = value.item()
    alternatives = rule.split(" or ")
    if any(_matches(value, part) for part in alternatives):
        return
    sequences = [m for part in alternatives if (m := _SEQUENCE.match(part))]
    if sequences and (isinstance(value, (tuple, list)) or len(sequences) == len(alternatives)):
        raise ValueError(_problem(name, value, sequences[0]))
    if rule.startswith("{"):
        verb = "be one of"
    elif _INTERVAL.match(rule):
        verb = "lie in"
    else:
        verb = "be"
    raise ValueError(f"{name} must {verb} {rule}; got {value!r}.")


def check_all(values: Mapping[str, Any], rules: Mapping[str, str], where: str = "") -> None:
    """Check every value that has a rule; ``where`` is appended to the message."""
    for name, rule in rules.items():
        if name in values:
            try:
                check(name, values[name], rule)
            except ValueError as error:
                raise ValueError(f"{error}{where}") from None


def check_alike(groups: Sequence[Mapping[str, Any]], names: Iterable[str], why: str) -> None:
    """Refuse parameter groups that differ in an option which all must share.

    Args:
        groups: The optimizer's groups.
        names: The options.
        why: What they share, for the message: "are solved together".

    Raises:
        ValueError: Naming the option, the groups and their values.
    """
    first = groups[0]
    for name in names:
        for index, group in enumerate(groups):
            if not _same(group[name], first[name]):
                raise ValueError(
                    f"{name} must be the same in all groups, which {why}; got {group[name]!r} in "
                    f"group {index}, {first[name]!r} in group 0. Set it alike."
                )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b.to(a)).all())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return list(a) == list(b)  # a file may turn a tuple into a list
    return bool(a == b) if isinstance(a, Tensor) == isinstance(b, Tensor) else False
