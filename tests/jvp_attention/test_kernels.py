"""The kernels against float64 torch.func.jvp and autograd, on poisoned memory."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import jvp_attention
from tests.attention_cases import TOLERANCE, Case

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]

# the interpreter takes seconds for each: one dtype with a mask, the other without; a GPU takes all
KINDS = [(torch.float32, False), (torch.float16, True)]
KINDS += [
    pytest.param(dtype, causal, marks=pytest.mark.gpu)
    for dtype, causal in (
        (torch.float32, True),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    )
]


@pytest.mark.parametrize(
    ("dtype", "causal", "split", "lengths"),
    [(torch.float32, False, False, None), (torch.float32, True, True, [5, 36]), (torch.float16, False, True, None)],
    ids=str,
)
def test_every_kernel_in_the_small(guarded, device, small_tiles, dtype, causal, split, lengths):
    """Outputs and all six gradients, several tiles each way, with lengths and without."""
    small_tiles(16, 32, split=split)
    Case((2, 1, 20, 36, 24), dtype, causal, lengths=lengths, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize(("dtype", "causal"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 16), (33, 100, 60), (63, 31, 64), (100, 33, 72), (65, 64, 80), (70, 40, 96), (64, 96, 128)]
)
@pytest.mark.slow
def test_outputs_and_all_six_gradients(guarded, device, n, m, d, dtype, causal):
    """With the tiles that are the default, at sizes that are no multiple of them."""
    Case((1, 2, n, m, d), dtype, causal, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.slow
def test_the_widest_heads(guarded, device, dtype):
    Case((1, 1, 40, 24, 256), dtype, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize("n", [1, 15, 16, 17])
@pytest.mark.parametrize("m", [1, 15, 16, 17])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.slow
def test_lengths_about_one_tile(guarded, device, small_tiles, n, m, causal):
    small_tiles(16, 16)
    Case((1, 1, n, m, 16), causal=causal, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize(("n", "m", "causal"), [(20, 36, False), (36, 20, True)])
@pytest.mark.slow
def test_keys_beyond_each_length_have_no_part(guarded, device, small_tiles, n, m, causal):
    """Lengths of nothing, one key, a tile and one more or less, all and, where that counts as all, more."""
    small_tiles(16, 16, split=causal)
    lengths = [-2, 0, 1, 15, 16, 17, m, m + 1]
    case = Case((len(lengths), 1, n, m, 24), causal=causal, lengths=lengths, device=device)
    o, do, gq, gk, gv, gdq, gdk, gdv = results = case.results(jvp_attention.attention)
    assert max(case.errors(results)) <= TOLERANCE[torch.float32]
    for i, length in enumerate(lengths):
        assert not any(x[i, :, max(length, 0) :].any() for x in (gk, gv, gdk, gdv))
    assert not any(x[:2].any() for x in (o, do, gq, gdq))  # of those that see nothing


@pytest.mark.parametrize(("dtype", "causal"), KINDS, ids=str)
@pytest.mark.slow
def test_lengths_with_the_default_tiles(guarded, device, dtype, causal):
    case = Case((3, 1, 70, 200, 64), dtype, causal, lengths=[64, 129, 200], device=device)
    case.check(jvp_attention.attention)


def test_lengths_need_not_lie_side_by_side(device):
    """Int32 as well as int64, and a view of every other number."""
    q, k, v, *_ = Case((3, 1, 5, 20, 16), device=device).tensors
    wide = torch.tensor([3, 9, 20, 9, 17, 9], device=device)
    results = [
        jvp_attention.attention(q, k, v, lengths=x)
        for x in (wide[::2], wide[::2].contiguous(), wide.to(torch.int32)[::2])
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


orders = st.lists(st.sampled_from([(0, 1, 2), (0, 2, 1), (2, 1, 0)]), min_size=6, max_size=6)


@settings(
    max_examples=30 if torch.cuda.is_available() else 60,  # on a GPU every other size is compiled anew
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
    lengths=st.sampled_from([False, False, True]).flatmap(
        lambda given: st.lists(st.integers(-1, 38), min_size=2, max_size=2) if given else st.none()
    ),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_any_problem(
    guarded, device, small_tiles, shape, dtype, causal, scale, tangents, gradients, orders, tiles, split, lengths, seed
):
    """Sizes, memory orders, scales, tiles, lengths, which inputs have tangents, which outputs gradients: all drawn."""
    small_tiles(*tiles, split=split)
    if not any(tangents):
        gradients = (gradients[0], False)
    lengths = lengths and lengths[: shape[0]]
    case = Case(shape, dtype, causal, scale, tangents, gradients, orders, device, seed, lengths)
    case.check(jvp_attention.attention, ill_conditioned=True)
    guarded.check()
    guarded.buffers.clear()
