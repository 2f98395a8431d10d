"""The page docs/second_order.md, from the committed measurements of the second-order family.

python benchmarks/second_order_page.py --out docs/second_order.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """Return a committed measurement."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(report: Mapping[str, Any]) -> str:
    """Return versions and hardware in words."""
    peers = "".join(f", {name} {version}" for name, version in report["peers"].items())
    return (
        f"torch {report['torch']}{peers}; {report['threads']} thread(s) of {report['cpu']}, "
        f"Python {report['python']}"
    )


def shares(value: float | None, base: float) -> str:
    """Return a ratio, or a dash."""
    return "-" if value is None else f"{value / base:.2f}"


def target_table() -> str:
    """Return steps and seconds to a loss over AdamW's."""
    report = load("to_target")
    settings = report["results"]
    names = list(next(iter(settings.values()))["rows"])
    rows = []
    for name in names:
        cells = [f"`{name}`"]
        for result in settings.values():
            row, base = result["rows"].get(name), result["rows"]["torch.optim.AdamW"]
            if row is None:
                cells += ["", ""]
                continue
            steps, seconds = (shares(row[key], base[key]) for key in ("steps", "seconds"))
            missed = "" if row["reached"] == 5 else f" ({row['reached']}/5)"
            cells += [steps + missed, seconds]
        rows.append(cells)
    head = ["rule"]
    for setting, result in settings.items():
        head += [f"{setting}, to {result['target']:g}: steps", "seconds"]
    return table(head, rows) + (
        "\n\nOver AdamW's, medians over five seeds at the best of six settings for every rule; "
        "(k/5): only k seeds reached the loss within the limit of steps and 40 times AdamW's "
        f"seconds. {where(report)}; seconds are processor time of objective and step. Regenerate "
        "with `python benchmarks/to_target.py --out benchmarks/results/to_target.json`."
    )


def products() -> str:
    """Return the costs of Hessian and Gauss-Newton products."""
    report = load("curvature_products")
    rows = [
        (name, f"{r['Hessian product']['ratio']:.2f}", f"{r['Gauss-Newton product']['ratio']:.2f}")
        for name, r in report["results"].items()
    ]
    return table(("network", "Hessian product", "Gauss-Newton product"), rows) + (
        f"\n\nIn gradients of the same batch of 128. {where(report)}."
    )


def egn() -> str:
    """Return the cost of EGN's step."""
    report = load("egn_step")
    rows = [
        (network, name, f"{row['gradients']:.1f}", f"{row['megabytes_over_a_gradient']:.0f}")
        for network, candidates in report["results"].items()
        for name, row in candidates.items()
        if name != "ten gradients"
    ]
    return table(("network", "step", "gradients", "MB over a gradient"), rows) + (
        f"\n\nWhole steps in gradients of the same batch of 128. {where(report)}."
    )


def mfac() -> str:
    """Return the cost of MFAC's step."""
    report = load("mfac")
    rows = [
        (name, f"{r['step']['milliseconds']:.2f}", f"{r['step']['ratio']:.2f}")
        for name, r in report["results"].items()
    ]
    return table(("window of 100 000 parameters", "ms a step", "over two passes"), rows) + (
        f"\n\nOver the time of two products with a window of the same size and dtype, the least "
        f"that a step reads. {where(report)}."
    )


def kronecker() -> str:
    """Return the costs of SOAP and Shampoo beside the peers."""
    report = load("kronecker_step")
    rows = [
        (shapes, name, f"{row['ratio']:.2f}", f"{row['milliseconds']:.0f}")
        for shapes, candidates in report["results"].items()
        for name, row in candidates.items()
    ]
    return table(("tensors", "rule", "time, as a ratio", "ms"), rows) + (
        "\n\nTen steps with one refresh of every factor, relative to the first row of each block "
        f"in the same run (medians over rounds). {where(report)}."
    )


def decays() -> str:
    """Return what hypergradients tune."""
    report = load("hypergradient")
    keys = ("validation_loss", "test_loss")
    rows = [
        (
            name,
            *(f"{row[key]:.3f}" for key in keys),
            f"{100 * row['test_accuracy']:.2f}",
        )
        for name, row in report["mean"].items()
    ]
    head = ("decays", "validation loss", "test loss", "test accuracy (%)")
    return table(head, rows) + (
        "\n\nSoftmax regression on 300 digits with all products of two pixels: 21 440 weights, "
        "their decays tuned on 300 other digits by 200 outer steps, every model trained anew to "
        "its optimum, judged on 1197 digits; means over five splits. `searched` is the best of "
        "eleven decays, `one`, `feature` and `weight` learn 1, 2144 and 21 440. Few terms of the "
        "Neumann series are biased towards large decays here; twenty steps of conjugate gradients "
        "are not. Regenerate with `python benchmarks/hypergradient.py --out "
        "benchmarks/results/hypergradient.json`."
    )


def page() -> str:
    """Return the page."""
    parts = {
        "To a loss, against tuned AdamW and SGD": target_table(),
        "Products": products(),
        "EGN": egn(),
        "MFAC": mfac(),
        "SOAP and Shampoo": kronecker(),
        "Hypergradients": decays(),
    }
    title = (
        "# What the second-order family costs and gains\n\nEvery figure is a ratio measured in one "
        "run, taken from `benchmarks/results/`, including those where it loses. "
        "`notebooks/second_order.ipynb` plots convergence on convex problems and these networks."
    )
    return "\n\n".join([title, *(f"## {k}\n\n{v}" for k, v in parts.items())]) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_text(page())


if __name__ == "__main__":
    main()
