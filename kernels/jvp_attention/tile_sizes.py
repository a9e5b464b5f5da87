"""Tiles: how much of the work one program of a kernel takes at a time, by default and when tuned.

A program keeps the tile that it was given in registers or shared memory and streams through the others. The defaults
were chosen by compiling for sm_90 (`python -m jvp_attention.compile_report`), not by timing.
"""

import os
from typing import Any, NamedTuple


class Tiles(NamedTuple):
    """Sizes of a program's tiles and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int  # of loads under way

    def sizes(self) -> dict[str, int]:
        """As arguments of a kernel."""
        return {"QUERIES": self.queries, "KEYS": self.keys}

    def options(self) -> dict[str, Any]:
        """As options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# kernel -> channels of a tile -> tiles for 16-bit inputs; the first is the default
SIXTEEN_BIT: dict[str, dict[int, list[Tiles]]] = {
    "forward": {
        64: [Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3)],
        128: [Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3)],
        256: [Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)],
    },
    "forward_dual": {
        64: [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)],
        128: [Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)],
        256: [Tiles(64, 16, 8, 2), Tiles(64, 32, 8, 1)],
    },
    "query": {
        64: [Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)],
        128: [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)],
        256: [Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)],
    },
    "query_dual": {
        64: [Tiles(128, 32, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2)],
        128: [Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)],
        256: [Tiles(64, 16, 8, 1)],
    },
    "key": {
        64: [Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2)],
        128: [Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 2)],
        256: [Tiles(16, 64, 8, 2)],
    },
    "key_dual": {
        64: [Tiles(32, 128, 8, 2)],
    },
    "key_dual_k": {
        128: [Tiles(16, 128, 8, 2), Tiles(32, 128, 8, 2)],
        256: [Tiles(16, 64, 8, 1)],
    },
    "key_dual_v": {
        128: [Tiles(32, 128, 8, 2)],
        256: [Tiles(16, 64, 8, 2)],
    },
    "row_sum": {
        128: [Tiles(64, 64, 4, 1)],
        256: [Tiles(16, 16, 4, 1)],
    },
}

# float32 takes twice the memory and three products for one
FLOAT32: dict[str, dict[int, list[Tiles]]] = {
    name: {
        channels: [Tiles(16, size, 4, 1) if name.startswith("key") else Tiles(size, 16, 4, 1)]
        for channels, size in ((64, 64), (128, 32), (256, 16))
    }
    for name in SIXTEEN_BIT
}

SMALLEST_CHANNELS = 16  # of a matrix product in a kernel
LARGEST_TILE = 128  # rows


def channels_of_tile(d: int) -> int:
    """The size of a tile that holds D channels: the next power of two, at least SMALLEST_CHANNELS."""
    return max(SMALLEST_CHANNELS, 1 << (d - 1).bit_length())


def candidates(name: str, channels: int, itemsize: int) -> list[Tiles]:
    """The tiles to choose from for a kernel, by the channels of a tile and the bytes of a number; default first."""
    table = (SIXTEEN_BIT if itemsize == 2 else FLOAT32)[name]
    return table[min(c for c in table if c >= min(channels, max(table)))]


def splits_keys(channels: int, itemsize: int) -> bool:
    """Whether the dual backward's key side takes two launches: four sums of 128 channels do not fit the registers."""
    return channels * itemsize > 2 * max(SIXTEEN_BIT["key_dual"])


def is_tuning() -> bool:
    """Whether launches choose the fastest of their candidates: JVP_ATTENTION_TUNE=1 in the environment."""
    return os.environ.get("JVP_ATTENTION_TUNE") == "1"
