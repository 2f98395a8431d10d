"""The command line: list, show, tasks, compare, check and demo."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from optimizers.board import Board, console, plain_table, told_once
from optimizers.registry import Spec, get_spec, list_optimizers
from optimizers.testing.harness import load_object
from optimizers.testing.tasks import TASKS

app = typer.Typer(
    help="Look at, compare and check the optimizers of the zoo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _split(texts: Sequence[str]) -> list[str]:
    """Split repeated and comma-separated arguments; keep the order, drop repetitions."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def _assignment(text: str) -> tuple[str, Any]:
    """Read ``key=value``; a value that is no Python literal is a string."""
    key, equals, value = text.partition("=")
    if not (equals and key):
        raise ValueError(f"write key=value; got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


# -- list, show, tasks -------------------------------------------------------------------------


@app.command("list")
def list_command(
    family: Annotated[Optional[str], typer.Option(help="Only this family.")] = None,  # noqa: UP045
) -> None:
    """List the optimizers: what each needs, how much it sees, what it keeps, where it is from."""
    with told_once():
        names = list_optimizers(family)
    table = plain_table()
    for column in ("name", "kind", "family", "needs", "scope"):
        table.add_column(column, no_wrap=True)
    table.add_column("state floats")
    for name in names:
        spec = get_spec(name)
        table.add_row(
            name,
            spec.kind,
            spec.family,
            _flags(spec),
            spec.scope.name.lower(),
            escape(spec.state_floats),
        )
    out = console()
    out.print(table)
    # Below the table, where a reference has the whole line to itself.
    for name in names:
        out.print(f"{name}: {escape(get_spec(name).reference)}", soft_wrap=True, highlight=False)


@app.command("tasks")
def tasks_command() -> None:
    """List the tasks on which optimizers can be compared."""
    table = plain_table()
    for column in ("name", "steps", "batch", "gradient"):
        table.add_column(column, no_wrap=True)
    table.add_column("description")
    for task in TASKS.values():
        gradient = "yes" if task.differentiable else "no"
        table.add_row(
            task.name, str(task.steps), str(task.batch_size), gradient, escape(task.description)
        )
    console().print(table)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="Name of an optimizer.")],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="module:callable that returns the model whose state is measured."),
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="Parameter shapes whose state is measured, without --model.")
    ] = "128x64,128",
) -> None:
    """Show an optimizer's rule, reference, defaults, evidence and the memory of its state."""
    with told_once():
        spec = get_spec(name)
        network = _model(model) if model else _shaped(shapes)
        optimizer = spec.build(network, **spec.example)
    out = console()
    out.print(f"[bold]{spec.name}[/]  ({spec.kind}, {spec.family})")
    out.print(escape(spec.reference), soft_wrap=True)
    out.print(f"needs {_flags(spec)}, scope {spec.scope.name}\n")
    out.print(inspect.getdoc(spec.cls) or "", markup=False, highlight=False, soft_wrap=True)
    out.print()
    out.print(_arguments(spec))
    _pairs(out, "evidence", spec.evidence)
    _pairs(out, "declared exceptions", spec.exceptions)
    elements = sum(p.numel() for p in network.parameters())
    held = _tensor_bytes(optimizer.state_dict())
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    out.print(
        f"[bold]state[/]: {held:,} bytes for {elements:,} parameters of {weights:,} bytes "
        f"({held / max(weights, 1):.2f} times the weights; declared: "
        f"{escape(spec.state_floats)} floats per parameter)",
        soft_wrap=True,
    )


def _flags(spec: Spec) -> str:
    return (spec.needs.name or "none").replace("|", ", ").lower()


def _arguments(spec: Spec) -> Table:
    """Return a table of the constructor's arguments with defaults and ranges."""
    ranges: Mapping[str, str] = getattr(spec.cls, "ranges", {})
    table = plain_table()
    for column in ("argument", "default", "range"):
        table.add_column(column)
    for argument in inspect.signature(spec.cls).parameters.values():
        default = "required" if argument.default is argument.empty else repr(argument.default)
        table.add_row(argument.name, escape(default), escape(ranges.get(argument.name, "")))
    return table


def _pairs(out: Console, title: str, pairs: Mapping[str, str]) -> None:
    if pairs:
        out.print(f"[bold]{title}[/]")
        for key, value in pairs.items():
            out.print(f"  {escape(key)}: {escape(value)}", soft_wrap=True)


def _model(path: str) -> nn.Module:
    made = load_object(path)
    made = made if isinstance(made, nn.Module) else made()
    if not isinstance(made, nn.Module):
        raise TypeError(f"{path!r} must return a torch.nn.Module; got {type(made).__name__}.")
    return made


class _Nothing(nn.Linear):
    """A layer without parameters in the place of the head, where wrappers expect one."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        self.register_parameter("weight", None)


def _shaped(shapes: str) -> nn.Module:
    """Return a model of hidden layers whose parameters are ones of the given shapes."""
    try:
        sizes = [tuple(int(side) for side in text.split("x")) for text in shapes.split(",")]
    except ValueError:
        sizes = []
    if any(side < 1 for size in sizes for side in size) or not sizes:
        raise ValueError(f"write shapes as 128x64,128 with positive sides; got {shapes!r}.")
    if any(len(size) > 5 for size in sizes):
        raise ValueError(f"shapes have at most five dimensions; got {shapes!r}.")
    # Modules rather than bare parameters: what a rule does with a matrix depends on its owner.
    with torch.device("meta"):
        layers = [_layer(size) for size in sizes]
    model = nn.Sequential(*layers, _Nothing()).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


def _layer(size: Sequence[int]) -> nn.Module:
    if len(size) == 1:
        return nn.LayerNorm(size, bias=False)
    if len(size) == 2:
        return nn.Linear(size[1], size[0], bias=False)
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 3]
    layer: nn.Module = convolution(size[1], size[0], tuple(size[2:]), bias=False)
    return layer


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(_tensor_bytes(entry) for entry in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(_tensor_bytes(entry) for entry in tree)
    return 0


# -- compare, demo -----------------------------------------------------------------------------

_Out = Annotated[Path, typer.Option(help="Folder of the results, the plot and the checkpoints.")]
_Resume = Annotated[bool, typer.Option(help="Take over finished runs with equal settings.")]
_Threads = Annotated[int, typer.Option(min=1, help="Torch threads; small models want one.")]


@app.command("compare")
def compare_command(
    task: Annotated[list[str], typer.Option(help="Task; repeat, or separate by commas.")],
    optimizers: Annotated[
        list[str], typer.Option(help="Names or module:Class; repeat, or separate by commas.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Steps; the task's by default."),
    ] = None,
    budget_seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds in the optimizer after which a run ends."),
    ] = None,
    option: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="OPTIMIZER.key=value; replaces the tuned arguments of that optimizer. Repeat."
        ),
    ] = None,
    schedule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the learning rate: cosine or constant; the task's by default."),
    ] = None,
    out: _Out = Path("runs"),
    resume: _Resume = True,
    threads: _Threads = 1,
) -> None:
    """Compare optimizers on tasks: a table with 95 % intervals, a plot, and JSON for each run."""
    torch.set_num_threads(threads)
    options: dict[str, dict[str, Any]] = {}
    with told_once():
        names, labels = _split(task), _split(optimizers)
        for text in option or ():
            key, value = _assignment(text)
            label, dot, argument = key.rpartition(".")
            if not dot:
                raise ValueError(f"write OPTIMIZER.key=value; got {text!r}.")
            options.setdefault(label, {})[argument] = value
    with Board() as board, told_once():
        board.compare(
            names,
            labels,
            seeds,
            steps=steps,
            budget_seconds=budget_seconds,
            options=options,
            schedule=schedule,
            out_dir=out,
            resume=resume,
        )
    board.close(out / "compare.png")


@app.command("demo")
def demo_command(
    out: _Out = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Steps; each task's by default."),
    ] = None,
    resume: _Resume = True,
    threads: _Threads = 1,
) -> None:
    """Compare the five optimizers on real data, within four minutes on a laptop."""
    torch.set_num_threads(threads)
    with Board() as board, told_once():
        for task, names in _DEMO.items():
            board.compare([task], names, seeds, steps=steps, out_dir=out, resume=resume)
    board.close(out / "demo.png", [("digits-mlp", "steps"), ("staircase", "evaluations")])


_DEMO: Mapping[str, Sequence[str]] = {
    "digits-mlp": ("torch.optim:AdamW", "Muon", "DropMuon", "EGN", "AMSGrad"),
    # AdamW as the reference: it trains the last layer alone, the first gets no gradient.
    "staircase": ("PolyStep", "torch.optim:AdamW"),
}


@app.command("check")
def check_command(
    optimizer: Annotated[str, typer.Argument(help="module:Class, or a name of the zoo.")],
    kwarg: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="key=value for the constructor. Repeat."),
    ] = None,
    fast: Annotated[
        bool, typer.Option(help="Leave out the checks that compile or start processes.")
    ] = False,
) -> None:
    """Check any torch optimizer for conformance; exit with 1 if an undeclared check fails."""
    with told_once():
        kwargs = dict(_assignment(text) for text in kwarg or ())
        # By its name an optimizer of the zoo brings its example arguments and declared exceptions.
        subject = load_object(optimizer) if ":" in optimizer else get_spec(optimizer).name

    from optimizers.testing import checks

    out = console()
    with out.status("checking") as status, told_once():
        report = checks.check_optimizer(
            subject,
            expensive=not fast,
            progress=lambda result: status.update(f"{result.name}: {result.status}"),
            **kwargs,
        )
    table = plain_table()
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("why", overflow="fold")
    colours = {"pass": "green", "fail": "red", "declared": "yellow"}
    for result in report.results:
        colour = colours.get(result.status, "dim")
        table.add_row(escape(result.name), f"[{colour}]{result.status}[/]", escape(result.why))
    out.print(table)
    out.print(escape(report.summary), soft_wrap=True, highlight=False)
    if not report.ok:
        raise typer.Exit(1)
