"""The kernels against float64 torch.func.jvp and autograd, on poisoned memory; bfloat16 emulated where no GPU is."""

import numpy as np
import pytest
import torch

import jvp_attention
from tests.attention_cases import TOLERANCE, Case, from_bfloat16, to_bfloat16

SLOW = pytest.mark.slow
GPU = pytest.mark.gpu
# the interpreter takes seconds for each: one dtype with a mask, the other without; a GPU takes all
KINDS = [(torch.float32, False), (torch.float16, True)]
KINDS += [pytest.param(dtype, causal, marks=GPU) for dtype, causal in ((torch.float32, True), (torch.float16, False))]
KINDS += [pytest.param(torch.bfloat16, causal, marks=GPU) for causal in (False, True)]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=GPU)], ids=str)
@pytest.mark.slow
def test_the_widest_heads(guarded, device, dtype):
    Case((1, 1, 40, 24, 256), dtype, device=device).check(jvp_attention.attention)


@pytest.mark.parametrize("n", [1, 16, 17])
@pytest.mark.parametrize("m", [1, 16, 17])
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


def test_the_emulation_of_bfloat16_rounds_as_pytorch_does():
    """Ties, subnormal numbers, overflow and what is not a number included."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000  # ties
    x = bits.view(np.float32)
    found = torch.from_numpy(from_bfloat16(to_bfloat16(x)))
    torch.testing.assert_close(found, torch.from_numpy(x).bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(20, 36, 24), *(pytest.param(x, marks=SLOW) for x in ((33, 100, 60), (64, 96, 128)))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_in_emulated_bfloat16(guarded, emulated, shape, causal):
    Case((1, 2, *shape), torch.bfloat16, causal).check(jvp_attention.attention)
