"""Tuples of tiles: the arithmetic of the pooling kernels.

A tile is (LANES, VECTOR). A row of an image is a tuple of tiles, one for each column of a lane.
Maxima and comparisons are the same for every dtype. On NVIDIA GPUs from sm_90 on they take 16-bit
numbers two per instruction (PACKED): successive channels of a tile, or, where a lane has one
channel, tiles of successive columns. Triton widens such numbers, and its masks are predicates, of
which a thread has seven; so these instructions are inline PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bits(tiles, t: tl.constexpr, COUNT: tl.constexpr):
    """The 16 bits of tile t, or of the last tile if there are fewer."""
    return tiles[min(t, COUNT - 1)].to(tl.int16, bitcast=True)


@triton.jit
def maximum(a, b, COUNT: tl.constexpr, PACKED: tl.constexpr):
    """The greater of two tuples of COUNT tiles, tile by tile. A NaN wins."""
    PAIR: tl.constexpr = "bf16x2" if a[0].dtype == tl.bfloat16 else "f16x2"
    greater = ()
    if PACKED and a[0].shape[1] > 1:
        for t in tl.static_range(COUNT):
            tile = tl.inline_asm_elementwise(
                "max.NaN." + PAIR + " $0, $1, $2;",
                "=r,r,r",
                [a[t], b[t]],
                dtype=a[0].dtype,
                is_pure=True,
                pack=2,
            )
            greater = greater + (tile,)
    elif PACKED:
        for t in tl.static_range(0, COUNT, 2):
            one, other = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; mov.b32 a, {$2, $3}; mov.b32 b, {$4, $5};"
                " max.NaN." + PAIR + " a, a, b; mov.b32 {$0, $1}, a; }",
                "=h,=h,h,h,h,h",
                [
                    _bits(a, t, COUNT),
                    _bits(a, t + 1, COUNT),
                    _bits(b, t, COUNT),
                    _bits(b, t + 1, COUNT),
                ],
                dtype=(tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
            greater = greater + (one.to(a[0].dtype, bitcast=True),)
            if t + 1 < COUNT:
                greater = greater + (other.to(a[0].dtype, bitcast=True),)
    else:
        for t in tl.static_range(COUNT):
            tile = tl.maximum(a[t], b[t], propagate_nan=tl.PropagateNan.ALL)
            greater = greater + (tile,)
    return greater


@triton.jit
def slide(columns, COUNT: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr):
    """COUNT maxima of K successive tiles each; their first tiles are STEP apart."""
    best = columns[0 : COUNT * STEP : STEP]
    for i in tl.static_range(1, K):
        best = maximum(best, columns[i : i + COUNT * STEP : STEP], COUNT, PACKED)
    return best


@triton.jit
def is_greater(a, b, COUNT: tl.constexpr, PACKED: tl.constexpr, OP: tl.constexpr):
    """Where a > b (OP "gt"), or not a <= b (OP "gtu"), tile by tile.

    The masks are conditions, or, if PACKED, words with all bits set or none.
    """
    PAIR: tl.constexpr = "bf16x2" if a[0].dtype == tl.bfloat16 else "f16x2"
    masks = ()
    if PACKED and a[0].shape[1] > 1:
        for t in tl.static_range(COUNT):
            mask = tl.inline_asm_elementwise(
                "{ .reg .b32 m; set." + OP + ".u32." + PAIR + " m, $2, $3;"
                " prmt.b32 $0, m, 0, 0x1010; prmt.b32 $1, m, 0, 0x3232; }",
                "=r,=r,r,r",
                [a[t], b[t]],
                dtype=tl.int32,
                is_pure=True,
                pack=2,
            )
            masks = masks + (mask,)
    elif PACKED:
        for t in tl.static_range(0, COUNT, 2):
            one, other = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; mov.b32 a, {$2, $3}; mov.b32 b, {$4, $5};"
                " set." + OP + ".u32." + PAIR + " a, a, b;"
                " prmt.b32 $0, a, 0, 0x1010; prmt.b32 $1, a, 0, 0x3232; }",
                "=r,=r,h,h,h,h",
                [
                    _bits(a, t, COUNT),
                    _bits(a, t + 1, COUNT),
                    _bits(b, t, COUNT),
                    _bits(b, t + 1, COUNT),
                ],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
            masks = masks + (one,)
            if t + 1 < COUNT:
                masks = masks + (other,)
    else:
        for t in tl.static_range(COUNT):
            if OP == "gt":
                masks = masks + (a[t] > b[t],)
            else:
                masks = masks + ((a[t] <= b[t]) == 0,)
    return masks


@triton.jit
def keep(tile, mask):
    """The tile where the mask of `is_greater` holds, else zeros."""
    if mask.dtype == tl.int1:
        return tl.where(mask, tile, 0.0)
    else:
        return (tile.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)


@triton.jit
def _select(tile, a, b, TABLE: tl.constexpr):
    """The bits of a tile selected by two masks, in one instruction.

    TABLE is the truth table, with the tile as 0xf0, a as 0xcc and b as 0xaa.
    """
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, " + TABLE + ";",
        "=f,f,r,r",
        [tile, a, b],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _deal(tile, masks):
    """A window's gradient, given to one of its K elements: a tile for each.

    The last element whose mask holds gets it, else the first. There are K - 1 masks.
    """
    K: tl.constexpr = len(masks) + 1
    if K == 2 and masks[0].dtype == tl.int32:
        return (
            _select(tile, masks[0], masks[0], "0x30"),
            _select(tile, masks[0], masks[0], "0xc0"),
        )
    elif K == 3 and masks[0].dtype == tl.int32:
        return (
            _select(tile, masks[0], masks[1], "0x10"),
            _select(tile, masks[0], masks[1], "0x40"),
            _select(tile, masks[1], masks[1], "0xc0"),
        )
    else:
        given = ()
        for j in tl.static_range(1, K):
            given = (keep(tile, masks[K - 1 - j]),) + given
            tile = keep(tile, ~masks[K - 1 - j])
        return (tile,) + given


@triton.jit
def route(values, gradients, first, FIRST: tl.constexpr, COUNT: tl.constexpr, PACKED: tl.constexpr):
    """The gradients of COUNT windows, given to the greatest value of each, the first of equals.

    `values` are K tuples of COUNT tiles: the windows' first elements, their second ones, and so on.
    The result is COUNT tuples of K tiles. Where the mask `first` holds, windows contain the image's
    first element, and the elements before it do not count. FIRST is that element's place in every
    window, or "each" for successive windows, where its places are K - 1, K - 2, ... A window that
    holds a NaN gives its gradient to one of its elements.
    """
    K: tl.constexpr = len(values)
    best = values[0]
    masks = ()
    for j in tl.static_range(1, K):
        greater = is_greater(values[j], best, COUNT, PACKED, "gt")
        forced = ()
        for t in tl.static_range(COUNT):
            if (FIRST == "each" and t == K - 1 - j) or j == FIRST:
                forced = forced + (greater[t] | first,)
            else:
                forced = forced + (greater[t],)
        masks = masks + (forced,)
        if j < K - 1:
            best = maximum(best, values[j], COUNT, PACKED)
    dealt = ()
    for t in tl.static_range(COUNT):
        dealt = dealt + (_deal(gradients[t], column(masks, t, K - 1)),)
    return dealt


@triton.jit
def column(rows, t: tl.constexpr, COUNT: tl.constexpr):
    """The t-th tile of each of COUNT rows.

    COUNT is an argument because Triton 3.6 tells calls apart by the total number of tiles and by
    constants, and not by the number of rows.
    """
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (rows[i][t],)
    return tiles


@triton.jit
def add(a, b, COUNT: tl.constexpr):
    """The sums of two tuples of COUNT tiles, tile by tile."""
    sums = ()
    for t in tl.static_range(COUNT):
        sums = sums + (a[t] + b[t],)
    return sums


@triton.jit
def split(tile, COUNT: tl.constexpr):
    """The COUNT slices of a (LANES, VECTOR, COUNT) tile. No element changes its thread."""
    if COUNT == 1:
        return (tile.reshape(tile.shape[0], tile.shape[1]),)
    elif COUNT == 2:
        return tl.split(tile)
    else:
        even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1], COUNT // 2, 2))
        evens, odds = split(even, COUNT // 2), split(odd, COUNT // 2)
        slices = ()
        for i in tl.static_range(COUNT // 2):
            slices = slices + (evens[i], odds[i])
        return slices


@triton.jit
def join(slices, COUNT: tl.constexpr):
    """The inverse of `split`."""
    if COUNT == 1:
        return slices[0][:, :, None]
    elif COUNT == 2:
        return tl.join(slices[0], slices[1])
    else:
        joined = tl.join(join(slices[0::2], COUNT // 2), join(slices[1::2], COUNT // 2))
        return joined.reshape(joined.shape[0], joined.shape[1], COUNT)
