"""How everything here is timed: candidates take turns, and ratios are formed within a round."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import optimizers


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: int = 3,
    unit: str | None = None,
) -> dict[str, dict[str, float]]:
    """Time every candidate once a round; return medians and median ratios to ``unit``.

    A machine whose speed drifts changes all candidates of a round alike. The time of the
    processor is kept beside that of the clock: it shows when another process took part of it.
    """
    for step in candidates.values():
        for _ in range(warm):
            step()
    clock: dict[str, list[float]] = {name: [] for name in candidates}
    busy: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            start, spent = time.perf_counter(), time.process_time()
            step()
            busy[name].append(time.process_time() - spent)
            clock[name].append(time.perf_counter() - start)
    base = unit or next(iter(candidates))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "ratio": _ratio(values, clock[base]),
            "ratio_processor_time": _ratio(busy[name], busy[base]),
        }
        for name, values in clock.items()
    }


def _ratio(values: list[float], units: list[float]) -> float:
    return statistics.median(v / u for v, u in zip(values, units, strict=True))


def environment(*packages: str) -> dict[str, Any]:
    """Return versions and hardware, for the results."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    versions = {package: installed[package] for package in packages if package in installed}
    return {
        "torch": torch.__version__,
        "optimizers": optimizers.__version__,
        "peers": versions,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    """Return the processor's model and the instructions that matter for products."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return f"{fields.get('model name', '?')} ({', '.join(w for w in wanted if w in flags)})"


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the results as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return results as a Markdown table."""
    lines = [f"\n{title}\n", "| candidate | ratio | ms |", "| --- | --- | --- |"]
    lines += [f"| {n} | {r['ratio']:.2f} | {r['milliseconds']:.2f} |" for n, r in rows.items()]
    return "\n".join(lines)
