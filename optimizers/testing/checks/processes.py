"""Checks that start processes: resuming elsewhere, two ranks."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from optimizers.oracle import Needs
from optimizers.testing.checks.registry import expensive_check
from optimizers.testing.checks.subject import (
    CheckFailed,
    NotApplicable,
    Subject,
    distance,
    equal,
    require,
)

_PATIENCE = 120  # seconds; on a loaded machine starting torch alone takes ten


@expensive_check
def resumes_in_a_fresh_process(subject: Subject) -> None:
    """A run resumed from a file in a new Python process is the uninterrupted run, bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        case, optimizer = subject.pair(dtype=torch.float32)
        case.run(optimizer, range(4))
        checkpoint = {"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(checkpoint, path / "checkpoint.pt")
        left = case.run(optimizer, range(4, 9))
        _run([_job(subject, path, "resume", 0)])
        right = torch.load(path / "result-0.pt", weights_only=True)
    require(equal(left, right), "the resumed run differs")


@expensive_check
def two_ranks_equal_one_process(subject: Subject) -> None:
    """DistributedDataParallel over two processes (gloo) equals one process on the joint batch."""
    if subject.needs is not Needs.GRADIENTS:
        raise NotApplicable("the rule evaluates the objective itself, beside DDP's reducer")
    if not torch.distributed.is_available():
        raise NotApplicable("torch was built without distributed support")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        _run([_job(subject, path, "ddp", rank) for rank in range(2)])
        ranks = [torch.load(path / f"result-{rank}.pt", weights_only=True) for rank in range(2)]
    case, optimizer = subject.pair()
    single = case.run(optimizer, range(5))
    require(equal(ranks[0], ranks[1]), "the ranks drift apart")
    # The mean over two half batches is summed in another order than that over the whole.
    worst = distance(ranks[0], single)
    require(worst <= 1e-9, f"two ranks and one process differ by {worst:.1e}")


def _job(subject: Subject, folder: Path, task: str, rank: int) -> subprocess.Popen[str]:
    """Start a process that runs ``task``; the factory travels by reference."""
    order = folder / f"order-{rank}.pkl"
    try:
        order.write_bytes(pickle.dumps((subject.factory, subject.kwargs, subject.needs)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotApplicable(f"the factory cannot be sent to another process: {error}") from error
    environment = {
        **os.environ,
        # The loopback device: a host name that resolves elsewhere would make the ranks wait.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    return subprocess.Popen(
        [sys.executable, "-m", __name__, task, str(folder), str(rank)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(jobs: list[subprocess.Popen[str]]) -> None:
    outputs = []
    try:
        outputs = [job.communicate(timeout=_PATIENCE)[0] for job in jobs]
    except subprocess.TimeoutExpired as error:
        raise CheckFailed("a process hangs") from error
    finally:
        for job in jobs:
            job.kill()
            job.wait()
            if job.stdout is not None:
                job.stdout.close()
    for job, output in zip(jobs, outputs, strict=True):
        require(job.returncode == 0, f"a process failed: {output.strip()[-2000:]}")


def _main(task: str, folder: str, rank: str) -> None:
    """What the started process does."""
    # A process that hangs says where before it is given up.
    faulthandler.dump_traceback_later(_PATIENCE - 40, exit=True)
    torch.set_num_threads(1)
    path = Path(folder)
    factory, kwargs, needs = pickle.loads((path / f"order-{rank}.pkl").read_bytes())
    subject = Subject(factory, kwargs, needs=needs)
    values: Any = _resume(subject, path) if task == "resume" else _ddp(subject, path, int(rank))
    torch.save(values, path / f"result-{rank}.pt")


def _resume(subject: Subject, path: Path) -> list[torch.Tensor]:
    stored = torch.load(path / "checkpoint.pt", weights_only=True)
    case = subject.case(dtype=torch.float32)
    case.model.load_state_dict(stored["model"])
    optimizer = subject.make(case.params)
    optimizer.load_state_dict(stored["optimizer"])
    return case.run(optimizer, range(4, 9))


def _ddp(subject: Subject, path: Path, rank: int) -> list[torch.Tensor]:
    from torch import distributed

    # A file as meeting point: no port that another process could take in between.
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{path / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        values = _train_in_parallel(subject, rank)
        gc.collect()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    return values


def _train_in_parallel(subject: Subject, rank: int) -> list[torch.Tensor]:
    """Train on this rank's half of each batch.

    In a function of its own, so that the wrapper dies before the process group does: a reducer
    that outlives its group now and then waits for ever.
    """
    case, optimizer = subject.pair()
    # Some rules switch flags between steps; DDP must expect parameters without gradients.
    model = torch.nn.parallel.DistributedDataParallel(case.model, find_unused_parameters=True)
    for k in range(5):
        x, y = case.batch(k)
        half = slice(4 * rank, 4 * rank + 4)
        model.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x[half]), y[half])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return case.values()


if __name__ == "__main__":
    _main(*sys.argv[1:])
