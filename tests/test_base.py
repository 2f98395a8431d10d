"""The base class: one final step, options checked everywhere, loading that cannot do harm."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import optimizers
from optimizers import AMSGrad, Muon, Objective, Optimizer
from optimizers.forward_only import PolyStep
from optimizers.oracle import Needs
from optimizers.second_order import OASIS, GradientRegularizedNewton, SaddleFreeNewton


class SignMomentum(Optimizer):
    """Sign of an exponential moving average of gradients."""

    ranges = {"lr": "[0, inf)", "momentum": "[0, 1)"}

    def __init__(self, params, lr=1e-3, *, momentum=0.9, maximize=False, foreach=None):
        defaults = {"lr": lr, "momentum": momentum, "maximize": maximize, "foreach": foreach}
        super().__init__(params, defaults)

    def init_state(self, p, group):
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, p, g, state, group):
        m = state["momentum_buffer"]
        m.lerp_(g, 1 - group["momentum"])
        p.sub_(group["lr"] * m.sign())


def parameter(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))


def test_a_rule_is_a_few_lines():
    p = parameter(3, 2)
    optimizer = SignMomentum([p], lr=0.1)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.1, rtol=0, atol=1e-15)
    assert optimizer.state[p]["step"].item() == 1
    assert optimizer.state[p]["step"].dtype is torch.float32


@pytest.mark.parametrize("name", ["step", "load_state_dict", "add_param_group"])
def test_the_template_is_final(name):
    with pytest.raises(TypeError, match="override the hooks"):
        type("Bad", (Optimizer,), {name: lambda self: None})


def test_a_module_instead_of_parameters_is_refused():
    with pytest.raises(TypeError, match=r"Pass model.parameters\(\)"):
        AMSGrad(nn.Linear(2, 2))


def test_a_nearly_right_group_key_is_refused():
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        AMSGrad([{"params": [parameter(2)], "weight_decai": 0.1}])


def test_other_group_keys_are_kept():
    optimizer = AMSGrad([{"params": [parameter(2)], "layer": 3}])
    assert optimizer.param_groups[0]["layer"] == 3


def test_the_callers_group_is_not_changed():
    group = {"params": [parameter(2)]}
    AMSGrad([group])
    assert list(group) == ["params"]


def test_a_refused_group_leaves_no_trace():
    first, second = parameter(2, 2), parameter(3)
    optimizer = Muon([first])
    with pytest.raises(ValueError, match="muon_with_adamw"):
        optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1
    assert second not in optimizer.state


def test_duplicates_in_one_group_are_refused():
    p = parameter(2)
    with pytest.raises(ValueError, match="twice"):
        AMSGrad([p, p])


def test_parameters_that_do_not_exist_yet_are_refused():
    with pytest.raises(ValueError, match="uninitialised"):
        AMSGrad(nn.LazyLinear(3).parameters())
    with pytest.raises(ValueError, match="meta device"):
        AMSGrad(nn.Linear(2, 2, device="meta").parameters())
    with pytest.raises(ValueError, match="floating-point"):
        AMSGrad([nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)])


def test_a_refusal_in_the_second_group_leaves_the_first_untouched():
    first, second = parameter(2, 2), parameter(2, 2, seed=1)
    optimizer = AMSGrad([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad = torch.ones_like(first)
    second.grad = torch.ones_like(second).to_sparse()
    before, state = first.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(first.detach(), before)
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, state["state"][0][key])


def test_half_precision_is_updated_in_float32():
    exact, half = parameter(4, 4, dtype=torch.float32), None
    exact.data = exact.data.bfloat16().float()
    half = nn.Parameter(exact.detach().bfloat16())
    one, other = AMSGrad([exact], lr=1e-2), AMSGrad([half], lr=1e-2)
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact.grad, half.grad = g.float(), g
    one.step()
    other.step()
    assert other.state[half]["exp_avg"].dtype is torch.float32
    assert torch.equal(one.state[exact]["exp_avg_sq"], other.state[half]["exp_avg_sq"])
    # Rounded once, from the float32 result.
    assert torch.equal(half.detach(), exact.detach().bfloat16())


def test_a_model_that_changed_after_construction_is_refused():
    """Kernels that walk memory would pair state and parameter wrongly, or leave the buffers."""
    for change in (lambda d: torch.randn(4096), lambda d: d.float()):
        p = parameter(4)
        optimizer = AMSGrad([p])
        p.data = change(p.data)
        p.grad = torch.randn_like(p)
        with pytest.raises(RuntimeError, match="after AMSGrad made its state"):
            optimizer.step()
        assert optimizer.state[p]["step"].item() == 0


def test_a_changed_memory_format_is_followed():
    results = []
    for foreach in (None, False):
        start = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        p = nn.Parameter(start.contiguous(memory_format=torch.channels_last))
        optimizer = AMSGrad([p], lr=0.1, foreach=foreach)
        for k in range(4):
            if k == 2:
                p.data = p.data.contiguous()
            g = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(k))
            p.grad = torch.empty_like(p).copy_(g)
            optimizer.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_conjugated_gradients_are_resolved():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = AMSGrad([p], lr=0.1)
    (p.conj() * torch.tensor([1 + 1j, 2, 3j])).real.sum().backward()
    optimizer.step()
    assert p.isfinite().all()


def test_numbers_of_other_kinds_become_plain():
    p = parameter(2)
    optimizer = Muon([parameter(2, 2)], lr=torch.tensor([1e-3]))
    assert optimizer.param_groups[0]["lr"].shape == ()
    optimizer = AMSGrad([p], lr=np.float32(0.5))
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Muon, {"ns_steps": 5.0}),
        (Muon, {"splits": 2.0}),
        (Muon, {"momentum": [0.9]}),
        (Muon, {"maximize": [True]}),
        (Muon, {"ns_coefficients": 3.0}),
        (Muon, {"ns_coefficients": [(1, 2, 3), 4]}),
        (AMSGrad, {"lr": [1e-3, 1e-3]}),
        (AMSGrad, {"betas": (0.9,)}),
        (AMSGrad, {"betas": 0.9}),
        (optimizers.DropMuon, {"sampling": 0.5}),
    ],
)
def test_values_of_the_wrong_kind_are_refused_at_construction(cls, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        cls([parameter(4, 4)], **options)


def test_an_optimizer_made_under_inference_mode_works_outside():
    p = parameter(2)
    with torch.inference_mode():
        optimizer = AMSGrad([p])
    p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("bad", [None, [], {"state": []}, {"state": {}, "param_groups": None},
                                 {"state": {}, "param_groups": [{}]}])  # fmt: skip
def test_what_is_no_state_is_refused(bad):
    with pytest.raises(ValueError, match=r"optimizer\.state_dict\(\)"):
        AMSGrad([parameter(2)]).load_state_dict(bad)


def test_groups_of_a_scheduled_optimizer_can_be_reused():
    optimizer = AMSGrad([parameter(2)])
    optimizer.param_groups[0]["max_momentum"] = 0.9
    AMSGrad(optimizer.param_groups)


def test_cleared_state_is_made_again():
    p = parameter(3)
    optimizer = AMSGrad([p], lr=0.1)
    optimizer.state.clear()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1


def test_closure_must_be_callable():
    with pytest.raises(TypeError, match="callable"):
        AMSGrad([parameter(2)]).step(closure=3.0)


def test_a_closure_without_backward_is_refused_with_the_remedy():
    model = nn.Linear(2, 1)
    optimizer = AMSGrad(model.parameters())
    with pytest.raises(optimizers.OracleError, match=r"calls loss.backward\(\)"):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())


def test_eval_params_is_a_context():
    p = parameter(2)
    with AMSGrad([p]).eval_params():
        pass


# ------------------------------------------------------------------ autocast


class Cast(nn.Module):
    """A model that opens an autocast region for each evaluation."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


EVALUATE_TWICE = {
    "saddle-free": SaddleFreeNewton,
    "gradient-regularized": GradientRegularizedNewton,
    "oasis": lambda p: OASIS(p, same_batch=True, warmup_samples=3, init_lr=0.1),
    "polystep": PolyStep,
}


@pytest.mark.parametrize("rule", EVALUATE_TWICE)
def test_autocast_around_the_step_is_autocast_in_the_model(rule):
    """Within one region torch keeps the casts of the first evaluation: trials would not count."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    losses = []
    for around in (False, True):
        model = copy.deepcopy(start)
        optimizer = EVALUATE_TWICE[rule](model.parameters())
        called = model if around else Cast(model)
        objective = Objective(called, lambda p, y: nn.functional.mse_loss(p.float(), y)).on(x, y)
        closure = objective.loss if rule == "polystep" else objective
        losses.append([])
        for _ in range(8):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
                optimizer.step(closure)
            losses[-1].append(nn.functional.mse_loss(model(x), y).item())
    # The polytope's own products are cast, too: a few roundings of 2^-9 of a step.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if rule == "polystep" else 0, abs=0)
    assert losses[0][-1] < 0.97 * losses[0][0]


@pytest.mark.parametrize("cached", [True, False])
def test_a_step_within_autocast_leaves_no_stale_casts_and_the_setting(cached):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    objective = Objective(model, lambda out, y: out.float().square().mean()).on(x, None)
    optimizer = SaddleFreeNewton(model.parameters())

    def fail():
        assert not torch.is_autocast_cache_enabled()
        raise ZeroDivisionError

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        model(x)  # casts before the step
        with pytest.raises(ZeroDivisionError):
            optimizer.step(fail)
        assert torch.is_autocast_cache_enabled() is cached
        optimizer.step(objective)
        assert torch.is_autocast_cache_enabled() is cached
        after = model(x)
    assert torch.equal(after, Cast(model)(x))


# ------------------------------------------------------------------ loading


def trained(cls, p, steps=3, **kwargs):
    optimizer = cls([p], **kwargs)
    for k in range(steps):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=p.dtype)
        optimizer.step()
    return optimizer


def continue_alike(one, p, other, q, steps=4, tolerance=0.0):
    for k in range(10, 10 + steps):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=p.dtype)
        p.grad, q.grad = g, g.clone()
        one.step()
        other.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)


def test_state_of_torch_adam_with_amsgrad_loads():
    p = parameter(4, 3)
    theirs = trained(torch.optim.Adam, p, lr=0.1, amsgrad=True)
    q = nn.Parameter(p.detach().clone())
    ours = AMSGrad([q], bias_correction="torch")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.1
    assert ours.param_groups[0]["bias_correction"] == "torch"
    assert "fused" not in ours.param_groups[0]
    continue_alike(theirs, p, ours, q, tolerance=1e-13)


def test_state_of_torch_adam_without_the_maximum_is_refused():
    p = parameter(4, 3)
    theirs = trained(torch.optim.Adam, p, lr=0.1)
    with pytest.raises(ValueError, match="max_exp_avg_sq"):
        AMSGrad([nn.Parameter(p.detach().clone())]).load_state_dict(theirs.state_dict())


def test_state_of_torch_muon_loads():
    p = parameter(4, 3, dtype=torch.float32)
    theirs = trained(torch.optim.Muon, p, lr=0.1)
    q = nn.Parameter(p.detach().clone())
    ours = Muon([q], polar="newton_schulz", foreach=False)
    ours.load_state_dict(theirs.state_dict())
    continue_alike(theirs, p, ours, q)


def test_a_newer_format_is_refused():
    optimizer = AMSGrad([parameter(2)])
    state = optimizer.state_dict()
    state["param_groups"][0]["format_version"] = 99
    with pytest.raises(ValueError, match="upgrade"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("state"), "no key 'state'"),
        (lambda s: s["state"][0].pop("exp_avg"), "missing \\['exp_avg'\\]"),
        (lambda s: s["state"][0].update(extra=torch.zeros(2)), "unexpected \\['extra'\\]"),
        (lambda s: s["state"].update({7: {}, 8: {"step": 1}}), "entries of no parameter"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must lie in"),
        (lambda s: s["param_groups"][0]["params"].append(5), "2 parameters"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    p = parameter(2)
    optimizer = trained(AMSGrad, p)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    damage(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    now = optimizer.state_dict()
    assert all(torch.equal(now["state"][0][k], v) for k, v in before["state"][0].items())
    assert now["param_groups"] == before["param_groups"]


def test_names_decide_where_state_goes():
    a, b = parameter(2, 2), parameter(2, 2, seed=1)
    optimizer = AMSGrad([("a", a), ("b", b)], lr=0.1)
    for p in (a, b):
        p.grad = p.detach().clone()
    optimizer.step()
    swapped = AMSGrad([("b", b), ("a", a)])
    swapped.load_state_dict(optimizer.state_dict())
    assert torch.equal(swapped.state[a]["exp_avg"], optimizer.state[a]["exp_avg"])
    renamed = AMSGrad([("a", a), ("c", b)])
    with pytest.raises(ValueError, match=r"missing in the loaded state \['c'\]"):
        renamed.load_state_dict(optimizer.state_dict())


def test_loading_does_not_alias_the_stored_tensors():
    p = parameter(2)
    optimizer = trained(AMSGrad, p, lr=torch.tensor(0.1))
    stored = copy.deepcopy(optimizer.state_dict())
    other = AMSGrad([nn.Parameter(p.detach().clone())])
    other.load_state_dict(stored)
    other.param_groups[0]["lr"].fill_(0.7)
    assert stored["param_groups"][0]["lr"].item() == pytest.approx(0.1)


# ------------------------------------------------------------------ one file, one line


def test_a_sixth_optimizer_takes_one_file_and_one_line():
    """The toy above, with a registry line, passes the whole contract."""
    from optimizers.spec import Spec
    from optimizers.testing.checks import check_optimizer

    spec = Spec(SignMomentum, family="first_order", reference="a toy", example={"lr": 1e-2})
    assert spec.name == "SignMomentum"
    assert spec.needs is Needs.GRADIENTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_optimizer(spec.cls, expensive=False, **spec.example)
    assert report.ok, str(report)
    assert report.count("pass") > 60


def test_a_spec_names_a_known_family():
    from optimizers.spec import Spec

    with pytest.raises(ValueError, match="family"):
        Spec(SignMomentum, family="third_order", reference="none")
