"""Train any optimizer on any task: one loop, counted evaluations, nothing lost to Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optimizers.objective import Objective
from optimizers.testing.lookup import (
    Builder,
    OptimizerLike,
    load_object,
    optimizer_label,
    resolve_optimizer,
)
from optimizers.testing.report import Point, RunResult
from optimizers.testing.storage import finished, plain, read_checkpoint, versions, write
from optimizers.testing.tasks import Task, get_task

__all__ = [
    "Event",
    "OptimizerLike",
    "compare",
    "load_object",
    "optimizer_label",
    "resolve_optimizer",
    "run",
]

_SCHEDULES = ("cosine", "constant")
_WARMUP = 20


@dataclasses.dataclass(frozen=True)
class Event:
    """What a progress callback is told, once per step and once per finished run.

    Attributes:
        task: Name of the task.
        optimizer: Label of the optimizer.
        seed: Seed of the run.
        step: Steps done.
        steps: Steps planned.
        loss: Loss that the last step returned, NaN before the first.
        point: The new row of the curve if the model has just been evaluated.
        result: The finished run, in its last event alone.
        index: Number of the run in a comparison, from 0.
        total: Number of runs in the comparison.
        skipped: Whether the result was read from an earlier comparison's file.
    """

    task: str
    optimizer: str
    seed: int
    step: int
    steps: int
    loss: float = math.nan
    point: Point | None = None
    result: RunResult | None = None
    index: int = 0
    total: int = 1
    skipped: bool = False


Callback: TypeAlias = Callable[[Event], None]


# -- one run -----------------------------------------------------------------------------------


def run(
    task: str | Task,
    optimizer: OptimizerLike,
    *,
    seed: int = 0,
    steps: int | None = None,
    budget_seconds: float | None = None,
    options: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    schedule: str | None = None,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
) -> RunResult:
    """Train a task's model with an optimizer and measure it on the way.

    The loop is the same for every rule: ``loss = optimizer.step(objective.on(inputs, targets))``.
    An :class:`~optimizers.objective.Objective` is a plain closure as well, so that optimizers of
    torch run in it unchanged. With the cosine schedule every ``lr`` is warmed up over 20 steps and
    decayed to zero; what else a rule has of schedules is its own.

    Args:
        task: A task or its name.
        optimizer: A registry name, ``module:Class`` or a callable ``(model, **options)``; it is
            constructed twice, since a throw-away step warms the process up.
        seed: Seed of the initial parameters and of the order of the batches.
        steps: Number of steps; the task's by default.
        budget_seconds: Ends the run early once this many seconds were spent in the optimizer.
        options: Constructor arguments; the task's recommended ones by default.
        eval_every: Steps between evaluations; the task's by default. The first and the last step
            are always evaluated.
        schedule: ``"cosine"`` or ``"constant"``; the task's by default.
        callback: Called with an :class:`Event` after every step; its exceptions pass through.
        checkpoint: A file written at every evaluation, read if it is there, and removed when the
            run has finished. A resumed run continues bit by bit (its seconds aside).

    Returns:
        The result. A loss that is not finite ends a run as ``"diverged"``, an exception of the
        optimizer or the model as ``"failed"``; ``KeyboardInterrupt`` always passes through.

    Raises:
        LookupError: No such task or optimizer.
        ValueError: A setting out of range, or a checkpoint of another experiment.
        MissingExtraError: The task needs a package that is not installed.
    """
    task = get_task(task) if isinstance(task, str) else task
    builder = resolve_optimizer(optimizer)
    result = _plan(task, optimizer, seed, steps, budget_seconds, options, eval_every, schedule)
    if options is None:
        options = task.recommended.get(result.optimizer, {})
    path = None if checkpoint is None else Path(checkpoint)
    saved = read_checkpoint(path, result)
    notify = callback if callback is not None else _ignore
    planned = int(result.settings["steps"])
    every = int(result.settings["eval_every"])
    budget = math.inf if budget_seconds is None else budget_seconds
    try:
        trainer = _Trainer(task, builder, options, result)
        if saved is None:
            trainer.evaluate()
        else:
            trainer.load(saved)
        # Lazy imports and first allocations belong to nobody's clock.
        _Trainer(task, builder, options, result).advance()
    except Exception as error:
        return _failed(result, error, path)

    def event(loss: float, point: Point | None) -> Event:
        return Event(task.name, result.optimizer, seed, trainer.step, planned, loss, point)

    # The callback is called outside the guards: what it raises is not the optimizer's failure.
    notify(event(math.nan, result.curve[-1]))
    while trainer.step < planned and trainer.seconds < budget:
        point = None
        try:
            loss = trainer.advance()
            last = trainer.step == planned or trainer.seconds >= budget
            if math.isfinite(loss) and (last or trainer.step % every == 0):
                point = trainer.evaluate()
        except Exception as error:
            trainer.record()
            return _failed(result, error, path)
        if not math.isfinite(loss):
            result.status, result.message = "diverged", f"loss {loss} at step {trainer.step}"
            break
        if point is not None and not math.isfinite(point.val_loss):
            result.status = "diverged"
            result.message = f"validation loss {point.val_loss} at step {trainer.step}"
            break
        if point is not None and path is not None:
            write(path, lambda file: torch.save(trainer.saved(), file))
        notify(event(loss, point))
    trainer.record()
    if path is not None:
        path.unlink(missing_ok=True)
    return result


class _Trainer:
    """The state of a run: model, optimizer, position, clocks and counts."""

    def __init__(
        self, task: Task, builder: Builder, options: Mapping[str, Any], result: RunResult
    ) -> None:
        self.task = task
        self.result = result
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.model = task.build_model(result.seed)
        self.objective = Objective(self.model, task.loss_fn)
        self.optimizer = builder(self.model, **options)
        groups = self.optimizer.param_groups
        self.rates = [float(group["lr"]) if "lr" in group else None for group in groups]
        self.batches = task.batches(result.seed)

    def advance(self) -> float:
        """Take one step on the next batch; return its loss."""
        factor = _factor(self.result.settings, self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if rate is None:
                continue
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        bound = self.objective.on(*next(self.batches))
        start = time.perf_counter()
        loss = float(self.optimizer.step(bound))  # type: ignore[arg-type]
        self.seconds += time.perf_counter() - start
        self.step += 1
        self.losses.append(loss)
        return loss

    def evaluate(self) -> Point:
        """Measure the weights to deploy and append a row to the curve."""
        deploy = getattr(self.optimizer, "eval_params", contextlib.nullcontext)
        with deploy():
            metrics = self.task.evaluate(self.model)
        point = self._point(metrics["loss"], metrics["accuracy"])
        self.result.curve.append(point)
        self.losses.clear()
        return point

    def _point(self, val_loss: float, val_accuracy: float) -> Point:
        counts = self.objective.counts
        mean = math.fsum(self.losses) / len(self.losses) if self.losses else math.nan
        return Point(
            self.step, self.seconds, counts.loss, counts.gradient, mean, val_loss, val_accuracy
        )

    def record(self) -> None:
        """Fill in the totals; a run that stopped between evaluations gets a last, bare row."""
        result = self.result
        if result.curve[-1].step != self.step:
            result.curve.append(self._point(math.nan, math.nan))
        last = result.curve[-1]
        seen = [point.val_loss for point in result.curve if math.isfinite(point.val_loss)]
        result.final = {
            "val_loss": last.val_loss,
            "val_accuracy": last.val_accuracy,
            "best_val_loss": min(seen, default=math.nan),
            "train_loss": last.train_loss,
            "steps": float(self.step),
            "seconds": self.seconds,
        }
        result.counts = dataclasses.asdict(self.objective.counts)

    def saved(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors and plain values alone."""
        return {
            "identity": json.dumps(self.result.identity(), sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": [list(point) for point in self.result.curve],
            "counts": dataclasses.asdict(self.objective.counts),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from :meth:`saved`."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.result.curve[:] = [Point(*row) for row in saved["curve"]]
        for name, count in saved["counts"].items():
            setattr(self.objective.counts, name, count)
        self.batches = self.task.batches(self.result.seed, self.step)


def _plan(
    task: Task,
    optimizer: OptimizerLike,
    seed: int,
    steps: int | None,
    budget_seconds: float | None,
    options: Mapping[str, Any] | None,
    eval_every: int | None,
    schedule: str | None,
) -> RunResult:
    """Check the settings and return the empty result that identifies the run."""
    label = optimizer_label(optimizer)
    steps = task.steps if steps is None else steps
    eval_every = task.eval_every if eval_every is None else eval_every
    schedule = task.schedule if schedule is None else schedule
    if steps < 1 or eval_every < 1:
        raise ValueError(
            f"`steps` and `eval_every` must be at least 1; got {steps} and {eval_every}."
        )
    if budget_seconds is not None and not budget_seconds > 0:
        raise ValueError(f"`budget_seconds` must be positive; got {budget_seconds}.")
    if schedule not in _SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(_SCHEDULES)}; got {schedule!r}.")
    if options is None:
        options = task.recommended.get(label, {})
    settings = {
        "steps": steps,
        "batch_size": task.batch_size,
        "eval_every": eval_every,
        "schedule": schedule,
        "budget_seconds": budget_seconds,
        "data": task.fingerprint(),
    }
    return RunResult(
        task.name,
        label,
        {key: plain(value) for key, value in options.items()},
        seed,
        settings,
        versions=versions(),
        platform={
            "system": platform.platform(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    )


def _factor(settings: Mapping[str, Any], step: int) -> float:
    """Return the factor of the learning rate; a function of the step, so nothing to restore."""
    if settings["schedule"] == "constant":
        return 1.0
    steps = int(settings["steps"])
    warmup = min(_WARMUP, steps // 10)
    if step < warmup:
        return float(step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _failed(result: RunResult, error: Exception, path: Path | None) -> RunResult:
    """Mark a run as failed; its checkpoint goes, since resuming would fail in the same way."""
    if path is not None:
        path.unlink(missing_ok=True)
    result.status = "failed"
    result.message = f"{type(error).__name__}: {error}"
    return result


def _ignore(event: Event) -> None:
    """The default callback."""


# -- many runs ---------------------------------------------------------------------------------


def compare(
    tasks: Sequence[str | Task],
    optimizers: Sequence[OptimizerLike],
    seeds: int | Sequence[int] = 3,
    *,
    steps: int | None = None,
    budget_seconds: float | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    schedule: str | None = None,
    out_dir: str | Path | None = None,
    resume: bool = True,
    progress: Callback | None = None,
) -> list[RunResult]:
    """Run every optimizer on every task with every seed.

    Each finished run is written at once to a JSON file of its own in ``out_dir``, so an interrupt
    loses no finished run, and the run in progress continues from its last evaluation when the
    comparison is started again.

    Args:
        tasks: Tasks or their names.
        optimizers: Registry names, ``module:Class`` or callables with distinct ``__name__``. A
            callable's code is not part of the settings: rename it when you change it.
        seeds: The seeds, or their number.
        steps: Number of steps; each task's by default.
        budget_seconds: Seconds in the optimizer after which a run ends early.
        options: Constructor arguments by label; the task's recommended ones for the others.
        eval_every: Steps between evaluations; each task's by default.
        schedule: ``"cosine"`` or ``"constant"``; each task's by default.
        out_dir: Folder of the results; ``None`` writes nothing.
        resume: Take over finished runs with equal settings and versions instead of repeating them.
            Failed runs are always repeated.
        progress: Called with an :class:`Event` after every step and after every run.

    Returns:
        The results, seed by seed, so that an interrupt leaves comparable sets.

    Raises:
        LookupError: No such task or optimizer, before the first run starts.
        ValueError: Two optimizers with one label, ``options`` for an optimizer that is not
            compared, or a setting out of range.
        MissingExtraError: A task needs a package that is not installed.
    """
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    labels = [optimizer_label(optimizer) for optimizer in optimizers]
    if len(set(labels)) != len(labels):
        raise ValueError(f"optimizers must have distinct labels; got {', '.join(labels)}.")
    options = {} if options is None else options
    stray = sorted(set(options) - set(labels))
    if stray:
        raise ValueError(f"`options` names {', '.join(stray)}, which is not compared.")
    for optimizer in optimizers:
        resolve_optimizer(optimizer)
    order = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not (order and chosen and labels):
        raise ValueError("`tasks`, `optimizers` and `seeds` must not be empty.")
    folder = None if out_dir is None else Path(out_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    notify = progress if progress is not None else _ignore
    todo = [
        (seed, task, optimizer) for seed in order for task in chosen for optimizer in optimizers
    ]
    results: list[RunResult] = []
    for index, (seed, task, optimizer) in enumerate(todo):
        place: dict[str, Any] = {"index": index, "total": len(todo)}
        own = options.get(optimizer_label(optimizer))
        plan = _plan(task, optimizer, seed, steps, budget_seconds, own, eval_every, schedule)
        file = None if folder is None else folder / f"{plan.key()}.json"
        result = finished(file, plan) if resume else None
        skipped = result is not None
        if result is None:
            checkpoint = None if file is None else file.with_suffix(".ckpt")
            if checkpoint is not None and not resume:
                checkpoint.unlink(missing_ok=True)
            result = run(
                task,
                optimizer,
                seed=seed,
                steps=steps,
                budget_seconds=budget_seconds,
                options=own,
                eval_every=eval_every,
                schedule=schedule,
                callback=lambda event, place=place: notify(  # type: ignore[misc]
                    dataclasses.replace(event, **place)
                ),
                checkpoint=checkpoint,
            )
            if file is not None:
                text = result.to_json().encode()
                write(file, lambda stream, text=text: stream.write(text))  # type: ignore[misc]
        results.append(result)
        steps_done = result.curve[-1].step if result.curve else 0
        notify(
            Event(
                task.name,
                plan.optimizer,
                seed,
                steps_done,
                int(plan.settings["steps"]),
                result=result,
                skipped=skipped,
                **place,
            )
        )
    return results
