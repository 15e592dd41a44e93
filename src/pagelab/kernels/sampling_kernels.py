"""The kernels of `sampling`, which says what each is for and in what order they run."""

from __future__ import annotations

import triton
import triton.language as tl

from pagelab.kernels.launch import begin


@triton.jit
def _load(row, i, count, banned, num_banned):
    """Logits at `i` in float32; -inf past the end and for forbidden tokens."""
    x = tl.load(row + i, mask=i < count, other=float("-inf")).to(tl.float32)
    for j in range(num_banned):
        x = tl.where(i == tl.load(banned + j), float("-inf"), x)
    return x


@triton.jit
def _count_banned(row, output_index, num_suppressed, min_until):
    applies = tl.load(output_index + row) < tl.load(min_until + row)
    return tl.where(applies, tl.load(num_suppressed + row), 0)


@triton.jit
def _inverse(temperature):
    """1 / temperature, finite and above 0; 1 for greedy rows."""
    inside = tl.minimum(tl.maximum(temperature, 1e-30), 1e30)
    return tl.where(temperature > 0, 1.0 / inside, 1.0)


@triton.jit
def _load_filters(row, temperature, top_k, top_p, min_p, vocab):
    """top_k (0 where it keeps all), top_p, the log of min_p, and whether the row has filters."""
    k = tl.load(top_k + row)
    k = tl.where((k > 0) & (k < vocab), k, 0)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    active = (tl.load(temperature + row) > 0) & ((k > 0) | (p < 1) | (least > 0))
    return k, p, tl.log(tl.maximum(least, 1e-37)), active


@triton.jit
def _words(seed, index, group):
    """Four random words for each group of four tokens."""
    none = group * 0
    return tl.philox(seed, group, none + index, none, none)


@triton.jit
def _gumbel(bits):
    """-log(-log(1 - v)), v = (bits + 1/2) / 2^32: the resolution is where large results are.

    With u = 1 - v rounded to float32 instead, the largest of 150,000 would come in steps of 1 %.
    """
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 0.99999994)  # the last float32 below 1
    series = v * (1 + v * (0.5 + v * (1 / 3 + v * 0.25)))
    return -tl.log(tl.where(v < 0.015625, series, -tl.log(1 - v)))


@triton.jit
def _row_peak(peaks, s, tiles, TILES: tl.constexpr):
    """The highest logit of a row, and whether it is finite and no logit is NaN."""
    t = tl.arange(0, TILES)
    peak = tl.load(peaks + s * tiles + t, mask=t < tiles, other=float("-inf"))
    nan = tl.max((peak != peak).to(tl.int32), 0)
    highest = tl.max(tl.where(peak == peak, peak, float("-inf")), 0)
    return highest, (nan == 0) & (tl.abs(highest) < float("inf"))


@triton.jit
def scan_logits(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    output_index,
    suppressed,
    num_suppressed,
    min_until,
    peaks,
    scores,
    tokens,
    vocab,
    stride,
    TILE: tl.constexpr,
    BANNED: tl.constexpr,
    MODE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile's highest logit (NaN if any is), best token, and its score relative to that logit.

    Relative, since the row's highest is not known yet and a tiny temperature would overflow.
    """
    begin(PDL)
    s = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.load(rows + s)
    num_banned = _count_banned(row, output_index, num_suppressed, min_until)
    token = tile * TILE + tl.arange(0, TILE)
    x = _load(logits + s.to(tl.int64) * stride, token, vocab, suppressed + row * BANNED, num_banned)
    peak, best = tl.max(x, 0, return_indices=True)
    nan = tl.max((x != x).to(tl.int32), 0) != 0
    at = s * tl.num_programs(1) + tile
    tl.store(peaks + at, tl.where(nan, float("nan"), peak))
    if MODE > 0:
        score = tl.full([], 0.0, tl.float32)
        degree = tl.load(temperature + row)
        drawn = degree > 0
        if MODE == 2:
            _, _, _, filtered = _load_filters(row, temperature, top_k, top_p, min_p, vocab)
            drawn = drawn & (not filtered)
        if drawn:
            group = tile * (TILE // 4) + tl.arange(0, TILE // 4)
            a, b, c, d = _words(tl.load(seed + row), tl.load(output_index + row), group)
            bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
            base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
            score, best = tl.max(
                (x - base) * _inverse(degree) + _gumbel(bits), 0, return_indices=True
            )
        tl.store(scores + at, score)
    tl.store(tokens + at, tile * TILE + best)


@triton.jit
def _level(i, LEVELS: tl.constexpr):
    """How far below the highest logit, after temperature, level i lies."""
    return tl.where(i == LEVELS - 1, -3.0e38, ((i + 1) * (i + 1)).to(tl.float32) * -0.125)


@triton.jit
def weigh_levels(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    output_index,
    suppressed,
    num_suppressed,
    min_until,
    peaks,
    counts,
    masses,
    vocab,
    stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    BANNED: tl.constexpr,
    LEVELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """For each level, how many of a tile's tokens lie above and the sum of their exponentials."""
    begin(PDL)
    s = tl.program_id(0)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    row = tl.load(rows + s)
    _, _, _, filtered = _load_filters(row, temperature, top_k, top_p, min_p, vocab)
    if not filtered:
        return
    peak, usable = _row_peak(peaks, s, tiles, TILES)
    if not usable:
        return
    num_banned = _count_banned(row, output_index, num_suppressed, min_until)
    scale = _inverse(tl.load(temperature + row))
    i = tl.arange(0, LEVELS)
    level = _level(i, LEVELS)
    count = tl.zeros([LEVELS, CHUNK], tl.int32)
    mass = tl.zeros([LEVELS, CHUNK], tl.float32)
    for start in range(0, TILE, CHUNK):
        token = tile * TILE + start + tl.arange(0, CHUNK)
        x = _load(
            logits + s.to(tl.int64) * stride, token, vocab, suppressed + row * BANNED, num_banned
        )
        z = (x - peak) * scale
        above = z[None, :] >= level[:, None]
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(z)[None, :], 0.0)
    at = (s * tiles + tile) * LEVELS + i
    tl.store(counts + at, tl.sum(count, 1))
    tl.store(masses + at, tl.sum(mass, 1))


@triton.jit
def _candidates(counts, masses, s, tiles, k, p, floor, TILES: tl.constexpr, LEVELS: tl.constexpr):
    """The first level with all tokens that the filters can keep.

    Returns its index, the tokens above it in each tile, in all, and the mass of the whole row.
    """
    t = tl.arange(0, TILES)
    i = tl.arange(0, LEVELS)
    at = (s * tiles + t[:, None]) * LEVELS + i[None, :]
    live = (t < tiles)[:, None] & (i >= 0)[None, :]
    count = tl.load(counts + at, mask=live, other=0)
    mass = tl.sum(tl.load(masses + at, mask=live, other=0.0), 0)
    whole = tl.sum(tl.where(i == LEVELS - 1, mass, 0.0), 0)
    enough = tl.where(
        k > 0, tl.sum(count, 0) >= k, tl.where(p < 1, mass >= p * whole, _level(i, LEVELS) <= floor)
    )
    chosen = tl.min(tl.where(enough, i, LEVELS - 1), 0)
    each = tl.sum(tl.where(i[None, :] == chosen, count, 0), 1)
    return chosen, each, tl.sum(each, 0), whole


@triton.jit
def gather_candidates(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    output_index,
    suppressed,
    num_suppressed,
    min_until,
    peaks,
    counts,
    masses,
    values,
    ids,
    vocab,
    stride,
    capacity,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BANNED: tl.constexpr,
    LEVELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy a tile's candidates to their places in the row's list, which is in order of token."""
    begin(PDL)
    s = tl.program_id(0)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    row = tl.load(rows + s)
    k, p, floor, filtered = _load_filters(row, temperature, top_k, top_p, min_p, vocab)
    if not filtered:
        return
    peak, usable = _row_peak(peaks, s, tiles, TILES)
    if not usable:
        return
    chosen, each, count, _ = _candidates(counts, masses, s, tiles, k, p, floor, TILES, LEVELS)
    if count > capacity:
        return
    t = tl.arange(0, TILES)
    if tl.sum(tl.where(t == tile, each, 0), 0) == 0:
        return
    before = tl.sum(tl.where(t < tile, each, 0), 0)
    num_banned = _count_banned(row, output_index, num_suppressed, min_until)
    token = tile * TILE + tl.arange(0, TILE)
    x = _load(logits + s.to(tl.int64) * stride, token, vocab, suppressed + row * BANNED, num_banned)
    z = (x - peak) * _inverse(tl.load(temperature + row))
    above = z >= _level(chosen, LEVELS)
    to = s * capacity + before + tl.cumsum(above.to(tl.int32), 0) - 1
    tl.store(values + to, x, mask=above)
    tl.store(ids + to, token, mask=above)


@triton.jit
def _key(x):
    """Unsigned integers in the order of the numbers; -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _search(
    values,
    count,
    banned,
    num_banned,
    peak,
    scale,
    low,
    target,
    MASS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest key from `low` on such that the tokens from it up are `target` (or weigh it).

    Four-way: a pass looks at three keys, and 16 passes tell 32 bits apart. More ways would take
    fewer passes and more comparisons in all.
    """
    high = _key(peak) + 1  # too high
    while high - low > 1:
        quarter = (high - low) >> 2
        half = (high - low) >> 1
        key1 = low + quarter
        key2 = low + half
        key3 = key2 + quarter
        sum1 = tl.zeros([CHUNK], tl.float32)
        sum2 = tl.zeros([CHUNK], tl.float32)
        sum3 = tl.zeros([CHUNK], tl.float32)
        for start in range(0, count, CHUNK):
            x = _load(values, start + tl.arange(0, CHUNK), count, banned, num_banned)
            key = _key(x)
            if MASS:
                weight = tl.exp((x - peak) * scale)
            else:
                weight = tl.full([CHUNK], 1.0, tl.float32)
            sum1 += tl.where(key >= key1, weight, 0.0)
            sum2 += tl.where(key >= key2, weight, 0.0)
            sum3 += tl.where(key >= key3, weight, 0.0)
        is1 = tl.sum(sum1, 0) >= target
        is2 = tl.sum(sum2, 0) >= target
        is3 = tl.sum(sum3, 0) >= target
        low = tl.where(is3, key3, tl.where(is2, key2, tl.where(is1, key1, low)))
        high = tl.where(is1, tl.where(is2, tl.where(is3, high, key3), key2), key1)
    return low


@triton.jit
def _draw(
    values,
    ids,
    count,
    banned,
    num_banned,
    peak,
    scale,
    whole,
    k,
    p,
    floor,
    seed,
    index,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Filter and draw from `count` values, which are those of `ids` or of the whole row.

    Returns the token and the lowest logit that the filters kept.
    """
    low = tl.full([], 0x007FFFFF, tl.uint32)  # the key of -inf
    if k > 0:
        low = _search(
            values, count, banned, num_banned, peak, scale, low, k.to(tl.float32), False, CHUNK
        )
        if p < 1:
            mass = tl.zeros([CHUNK], tl.float32)
            for start in range(0, count, CHUNK):
                x = _load(values, start + tl.arange(0, CHUNK), count, banned, num_banned)
                mass += tl.where(_key(x) >= low, tl.exp((x - peak) * scale), 0.0)
            whole = tl.sum(mass, 0)
    if p < 1:
        low = _search(values, count, banned, num_banned, peak, scale, low, p * whole, True, CHUNK)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    chosen = tl.zeros([CHUNK], tl.int32)
    lowest = tl.full([CHUNK], float("inf"), tl.float32)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        x = _load(values, i, count, banned, num_banned)
        if LISTED:
            token = tl.load(ids + i, mask=i < count, other=0)
        else:
            token = i
        z = (x - peak) * scale
        kept = (_key(x) >= low) & (z >= floor)
        a, b, c, d = _words(seed, index, token >> 2)
        word = token & 3
        bits = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
        score = tl.where(kept, z + _gumbel(bits), float("-inf"))
        chosen = tl.where(score > best, token, chosen)
        best = tl.maximum(score, best)
        lowest = tl.minimum(lowest, tl.where(kept, x, float("inf")))
    first = tl.min(tl.where(best == tl.max(best, 0), chosen, 0x7FFFFFFF), 0)
    return first, tl.min(lowest, 0)


@triton.jit
def draw_tokens(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    output_index,
    suppressed,
    num_suppressed,
    min_until,
    peaks,
    scores,
    tokens,
    counts,
    masses,
    values,
    ids,
    lowest,
    out,
    finite,
    vocab,
    stride,
    tiles,
    capacity,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    BANNED: tl.constexpr,
    LEVELS: tl.constexpr,
    MODE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row's token: of the best tile, or drawn from the candidates."""
    begin(PDL)
    s = tl.program_id(0)
    row = tl.load(rows + s)
    peak, usable = _row_peak(peaks, s, tiles, TILES)
    tl.store(finite + s, usable.to(tl.int32))
    if not usable:
        tl.store(out + s, 0)
        return
    scale = _inverse(tl.load(temperature + row))
    if MODE == 2:
        k, p, floor, filtered = _load_filters(row, temperature, top_k, top_p, min_p, vocab)
        if filtered:
            number = tl.load(seed + row)
            index = tl.load(output_index + row)
            banned = suppressed + row * BANNED
            _, _, count, whole = _candidates(counts, masses, s, tiles, k, p, floor, TILES, LEVELS)
            if count <= capacity:
                at = s * capacity
                token, least = _draw(
                    values + at,
                    ids + at,
                    count,
                    banned,
                    0,
                    peak,
                    scale,
                    whole,
                    k,
                    p,
                    floor,
                    number,
                    index,
                    True,
                    CHUNK,
                )
            else:
                num_banned = _count_banned(row, output_index, num_suppressed, min_until)
                token, least = _draw(
                    logits + s.to(tl.int64) * stride,
                    ids,
                    vocab,
                    banned,
                    num_banned,
                    peak,
                    scale,
                    whole,
                    k,
                    p,
                    floor,
                    number,
                    index,
                    False,
                    CHUNK,
                )
            tl.store(out + s, token)
            tl.store(lowest + s, least)
            return
    t = tl.arange(0, TILES)
    at = s * tiles + t
    total = (tl.load(peaks + at, mask=t < tiles, other=float("-inf")) - peak) * scale
    if MODE > 0:
        total += tl.load(scores + at, mask=t < tiles, other=float("-inf"))
    _, best = tl.max(total, 0, return_indices=True)  # the first of equals
    tl.store(out + s, tl.load(tokens + s * tiles + best))
