"""Triton kernels of ``flowmap_embedding`` and their launchers.

Few rows: one launch, whose programs each take a block of hidden units of one embedder through both layers; the last
program to arrive adds their partial sums. More rows: one launch for the hidden units, one for the output. The weights
are read once in either case, apart from the first layer's, which stays in the cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import accumulation_dtype
from .._triton import ACCUMULATOR, arrival_counters
from .._tuning import tuned


@dataclass(frozen=True)
class LaunchConfig:
    one_launch: bool
    block_rows: int
    block_hidden: int
    block_frequency: int
    block_out: int
    block_k: int  # of the second layer's sum over hidden units
    block_channel: int  # of the backward's sum over output channels
    tiles: int  # of block_out channels that a program of the one launch covers
    num_warps: int = 4


_ONE_LAUNCH_ROWS = 2
_ONE_LAUNCH_BLOCKS = 128  # of hidden units: the last arriver holds one partial sum of each
_ONE_LAUNCH_PROGRAMS = 264  # two for each multiprocessor of an H100
_OUTER_PRODUCT_BLOCK = 32


def launch_config(rows: int, hidden: int, channels: int, dtype: torch.dtype) -> LaunchConfig:
    """``hidden`` is the larger of the two hidden widths, ``dtype`` the widest of the weights."""
    block = 32 if dtype == torch.float64 else 64
    hidden_blocks = triton.cdiv(hidden, block)
    if rows <= _ONE_LAUNCH_ROWS and hidden_blocks <= _ONE_LAUNCH_BLOCKS:
        tiles = triton.cdiv(channels, block)
        groups = min(tiles, triton.cdiv(_ONE_LAUNCH_PROGRAMS, 2 * hidden_blocks))
        block_rows = triton.next_power_of_2(rows)
        tiles = triton.cdiv(tiles, groups)
        return LaunchConfig(True, block_rows, block, block, block, 0, 0, tiles, num_warps=4 * block_rows)
    if dtype == torch.float64:  # no matrix unit: products are formed and summed, [rows, k, out] at a time
        return LaunchConfig(False, 4, 16, 16, 16, 16, 16, 1)
    block_rows = 16 if rows <= 16 else 32
    block_out = 16 if channels <= 2048 else 32
    if dtype == torch.float32:
        return LaunchConfig(False, block_rows, 32, 32, block_out, 32, 32, 1)
    return LaunchConfig(False, block_rows, 32, 64, block_out, 128, 64, 1)


@triton.jit
def _matmul(a, b, acc):
    """acc + a @ b, products and sums in the dtype of acc."""
    if acc.dtype == tl.float64:
        acc += tl.sum(a.to(tl.float64)[:, :, None] * b.to(tl.float64)[None, :, :], axis=1)
    elif b.dtype == tl.float32 or a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        # float32 values as the sum of two in the dtype of the weights: the matrix unit, with twice its precision.
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        acc = tl.dot(high, b, tl.dot(low, b, acc))
    return acc


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_derivative(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def _frequency(index, dtype: tl.constexpr, LOG2_STEP: tl.constexpr):
    """2^(-LOG2_STEP index)"""
    exponent = index.to(dtype) * (-LOG2_STEP)
    if dtype == tl.float64:
        y = tl.exp2(exponent)
    else:
        # The GPU's float32 exp2 is good to 22 bits, which phases of 1000 would show. Its Taylor series is good to 24.
        whole = tl.maximum(tl.floor(exponent + 0.5), -126.0)
        x = exponent - whole
        y = 1.525273380405984e-5 * x + 1.5403530393381608e-4
        y = y * x + 1.3333558146428443e-3
        y = y * x + 9.618129107628477e-3
        y = y * x + 5.550410866482158e-2
        y = y * x + 2.402265069591007e-1
        y = y * x + 6.931471805599453e-1
        y = y * x + 1.0
        y *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return y


@triton.jit
def _load_time(t_ptr, r_ptr, row, mask, TAU: tl.constexpr, TIME_SCALE: tl.constexpr):
    if TAU == "t":
        time = tl.load(t_ptr + row, mask=mask, other=0.0)
    elif TAU == "r":
        time = tl.load(r_ptr + row, mask=mask, other=0.0)
    else:
        time = tl.load(t_ptr + row, mask=mask, other=0.0) - tl.load(r_ptr + row, mask=mask, other=0.0)
        if TAU == "r-t":
            time = -time
    return time * TIME_SCALE


@triton.jit
def _sinusoid(time, frequency, SCALE: tl.constexpr, COS_FIRST: tl.constexpr):
    """The two halves of the features; time and frequency broadcast against each other."""
    phase = (time * frequency) * SCALE
    if COS_FIRST:
        first, second = tl.cos(phase), tl.sin(phase)
    else:
        first, second = tl.sin(phase), tl.cos(phase)
    return first, second


@triton.jit
def _first_layer(
    pre_ptr,
    t_ptr,
    r_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    hidden,
    TAU: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    COS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_FREQUENCY: tl.constexpr,
):
    HALF: tl.constexpr = CHANNELS // 2
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unit = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    time = _load_time(t_ptr, r_ptr, row, row < rows, TAU, TIME_SCALE)
    pre = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), ACCUMULATE)
    for start in range(0, HALF, BLOCK_FREQUENCY):
        index = start + tl.arange(0, BLOCK_FREQUENCY)
        mask = (unit < hidden)[:, None] & (index < HALF)[None, :]
        weight_ptrs = weight_ptr + unit.to(tl.int64)[:, None] * CHANNELS + index[None, :]
        frequency = _frequency(index, time.dtype, LOG2_STEP)
        first, second = _sinusoid(time[:, None], frequency[None, :], SCALE, COS_FIRST)
        weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        pre = _matmul(first.to(weight.dtype), tl.trans(weight), pre)
        weight = tl.load(weight_ptrs + HALF, mask=mask, other=0.0)
        pre = _matmul(second.to(weight.dtype), tl.trans(weight), pre)
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + unit, mask=unit < hidden, other=0.0).to(ACCUMULATE)[None, :]
    pre_ptrs = pre_ptr + row.to(tl.int64)[:, None] * hidden + unit[None, :]
    tl.store(pre_ptrs, pre, mask=(row < rows)[:, None] & (unit < hidden)[None, :])


@triton.jit
def _flowmap_embedding_hidden_kernel(
    base_pre_ptr,
    delta_pre_ptr,
    t_ptr,
    r_ptr,
    base_weight_ptr,
    base_bias_ptr,
    delta_weight_ptr,
    delta_bias_ptr,
    rows,
    base_hidden,
    delta_hidden,
    TAU: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    COS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_FREQUENCY: tl.constexpr,
):
    if tl.program_id(2) == 0:
        _first_layer(
            base_pre_ptr, t_ptr, r_ptr, base_weight_ptr, base_bias_ptr, rows, base_hidden,
            "t", CHANNELS, LOG2_STEP, SCALE, TIME_SCALE, COS_FIRST, ACCUMULATE,
            BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_FREQUENCY,
        )  # fmt: skip
    else:
        _first_layer(
            delta_pre_ptr, t_ptr, r_ptr, delta_weight_ptr, delta_bias_ptr, rows, delta_hidden,
            TAU, CHANNELS, LOG2_STEP, SCALE, TIME_SCALE, COS_FIRST, ACCUMULATE,
            BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_FREQUENCY,
        )  # fmt: skip


@triton.jit
def _second_layer(
    pre_ptr,
    weight_ptr,
    bias_ptr,
    row,
    channel,
    rows,
    hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    out = tl.zeros((BLOCK_ROWS, BLOCK_OUT), ACCUMULATE)
    for start in range(0, hidden, BLOCK_K):
        unit = start + tl.arange(0, BLOCK_K)
        pre_ptrs = pre_ptr + row.to(tl.int64)[:, None] * hidden + unit[None, :]
        pre = tl.load(pre_ptrs, mask=(row < rows)[:, None] & (unit < hidden)[None, :], other=0.0)
        weight_ptrs = weight_ptr + channel.to(tl.int64)[:, None] * hidden + unit[None, :]
        weight = tl.load(weight_ptrs, mask=(channel < channels)[:, None] & (unit < hidden)[None, :], other=0.0)
        out = _matmul(_silu(pre), tl.trans(weight), out)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACCUMULATE)[None, :]
    return out


@triton.jit
def _flowmap_embedding_output_kernel(
    y_ptr,
    silu_ptr,
    base_pre_ptr,
    delta_pre_ptr,
    base_weight_ptr,
    base_bias_ptr,
    delta_weight_ptr,
    delta_bias_ptr,
    gate_ptr,
    rows,
    base_hidden,
    delta_hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    e = _second_layer(
        base_pre_ptr, base_weight_ptr, base_bias_ptr, row, channel, rows, base_hidden, channels,
        ACCUMULATE, BLOCK_ROWS, BLOCK_OUT, BLOCK_K,
    )  # fmt: skip
    d = _second_layer(
        delta_pre_ptr, delta_weight_ptr, delta_bias_ptr, row, channel, rows, delta_hidden, channels,
        ACCUMULATE, BLOCK_ROWS, BLOCK_OUT, BLOCK_K,
    )  # fmt: skip
    y = e + tl.load(gate_ptr).to(ACCUMULATE) * (d - e)
    offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)
    if silu_ptr is not None:
        tl.store(silu_ptr + offset, _silu(y).to(silu_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _partial_sums(
    partial_ptr,
    t_ptr,
    r_ptr,
    weight_1_ptr,
    bias_1_ptr,
    weight_2_ptr,
    rows,
    hidden,
    channels,
    TAU: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    COS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_FREQUENCY: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    TILES: tl.constexpr,
):
    """What one block of hidden units adds to this program's tiles of output channels."""
    HALF: tl.constexpr = CHANNELS // 2
    row = tl.arange(0, BLOCK_ROWS)
    unit = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    time = _load_time(t_ptr, r_ptr, row, row < rows, TAU, TIME_SCALE)
    products = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_FREQUENCY), ACCUMULATE)
    for start in range(0, HALF, BLOCK_FREQUENCY):
        index = start + tl.arange(0, BLOCK_FREQUENCY)
        mask = (unit < hidden)[:, None] & (index < HALF)[None, :]
        weight_ptrs = weight_1_ptr + unit.to(tl.int64)[:, None] * CHANNELS + index[None, :]
        frequency = _frequency(index, time.dtype, LOG2_STEP)
        first, second = _sinusoid(time[:, None], frequency[None, :], SCALE, COS_FIRST)
        weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        products += first.to(weight.dtype).to(ACCUMULATE)[:, None, :] * weight.to(ACCUMULATE)[None, :, :]
        weight = tl.load(weight_ptrs + HALF, mask=mask, other=0.0)
        products += second.to(weight.dtype).to(ACCUMULATE)[:, None, :] * weight.to(ACCUMULATE)[None, :, :]
    pre = tl.sum(products, axis=2)
    if bias_1_ptr is not None:
        pre += tl.load(bias_1_ptr + unit, mask=unit < hidden, other=0.0).to(ACCUMULATE)[None, :]
    activation = _silu(pre)

    for tile in range(TILES):
        channel = (tl.program_id(0) * TILES + tile) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        weight_ptrs = weight_2_ptr + channel.to(tl.int64)[:, None] * hidden + unit[None, :]
        weight = tl.load(weight_ptrs, mask=(channel < channels)[:, None] & (unit < hidden)[None, :], other=0.0)
        out = tl.sum(activation[:, None, :] * weight.to(ACCUMULATE)[None, :, :], axis=2)
        partial_ptrs = partial_ptr + row[:, None] * channels + channel[None, :]
        tl.store(partial_ptrs, out, mask=(row < rows)[:, None] & (channel < channels)[None, :])


@triton.jit
def _add_partials(partial_ptr, bias_ptr, block, blocks, row, rows, channel, channels, ACCUMULATE: tl.constexpr):
    offset = block.to(tl.int64)[:, None] * (rows * channels) + row * channels + channel[None, :]
    mask = (block < blocks)[:, None] & (channel < channels)[None, :]
    # Past the first-level cache, which other multiprocessors do not write to.
    out = tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACCUMULATE)
    return out


@triton.jit
def _flowmap_embedding_one_launch_kernel(
    y_ptr,
    silu_ptr,
    partial_ptr,
    counter_ptr,
    t_ptr,
    r_ptr,
    base_weight_1_ptr,
    base_bias_1_ptr,
    base_weight_2_ptr,
    base_bias_2_ptr,
    delta_weight_1_ptr,
    delta_bias_1_ptr,
    delta_weight_2_ptr,
    delta_bias_2_ptr,
    gate_ptr,
    rows,
    base_hidden,
    delta_hidden,
    channels,
    TAU: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    COS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_FREQUENCY: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    blocks = tl.num_programs(1)
    delta_partial_ptr = partial_ptr + blocks.to(tl.int64) * rows * channels
    own = tl.program_id(1).to(tl.int64) * rows * channels
    if tl.program_id(2) == 0:
        _partial_sums(
            partial_ptr + own, t_ptr, r_ptr, base_weight_1_ptr, base_bias_1_ptr, base_weight_2_ptr,
            rows, base_hidden, channels, "t", CHANNELS, LOG2_STEP, SCALE, TIME_SCALE, COS_FIRST, ACCUMULATE,
            BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_FREQUENCY, BLOCK_OUT, TILES,
        )  # fmt: skip
    else:
        _partial_sums(
            delta_partial_ptr + own, t_ptr, r_ptr, delta_weight_1_ptr, delta_bias_1_ptr, delta_weight_2_ptr,
            rows, delta_hidden, channels, TAU, CHANNELS, LOG2_STEP, SCALE, TIME_SCALE, COS_FIRST, ACCUMULATE,
            BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_FREQUENCY, BLOCK_OUT, TILES,
        )  # fmt: skip

    tl.debug_barrier()  # every thread's partial sums are written before the one thread counts them as arrived
    if tl.atomic_add(counter_ptr + tl.program_id(0), 1) == 2 * blocks - 1:
        block = tl.arange(0, BLOCKS)
        gate = tl.load(gate_ptr).to(ACCUMULATE)
        for tile in range(TILES):
            channel = (tl.program_id(0) * TILES + tile) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            for row in range(rows):
                e = _add_partials(partial_ptr, base_bias_2_ptr, block, blocks, row, rows, channel, channels, ACCUMULATE)
                d = _add_partials(
                    delta_partial_ptr, delta_bias_2_ptr, block, blocks, row, rows, channel, channels, ACCUMULATE
                )
                y = e + gate * (d - e)
                offset = row * channels + channel
                tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=channel < channels)
                if silu_ptr is not None:
                    tl.store(silu_ptr + offset, _silu(y).to(silu_ptr.dtype.element_ty), mask=channel < channels)
        tl.store(counter_ptr + tl.program_id(0), 0)


@triton.jit
def _flowmap_embedding_bwd_blend_kernel(
    dy_ptr,
    partial_ptr,
    grad_ptr,
    grad_silu_ptr,
    base_pre_ptr,
    delta_pre_ptr,
    base_weight_ptr,
    base_bias_ptr,
    delta_weight_ptr,
    delta_bias_ptr,
    gate_ptr,
    rows,
    base_hidden,
    delta_hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the blend, and this tile's share of the gate's."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    e = _second_layer(
        base_pre_ptr, base_weight_ptr, base_bias_ptr, row, channel, rows, base_hidden, channels,
        ACCUMULATE, BLOCK_ROWS, BLOCK_OUT, BLOCK_K,
    )  # fmt: skip
    d = _second_layer(
        delta_pre_ptr, delta_weight_ptr, delta_bias_ptr, row, channel, rows, delta_hidden, channels,
        ACCUMULATE, BLOCK_ROWS, BLOCK_OUT, BLOCK_K,
    )  # fmt: skip
    offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    dy = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if grad_silu_ptr is not None:
        y = e + tl.load(gate_ptr).to(ACCUMULATE) * (d - e)
        dy += tl.load(grad_silu_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE) * _silu_derivative(y)
        tl.store(dy_ptr + offset, dy, mask=mask)
    if partial_ptr is not None:
        partial = tl.sum(tl.sum(dy * (d - e), axis=1), axis=0)
        tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), partial)


@triton.jit
def _hidden_gradient(
    dpre_ptr,
    dy_ptr,
    pre_ptr,
    weight_ptr,
    factor,
    rows,
    hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unit = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    dhidden = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), ACCUMULATE)
    for start in range(0, channels, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        dy_ptrs = dy_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :]
        dy = tl.load(dy_ptrs, mask=(row < rows)[:, None] & (channel < channels)[None, :], other=0.0)
        weight_ptrs = weight_ptr + channel.to(tl.int64)[:, None] * hidden + unit[None, :]
        weight = tl.load(weight_ptrs, mask=(channel < channels)[:, None] & (unit < hidden)[None, :], other=0.0)
        dhidden = _matmul(dy.to(ACCUMULATE), weight, dhidden)
    offset = row.to(tl.int64)[:, None] * hidden + unit[None, :]
    mask = (row < rows)[:, None] & (unit < hidden)[None, :]
    pre = tl.load(pre_ptr + offset, mask=mask, other=0.0)
    tl.store(dpre_ptr + offset, factor * dhidden * _silu_derivative(pre), mask=mask)


@triton.jit
def _flowmap_embedding_bwd_hidden_kernel(
    base_dpre_ptr,
    delta_dpre_ptr,
    dy_ptr,
    base_pre_ptr,
    delta_pre_ptr,
    base_weight_ptr,
    delta_weight_ptr,
    gate_ptr,
    rows,
    base_hidden,
    delta_hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    gate = tl.load(gate_ptr).to(ACCUMULATE)
    if tl.program_id(2) == 0:
        if base_dpre_ptr is not None:
            _hidden_gradient(
                base_dpre_ptr, dy_ptr, base_pre_ptr, base_weight_ptr, 1 - gate, rows, base_hidden, channels,
                ACCUMULATE, BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_K,
            )  # fmt: skip
    else:
        if delta_dpre_ptr is not None:
            _hidden_gradient(
                delta_dpre_ptr, dy_ptr, delta_pre_ptr, delta_weight_ptr, gate, rows, delta_hidden, channels,
                ACCUMULATE, BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _second_layer_gradient(
    grad_weight_ptr,
    grad_bias_ptr,
    dy_ptr,
    pre_ptr,
    factor,
    rows,
    hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    unit = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    dweight = tl.zeros((BLOCK_OUT, BLOCK_HIDDEN), ACCUMULATE)
    dbias = tl.zeros((BLOCK_OUT,), ACCUMULATE)
    dy_ptrs = dy_ptr + channel
    pre_ptrs = pre_ptr + unit
    for _ in range(rows):
        dy = tl.load(dy_ptrs, mask=channel < channels, other=0.0).to(ACCUMULATE)
        activation = _silu(tl.load(pre_ptrs, mask=unit < hidden, other=0.0))
        dweight += dy[:, None] * activation[None, :]
        dbias += dy
        dy_ptrs += channels
        pre_ptrs += hidden
    offset = channel.to(tl.int64)[:, None] * hidden + unit[None, :]
    mask = (channel < channels)[:, None] & (unit < hidden)[None, :]
    tl.store(grad_weight_ptr + offset, (factor * dweight).to(grad_weight_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        dbias *= factor
        if grad_bias_ptr is not None:
            tl.store(grad_bias_ptr + channel, dbias.to(grad_bias_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit
def _flowmap_embedding_bwd_weight_2_kernel(
    base_grad_weight_ptr,
    base_grad_bias_ptr,
    delta_grad_weight_ptr,
    delta_grad_bias_ptr,
    dy_ptr,
    base_pre_ptr,
    delta_pre_ptr,
    gate_ptr,
    rows,
    base_hidden,
    delta_hidden,
    channels,
    ACCUMULATE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    gate = tl.load(gate_ptr).to(ACCUMULATE)
    if tl.program_id(2) == 0:
        if base_grad_weight_ptr is not None:
            _second_layer_gradient(
                base_grad_weight_ptr, base_grad_bias_ptr, dy_ptr, base_pre_ptr, 1 - gate, rows, base_hidden, channels,
                ACCUMULATE, BLOCK_OUT, BLOCK_HIDDEN,
            )  # fmt: skip
    else:
        if delta_grad_weight_ptr is not None:
            _second_layer_gradient(
                delta_grad_weight_ptr, delta_grad_bias_ptr, dy_ptr, delta_pre_ptr, gate, rows, delta_hidden, channels,
                ACCUMULATE, BLOCK_OUT, BLOCK_HIDDEN,
            )  # fmt: skip


@triton.jit
def _first_layer_gradient(
    grad_weight_ptr,
    grad_bias_ptr,
    dpre_ptr,
    t_ptr,
    r_ptr,
    rows,
    hidden,
    TAU: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    COS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_FREQUENCY: tl.constexpr,
):
    HALF: tl.constexpr = CHANNELS // 2
    dtype = grad_weight_ptr.dtype.element_ty
    unit = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    index = tl.program_id(1) * BLOCK_FREQUENCY + tl.arange(0, BLOCK_FREQUENCY)
    frequency = _frequency(index, t_ptr.dtype.element_ty, LOG2_STEP)
    dfirst = tl.zeros((BLOCK_HIDDEN, BLOCK_FREQUENCY), ACCUMULATE)
    dsecond = tl.zeros((BLOCK_HIDDEN, BLOCK_FREQUENCY), ACCUMULATE)
    dbias = tl.zeros((BLOCK_HIDDEN,), ACCUMULATE)
    dpre_ptrs = dpre_ptr + unit
    for row in range(rows):
        time = _load_time(t_ptr, r_ptr, row, row < rows, TAU, TIME_SCALE)
        first, second = _sinusoid(time, frequency, SCALE, COS_FIRST)
        dpre = tl.load(dpre_ptrs, mask=unit < hidden, other=0.0)
        dfirst += dpre[:, None] * first.to(dtype).to(ACCUMULATE)[None, :]
        dsecond += dpre[:, None] * second.to(dtype).to(ACCUMULATE)[None, :]
        dbias += dpre
        dpre_ptrs += hidden
    weight_ptrs = grad_weight_ptr + unit.to(tl.int64)[:, None] * CHANNELS + index[None, :]
    mask = (unit < hidden)[:, None] & (index < HALF)[None, :]
    tl.store(weight_ptrs, dfirst.to(dtype), mask=mask)
    tl.store(weight_ptrs + HALF, dsecond.to(dtype), mask=mask)
    if tl.program_id(1) == 0:
        if CHANNELS % 2 == 1:
            padding = tl.zeros((BLOCK_HIDDEN,), dtype)
            tl.store(grad_weight_ptr + unit.to(tl.int64) * CHANNELS + (CHANNELS - 1), padding, mask=unit < hidden)
        if grad_bias_ptr is not None:
            tl.store(grad_bias_ptr + unit, dbias.to(dtype), mask=unit < hidden)


@triton.jit
def _flowmap_embedding_bwd_weight_1_kernel(
    base_grad_weight_ptr,
    base_grad_bias_ptr,
    delta_grad_weight_ptr,
    delta_grad_bias_ptr,
    base_dpre_ptr,
    delta_dpre_ptr,
    t_ptr,
    r_ptr,
    rows,
    base_hidden,
    delta_hidden,
    TAU: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    COS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_FREQUENCY: tl.constexpr,
):
    if tl.program_id(2) == 0:
        if base_grad_weight_ptr is not None:
            _first_layer_gradient(
                base_grad_weight_ptr, base_grad_bias_ptr, base_dpre_ptr, t_ptr, r_ptr, rows, base_hidden,
                "t", CHANNELS, LOG2_STEP, SCALE, TIME_SCALE, COS_FIRST, ACCUMULATE, BLOCK_HIDDEN, BLOCK_FREQUENCY,
            )  # fmt: skip
    else:
        if delta_grad_weight_ptr is not None:
            _first_layer_gradient(
                delta_grad_weight_ptr, delta_grad_bias_ptr, delta_dpre_ptr, t_ptr, r_ptr, rows, delta_hidden,
                TAU, CHANNELS, LOG2_STEP, SCALE, TIME_SCALE, COS_FIRST, ACCUMULATE, BLOCK_HIDDEN, BLOCK_FREQUENCY,
            )  # fmt: skip


def flowmap_embedding(
    t: Tensor,
    r: Tensor,
    base_weight_1: Tensor,
    base_bias_1: Tensor | None,
    base_weight_2: Tensor,
    base_bias_2: Tensor | None,
    delta_weight_1: Tensor,
    delta_bias_1: Tensor | None,
    delta_weight_2: Tensor,
    delta_bias_2: Tensor | None,
    gate: Tensor,
    num_channels: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
    time_scale: float,
    deltatime_type: str,
    with_silu: bool,
) -> tuple[Tensor, Tensor]:
    rows, channels = t.shape[0], base_weight_2.shape[0]
    y = torch.empty((rows, channels), dtype=base_weight_2.dtype, device=t.device)
    silu = torch.empty_like(y) if with_silu else y.new_empty(0)
    if y.numel() == 0:
        return y, silu
    t, r = _common_times(t, r)
    weights = _contiguous(
        base_weight_1, base_bias_1, base_weight_2, base_bias_2,
        delta_weight_1, delta_bias_1, delta_weight_2, delta_bias_2,
    )  # fmt: skip
    sizes = (rows, base_weight_1.shape[0], delta_weight_1.shape[0], channels)
    accumulate, config = _plan(*sizes, weights)
    sinusoid = _sinusoid_options(
        num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale, deltatime_type
    )
    silu_out = silu if with_silu else None
    if not config.one_launch:
        pre = _launch_hidden(t, r, weights, sizes, accumulate, config, sinusoid)
        grid = (triton.cdiv(rows, config.block_rows), triton.cdiv(channels, config.block_out))
        _flowmap_embedding_output_kernel[grid](
            y,
            silu_out,
            *pre,
            *(weights[i] for i in (2, 3, 6, 7)),
            gate,
            *sizes,
            ACCUMULATE=ACCUMULATOR[accumulate],
            BLOCK_ROWS=config.block_rows,
            BLOCK_OUT=config.block_out,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
        )
        return y, silu

    groups = triton.cdiv(channels, config.block_out * config.tiles)
    blocks = triton.cdiv(max(sizes[1:3]), config.block_hidden)
    _flowmap_embedding_one_launch_kernel[(groups, blocks, 2)](
        y,
        silu_out,
        torch.empty((2, blocks, rows, channels), dtype=accumulate, device=t.device),
        arrival_counters(t.device, groups),
        t,
        r,
        *weights,
        gate,
        *sizes,
        **sinusoid,
        ACCUMULATE=ACCUMULATOR[accumulate],
        BLOCK_ROWS=config.block_rows,
        BLOCK_HIDDEN=config.block_hidden,
        BLOCK_FREQUENCY=config.block_frequency,
        BLOCK_OUT=config.block_out,
        TILES=config.tiles,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=config.num_warps,
    )
    return y, silu


def flowmap_embedding_backward(
    grad: Tensor,
    grad_silu: Tensor | None,
    t: Tensor,
    r: Tensor,
    base_weight_1: Tensor,
    base_bias_1: Tensor | None,
    base_weight_2: Tensor,
    base_bias_2: Tensor | None,
    delta_weight_1: Tensor,
    delta_bias_1: Tensor | None,
    delta_weight_2: Tensor,
    delta_bias_2: Tensor | None,
    gate: Tensor,
    num_channels: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
    time_scale: float,
    deltatime_type: str,
    need_base: bool,
    need_delta: bool,
    need_gate: bool,
) -> tuple[Tensor, ...]:
    rows, channels = t.shape[0], base_weight_2.shape[0]
    weights = _contiguous(
        base_weight_1, base_bias_1, base_weight_2, base_bias_2,
        delta_weight_1, delta_bias_1, delta_weight_2, delta_bias_2,
    )  # fmt: skip
    needed = [need_base] * 4 + [need_delta] * 4
    out = [
        torch.empty_like(w, memory_format=torch.contiguous_format) if n and w is not None else None
        for w, n in zip(weights, needed, strict=True)
    ]
    grad_gate = None
    absent = t.new_empty
    if rows == 0 or channels == 0:
        return *(absent(0) if w is None else w.zero_() for w in out), torch.zeros_like(gate) if need_gate else absent(0)

    t, r = _common_times(t, r)
    sizes = (rows, base_weight_1.shape[0], delta_weight_1.shape[0], channels)
    accumulate, config = _plan(max(rows, _ONE_LAUNCH_ROWS + 1), *sizes[1:], weights)
    options = {"ACCUMULATE": ACCUMULATOR[accumulate], "num_warps": config.num_warps}
    sinusoid = _sinusoid_options(
        num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale, deltatime_type
    )
    row_blocks = triton.cdiv(rows, config.block_rows)
    pre = _launch_hidden(t, r, weights, sizes, accumulate, config, sinusoid)

    dy = grad.contiguous()
    if need_gate or grad_silu is not None:
        grid = (row_blocks, triton.cdiv(channels, config.block_out))
        blend_dy = dy if grad_silu is None else torch.empty(dy.shape, dtype=accumulate, device=dy.device)
        partial = torch.empty(grid, dtype=accumulate, device=dy.device) if need_gate else None
        _flowmap_embedding_bwd_blend_kernel[grid](
            blend_dy,
            partial,
            dy,
            None if grad_silu is None else grad_silu.contiguous(),
            *pre,
            *(weights[i] for i in (2, 3, 6, 7)),
            gate,
            *sizes,
            BLOCK_ROWS=config.block_rows,
            BLOCK_OUT=config.block_out,
            BLOCK_K=config.block_k,
            **options,
        )
        dy = blend_dy
        if partial is not None:
            grad_gate = partial.sum().to(gate.dtype).reshape(gate.shape)

    if need_base or need_delta:
        dpre = [torch.empty_like(p) if n else None for p, n in zip(pre, (need_base, need_delta), strict=True)]
        hidden = max(sizes[1:3])
        _flowmap_embedding_bwd_hidden_kernel[(row_blocks, triton.cdiv(hidden, config.block_hidden), 2)](
            *dpre,
            dy,
            *pre,
            weights[2],
            weights[6],
            gate,
            *sizes,
            BLOCK_ROWS=config.block_rows,
            BLOCK_HIDDEN=config.block_hidden,
            BLOCK_K=config.block_channel,
            **options,
        )
        block = _OUTER_PRODUCT_BLOCK
        _flowmap_embedding_bwd_weight_2_kernel[(triton.cdiv(channels, block), triton.cdiv(hidden, block), 2)](
            *(out[i] for i in (2, 3, 6, 7)),
            dy,
            *pre,
            gate,
            *sizes,
            BLOCK_OUT=block,
            BLOCK_HIDDEN=block,
            **options,
        )
        frequency_blocks = max(1, triton.cdiv(num_channels // 2, block))
        _flowmap_embedding_bwd_weight_1_kernel[(triton.cdiv(hidden, block), frequency_blocks, 2)](
            *(out[i] for i in (0, 1, 4, 5)),
            *dpre,
            t,
            r,
            *sizes[:3],
            **sinusoid,
            BLOCK_HIDDEN=block,
            BLOCK_FREQUENCY=block,
            **options,
        )
    return tuple(absent(0) if g is None else g for g in (*out, grad_gate))


def _launch_hidden(
    t: Tensor,
    r: Tensor,
    weights: Sequence[Tensor | None],
    sizes: tuple[int, int, int, int],
    accumulate: torch.dtype,
    config: LaunchConfig,
    sinusoid: dict,
) -> list[Tensor]:
    """What both embedders' hidden units are before their SiLU: [rows, hidden] each."""
    rows, *hidden = sizes[:3]
    pre = [torch.empty((rows, width), dtype=accumulate, device=t.device) for width in hidden]
    grid = (triton.cdiv(rows, config.block_rows), triton.cdiv(max(hidden), config.block_hidden), 2)
    _flowmap_embedding_hidden_kernel[grid](
        *pre,
        t,
        r,
        *(weights[i] for i in (0, 1, 4, 5)),
        *sizes[:3],
        **sinusoid,
        ACCUMULATE=ACCUMULATOR[accumulate],
        BLOCK_ROWS=config.block_rows,
        BLOCK_HIDDEN=config.block_hidden,
        BLOCK_FREQUENCY=config.block_frequency,
        num_warps=config.num_warps,
    )
    return pre


def _plan(
    rows: int, base_hidden: int, delta_hidden: int, channels: int, weights: Sequence[Tensor | None]
) -> tuple[torch.dtype, LaunchConfig]:
    matrices = [w for w in weights if w is not None]
    accumulate = accumulation_dtype(*matrices)
    widest = max((w.dtype for w in matrices), key=lambda dtype: dtype.itemsize)
    config = launch_config(rows, max(base_hidden, delta_hidden), channels, widest)
    if widest != torch.float64:  # for which nothing is tuned
        size = "small" if config.one_launch else "medium" if rows <= 16 else "large"
        config = tuned("flowmap_embedding", size, config, matrices[0].device)
    return accumulate, config


def _common_times(t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(t, r)
    return t.to(dtype).contiguous(), r.to(dtype).contiguous()


def _contiguous(*weights: Tensor | None) -> list[Tensor | None]:
    return [None if w is None else w.contiguous() for w in weights]


def _sinusoid_options(
    num_channels: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
    time_scale: float,
    deltatime_type: str,
) -> dict:
    """Constants of the model: compiled in, so that they keep their float64 values."""
    steps = num_channels // 2 - downscale_freq_shift
    return {
        "TAU": deltatime_type,
        "CHANNELS": num_channels,
        "LOG2_STEP": math.log2(max_period) / steps if steps else math.nan,  # as 0 / 0 in the formula
        "SCALE": scale,
        "TIME_SCALE": time_scale,
        "COS_FIRST": flip_sin_to_cos,
    }
