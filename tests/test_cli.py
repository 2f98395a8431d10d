"""The command line: what it prints, what it writes, and its exit codes."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from optimizers import __main__
from optimizers.cli import app
from optimizers.registry import SPECS, list_optimizers
from optimizers.testing.report import load_results
from optimizers.testing.tasks import TASKS

ADAMW = "torch.optim:AdamW"
SGD = "torch.optim:SGD"


@pytest.fixture
def call(monkeypatch):
    """Run a command; the terminal is wide, so that nothing wraps."""
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    torch.set_num_threads(threads)


@pytest.fixture
def user_module(monkeypatch, tmp_path):
    """A module of the user's own, importable as ``mine``."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Interrupting(torch.optim.SGD):\n"
        "    made = 0\n"
        "    def __init__(self, params, lr=0.1):\n"
        "        super().__init__(params, lr=lr)\n"
        "        Interrupting.made += 1\n"
        "        self.calls, self.last = 0, Interrupting.made > 2\n"
        "    def step(self, closure=None):\n"
        "        self.calls += 1\n"
        "        if self.last and self.calls == 3:\n"
        "            raise KeyboardInterrupt\n"
        "        return super().step(closure)\n"
        "class Failing(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        raise RuntimeError('no [solution]')\n"
        "def model():\n"
        "    return torch.nn.Linear(10, 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def test_list_names_every_optimizer_and_filters_by_family(call):
    done = call("list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in list_optimizers())
    done = call("list", "--family", "orthogonalized")
    assert "Muon" in done.stdout
    assert "AMSGrad" not in done.stdout
    done = call("list", "--family", "orthogonal")
    assert done.exit_code == 2
    assert "did you mean 'orthogonalized'" in done.stderr


def test_tasks_are_listed(call):
    done = call("tasks")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in TASKS)


@pytest.mark.parametrize("name", list_optimizers())
def test_show_tells_the_rule_and_measures_the_state(call, name):
    done = call("show", name)
    assert done.exit_code == 0, done.output
    spec = SPECS[name]
    for text in (spec.summary, spec.reference, *spec.evidence, "argument", "default", "range"):
        assert text in done.stdout
    assert "for 8,320 parameters of 33,280 bytes" in done.stdout


def test_show_measures_the_state_of_a_given_model(call, user_module):
    # AMSGrad keeps three floats per element and a step count per tensor: 4 * (3 * 33 + 2).
    done = call("show", "AMSGrad", "--model", "mine:model")
    assert "404 bytes for 33 parameters of 132 bytes" in done.stdout
    done = call("show", "AMSGrad", "--shapes", "10x3,3")
    assert "404 bytes for 33 parameters of 132 bytes" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "AMSGard"), "did you mean 'AMSGrad'"),
        (("show", "AMSGrad", "--shapes", "3xx4"), "write shapes as 128x64,128"),
        (("show", "AMSGrad", "--model", "mine:modell"), "did you mean 'model'"),
        (("show", "AMSGrad", "--model", "mine:torch.nn.ReLU.__name__.upper"), "got str"),
        (("compare", "--task", "digit-mlp", "--optimizers", SGD), "did you mean 'digits-mlp'"),
        (("compare", "--task", "staircase", "--optimizers", "Moun"), "did you mean 'Muon'"),
        (("compare", "--task", "staircase", "--optimizers", "SGD"), f"write '{SGD}'"),
        (
            ("compare", "--task", "staircase", "--optimizers", SGD, "--option", "lr=1"),
            "write OPTIMIZER.key=value",
        ),
        (
            ("compare", "--task", "staircase", "--optimizers", SGD, "--option", "AMSGrad.lr=1"),
            "not compared",
        ),
        (("check", "torch.optim:SGDD"), "did you mean 'SGD'"),
        (("check", "torch.optim:SGD", "--kwarg", "lr"), "write key=value"),
    ],
)
def test_mistakes_end_with_two_and_one_line(call, user_module, tmp_path, words, message):
    extra = ("--out", tmp_path / "runs") if words[0] == "compare" else ()
    done = call(*words, *extra)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*.json"))


def test_compare_prints_a_table_and_writes_json_and_a_plot(call, tmp_path):
    words = (
        "compare", "--task", "digits-mlp,staircase", "--optimizers", SGD, "--optimizers", ADAMW,
        "--seeds", 2, "--steps", 4, "--option", f"{SGD}.lr=0.25", "--out", tmp_path,
    )  # fmt: skip
    done = call(*words)
    assert done.exit_code == 0, done.output
    assert "±" in done.stdout
    assert done.stdout.count("2/2") == 4
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    results = load_results(tmp_path)
    assert len(results) == 8
    assert {json.dumps(r.options) for r in results if r.optimizer == SGD} == {'{"lr": 0.25}'}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert call(*words).exit_code == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}


def test_ctrl_c_prints_the_finished_runs_and_ends_with_130(call, user_module, tmp_path):
    done = call(
        "compare", "--task", "digits-mlp", "--optimizers", "mine:Interrupting", "--seeds", 3,
        "--steps", 5, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert done.exit_code == 130, done.output
    assert "1/1" in done.stdout
    assert "interrupted after 1 finished run" in done.stdout
    assert len(load_results(tmp_path / "runs")) == 1
    assert (tmp_path / "runs" / "compare.png").exists()


def test_a_failed_run_is_told_and_ends_with_one(call, user_module, tmp_path):
    done = call(
        "compare", "--task", "digits-mlp", "--optimizers", f"{SGD},mine:Failing", "--seeds", 1,
        "--steps", 5, "--option", "mine:Failing.lr=0.1", "--out", tmp_path / "runs",
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "failed: RuntimeError: no [solution]" in done.stdout
    assert "0/1" in done.stdout


def test_the_demo_draws_one_picture_of_all_five(call, tmp_path):
    done = call("demo", "--out", tmp_path, "--seeds", 1, "--steps", 2)
    assert done.exit_code == 0, done.output
    for name in ("Muon", "DropMuon", "EGN", "AMSGrad", "PolyStep", ADAMW):
        assert name in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_check_ends_with_one_where_an_undeclared_check_fails(call, monkeypatch):
    from optimizers.testing import checks

    calls = []

    def check_optimizer(optimizer, *, expensive, progress, **kwargs):
        calls.append((optimizer, expensive, kwargs))
        results = [checks.Result("resume", "pass"), checks.Result("sparse", status, "[no] rule")]
        progress(results[0])
        return checks.Report("SGD", results)

    monkeypatch.setattr(checks, "check_optimizer", check_optimizer)
    status = "declared"
    done = call("check", SGD, "--kwarg", "lr=1e-3", "--kwarg", "nesterov=False", "--fast")
    assert done.exit_code == 0, done.output
    assert "[no] rule" in done.stdout
    assert "SGD: 1 pass, 0 fail, 1 declared" in done.stdout
    assert call("check", "AMSGrad").exit_code == 0
    assert calls == [
        (torch.optim.SGD, False, {"lr": 1e-3, "nesterov": False}),
        ("AMSGrad", True, {}),
    ]
    status = "fail"
    assert call("check", SGD).exit_code == 1


def test_check_passes_a_real_optimizer_of_the_zoo(call):
    done = call("check", "AMSGrad", "--fast")
    assert done.exit_code == 0, done.output
    assert " 0 fail" in done.stdout
    assert "failed:" not in done.stdout


def test_check_says_a_wrong_value_once(call):
    done = call("check", "AMSGrad", "--kwarg", "lr=-3", "--fast")
    assert done.exit_code == 2
    assert done.output.count("lr must lie in") == 1


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_there_is_one_clear_line(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as exit_:
        __main__.main()
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert 'pip install "optimizer-zoo[harness]"' in told


def test_a_task_without_its_package_says_what_to_install(call, monkeypatch, tmp_path):
    TASKS["digits-mlp"].load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    done = call("compare", "--task", "digits-mlp", "--optimizers", SGD, "--out", tmp_path)
    assert done.exit_code == 2
    assert 'pip install "optimizer-zoo[harness]"' in done.stderr
