"""Tile sizes: how much work one program of a kernel takes at a time, by card, by default and when tuned.

A program keeps its own tile in registers or shared memory and streams through the others. The shared memory that a
block may have decides between two tables: LARGE for Hopper and data-centre Blackwell (sm_90, sm_100: 227
KiB), SMALL for all others from sm_80 on (99 KiB on sm_86, sm_89 and sm_120). Sizes were chosen by what the compiler
makes of them (`kernels/tools/compile_report.py`: shared memory, registers, spills), not by timing.
"""

import functools
import os
from typing import Any, NamedTuple


class Tiles(NamedTuple):
    """Sizes of a program's tiles and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int  # loads in flight
    effort: int = 3  # optimisation level of the assembler (-O)

    def sizes(self) -> dict[str, int]:
        """Return the sizes as arguments of a kernel."""
        return {"QUERIES": self.queries, "KEYS": self.keys}

    def options(self) -> dict[str, Any]:
        """Return the compiler options of a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.effort == 3 else options | {"ptx_options": f"-O{self.effort}"}


Table = dict[str, dict[int, list[Tiles]]]  # kernel -> channels of a tile -> tiles; the first is the default

# 16-bit inputs, 227 KiB of shared memory; at 64 channels the last of a list leaves room for a second block
LARGE: Table = {
    "forward": {
        64: [Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3)],
        128: [Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3)],
        256: [Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)],
    },
    "forward_dual": {
        64: [Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)],
        128: [Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)],
        256: [Tiles(64, 16, 8, 2), Tiles(64, 32, 8, 1)],
    },
    "query": {
        64: [Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)],
        128: [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)],
        256: [Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)],
    },
    "query_dual": {
        64: [Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 64, 4, 2)],
        128: [Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)],
        256: [Tiles(64, 16, 8, 1)],
    },
    "key": {
        64: [Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2)],
        128: [Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 2)],
        256: [Tiles(16, 64, 8, 2)],
    },
    "key_dual": {
        64: [Tiles(32, 64, 4, 2), Tiles(32, 128, 8, 2)],
    },
    "key_dual_k": {
        128: [Tiles(32, 128, 8, 2), Tiles(16, 128, 8, 2)],
        256: [Tiles(16, 64, 8, 1)],
    },
    "key_dual_v": {
        128: [Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 64, 4, 2)],
        256: [Tiles(16, 64, 8, 2)],
    },
    "row_sum": {128: [Tiles(64, 64, 4, 1)], 256: [Tiles(16, 16, 4, 1)]},
}

# 16-bit inputs, 99 KiB; matrix units that read registers, so that large tiles spill before they do not fit
SMALL: Table = {
    "forward": {
        64: [Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2)],
        128: [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)],
        256: [Tiles(64, 32, 8, 2)],
    },
    "forward_dual": {64: [Tiles(64, 64, 4, 2)], 128: [Tiles(64, 32, 4, 2)], 256: [Tiles(32, 16, 4, 2)]},
    "query": {
        64: [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)],
        128: [Tiles(64, 32, 4, 2)],
        256: [Tiles(32, 16, 4, 2)],
    },
    "query_dual": {64: [Tiles(64, 32, 4, 2)], 128: [Tiles(64, 16, 4, 2)], 256: [Tiles(32, 16, 4, 1)]},
    "key": {64: [Tiles(64, 64, 4, 2)], 128: [Tiles(32, 64, 4, 2)], 256: [Tiles(16, 32, 4, 2)]},
    "key_dual": {64: [Tiles(16, 64, 4, 2)]},
    "key_dual_k": {128: [Tiles(16, 64, 4, 2)], 256: [Tiles(16, 32, 4, 1)]},
    "key_dual_v": {128: [Tiles(32, 64, 4, 2)], 256: [Tiles(16, 32, 4, 2)]},
    "row_sum": {128: [Tiles(64, 64, 4, 1)], 256: [Tiles(16, 16, 4, 1)]},
}


def _float32(sizes: dict[int, int], of_duals: dict[int, int]) -> Table:
    """Tiles for float32, twice the memory and three matmuls for one: 16 streamed past as many as fit the channels.

    Derivatives of more than 64 channels need more registers than there are. At its usual effort ptxas then gives up,
    uses 32 and spills 6 to 15 KB; with less it uses 255 and spills 0.2 to 1.3 KB.
    """

    def tiles(name: str, channels: int, size: int) -> Tiles:
        effort = 1 if "dual" in name and channels > 64 else 3
        return Tiles(16, size, 4, 1, effort) if name.startswith("key") else Tiles(size, 16, 4, 1, effort)

    return {
        name: {channels: [tiles(name, channels, n)] for channels, n in (of_duals if "dual" in name else sizes).items()}
        for name in LARGE
    }


LARGE_FLOAT32 = _float32({64: 64, 128: 32, 256: 16}, {64: 64, 128: 16, 256: 16})
SMALL_FLOAT32 = _float32({32: 64, 64: 32, 128: 16}, {32: 64, 64: 32, 128: 16})
for _table in (LARGE_FLOAT32, SMALL_FLOAT32):  # more keys fit here
    _table["forward_dual"][128] = [Tiles(16, 32, 4, 1, 1)]

LARGE_KIB, SMALL_KIB = 227, 99  # shared memory per block that the tables assume
SMALLEST_CHANNELS = 16  # least that a matmul in a kernel takes
LARGEST_TILE = 128  # rows
SHORT = 1024  # rows: up to here the room for a second block on a multiprocessor counts for more than large tiles


def channels_of_tile(d: int) -> int:
    """Return the size of a tile that holds D channels: the next power of two, at least SMALLEST_CHANNELS."""
    return max(SMALLEST_CHANNELS, 1 << (d - 1).bit_length())


@functools.cache
def candidates(name: str, channels: int, itemsize: int, kib: int = LARGE_KIB, short: bool = False) -> list[Tiles]:
    """List the tiles to choose from for a kernel; default first, then what to fall back to. Empty if none fits.

    Args:
        name: name of the kernel in the tables.
        channels: channels of a tile.
        itemsize: bytes of a number.
        kib: KiB of shared memory that a block may have.
        short: prefer tiles that leave room for two blocks on a multiprocessor; for sequences of at most SHORT.
    """
    tables = (SMALL, LARGE) if itemsize == 2 else (SMALL_FLOAT32, LARGE_FLOAT32)
    small, large = (_of_channels(table[name], channels) for table in tables)
    if kib < LARGE_KIB:
        return small if kib >= SMALL_KIB else []
    if short and channels <= 64:
        large = sorted(large, key=lambda tiles: tiles.warps)
    return large + [tiles for tiles in small if tiles not in large]


def _of_channels(table: dict[int, list[Tiles]], channels: int) -> list[Tiles]:
    """Return the smallest entry that holds these channels; only row sums may take more than the table has."""
    return table[min(c for c in table if c >= channels)] if channels <= max(table) else []


def splits_keys(channels: int, itemsize: int) -> bool:
    """Return whether the dual backward takes two launches for keys: registers cannot hold four sums of 128 channels."""
    return channels * itemsize > 2 * max(LARGE["key_dual"])


def is_tuning() -> bool:
    """Return whether launches choose the fastest of their candidates: JVP_ATTENTION_TUNE=1 in the environment."""
    return os.environ.get("JVP_ATTENTION_TUNE") == "1"
