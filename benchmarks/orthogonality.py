"""Distance to the polar factor against time, for every back-end, shape and condition number.

python benchmarks/orthogonality.py --out benchmarks/results/orthogonality.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import environment, interleaved, write

from optimizers.linalg import polar

SHAPES = ((256, 256), (768, 768), (768, 3072), (1024, 50))
DECADES = (1, 2, 3, 4, 5, 6)


def backends() -> dict[str, dict[str, Any]]:
    """Return the arguments of :func:`polar` for each line; the first one is torch's."""
    half, full = torch.bfloat16, torch.float32
    return {
        "newton_schulz 5, bf16 (torch's)": {"method": "newton_schulz", "dtype": half},
        "newton_schulz 5, fp32": {"method": "newton_schulz", "dtype": full},
        "auto": {},
        "polar_express 5, bf16": {"method": "polar_express", "dtype": half},
        "gram 5, bf16": {"method": "gram", "dtype": half},
        "gram 5, fp32": {"method": "gram", "dtype": full},
        "gram 7, fp32": {"method": "gram", "steps": 7, "dtype": full},
        "refined, bf16 + fp32": {"method": "refined", "dtype": half},
        "auto, error 1e-3": {"error": 1e-3},
        "eigh": {"method": "eigh"},
        "svd": {"method": "svd"},
    }


def example(rows: int, columns: int, decades: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 matrix with a logarithmic spectrum, and its polar factor in float64."""
    generator = torch.Generator().manual_seed(0)
    n, m = min(rows, columns), max(rows, columns)
    draw = {"generator": generator, "dtype": torch.float64}
    U = torch.linalg.qr(torch.randn(n, n, **draw))[0]
    V = torch.linalg.qr(torch.randn(m, n, **draw))[0]
    G, O = (U * torch.logspace(0, -decades, n, dtype=torch.float64)) @ V.T, U @ V.T
    return (G.T, O.T) if rows > columns else (G, O)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw distance against time, one panel a shape, at condition number 100."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.6), sharey=True)
    for axis, (name, rows) in zip(axes, results.items(), strict=True):
        for k, (label, row) in enumerate(rows.items()):
            marker = "osd^v<>pXP*"[k]
            axis.loglog(row["ratio"], max(row["distance"]["1e2"], 1e-8), marker, label=label)
        axis.set_title(name)
        axis.set_xlabel("time / torch's")
    axes[0].set_ylabel("relative distance, condition 100")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for rows, columns in SHAPES:
        samples = {decades: example(rows, columns, decades) for decades in DECADES}
        G = samples[2][0].float().contiguous()
        steppers = {
            name: (lambda options=options, G=G: polar(G, **options))
            for name, options in backends().items()
        }
        timings: dict[str, Any] = interleaved(steppers, arguments.rounds, warm=1)
        for name, options in backends().items():
            distances = {}
            for decades, (matrix, O) in samples.items():
                X = polar(matrix.float(), **options).double()
                distances[f"1e{decades}"] = float((X - O).norm() / O.norm())
            timings[name]["distance"] = distances
        results[f"{rows} x {columns}"] = timings
        print(f"\n{rows} x {columns}\n\n| back-end | time | {' | '.join(distances)} |")
        print("| --- |" + " --- |" * (1 + len(distances)))
        for name, row in timings.items():
            cells = " | ".join(f"{d:.2g}" for d in row["distance"].values())
            print(f"| {name} | {row['ratio']:.2f} | {cells} |")
    write(
        arguments.out,
        {
            "what": "time relative to torch's loop, and relative Frobenius distance to the polar "
            "factor by condition number (logarithmic spectra)",
            **environment(),
            "results": results,
        },
    )
    if arguments.out is not None:
        plot(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
