"""Every optimizer of the registry keeps the whole contract, or declares where it does not."""

import pytest
import torch

from optimizers import Muon, Routed, Rule
from optimizers.registry import SPECS
from optimizers.testing.checks import CHECKS, Result, check_optimizer, pytest_params, run_check
from optimizers.testing.checks.subject import CheckFailed, Subject
from optimizers.wrappers import Weight

OPTIMIZERS = [name for name, spec in SPECS.items() if spec.kind == "optimizer"]
# One rule of each kernel family is compiled here; the others in the slow run.
COMPILED = {"AMSGrad", "Muon"}


def _subject(name: str) -> Subject:
    return Subject(SPECS[name].cls, SPECS[name].example)


@pytest.mark.parametrize("check", pytest_params(expensive=False))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contract(name, check):
    result = run_check(check, _subject(name), SPECS[name].exceptions)
    assert result.status != "fail", result.why


@pytest.mark.distributed
@pytest.mark.parametrize("check", ["resumes_in_a_fresh_process", "two_ranks_equal_one_process"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contract_across_processes(name, check):
    result = run_check(CHECKS[check], _subject(name), SPECS[name].exceptions)
    assert result.status != "fail", result.why


@pytest.mark.parametrize(
    "name",
    [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)
def test_contract_compiled(name):
    spec = SPECS[name]
    # In half precision rounding depends on fusion; the algebra is compared in double precision.
    example = dict(spec.example)
    if "ns_dtype" in _subject(name).options:
        example["ns_dtype"] = "float64"
    result = run_check(CHECKS["compiled_equals_eager"], Subject(spec.cls, example))
    assert result.status != "fail", result.why


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_declared_exceptions_name_checks_and_give_reasons(name):
    for check, reason in SPECS[name].exceptions.items():
        assert check in CHECKS
        assert len(reason) > 10


# ---------------------------------------------------------------- wrappers


def routed(params, lr=1e-2, maximize=False):
    """Return Routed on loose parameters: matrices to Muon, the rest to torch's AdamW."""
    named = [p if isinstance(p, tuple) else (f"p{i}", p) for i, p in enumerate(params)]
    weights = [Weight(n, p, "hidden" if p.ndim >= 2 else "vector", "by shape") for n, p in named]
    options = {"lr": lr, "maximize": maximize}
    return Routed(
        weights,
        [
            Rule("muon", lambda g: Muon(g, **options), wants=lambda w: w.role == "hidden"),
            Rule("adamw", lambda g: torch.optim.AdamW(g, **options), wants=lambda w: True),
        ],
    )


_MAKES_GROUPS = "Routed makes the groups itself, from the roles of a model's weights"
_NOT_FOR_ROUTED = {
    "rejects_bad_lr_in_a_group": _MAKES_GROUPS,
    "rejects_empty_and_duplicate_parameters": _MAKES_GROUPS,
    "accepts_every_form_of_parameters": _MAKES_GROUPS,
    "options_live_in_groups": _MAKES_GROUPS,
    "group_learning_rate_is_obeyed": _MAKES_GROUPS,
    "one_group_equals_many": _MAKES_GROUPS,
    "tensor_lr_is_not_shared": _MAKES_GROUPS,
    "group_added_later_trains": "a group added later must name its rule",
    "lr_zero_does_not_move": "the ratio of the rates needs positive rates at construction",
    "state_is_at_least_float32": "torch's AdamW keeps its state in the parameter's dtype",
}


@pytest.mark.parametrize("check", pytest_params(expensive=False))
def test_contract_of_the_wrapper(check):
    result = run_check(check, Subject(routed), _NOT_FOR_ROUTED)
    assert result.status != "fail", result.why


# ---------------------------------------------------------------- the checks can fail


def broken_torch_class(**overrides):
    """Return a subclass of SGD with some methods replaced."""
    return type("Broken", (torch.optim.SGD,), overrides)


def failing(cls, check, **kwargs):
    result = run_check(CHECKS[check], Subject(cls, {"lr": 0.01, **kwargs}))
    assert isinstance(result, Result)
    return result.status == "fail"


def test_a_rule_that_writes_the_gradient_is_caught():
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.mul_(0.01))

    assert failing(broken_torch_class(step=step), "gradient_is_not_written")
    assert not failing(torch.optim.SGD, "gradient_is_not_written")


def test_a_rule_that_draws_from_the_global_generator_is_caught():
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad * torch.rand(()))

    cls = broken_torch_class(step=step)
    assert failing(cls, "global_random_state_is_untouched")
    assert failing(cls, "same_seed_same_run")


def test_a_rule_that_counts_steps_for_all_parameters_together_is_caught():
    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        group["t"] = group.get("t", 0) + 1
        for p in group["params"]:
            if p.grad is not None:
                p.sub_(group["lr"] / (1 - 0.9 ** group["t"]) * p.grad)

    assert failing(broken_torch_class(step=step), "late_parameter_starts_afresh")


def test_a_rule_that_keeps_options_outside_its_groups_is_caught():
    def __init__(self, params, lr=0.01):
        torch.optim.SGD.__init__(self, params, lr=lr)
        self.secret = 2.0

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(self.param_groups[0]["lr"] * self.secret * p.grad)

    assert failing(broken_torch_class(__init__=__init__, step=step), "deepcopy_steps_alike")


def test_a_rule_that_leaks_tensors_is_caught():
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("history", []).append(p.grad.clone())
            p.sub_(0.01 * p.grad)

    cls = broken_torch_class(step=step)
    assert failing(cls, "memory_does_not_grow")
    assert failing(cls, "state_is_plain")


def test_a_rule_that_decays_parameters_without_gradient_is_caught():
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)

    assert failing(broken_torch_class(step=step), "none_gradients_are_skipped")


def test_what_torch_itself_fails_is_reported():
    report = check_optimizer(torch.optim.SGD, lr=1e-2, only=["rejects_nan_lr"])
    assert not report.ok
    assert "accepted" in report.failures[0].why
    report = check_optimizer(torch.optim.AdamW, lr=1e-2, only=["dry_step_changes_nothing"])
    assert not report.ok


def test_a_declared_exception_that_passes_is_a_failure():
    result = run_check(
        CHECKS["closure_is_called_once"],
        Subject(torch.optim.SGD, {"lr": 0.01}),
        {"closure_is_called_once": "it is said to be called twice"},
    )
    assert result.status == "fail"
    assert "passes" in result.why


def test_unknown_checks_are_refused():
    with pytest.raises(LookupError, match="wrapper"):
        check_optimizer("Routed")
    with pytest.raises(LookupError, match="no checks named"):
        check_optimizer(torch.optim.SGD, lr=0.1, only=["no_such_check"])


def test_a_check_reports_the_reason_in_one_line():
    def explode(params, lr):
        raise OSError("first line\nsecond line")

    subject = Subject(torch.optim.SGD, {"lr": 0.01})
    subject.factory = explode
    result = run_check(CHECKS["moves_every_parameter"], subject)
    assert result.status == "fail"
    assert result.why == "OSError: first line"
    assert issubclass(CheckFailed, AssertionError)
