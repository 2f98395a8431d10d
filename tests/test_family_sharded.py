"""The Muon family on sharded parameters: two processes give what one gives."""

import os
import sys

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from optimizers.orthogonalized import AdaMuon, Dion2, Muon, NorMuon, qk_clip_
from optimizers.wrappers import Hyperball

D = torch.float64
SHAPES = [(8, 8), (5, 3), (3, 5, 4), (6, 2, 3, 3), (4, 9)]
RULES = {
    "normuon": lambda params: NorMuon(params, lr=0.05, weight_decay=0.1, polar="svd"),
    "short": lambda params: NorMuon(params, lr=0.05, axis="short", polar="svd"),
    "adamuon": lambda params: AdaMuon(params, lr=0.05, polar="svd"),
    "dion2": lambda params: Dion2(params, lr=0.05, polar="svd"),
    "muonh": lambda params: Hyperball(Muon(params, lr=0.05, weight_decay=0.0, polar="svd")),
    "adamh": lambda params: Hyperball(torch.optim.Adam(params, lr=0.05)),
}


def random(shape, seed, dtype=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=D).to(dtype)


def run(rule, laid_out, dtype):
    params = [nn.Parameter(laid_out(random(s, i, dtype))) for i, s in enumerate(SHAPES)]
    optimizer = RULES[rule](params)
    for k in range(4):
        for i, p in enumerate(params):
            p.grad = laid_out(random(p.shape, 100 * k + i + 10, dtype))
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return [p.detach() for p in params]


def clip(laid_out):
    q, k = laid_out(random((8, 5), 0)), laid_out(random((4, 5), 1))
    qk_clip_(q, k, [50.0, 200, 300, 400], n_heads=4, n_kv_heads=2)
    return [q, k]


def work(rank, folder):
    """Run everything on every placement, and in this process alone; write the differences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for placement in (Shard(0), Shard(1), Replicate()):

        def laid_out(value, placement=placement):
            return distribute_tensor(value, mesh, [placement], src_data_rank=None)

        jobs = {name: (lambda lay, name=name: run(name, lay, D)) for name in RULES}
        jobs["muonh in bfloat16"] = lambda lay: run("muonh", lay, torch.bfloat16)
        jobs["qk_clip"] = clip
        for name, job in jobs.items():
            pairs = zip(job(laid_out), job(lambda value: value), strict=True)
            worst = max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)
            found[f"{name} {placement}"] = worst
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    # The loopback device: a host name that resolves elsewhere would make the ranks wait.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(found) == 3 * (len(RULES) + 2)
    # Matrices are worked on whole, bit by bit; a norm over two shards is summed in another order,
    # which in bfloat16 may round an entry (below 4) to its neighbour.
    tolerances = {"adamh": 1e-14, "muonh": 1e-14, "muonh in bfloat16": 2**-6}
    for name, difference in found.items():
        assert difference <= tolerances.get(name.rsplit(" ", 1)[0], 0.0), (name, difference)
