"""The house's rules that a machine can check: imports point one way, the registry is complete."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimizers
from optimizers.base import Optimizer
from optimizers.registry import FAMILIES, KINDS, SPECS, get_optimizer, get_spec, list_optimizers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "optimizers"

# Each layer may import from the layers before it (and from itself).
LAYERS = [
    {"ranges", "distributed", "exchange", "linalg", "functional", "objective", "curvature"},
    {"oracle", "checkpoint"},
    {"base"},
    {"first_order", "second_order", "orthogonalized", "forward_only", "layer_dropping"},
    {"wrappers"},
    {"trainers", "diagnostics"},
    {"spec"},
    {"entries"},
    {"registry"},
    {"__init__"},
    {"testing"},
    {"board"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
CORE = {"torch", "numpy", "optimizers"}


def place(module):
    """Return the layer's name of a dotted module inside the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(tree, top_level_only=False):
    """Yield the imported modules of a syntax tree."""
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if node.module == "optimizers" and alias.name in LEVEL else node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = dotted(path)
    tree = ast.parse(path.read_text())
    # A function-level import inside checks may look a name up in the registry, which lies lower.
    for name in imports(tree):
        if name.split(".")[0] != "optimizers":
            continue
        here, there = LEVEL[place(own)], LEVEL[place(name)]
        assert there <= here, f"{own} imports {name}, which lies above it"


def test_every_module_has_a_layer():
    found = {place(dotted(path)) for path in modules()}
    assert found <= set(LEVEL), f"say where these belong: {found - set(LEVEL)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_imports_torch_and_numpy_alone(path):
    if place(dotted(path)) in ("board", "cli", "__main__"):
        return
    tree = ast.parse(path.read_text())
    allowed = CORE | set(sys.stdlib_module_names)
    for name in imports(tree, top_level_only=True):
        assert name.split(".")[0] in allowed, f"import {name} inside the function that needs it"


def test_import_loads_no_extra():
    code = (
        "import sys, optimizers; "
        "print([m for m in ('scipy', 'sklearn', 'matplotlib', 'rich', 'typer', 'pytest') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


def test_only_distributed_knows_dtensor():
    for path in modules():
        if path.name != "distributed.py":
            names = [n for n in imports(ast.parse(path.read_text())) if "distributed.tensor" in n]
            assert not names, f"{path} imports {names}"


def test_every_public_optimizer_is_registered():
    for name in optimizers.__all__:
        value = getattr(optimizers, name)
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer:
            assert name in SPECS, f"{name} is public and not in the registry"
    for name, spec in SPECS.items():
        assert getattr(optimizers, name) is spec.cls, (
            f"{name} is not importable as optimizers.{name}"
        )


@pytest.mark.parametrize("name", list(SPECS))
def test_every_entry_is_documented(name):
    spec = SPECS[name]
    doc = inspect.getdoc(spec.cls)
    assert spec.family in FAMILIES
    assert spec.kind in KINDS
    assert spec.evidence, "an optimizer is in the zoo when it is proven"
    for section in ("Args:", "State:", "Raises:", "Reference:"):
        assert section in doc, f"{name} lacks {section}"
    parameters = set(inspect.signature(spec.cls).parameters) - {"params"}
    for parameter in parameters:
        assert re.search(rf"^    \*{{0,2}}{parameter}: ", doc, re.M), f"{name} lacks {parameter}"
    for option in getattr(spec.cls, "ranges", {}):
        if option in parameters:
            assert option in doc


@pytest.mark.parametrize("name", list(SPECS))
def test_evidence_that_names_a_test_exists(name):
    for text in SPECS[name].evidence.values():
        for file, test in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", text):
            path = ROOT / file
            assert path.exists(), f"{name}: {file} does not exist"
            if test:
                assert f"def {test}(" in path.read_text(), f"{name}: {file} has no {test}"


def test_look_up():
    assert list_optimizers() == list(SPECS)
    assert "Muon" in list_optimizers("orthogonalized")
    assert "Muon" not in list_optimizers("first_order")
    assert get_optimizer("AMSGrad") is optimizers.AMSGrad
    assert get_spec("AMSGrad").name == "AMSGrad"
    with pytest.raises(LookupError, match="did you mean 'Muon'"):
        get_optimizer("muno")
    with pytest.raises(LookupError, match="family"):
        list_optimizers("orthogonal")


def test_no_file_grows_too_long():
    for path in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= 500, (
            f"{path.relative_to(ROOT)} has {lines} lines: usually that is two files"
        )
