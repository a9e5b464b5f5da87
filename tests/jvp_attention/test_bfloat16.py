"""The kernels' roundings in bfloat16, emulated where there is no GPU: the interpreter itself has no bfloat16."""

import numpy as np
import pytest
import torch

import jvp_attention
from jvp_attention import reference
from tests.attention_cases import TOLERANCE, Case, from_bfloat16, to_bfloat16
from tests.jvp_attention.test_extremes import large_query_tangents, with_mean
from tests.jvp_attention.test_fuzz import errors

BFLOAT16 = torch.bfloat16


def test_the_emulation_rounds_as_pytorch_does():
    """Ties, subnormal numbers, overflow and what is not a number included."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000  # ties
    x = bits.view(np.float32)
    expected = torch.from_numpy(x).to(BFLOAT16)
    found = torch.from_numpy(from_bfloat16(to_bfloat16(x)))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(20, 36, 24), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((33, 100, 60), (64, 96, 128)))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_outputs_and_all_six_gradients(guarded, emulated, n, m, d, causal):
    Case((1, 2, n, m, d), BFLOAT16, causal).check(jvp_attention.attention)


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 40))])
def test_drawn_problems(emulated, small_tiles, part):
    """Those of the second fuzz, in bfloat16."""
    for seed in range(part, 200, 40):
        _, ours, plain = errors(seed, small_tiles, emulated, BFLOAT16)
        assert ours <= max(TOLERANCE[BFLOAT16], plain), seed


def test_rounding_cancels_against_the_mean_of_the_values(emulated):
    """As in float16 (test_extremes.py); without residuals gdq is off by a fifth of what plain attention's is."""
    case = Case((1, 1, 64, 80, 32), BFLOAT16, edit=with_mean(8))
    case.check(jvp_attention.attention)
    ours, plain = (case.errors(case.results(a)) for a in (jvp_attention.attention, reference.attention))
    _, do, gq, gk, _, gdq, gdk, _ = (a / b for a, b in zip(ours, plain, strict=True))
    assert max(do, gq, gk, gdq, gdk) < 0.2


def test_logit_tangents_cancel_in_the_backward(emulated):
    case = Case((1, 1, 64, 1, 64), BFLOAT16, edit=large_query_tangents)
    ours, plain = (case.errors(case.results(a)) for a in (jvp_attention.attention, reference.attention))
    gv = 4
    assert ours[gv] <= 1.5 * plain[gv]


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0, 2, 8])
def test_values_with_a_mean_per_channel(emulated, mean):
    case = Case((1, 2, 128, 160, 64), BFLOAT16, edit=with_mean(mean))
    case.check(jvp_attention.attention)
    ours, plain = (case.errors(case.results(a)) for a in (jvp_attention.attention, reference.attention))
    assert all(a <= 1.5 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)
