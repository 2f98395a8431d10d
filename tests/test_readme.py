"""Every snippet of the README and of CONTRIBUTING runs, and the generated parts are fresh."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from optimizers.registry import SPECS, markdown_table
from optimizers.testing.checks import CHECKS
from optimizers.testing.report import aggregate, load_results

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def demo_table():
    """Return the demo's part of the README, from the committed results of a real run."""
    results = load_results(ROOT / "docs" / "demo")
    lines = [
        "| task | optimizer | validation loss | accuracy (%) | seconds in the optimizer |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in aggregate(results):
        loss, accuracy = row.metrics["val_loss"], row.metrics["val_accuracy"]
        lines.append(
            f"| {row.task} | `{row.optimizer}` | {loss.mean:.3f} ± {loss.half:.3f} "
            f"| {100 * accuracy.mean:.1f} ± {100 * accuracy.half:.1f} "
            f"| {row.metrics['seconds'].mean:.1f} |"
        )
    first = results[0]
    forwards = next(r.counts["loss"] for r in results if r.optimizer == "PolyStep")
    versions, machine = first.versions, first.platform
    return (
        "![validation loss of the demo's optimizers](docs/demo/demo.png)\n\n"
        + "\n".join(lines)
        + f"\n\nMean over {len({r.seed for r in results})} seeds ± 95 % t-interval; "
        f"torch {versions['torch']}, {machine['machine']}, {machine['threads']} thread. The digits "
        "network is small: fewer steps to a loss are not fewer seconds here. On `staircase` the "
        "first layer has no gradient, so AdamW trains the last layer alone; PolyStep spends "
        f"{forwards:,} forward passes on it."
    )


def cost_table():
    """Return the README's table of step costs, from the committed measurement."""
    report = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    lines = ["| tensors | optimizer | time, as a ratio |", "| --- | --- | --- |"]
    for shapes, rows in report["results"].items():
        lines += [f"| {shapes} | `{name}` | {row['ratio']:.2f} |" for name, row in rows.items()]
    return (
        "\n".join(lines)
        + f"\n\nOne step, relative to the first row of each block in the same run (medians over "
        f"rounds; torch {report['torch']}, {report['threads']} CPU threads, "
        f"{report['machine']}). Regenerate with "
        "`python benchmarks/step_cost.py --out benchmarks/results/step_cost.json`."
    )


def muon_table():
    """Return the README's table of Muon's steps beside the peers, from the measurement."""
    report = json.loads((ROOT / "benchmarks" / "results" / "muon_step.json").read_text())
    lines = [
        "| matrices | optimizer | time, as a ratio | distance to the polar factor |",
        "| --- | --- | --- | --- |",
    ]
    for shapes, rows in report["results"].items():
        for name, row in rows.items():
            distance = row.get("distance_to_polar_factor")
            cell = "" if distance is None else f"{distance:.2f}"
            lines.append(f"| {shapes} | {name} | {row['ratio']:.2f} | {cell} |")
    peers = ", ".join(f"{name} {version}" for name, version in report["peers"].items())
    return (
        "\n".join(lines)
        + f"\n\nOne step on random gradients, relative to torch's in the same run (medians over "
        f"rounds; torch {report['torch']}, {peers}; {report['threads']} threads of "
        f"{report['cpu']}). Distances are relative, at the best length of the step. Regenerate "
        "with `python benchmarks/muon_step.py --out benchmarks/results/muon_step.json`."
    )


def second_order_page():
    """Return docs/second_order.md as the committed measurements make it."""
    path = ROOT / "benchmarks" / "second_order_page.py"
    spec = importlib.util.spec_from_file_location("second_order_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def part(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.S).group(1).strip()


@pytest.mark.filterwarnings("ignore:the model has no hidden matrix")
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_snippets_run(name, capsys):
    namespace = {}
    found = blocks((ROOT / name).read_text(), "python")
    assert found
    for block in found:
        exec(compile(block, name, "exec"), namespace)  # in order, as a reader would


def test_commands_are_real():
    commands = [
        line.partition("#")[0].strip()
        for text in (README, CONTRIBUTING)
        for block in blocks(text, "console")
        for line in block.splitlines()
    ]
    assert {c.split()[0] for c in commands} <= {"pip", "make", "python"}
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":  # a dry run: the commands themselves run the tests
            subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
        if words[0] == "pip":
            assert words[2].startswith("optimizer-zoo")
            assert 'name = "optimizer-zoo"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "command",
    [c for b in blocks(README, "console") for c in b.splitlines() if c.startswith("python")],
)
def test_command_line_snippets_run(command):
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    # `check` ends with 1 when a check fails, which torch's optimizers do.
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_is_the_registry():
    assert part("table") == markdown_table(), "run: python tests/test_readme.py"


def test_the_demo_is_the_committed_run():
    assert part("demo") == demo_table(), "run: python tests/test_readme.py"


def test_the_costs_are_the_committed_measurement():
    assert part("cost") == cost_table(), "run: python tests/test_readme.py"


def test_the_muon_table_is_the_committed_measurement():
    assert part("muon") == muon_table(), "run: python tests/test_readme.py"


def test_the_second_order_page_is_the_committed_measurements():
    page = (ROOT / "docs" / "second_order.md").read_text()
    assert page == second_order_page(), "run: python tests/test_readme.py"


def test_the_conformance_table_knows_every_check_and_optimizer():
    text = (ROOT / "docs" / "conformance.md").read_text()
    assert set(re.findall(r"^\| \*\*(\w+)\*\*", text, re.M)) == set(CHECKS)
    for name, spec in SPECS.items():
        assert f"`{name}`" in text or spec.kind != "optimizer"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    fresh = README
    for name, text in (
        ("table", markdown_table()),
        ("demo", demo_table()),
        ("cost", cost_table()),
        ("muon", muon_table()),
    ):
        fresh = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, text=text: f"{m.group(1)}\n{text}\n\n{m.group(2)}",
            fresh,
            flags=re.S,
        )
    (ROOT / "README.md").write_text(fresh)
    (ROOT / "docs" / "second_order.md").write_text(second_order_page())
