"""Second order to a target loss: steps, evaluations and seconds beside tuned AdamW and SGD.

Every rule of the second-order family in the registry gets the same budget of tuning: six settings,
each run once with a seed that is not used afterwards; the one with the fewest steps to the target
is then run with five other seeds. ``full batch`` is a small network on all digits at once;
``mini-batch`` are the harness's networks with batches of 64. Rates are constant. Seconds are
processor time of objective and step on one thread; measuring the loss does not count. A run is
given up after 40 times AdamW's seconds.

    PYTHONPATH=. python benchmarks/to_target.py --out benchmarks/results/to_target.json
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import environment, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import optimizers
from optimizers.registry import SPECS
from optimizers.testing.tasks import get_task

Options = Mapping[str, Any]
TUNING_SEED, SEEDS, SETTINGS = 1000, 5, 6
PATIENCE = 40  # a run is given up after so many times AdamW's median
BASELINES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": torch.optim.AdamW,  # first, for it sets the limit of time
    "torch.optim.SGD": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o),
    # With one iteration a step the default of max_eval is one, which cuts its search short.
    "torch.optim.LBFGS": lambda p, **o: torch.optim.LBFGS(
        p, max_iter=1, max_eval=25, tolerance_change=0, line_search_fn="strong_wolfe", **o
    ),
}


def rates(*values: float, **fixed: Any) -> list[dict[str, Any]]:
    """Return a setting for each rate."""
    return [{"lr": value, **fixed} for value in values]


def crossed(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return a setting for each combination."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


STEADY = {"weight_decay": 0.0, "precondition_frequency": 5}
# Six settings each, around what the papers and the harness recommend.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "torch.optim.AdamW": rates(0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "torch.optim.SGD": rates(0.1, 0.2, 0.4, 0.8, 1.6, 3.2),
    "torch.optim.LBFGS": [{"lr": 1.0, "history_size": n} for n in (5, 10, 20, 40, 80, 160)],
    "EGN": crossed(lr=(0.3, 0.5, 1.0), damping=(0.03, 0.1)),
    "MFAC": crossed(lr=(0.01, 0.03), damp=(3e-4, 1e-3, 3e-3), ngrads=(64,), momentum=(0.9,)),
    "SOAP": rates(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, **STEADY),
    "Shampoo": rates(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, grafting="adam", **STEADY),
    "KLShampoo": rates(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, **STEADY),
    "SPlus": rates(0.1, 0.2, 0.5, 1.0, 2.0, 4.0, weight_decay=0.0, precondition_frequency=20),
    "PSGDKron": rates(0.003, 0.01, 0.02, 0.04, 0.08, 0.16),
    "KFAC": crossed(lr=(0.03, 0.1), damping=(0.01, 0.03, 0.1)),
    "OASIS": crossed(lr=(0.03, 0.1, 0.3), alpha=(0.03, 0.1), adaptive=(False,)),
    "AdaHessian": rates(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    "SophiaG": rates(0.002, 0.004, 0.01, 0.02, 0.04, 0.08, weight_decay=0.0),
    "SophiaH": rates(0.002, 0.004, 0.01, 0.02, 0.04, 0.08, weight_decay=0.0),
    "FAdam": rates(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, weight_decay=0.0),
    "InducedMetric": rates(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, variant="rms", xi=1e-5),
}
# Other settings for the whole data at once; what stands here alone is for it alone.
FULL_GRIDS: dict[str, list[dict[str, Any]]] = {
    "EGN": crossed(damping=(1e-4, 1e-3, 1e-2), line_search=(True,), adaptive_damping=(True, False)),
    "KFAC": crossed(lr=(0.1, 0.3, 1.0), damping=(1e-4, 1e-3)),
    "SaddleFreeNewton": [{"krylov_dim": k} for k in (5, 10, 15, 20, 30, 40)],
    "GradientRegularizedNewton": crossed(
        hessian=("exact", "ggn"), krylov_dim=(20, 50, 100), krylov_tol=(1e-2,)
    ),
}


class Setting:
    """A network, its data, the batch and the target."""

    def __init__(self, name: str, target: float, limit: int, every: int) -> None:
        self.name, self.target, self.limit, self.every = name, target, limit, every
        self.seconds = math.inf
        self.full = name.startswith("full")
        self.task = get_task("digits-cnn" if name.endswith("digits-cnn") else "digits-mlp")
        data = self.task.load()
        self.everything = data.inputs, data.targets

    def model(self, seed: int) -> nn.Module:
        """Return the network of a seed."""
        if not self.full:
            return self.task.build_model(seed)
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        with torch.no_grad():
            for p in model.parameters():
                bound = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.0
                p.uniform_(-bound, bound, generator=generator)
        return model

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of a seed."""
        while self.full:
            yield self.everything
        yield from self.task.batches(seed)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the loss on all training data."""
        inputs, targets = self.everything
        return float(cross_entropy(model(inputs), targets))

    def kept(self, curve: list[Any]) -> list[Any]:
        """Return what of a curve goes into the record: some forty points of one setting."""
        return curve[:: max(1, len(curve) // 40)] if self.name.endswith("digits-mlp") else []

    def run(
        self, make: Callable[..., Any], options: Options, seed: int, limit: float = math.inf
    ) -> dict[str, Any]:
        """Train to the target; what it took is infinite if it was not reached."""
        model = self.model(seed)
        optimizer = make(model.parameters(), **options)
        objective = optimizers.Objective(model, cross_entropy)
        spent, curve, batches = 0.0, [], self.batches(seed)
        for step in range(1, 1 + int(min(self.limit, limit))):
            bound = objective.on(*next(batches))
            start = time.process_time()
            try:
                optimizer.step(bound)
            except (optimizers.OracleError, RuntimeError):  # diverged
                break
            spent += time.process_time() - start
            if step % self.every == 0:
                loss = self.loss(model)
                counts = objective.counts.as_dict()
                curve.append((step, spent, loss))
                if not math.isfinite(loss) or spent > self.seconds:
                    break
                if loss <= self.target:
                    return {"steps": step, "seconds": spent, "counts": counts, "curve": curve}
        return {"steps": math.inf, "seconds": math.inf, "counts": {}, "curve": curve}


def race(setting: Setting, name: str) -> dict[str, Any]:
    """Tune one rule, then run it with the seeds."""
    make = BASELINES.get(name) or SPECS[name].cls
    grid = (GRIDS | FULL_GRIDS if setting.full else GRIDS)[name]
    assert len(grid) == SETTINGS, name

    def score(trial: dict[str, Any]) -> tuple[float, float]:
        last = trial["curve"][-1][2] if trial["curve"] else math.inf
        return trial["steps"], last if math.isfinite(last) else math.inf

    trials: list[dict[str, Any]] = []
    for options in grid:  # a trial that takes longer than the best so far is decided
        fewest = min((trial["steps"] for trial in trials), default=math.inf)
        trials.append(setting.run(make, options, TUNING_SEED, fewest))
    best = min(range(len(grid)), key=lambda k: score(trials[k]))
    runs = [setting.run(make, grid[best], seed) for seed in range(SEEDS)]
    middle = sorted(runs, key=lambda run: run["steps"])[SEEDS // 2]
    return {
        "options": grid[best],
        "steps": statistics.median(run["steps"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "reached": sum(math.isfinite(run["steps"]) for run in runs),
        "counts": {key: value for key, value in middle["counts"].items() if value},
        "runs": [
            {"steps": run["steps"], "seconds": run["seconds"], "curve": setting.kept(run["curve"])}
            for run in runs
        ],
    }


def clean(value: Any) -> Any:
    """Replace infinities, which JSON has no word for, by ``None``; shorten numbers."""
    if isinstance(value, Mapping):
        return {key: clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def main() -> None:
    """Run the race and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="names of rules")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    family = [n for n, s in SPECS.items() if s.family == "second_order" and s.kind == "optimizer"]
    missing = set(family) - set(GRIDS) - set(FULL_GRIDS)
    if missing:
        raise LookupError(f"no grid for {sorted(missing)}; add six settings to GRIDS.")
    settings = [
        Setting("full batch, 64-16-10", 3e-3, 400, 2),
        Setting("mini-batch, digits-mlp", 0.02, 400, 5),
        Setting("mini-batch, digits-cnn", 0.05, 300, 5),
    ]
    results: dict[str, Any] = {}
    for setting in settings:
        rows: dict[str, Any] = {}
        print(f"\n{setting.name}, to a training loss of {setting.target:g}\n")
        print("| rule | reached | steps | seconds | setting | evaluations |\n" + "| --- " * 6 + "|")
        for name in [*BASELINES, *family]:
            if arguments.only and name not in arguments.only:
                continue
            if not setting.full and (name not in GRIDS or name == "torch.optim.LBFGS"):
                continue  # for the whole data alone
            row = rows[name] = race(setting, name)
            if name == "torch.optim.AdamW":
                setting.seconds = PATIENCE * row["seconds"]
            print(
                f"| {name} | {row['reached']}/{SEEDS} | {row['steps']:g} | {row['seconds']:.2f} "
                f"| {row['options']} | {row['counts']} |",
                flush=True,
            )
        results[setting.name] = {"target": setting.target, "rows": rows}
    what = (
        "steps and processor seconds to a training loss, medians over five seeds at the best of "
        "six settings; null: not reached in most runs"
    )
    write(arguments.out, {"what": what, **environment(), "results": clean(results)})


if __name__ == "__main__":
    main()
