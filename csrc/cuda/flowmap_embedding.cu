// y = e + gate (d - e),  e = base(sinusoid(time_scale t)),  d = delta(sinusoid(time_scale tau))
//
// A few rows meet megabytes of weights. A warp takes one or two output units of a layer, reads their weights 16 bytes
// at a time, and multiplies them with up to eight rows, which the first-level cache holds; further rows find the
// weights in a cache. Hidden units, and all sums, are in the accumulator's dtype.
#include "flowmap_embedding.h"

#include "device.cuh"

#include <algorithm>

namespace anyflow::cuda {
namespace {

constexpr int LAYER_THREADS = 128; // small blocks: a layer has few units to spread over the multiprocessors
constexpr int LAYER_WARPS = LAYER_THREADS / WARP;
constexpr int ONE_LAUNCH_ROWS = 2;
constexpr int FEATURES = 256; // that a block holds at a time

// Units that a warp takes at once: two share the rows that are read, where there are enough rows for that to matter.
template <int ROWS>
constexpr int UNITS = ROWS <= 2 ? 1 : 2;

// Blocks on a multiprocessor for which registers are left: the sums of more rows take more of them.
template <int ROWS>
constexpr int RESIDENT = ROWS <= 2 ? 5 : 3;

__device__ inline int lane_id() {
  return threadIdx.x % WARP;
}

__device__ inline int warp_id() {
  return threadIdx.x / WARP;
}

template <class Acc>
__device__ Acc* at_row(void* data, int64_t row, int64_t width) {
  return static_cast<Acc*>(data) + row * width;
}

// ---- the first layer's input

__device__ inline double time_of(const Sinusoid& sinusoid, int embedder, int64_t row) {
  const auto read = [&](const void* from) {
    return sinusoid.double_times ? static_cast<const double*>(from)[row]
                                 : double(static_cast<const float*>(from)[row]);
  };
  if (embedder == 0) {
    return sinusoid.time_scale * read(sinusoid.t);
  }
  double tau = 0;
  if (sinusoid.of_t != 0) {
    tau += sinusoid.of_t * read(sinusoid.t);
  }
  if (sinusoid.of_r != 0) {
    tau += sinusoid.of_r * read(sinusoid.r);
  }
  return sinusoid.time_scale * tau;
}

__device__ inline float sine(float half_turns, bool cosine) {
  return cosine ? cospif(half_turns) : sinpif(half_turns);
}

__device__ inline double sine(double half_turns, bool cosine) {
  return cosine ? cospi(half_turns) : sinpi(half_turns);
}

template <class Acc>
__device__ Acc rounded(Acc value, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return static_cast<Acc>(c10::BFloat16(float(value)));
    case ScalarType::Half: return static_cast<Acc>(c10::Half(float(value)));
    case ScalarType::Float: return static_cast<Acc>(float(value));
    default: return value;
  }
}

// features[m][i] of channels first .. first + FEATURES. Frequencies and phases are float64, neither of which is rounded
// before its sine is taken; whole turns are dropped, so that the sine needs no reduction of its own.
template <class Acc, int ROWS>
__device__ void compute_features(
    Acc (&features)[ROWS][FEATURES], const FlowmapEmbedding& given, int embedder, int64_t first_row, int64_t first) {
  const Sinusoid& sinusoid = given.sinusoid;
  const int64_t half = sinusoid.channels / 2;
  for (int i = threadIdx.x; i < FEATURES && first + i < sinusoid.channels; i += LAYER_THREADS) {
    const int64_t channel = first + i;
    const int64_t index = channel < half ? channel : channel - half;
    const bool cosine = (channel < half) == sinusoid.cos_first;
    const double frequency = exp2(-sinusoid.log2_max_period * double(index) / sinusoid.steps);
    const double half_turns_per_time = frequency * 0.3183098861837907; // 1 / pi
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      const int64_t row = first_row + m < given.rows ? first_row + m : given.rows - 1;
      const double half_turns = time_of(sinusoid, embedder, row) * half_turns_per_time;
      const Acc feature = sine(static_cast<Acc>(half_turns - 2 * rint(half_turns / 2)), cosine);
      features[m][i] = channel < 2 * half ? rounded(feature, given.embedders[embedder].rounded) : Acc(0);
    }
  }
}

// ---- products of rows with a warp's units

template <class Acc, int ROWS>
struct Sums {
  Acc values[ROWS][UNITS<ROWS>];

  __device__ Sums() {
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
#pragma unroll
      for (int n = 0; n < UNITS<ROWS>; ++n) {
        values[m][n] = 0;
      }
    }
  }

  // values[m][n] += rows[m, :] . weight[n, :]. Rows and units past the last are the last again.
  template <class T>
  __device__ void add(
      const Acc* rows, int64_t row_stride, int last_row, const T* weight, int64_t weight_stride, int last_unit,
      int64_t terms, bool aligned) {
    constexpr int N = lanes_of<T>();
#pragma unroll(UNITS<ROWS> == 1 ? 2 : 1)
    for (int64_t k = lane_id() * N; k < terms; k += WARP * N) {
      const Span span(k, N, terms, aligned);
      Values<Acc, N> of_unit[UNITS<ROWS>];
#pragma unroll
      for (int n = 0; n < UNITS<ROWS>; ++n) {
        of_unit[n] = load<Acc, N>(weight + (n < last_unit ? n : last_unit) * weight_stride, span);
      }
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const auto of_row = load<Acc, N>(rows + (m < last_row ? m : last_row) * row_stride, span);
#pragma unroll
        for (int n = 0; n < UNITS<ROWS>; ++n) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            values[m][n] += of_row[i] * of_unit[n][i];
          }
        }
      }
    }
  }

  // This lane's of the ROWS * UNITS<ROWS> sums over the warp, by (m, n) in order. Every lane calls it.
  __device__ Acc own() {
    Acc found = 0;
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
#pragma unroll
      for (int n = 0; n < UNITS<ROWS>; ++n) {
        const Acc total = warp_sum(values[m][n]);
        if (lane_id() == m * UNITS<ROWS> + n) {
          found = total;
        }
      }
    }
    return found;
  }
};

// The sum that a lane owns.
template <int ROWS>
struct Place {
  int64_t row, unit;
  bool exists;

  __device__ Place(int64_t first_row, int64_t rows, int64_t first_unit, int64_t units)
      : row(first_row + lane_id() / UNITS<ROWS>),
        unit(first_unit + lane_id() % UNITS<ROWS>),
        exists(lane_id() < ROWS * UNITS<ROWS> && row < rows && unit < units) {}
};

__device__ inline int last_of(int64_t first, int64_t size) {
  return int(size - 1 - first < 0 ? 0 : size - 1 - first < WARP ? size - 1 - first : WARP);
}

template <class Acc>
__device__ Acc bias_of(const Layer& layer, int64_t unit) {
  return layer.bias ? load_as<Acc>(layer.bias, layer.dtype, unit) : Acc(0);
}

// ---- forward

template <int ROWS>
__host__ __device__ int64_t groups_of(int64_t units) {
  return (units + LAYER_WARPS * UNITS<ROWS> - 1) / (LAYER_WARPS * UNITS<ROWS>);
}

__host__ __device__ inline int64_t widest(const FlowmapEmbedding& given) {
  const int64_t base = given.embedders[0].first.outputs, delta = given.embedders[1].first.outputs;
  return base < delta ? delta : base;
}

// This block's groups of hidden units, of both embedders.
template <class Acc, int ROWS>
__device__ void hidden_units(const FlowmapEmbedding& given) {
  alignas(16) __shared__ Acc features[ROWS][FEATURES];
  const int64_t groups = groups_of<ROWS>(widest(given)), channels = given.sinusoid.channels;
  for (int64_t task = blockIdx.x; task < 2 * groups; task += gridDim.x) {
    const int embedder = int(task / groups);
    const int64_t group = task % groups;
    const Layer& layer = given.embedders[embedder].first;
    const int64_t unit = (group * LAYER_WARPS + warp_id()) * UNITS<ROWS>;
    for (int64_t row = 0; row < given.rows; row += ROWS) {
      Sums<Acc, ROWS> sums;
      for (int64_t first = 0; first < channels; first += FEATURES) {
        __syncthreads(); // the block is done with the features before these
        compute_features<Acc, ROWS>(features, given, embedder, row, first);
        __syncthreads();
        const int64_t count = channels - first < FEATURES ? channels - first : FEATURES;
        if (given.features[embedder] && group == 0) {
          for (int64_t i = threadIdx.x; i < ROWS * count; i += LAYER_THREADS) {
            if (row + i / count < given.rows) {
              at_row<Acc>(given.features[embedder], row + i / count, channels)[first + i % count] =
                  features[i / count][i % count];
            }
          }
        }
        if (unit < layer.outputs) {
          with_storage<Acc>(layer.dtype, [&]<class T>(T) {
            const T* weight = static_cast<const T*>(layer.weight) + unit * channels + first;
            sums.add(
                &features[0][0], FEATURES, ROWS - 1, weight, channels, last_of(unit, layer.outputs), count,
                layer.aligned);
          });
        }
      }
      const Acc total = sums.own();
      const Place<ROWS> place(row, given.rows, unit, layer.outputs);
      if (place.exists) {
        const Acc pre = total + bias_of<Acc>(layer, place.unit);
        at_row<Acc>(given.hidden[embedder], place.row, layer.outputs)[place.unit] = silu(pre);
        if (given.pre[embedder]) {
          at_row<Acc>(given.pre[embedder], place.row, layer.outputs)[place.unit] = pre;
        }
      }
    }
  }
}

// use(row, channel, e, d) for this block's output channels, both embedders' outputs at hand.
template <class Acc, int ROWS, class F>
__device__ void for_outputs(const FlowmapEmbedding& given, F&& use) {
  for (int64_t group = blockIdx.x; group < groups_of<ROWS>(given.channels); group += gridDim.x) {
    const int64_t channel = (group * LAYER_WARPS + warp_id()) * UNITS<ROWS>;
    if (channel >= given.channels) {
      continue;
    }
    for (int64_t row = 0; row < given.rows; row += ROWS) {
      const Place<ROWS> place(row, given.rows, channel, given.channels);
      Acc out[2];
#pragma unroll
      for (int embedder = 0; embedder < 2; ++embedder) {
        const Layer& layer = given.embedders[embedder].second;
        Sums<Acc, ROWS> sums;
        with_storage<Acc>(layer.dtype, [&]<class T>(T) {
          sums.add(
              at_row<Acc>(given.hidden[embedder], row, layer.inputs), layer.inputs, last_of(row, given.rows),
              static_cast<const T*>(layer.weight) + channel * layer.inputs, layer.inputs,
              last_of(channel, given.channels), layer.inputs, layer.aligned);
        });
        out[embedder] = sums.own() + (place.exists ? bias_of<Acc>(layer, place.unit) : Acc(0));
      }
      if (place.exists) {
        use(place.row, place.unit, out[0], out[1]);
      }
    }
  }
}

template <class Acc, int ROWS>
__device__ void outputs(const FlowmapEmbedding& given, const FlowmapOutput& out) {
  const Acc gate = *static_cast<const Acc*>(given.gate);
  for_outputs<Acc, ROWS>(given, [&](int64_t row, int64_t channel, Acc e, Acc d) {
    const Acc y = e + gate * (d - e);
    store_as(out.y, out.dtype, row * given.channels + channel, y);
    if (out.silu) {
      store_as(out.silu, out.dtype, row * given.channels + channel, silu(y));
    }
  });
}

template <class Acc, int ROWS>
__global__ void __launch_bounds__(LAYER_THREADS, RESIDENT<ROWS>) flowmap_embedding_one_launch_kernel(
    FlowmapEmbedding given, FlowmapOutput out) {
  hidden_units<Acc, ROWS>(given);
  grid_barrier();
  outputs<Acc, ROWS>(given, out);
}

template <class Acc, int ROWS>
__global__ void __launch_bounds__(LAYER_THREADS, RESIDENT<ROWS>) flowmap_embedding_hidden_kernel(
    FlowmapEmbedding given) {
  hidden_units<Acc, ROWS>(given);
}

template <class Acc, int ROWS>
__global__ void __launch_bounds__(LAYER_THREADS, RESIDENT<ROWS>) flowmap_embedding_output_kernel(
    FlowmapEmbedding given, FlowmapOutput out) {
  outputs<Acc, ROWS>(given, out);
}

// ---- backward

// The gradient of the blend, and each block's share of the gate's.
template <class Acc, int ROWS>
__global__ void __launch_bounds__(LAYER_THREADS, RESIDENT<ROWS>) flowmap_embedding_bwd_blend_kernel(
    FlowmapEmbedding given, BlendBackward blend) {
  const Acc gate = *static_cast<const Acc*>(given.gate);
  Acc total = 0;
  for_outputs<Acc, ROWS>(given, [&](int64_t row, int64_t channel, Acc e, Acc d) {
    const int64_t at = row * given.channels + channel;
    Acc dy = load_as<Acc>(blend.grad, blend.grad_dtype, at);
    if (blend.grad_silu) {
      dy += load_as<Acc>(blend.grad_silu, blend.grad_silu_dtype, at) * silu_derivative(e + gate * (d - e));
    }
    static_cast<Acc*>(blend.dy)[at] = dy;
    total += dy * (d - e);
  });
  if (blend.partials) {
    total = block_sum<LAYER_THREADS>(total);
    if (threadIdx.x == 0) {
      static_cast<Acc*>(blend.partials)[blockIdx.x] = total;
    }
  }
}

template <class Acc>
__device__ Acc factor_of(const FlowmapEmbedding& given, int which) {
  const Acc gate = *static_cast<const Acc*>(given.gate);
  return which == 0 ? Acc(1) - gate : which == 1 ? gate : Acc(1);
}

constexpr int PACKS = 8; // of a weight's row that neighbouring threads take: 128 bytes
constexpr int SLICES = THREADS / PACKS; // of the weight's rows, which are summed over

// grad_pre = factor (dy W) silu'(pre), for PACKS * N hidden units.
template <class Acc, int ROWS, class T>
__device__ void hidden_gradient(
    Acc* grad_pre, const Acc* pre, const Acc* dy, const Layer& layer, Acc factor, int64_t rows) {
  constexpr int N = lanes_of<T>(), WIDTH = PACKS * N;
  __shared__ Acc of_warp[THREADS / WARP][ROWS][WIDTH];
  const int64_t first = int64_t(blockIdx.x) * WIDTH, hidden = layer.inputs;
  if (first >= hidden) {
    return;
  }
  const int pack = threadIdx.x % PACKS, slice = threadIdx.x / PACKS;
  const Span span(first + pack * N, N, hidden, layer.aligned);
  const T* const weight = static_cast<const T*>(layer.weight);
  for (int64_t row = 0; row < rows; row += ROWS) {
    Acc sums[ROWS][N] = {};
#pragma unroll 2
    for (int64_t channel = slice; channel < layer.outputs; channel += SLICES) {
      const auto w = load<Acc, N>(weight + channel * hidden, span);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const Acc g = dy[(row + m < rows ? row + m : rows - 1) * layer.outputs + channel];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sums[m][i] += g * w[i];
        }
      }
    }
    __syncthreads(); // the block is done with the sums of the rows before these
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        for (int lane = PACKS; lane < WARP; lane *= 2) {
          sums[m][i] += __shfl_xor_sync(0xffffffff, sums[m][i], lane);
        }
        if (lane_id() < PACKS) {
          of_warp[warp_id()][m][pack * N + i] = sums[m][i];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
      const int64_t m = row + i / WIDTH, unit = first + i % WIDTH;
      if (m < rows && unit < hidden) {
        Acc total = 0;
        for (int warp = 0; warp < THREADS / WARP; ++warp) {
          total += of_warp[warp][i / WIDTH][i % WIDTH];
        }
        grad_pre[m * hidden + unit] = factor * total * silu_derivative(pre[m * hidden + unit]);
      }
    }
  }
}

struct HiddenGradients {
  const void* dy;
  void* grad_pre[2];
};

template <class Acc, int ROWS>
__global__ void __launch_bounds__(THREADS) flowmap_embedding_bwd_hidden_kernel(
    FlowmapEmbedding given, HiddenGradients gradients) {
  const int embedder = blockIdx.y;
  void* const grad_pre = embedder == 0 ? gradients.grad_pre[0] : gradients.grad_pre[1];
  if (!grad_pre) {
    return;
  }
  const Layer& layer = given.embedders[embedder].second;
  with_storage<Acc>(layer.dtype, [&]<class T>(T) {
    hidden_gradient<Acc, ROWS, T>(
        static_cast<Acc*>(grad_pre), static_cast<const Acc*>(given.pre[embedder]),
        static_cast<const Acc*>(gradients.dy), layer, factor_of<Acc>(given, embedder), given.rows);
  });
}

constexpr int OUTER_UNITS = 4; // outputs for which a thread reads an input once

// The gradient of OUTER_UNITS rows of a weight, N inputs each.
template <class Acc, class T>
__device__ void layer_gradient(const LayerGradient& layer, Acc factor, int64_t rows) {
  constexpr int N = lanes_of<T>();
  const int64_t packs = ceil_div(layer.inputs, N), task = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t first = task / packs * OUTER_UNITS;
  if (first >= layer.outputs) {
    return;
  }
  const Span span(task % packs * N, N, layer.inputs, layer.aligned);
  Values<Acc, N> sums[OUTER_UNITS] = {};
  Acc bias[OUTER_UNITS] = {};
#pragma unroll 2
  for (int64_t row = 0; row < rows; ++row) {
    const auto input = load<Acc, N>(static_cast<const Acc*>(layer.input) + row * layer.inputs, span);
#pragma unroll
    for (int n = 0; n < OUTER_UNITS; ++n) {
      const int64_t unit = first + n < layer.outputs ? first + n : layer.outputs - 1;
      const Acc g = static_cast<const Acc*>(layer.grad)[row * layer.outputs + unit];
      bias[n] += g;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[n][i] += g * input[i];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < OUTER_UNITS; ++n) {
    if (first + n < layer.outputs) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[n][i] *= factor;
      }
      store(static_cast<T*>(layer.weight) + (first + n) * layer.inputs, span, sums[n]);
      if (layer.bias && span.at == 0) {
        static_cast<T*>(layer.bias)[first + n] = static_cast<T>(factor * bias[n]);
      }
    }
  }
}

struct LayerGradients {
  LayerGradient layers[4];
};

template <class Acc>
__global__ void __launch_bounds__(THREADS) flowmap_embedding_bwd_weight_kernel(
    FlowmapEmbedding given, LayerGradients gradients) {
  const LayerGradient& layer = gradients.layers[blockIdx.y];
  if (layer.weight) {
    with_storage<Acc>(layer.dtype, [&]<class T>(T) {
      layer_gradient<Acc, T>(layer, factor_of<Acc>(given, layer.factor), given.rows);
    });
  }
}

// ---- launches

template <class F>
void with_accumulator(const FlowmapEmbedding& given, F&& f) {
  given.accumulate == ScalarType::Double ? f(double{}) : f(float{});
}

template <int ROWS>
using Rows = std::integral_constant<int, ROWS>;

// f(Acc{}, Rows<ROWS>{}): how many rows meet a weight that is read once.
template <class F>
void with_rows(const FlowmapEmbedding& given, F&& f) {
  with_accumulator(given, [&]<class Acc>(Acc accumulator) {
    if (given.rows == 1) {
      f(accumulator, Rows<1>{});
    } else if constexpr (std::is_same_v<Acc, double>) {
      f(accumulator, Rows<4>{});
    } else if (given.rows == 2) {
      f(accumulator, Rows<2>{});
    } else if (given.rows <= 4) {
      f(accumulator, Rows<4>{});
    } else {
      f(accumulator, Rows<8>{});
    }
  });
}

} // namespace

void launch_hidden(const FlowmapEmbedding& given) {
  with_rows(given, [&]<class Acc, int ROWS>(Acc, Rows<ROWS>) {
    launch(
        given.device, flowmap_embedding_hidden_kernel<Acc, ROWS>, dim3(2 * groups_of<ROWS>(widest(given))),
        LAYER_THREADS, given);
  });
}

void launch_flowmap_embedding(const FlowmapEmbedding& given, const FlowmapOutput& out) {
  with_rows(given, [&]<class Acc, int ROWS>(Acc, Rows<ROWS>) {
    const int64_t groups = groups_of<ROWS>(given.channels);
    if constexpr (ROWS <= ONE_LAUNCH_ROWS) {
      const auto kernel = flowmap_embedding_one_launch_kernel<Acc, ROWS>;
      const int64_t wanted = std::max(2 * groups_of<ROWS>(widest(given)), groups);
      const int64_t blocks = std::min(wanted, resident_blocks(given.device, kernel, LAYER_THREADS));
      if (blocks > 0) {
        return launch_together(given.device, kernel, dim3(blocks), LAYER_THREADS, given, out);
      }
    }
    launch_hidden(given);
    launch(given.device, flowmap_embedding_output_kernel<Acc, ROWS>, dim3(groups), LAYER_THREADS, given, out);
  });
}

int64_t blend_partials(const FlowmapEmbedding& given) {
  int64_t count = 0;
  with_rows(given, [&]<class Acc, int ROWS>(Acc, Rows<ROWS>) { count = groups_of<ROWS>(given.channels); });
  return count;
}

void launch_blend_backward(const FlowmapEmbedding& given, const BlendBackward& blend) {
  with_rows(given, [&]<class Acc, int ROWS>(Acc, Rows<ROWS>) {
    const int64_t groups = groups_of<ROWS>(given.channels);
    launch(
        given.device, flowmap_embedding_bwd_blend_kernel<Acc, ROWS>, dim3(groups), LAYER_THREADS, given, blend);
    if (blend.partials) {
      launch(
          given.device, sum_partials_kernel<Acc>, dim3(1), THREADS, static_cast<Acc*>(blend.grad_gate),
          static_cast<const Acc*>(blend.partials), groups);
    }
  });
}

void launch_hidden_backward(const FlowmapEmbedding& given, const void* dy, void* const (&grad_pre)[2]) {
  const HiddenGradients gradients{dy, {grad_pre[0], grad_pre[1]}};
  with_accumulator(given, [&]<class Acc>(Acc) {
    int64_t blocks = 0;
    for (int embedder = 0; embedder < 2; ++embedder) {
      with_storage<Acc>(given.embedders[embedder].second.dtype, [&]<class T>(T) {
        const int64_t width = PACKS * lanes_of<T>();
        blocks = std::max(blocks, ceil_div(given.embedders[embedder].second.inputs, width));
      });
    }
    const auto kernel = given.rows == 1 ? flowmap_embedding_bwd_hidden_kernel<Acc, 1>
                                        : flowmap_embedding_bwd_hidden_kernel<Acc, 4>;
    launch(given.device, kernel, dim3(blocks, 2), THREADS, given, gradients);
  });
}

void launch_layer_gradients(const FlowmapEmbedding& given, const LayerGradient (&layers)[4]) {
  LayerGradients gradients;
  std::copy_n(layers, 4, gradients.layers);
  with_accumulator(given, [&]<class Acc>(Acc) {
    int64_t blocks = 0;
    for (const LayerGradient& layer : layers) {
      with_storage<Acc>(layer.dtype, [&]<class T>(T) {
        const int64_t tasks = ceil_div(layer.inputs, lanes_of<T>()) * ceil_div(layer.outputs, OUTER_UNITS);
        blocks = std::max(blocks, ceil_div(tasks, THREADS));
      });
    }
    launch(given.device, flowmap_embedding_bwd_weight_kernel<Acc>, dim3(blocks, 4), THREADS, given, gradients);
  });
}

} // namespace anyflow::cuda
