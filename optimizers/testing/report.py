"""What a run leaves behind: its record as JSON, means over seeds, convergence curves."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optimizers.testing.tasks import TASKS, require

__all__ = [
    "AXES",
    "Interval",
    "Point",
    "RunResult",
    "Summary",
    "aggregate",
    "interval",
    "load_results",
    "plot",
]

_FORMAT = 1


class Point(NamedTuple):
    """One row of a learning curve.

    Attributes:
        step: Optimizer steps so far.
        seconds: Wall seconds in ``optimizer.step``, evaluation and data excluded.
        loss_evals: Forward passes so far that were not part of a gradient.
        gradient_evals: Gradients so far (a forward and a backward pass each).
        train_loss: Mean loss of the batches since the last row; NaN at step 0.
        val_loss: Loss on the validation set.
        val_accuracy: Share of right predictions on the validation set.
    """

    step: int
    seconds: float
    loss_evals: int
    gradient_evals: int
    train_loss: float
    val_loss: float
    val_accuracy: float


@dataclasses.dataclass
class RunResult:
    """Everything about one run, as stored in its JSON file.

    Attributes:
        task: Name of the task.
        optimizer: Label of the optimizer.
        options: Constructor arguments, as plain JSON values.
        seed: Seed of the model and of the batches.
        settings: Steps, batch size, schedule and what else two comparable runs share.
        status: ``"ok"``, ``"diverged"`` (a loss that is not finite) or ``"failed"`` (an exception).
        message: Why a run is not ok, else empty.
        curve: Rows from step 0 to the last.
        final: ``val_loss, val_accuracy, best_val_loss, train_loss, steps, seconds``.
        counts: Evaluations by kind: ``loss, gradient, vjp, jvp, hvp, ggn``.
        versions: Of Python, torch, numpy and this library.
        platform: Operating system, machine and number of torch threads.
    """

    task: str
    optimizer: str
    options: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    status: str = "ok"
    message: str = ""
    curve: list[Point] = dataclasses.field(default_factory=list)
    final: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    platform: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Return the run as strict JSON; numbers that are not finite become ``null``."""
        fields = dataclasses.asdict(self)
        fields["curve"] = {"columns": Point._fields, "rows": self.curve}
        return json.dumps({"format": _FORMAT, **_finite(fields)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunResult:
        """Read what :meth:`to_json` wrote.

        Args:
            text: The JSON document.

        Returns:
            The run; ``null`` numbers come back as NaN.

        Raises:
            ValueError: It is no run, or of a format that this version does not know.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
            raise ValueError(f"not the JSON of a run in format {_FORMAT}.")
        rows = fields.pop("curve")["rows"]
        fields["final"] = {key: _number(value) for key, value in fields["final"].items()}
        try:
            return cls(curve=[Point(*map(_number, row)) for row in rows], **fields)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"not the JSON of a run: {error}.") from error

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for two files to be the same experiment."""
        keys = ("torch", "optimizers")
        return {
            "task": self.task,
            "optimizer": self.optimizer,
            "options": self.options,
            "seed": self.seed,
            "settings": self.settings,
            "versions": {key: self.versions.get(key) for key in keys},
        }

    def key(self) -> str:
        """Return the file name without suffix: task, optimizer, hash of the settings, seed."""
        told = json.dumps([self.optimizer, self.options, self.settings], sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.optimizer).strip("-")
        return f"{self.task}__{slug}__{digest}__seed{self.seed}"


def load_results(folder: str | Path) -> list[RunResult]:
    """Read every result in a folder, sorted by file name.

    Args:
        folder: The ``out_dir`` of a comparison.

    Returns:
        The results; files that are no results are passed over.
    """
    found = []
    for path in sorted(Path(folder).glob("*__seed*.json")):
        with contextlib.suppress(ValueError, KeyError):
            found.append(RunResult.from_json(path.read_text(encoding="utf-8")))
    return found


def _finite(value: Any) -> Any:
    """Replace numbers that strict JSON cannot hold by ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# -- means over seeds --------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval.

    Attributes:
        mean: Sample mean; NaN without values.
        half: Half-width of the t-interval; NaN with fewer than two values.
        n: Number of values.
    """

    mean: float
    half: float
    n: int


def interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    r"""Return the t-interval of a mean, :math:`\bar x \pm t_{n-1} s / \sqrt n`.

    It assumes independent, roughly normal values; with two or three seeds it is wide, as it
    should be.

    Args:
        values: One value per seed.
        confidence: Coverage, in (0, 1).

    Returns:
        Mean, half-width and number of values.

    Raises:
        ValueError: ``confidence`` lies outside (0, 1).
        MissingExtraError: scipy is not installed.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1); got {confidence}.")
    x = np.asarray(list(values), dtype=np.float64)
    if len(x) < 2:
        return Interval(float(x[0]) if len(x) else math.nan, math.nan, len(x))
    t = float(require("scipy.stats").t.ppf((1 + confidence) / 2, len(x) - 1))
    return Interval(float(x.mean()), t * float(x.std(ddof=1)) / math.sqrt(len(x)), len(x))


@dataclasses.dataclass(frozen=True)
class Summary:
    """The runs of one optimizer on one task, with equal options and settings.

    Attributes:
        task: Name of the task.
        optimizer: Label; where one optimizer ran with several options, these are added.
        runs: Number of runs of each status.
        metrics: Interval over the ``"ok"`` runs by metric: the entries of ``RunResult.final``,
            ``loss_evals`` and ``gradient_evals``.
    """

    task: str
    optimizer: str
    runs: Mapping[str, int]
    metrics: Mapping[str, Interval]


def aggregate(results: Sequence[RunResult], confidence: float = 0.95) -> list[Summary]:
    """Average runs over seeds.

    Diverged and failed runs have no place in a mean: they are counted in ``Summary.runs`` and
    nowhere else, so a mean over fewer runs than seeds must be read together with that count.

    Args:
        results: Any results, of several tasks, optimizers and options.
        confidence: Coverage of the intervals.

    Returns:
        One summary per task, optimizer and set of options, in order of appearance.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    summaries = []
    for (task, label), runs in _grouped(results).items():
        fine = [run for run in runs if run.status == "ok"]
        statuses = [run.status for run in runs]
        values = {key: [run.final[key] for run in fine] for key in fine[0].final} if fine else {}
        values["loss_evals"] = [float(run.counts["loss"]) for run in fine]
        values["gradient_evals"] = [float(run.counts["gradient"]) for run in fine]
        summaries.append(
            Summary(
                task,
                label,
                {status: statuses.count(status) for status in ("ok", "diverged", "failed")},
                {key: interval(column, confidence) for key, column in values.items()},
            )
        )
    return summaries


def _grouped(results: Sequence[RunResult]) -> dict[tuple[str, str], list[RunResult]]:
    """Group runs that differ in the seed alone, under labels that tell the groups apart."""
    groups: dict[tuple[str, str, str], list[RunResult]] = {}
    for run in results:
        told = json.dumps([run.options, run.settings], sort_keys=True)
        groups.setdefault((run.task, run.optimizer, told), []).append(run)
    twins: dict[tuple[str, str], list[RunResult]] = {}
    for (task, optimizer, _), runs in groups.items():
        twins.setdefault((task, optimizer), []).append(runs[0])
    named: dict[tuple[str, str], list[RunResult]] = {}
    for (task, optimizer, _), runs in groups.items():
        label = optimizer + _difference(runs[0], twins[task, optimizer])
        while (task, label) in named:
            label += "'"
        named[task, label] = runs
    return named


def _difference(run: RunResult, twins: Sequence[RunResult]) -> str:
    """Return the options and settings in which a run differs from its twins, as ``(lr=0.1)``."""

    def told(one: RunResult) -> dict[str, Any]:
        return {**one.settings, **one.options}

    own = told(run)
    keys = [key for key in own if any(told(twin).get(key) != own[key] for twin in twins)]
    return f" ({', '.join(f'{key}={own[key]}' for key in keys)})" if keys else ""


# -- curves ------------------------------------------------------------------------------------

AXES: Mapping[str, str] = {
    "steps": "optimizer steps",
    "seconds": "seconds in the optimizer",
    "evaluations": "forward passes (losses + gradients)",
}
"""Horizontal axes of :func:`plot` with their labels."""

# Okabe and Ito's palette: told apart under the common forms of colour blindness. Its yellow is
# left out (too faint on white); line styles repeat the distinction for prints in grey.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def plot(
    results: Sequence[RunResult],
    path: str | Path,
    *,
    panels: Sequence[tuple[str, str]] | None = None,
) -> Path:
    """Draw convergence curves: validation loss against cost, one panel per task and axis.

    The line is the mean over seeds and the band reaches from the smallest to the largest; a run
    that diverged ends where it did.

    Args:
        results: Runs of one or several tasks.
        path: The PNG to write; its folder must exist.
        panels: ``(task, axis)`` pairs with axes from ``AXES``. By default two panels per task:
            steps and seconds, or forward passes and seconds where there is no gradient.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to draw, or an axis is unknown.
        MissingExtraError: matplotlib is not installed.
    """
    groups = _grouped([run for run in results if run.curve])
    tasks = list(dict.fromkeys(task for task, _ in groups))
    if panels is None:
        panels = [(task, axis) for task in tasks for axis in _default_axes(task)]
    panels = [(task, axis) for task, axis in panels if task in tasks]
    if not panels:
        raise ValueError("there are no curves to draw.")
    for _, axis in panels:
        if axis not in AXES:
            raise ValueError(f"`axis` must be one of {', '.join(AXES)}; got {axis!r}.")
    labels = list(dict.fromkeys(label for _, label in groups))
    figure_class = require("matplotlib.figure").Figure
    canvas = require("matplotlib.backends.backend_agg").FigureCanvasAgg
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    # A bare Figure on an Agg canvas: pyplot would touch the caller's backend and figures.
    figure = figure_class(figsize=(6.2 * columns, 4.1 * rows), layout="constrained")
    canvas(figure)
    axes = np.atleast_1d(np.asarray(figure.subplots(rows, columns), dtype=object)).ravel()
    for place, (task, axis) in zip(axes, panels, strict=False):
        for (owner, label), runs in groups.items():
            if owner == task:
                _draw(place, runs, axis, label, labels.index(label))
        place.set(title=task, xlabel=AXES[axis], ylabel="validation loss (nats)", yscale="log")
        if axis == "evaluations":
            # Forward-only rules spend a thousand times what a gradient rule does.
            place.set_xscale("symlog", linthresh=100)
            place.set_xlim(left=0)
        _plain_ticks(place)
        place.grid(True, which="both", alpha=0.25, linewidth=0.6)
        place.legend(fontsize=8, frameon=False)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    counts = sorted({len(runs) for runs in groups.values()})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    seeds += " seed" if counts[-1] == 1 else " seeds"
    figure.supxlabel(f"line: mean of {seeds}; band: smallest to largest", fontsize=8)
    figure.savefig(path, dpi=150, format="png")
    return Path(path)


def _default_axes(task: str) -> tuple[str, str]:
    steps = task not in TASKS or TASKS[task].differentiable
    return ("steps" if steps else "evaluations", "seconds")


def _plain_ticks(axes: Any) -> None:
    """Label a logarithmic axis 0.1, 0.2, 0.5, ... instead of powers of ten alone."""
    ticker = require("matplotlib.ticker")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _abscissa(point: Point, axis: str) -> float:
    if axis == "evaluations":
        return point.loss_evals + point.gradient_evals
    return point.seconds if axis == "seconds" else point.step


def _draw(axes: Any, runs: Sequence[RunResult], axis: str, label: str, index: int) -> None:
    """Draw one optimizer: mean and range over the seeds that reached each step."""
    by_step: dict[int, list[Point]] = {}
    for run in runs:
        for point in run.curve:
            if math.isfinite(point.val_loss):
                by_step.setdefault(point.step, []).append(point)
    rows = [by_step[step] for step in sorted(by_step)]
    x = [float(np.mean([_abscissa(point, axis) for point in row])) for row in rows]
    losses = [[point.val_loss for point in row] for row in rows]
    lost = sum(run.status != "ok" for run in runs)
    color = _PALETTE[index % len(_PALETTE)]
    axes.plot(
        x,
        [float(np.mean(row)) for row in losses],
        color=color,
        linestyle=_STYLES[index % len(_STYLES)],
        linewidth=1.6,
        label=label.removeprefix("torch.optim:") + (f", {lost} not finished" if lost else ""),
    )
    axes.fill_between(
        x, [min(row) for row in losses], [max(row) for row in losses], color=color, alpha=0.18,
        linewidth=0,
    )  # fmt: skip
