"""What the command line shows: live progress, tables, mistakes in one line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from optimizers.testing.harness import Event, compare, resolve_optimizer
from optimizers.testing.report import Interval, RunResult, aggregate, plot
from optimizers.testing.tasks import MissingExtraError, get_task, require

_USAGE = 2
_INTERRUPTED = 130


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit code 2."""
    try:
        yield
    except (LookupError, ValueError, TypeError, MissingExtraError) as error:
        # A KeyError or IndexError is a bug of ours and keeps its traceback.
        if isinstance(error, (KeyError, IndexError)):
            raise
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(_USAGE) from error


def console() -> Console:
    """Return a console on the present standard output."""
    # Made anew for each command, since tests and notebooks exchange sys.stdout.
    return Console()


def plain_table(title: str | None = None) -> Table:
    """Return an empty table in the house's style."""
    return Table(
        title=title, header_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


class Board:
    """Live progress of comparisons, and the table of what was finished, also after Ctrl-C."""

    def __init__(self) -> None:
        self.results: list[RunResult] = []
        self.interrupted = False
        self.taken_over = 0
        self.out = console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.out,
            transient=True,
        )

    def __enter__(self) -> Board:
        self.progress.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.progress.stop()
        self.interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        return self.interrupted

    def compare(
        self, tasks: Sequence[str], optimizers: Sequence[str], seeds: int, **settings: Any
    ) -> None:
        """Run a comparison; what finished stays in ``results`` when it is interrupted."""
        # Every name is looked up before the first bar appears.
        for task in tasks:
            get_task(task)
        for optimizer in optimizers:
            resolve_optimizer(optimizer)
        require("scipy.stats")
        require("matplotlib.figure")
        total = self.progress.add_task("runs", total=None, note="")
        current = self.progress.add_task("", total=None, note="")

        def told(event: Event) -> None:
            self.progress.update(
                current,
                description=f"{event.task} {event.optimizer} seed {event.seed}",
                completed=event.step,
                total=event.steps,
                note=f"loss {event.loss:.4f}" if math.isfinite(event.loss) else "",
            )
            finished = event.index + (event.result is not None)
            self.progress.update(total, completed=finished, total=event.total)
            if event.result is not None:
                self.results.append(event.result)
                self.taken_over += event.skipped

        compare(tasks, optimizers, seeds, progress=told, **settings)
        self.progress.remove_task(current)
        self.progress.remove_task(total)

    def close(self, image: Path, panels: Sequence[tuple[str, str]] | None = None) -> None:
        """Print the table, draw the plot, and exit with the code that tells how it went."""
        for table in _tables(self.results):
            self.out.print(table)
        for run in {(r.optimizer, repr(r.options), r.task): r for r in self.results}.values():
            given = (
                ", ".join(f"{k}={v}" for k, v in run.options.items()) or "constructor's defaults"
            )
            self.out.print(
                f"{run.task} {run.optimizer}: {escape(given)}", soft_wrap=True, highlight=False
            )
        if self.taken_over:
            self.out.print(
                f"{self.taken_over} of {len(self.results)} runs taken over from an earlier "
                "comparison (--no-resume repeats them)",
                soft_wrap=True,
            )
        bad = [run for run in self.results if run.status != "ok"]
        for run in bad:
            self.out.print(
                f"{run.task} {run.optimizer} seed {run.seed} {run.status}: {escape(run.message)}",
                soft_wrap=True,
            )
        if any(run.curve for run in self.results):
            with told_once():
                plot(self.results, image, panels=panels)
            self.out.print(f"plot: {image}", soft_wrap=True, highlight=False)
        if self.interrupted:
            self.out.print(f"interrupted after {len(self.results)} finished run(s)")
            raise typer.Exit(_INTERRUPTED)
        if any(run.status == "failed" for run in bad):
            raise typer.Exit(1)


def _tables(results: Sequence[RunResult]) -> Iterator[Table]:
    """Yield one table per task, with 95 % intervals of the mean over seeds."""
    blank = Interval(math.nan, math.nan, 0)
    summaries = aggregate(results)
    for task in dict.fromkeys(row.task for row in summaries):
        table = plain_table(f"{task}: mean over seeds ± 95 % t-interval")
        table.add_column("optimizer", min_width=17)
        for column in ("ok", "val. loss", "accuracy %", "losses", "gradients", "sec."):
            table.add_column(column, justify="right", no_wrap=True)
        for row in summaries:
            if row.task != task:
                continue
            metrics = row.metrics
            table.add_row(
                escape(row.optimizer),
                f"{row.runs['ok']}/{sum(row.runs.values())}",
                _interval(metrics.get("val_loss", blank), "{:.4f}"),
                _interval(metrics.get("val_accuracy", blank), "{:.1f}", 100),
                _count(metrics["loss_evals"].mean),
                _count(metrics["gradient_evals"].mean),
                "{:.2f}".format(metrics.get("seconds", blank).mean),
            )
        yield table


def _interval(value: Interval, form: str, scale: float = 1.0) -> str:
    if not value.n:
        return "-"
    mean = form.format(scale * value.mean)
    return mean if math.isnan(value.half) else f"{mean} ± {form.format(scale * value.half)}"


def _count(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


# -- check -------------------------------------------------------------------------------------
