"""What the processes of test_sharding.py do: each case returns what this rank found."""

import faulthandler
import functools
import gc
import inspect
import itertools
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

from optimizers import EGN, AMSGrad, DropMuon, Muon, distributed, exchange, muon_with_adamw
from optimizers.base import Optimizer, Scope
from optimizers.registry import SPECS

PATIENCE = 150  # seconds; on a loaded machine starting torch alone takes ten
STEPS = 3

# A divisible one, rows fewer than ranks, one row, experts, a kernel, a wide and an empty one.
SHAPES = [(8, 8), (5, 3), (1, 7), (3, 5, 4), (6, 2, 3, 3), (4, 9), (0, 4)]
VECTORS = [(7,), (2,)]


class Kinds(Optimizer):
    """A matrix rule that keeps every kind of state, and replaces some of it."""

    scope = Scope.MATRIX
    seen = []  # what this process worked on

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "maximize": False, "foreach": None})

    def init_state(self, p, group):
        return {
            "average": torch.zeros_like(p),
            "whole": torch.zeros(p.shape, dtype=torch.float64),
            "rows": torch.zeros(p.shape[0], dtype=torch.float64),
            "gram": torch.zeros(p.shape[0], p.shape[0], dtype=torch.float64),
            "of_a_slice": torch.zeros_like(p.flatten(1)[:, 0]),
            "largest": 0.0,
            "count": 0,
        }

    def update(self, p, g, state, group):
        self.seen.append(tuple(p.shape))
        state["average"] = state["average"].lerp(g, 0.5)
        state["whole"] += g
        state["rows"].add_(g.flatten(1).norm(dim=1))
        state["of_a_slice"].copy_(state["rows"])
        state["gram"].addmm_(g.flatten(1), g.flatten(1).T)
        state["largest"] = max(state["largest"], float(g.norm()))
        state["count"] += 1
        scale = state["largest"] * state["count"] * state["step"].item() + 1
        rows = (state["rows"] + state["gram"].sum(0)).reshape(-1, *[1] * (p.ndim - 1))
        p.sub_(group["lr"] * (state["average"] + state["whole"]) / (rows + scale))


class Elements(Optimizer):
    """A rule for elements that keeps a number and replaces a tensor of its state."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "foreach": None})

    def init_state(self, p, group):
        return {"sum": torch.zeros_like(p), "weight": 0.0}

    def update(self, p, g, state, group):
        state["weight"] = 0.5 * state["weight"] + 1
        state["sum"] = 0.5 * state["sum"] + g
        p.sub_(group["lr"] / state["weight"] * state["sum"])


class Joint(Optimizer):
    """A layer rule: the gradients of a group are divided by their joint norm."""

    scope = Scope.LAYER

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def update_foreach(self, params, grads, states, group):
        norm = torch.stack([g.norm() for g in grads]).norm()
        for p, g in zip(params, grads, strict=True):
            p.sub_(group["lr"] * g / norm)


DOUBLE = {"ns_dtype": "float64"}
RULES = {
    "muon": (Muon, {"lr": 0.05, "foreach": False, **DOUBLE}),
    "muon_batched": (Muon, {"lr": 0.05, **DOUBLE}),
    "muon_ascent": (Muon, {"lr": 0.05, "foreach": False, "maximize": True, **DOUBLE}),
    "drop_muon_full": (DropMuon, {"lr": 0.05, "sampling": "full", "foreach": False, **DOUBLE}),
    "drop_muon_uniform": (DropMuon, {"lr": 0.05, "foreach": False, **DOUBLE}),
    "kinds": (Kinds, {}),
    "joint": (Joint, {}),
    "elements": (Elements, {}),
    "amsgrad": (AMSGrad, {"lr": 0.05}),
}
ONLY_MATRICES = {"muon", "muon_batched", "muon_ascent", "kinds"}


def rules_on(placement):
    """Return the rules to try: all of them where a placement is common, else one of each scope."""
    common = ("rows", "columns", "hybrid")
    return list(RULES) if placement in common else ["muon", "kinds", "joint", "elements"]


def start(rule, dtype=torch.float64, vectors=True):
    """Return the parameters' first values, layer by layer, equal in every process."""
    generator = torch.Generator().manual_seed(0)
    extra = VECTORS if vectors and rule not in ONLY_MATRICES else []
    return [
        [
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
            for s in (shape, *extra)
        ]
        for shape in SHAPES
    ]


def gradient(k, index, shape, dtype=torch.float64):
    """Return the gradient of parameter ``index`` at step ``k``, equal in every process."""
    generator = torch.Generator().manual_seed(1000 * k + index)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def build(rule, layers):
    cls, options = RULES[rule]
    return cls([{"params": layer} for layer in layers], **options)


def run(optimizer, steps=range(STEPS)):
    """Take steps with the gradients of this file, laid out like the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for k in steps:
        for index, p in enumerate(params):
            p.grad = like(gradient(k, index, p.shape, p.dtype), p)
        optimizer.step()
    return params


def values(optimizer):
    """Return parameters and state as whole tensors, by name."""
    found = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        for key, value in {"p": p.detach(), **optimizer.state[p]}.items():
            found[f"{index}.{key}"] = torch.as_tensor(whole(value)).clone()
    return found


def alone(rule, steps=STEPS, **how):
    """Return what one process finds that holds everything."""
    optimizer = build(rule, [[nn.Parameter(p) for p in layer] for layer in start(rule, **how)])
    run(optimizer, range(steps))
    return values(optimizer)


# ---------------------------------------------------------------- sharded tensors


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard(value, mesh, placements):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def like(value, p):
    """Return a tensor laid out like ``p``, without a transfer: every rank has all of it."""
    return shard(value, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else value


def sharded(rule, mesh, placed, **how):
    layers = [[nn.Parameter(shard(p, mesh, placed)) for p in layer] for layer in start(rule, **how)]
    return build(rule, layers)


@functools.cache
def meshes():
    """Return meshes with placements, by name, for the present number of ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    if size == 2:
        return {"rows": (line, [Shard(0)]), "columns": (line, [Shard(1)])}
    grid = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("outer", "inner"))
    return {
        "rows": (line, [Shard(0)]),
        "copies": (line, [Replicate()]),
        "both": (grid, [Shard(0), Shard(1)]),
        "crossed": (grid, [Shard(1), Shard(0)]),
        "twice": (grid, [Shard(0), Shard(0)]),
        "hybrid": (grid, [Replicate(), Shard(0)]),
        "hybrid_reversed": (grid, [Shard(0), Replicate()]),
        "tensor_parallel": (grid, [_StridedShard(0, split_factor=size // 2), Shard(0)]),
    }


# ---------------------------------------------------------------- models


def network(*widths):
    torch.manual_seed(0)
    widths = widths or (6, 5, 7, 4)  # not divisible by the numbers of ranks
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*(module for pair in layers for module in pair))
    return model.double()


def optimizer_of(model, rule):
    if rule == "routed":
        return muon_with_adamw(model, lr=0.05, ns_dtype="float64", foreach=False)
    cls, options = RULES[rule]
    named = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 or rule not in ONLY_MATRICES]
    return cls(named, **options)


def train(model, optimizer, steps=6, rank=0, size=1):
    """Train on this rank's share of each batch; return which layers had a backward pass."""
    passes = []
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        share = slice(8 // size * rank, 8 // size * (rank + 1))
        model.zero_grad()
        nn.functional.mse_loss(model(x[share]), y[share]).backward()
        passes.append([p.grad is not None for p in model.parameters()])
        optimizer.step()
    return passes


def learned(model, optimizer):
    found = {}
    for name, p in model.named_parameters():
        for key, value in {"p": p.detach(), **optimizer.state.get(p, {})}.items():
            found[f"{name}.{key}"] = torch.as_tensor(whole(value)).clone()
    return found


EVEN = (6, 8, 12, 4)  # tensor parallelism demands it


def fully_sharded(mesh=None):
    from torch.distributed.fsdp import fully_shard

    model = network()
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ---------------------------------------------------------------- the cases


def placements(rank, folder):
    """Every rule on every placement."""
    found = {}
    for name, (mesh, placed) in meshes().items():
        # A vector has no columns to share.
        vectors = not any(p.is_shard(1) for p in placed)
        for rule in rules_on(name):
            optimizer = sharded(rule, mesh, placed, vectors=vectors)
            run(optimizer)
            found[f"{name}/{rule}"] = values(optimizer)
    return found


def zoo():
    """Return the registered rules that sharded parameters can be given to."""
    return [
        name
        for name, spec in SPECS.items()
        if issubclass(spec.cls, Optimizer) and spec.cls.scope is not Scope.MODEL
    ]


def inhabitant(name, layout=None):
    """Return a rule of the zoo on matrices, after a few steps."""
    spec = SPECS[name]
    options = dict(spec.example)
    declared = inspect.signature(spec.cls).parameters
    options.update({k: v for k, v in {**DOUBLE, "foreach": False}.items() if k in declared})
    params = [torch.linspace(-1, 1, a * b, dtype=torch.float64).view(a, b) for a, b in ZOO_SHAPES]
    if layout is not None:
        params = [shard(p, *layout) for p in params]
    optimizer = spec.cls([nn.Parameter(p) for p in params], **options)
    run(optimizer)
    return values(optimizer)


ZOO_SHAPES = [(8, 6), (5, 3), (3, 8), (1, 7)]


def registered(rank, folder):
    """Every registered rule that sharded parameters can be given to."""
    return {name: inhabitant(name, meshes()["rows"]) for name in zoo()}


def waves(rank, folder):
    """What travels in many small waves, with large state of another shape than the parameter's."""
    found, usual = {}, (exchange.WAVE_BYTES, distributed.LARGE)
    exchange.WAVE_BYTES, distributed.LARGE = 500, 10
    for name in ("rows", "columns", "hybrid", "both", "tensor_parallel"):
        if name not in meshes():
            continue
        mesh, placed = meshes()[name]
        optimizer = sharded("kinds", mesh, placed)
        run(optimizer)
        found[f"{name}/kinds"] = values(optimizer)
    exchange.WAVE_BYTES, distributed.LARGE = usual
    return found


def half_precision(rank, folder):
    """Parameters in half precision, worked on in single."""
    mesh, placed = meshes()["rows"]
    found = {}
    for rule in ("muon", "drop_muon_full"):
        optimizer = sharded(rule, mesh, placed, dtype=torch.bfloat16)
        run(optimizer)
        found[rule] = values(optimizer)
    return found


def complex_numbers(rank, folder):
    """Complex parameters, which rules for elements see as real pairs."""
    mesh, placed = meshes()["rows"]
    optimizer = sharded("amsgrad", mesh, placed, dtype=torch.complex128)
    run(optimizer)
    p = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[p]["exp_avg"]
    return {"share": state.to_local().numel() / state.numel(), "values": values(optimizer)}


def missing_gradients(rank, folder):
    """Some parameters have no gradient, some steps have a closure."""
    mesh, placed = meshes()["rows"]
    optimizer = sharded("muon", mesh, placed)
    run_with_gaps(optimizer)
    return values(optimizer)


def compiled(rank, folder):
    """The compiled update, of what this rank owns."""
    mesh, placed = meshes()["rows"]
    optimizer = sharded("muon_batched", mesh, placed)
    for group in optimizer.param_groups:
        group["compile"] = True
    run(optimizer)
    return values(optimizer)


def run_with_gaps(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def closure():
        for index, p in enumerate(params):
            p.grad = None if index % 3 == 1 else like(gradient(0, index, p.shape), p)
        return torch.tensor(1.0, requires_grad=True).sum()

    for _ in range(2):
        assert optimizer.step(closure) == 1


def other_gradients(rank, folder):
    """Gradients that are laid out unlike their parameters, or not summed yet."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placed = meshes()["rows"]
    found = {}
    for rule in ("muon", "amsgrad"):
        for name in ("copies", "summands"):
            optimizer = sharded(rule, mesh, placed, vectors=False)
            for k in range(STEPS):
                for index, (p,) in enumerate(g["params"] for g in optimizer.param_groups):
                    g = gradient(k, index, p.shape)
                    if name == "copies":
                        p.grad = shard(g, mesh, [Replicate()])
                    else:
                        p.grad = DTensor.from_local(g / dist.get_world_size(), mesh, [Partial()])
                optimizer.step()
            found[f"{name}/{rule}"] = values(optimizer)
    return found


def reloading(rank, folder):
    """A run whose state goes from one process to rows, from rows to columns, and back."""
    found = {}
    for rule in ("muon", "kinds", "amsgrad"):
        layouts = [*meshes().values(), None]
        optimizer = build(
            rule, [[nn.Parameter(p) for p in layer] for layer in start(rule, vectors=False)]
        )
        for k in range(STEPS):
            run(optimizer, range(k, k + 1))
            layers = []
            for group in optimizer.param_groups:
                values_of_layer = [whole(p.detach()).clone() for p in group["params"]]
                if layouts[k] is not None:
                    values_of_layer = [shard(p, *layouts[k]) for p in values_of_layer]
                layers.append([nn.Parameter(p) for p in values_of_layer])
            state = optimizer.state_dict()
            optimizer = build(rule, layers)
            optimizer.load_state_dict(state)
        found[rule] = values(optimizer)
    return found


def dry_steps(rank, folder):
    """Rates of zero: a step counts if any rank's part of a gradient is not zero."""
    mesh, placed = meshes()["rows"]
    found = {}
    for rule in ("muon", "amsgrad", "drop_muon_full"):
        for name in ("zero", "elsewhere"):
            cls, options = RULES[rule]
            p = nn.Parameter(shard(torch.ones(4, 4, dtype=torch.float64), mesh, placed))
            optimizer = cls([p], **{**options, "lr": 0.0})
            g = torch.zeros(4, 4, dtype=torch.float64)
            g[3] = float(name == "elsewhere")  # a row of the last rank
            p.grad = like(g, p)
            optimizer.step()
            found[f"{name}/{rule}"] = optimizer.state[p]["step"]
    return found


def memory(rank, folder):
    """How much of the parameters and their state lives here, and what a step leaves behind."""
    mesh, placed = meshes()["rows"]
    found = {}
    size, bytes_of_one = (320, 256), 320 * 256 * 8
    for rule in ("kinds", "muon"):
        layers = [
            [nn.Parameter(shard(torch.randn(size, dtype=torch.float64), mesh, placed))]
            for _ in range(4)
        ]
        optimizer = build(rule, layers)
        run(optimizer, range(2))
        optimizer.zero_grad()
        # The kernels of Muon may keep work space for the next step.
        deadline = time.monotonic() + (30 if rule == "kinds" else 0)
        while (left := alive(bytes_of_one)) and time.monotonic() < deadline:
            time.sleep(
                0.5
            )  # gloo's threads drop their buffers when they get the interpreter's lock
        state = {k: v for k, v in optimizer.state[layers[0][0]].items() if hasattr(v, "placements")}
        found[rule] = {
            "left": left,
            "share": {key: v.to_local().numel() / v.numel() for key, v in state.items()},
            "placements": {key: str(v.placements) for key, v in state.items()},
        }
    return found


def alive(least):
    """Return the shapes of the tensors of at least so many bytes that anything refers to."""
    # Not isinstance: some of torch's lazy objects warn when they are asked for their class.
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return [tuple(t.shape) for t in tensors if t.untyped_storage().nbytes() >= least]


def traffic(rank, folder):
    """How many collectives a step takes, and how much leaves this rank."""
    found, usual, calls = {}, dist.all_to_all_single, []

    def counting(received, sent, to_me, from_me, **options):
        calls.append(sum(n for other, n in enumerate(from_me) if other != rank))
        return usual(received, sent, to_me, from_me, **options)

    dist.all_to_all_single = counting
    limit = exchange.WAVE_BYTES
    for name, number, bytes_of_wave in (("rows", 4, limit), ("hybrid", 4, limit), ("rows", 12, 9)):
        exchange.WAVE_BYTES = bytes_of_wave
        mesh, placed = meshes()[name]
        for rule in ("muon", "amsgrad"):
            params = [
                nn.Parameter(shard(torch.ones(8, 8, dtype=torch.float64), mesh, placed))
                for _ in range(number)
            ]
            optimizer = build(rule, [params])
            calls.clear()
            run(optimizer, range(1))
            found[f"{number} by {name}/{rule}"] = list(calls)
    dist.all_to_all_single, exchange.WAVE_BYTES = usual, limit
    return found


def refusals(rank, folder):
    """What is refused, on every rank, and that nothing changes."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial

    mesh, placed = meshes()["rows"]
    found = {}

    def refused(name, make):
        try:
            make()
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "accepted"

    def parameter(shape=(4, 4)):
        return nn.Parameter(shard(torch.ones(shape), mesh, placed))

    summands = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    refused("summands", lambda: Muon([summands]))
    refused("summands, by elements", lambda: AMSGrad([summands]))
    refused("model", lambda: EGN([parameter()]))
    refused("layer", lambda: DropMuon([{"params": [parameter(), nn.Parameter(torch.ones(4, 4))]}]))
    refused("vector", lambda: Muon([parameter((4,))]))
    ragged = DTensor.from_local(
        torch.ones(3 - 2 * rank, 4), mesh, placed, shape=(4, 4), stride=(4, 1), run_check=False
    )
    refused("ragged", lambda: Muon([nn.Parameter(ragged)]))
    alone = DeviceMesh("cpu", [0])
    refused("elsewhere", lambda: Muon([nn.Parameter(shard(torch.ones(4, 4), alone, placed))]))
    refused("state", lambda: Texts([parameter()], {"lr": 0.1}))
    backends, dist.get_backend_config = dist.get_backend_config, lambda group: "cuda:nccl"
    refused("offloaded", lambda: Muon([parameter()]))
    dist.get_backend_config = backends
    for rule in (Muon, AMSGrad):
        p = parameter()
        optimizer = rule([parameter(), p])
        for q in optimizer.param_groups[0]["params"]:
            q.grad = like(torch.ones(4, 4), q)
        p.grad = torch.ones(4, 4)
        refused(f"gradient of {rule.__name__}", optimizer.step)
        moved = [
            not torch.equal(whole(q.detach()), torch.ones(4, 4)) or bool(optimizer.state[q]["step"])
            for q in optimizer.param_groups[0]["params"]
        ]
        found[f"moved by {rule.__name__}"] = str(any(moved))
    return found


class Texts(Optimizer):
    """A matrix rule whose state cannot travel."""

    scope = Scope.MATRIX

    def init_state(self, p, group):
        return {"note": "text"}


def models(rank, folder):
    """Models under fully_shard, trained on shares of the batch that one process trains on."""
    found = {}
    size = dist.get_world_size()
    for rule in ("muon", "drop_muon_uniform", "amsgrad", "routed"):
        model = fully_sharded()
        optimizer = optimizer_of(model, rule)
        found[f"{rule}/passes"] = train(model, optimizer, rank=rank, size=size)
        found[rule] = learned(model, optimizer)
    return found


def models_on_grids(rank, folder):
    """The same on two-dimensional meshes: hybrid sharding, and tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    found = {}
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    for rule in ("muon", "drop_muon_uniform"):
        model = fully_sharded(grid)
        optimizer = optimizer_of(model, rule)
        train(model, optimizer, rank=rank, size=4)
        found[f"hybrid/{rule}"] = learned(model, optimizer)

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(network(*EVEN), grid["inner"], plan)
        for module in model:
            if isinstance(module, nn.Linear):
                fully_shard(module, mesh=grid["outer"])
        fully_shard(model, mesh=grid["outer"])
        weights = [model[0].weight, model[2].weight]
        optimizer = optimizer_of(model, rule)
        found[f"placements/{rule}"] = [str(w.placements) for w in weights]
        train(model, optimizer, rank=rank // 2, size=2)  # both halves of a row see one share
        found[f"tensor_parallel/{rule}"] = learned(model, optimizer)
    return found


def parts_of_the_world(rank, folder):
    """Two halves of the ranks train apart, each on a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    names = ("half", "rows", "one")
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=names)["rows", "one"]
    optimizer = sharded("kinds", mesh, [Shard(0), Replicate()])
    run(optimizer, range(STEPS - rank // 2))  # the halves need not even step together
    return values(optimizer)


def mixture(rank, folder):
    """One group of ordinary parameters and of parameters on two meshes."""
    ways = [None, meshes()["rows"], meshes()["hybrid"]]
    params = []
    for index, (p,) in enumerate(start("kinds")):
        way = ways[index % 3]
        params.append([nn.Parameter(p if way is None else shard(p, *way))])
    optimizer = build("kinds", params)
    run(optimizer)
    return values(optimizer)


def owners(rank, folder):
    """Which shapes this rank works on."""
    found = {}
    for name in ("rows", "hybrid"):
        mesh, placed = meshes()[name]
        optimizer = sharded("kinds", mesh, placed)
        Kinds.seen.clear()
        run(optimizer, range(1))
        found[name] = list(Kinds.seen)
    return found


# ---------------------------------------------------------------- checkpoints


CHECKPOINTED = ("muon", "drop_muon_uniform", "kinds_of_model", "amsgrad")


def checkpointed(rule):
    """Return a sharded model and its optimizer, as they are built."""
    model = fully_sharded()
    if rule == "kinds_of_model":
        return model, Kinds([p for p in model.parameters() if p.ndim > 1])
    return model, optimizer_of(model, rule)


def inject(optimizer, steps):
    """Take steps with gradients that do not depend on the number of ranks."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for k in steps:
        for index, p in enumerate(params):
            p.grad = like(gradient(k, index, p.shape), p) if p.requires_grad else None
        optimizer.step()
    if hasattr(optimizer, "release"):
        optimizer.release()  # a checkpointer looks at the flags


def save(rank, folder):
    """Three steps, stored by torch.distributed.checkpoint and as one whole state."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    for rule in CHECKPOINTED:
        model, optimizer = checkpointed(rule)
        inject(optimizer, range(3))
        weights, state = states.get_state_dict(model, optimizer)
        stored = {"model": weights, "optimizer": state}
        checkpoint.save(stored, checkpoint_id=folder / rule)
        everything = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        complete = states.get_optimizer_state_dict(model, optimizer, options=everything)
        if rank == 0:
            torch.save(complete, folder / f"{rule}.pt")
        # The plain route: no names, the optimizer's own numbering.
        checkpoint.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / f"{rule}-own")
    return {}


def routes_of(rule):
    """Return the ways in which a state is loaded.

    Without names ("own") torch's checkpoint returns numbers among the state under other keys.
    """
    return {"muon": ["sharded", "whole", "own"], "kinds_of_model": ["sharded", "whole"]}.get(
        rule, ["sharded"]
    )


def load(rank, folder):
    """Continue what ``save`` stored, on another number of ranks, in each of three ways."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    found = {}
    for rule in CHECKPOINTED:
        for route in routes_of(rule):
            model, optimizer = checkpointed(rule)
            weights, state = states.get_state_dict(model, optimizer)
            stored = {"model": weights, "optimizer": state}
            checkpoint.load(stored, checkpoint_id=folder / rule)
            states.set_model_state_dict(model, stored["model"])
            if route == "sharded":
                states.set_optimizer_state_dict(model, optimizer, stored["optimizer"])
            elif route == "whole":
                complete = torch.load(folder / f"{rule}.pt", weights_only=True)
                everything = states.StateDictOptions(full_state_dict=True)
                states.set_optimizer_state_dict(model, optimizer, complete, options=everything)
            else:
                own = {"optimizer": optimizer.state_dict()}
                checkpoint.load(own, checkpoint_id=folder / f"{rule}-own")
                optimizer.load_state_dict(own["optimizer"])
            inject(optimizer, range(3, 6))
            found[f"{route}/{rule}"] = learned(model, optimizer)
    return found


# ---------------------------------------------------------------- the process


def main(world, rank, folder, cases):
    faulthandler.dump_traceback_later(PATIENCE - 30, exit=True)  # says where it hangs
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        for case in cases:
            torch.save(globals()[case](rank, folder), folder / f"{case}-{rank}.pt")
            gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
