"""The reference is attention and its derivative; and it stands in where the kernels cannot run."""

import logging
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jvp_attention
from jvp_attention import operators, reference
from tests.attention_cases import Case
from tests.processes import python


def tensors(n=5, m=7, d=4, dtype=torch.float64) -> list[torch.Tensor]:
    return Case((2, 3, n, m, d), dtype).tensors


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 7), (7, 5)])
def test_is_scaled_dot_product_attention(n, m, causal):
    """Causal alignment included: where N and M differ, query i sees keys 0 to i."""
    q, k, v = tensors(n, m)[:3]
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    torch.testing.assert_close(reference.attention(q, k, v, scale=0.3, causal=causal), expected)
    torch.testing.assert_close(
        reference.attention(q, k, v, causal=causal), scaled_dot_product_attention(q, k, v, is_causal=causal)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_are_attention_on_fewer_keys(causal):
    """Batch element by element, value and tangent and all gradients; a length of 0 makes zeros; NaN lies beyond."""
    case = Case((5, 3, 6, 7, 4), torch.float64, causal, lengths=[0, 1, 4, 7, 5])
    results = case.results(reference.attention)
    for i, length in enumerate(case.lengths):
        rows = [x[i : i + 1] for x in results]
        o, do, gq, gk, gv, gdq, gdk, gdv = rows
        if length == 0:
            assert not any(x.any() for x in rows)
            continue
        alone = Case((1, 3, 6, length, 4), torch.float64, causal)
        q, k, v, dq, dk, dv, go, gdo = (x[i : i + 1] for x in case.tensors)
        kept = [q, *(x[:, :, :length] for x in (k, v)), dq, *(x[:, :, :length] for x in (dk, dv)), go, gdo]
        found = [o, do, gq, gk[:, :, :length], gv[:, :, :length], gdq, gdk[:, :, :length], gdv[:, :, :length]]
        torch.testing.assert_close(found, alone.results(reference.attention, kept))
        assert not any(x[:, :, length:].any() for x in (gk, gv, gdk, gdv))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"lengths": torch.tensor([0, 5])}], ids=str)
def test_the_dual_written_out_is_the_jvp(options):
    q, k, v, dq, dk, dv, *_ = tensors()
    expected = torch.func.jvp(lambda *x: reference.attention(*x, scale=0.7, **options), (q, k, v), (dq, dk, dv))
    for which in (reference, jvp_attention):
        torch.testing.assert_close(which.dual_attention(q, k, v, dq, dk, dv, scale=0.7, **options), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_through_value_and_tangent_by_finite_differences(causal):
    """Float64 goes to the reference, so this is what attention promises about its derivatives."""
    inputs = [x.clone().requires_grad_() for x in tensors(3, 4, 2)[:6]]

    def dual(q, k, v, dq, dk, dv):
        return torch.func.jvp(lambda *x: jvp_attention.attention(*x, causal=causal), (q, k, v), (dq, dk, dv))

    assert torch.autograd.gradcheck(dual, inputs)
    once = partial(jvp_attention.attention, causal=causal)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(once, inputs[:3], check_forward_ad=True, **batched)


def test_the_cpu_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operators._log_once.cache_clear()
    q, k, v, dq, dk, dv, *_ = tensors(dtype=torch.float32)
    with caplog.at_level(logging.INFO, "jvp_attention"):
        results = [jvp_attention.attention(q, k, v) for _ in range(2)]
        o, do = jvp_attention.dual_attention(q, k, v, dq, None, dv)
    torch.testing.assert_close(results[1], reference.attention(q, k, v))
    torch.testing.assert_close((o, do), reference.dual_attention(q, k, v, dq, torch.zeros_like(dk), dv))
    assert len(caplog.records) == 1
    assert "plain PyTorch attention stands in" in caplog.text


@pytest.mark.slow
def test_works_without_triton():
    """On macOS triton cannot be installed."""
    code = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch, jvp_attention
x = torch.randn(6, 1, 1, 3, 4)
o, do = torch.func.jvp(jvp_attention.attention, tuple(x[:3]), tuple(x[3:]))
print(o.shape == do.shape)
"""
    run = python("-W", "ignore", "-c", code)
    assert run.stdout.split() == ["True"], run.stderr
