// y = e + gate (d - e),  e = base(sinusoid(time_scale t)),  d = delta(sinusoid(time_scale tau))
//
// A few rows meet megabytes of weights: each weight is read once, converted in a register, and the rows stay in the
// accumulator's dtype. Every sum has one order, whatever the number of rows and threads.
#include "common.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

namespace anyflow {
namespace {

// f(i) for i in [0, size), in parallel, where one i costs about `work` multiplications.
template <class F>
void for_parallel(int64_t size, int64_t work, F&& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  at::parallel_for(0, size, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      f(i);
    }
  });
}

#ifdef CPU_CAPABILITY_AVX512
constexpr int TILE_ROWS = 4; // as many as leave room for their sums in the registers
#else
constexpr int TILE_ROWS = 2;
#endif

// out[m, n] of ROWS rows and COLUMNS columns = a[m, :] . w[n, :] + bias[n]
template <class Acc, class T, int ROWS, int COLUMNS>
void dot_tile(Acc* out, const Acc* a, const T* w, const T* bias, int64_t stride, int64_t terms) {
  Lanes<Acc> total[ROWS][COLUMNS];
  for (auto& row : total) {
    std::fill_n(row, COLUMNS, Lanes<Acc>(Acc(0)));
  }
  for_lanes<Acc>(terms, [&](int64_t k, auto count) {
    Lanes<Acc> row[ROWS];
    for (int m = 0; m < ROWS; ++m) {
      row[m] = load_lanes<Acc>(a + m * terms + k, count);
    }
    for (int n = 0; n < COLUMNS; ++n) {
      const Lanes<Acc> weight = load_lanes<Acc>(w + n * terms + k, count);
      for (int m = 0; m < ROWS; ++m) {
        total[m][n] = fma(row[m], weight, total[m][n]);
      }
    }
  });
  for (int m = 0; m < ROWS; ++m) {
    for (int n = 0; n < COLUMNS; ++n) {
      out[m * stride + n] = sum(total[m][n]) + (bias ? static_cast<Acc>(bias[n]) : Acc(0));
    }
  }
}

template <class Acc, class T, int COLUMNS>
void dot_columns(Acc* out, const Acc* a, const T* w, const T* bias, int64_t rows, int64_t stride, int64_t terms) {
  int64_t m = 0;
  for (; m + TILE_ROWS <= rows; m += TILE_ROWS) {
    dot_tile<Acc, T, TILE_ROWS, COLUMNS>(out + m * stride, a + m * terms, w, bias, stride, terms);
  }
  for (; m < rows; ++m) {
    dot_tile<Acc, T, 1, COLUMNS>(out + m * stride, a + m * terms, w, bias, stride, terms);
  }
}

struct Layer {
  Tensor weight, bias; // in the storage dtype; bias undefined: none

  int64_t inputs() const { return weight.size(1); }
  int64_t outputs() const { return weight.size(0); }

  // a W^T + bias
  Tensor operator()(const Tensor& a) const {
    Tensor out = empty({a.size(0), outputs()}, a.scalar_type(), a);
    with_dtype(weight.scalar_type(), [&]<class T>(T) {
      using Acc = Accumulator<T>;
      constexpr int64_t columns = 2;
      const int64_t rows = a.size(0), width = outputs(), terms = inputs();
      Acc* const to = out.data_ptr<Acc>();
      const Acc* const from = a.const_data_ptr<Acc>();
      const T* const w = weight.const_data_ptr<T>();
      const T* const b = const_data_or_null<T>(bias);
      for_parallel((width + columns - 1) / columns, columns * rows * terms, [&](int64_t block) {
        const int64_t n = block * columns;
        const T* const block_bias = b ? b + n : nullptr;
        if (n + columns <= width) {
          dot_columns<Acc, T, columns>(to + n, from, w + n * terms, block_bias, rows, width, terms);
        } else {
          dot_columns<Acc, T, 1>(to + n, from, w + n * terms, block_bias, rows, width, terms);
        }
      });
    });
    return out;
  }

  // grad W: sums over the outputs, in columns of the weight that stay in the nearest cache.
  Tensor backward_input(const Tensor& grad) const {
    Tensor out = empty({grad.size(0), inputs()}, grad.scalar_type(), grad);
    with_dtype(weight.scalar_type(), [&]<class T>(T) {
      using Acc = Accumulator<T>;
      constexpr int64_t columns = 128;
      constexpr int unroll = 4; // outputs that are added with one pass over the sums
      const int64_t rows = grad.size(0), width = inputs(), terms = outputs();
      Acc* const to = out.data_ptr<Acc>();
      const Acc* const g = grad.const_data_ptr<Acc>();
      const T* const w = weight.const_data_ptr<T>();
      for_parallel((width + columns - 1) / columns, columns * rows * terms, [&](int64_t block) {
        const int64_t k = block * columns, size = std::min(columns, width - k);
        for (int64_t m = 0; m < rows; ++m) {
          std::fill_n(to + m * width + k, size, Acc(0));
        }
        int64_t n = 0;
        for (; n + unroll <= terms; n += unroll) {
          add_outer<unroll>(to + k, g + n, w + n * width + k, rows, width, terms, size);
        }
        for (; n < terms; ++n) {
          add_outer<1>(to + k, g + n, w + n * width + k, rows, width, terms, size);
        }
      });
    });
    return out;
  }

  // The gradients of the weight, grad^T a, and of the bias.
  std::pair<Tensor, Tensor> backward_weights(const Tensor& grad, const Tensor& a) const {
    Tensor grad_weight = at::empty_like(weight), grad_bias = bias.defined() ? at::empty_like(bias) : Tensor();
    with_dtype(weight.scalar_type(), [&]<class T>(T) {
      using Acc = Accumulator<T>;
      const int64_t rows = grad.size(0), width = inputs(), outs = outputs();
      const Acc* const g = grad.const_data_ptr<Acc>();
      const Acc* const from = a.const_data_ptr<Acc>();
      T* const dw = grad_weight.data_ptr<T>();
      T* const db = data_or_null<T>(grad_bias);
      constexpr int64_t columns = 4;
      for_parallel((outs + columns - 1) / columns, columns * rows * width, [&](int64_t block) {
        const int64_t n = block * columns;
        if (n + columns <= outs) {
          outer_rows<columns>(dw + n * width, g + n, from, rows, outs, width);
        } else {
          for (int64_t last = n; last < outs; ++last) {
            outer_rows<1>(dw + last * width, g + last, from, rows, outs, width);
          }
        }
        for (int64_t i = n; db && i < std::min(n + columns, outs); ++i) {
          Acc total = 0;
          for (int64_t m = 0; m < rows; ++m) {
            total += g[m * outs + i];
          }
          db[i] = static_cast<T>(total);
        }
      });
    });
    return {grad_weight, grad_bias};
  }

 private:
  // sums[m, :] += g[m, n] w[n, :] over TERMS values of n
  template <int TERMS, class Acc, class T>
  static void add_outer(
      Acc* sums, const Acc* g, const T* w, int64_t rows, int64_t width, int64_t terms, int64_t size) {
    for (int64_t m = 0; m < rows; ++m) {
      const Output<Acc> to(sums + m * width, false);
      for_lanes<Acc>(size, [&](int64_t k, auto count) {
        Lanes<Acc> total = load_lanes<Acc>(to.data + k, count);
        for (int n = 0; n < TERMS; ++n) {
          total = fma(Lanes<Acc>(g[m * terms + n]), load_lanes<Acc>(w + n * width + k, count), total);
        }
        store_lanes(total, to, k, count);
      });
    }
  }

  // out[n, :] = sum over m of g[m, n] a[m, :], for COLUMNS values of n
  template <int COLUMNS, class Acc, class T>
  static void outer_rows(T* out, const Acc* g, const Acc* a, int64_t rows, int64_t outs, int64_t width) {
    for_lanes<Acc>(width, [&](int64_t k, auto count) {
      Lanes<Acc> total[COLUMNS];
      std::fill_n(total, COLUMNS, Lanes<Acc>(Acc(0)));
      for (int64_t m = 0; m < rows; ++m) {
        const Lanes<Acc> row = load_lanes<Acc>(a + m * width + k, count);
        for (int n = 0; n < COLUMNS; ++n) {
          total[n] = fma(Lanes<Acc>(g[m * outs + n]), row, total[n]);
        }
      }
      for (int n = 0; n < COLUMNS; ++n) {
        store_lanes(total[n], Output<T>(out + n * width, false), k, count);
      }
    });
  }
};

// out[i] = f(a[i]..., b[i]...) for contiguous tensors of the accumulator's dtype and one shape.
template <class Acc, class F, class... Tensors>
Tensor elementwise(F&& f, const Tensor& first, const Tensors&... others) {
  Tensor out = at::empty_like(first);
  Acc* const to = out.data_ptr<Acc>();
  for_chunks(first.numel(), [&](int64_t begin, int64_t end) {
    const Output<Acc> chunk(to + begin, false);
    for_lanes<Acc>(end - begin, [&](int64_t i, auto count) {
      const int64_t at = begin + i;
      store_lanes(
          f(load_lanes<Acc>(first.const_data_ptr<Acc>() + at, count),
            load_lanes<Acc>(others.template const_data_ptr<Acc>() + at, count)...),
          chunk,
          i,
          count);
    });
  });
  return out;
}

struct Sinusoid {
  int64_t channels;
  bool cos_first;
  double shift, scale, max_period;

  // [M, channels] in float64: neither a frequency nor a phase of thousands is rounded before its sine is taken.
  Tensor operator()(const Tensor& times) const {
    using Double = at::vec::Vectorized<double>;
    const int64_t half = channels / 2, rows = times.numel();
    std::vector<double> frequencies(half);
    for (int64_t i = 0; i < half; ++i) {
      frequencies[i] = std::exp(-std::log(max_period) * double(i) / (double(half) - shift));
    }
    Tensor features = channels % 2 ? at::zeros({rows, channels}, times.options())
                                   : at::empty({rows, channels}, times.options());
    const double* const time = times.const_data_ptr<double>();
    double* const to = features.data_ptr<double>();
    for_parallel(rows, 64 * half, [&](int64_t row) {
      double* const cos = to + row * channels + (cos_first ? 0 : half);
      double* const sin = to + row * channels + (cos_first ? half : 0);
      for (int64_t i = 0; i < half; i += Double::size()) {
        const int64_t count = std::min<int64_t>(Double::size(), half - i);
        const Double phase = Double(scale * time[row]) * Double::loadu(frequencies.data() + i, count);
        phase.cos().store(cos + i, count);
        phase.sin().store(sin + i, count);
      }
    });
    return features;
  }
};

struct Embedder {
  Layer first, second;
  ScalarType input_dtype; // to which the features are rounded
  ScalarType accumulate;

  Embedder(
      const Tensor& weight_1,
      const OptionalTensor& bias_1,
      const Tensor& weight_2,
      const OptionalTensor& bias_2,
      ScalarType accumulate)
      : first(layer(weight_1, bias_1, accumulate)),
        second(layer(weight_2, bias_2, accumulate)),
        input_dtype(weight_1.scalar_type()),
        accumulate(accumulate) {}

  static Layer layer(const Tensor& weight, const OptionalTensor& bias, ScalarType accumulate) {
    const ScalarType storage = storage_dtype(weight.scalar_type(), accumulate);
    return {ready(weight, storage), ready_if_given(bias, storage)};
  }

  Tensor features(const Sinusoid& sinusoid, const Tensor& times) const {
    return sinusoid(times).to(input_dtype).to(accumulate);
  }
};

struct Arguments {
  Tensor t, r;
  std::array<Embedder, 2> embedders; // base, delta
  double gate;
  ScalarType accumulate;
  Sinusoid sinusoid;

  Tensor pre(int which) const {
    const Embedder& embedder = embedders[which];
    return embedder.first(embedder.features(sinusoid, which == 0 ? t : r));
  }
};

template <class Acc>
Tensor activated(const Tensor& pre) {
  return elementwise<Acc>([](const Lanes<Acc>& x) { return silu(x); }, pre);
}

template <class Acc>
Tensor blended(const Tensor& base, const Tensor& delta, double gate) {
  const Lanes<Acc> g(static_cast<Acc>(gate));
  return elementwise<Acc>([&](const Lanes<Acc>& e, const Lanes<Acc>& d) { return fma(g, d - e, e); }, base, delta);
}

Arguments arguments(
    const Tensor& t,
    const Tensor& r,
    const Tensor& base_weight_1,
    const OptionalTensor& base_bias_1,
    const Tensor& base_weight_2,
    const OptionalTensor& base_bias_2,
    const Tensor& delta_weight_1,
    const OptionalTensor& delta_bias_1,
    const Tensor& delta_weight_2,
    const OptionalTensor& delta_bias_2,
    const Tensor& gate,
    int64_t num_channels,
    bool flip_sin_to_cos,
    double downscale_freq_shift,
    double scale,
    double max_period,
    double time_scale,
    std::string_view deltatime_type) {
  const ScalarType accumulate = accumulation_dtype(
      {base_weight_1.scalar_type(),
       base_weight_2.scalar_type(),
       delta_weight_1.scalar_type(),
       delta_weight_2.scalar_type()});
  const Tensor flow_time = t.to(at::kDouble), lower_time = r.to(at::kDouble);
  const Tensor tau = deltatime_type == "r" ? lower_time
      : deltatime_type == "t-r"            ? flow_time.sub(lower_time)
                                           : lower_time.sub(flow_time);
  return {
      flow_time.mul(time_scale).contiguous(),
      tau.mul(time_scale).contiguous(),
      {Embedder(base_weight_1, base_bias_1, base_weight_2, base_bias_2, accumulate),
       Embedder(delta_weight_1, delta_bias_1, delta_weight_2, delta_bias_2, accumulate)},
      gate.item<double>(),
      accumulate,
      {num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period}};
}

std::tuple<Tensor, Tensor> flowmap_embedding(
    const Tensor& t,
    const Tensor& r,
    const Tensor& base_weight_1,
    const OptionalTensor& base_bias_1,
    const Tensor& base_weight_2,
    const OptionalTensor& base_bias_2,
    const Tensor& delta_weight_1,
    const OptionalTensor& delta_bias_1,
    const Tensor& delta_weight_2,
    const OptionalTensor& delta_bias_2,
    const Tensor& gate,
    int64_t num_channels,
    bool flip_sin_to_cos,
    double downscale_freq_shift,
    double scale,
    double max_period,
    double time_scale,
    std::string_view deltatime_type,
    bool with_silu) {
  const Arguments given = arguments(
      t, r, base_weight_1, base_bias_1, base_weight_2, base_bias_2, delta_weight_1, delta_bias_1, delta_weight_2,
      delta_bias_2, gate, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale,
      deltatime_type);
  const ScalarType dtype = base_weight_2.scalar_type();
  Tensor y, silu_of_y;
  with_accumulator(given.accumulate, [&]<class Acc>(Acc) {
    std::array<Tensor, 2> out;
    for (int which = 0; which < 2; ++which) {
      out[which] = given.embedders[which].second(activated<Acc>(given.pre(which)));
    }
    y = blended<Acc>(out[0], out[1], given.gate);
    if (with_silu) {
      silu_of_y = activated<Acc>(y);
    }
  });
  return {cast(y, dtype), with_silu ? cast(silu_of_y, dtype) : empty({0}, dtype, base_weight_2)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients flowmap_embedding_backward(
    const Tensor& grad,
    const OptionalTensor& grad_silu,
    const Tensor& t,
    const Tensor& r,
    const Tensor& base_weight_1,
    const OptionalTensor& base_bias_1,
    const Tensor& base_weight_2,
    const OptionalTensor& base_bias_2,
    const Tensor& delta_weight_1,
    const OptionalTensor& delta_bias_1,
    const Tensor& delta_weight_2,
    const OptionalTensor& delta_bias_2,
    const Tensor& gate,
    int64_t num_channels,
    bool flip_sin_to_cos,
    double downscale_freq_shift,
    double scale,
    double max_period,
    double time_scale,
    std::string_view deltatime_type,
    bool need_base,
    bool need_delta,
    bool need_gate) {
  const Arguments given = arguments(
      t, r, base_weight_1, base_bias_1, base_weight_2, base_bias_2, delta_weight_1, delta_bias_1, delta_weight_2,
      delta_bias_2, gate, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale,
      deltatime_type);
  const std::array<bool, 2> needed = {need_base, need_delta};
  std::array<Tensor, 8> grads; // undefined: not needed, or no bias
  Tensor grad_gate;
  with_accumulator(given.accumulate, [&]<class Acc>(Acc) {
    using L = Lanes<Acc>;
    const bool need_outputs = need_gate || grad_silu;
    std::array<Tensor, 2> pre, hidden, out;
    for (int which = 0; which < 2; ++which) {
      if (need_outputs || needed[which]) {
        pre[which] = given.pre(which);
        hidden[which] = activated<Acc>(pre[which]);
      }
      if (need_outputs) {
        out[which] = given.embedders[which].second(hidden[which]);
      }
    }
    Tensor dy = ready(grad, given.accumulate);
    if (grad_silu) {
      dy = elementwise<Acc>(
          [](const L& dy, const L& ds, const L& y) { return fma(ds, silu_derivative(y), dy); },
          dy,
          ready(*grad_silu, given.accumulate),
          blended<Acc>(out[0], out[1], given.gate));
    }
    if (need_gate) {
      const Tensor products = elementwise<Acc>(
          [](const L& dy, const L& e, const L& d) { return dy * (d - e); }, dy, out[0], out[1]);
      double total = 0;
      const Acc* const product = products.const_data_ptr<Acc>();
      for (int64_t i = 0; i < products.numel(); ++i) {
        total += product[i];
      }
      grad_gate = at::full(gate.sizes(), total, gate.options());
    }
    for (int which = 0; which < 2; ++which) {
      if (!needed[which]) {
        continue;
      }
      const Embedder& embedder = given.embedders[which];
      const L factor(static_cast<Acc>(which == 0 ? 1 - given.gate : given.gate));
      const Tensor dout = elementwise<Acc>([&](const L& dy) { return factor * dy; }, dy);
      const Tensor dpre = elementwise<Acc>(
          [](const L& dh, const L& x) { return dh * silu_derivative(x); },
          embedder.second.backward_input(dout),
          pre[which]);
      const Tensor features = embedder.features(given.sinusoid, which == 0 ? given.t : given.r);
      std::tie(grads[4 * which], grads[4 * which + 1]) = embedder.first.backward_weights(dpre, features);
      std::tie(grads[4 * which + 2], grads[4 * which + 3]) = embedder.second.backward_weights(dout, hidden[which]);
    }
  });
  const auto finished = [&](const Tensor& found, const Tensor& weight) {
    return found.defined() ? cast(found, weight.scalar_type()) : t.new_empty({0});
  };
  return {
      finished(grads[0], base_weight_1),
      finished(grads[1], base_weight_1),
      finished(grads[2], base_weight_2),
      finished(grads[3], base_weight_2),
      finished(grads[4], delta_weight_1),
      finished(grads[5], delta_weight_1),
      finished(grads[6], delta_weight_2),
      finished(grads[7], delta_weight_2),
      finished(grad_gate, gate)};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CPU, m) {
  m.impl("flowmap_embedding", &flowmap_embedding);
  m.impl("flowmap_embedding_backward", &flowmap_embedding_backward);
}

} // namespace anyflow
