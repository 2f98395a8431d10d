"""Files of the harness: results and checkpoints, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimizers import __version__
from optimizers.testing.report import RunResult

__all__ = ["finished", "plain", "read_checkpoint", "versions", "write"]


def read_checkpoint(path: Path | None, result: RunResult) -> dict[str, Any] | None:
    """Return the stored state of a run in progress; refuse one of another experiment."""
    if path is None or not path.exists():
        return None
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    mine = json.loads(json.dumps(result.identity()))
    theirs = json.loads(saved["identity"])
    differing = [key for key in mine if mine[key] != theirs.get(key)]
    if differing:
        raise ValueError(
            f"checkpoint `{path}` belongs to another experiment: its {', '.join(differing)} "
            "differ; delete it or choose another file."
        )
    return saved


def finished(file: Path | None, plan: RunResult) -> RunResult | None:
    """Return the stored run if it is finished and of equal settings."""
    if file is None or not file.exists():
        return None
    try:
        stored = RunResult.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError):
        return None
    equal = stored.identity() == json.loads(json.dumps(plan.identity()))
    return stored if equal and stored.status != "failed" else None


def write(path: Path, fill: Callable[[Any], Any]) -> None:
    """Write a file as a whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            fill(stream)
        # mkstemp makes files for the owner alone; results are as readable as any other file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """Return a JSON value that tells one option from another."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor):
        return value.tolist()
    # The default `repr` of a function holds its address, which changes from run to run.
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return repr(value)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "optimizers": __version__,
    }
