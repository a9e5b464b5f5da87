"""The kernels against float64 torch.func.jvp and autograd, on poisoned memory."""

import pytest
import torch
from attention_cases import Case
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import jvp_attention

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 16), (33, 100, 60), (63, 31, 64), (100, 33, 72), (65, 64, 80), (70, 40, 96), (64, 96, 128)]
)
def test_outputs_and_all_six_gradients(guarded, device, n, m, d, dtype, causal):
    """With the tiles that are the default, at sizes that are no multiple of them."""
    Case((1, 2, n, m, d), dtype, causal, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widest_heads(guarded, device, dtype):
    Case((1, 1, 40, 24, 256), dtype, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize("n", [1, 15, 16, 17])
@pytest.mark.parametrize("m", [1, 15, 16, 17])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_about_one_tile(guarded, device, small_tiles, n, m, causal):
    small_tiles(16, 16)
    Case((1, 1, n, m, 16), causal=causal, device=device).check(jvp_attention.attention)


orders = st.lists(st.sampled_from([(0, 1, 2), (0, 2, 1), (2, 1, 0)]), min_size=6, max_size=6)


@settings(
    max_examples=30 if torch.cuda.is_available() else 220,  # on a GPU every other size is compiled anew
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a failing case is small as it is, and shrinking it takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 36), st.integers(1, 36), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 1.0, -0.3, 0.05, 0.0]),
    tangents=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    gradients=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    orders=orders,
    tiles=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    split=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_problem(
    guarded, device, small_tiles, shape, dtype, causal, scale, tangents, gradients, orders, tiles, split, seed
):
    """Sizes, memory orders, scales, tiles, which inputs have tangents and which outputs have gradients: all drawn."""
    small_tiles(*tiles, split=split)
    if not any(tangents):
        gradients = (gradients[0], False)
    case = Case(shape, dtype, causal, scale, tangents, gradients, orders, device, seed)
    case.check(jvp_attention.attention, ill_conditioned=True)
    guarded.check()
    guarded.buffers.clear()
