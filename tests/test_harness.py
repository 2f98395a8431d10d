"""The harness: one loop, exact resumption, nothing lost, honest averages."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from optimizers.registry import list_optimizers
from optimizers.testing.harness import compare, resolve_optimizer, run
from optimizers.testing.report import (
    Interval,
    RunResult,
    aggregate,
    interval,
    load_results,
    plot,
)
from optimizers.testing.tasks import TASKS

ADAMW = "torch.optim:AdamW"
SGD = "torch.optim:SGD"
SHORT = {"steps": 8, "eval_every": 3}


def timeless(result):
    """Everything of a run that must be reproduced: all but its clocks."""
    final = {key: value for key, value in result.final.items() if key != "seconds"}
    return repr(([p._replace(seconds=0) for p in result.curve], final, result.counts))


class Interrupt:
    """A callback that presses Ctrl-C when a condition on the event first holds."""

    def __init__(self, when):
        self.when = when

    def __call__(self, event):
        if self.when(event):
            raise KeyboardInterrupt


def stored(folder):
    return sorted(path.name for path in folder.glob("*.json"))


# -- one run -----------------------------------------------------------------------------------


def test_a_run_learns_counts_and_repeats_itself():
    result = run("digits-mlp", ADAMW, steps=60, eval_every=25)
    assert result.status == "ok"
    assert [point.step for point in result.curve] == [0, 25, 50, 60]
    assert result.curve[0].val_loss > 2 > 1 > result.final["val_loss"]
    assert math.isnan(result.curve[0].train_loss)
    assert result.final["val_accuracy"] > 0.8
    assert result.options == TASKS["digits-mlp"].recommended[ADAMW]
    assert (result.counts["gradient"], result.counts["loss"]) == (60, 0)
    assert [point.gradient_evals for point in result.curve] == [0, 25, 50, 60]
    seconds = [point.seconds for point in result.curve]
    assert seconds == sorted(seconds)
    assert result.final["seconds"] == seconds[-1] > 0
    assert set(result.versions) == {"python", "torch", "numpy", "optimizers"}
    assert result.platform["threads"] == torch.get_num_threads()
    assert timeless(run("digits-mlp", ADAMW, steps=60, eval_every=25)) == timeless(result)
    assert timeless(run("digits-mlp", ADAMW, seed=1, steps=60, eval_every=25)) != timeless(result)


def test_the_loop_equals_one_written_by_hand():
    task = TASKS["digits-mlp"]
    model = task.build_model(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _, (inputs, targets) in zip(range(8), task.batches(2), strict=False):
        optimizer.zero_grad()
        task.loss_fn(model(inputs), targets).backward()
        optimizer.step()
    result = run(task, SGD, seed=2, options={"lr": 0.1}, schedule="constant", **SHORT)
    assert result.final["val_loss"] == task.evaluate(model)["loss"]


def test_evaluations_inside_a_step_are_counted():
    result = run("digits-mlp", "torch.optim:LBFGS", options={"max_iter": 4, "max_eval": 9}, **SHORT)
    assert result.status == "ok"
    assert result.counts["gradient"] > 8


def test_the_schedule_warms_up_decays_and_serves_tensor_rates():
    rates = []

    def recording(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
        step = optimizer.step

        def spy(closure):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            return step(closure)

        optimizer.step = spy
        return optimizer

    assert run("digits-mlp", recording, steps=40, eval_every=40).status == "ok"
    rates = rates[-40:]  # what comes before is the throw-away step
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.005
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        run("digits-mlp", ADAMW, schedule="linear")


def test_weights_to_deploy_are_the_ones_evaluated():
    class Averaging(torch.optim.SGD):
        @contextlib.contextmanager
        def eval_params(self):
            kept = [p.detach().clone() for p in self.param_groups[0]["params"]]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.zero_()
            yield
            with torch.no_grad():
                for p, old in zip(self.param_groups[0]["params"], kept, strict=True):
                    p.copy_(old)

    def averaging(model):
        return Averaging(model.parameters(), lr=0.1)

    result = run("digits-mlp", averaging, **SHORT)
    assert result.final["val_loss"] == pytest.approx(math.log(10), rel=1e-6)
    assert result.final["train_loss"] != pytest.approx(math.log(10), rel=1e-3)


def test_a_budget_ends_a_run_early():
    result = run("digits-mlp", ADAMW, steps=1000, budget_seconds=1e-9)
    assert (result.status, result.final["steps"]) == ("ok", 1)
    assert math.isfinite(result.final["val_loss"])


def test_divergence_is_recorded():
    result = run("digits-mlp", SGD, options={"lr": 1e30}, schedule="constant", **SHORT)
    assert result.status == "diverged"
    assert "step" in result.message
    assert 0 < result.final["steps"] < 8
    again = RunResult.from_json(result.to_json())
    assert again.status == "diverged"


def test_an_exception_is_recorded_with_its_message_and_an_interrupt_is_not():
    def failing_at(step, error):
        def optimizer(model):
            made = torch.optim.SGD(model.parameters(), lr=0.1)
            count = 0

            def step_(closure):
                nonlocal count
                count += 1
                if count > step:
                    raise error
                return torch.optim.SGD.step(made, closure)

            made.step = step_
            return made

        return optimizer

    result = run("digits-mlp", failing_at(4, RuntimeError("no solution")), **SHORT)
    assert (result.status, result.message) == ("failed", "RuntimeError: no solution")
    assert result.final["steps"] == 4
    refused = run("digits-mlp", ADAMW, options={"no_such": 1}, **SHORT)
    assert refused.status == "failed"
    assert "no_such" in refused.message
    with pytest.raises(KeyboardInterrupt):
        run("digits-mlp", failing_at(4, KeyboardInterrupt()), **SHORT)


def test_an_exception_of_the_callback_is_the_callers_own():
    def callback(event):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run("digits-mlp", ADAMW, callback=callback, **SHORT)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "`steps` and `eval_every` must be at least 1; got 0"),
        ({"eval_every": 0}, "must be at least 1"),
        ({"budget_seconds": math.nan}, "`budget_seconds` must be positive; got nan"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        run("digits-mlp", ADAMW, **setting)


# -- JSON and resumption -----------------------------------------------------------------------


def test_json_is_strict_and_brings_everything_back():
    result = run("digits-mlp", SGD, options={"lr": 0.1, "momentum": 0.9}, **SHORT)

    def refuse(constant):
        raise AssertionError(constant)

    fields = json.loads(result.to_json(), parse_constant=refuse)
    assert fields["curve"]["columns"] == [
        "step", "seconds", "loss_evals", "gradient_evals", "train_loss", "val_loss", "val_accuracy"
    ]  # fmt: skip
    assert fields["curve"]["rows"][0][4] is None
    again = RunResult.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert repr(again.curve) == repr(result.curve)
    for text in ("[]", "{}", "nothing"):
        with pytest.raises(ValueError):
            RunResult.from_json(text)


@pytest.mark.parametrize("name", [ADAMW, *list_optimizers()])
def test_an_interrupted_run_continues_bit_by_bit(name, tmp_path):
    task = "digits-mlp" if name in TASKS["digits-mlp"].recommended else "staircase"
    checkpoint = tmp_path / "run.ckpt"
    settings = {"steps": 9, "eval_every": 3, "seed": 4}
    whole = run(task, name, **settings)
    assert whole.status == "ok", whole.message
    with pytest.raises(KeyboardInterrupt):
        run(
            task,
            name,
            checkpoint=checkpoint,
            callback=Interrupt(lambda event: event.step == 5),
            **settings,
        )
    assert checkpoint.exists()
    seen = []
    resumed = run(task, name, checkpoint=checkpoint, callback=seen.append, **settings)
    assert seen[0].step == 3
    assert timeless(resumed) == timeless(whole)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path):
    checkpoint = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        run(
            "digits-mlp",
            ADAMW,
            checkpoint=checkpoint,
            callback=Interrupt(lambda event: event.step == 5),
            **SHORT,
        )
    with pytest.raises(ValueError, match="another experiment: its options differ"):
        run("digits-mlp", ADAMW, options={"lr": 0.5}, checkpoint=checkpoint, **SHORT)


# -- many runs ---------------------------------------------------------------------------------


def test_ctrl_c_keeps_finished_runs_and_the_next_call_takes_them_over(tmp_path):
    grid = {"tasks": ["digits-mlp"], "optimizers": [ADAMW, SGD], "seeds": 2, **SHORT}
    whole = compare(**grid)
    with pytest.raises(KeyboardInterrupt):
        compare(
            **grid,
            out_dir=tmp_path,
            progress=Interrupt(lambda event: event.index == 2 and event.step == 5),
        )
    assert len(stored(tmp_path)) == 2
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    assert [result.optimizer for result in load_results(tmp_path)] == [ADAMW, SGD]

    events = []
    resumed = compare(**grid, out_dir=tmp_path, progress=events.append)
    finished = [event for event in events if event.result is not None]
    assert [event.skipped for event in finished] == [True, True, False, False]
    assert [event.index for event in finished] == [0, 1, 2, 3]
    assert min(event.step for event in events if event.index == 2) == 3
    assert list(map(timeless, resumed)) == list(map(timeless, whole))
    assert len(list(tmp_path.iterdir())) == len(stored(tmp_path)) == 4


def test_only_runs_with_equal_settings_are_taken_over(tmp_path):
    def skipped(**settings):
        events = []
        compare(
            ["digits-mlp"], [SGD], 1, out_dir=tmp_path, progress=events.append,
            **{**SHORT, **settings},
        )  # fmt: skip
        return [event.skipped for event in events if event.result is not None] == [True]

    assert not skipped()
    assert skipped()
    assert not skipped(steps=9)
    assert not skipped(options={SGD: {"lr": 0.3}})
    assert not skipped(resume=False)
    assert len(stored(tmp_path)) == 3
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:100])
    assert not skipped()
    assert skipped()


def test_failed_runs_are_repeated(tmp_path):
    broken = True

    def moody(model):
        if broken:
            raise RuntimeError("not today")
        return torch.optim.SGD(model.parameters(), lr=0.1)

    (first,) = compare(["digits-mlp"], [moody], 1, out_dir=tmp_path, **SHORT)
    broken = False
    (second,) = compare(["digits-mlp"], [moody], 1, out_dir=tmp_path, **SHORT)
    assert (first.status, second.status) == ("failed", "ok")


def test_names_are_checked_before_the_first_run():
    with pytest.raises(LookupError, match="did you mean 'staircase'"):
        compare(["stair-case"], [ADAMW])
    with pytest.raises(LookupError, match="did you mean 'AMSGrad'"):
        compare(["digits-mlp"], [ADAMW, "AMSgrd"])
    with pytest.raises(LookupError, match=r"'torch\.optim:AdamW'"):
        resolve_optimizer("AdamW")
    with pytest.raises(LookupError, match="did you mean 'AdamW'"):
        resolve_optimizer("torch.optim:AdamWW")
    with pytest.raises(LookupError, match=r"cannot import 'torch\.optimm'"):
        resolve_optimizer("torch.optimm:AdamW")
    with pytest.raises(ValueError, match="distinct labels"):
        compare(["digits-mlp"], [ADAMW, ADAMW])
    with pytest.raises(ValueError, match="not compared"):
        compare(["digits-mlp"], [ADAMW], options={SGD: {}})
    with pytest.raises(ValueError, match="must not be empty"):
        compare(["digits-mlp"], [ADAMW], seeds=0)


# -- averages and plots ------------------------------------------------------------------------


def test_the_interval_is_students():
    values = [0.31, 0.27, 0.44, 0.29]
    mean, half, n = interval(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected, rel=1e-12)
    assert n == 4
    # By hand: two values, t = 12.7062, standard error |a - b| / 2.
    assert interval([1.0, 3.0]).half == pytest.approx(12.7062047, rel=1e-8)
    assert interval([2.0])[::2] == (2.0, 1)
    assert math.isnan(interval([2.0]).half)
    assert interval([])[2] == 0
    assert interval(values, 0.5).half < half
    with pytest.raises(ValueError, match="`confidence` must lie in"):
        interval(values, 1.0)


def test_averages_count_but_never_include_diverged_runs():
    results = compare(["digits-mlp"], [ADAMW, SGD], 2, **SHORT)
    results[0].status = "diverged"
    results[0].final["val_loss"] = math.nan
    adamw, sgd = aggregate(results)
    assert adamw.runs == {"ok": 1, "diverged": 1, "failed": 0}
    assert adamw.metrics["val_loss"].mean == results[2].final["val_loss"]
    assert sgd.metrics["val_loss"] == interval([results[i].final["val_loss"] for i in (1, 3)])
    assert sgd.metrics["gradient_evals"] == Interval(8.0, 0.0, 2)


def test_equal_optimizers_with_different_options_are_told_apart():
    results = [
        run("digits-mlp", SGD, seed=seed, options={"lr": lr, "momentum": 0.5}, **SHORT)
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    assert [row.optimizer for row in aggregate(results)] == [f"{SGD} (lr=0.1)", f"{SGD} (lr=0.2)"]


def test_a_plot_is_a_png_with_something_on_it(tmp_path):
    results = compare(["digits-mlp", "staircase"], [ADAMW, SGD], 2, **SHORT)
    panels = [("digits-mlp", "steps"), ("staircase", "evaluations")]
    for name, chosen in (("all.png", None), ("two.png", panels)):
        path = plot(results, tmp_path / name, panels=chosen)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) > 20_000
    with pytest.raises(ValueError, match="no curves"):
        plot([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="`axis` must be one of"):
        plot(results, tmp_path / "none.png", panels=[("staircase", "epochs")])
