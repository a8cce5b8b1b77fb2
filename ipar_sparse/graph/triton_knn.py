"""k nearest neighbours on CUDA without writing all distances to memory: exact, and partitioned.

The columns are searched in random order, in parts that grow by a factor. After each part a row has
its k nearest so far, by float32 distance, and with them a bound. The distances of the next part
are computed in tiles on tensor cores, and only columns that may lie below the bound are written.
Since the columns are a random sample, these are about k (growth - 1) a part, apart from ties and
from the filter's margin.

The filter computes with float16 copies of the centred, scaled points. The distance of each copy to
its point is known, so that the triangle inequality, with a term for rounding, excludes no true
neighbour. The result is the k nearest by float32 distance, ties by number. A row with more
candidates than its buffer holds is reported, and never truncated.

The partitioned search uses the same kernels on the columns of near tiles alone, and truncates.
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..distributed import added_rows, rows_of
from ..ticks import counted
from .order import bisection_order

MAX_NEIGHBORS = 256
MAX_DIMENSIONS = 512
LEAST_PARTITIONED = 100_000
"""Points; with fewer, a partitioned search would look at most of them anyway."""
_GROWTH = 3.0  # of the columns searched from one part to the next
_BUFFER_BYTES = 1 << 30  # candidates of the rows searched together
_COLUMNS = 128  # columns that share one bound on their float16 copies' error
_FAR = tl.constexpr((1 << 63) - 1)
# Differences below this, in units where the largest coordinate is at least 2^13, may square to 0.
_TINY = 1e-17


def unsupported(points: Tensor, k: int) -> str | None:
    """Why these points cannot be searched here, or None if they can."""
    if not points.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"points on a CUDA device (given {points.device})"
    if points.dtype == torch.float64:
        return "float32 points or shorter (given float64)"
    if k > MAX_NEIGHBORS:
        return f"k up to {MAX_NEIGHBORS} (given {k})"
    if points.size(1) > MAX_DIMENSIONS:
        return f"up to {MAX_DIMENSIONS} dimensions (given {points.size(1)})"
    return None


def search(points: Tensor, k: int, *, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest of every point among the others, by exact float32 distance.

    Args:
        points: (n, d), finite, up to float32, d <= 512.
        k: 1 to min(n - 1, 256).
        capacity: candidates a row can hold, a power of two above k; chosen by k if left out.

    Returns:
        ``index`` (n, k) int32, nearest first, ties by number; ``lost`` (m,) int64, the rows whose
        candidates did not fit (many ties) and whose entries mean nothing.
    """
    n = points.size(0)
    capacity = capacity or max(128, triton.next_power_of_2(4 * k + 64))
    cloud = _Cloud(points, far=capacity // 8)
    index = torch.zeros(n, k, dtype=torch.int32, device=points.device)
    lost = torch.zeros(n, dtype=torch.uint8, device=points.device)
    rows, own = _BUFFER_BYTES // (8 * capacity), rows_of(n)
    for start in range(own.start, own.stop, rows):
        position = torch.arange(start, min(start + rows, own.stop), device=points.device)
        found, overflow = _search_block(cloud, position.int(), k, capacity)
        number = cloud.number[position].long()
        index[number] = found
        lost[number] = overflow.byte()
    return added_rows(index), added_rows(lost).nonzero().squeeze(-1)


def search_partitioned(points: Tensor, k: int, *, tiles: int = 512) -> Tensor:
    """Nearest neighbours among the points of the nearest ``tiles`` of 128 points; not always all.

    Points are cut into tiles by :func:`~ipar_sparse.graph.order.bisection_order`, and those of a
    tile compared with the points of the tiles whose centres are nearest. O(n tiles), beside
    O(n^2 / 128^2) for the centres. What is found is ranked by exact float32 distance.

    Args:
        points, k: as in :func:`search`, with more than 512 points for k of 100.
        tiles: more find more and take longer.

    Returns:
        (n, k) int32, nearest first, ties by number.
    """
    n, capacity = points.size(0), max(128, triton.next_power_of_2(4 * k + 64))
    cloud = _Cloud(points, order=bisection_order(points, leaf=_COLUMNS))
    centres, own = cloud.centres(), rows_of(n)
    tiles = min(tiles, len(centres))
    index = torch.zeros(n, k, dtype=torch.int32, device=points.device)
    rows = min(_BUFFER_BYTES // (8 * capacity), _COLUMNS * max(1, (1 << 28) // len(centres)))
    for start in counted(range(own.start, own.stop, rows)):
        position = torch.arange(start, min(start + rows, own.stop), device=points.device)
        asking = centres[
            start // _COLUMNS : triton.cdiv(int(min(start + rows, own.stop)), _COLUMNS)
        ]
        visits = torch.cdist(asking, centres).topk(tiles, largest=False).indices.int()
        found = _search_block(cloud, position.int(), k, capacity, visits)[0]
        index[cloud.number[position].long()] = found
    return added_rows(index)


class _Cloud:
    """The points centred and scaled, and their float16 copies in random or a given order.

    ``point`` (n, D) float32 in the user's order; in the other order and padded to whole tiles:
    ``code`` float16 copies, ``half`` half their squared norms less a margin for rounding,
    ``error`` their distances to the points, ``number`` the user's numbers. In random order the
    ``far`` points farthest out stand first.
    """

    def __init__(self, points: Tensor, far: int = 0, order: Tensor | None = None):
        n, d = points.shape
        device = points.device
        width = max(16, triton.next_power_of_2(d))
        self.point = torch.zeros(n, width, device=device)
        torch.sub(points.float(), points.float().mean(dim=0), out=self.point[:, :d])
        # A power of two that brings the largest coordinate below 2^14, half of float16's range.
        largest = torch.stack(self.point.aminmax()).abs().max()
        exponent = (14 - torch.frexp(largest).exponent).clamp(-126, 126)
        self.point *= torch.ldexp(torch.ones_like(largest), exponent)
        # Tensor cores truncate every term of every 16-wide step. The error of a product of
        # float16 rows is at most (d + 16) 2^-23 |a| |b|, and |a| |b| <= (|a|^2 + |b|^2) / 2. The
        # rest is for the other roundings of the filter.
        self.margin = (width + 32) * 2.0**-23
        # Those farthest out come first, where nothing is filtered: their copies' errors would
        # loosen the bounds of whole tiles.
        if order is None:
            chance = torch.rand(n, generator=torch.Generator(device).manual_seed(0), device=device)
            lengths = torch.linalg.vector_norm(self.point, dim=-1)
            chance[lengths.topk(min(far, n)).indices] = -1
            order = chance.argsort()
        # Copies are made around the median, since one far outlier can carry the mean away.
        centre = self.point[order[:: max(1, n // 4096)]].median(dim=0).values.double()
        padded = triton.cdiv(n, _COLUMNS) * _COLUMNS
        self.number = torch.full((padded,), -1, dtype=torch.int32, device=device)
        self.number[:n] = order
        self.code = torch.zeros(padded, width, dtype=torch.float16, device=device)
        self.half = torch.full((padded,), torch.inf, device=device)
        self.error = torch.zeros(padded, device=device)
        step = max(1, (1 << 23) // width)
        for start in range(0, n, step):
            here = slice(start, min(start + step, n))
            exact = self.point[order[here]] - centre
            code = exact.half()
            self.code[here] = code
            square = code.double().square().sum(-1)
            self.half[here] = (square * (0.5 * (1 - self.margin))).float()
            self.error[here] = (exact - code).norm(dim=-1).float() * (1 + self.margin) + _TINY
        self.tile_error = self.error.view(-1, _COLUMNS).amax(-1)

    def centres(self) -> Tensor:
        """Mean of the copies of every tile (tiles, D), float32."""
        real = self.half.isfinite().float().view(-1, _COLUMNS, 1)
        return (self.code.view(len(real), _COLUMNS, -1) * real).sum(1) / real.sum(1)


def _search_block(
    cloud: _Cloud, position: Tensor, k: int, capacity: int, visits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest of the points at some positions of the order, and who overflowed.

    Among all points, or those of the tiles (tiles of the rows, m) that each tile of rows visits.
    """
    device, num = position.device, position.numel()
    n, width = cloud.point.shape
    # First the columns alone, then, ranked, distance (float32 bits) and number in one integer.
    buffer = torch.empty(num, capacity, dtype=torch.int64, device=device)
    end = min(capacity, n)
    if visits is None:
        buffer[:, :end] = torch.arange(end, device=device)
    else:
        n, end = _COLUMNS * visits.size(1), capacity
        first = visits[:, : capacity // _COLUMNS, None].long() * _COLUMNS
        first = (first + torch.arange(_COLUMNS, device=device)).flatten(1)
        buffer[:] = first.repeat_interleave(_COLUMNS, 0)[:num]
    fill = torch.full((num,), end, dtype=torch.int32, device=device)
    overflow = torch.zeros(num, dtype=torch.bool, device=device)
    bound, reach = (torch.empty(num, device=device) for _ in range(2))
    ranked = 1 if position.is_cuda else 64  # rows a program; the interpreter pays by the program

    def rank(kept: int) -> None:
        """Rank the candidates, of which the first are ranked already, and keep k."""
        _distance_kernel[(num,)](
            cloud.point,
            cloud.number,
            position,
            buffer,
            fill,
            kept,
            CAPACITY=capacity,
            D=width,
            R=max(1, 4096 // width),
        )
        _rank_kernel[(triton.cdiv(num, ranked),)](
            cloud.half,
            cloud.error,
            position,
            buffer,
            fill,
            overflow,
            bound,
            reach,
            num,
            k,
            cloud.margin,
            CAPACITY=capacity,
            LOG=capacity.bit_length() - 1,
            ROWS=ranked,
            num_warps=max(1, capacity // 512),
        )

    rank(kept=0)
    tile = _tile(width)
    for stop in _parts(end, n):
        _filter_kernel[(triton.cdiv(num, tile["M"]),)](
            cloud.code,
            cloud.half,
            cloud.tile_error,
            position,
            bound,
            reach,
            buffer,
            fill,
            num,
            end,
            stop,
            visits,
            0 if visits is None else visits.size(1),
            CAPACITY=capacity,
            D=width,
            TILE=_COLUMNS,
            **tile,
        )
        rank(kept=k)
        end = stop
    return (buffer[:, :k] & 0xFFFFFFFF).int(), overflow


def _parts(begin: int, n: int) -> list[int]:
    """Ends of the parts after the first, whole tiles, growing by one factor up to ``_GROWTH``."""
    if n <= begin:
        return []
    count = math.ceil(math.log(n / begin, _GROWTH))
    growth = (n / begin) ** (1 / count)
    ends = {math.ceil(begin * growth**i / _COLUMNS) * _COLUMNS for i in range(1, count)}
    last = math.ceil(n / _COLUMNS) * _COLUMNS
    return sorted({end for end in ends if begin < end < last} | {last})


def _tile(width: int) -> dict:
    """Rows and columns of a tile of distances, for shared memory to hold its operands."""
    rows = 128 if width <= 256 else 64
    return {"M": rows, "N": 64, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["num"])
def _filter_kernel(
    code_ptr,
    half_ptr,
    tile_error_ptr,
    position_ptr,
    bound_ptr,
    reach_ptr,
    buffer_ptr,
    fill_ptr,
    num,
    begin,
    end,
    visit_ptr,  # None: columns are those of the order
    visits,
    CAPACITY: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Append the columns that may be nearer than a row's bound to the row's candidates.

    A program has its rows to itself, so that slots are counted in registers and candidates stand
    in order of column.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    real = row < num
    inner = tl.arange(0, D)
    position = tl.load(position_ptr + row, mask=real, other=0)
    query = tl.load(code_ptr + position.to(tl.int64)[:, None] * D + inner[None, :])
    bound = tl.load(bound_ptr + row, mask=real, other=float("-inf"))
    reach = tl.load(reach_ptr + row, mask=real, other=0.0)
    fill = tl.load(fill_ptr + row, mask=real, other=0)
    row_ptr = buffer_ptr + row.to(tl.int64) * CAPACITY
    bit = tl.full([N], 1, tl.int32) << (tl.arange(0, N) % 32)
    first = 32 * tl.arange(0, N // 32)
    for at in range(begin, end, N):
        left = at
        if visit_ptr is not None:
            tile = tl.load(visit_ptr + (tl.program_id(0) * M // TILE) * visits + at // TILE)
            left = tile * TILE + at % TILE
        column = left + tl.arange(0, N)
        code = tl.load(code_ptr + column.to(tl.int64)[:, None] * D + inner[None, :])
        half = tl.load(half_ptr + column)
        error = tl.load(tile_error_ptr + left // TILE)
        product = tl.dot(query, tl.trans(code))
        limit = bound + error * (reach + error)
        keep = half[None, :] - product <= limit[:, None]
        # One bit an element: what is left to do works on 1/32 of the tile.
        marks = tl.where(keep, bit[None, :], 0)
        word = tl.sum(tl.reshape(marks, [M, N // 32, 32]), 2)
        some = tl.max((word != 0).to(tl.int32), 1)
        left_over = tl.max(some, 0)
        if left_over > 0:
            while left_over > 0:
                # Each row takes its first marked column; the exponent of a power of two is its
                # place in the word.
                lowest = word & -word
                power = lowest.to(tl.uint32, bitcast=True).to(tl.float32)
                place = first[None, :] + (power.to(tl.int32, bitcast=True) >> 23) - 127
                place = tl.where(word != 0, place, N)
                taken = tl.min(place, 1)
                tl.store(
                    row_ptr + fill,
                    (left + taken).to(tl.int64),
                    mask=(some > 0) & (fill < CAPACITY),
                )
                fill += some
                word = tl.where(place == taken[:, None], word ^ lowest, word)
                some = tl.max((word != 0).to(tl.int32), 1)
                left_over = tl.max(some, 0)
    tl.store(fill_ptr + row, fill, mask=real)


@triton.jit(do_not_specialize=["kept"])
def _distance_kernel(
    point_ptr,
    number_ptr,
    position_ptr,
    buffer_ptr,
    fill_ptr,
    kept,
    CAPACITY: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Replace a row's new candidates by (squared distance, number) in one sortable integer."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, D)
    own = tl.load(number_ptr + tl.load(position_ptr + row))
    query = tl.load(point_ptr + own.to(tl.int64) * D + inner)
    count = tl.minimum(tl.load(fill_ptr + row), CAPACITY)
    for start in range(kept, count, R):
        slot = start + tl.arange(0, R)
        valid = slot < count
        column = tl.load(buffer_ptr + row * CAPACITY + slot, mask=valid, other=0)
        number = tl.load(number_ptr + column, mask=valid, other=-1)
        point = tl.load(
            point_ptr + number.to(tl.int64)[:, None] * D + inner[None, :],
            mask=(number >= 0)[:, None],
            other=0.0,
        )
        difference = point - query[None, :]
        distance = tl.sum(difference * difference, 1)
        key = (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | number.to(tl.int64)
        key = tl.where((number == own) | (number < 0), _FAR, key)  # itself, or beyond the last
        tl.store(buffer_ptr + row * CAPACITY + slot, key, mask=valid)


@triton.jit(do_not_specialize=["num", "k"])
def _rank_kernel(
    half_ptr,
    error_ptr,
    position_ptr,
    buffer_ptr,
    fill_ptr,
    overflow_ptr,
    bound_ptr,
    reach_ptr,
    num,
    k,
    margin,
    CAPACITY: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Keep a row's k nearest candidates, sorted, and say what a nearer column must satisfy.

    It has |a_i - a_j| <= reach_i + error_j for the float16 copies a, that is
    half_j - <a_i, a_j> <= (reach_i + error_j)^2 / 2 - half_i.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num
    slot = tl.arange(0, CAPACITY)[None, :]
    slot_ptr = buffer_ptr + row.to(tl.int64)[:, None] * CAPACITY + slot
    count = tl.load(fill_ptr + row, mask=real, other=0)
    key = tl.load(slot_ptr, mask=slot < count[:, None], other=_FAR)
    # A bitonic sort. tl.sort takes as long, and in the interpreter far longer.
    for stage in tl.static_range(1, LOG + 1):
        for step in tl.static_range(stage):
            key = _exchange(key, slot, stage, stage - 1 - step, ROWS, CAPACITY)
    tl.store(slot_ptr, key, mask=real[:, None] & (slot < k))
    last = tl.max(tl.where(slot < k, key, 0), 1)
    distance = (last >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    position = tl.load(position_ptr + row, mask=real, other=0)
    half = tl.load(half_ptr + position)
    reach = tl.sqrt(distance) * (1 + margin) + tl.load(error_ptr + position)
    tl.store(reach_ptr + row, reach, mask=real)
    tl.store(bound_ptr + row, 0.5 * (1 + margin) * reach * reach - half, mask=real)
    tl.store(fill_ptr + row, tl.zeros_like(count) + k, mask=real)
    tl.store(overflow_ptr + row, count > CAPACITY, mask=real & (count > CAPACITY))


@triton.jit
def _exchange(
    key, slot, STAGE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    """Order keys 2^STEP apart, in the direction that stage STAGE of a bitonic sort asks for."""
    pair = tl.reshape(key, [ROWS, SIZE >> (STEP + 1), 2, 1 << STEP])
    other = tl.reshape(tl.sum(pair, 2)[:, :, None, :] - pair, [ROWS, SIZE])
    want_larger = ((slot >> STEP) % 2) != ((slot >> STAGE) % 2)
    return tl.where((key > other) == want_larger, key, other)
