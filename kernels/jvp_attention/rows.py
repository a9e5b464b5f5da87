"""Functions that the kernels share: the tile of a program, reading and writing rows of a head, and row reductions.

A tensor [B, H, rows, D] reaches a kernel as the tuple (pointer, stride of B, stride of H, stride of rows), strides in
units of UNIT channels so that the compiler knows how they are aligned; channels lie side by side. Where a tile begins
is a 64-bit offset; inside a tile offsets have 32 bits, or 64 where UNIT is 1. Rows beyond a tensor's end read as zeros.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


# tl.sum and tl.max are these reductions. By their combiners' names they also work in an interpreter that is switched on
# after something else, such as torch.compile, has imported triton.
@triton.jit
def row_sum(x):
    """Sums over the last axis of x [rows, columns]."""
    return tl.reduce(x, 1, tl.standard._sum_combine)


@triton.jit
def partial_sums(x):
    """Eight sums per row of x [rows, columns], each over every eighth column: what one thread holds of a matmul."""
    return tl.reduce(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1, tl.standard._sum_combine)


@triton.jit
def row_max(x):
    """Maxima over the last axis of x [rows, columns]."""
    return tl.reduce(x, 1, tl.standard._elementwise_max)


@triton.jit
def tile_of_program(length, heads, SIZE: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Return the first row of this program's tile, its batch element and head, and the index of the two together.

    LAST_FIRST: programs that start first take the last tiles, which have the most to do if queries see keys up to
    their own index.
    """
    tiles = (length + SIZE - 1) // SIZE
    program = tl.program_id(0)
    head = program // tiles  # divided in 32 bits: a 64-bit division is a function call, with a stack
    b, h = head // heads, head % heads
    tile = program % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile * SIZE, b.to(tl.int64), h.to(tl.int64), head.to(tl.int64)


@triton.jit
def visible_keys(lengths, b, M):
    """Return how many keys are visible in batch element b: lengths[b], clamped to [0, M]; all M without lengths."""
    visible = M
    if lengths is not None:
        visible = tl.minimum(tl.maximum(tl.load(lengths + b), 0), M).to(tl.int32)
    return visible


@triton.jit
def row_pointers(x, b, h, start, UNIT: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers [SIZE, CHANNELS] to rows start, start + 1, ... of head (b, h) of x."""
    first = x[0] + (b * x[1] + h * x[2] + tl.cast(start, tl.int64) * x[3]) * UNIT
    rows = tl.arange(0, SIZE)
    if UNIT == 1:  # odd strides, or so large ones that a tile is too long for 32 bits
        rows = rows.to(tl.int64)
    offsets = rows[:, None] * (x[3] * UNIT) + tl.arange(0, CHANNELS)[None, :]
    if UNIT != 1:
        offsets = offsets.to(tl.uint32).to(tl.uint64)  # never negative: saves the registers of a sign's extension
    return first + offsets


@triton.jit
def load_rows(
    x,
    b,
    h,
    start,
    length,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows start, start + 1, ... of head (b, h) of x [SIZE, CHANNELS]; WHOLE: all of them exist."""
    pointers = row_pointers(x, b, h, start, UNIT, SIZE, CHANNELS)
    if WHOLE and D == CHANNELS:
        tile = tl.load(pointers)
    else:
        rows = start + tl.arange(0, SIZE)
        exists = (tl.arange(0, CHANNELS) < D)[None, :]
        if not WHOLE:
            exists = exists & (rows < length)[:, None]
        tile = tl.load(pointers, mask=exists, other=0.0)
    return tile


@triton.jit
def store_rows(
    x,
    value,
    b,
    h,
    start,
    length,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write value [SIZE, CHANNELS] to rows start, start + 1, ... of head (b, h) of x, in x's dtype."""
    exists = (start + tl.arange(0, SIZE) < length)[:, None] & (tl.arange(0, CHANNELS) < D)[None, :]
    pointers = row_pointers(x, b, h, start, UNIT, SIZE, CHANNELS)
    tl.store(pointers, value.to(x[0].dtype.element_ty), mask=exists)


@triton.jit
def load_numbers(x, head, start, length, SIZE: tl.constexpr):
    """Load one float32 per row from x [B H, length]: [SIZE], zero beyond the end."""
    rows = start + tl.arange(0, SIZE)
    return tl.load(x + head * length + rows, mask=rows < length, other=0.0)


@triton.jit
def store_numbers(x, value, head, start, length, SIZE: tl.constexpr):
    """Write one float32 per row, value [SIZE], to x [B H, length]."""
    rows = start + tl.arange(0, SIZE)
    tl.store(x + head * length + rows, value, mask=rows < length)


@triton.jit
def load_mask(mask, b, h, start, length, at, others, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load which pairs of a tile [ROWS, COLUMNS] are visible, by mask (pointer, four strides); outside of it none."""
    rows, columns = start + tl.arange(0, ROWS), at + tl.arange(0, COLUMNS)
    inside = (rows < length)[:, None] & (columns < others)[None, :]
    offsets = rows.to(tl.int64)[:, None] * mask[3] + columns.to(tl.int64)[None, :] * mask[4]
    return tl.load(mask[0] + b * mask[1] + h * mask[2] + offsets, mask=inside, other=0) != 0


@triton.jit
def keep_up_to(s, keys, last, needed):
    """Return logits s, -inf where a key's index exceeds the last visible one; unchanged unless that is `needed`."""
    if needed:
        s = tl.where(keys <= last, s, float("-inf"))
    return s


@triton.jit
def visible_tiles(tiles, b, h, start, SIZE: tl.constexpr):
    """Find the row of `tiles` for this tile: how many tiles of the other side are visible to it, and which."""
    return tiles[0] + b * tiles[1] + h * tiles[2] + (start // SIZE).to(tl.int64) * tiles[3]


@triton.jit
def visible_tiles_kernel(mask, tiles, heads, N, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """List for one tile of rows of a mask [.., N, M] the tiles of columns in which any pair is visible, in order.

    tiles is int32 [.., tiles of rows, 1 + tiles of columns]. Grid: tiles of rows x heads x batch of the mask.
    """
    start, b, h, _ = tile_of_program(N, heads, ROWS, False)
    row = visible_tiles(tiles, b, h, start, ROWS)
    count = 0
    for at in range(0, M, COLUMNS):
        visible = load_mask(mask, b, h, start, N, at, M, ROWS, COLUMNS).to(tl.int32)
        if tl.reduce(row_max(visible), 0, tl.standard._elementwise_max) > 0:
            count += 1
            tl.store(row + count, at // COLUMNS)
    tl.store(row, count)
