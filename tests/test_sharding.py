"""Sharded parameters: the owner's arithmetic is that of one process, whatever the placement."""

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from optimizers.distributed import cut, part_of, paste
from optimizers.exchange import assign, cost
from tests import sharding_worker as worker

ROOT = Path(__file__).resolve().parent.parent
# Elsewhere whole matrices meet the same kernels one by one, so that every bit agrees.
ROUNDING = {
    "muon_batched": 1e-12,  # what shares a batch depends on the owner; float64 iteration
    "amsgrad": 1e-15,  # the ends of shards leave the vectorised loop
}


def launch(world, cases, folder):
    """Run cases in ``world`` processes; return what each rank found, by case."""
    (folder / "rendezvous").unlink(missing_ok=True)
    environment = {
        **os.environ,
        # The loopback device: a host name that resolves elsewhere would make the ranks wait.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(world), str(rank), str(folder), *cases],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [job.communicate(timeout=worker.PATIENCE)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
            job.stdout.close()
    for rank, (job, output) in enumerate(zip(jobs, outputs, strict=True)):
        assert job.returncode == 0, f"rank {rank} failed:\n{output[-4000:]}"
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(world)]
        for case in cases
    }


@functools.cache
def attempt(world, *cases):
    try:
        with tempfile.TemporaryDirectory() as folder:
            return launch(world, cases, Path(folder))
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return str(error)  # kept too: one test after the other would start what fails


def found(world, *cases):
    """What the ranks found; processes are started once for the tests that look at the same."""
    result = attempt(world, *cases)
    assert not isinstance(result, str), result
    return result


PAIR = (
    *("placements", "registered", "waves", "half_precision", "complex_numbers"),
    *("missing_gradients", "other_gradients", "reloading", "dry_steps", "memory", "refusals"),
)
FOUR = ("waves", "models_on_grids", "parts_of_the_world", "mixture", "owners", "traffic")


def on_two(case):
    return found(2, *PAIR)[case]


def on_four(case):
    return found(4, *FOUR)[case]


def agree(theirs, ours, tolerance=0.0):
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        assert theirs[key].dtype == value.dtype, key
        if tolerance:
            torch.testing.assert_close(theirs[key], value, rtol=tolerance, atol=tolerance, msg=key)
        else:
            assert torch.equal(theirs[key], value), key


# ---------------------------------------------------------------- without processes


def test_the_largest_work_goes_to_the_least_loaded_rank():
    assert assign([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert assign([2, 2, 2, 2], 2) == [0, 1, 0, 1]  # ties by index, so that the ranks agree
    assert assign([7], 4) == [0]
    assert assign([], 4) == []


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_loads_are_balanced(ranks):
    generator = torch.Generator().manual_seed(ranks)
    for size in (1, 5, 40, 200):
        costs = torch.randint(1, 10**6, (size,), generator=generator).tolist()
        owners = assign(costs, ranks)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
        # Graham's theorem, against a lower bound of the best load.
        ordered = sorted(costs, reverse=True)
        pair = sum(ordered[ranks - 1 : ranks + 1]) if size > ranks else 0
        best = max(sum(costs) / ranks, ordered[0], pair)
        assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * best + 1 or max(loads) == ordered[0]


def test_cost_is_short_side_squared_times_long_side():
    assert cost((3, 5)) == cost((5, 3)) == 9 * 5
    assert cost((4, 3, 5)) == 4 * 9 * 5  # a stack
    assert cost((5, 2, 3, 3)) == 25 * 18  # a kernel, flattened
    assert cost((7,)) == 7
    assert cost(()) == 1
    assert cost((0, 3)) == 0


GRIDS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((3,), [Shard(1)]),
    "copies": ((2,), [Replicate()]),
    "both": ((2, 2), [Shard(0), Shard(1)]),
    "crossed": ((2, 3), [Shard(1), Shard(0)]),
    "twice": ((2, 3), [Shard(0), Shard(0)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "tensor_parallel": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "tensor_parallel_of_three": ((2, 3), [_StridedShard(0, split_factor=3), Shard(0)]),
    "three_axes": ((2, 2, 2), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)]),
}


@pytest.mark.parametrize("shape", [(12, 6), (5, 3), (1, 7), (3, 5, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("name", list(GRIDS))
def test_parts_are_those_of_torch_and_tile_the_whole(name, shape):
    sizes, placements = GRIDS[name]
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rebuilt, replicas = torch.full_like(whole, -1), {}
    for coordinate in itertools.product(*(range(size) for size in sizes)):
        part = part_of(shape, sizes, coordinate, placements)
        expected = whole
        for size, index, placement in zip(sizes, coordinate, placements, strict=True):
            if not placement.is_replicate():
                pieces, _ = placement._split_tensor(expected, size, with_padding=False)
                expected = pieces[index]
        assert torch.equal(cut(whole, part), expected)
        assert part.shape == expected.shape
        assert part.numel == expected.numel()
        paste(rebuilt, part, expected.contiguous().flatten())
        replicas[part.replica] = replicas.get(part.replica, 0) + part.numel
    assert torch.equal(rebuilt, whole)
    assert set(replicas.values()) == {whole.numel()}  # each replica holds everything once


# ---------------------------------------------------------------- every rule, every placement

PLACED = {
    2: ("rows", "columns"),
    4: (
        "rows",
        "copies",
        "both",
        "crossed",
        "twice",
        "hybrid",
        "hybrid_reversed",
        "tensor_parallel",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "name", "rule"),
    [(w, name, rule) for w in PLACED for name in PLACED[w] for rule in worker.rules_on(name)],
)
def test_sharded_equals_whole(world, name, rule):
    vectors = name not in ("columns", "both", "crossed")
    ours = worker.alone(rule, vectors=vectors)
    ranks = on_two("placements") if world == 2 else found(4, "placements")["placements"]
    for theirs in ranks:
        agree(theirs[f"{name}/{rule}"], ours, ROUNDING.get(rule, 0.0))
        # Whatever the rounding, copies do not drift apart.
        agree(theirs[f"{name}/{rule}"], ranks[0][f"{name}/{rule}"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", worker.zoo())
def test_every_registered_rule_is_the_same_on_shards(name):
    ours = worker.inhabitant(name)
    for theirs in on_two("registered"):
        agree(theirs[name], ours, 1e-12)  # element-wise ones: see ROUNDING


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_many_small_waves_change_nothing(world):
    ours = worker.alone("kinds")
    for theirs in on_two("waves") if world == 2 else on_four("waves"):
        for values in theirs.values():
            agree(values, ours)


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["muon", "drop_muon_full"])
def test_half_precision_travels_as_it_is_and_is_rounded_once(rule):
    ours = worker.alone(rule, dtype=torch.bfloat16)
    assert ours["0.p"].dtype is torch.bfloat16
    assert ours["0.momentum_buffer"].dtype is torch.float32
    for theirs in on_two("half_precision"):
        agree(theirs[rule], ours)


@pytest.mark.distributed
def test_complex_parameters_are_real_pairs_on_each_rank():
    ours = worker.alone("amsgrad", dtype=torch.complex128)
    for theirs in on_two("complex_numbers"):
        assert theirs["share"] == 0.5
        agree(theirs["values"], ours, ROUNDING["amsgrad"])


@pytest.mark.slow
@pytest.mark.distributed
def test_the_owner_compiles():
    ours = worker.alone("muon_batched")
    for theirs in found(2, "compiled")["compiled"]:
        agree(theirs, ours, ROUNDING["muon_batched"])


@pytest.mark.distributed
def test_parameters_without_gradient_stay_and_closures_work():
    ours = worker.build(
        "muon", [[nn.Parameter(p) for p in layer] for layer in worker.start("muon")]
    )
    worker.run_with_gaps(ours)
    ours = worker.values(ours)
    assert {float(v) for key, v in ours.items() if key.endswith("step")} == {0.0, 2.0}
    for theirs in on_two("missing_gradients"):
        agree(theirs, ours)


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["muon", "amsgrad"])
@pytest.mark.parametrize("laid_out", ["copies", "summands"])
def test_gradients_are_brought_into_the_layout_of_their_parameters(laid_out, rule):
    ours = worker.alone(rule, vectors=False)
    for theirs in on_two("other_gradients"):
        agree(theirs[f"{laid_out}/{rule}"], ours, ROUNDING.get(rule, 0.0))


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["muon", "amsgrad", "drop_muon_full"])
def test_ranks_agree_whether_a_step_is_a_checkpointers(rule):
    for theirs in on_two("dry_steps"):
        assert theirs[f"zero/{rule}"] == 0
        assert theirs[f"elsewhere/{rule}"] == 1


@pytest.mark.distributed
def test_halves_of_the_world_train_apart():
    for rank, theirs in enumerate(on_four("parts_of_the_world")):
        agree(theirs, worker.alone("kinds", steps=worker.STEPS - rank // 2))


@pytest.mark.distributed
def test_ordinary_parameters_and_two_meshes_go_together():
    for theirs in on_four("mixture"):
        agree(theirs, worker.alone("kinds"))


# ---------------------------------------------------------------- cost and memory


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["rows", "hybrid"])
def test_each_matrix_is_worked_on_once_by_its_owner(name):
    owners = assign([cost(shape) for shape in worker.SHAPES], 4)
    for rank, seen in enumerate(on_four("owners")):
        mine = [s for s, owner in zip(worker.SHAPES, owners, strict=True) if owner == rank]
        assert [tuple(shape) for shape in seen[name]] == mine
    assert len(set(owners)) == 4


@pytest.mark.distributed
def test_state_is_sharded_and_nothing_whole_is_left_after_a_step():
    for theirs in on_two("memory"):
        muon, kinds = theirs["muon"], theirs["kinds"]
        assert kinds["left"] == []
        assert muon["share"] == {"momentum_buffer": 0.5}
        # Also what a rule makes whole, and large state of another shape; a row statistic is small.
        assert kinds["share"] == {"average": 0.5, "whole": 0.5, "gram": 0.5}
        assert set(kinds["placements"].values()) == {"(Shard(dim=0),)"}


@pytest.mark.distributed
def test_a_step_takes_one_collective_there_and_one_back():
    n, ranks = 64, on_four("traffic")
    for theirs in ranks:
        assert theirs["4 by rows/amsgrad"] == theirs["4 by hybrid/amsgrad"] == []
        assert len(theirs["4 by rows/muon"]) == len(theirs["4 by hybrid/muon"]) == 2
    there, back = (sum(theirs["4 by rows/muon"][k] for theirs in ranks) for k in range(2))
    # Of four matrices: gradient, parameter, momentum; parameter, momentum. A quarter stays.
    assert there == 4 * 3 * n * 3 / 4
    assert back == 4 * 2 * n * 3 / 4
    there, back = (sum(theirs["4 by hybrid/muon"][k] for theirs in ranks) for k in range(2))
    # From the owner's own replica; to all of both.
    assert there == 4 * 3 * n / 2
    assert back == 4 * 2 * (2 * n - n / 2)


@pytest.mark.distributed
def test_waves_bound_what_travels_at_once():
    for theirs in on_four("traffic"):
        # Three matrices for each owner, one in each wave.
        assert len(theirs["12 by rows/muon"]) == 6
        assert max(theirs["12 by rows/muon"]) <= max(theirs["4 by rows/muon"])


# ---------------------------------------------------------------- refusals

REFUSED = {
    "summands": "ValueError.*Partial.*redistribute",
    "summands, by elements": "ValueError.*AMSGrad.*Partial.*redistribute",
    "model": "ValueError: EGN must see the whole model",
    "layer": "ValueError: DropMuon must see a whole layer.*groups of their own",
    "vector": r"ValueError: Muon orthogonalizes matrices.*\(4,\).*AdamW",
    "ragged": r"ValueError: Muon.*\(4, 4\).*local shape",
    "state": "TypeError: Texts keeps 'note'.*str",
    "offloaded": "ValueError: Muon.*cpu:gloo",
    "gradient of Muon": r"RuntimeError: Muon got a gradient of type Tensor.*DTensor.*\(4, 4\)",
    "gradient of AMSGrad": "RuntimeError: AMSGrad got a gradient of type Tensor.*DTensor",
    "moved by Muon": "False",
    "moved by AMSGrad": "False",
}


@pytest.mark.distributed
def test_a_parameter_of_other_ranks_is_refused():
    member, stranger = on_two("refusals")
    assert member["elsewhere"] == "accepted"
    assert re.match("ValueError: Muon.*on a mesh of other ranks", stranger["elsewhere"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_by_every_rank_before_anything_moves(case):
    for theirs in on_two("refusals"):
        assert re.match(REFUSED[case], theirs[case]), theirs[case]


# ---------------------------------------------------------------- fully_shard

# The mean over shares of a batch is summed in another order than that over the whole.
SUMMATION = 1e-9


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["muon", "drop_muon_uniform", "amsgrad", "routed"])
def test_a_model_under_fully_shard_learns_what_one_process_learns(rule):
    model = worker.network()
    optimizer = worker.optimizer_of(model, rule)
    passes = worker.train(model, optimizer)
    ours = worker.learned(model, optimizer)
    for theirs in found(2, "models")["models"]:
        agree(theirs[rule], ours, SUMMATION)
        # Layers that are dropped have no backward pass on any rank.
        assert theirs[f"{rule}/passes"] == passes
    assert all(map(all, passes)) == (rule != "drop_muon_uniform")


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["muon", "drop_muon_uniform"])
@pytest.mark.parametrize("way", ["hybrid", "tensor_parallel"])
def test_a_model_on_a_grid_learns_what_one_process_learns(way, rule):
    model = worker.network(*(worker.EVEN if way == "tensor_parallel" else ()))
    optimizer = worker.optimizer_of(model, rule)
    worker.train(model, optimizer)
    ours = worker.learned(model, optimizer)
    for theirs in on_four("models_on_grids"):
        agree(theirs[f"{way}/{rule}"], ours, SUMMATION)
        rows, columns = theirs[f"placements/{rule}"]
        assert "_StridedShard" in rows
        assert columns == "(Shard(dim=0), Shard(dim=1))"


# ---------------------------------------------------------------- checkpoints


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["muon", "kinds", "amsgrad"])
def test_state_is_loaded_from_any_layout_into_any_other(rule):
    ours = worker.alone(rule, vectors=False)
    for theirs in on_two("reloading"):
        agree(theirs[rule], ours, ROUNDING.get(rule, 0.0))


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 3])
def test_a_run_continues_on_another_number_of_ranks(world, saved):
    found = launch(world, ["load"], saved)["load"]
    for rule in worker.CHECKPOINTED:
        model = worker.network()
        if rule == "kinds_of_model":
            optimizer = worker.Kinds([p for p in model.parameters() if p.ndim > 1])
        else:
            optimizer = worker.optimizer_of(model, rule)
        worker.inject(optimizer, range(3))
        worker.inject(optimizer, range(3, 6))
        ours = worker.learned(model, optimizer)
        for theirs in found:
            for route in worker.routes_of(rule):
                agree(theirs[f"{route}/{rule}"], ours, ROUNDING.get(rule, 0.0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with checkpoints that two ranks wrote."""
    folder = tmp_path_factory.mktemp("checkpoints")
    launch(2, ["save"], folder)
    return folder
