"""What the Triton kernels of the operators share: tiles under broadcast times, and sums over each sample."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import over
from ._tuning import size_of, tuned

ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class LaunchConfig:
    """Of an operator that goes over its elements."""

    block: int = 1024  # elements of a program
    num_warps: int = 4


@dataclass(frozen=True)
class Tiling:
    """How x lies under its times: in ``row_count`` rows of ``inner`` elements that share one; row
    (b * middle + c) * frames + f takes the time b * frames + f. A program covers ``tile_columns`` elements of
    ``tile_rows`` rows."""

    row_count: int
    middle: int
    frames: int
    inner: int
    tile_rows: int
    tile_columns: int
    num_warps: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.row_count, self.middle, self.frames, self.inner

    @property
    def programs(self) -> int:
        return triton.cdiv(self.row_count, self.tile_rows) * triton.cdiv(self.inner, self.tile_columns)

    @property
    def options(self) -> dict:
        return {
            # Two divisions by row: in 64 bits only where 32 do not hold the row.
            "INDEX": tl.int32 if self.row_count + self.tile_rows < 2**31 else tl.int64,
            "TILE_ROWS": self.tile_rows,
            "TILE_COLUMNS": self.tile_columns,
            "num_warps": self.num_warps,
        }


def launch_config(shape: torch.Size, times_shape: torch.Size, config: LaunchConfig = LaunchConfig()) -> Tiling | None:
    """None when the times do not vary as (outer, broadcast, inner, broadcast)."""
    runs: list[tuple[bool, int]] = []  # adjacent dimensions of one kind: (times vary along it, its length)
    for size, times in zip(shape, times_shape, strict=True):
        if size == 1:
            continue
        varies = times == size
        if runs and runs[-1][0] == varies:
            runs[-1] = (varies, runs[-1][1] * size)
        else:
            runs.append((varies, size))
    if not runs or not runs[0][0]:
        runs.insert(0, (True, 1))
    if len(runs) > 4:
        return None
    lengths = [length for _, length in runs]
    if len(lengths) <= 2:
        lengths = [lengths[0], 1, 1, *lengths[1:]]
    outer, middle, frames, inner = (*lengths, 1, 1)[:4]
    columns = min(config.block, triton.next_power_of_2(inner))
    while columns > 128 and 8 * triton.cdiv(inner, columns) * columns > 9 * inner:  # more than an eighth is padding
        columns //= 2
    return Tiling(outer * middle * frames, middle, frames, inner, config.block // columns, columns, config.num_warps)


@triton.jit
def tile(
    program,
    row_count,
    middle,
    frames,
    inner,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Offsets [R, C] of a program's elements with their mask, and offsets [R] of their times with theirs."""
    column_tiles = (inner - 1) // TILE_COLUMNS + 1  # tl.cdiv would add first, past 2^31
    row = (program // column_tiles).to(INDEX) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (program % column_tiles).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    time = row // frames // middle * frames + row % frames
    row_mask = row < row_count
    offset = row.to(tl.int64)[:, None] * inner + column[None, :]
    return offset, row_mask[:, None] & (column < inner)[None, :], time, row_mask


def rows_of(operator: str, shape: torch.Size, *times: Tensor) -> tuple[Tiling, list[Tensor]]:
    """How a tensor of this shape lies under its times; and the times, one value for each row or element."""
    config = tuned(operator, size_of(shape.numel()), LaunchConfig(), times[0].device)
    times = torch.broadcast_tensors(*over(shape, *times))
    tiling = launch_config(shape, times[0].shape, config)
    if tiling is None:
        times = tuple(time.expand(shape) for time in times)
        tiling = launch_config(shape, shape, config)
    return tiling, [time.contiguous() for time in times]


def rows_of_samples(operator: str, shape: torch.Size, *times: Tensor) -> tuple[Tiling, list[Tensor]]:
    """The same for one sample of many: the tiling is that of a sample, the times are those of all."""
    config = tuned(operator, size_of(shape.numel()), LaunchConfig(), times[0].device)
    times = torch.broadcast_tensors(*over(shape, *times))
    tiling = launch_config(shape[1:], times[0].shape[1:], config)
    rows = shape if tiling is None else (shape[0], *times[0].shape[1:])
    tiling = launch_config(shape[1:], shape[1:], config) if tiling is None else tiling
    return tiling, [time.expand(rows).contiguous() for time in times]


@triton.jit
def tile_of_sample(
    row_count,
    middle,
    frames,
    inner,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """The sample of this program and the number of programs that share it; and what ``tile`` gives, in that sample."""
    programs = ((row_count - 1) // TILE_ROWS + 1) * ((inner - 1) // TILE_COLUMNS + 1)
    sample = tl.program_id(0) // programs
    offset, mask, time, time_mask = tile(
        tl.program_id(0) % programs, row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    offset += sample.to(tl.int64) * row_count * inner
    time = time.to(tl.int64) + sample.to(tl.int64) * (row_count // middle)
    return sample, programs, offset, mask, time, time_mask


@triton.jit
def arrives_last(counter_ptr, programs):
    """Whether the other programs that share the counter, which starts at zero and is left at zero, were here before,
    each with what it stored."""
    tl.debug_barrier()  # every thread has stored before the one thread counts them as arrived
    last = tl.atomic_add(counter_ptr, 1) == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def add_partials(partial_ptr, count, dtype: tl.constexpr):
    """In a fixed order."""
    BLOCK: tl.constexpr = 1024
    total = tl.zeros((BLOCK,), dtype)
    for start in range(0, count, BLOCK):
        position = start + tl.arange(0, BLOCK)
        # Past the first-level cache, which other multiprocessors do not write to.
        total += tl.load(partial_ptr + position, mask=position < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


_counters: dict[tuple[int, int], Tensor] = {}


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """Zeros, which the last arriver of each group puts back. One set for each stream, whose launches take turns; a
    captured graph, which may be replayed on any stream, gets its own."""
    key = (-1, 0)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _counters[key]
