"""QK-clip: oracle, logits capped exactly, shared keys, nothing to do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers.orthogonalized import qk_clip_
from tests.oracles import muon_family as oracles

D = torch.float64


def weights(heads, kv_heads, size=4, features=6, seed=0):
    rng = np.random.default_rng(seed)
    return (
        torch.tensor(rng.standard_normal((heads * size, features))),
        torch.tensor(rng.standard_normal((kv_heads * size, features))),
        torch.tensor(rng.standard_normal((20, features))),
    )


def logits(q, k, x, heads, q_bias=0.0, k_bias=0.0):
    """Return ``(heads, tokens, tokens)``, with each key head shared by as many query heads."""
    q = (x @ q.T + q_bias).unflatten(-1, (heads, -1)).transpose(0, 1)
    k = (x @ k.T + k_bias).unflatten(-1, (-1, q.shape[-1])).transpose(0, 1)
    k = k.repeat_interleave(heads // len(k), 0)
    return q @ k.mT / math.sqrt(q.shape[-1])


@given(
    heads=st.sampled_from([1, 2, 4]),
    largest=st.lists(st.floats(1e-6, 1000) | st.floats(-10, 0), min_size=4, max_size=4),
    tau=st.sampled_from([1e-3, 1.0, 100.0, math.inf]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(heads, largest, tau, seed):
    q, k, _ = weights(heads, heads, seed=seed)
    expected = oracles.qk_clip(q.numpy(), k.numpy(), largest[:heads], tau, n_heads=heads)
    qk_clip_(q, k, torch.tensor(largest[:heads], dtype=D), tau, n_heads=heads)
    np.testing.assert_allclose(q, expected[0], rtol=1e-14, atol=0)
    np.testing.assert_allclose(k, expected[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3), (6, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_largest_logits_become_tau(heads, kv_heads, biased):
    """Each head's logits shrink by its own factor and no other, although keys are shared."""
    q, k, x = weights(heads, kv_heads)
    q *= torch.linspace(1, 5, heads, dtype=D).repeat_interleave(4)[:, None]
    biases = (torch.ones(len(q), dtype=D), torch.ones(len(k), dtype=D)) if biased else (None, None)
    with_bias = biases if biased else (0.0, 0.0)
    before = logits(q, k, x, heads, *with_bias)
    largest = before.amax((1, 2))
    tau = float(largest.median())
    sizes = [q.abs(), k.abs()]
    gamma = qk_clip_(q, k, largest, tau, n_heads=heads, n_kv_heads=kv_heads,
                     q_bias=biases[0], k_bias=biases[1])  # fmt: skip
    after = logits(q, k, x, heads, *with_bias)
    torch.testing.assert_close(after.amax((1, 2)), largest.clamp(max=tau), rtol=1e-13, atol=0)
    torch.testing.assert_close(after, gamma[:, None, None] * before, rtol=1e-12, atol=1e-12)
    assert all(bool((w.abs() <= size).all()) for w, size in zip((q, k), sizes, strict=True))
    assert gamma.min() < 1
    assert gamma.max() == 1


def test_heads_that_share_a_key_share_no_more_than_they_must():
    q, k, _ = weights(4, 2)
    start = q.clone(), k.clone()
    gamma = qk_clip_(q, k, [50.0, 200.0, 400.0, 900.0], n_heads=4, n_kv_heads=2)
    torch.testing.assert_close(gamma, torch.tensor([1, 1 / 2, 1 / 4, 1 / 9], dtype=D))
    ratios_of_k = (k / start[1]).view(2, -1).mean(1)
    ratios_of_q = (q / start[0]).view(4, -1).mean(1)
    # The first pair: its first head is within bounds, so the key must stay.
    torch.testing.assert_close(ratios_of_k, torch.tensor([1, 1 / 2], dtype=D))
    torch.testing.assert_close(ratios_of_q, torch.tensor([1, 1 / 2, 1 / 2, 2 / 9], dtype=D))


def test_latent_attention():
    """Content logits and rotary logits shrink alike, though the rotary key is shared and stays."""
    q, k, x = weights(3, 3)
    rope, key, _ = weights(3, 1, size=2, seed=5)

    def all_logits():
        return 2 * logits(q, k, x, 3) + math.sqrt(2) * logits(rope, key, x, 3)

    before = all_logits()
    largest = before.amax((1, 2))
    tau = float(largest.min()) * 1.1
    stays = key.clone()
    gamma = qk_clip_(q, k, largest, tau, n_heads=3, q_rope_weight=rope)
    torch.testing.assert_close(all_logits(), gamma[:, None, None] * before, rtol=1e-12, atol=1e-12)
    assert torch.equal(key, stays)
    assert (gamma < 1).any()


def test_no_clipping_is_no_change():
    q, k, _ = weights(2, 2)
    start = q.clone(), k.clone()
    for largest, tau in (
        ([1e9, 1e30], math.inf),
        ([100.0, -5.0], 100.0),
        (0.0, 100.0),
        ([math.nan, math.inf], 100.0),
        (torch.tensor(3.0), 100.0),
    ):
        gamma = qk_clip_(q, k, largest, tau, n_heads=2)
        assert torch.equal(q, start[0])
        assert torch.equal(k, start[1])
        assert torch.equal(gamma, torch.ones(2, dtype=D))


def test_parameters_and_views_of_fused_ones_are_changed_in_place():
    fused = nn.Linear(8, 24, bias=True)
    q, k, v = fused.weight.chunk(3)
    start = fused.weight.detach().clone()
    qk_clip_(q, k, 400.0, n_heads=2, q_bias=fused.bias[:8], k_bias=fused.bias[8:16])
    torch.testing.assert_close(fused.weight[:16], start[:16] / 2)
    assert torch.equal(v, start[16:])
    fused(torch.ones(1, 8)).sum().backward()
    half = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    gamma = qk_clip_(half, nn.Parameter(half.detach().clone()), 200.0, n_heads=2)
    assert gamma.dtype is torch.float32
    assert torch.equal(half.detach(), torch.full((4, 3), 2**-0.5).bfloat16())


def test_nothing_is_read_back_to_the_host(monkeypatch):
    q, k, _ = weights(4, 2)
    largest = torch.full((4,), 200.0, dtype=D)

    def refuse(*_):
        raise AssertionError("a number was read")

    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    qk_clip_(q, k, largest, n_heads=4, n_kv_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"n_heads": 6}, "q_weight"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"n_kv_heads": None}, "same size"),
        ({"s_max": [1.0, 2.0]}, "s_max"),
        ({"q_bias": torch.ones(3)}, "q_bias"),
        ({"k_bias": torch.ones(16)}, "k_bias"),
        ({"q_rope_weight": torch.ones(5, 6)}, "q_rope_weight"),
        ({"q_weight": torch.ones(4, 2, 6)}, "q_weight"),
    ],
)
def test_refusals(change, message):
    q, k, _ = weights(4, 2)
    start = q.clone(), k.clone()
    arguments = {"q_weight": q, "k_weight": k, "s_max": 1e3, "n_heads": 4, "n_kv_heads": 2}
    with pytest.raises(ValueError, match=message):
        qk_clip_(**{**arguments, **change})
    assert torch.equal(q, start[0])
    assert torch.equal(k, start[1])
