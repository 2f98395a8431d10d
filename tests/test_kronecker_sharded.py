"""The Kronecker-factored rules on sharded parameters: two processes give what one gives."""

import os
import sys

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from tests.family import D
from tests.kronecker_family import RULES


def random(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=D)


def sharded_run(rule, laid_out):
    shapes = [(8, 8), (5, 3), (3, 5, 4), (6, 2, 3, 3), (7,)]
    params = [nn.Parameter(laid_out(random(s, i))) for i, s in enumerate(shapes)]
    options = {"max_precond_dim": 6} if rule == "Shampoo" else {}
    optimizer = RULES[rule](params, precondition_frequency=2, **options)
    for k in range(4):
        for i, p in enumerate(params):
            p.grad = laid_out(random(p.shape, 100 * k + i + 10))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.eval_params():
        return [p.detach().clone() for p in params]


def sharded_work(rank, folder):
    """Run every rule on shards, and in this process alone; write the differences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for rule in RULES:
        parts = sharded_run(
            rule, lambda x: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
        )
        whole = sharded_run(rule, lambda x: x)
        pairs = zip(parts, whole, strict=True)
        found[rule] = max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    # The loopback device: a host name that resolves elsewhere would make the ranks wait.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    multiprocessing.spawn(sharded_work, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    # Batches differ between the runs: a few roundings.
    assert set(found) == set(RULES)
    assert max(found.values()) < 1e-12, found
