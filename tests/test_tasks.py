"""The training tasks: fixed data, local randomness, models that every kind of rule can use."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from optimizers.registry import SPECS
from optimizers.testing.harness import load_object
from optimizers.testing.networks import CharGPT
from optimizers.testing.tasks import TASKS, MissingExtraError, get_task, require

NAMES = sorted(TASKS)


def few(task, examples=3):
    inputs, targets = task.batch(0, 0)
    return inputs[:examples], targets[:examples]


def test_the_digits_and_their_split_never_change():
    assert TASKS["digits-mlp"].fingerprint() == "9bfc80dbbf15ee43"
    assert TASKS["digits-cnn"].fingerprint() == "d317d5069751154d"
    assert TASKS["staircase"].load() is TASKS["digits-mlp"].load()
    split = TASKS["digits-mlp"].load()
    assert (len(split.inputs), len(split.val_inputs)) == (1347, 450)
    # The split is a partition: its pixels and labels sum to those of the whole set.
    whole = require("sklearn.datasets").load_digits()
    assert float(split.inputs.sum() + split.val_inputs.sum()) * 16 == whole.data.sum()
    counts = torch.bincount(split.targets) + torch.bincount(split.val_targets)
    assert counts.tolist() == np.bincount(whole.target).tolist()


def test_the_text_is_the_same_at_every_reading_and_holds_modules_out():
    task = TASKS["stdlib-gpt"]
    before = task.fingerprint()
    task.load.cache_clear()
    assert task.fingerprint() == before
    split = task.load()
    assert len(split.inputs) > 1_000_000
    assert split.val_inputs.shape == split.val_targets.shape == (128, 64)
    assert torch.equal(split.val_inputs[:, 1:], split.val_targets[:, :-1])
    assert int(split.inputs.max()) < task.build_model(0).token.num_embeddings


@pytest.mark.parametrize("name", NAMES)
def test_seeds_decide_everything_and_the_global_generator_nothing(name):
    task = TASKS[name]
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (task.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert all(bool(torch.isfinite(value).all()) for value in first.values())
    x, y = task.batch(0, 5)
    assert torch.equal(x, task.batch(0, 5)[0])
    assert torch.equal(y, task.batch(0, 5)[1])
    assert not torch.equal(x, task.batch(1, 5)[0])
    assert len(x) == len(y) == task.batch_size
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("name", NAMES)
def test_batches_can_start_anywhere(name):
    task = TASKS[name]
    batches = task.batches(3)
    for _ in range(25):
        next(batches)
    assert torch.equal(next(batches)[0], next(task.batches(3, start=25))[0])


def test_an_epoch_uses_no_example_twice():
    task = TASKS["digits-mlp"]
    per_epoch = 1347 // task.batch_size
    rows = torch.cat([task.batch(0, i)[0] for i in range(per_epoch)])
    known = torch.unique(task.load().inputs, dim=0)
    assert len(torch.unique(rows, dim=0)) > 0.99 * min(len(rows), len(known))


def test_the_staircase_hides_the_gradient_of_the_first_layer():
    task = TASKS["staircase"]
    model = task.build_model(0)
    inputs, targets = task.batch(0, 0)
    task.loss_fn(model(inputs), targets).backward()
    first, last = model[0], model[2]
    assert not first.weight.grad.any()
    assert not first.bias.grad.any()
    assert last.weight.grad.any()
    levels = torch.unique(model[1](torch.linspace(-9, 9, 999)))
    assert torch.allclose(levels, torch.arange(5) / 5)


def test_the_spiking_network_obeys_the_threshold_rule_and_has_no_gradient():
    task = TASKS["hard-lif"]
    model = task.build_model(0)
    inputs, targets = task.batch(0, 0)
    counts = model(inputs)
    task.loss_fn(counts, targets).backward()
    assert all(not p.grad.any() for p in model.parameters())

    # The same rule with a comparison and an indexed reset, in float32 like the model.
    current = model.hidden(inputs).detach().numpy()
    mem, out = np.zeros_like(current), np.zeros((len(inputs), 10), np.float32)
    expected = np.zeros_like(out)
    for _ in range(model.steps):
        mem = np.float32(model.decay) * mem + current
        spike = mem >= 1
        mem[spike] = 0
        drive = model.readout(torch.from_numpy(spike.astype(np.float32))).detach().numpy()
        out = np.float32(model.decay) * out + drive
        expected += out >= 1
        out[out >= 1] = 0
    # A membrane within rounding of the threshold may fire a step early.
    assert (counts.detach().numpy() != expected).mean() < 0.01
    assert counts.max() > 1


@pytest.mark.parametrize("name", NAMES)
def test_many_candidates_at_once_equal_one_by_one(name):
    task = TASKS[name]
    inputs, targets = few(task)
    model = task.build_model(0)
    draws = torch.Generator().manual_seed(0)
    candidates = {
        key: p.detach() + 0.05 * torch.randn((4, *p.shape), generator=draws)
        for key, p in model.named_parameters()
    }

    def loss(values):
        return task.loss_fn(torch.func.functional_call(model, values, (inputs,)), targets)

    many = torch.func.vmap(loss)(candidates)
    single = [loss({key: value[i] for key, value in candidates.items()}) for i in range(4)]
    # Batched matrix products sum in another order; a spike may turn on the last bit.
    tolerance = 0.1 if name in ("hard-lif", "staircase") else 1e-5
    assert torch.allclose(many, torch.stack(single), rtol=tolerance)


# Forward-mode products load torch's own, deprecated, scripted decompositions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_the_transformer_is_causal_and_differentiable_twice_and_forwards():
    task = TASKS["stdlib-gpt"]
    model = task.build_model(0)
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 0.85e6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = CharGPT(vocabulary=5, window=8, width=8, heads=2, depth=1)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    changed = tokens.clone()
    changed[0, 5:] = 3
    before, after = small(tokens), small(changed)
    assert torch.allclose(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])

    params = {key: p.detach() for key, p in small.named_parameters()}

    def loss(values):
        return task.loss_fn(torch.func.functional_call(small, values, (tokens,)), changed)

    gradient = torch.func.grad(loss)
    _, slope = torch.func.jvp(loss, (params,), (params,))
    expected = sum((g * params[key]).sum() for key, g in gradient(params).items())
    assert torch.allclose(slope, expected, atol=1e-5)
    _, product = torch.func.jvp(gradient, (params,), (params,))
    assert any(value.any() for value in product.values())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_leaves_the_model_as_it_was(name):
    task = TASKS[name]
    model = task.build_model(0)
    model.train()
    metrics = task.evaluate(model)
    assert set(metrics) == {"loss", "accuracy"}
    assert 0 <= metrics["accuracy"] <= 1
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    # An untrained network guesses: about the entropy of a uniform guess, at least.
    assert metrics["loss"] > 2


@pytest.mark.parametrize("name", NAMES)
def test_recommended_optimizers_exist(name):
    for label in TASKS[name].recommended:
        assert load_object(label) if ":" in label else label in SPECS


def test_a_wrong_name_suggests_the_right_one():
    with pytest.raises(LookupError, match="did you mean 'digits-mlp'"):
        get_task("digits-mpl")
    with pytest.raises(LookupError, match="known: digits-mlp"):
        get_task("zzz")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "optimizer-zoo\[harness\]"'):
        require("sklearn.datasets")


def test_importing_the_harness_imports_no_extra():
    code = (
        "import sys, optimizers.testing.harness, optimizers.testing.report;"
        "print({'sklearn', 'scipy', 'matplotlib', 'rich', 'typer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
