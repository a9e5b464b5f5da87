"""The developers' tools: clocks counted in machine code, on listings written by hand, and the host's time."""

import pytest

import clocks
import host_time


def listing(*lines: str) -> str:
    return "\n".join(
        x if x.startswith(".L") else f"        /*{i:04x}*/                   {x} ;" for i, x in enumerate(lines)
    )


LOOP = listing(
    "MOV R1, c[0x0][0x28]",
    ".L_x_1:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64]",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT",
    "HGMMA.64x128x16.F32.BF16 R24, R40, gdesc[UR24].tnspB, R24",
    "MUFU.EX2 R5, R6",
    "@P0 BRA `(.L_x_1)",
    "EXIT",
).replace(".L_x_1:", "\n.L_x_1:")


def test_the_loop_with_the_products_is_found():
    names = [name.split(".")[0] for name, _ in clocks.inner_loop(LOOP)]
    assert names == ["BAR", "LDGSTS", "HGMMA", "HGMMA", "MUFU", "BRA"]


def test_the_inner_of_two_loops_counts():
    nested = listing(".L_x_0:", "IADD3 R1, R1, 0x1, RZ") + "\n" + LOOP.replace("EXIT", "@P1 BRA `(.L_x_0)")
    assert clocks.inner_loop(nested) == clocks.inner_loop(LOOP)


def test_the_clocks_of_a_turn():
    """Two groups of four warps. 64 x 64 x 16 takes 32 clocks of 2048 matmuls, and reads 2 x 2 KiB: 32 of 128 bytes.

    64 x 128 x 16 with its left factor in registers takes 64, and reads 4 KiB in 32.
    """
    found = clocks.count(LOOP, warps=8, sm=90)
    assert found.tensor == 2 * (32 + 64)
    assert found.operands == 2 * (32 + 32)
    assert found.matrix == 2 * (32 + 64)
    assert found.exp2 == 8 * 32 / 16
    assert found.issue == 6 * 8 / 4
    assert found.loads == pytest.approx(8 * 32 * 16 / 24)
    assert found.barriers == clocks.BARRIER
    assert found.without_overlap == found.matrix + found.issue
    assert found.limit == "tensor"
    assert found.per_pairs(4).tensor == 4 * found.tensor


def test_narrow_products_wait_for_their_operands():
    """64 x 16 x 16 takes 8 clocks, and reads 2.5 KiB in 20."""
    narrow = (
        LOOP.replace("LDGSTS", "LDG")
        .replace("64x64x16", "64x16x16")
        .replace("64x128x16", "64x16x16")
        .replace("R40, gdesc", "gdesc")
    )
    found = clocks.count(narrow, warps=4, sm=90)
    assert (found.tensor, found.matrix) == (16, 40)
    assert found.limit == "operands"


def test_matmuls_of_single_warps():
    """16 x 8 x 16 are 2048 matmuls per warp: an A100 makes 1024 in a clock."""
    code = LOOP.replace("HGMMA.64x64x16.F32.BF16", "HMMA.16816.F32.BF16").replace("HGMMA.64x128x16", "IADD3")
    assert clocks.count(code, warps=4, sm=80).matrix == 4 * 2


def test_unknown_machine_code_is_refused():
    with pytest.raises(ValueError, match="no matrix instruction"):
        clocks.count(LOOP.replace("HGMMA", "UTCHMMA"), warps=4, sm=90)


@pytest.mark.slow
def test_the_hosts_time_is_shown_beside_the_bare_operators(device, capsys):
    """And attention adds little to it; what torch.func.jvp takes for any function is the first row."""
    assert host_time.main() == 0
    rows = {line[:36].strip(): float(line[36:].split()[0]) for line in capsys.readouterr().out.splitlines()}
    nothing, bare, ours = list(rows.values())[:3]
    assert 0 < nothing < ours
    assert ours < 1.5 * bare
    assert rows["dual_attention"] < ours
