"""Small, fixed training tasks: data, model, loss and tuned settings in one object each.

Every task runs on a CPU in seconds to a minute, needs no download, and is a pure function of its
seeds: models and batches draw from local generators, never from the global one. Batch ``i`` of seed
``s`` depends on ``(s, i)`` alone, so a run resumes at any step without replaying the ones before.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from optimizers.testing.networks import (
    ALPHABET,
    VOCABULARY,
    WINDOW,
    CharGPT,
    HardLIF,
    digits_cnn,
    digits_mlp,
    initialise,
    staircase,
)

__all__ = ["TASKS", "MissingExtraError", "Split", "Task", "get_task", "require"]

Batch = tuple[Tensor, Tensor]


class MissingExtraError(ImportError):
    """A package of the optional extra ``harness`` is not installed."""


def require(module: str) -> Any:
    """Import a module of the ``harness`` extra.

    Args:
        module: Dotted name, such as ``sklearn.datasets``.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"`{module}` is needed here and cannot be imported; "
            'install it with `pip install "optimizer-zoo[harness]"`.'
        ) from error


class Split(NamedTuple):
    """The fixed data of a task.

    Attributes:
        inputs: Training inputs, first dimension the example; for ``stdlib-gpt`` the 1-D text.
        targets: Training targets; empty for ``stdlib-gpt``, whose targets are the text shifted.
        val_inputs: Validation inputs, one row per example.
        val_targets: Validation targets, of the shape that the task's loss takes.
    """

    inputs: Tensor
    targets: Tensor
    val_inputs: Tensor
    val_targets: Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, a data set, a loss and the settings under which they are compared.

    Attributes:
        name: Name in ``TASKS``.
        description: One line.
        make_model: Builds the bare module; its parameters are filled by ``build_model``.
        loss_fn: ``loss_fn(outputs, targets) -> 0-D Tensor``, a mean over examples.
        load: Returns the fixed ``Split``; cached, and independent of every seed.
        steps: Default number of optimizer steps.
        batch_size: Examples per batch.
        eval_every: Default number of steps between evaluations.
        differentiable: Whether the gradient of the loss says anything about every parameter.
        window: Characters per example when the task is text, 0 when examples are rows.
        schedule: Of the learning rate: ``"cosine"`` with a warm-up, or ``"constant"`` where the
            rules that suit the task decay a radius or a temperature of their own.
        recommended: Tuned constructor arguments by optimizer name, for the default number of
            steps and the default schedule.
    """

    name: str
    description: str
    make_model: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    load: Callable[[], Split]
    steps: int
    batch_size: int
    eval_every: int
    differentiable: bool = True
    window: int = 0
    schedule: str = "cosine"
    recommended: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def build_model(self, seed: int) -> nn.Module:
        """Build the model with parameters that depend on the seed alone.

        Args:
            seed: Any integer; equal seeds give bitwise equal parameters.

        Returns:
            The module, on the CPU, in training mode.
        """
        # Built on the meta device, since torch's own initialisers draw from the global generator.
        with torch.device("meta"):
            model = self.make_model()
        model.to_empty(device="cpu")
        initialise(model, _generator(seed, 0))
        return model

    def batch(self, seed: int, index: int) -> Batch:
        """Return one training batch.

        Args:
            seed: Seed of the order.
            index: Number of the batch, from 0.

        Returns:
            ``(inputs, targets)`` with ``batch_size`` examples.
        """
        split = self.load()
        if self.window:
            draws = _generator(seed, 1 + index)
            last = len(split.inputs) - self.window - 1
            starts = torch.randint(0, last + 1, (self.batch_size, 1), generator=draws)
            return _windows(split.inputs, starts, self.window)
        epoch, place = divmod(index, len(split.inputs) // self.batch_size)
        order = torch.randperm(len(split.inputs), generator=_generator(seed, 1 + epoch))
        rows = order[place * self.batch_size :][: self.batch_size]
        return split.inputs[rows], split.targets[rows]

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over training batches without end.

        Args:
            seed: Seed of the order.
            start: Number of the first batch, so that a run can resume.

        Yields:
            ``(inputs, targets)``; each epoch is a new permutation and drops its short last batch.
        """
        index = start
        while True:
            yield self.batch(seed, index)
            index += 1

    def validation(self) -> Batch:
        """Return the fixed validation set as one ``(inputs, targets)`` pair."""
        split = self.load()
        return split.val_inputs, split.val_targets

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure a model on the whole validation set, in evaluation mode and without gradients.

        Args:
            model: A model from ``build_model``; its training mode is put back.

        Returns:
            ``loss`` (nats per example) and ``accuracy`` (share of right predictions, 0 to 1).
        """
        inputs, targets = self.validation()
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                outputs = model(inputs)
                loss = float(self.loss_fn(outputs, targets))
                accuracy = float((outputs.argmax(-1) == targets).double().mean())
        finally:
            model.train(training)
        return {"loss": loss, "accuracy": accuracy}

    def fingerprint(self) -> str:
        """Return a hash of the data, so that results on unequal data are never averaged.

        The standard library's text differs between Python versions; digits never do.
        """
        digest = hashlib.sha256()
        for tensor in self.load():
            digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


# -- seeds and parameters ----------------------------------------------------------------------


def _generator(seed: int, stream: int) -> torch.Generator:
    """Return a generator for one stream of one seed; hashed, so that streams do not overlap."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# -- digits ------------------------------------------------------------------------------------


@functools.cache
def _digits(image: bool = False) -> Split:
    """Load scikit-learn's digits: 1347 training and 450 validation images with pixels in [0, 1]."""
    data = require("sklearn.datasets").load_digits()
    inputs = torch.from_numpy(np.asarray(data.data, dtype=np.float32) / 16)
    targets = torch.from_numpy(np.asarray(data.target, dtype=np.int64))
    if image:
        inputs = inputs.view(-1, 1, 8, 8)
    order = torch.randperm(len(inputs), generator=_generator(0, 0))
    train, val = order[:1347], order[1347:]
    return Split(inputs[train], targets[train], inputs[val], targets[val])


def _count_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of spike counts.

    The factor keeps one spike from deciding an example: with bare counts as logits the loss of a
    random network lies far above that of a silent one, and PolyStep silenced it for good.
    """
    return functional.cross_entropy(0.3 * outputs, targets)


# -- characters of the standard library --------------------------------------------------------

# Modules that every supported Python ships. A fixed list: a glob would change the data with each
# package that a distribution drops into the same folder.
_MODULES = """
    argparse ast base64 bdb bisect calendar cmd code codecs codeop configparser contextlib copy
    csv dataclasses difflib dis doctest enum filecmp fileinput fractions ftplib functools getopt
    glob gzip heapq imaplib inspect ipaddress locale mailbox mimetypes optparse os pdb pickle
    pickletools platform plistlib poplib posixpath pprint profile queue random sched selectors
    shelve shlex shutil smtplib socket socketserver ssl statistics string subprocess tarfile
    tempfile textwrap threading timeit trace traceback turtle typing uuid warnings wave weakref
    webbrowser zipapp zipfile
"""
_HELD_OUT = "codecs filecmp heapq os pprint shutil statistics textwrap"
_VAL_WINDOWS = 128


def _windows(text: Tensor, starts: Tensor, window: int) -> Batch:
    """Cut ``(inputs, targets)`` of shape ``(starts, window)``, the targets one character ahead."""
    chunk = text[starts + torch.arange(window + 1)].long()
    return chunk[:, :-1], chunk[:, 1:]


@functools.cache
def _stdlib() -> Split:
    """Read the standard library's source as symbols; whole modules are held out."""
    table = np.full(256, VOCABULARY - 1, dtype=np.uint8)
    for symbol, character in enumerate(ALPHABET):
        table[ord(character)] = symbol
    folder = Path(sysconfig.get_path("stdlib"))

    def read(names: list[str]) -> Tensor:
        paths = [folder / f"{name}.py" for name in names]
        # A module that became a package in a later Python is left out; the fingerprint tells.
        raw = b"\n".join(path.read_bytes() for path in paths if path.is_file())
        return torch.from_numpy(table[np.frombuffer(raw, dtype=np.uint8)])

    train = read(sorted(set(_MODULES.split()) - set(_HELD_OUT.split())))
    val = read(sorted(_HELD_OUT.split()))
    if min(len(train), len(val)) < 100 * WINDOW:
        raise FileNotFoundError(
            "task `stdlib-gpt` reads the source text of Python's standard library, and this "
            "Python ships without it; choose another task."
        )
    starts = torch.linspace(0, len(val) - WINDOW - 1, _VAL_WINDOWS).long()[:, None]
    return Split(train, torch.empty(0, dtype=torch.long), *_windows(val, starts, WINDOW))


def _token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all characters of a batch."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


# -- the table ---------------------------------------------------------------------------------

# Learning rates: the best of a grid per rule, by the validation loss at the default number of
# steps and with the default schedule; two or three seeds (the GPT: one).
_ALL = (
    Task(
        name="digits-mlp",
        description="8x8 digits, 64-128-10 ReLU network, cross-entropy",
        make_model=digits_mlp,
        loss_fn=functional.cross_entropy,
        load=_digits,
        steps=300,
        batch_size=64,
        eval_every=10,
        recommended={
            "torch.optim:SGD": {"lr": 0.4, "momentum": 0.9},
            "torch.optim:AdamW": {"lr": 0.04},
            "AMSGrad": {"lr": 0.01},
            "Muon": {"lr": 0.02, "adamw_lr": 0.02},
            "DropMuon": {"lr": 0.05},
            "EGN": {"lr": 1.0, "damping": 0.1},
        },
    ),
    Task(
        name="digits-cnn",
        description="8x8 digits, convolutions 16-32-64 and a linear readout, cross-entropy",
        make_model=digits_cnn,
        loss_fn=functional.cross_entropy,
        load=functools.partial(_digits, image=True),
        steps=300,
        batch_size=64,
        eval_every=10,
        recommended={
            "torch.optim:SGD": {"lr": 0.1, "momentum": 0.9},
            "torch.optim:AdamW": {"lr": 0.02},
            "AMSGrad": {"lr": 0.01},
            "Muon": {"lr": 0.05, "adamw_lr": 0.02},
            "DropMuon": {"lr": 0.02},
            "EGN": {"lr": 1.0, "damping": 0.1},
        },
    ),
    Task(
        name="stdlib-gpt",
        description="characters of Python's standard library, 0.82 M-parameter GPT",
        make_model=CharGPT,
        loss_fn=_token_cross_entropy,
        load=_stdlib,
        steps=250,
        batch_size=16,
        eval_every=25,
        window=WINDOW,
        recommended={
            "torch.optim:SGD": {"lr": 0.3, "momentum": 0.9},
            "torch.optim:AdamW": {"lr": 0.006},
            "AMSGrad": {"lr": 0.003},
            "Muon": {"lr": 0.02, "adamw_lr": 0.006},
            "DropMuon": {"lr": 0.05},
        },
    ),
    Task(
        name="staircase",
        description="8x8 digits, 64-32-10 with floor(5 sigmoid(z))/5: no gradient for layer 1",
        make_model=staircase,
        loss_fn=functional.cross_entropy,
        load=_digits,
        steps=150,
        batch_size=128,
        eval_every=10,
        differentiable=False,
        schedule="constant",
        recommended={
            "torch.optim:AdamW": {"lr": 0.1},
            "PolyStep": {
                "epsilon": 1.0,
                "step_radius": ["cosine", 20.0, 2.0, 150],
                "probe_radius": 2.0,
                "rank": 2,
                "momentum": 0.9,
            },
        },
    ),
    Task(
        name="hard-lif",
        description="8x8 digits, 64-32-10 spiking network, hard threshold: no gradient at all",
        make_model=HardLIF,
        loss_fn=_count_cross_entropy,
        load=_digits,
        steps=200,
        batch_size=64,
        eval_every=10,
        differentiable=False,
        schedule="constant",
        recommended={
            "torch.optim:AdamW": {"lr": 0.02},
            "PolyStep": {
                "epsilon": 0.5,
                "step_radius": ["constant", 4.0],
                "probe_radius": ["constant", 0.5],
                "rank": 2,
                "momentum": 0.9,
            },
        },
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""Tasks by name."""


def get_task(name: str) -> Task:
    """Return a task by name.

    Args:
        name: A key of ``TASKS``.

    Returns:
        The task.

    Raises:
        LookupError: There is no such task; the message suggests near names.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise LookupError(f"there is no task {name!r}; {hint or 'known: ' + ', '.join(TASKS) + '.'}")
