"""The contract as a table: every check on every optimizer of the zoo and on some of torch's.

python benchmarks/conformance.py --out docs/conformance.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from optimizers.registry import SPECS
from optimizers.testing.checks import CHECKS, Report, check_optimizer

MARKS = {"pass": "✓", "fail": "✗", "declared": "d", "not applicable": "·"}
PEERS = (torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon)


def reports(expensive: bool) -> list[Report]:
    """Run the checks on every optimizer, ours by name and torch's with lr=1e-2."""
    ours = [name for name, spec in SPECS.items() if spec.kind == "optimizer"]
    done = [check_optimizer(name, expensive=expensive) for name in ours]
    for cls in PEERS:
        report = check_optimizer(cls, lr=1e-2, expensive=expensive)
        report.optimizer = f"torch.optim.{cls.__name__}"
        done.append(report)
    return done


def table(done: list[Report]) -> str:
    """Return the reports side by side, with the reasons below."""
    names = [report.optimizer for report in done]
    lines = [
        "# Conformance",
        "",
        f"`✓` passes, `✗` fails, `d` declared exception, `·` does not apply. torch "
        f"{torch.__version__}. Regenerate with `python benchmarks/conformance.py --out "
        "docs/conformance.md`.",
        "",
        "| check | " + " | ".join(f"`{n}`" for n in names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    by_check = [{r.name: r for r in report.results} for report in done]
    for name, check in CHECKS.items():
        if not any(name in results for results in by_check):
            continue
        cells = " | ".join(MARKS[results[name].status] for results in by_check)
        lines.append(f"| **{name}**: {check.description} | {cells} |")
    totals = " | ".join(f"{r.count('pass')} ✓, {len(r.failures)} ✗" for r in done)
    lines += [f"| total | {totals} |", "", "## Reasons", ""]
    for report in done:
        for result in report.results:
            if result.status in ("fail", "declared"):
                lines.append(
                    f"- `{report.optimizer}`, {result.name} ({result.status}): {result.why}"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fast", action="store_true", help="leave out the expensive checks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.write_text(table(reports(not arguments.fast)))


if __name__ == "__main__":
    main()
