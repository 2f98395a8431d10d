"""Routed: who gets which rule, one state, one scheduler, the inner rules bit by bit."""

import copy
import io

import pytest
import torch
from torch import nn

from optimizers import AMSGrad, Muon, Routed, Rule, classify, muon_with_adamw


class Transformer(nn.Module):
    """One block with everything that routing has to tell apart."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv = nn.Linear(16, 48)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        h = self.embedding(tokens)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + q * k * v
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(self.norm(h))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 10),
    )  # fmt: skip


def roles(model, **kwargs):
    return {w.name: w.role for w in classify(model, **kwargs)}


TOKENS = torch.arange(20).reshape(2, 10)


def train(model, optimizer, count, scheduler=None):
    for _ in range(count):
        optimizer.zero_grad()
        logits = model(TOKENS)
        nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ------------------------------------------------------------------ roles


def test_roles_of_a_transformer():
    found = roles(Transformer(tied=True), example_inputs=TOKENS)
    assert found == {
        "embedding.weight": "tied",
        "attention.in_proj_weight": "packed",
        "attention.in_proj_bias": "vector",
        "attention.out_proj.weight": "hidden",
        "attention.out_proj.bias": "vector",
        "qkv.weight": "packed",
        "qkv.bias": "vector",
        "up.weight": "hidden",
        "up.bias": "vector",
        "down.weight": "hidden",
        "down.bias": "vector",
        "norm.weight": "vector",
        "norm.bias": "vector",
    }
    untied = roles(Transformer(tied=False))
    assert untied["embedding.weight"] == "embedding"
    assert untied["head.weight"] == "head"


def test_roles_of_a_convolutional_net():
    found = roles(convolutional(), example_inputs=torch.randn(2, 3, 8, 8))
    assert found["0.weight"] == "first_conv"
    assert found["2.weight"] == "hidden"
    assert found["3.weight"] == "thin"  # grouped
    assert found["6.weight"] == "hidden"
    assert found["7.weight"] == "head"


def test_the_head_is_read_from_a_trace():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    assert roles(Backwards())["body.weight"] == "head"  # registered last: an assumption
    model = Backwards().train()
    assert roles(model, example_inputs=torch.randn(2, 8))["head.weight"] == "head"
    assert model.training  # the trace leaves the model as it was


def test_recurrent_weights_are_packed_gates():
    weights = {w.name: w for w in classify(nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 2)))}
    assert weights["0.weight_ih_l0"].role == "packed"
    assert weights["0.weight_ih_l0"].splits == 4


def test_thin_matrices_are_not_worth_it():
    model = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    assert roles(model)["0.weight"] == "thin"


def test_you_may_know_better():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert roles(model, roles={"1.*": "hidden"})["1.weight"] == "hidden"
    with pytest.raises(ValueError, match="must be one of"):
        classify(model, roles={"1.*": "middle"})
    with pytest.raises(ValueError, match="matches no parameter"):
        classify(model, roles={"7.*": "hidden"})


def test_what_could_not_be_classified_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(6, 6))
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    with pytest.warns(UserWarning, match=r"table \(6, 6\).*roles="):
        muon_with_adamw(Odd())
    optimizer = muon_with_adamw(Odd(), roles={"table": "hidden"})
    assert "table" in optimizer.param_groups[0]["param_names"]


def test_a_model_without_hidden_matrices_gets_adamw_and_a_warning():
    model = nn.Linear(8, 4)
    with pytest.warns(UserWarning, match="no hidden matrix"):
        optimizer = muon_with_adamw(model)
    assert {g["rule"] for g in optimizer.param_groups} == {"adamw"}
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(3e-4)


# ------------------------------------------------------------------ stepping


def test_equals_its_inner_rules_apart():
    torch.manual_seed(0)
    model = Transformer()
    twin = copy.deepcopy(model)
    routed = muon_with_adamw(model, lr=0.02, adamw_lr=3e-3)
    named = dict(twin.named_parameters())
    groups = {
        rule: [g["param_names"] for g in routed.param_groups if g["rule"] == rule]
        for rule in ("muon", "adamw")
    }
    muon = Muon(
        [
            {"params": [named[n] for n in names], "splits": g["splits"]}
            for names, g in zip(
                groups["muon"], [g for g in routed.param_groups if g["rule"] == "muon"], strict=True
            )
        ],
        lr=0.02,
        weight_decay=0.01,
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [named[n] for n in names], "weight_decay": g["weight_decay"]}
            for names, g in zip(
                groups["adamw"],
                [g for g in routed.param_groups if g["rule"] == "adamw"],
                strict=True,
            )
        ],
        lr=0.02 * (3e-3 / 0.02),
        betas=(0.9, 0.95),
        fused=True,
    )
    for _ in range(10):
        for net in (model, twin):
            net.zero_grad()
            logits = net(TOKENS)
            nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        routed.step()
        muon.step()
        adamw.step()
    assert same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("kind", ["lambda", "onecycle"])
def test_the_ratio_of_the_rates_survives_any_scheduler(kind):
    model = Transformer()
    optimizer = muon_with_adamw(model, lr=0.02, adamw_lr=3e-4)
    if kind == "lambda":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) / 10)
    else:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False
        )
    train(model, optimizer, 5, scheduler)
    rates = {g["rule"]: float(g["lr"]) * g["lr_scale"] for g in optimizer.param_groups}
    assert rates["adamw"] / rates["muon"] == pytest.approx(3e-4 / 0.02, rel=1e-12)


def test_the_closure_is_evaluated_once():
    model = Transformer()
    optimizer = muon_with_adamw(model)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(TOKENS).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure=closure) is not None
    assert len(calls) == 1


def test_resumes_bit_by_bit_through_a_file():
    torch.manual_seed(0)
    model = Transformer()
    optimizer = muon_with_adamw(model, lr=0.02)
    train(model, optimizer, 4)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    other = muon_with_adamw(twin, lr=0.5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(train(model, optimizer, 4), train(twin, other, 4))
    assert torch.optim.lr_scheduler.LambdaLR(other, lambda k: 1.0) is not None


def test_copies_share_nothing_with_the_original():
    model = Transformer()
    optimizer = muon_with_adamw(model)
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    assert same(train(model, optimizer, 3), train(twin, other, 3))
    other.param_groups[0]["lr"] = 0.0
    assert optimizer.param_groups[0]["lr"] != 0.0
    assert other.table() != optimizer.table()


def test_a_refused_state_changes_nothing():
    model = Transformer()
    optimizer = muon_with_adamw(model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    last = list(bad["state"])[-1]
    bad["state"][last]["exp_avg"] = torch.zeros(7, 7)
    for state in bad["state"].values():
        if "momentum_buffer" in state:
            state["momentum_buffer"] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(bad)
    now = optimizer.state_dict()
    for index, state in before["state"].items():
        assert all(torch.equal(now["state"][index][k], v) for k, v in state.items())
    swapped = copy.deepcopy(before)
    swapped["param_groups"][0]["rule"] = "adamw"
    with pytest.raises(ValueError, match="rules"):
        optimizer.load_state_dict(swapped)


def test_a_dry_step_changes_nothing():
    model = Transformer()
    optimizer = muon_with_adamw(model)
    before = [p.detach().clone() for p in model.parameters()]
    rates = [g["lr"] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for g, lr in zip(optimizer.param_groups, rates, strict=True):
        g["lr"] = lr
    assert same(before, model.parameters())
    assert all(s["step"].item() == 0 for s in optimizer.state.values())


def test_distributed_checkpoints_hold_the_state_of_every_rule():
    from torch.distributed.checkpoint import state_dict as dcp

    torch.manual_seed(0)
    model = Transformer(tied=False)
    optimizer = muon_with_adamw(model)
    train(model, optimizer, 3)
    stored = dcp.get_optimizer_state_dict(model, optimizer)
    twin = copy.deepcopy(model)
    other = muon_with_adamw(twin)
    dcp.set_optimizer_state_dict(twin, other, stored)
    assert same(train(model, optimizer, 3), train(twin, other, 3))


def test_sparse_gradients_are_refused_before_anything_moves():
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = muon_with_adamw(model)
    model(torch.tensor([1, 2])).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert same(before, model.parameters())


def test_any_torch_optimizer_may_be_a_rule():
    model = Transformer(tied=False)
    optimizer = Routed(
        model,
        [
            Rule("sgd", lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
                 wants=lambda w: w.role == "hidden"),
            Rule("amsgrad", lambda g: AMSGrad(g, lr=1e-3), wants=lambda w: True),
        ],
    )  # fmt: skip
    assert {g["rule"] for g in optimizer.param_groups} == {"sgd", "amsgrad"}
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rules_that_need_more_than_gradients_are_refused():
    with pytest.raises(ValueError, match="more than gradients"):
        Routed(nn.Linear(2, 2), [Rule("lbfgs", lambda g: torch.optim.LBFGS(
            [p for group in g for _, p in group["params"]]), wants=lambda w: True)])  # fmt: skip


def test_a_parameter_that_no_rule_wants_is_refused():
    rule = Rule("muon", lambda g: Muon(g), wants=lambda w: w.role == "hidden")
    with pytest.raises(ValueError, match="no rule wants"):
        Routed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), [rule])
    with pytest.raises(ValueError, match="different names"):
        Routed(nn.Linear(8, 8), [rule, rule])


def test_groups_added_later_name_their_rule():
    model = Transformer()
    optimizer = muon_with_adamw(model)
    extra = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ValueError, match="name its rule"):
        optimizer.add_param_group({"params": [("extra", extra)]})
    optimizer.add_param_group({"params": [("extra", extra)], "rule": "muon"})
    extra.grad = torch.eye(8)
    optimizer.step()
    assert not torch.equal(extra.detach(), torch.ones(8, 8))
    assert "extra" in optimizer.table()


def test_groups_added_later_are_added_whole_or_not_at_all():
    model = Transformer()
    optimizer = muon_with_adamw(model, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)  # begins at 0
    layer = nn.Linear(8, 8, bias=False)
    for bad in (
        {"rule": "muon"},
        {"rule": "muon", "params": layer.parameters()},
        {"rule": "muon", "params": layer.named_parameters(), "lr": -1.0},
        {"rule": "adamw", "params": [("up.weight", model.up.weight)]},
    ):
        with pytest.raises(ValueError, match=r"params|pairs|lr|more than one"):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == sum(
            len(inner.param_groups) for inner in optimizer._inner.values()
        )
    optimizer.add_param_group({"rule": "muon", "params": layer.named_parameters(), "lr": 0.01})
    assert optimizer.param_groups[-1]["lr_scale"] == pytest.approx(0.5)
    assert scheduler.base_lrs  # torch: a scheduler knows the groups it was built with
    train(model, optimizer, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["state"][9].update(exp_avg=torch.zeros(3, 3)), "exp_avg"),
        (lambda s: s["state"][9].pop("exp_avg_sq"), "missing"),
        (lambda s: s["param_groups"][-1].update(lr=-1.0), "lr must"),
        (lambda s: s["param_groups"][-1].update(betas=(2.0, 3.0)), "betas"),
    ],
)
def test_a_misfitting_state_of_torchs_rules_is_refused(damage, message):
    """torch itself takes it, and its fused kernel then writes past the end of the buffers."""
    model = Transformer()
    optimizer = muon_with_adamw(model)
    train(model, optimizer, 2)
    bad = copy.deepcopy(optimizer.state_dict())
    damage(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)


def test_maximize_reaches_every_rule():
    optimizer = muon_with_adamw(Transformer(), maximize=True)
    assert all(g["maximize"] for g in optimizer.param_groups)


def test_names_of_wrapped_models_match():
    plain, wrapped = Transformer(), nn.ModuleDict({"module": Transformer()})
    optimizer, other = muon_with_adamw(plain), muon_with_adamw(wrapped)
    train(plain, optimizer, 2)
    other.load_state_dict(optimizer.state_dict())
    p, q = plain.up.weight, wrapped["module"].up.weight
    assert torch.equal(optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_a_replaced_state_stays_one_mapping():
    model = Transformer()
    optimizer = muon_with_adamw(model)
    optimizer.state = type(optimizer.state)(dict)
    train(model, optimizer, 1)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


def test_one_dimensional_convolutions_are_flattened():
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.Conv1d(16, 16, 3), nn.Linear(16, 4))
    weight = next(w for w in classify(model) if w.name == "1.weight")
    assert (weight.role, weight.flatten) == ("hidden", True)
    assert muon_with_adamw(model).param_groups[0]["flatten"]


def test_projected_lstms_and_tiny_attention_are_routed():
    lstm = nn.Sequential(nn.LSTM(16, 32, proj_size=18), nn.Linear(8, 8), nn.Linear(8, 8))
    weights = {w.name: w for w in classify(lstm)}
    assert weights["0.weight_hr_l0"].splits == 1
    muon_with_adamw(lstm)
    tiny = {w.name: w.role for w in classify(nn.MultiheadAttention(1, 1))}
    assert tiny["in_proj_weight"] == "thin"


def test_names_fuse_at_a_words_start_only():
    model = nn.ModuleDict({"main_proj": nn.Linear(16, 48), "head": nn.Linear(48, 2)})
    weight = next(w for w in classify(model) if w.name == "main_proj.weight")
    assert (weight.role, weight.splits) == ("hidden", 1)


def test_the_table_says_who_got_which_rule_and_why():
    table = str(muon_with_adamw(Transformer(tied=False), lr=0.02))
    line = next(row for row in table.splitlines() if row.startswith("up.weight"))
    assert line.split()[:5] == ["up.weight", "32x16", "muon", "0.02", "hidden"]
    assert "0.0003" in next(row for row in table.splitlines() if row.startswith("head.weight"))


def test_options_reach_muon_and_misspelt_ones_do_not():
    optimizer = muon_with_adamw(Transformer(), adjust_lr_fn="match_rms_adamw")
    assert optimizer.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    with pytest.raises(TypeError):
        muon_with_adamw(Transformer(), momentun=0.9)
    with pytest.raises(ValueError, match=r"lr must lie in \(0, inf\)"):
        muon_with_adamw(Transformer(), lr=0.0)
