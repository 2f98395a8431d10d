"""The networks of the training tasks; they run under torch.func and are filled from a generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "ALPHABET",
    "VOCABULARY",
    "WINDOW",
    "CharGPT",
    "HardLIF",
    "Staircase",
    "digits_cnn",
    "digits_mlp",
    "initialise",
    "staircase",
]

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET) + 1  # and one symbol for every other byte
WINDOW = 64


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill parameters: torch's uniform law for matrices, N(0, 0.3) for embeddings."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.Embedding):
            # Of 0.02, 0.1, 0.3 and 1, this gave the lowest loss after 250 steps of AdamW.
            module.weight.normal_(0.0, 0.3, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()


def digits_mlp() -> nn.Module:
    """Return a 64-128-10 ReLU network."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def digits_cnn() -> nn.Module:
    """Return convolutions 16-32-64 with a linear readout."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Staircase(nn.Module):
    """The activation ``floor(levels * sigmoid(z)) / levels``: its derivative is zero everywhere.

    Args:
        levels: Number of steps of the staircase.
    """

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, z: Tensor) -> Tensor:
        """Apply the activation to a tensor of any shape."""
        steps: Tensor = torch.floor(self.levels * torch.sigmoid(z))
        return steps / self.levels


def staircase() -> nn.Module:
    """Return a 64-32-10 network whose hidden units are staircases."""
    return nn.Sequential(nn.Linear(64, 32), Staircase(), nn.Linear(32, 10))


class HardLIF(nn.Module):
    """Spiking network of leaky integrate-and-fire neurons with a hard threshold.

    Both layers obey ``mem = decay * mem + current; spike = [mem >= 1]; mem = 0 where spike``. The
    input current is constant over the steps and the outputs are the spike counts of the second
    layer. No surrogate gradient: the derivative of every output is zero.

    Args:
        features: Sizes of input, hidden and output layer.
        steps: Time steps.
        decay: Share of the membrane potential that survives a step.
    """

    def __init__(
        self, features: tuple[int, int, int] = (64, 32, 10), steps: int = 15, decay: float = 0.95
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(features[0], features[1])
        self.readout = nn.Linear(features[1], features[2])
        self.steps = steps
        self.decay = decay

    def _fire(self, mem: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        mem = self.decay * mem + current
        # [mem >= 1] in a form that autograd accepts, with an exactly zero derivative; a comparison
        # would cut the graph, and then `backward` raises instead of returning zeros.
        spike = torch.floor(mem).clamp(0, 1)
        return spike, mem * (1 - spike)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs ``(batch, features)`` to spike counts ``(batch, classes)``."""
        current = self.hidden(inputs)
        mem, out = current.new_zeros(()), current.new_zeros(())
        counts: Tensor = current.new_zeros(())
        for _ in range(self.steps):
            spike, mem = self._fire(mem, current)
            fired, out = self._fire(out, self.readout(spike))
            counts = counts + fired
        return counts


class _Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, width)`` to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # The fused CPU kernel has neither a second derivative nor a forward-mode one, which the
        # curvature and forward-gradient rules ask for; at this size the plain one is as fast.
        with sdpa_kernel(SDPBackend.MATH):
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(heads.transpose(1, 2).reshape(batch, time, width))
        mixed: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + mixed


class CharGPT(nn.Module):
    """A small decoder-only transformer over characters, 0.82 M parameters by default.

    Args:
        vocabulary: Number of symbols.
        window: Longest input.
        width: Residual width.
        heads: Attention heads per block.
        depth: Number of blocks.
    """

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        window: int = WINDOW,
        width: int = 128,
        heads: int = 4,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(window, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map symbols ``(batch, time)`` to logits ``(batch, time, vocabulary)``."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
