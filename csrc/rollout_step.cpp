// x' = x + (sigma_next - sigma) v,  average' = average + weight v,  v = sign (v_u + guidance_scale (v_c - v_u))
#include "common.h"

#include <tuple>
#include <utility>
#include <vector>

namespace anyflow {
namespace {

// With as many dimensions as x: one element, or [B] with ones behind.
Tensor over(at::IntArrayRef shape, const Tensor& time) {
  if (time.dim() == int64_t(shape.size())) {
    return time;
  }
  std::vector<int64_t> sizes(shape.size(), 1);
  if (time.numel() != 1) {
    sizes[0] = time.size(0);
  }
  return time.reshape(sizes);
}

// The times under x: rows of `inner` elements share one. Where rows would be shorter than a vector, every element has
// its own.
struct Times {
  Tensor sigma, sigma_next, weight; // one value for each row
  int64_t inner;

  Times(at::IntArrayRef shape, const Tensor& sigma, const Tensor& sigma_next, const Tensor& weight, ScalarType dtype) {
    constexpr int64_t shortest = 2 * Lanes<float>::size;
    const Tensor laid = over(shape, sigma);
    inner = 1;
    int64_t kept = int64_t(shape.size());
    while (kept > 0 && laid.size(kept - 1) == 1) {
      inner *= shape[--kept];
    }
    if (inner < shortest && kept > 0) {
      inner = 1;
      kept = int64_t(shape.size());
    }
    std::vector<int64_t> rows(shape.begin(), shape.end());
    std::fill(rows.begin() + kept, rows.end(), 1);
    const auto in_rows = [&](const Tensor& given) {
      const Tensor time = over(shape, given);
      return ready(time.sizes() == at::IntArrayRef(rows) ? time : time.expand(rows), dtype);
    };
    this->sigma = in_rows(sigma);
    this->sigma_next = in_rows(sigma_next);
    this->weight = in_rows(weight);
  }
};

template <class Acc>
struct TimeData {
  const Acc *sigma, *sigma_next, *weight;
  int64_t inner;

  explicit TimeData(const Times& times)
      : sigma(times.sigma.const_data_ptr<Acc>()),
        sigma_next(times.sigma_next.const_data_ptr<Acc>()),
        weight(times.weight.const_data_ptr<Acc>()),
        inner(times.inner) {}

  // f(from, size, coefficients) for the pieces of [begin, end) that lie in one row; coefficients(i, count) gives
  // sigma_next - sigma and weight at the elements from + i.
  template <class F>
  void for_rows(int64_t begin, int64_t end, F&& f) const {
    if (inner == 1) {
      return f(begin, end - begin, [this, begin](int64_t i, auto count) {
        return std::pair(
            load_lanes<Acc>(sigma_next + begin + i, count) - load_lanes<Acc>(sigma + begin + i, count),
            load_lanes<Acc>(weight + begin + i, count));
      });
    }
    for (int64_t row = begin / inner; begin < end; ++row) {
      const int64_t next = std::min(end, (row + 1) * inner);
      const std::pair values(Lanes<Acc>(sigma_next[row] - sigma[row]), Lanes<Acc>(weight[row]));
      f(begin, next - begin, [&values](int64_t, auto) { return values; });
      begin = next;
    }
  }
};

template <class Acc, class T>
Lanes<Acc> load_or_zero(const T* from, int64_t at, int64_t i, auto count) {
  return from ? load_lanes<Acc>(from + at + i, count) : Lanes<Acc>(Acc(0));
}

template <class T>
Output<T> output_at(T* data, int64_t at, bool stream) {
  return Output<T>(data ? data + at : nullptr, stream);
}

struct Forward {
  Tensor new_x, new_average, model_input; // undefined: not wanted
  Tensor x, average, velocity, uncond; // undefined: absent

  template <class X, class V>
  void run(const Times& times, double guidance, int64_t sign) {
    using Acc = Accumulator<V>;
    const TimeData<Acc> time(times);
    Acc* const x_out = data_or_null<Acc>(new_x);
    Acc* const average_out = new_average.data_ptr<Acc>();
    V* const input_out = data_or_null<V>(model_input);
    const X* const x_in = const_data_or_null<X>(x);
    const Acc* const average_in = const_data_or_null<Acc>(average);
    const V* const v_in = velocity.const_data_ptr<V>();
    const V* const u_in = const_data_or_null<V>(uncond);
    const Lanes<Acc> scale(static_cast<Acc>(guidance)), direction(static_cast<Acc>(sign));
    const bool stream = new_average.numel() * int64_t(3 * sizeof(Acc) + sizeof(X) + 3 * sizeof(V)) > STREAM_FROM;
    for_chunks(new_average.numel(), [&](int64_t begin, int64_t end) {
      time.for_rows(begin, end, [&](int64_t at, int64_t size, auto coefficients) {
        const auto to_x = output_at(x_out, at, stream);
        const auto to_average = output_at(average_out, at, stream);
        const auto to_input = output_at(input_out, at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const auto [step, weight] = coefficients(i, count);
          Lanes<Acc> v = load_lanes<Acc>(v_in + at + i, count);
          if (u_in) {
            const Lanes<Acc> u = load_lanes<Acc>(u_in + at + i, count);
            v = fma(scale, v - u, u);
          }
          v = direction * v;
          store_lanes(fma(weight, v, load_or_zero<Acc>(average_in, at, i, count)), to_average, i, count);
          if (to_x) {
            const Lanes<Acc> moved = fma(step, v, load_lanes<Acc>(x_in + at + i, count));
            store_lanes(moved, to_x, i, count);
            if (to_input) {
              store_lanes(moved, to_input, i, count);
            }
          }
        });
      });
    });
  }
};

struct Backward {
  Tensor grad_x_out, grad_velocity, grad_uncond; // the last undefined: not wanted
  Tensor grad_x, grad_average, grad_input; // undefined: zero

  template <class X, class V>
  void run(const Times& times, double guidance, int64_t sign) {
    using Acc = Accumulator<V>;
    const TimeData<Acc> time(times);
    X* const dx_out = grad_x_out.data_ptr<X>();
    V* const dv_out = grad_velocity.data_ptr<V>();
    V* const du_out = data_or_null<V>(grad_uncond);
    const Acc* const gx = const_data_or_null<Acc>(grad_x);
    const Acc* const ga = const_data_or_null<Acc>(grad_average);
    const V* const gi = const_data_or_null<V>(grad_input);
    const Lanes<Acc> direction(static_cast<Acc>(sign));
    const Lanes<Acc> scale(static_cast<Acc>(du_out ? guidance : 1.0)), rest(static_cast<Acc>(1.0 - guidance));
    const bool stream = grad_velocity.numel() * int64_t(2 * sizeof(Acc) + sizeof(X) + 3 * sizeof(V)) > STREAM_FROM;
    for_chunks(grad_velocity.numel(), [&](int64_t begin, int64_t end) {
      time.for_rows(begin, end, [&](int64_t at, int64_t size, auto coefficients) {
        const auto to_x = output_at(dx_out, at, stream);
        const auto to_v = output_at(dv_out, at, stream);
        const auto to_u = output_at(du_out, at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const auto [step, weight] = coefficients(i, count);
          const Lanes<Acc> dx = load_or_zero<Acc>(gx, at, i, count) + load_or_zero<Acc>(gi, at, i, count);
          store_lanes(dx, to_x, i, count);
          const Lanes<Acc> dv = direction * fma(weight, load_or_zero<Acc>(ga, at, i, count), step * dx);
          store_lanes(scale * dv, to_v, i, count);
          if (to_u) {
            store_lanes(rest * dv, to_u, i, count);
          }
        });
      });
    });
  }
};

// The state is in the accumulator's dtype or, at the start of a rollout, in the model's.
template <class Kernel>
void run(Kernel& kernel, ScalarType state, ScalarType model, const Times& times, double guidance, int64_t sign) {
  with_dtype(model, [&]<class V>(V) {
    if (state == model) {
      kernel.template run<V, V>(times, guidance, sign);
    } else {
      kernel.template run<Accumulator<V>, V>(times, guidance, sign);
    }
  });
}

Tensor next_model_time(const Tensor& sigma_next, double scale, double offset) {
  const ScalarType accumulate = accumulation_dtype({sigma_next.scalar_type()});
  const Tensor sigma = ready(sigma_next, accumulate);
  Tensor time = empty(sigma.sizes(), accumulate, sigma);
  with_accumulator(accumulate, [&]<class Acc>(Acc) {
    const Acc* const from = sigma.const_data_ptr<Acc>();
    Acc* const to = time.data_ptr<Acc>();
    for (int64_t i = 0; i < sigma.numel(); ++i) {
      to[i] = static_cast<Acc>(scale) * from[i] + static_cast<Acc>(offset);
    }
  });
  return cast(time, sigma_next.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rollout_step(
    const Tensor& x,
    const OptionalTensor& average,
    const Tensor& velocity,
    const OptionalTensor& uncond_velocity,
    const Tensor& sigma,
    const Tensor& sigma_next,
    const Tensor& weight,
    double guidance_scale,
    int64_t sign,
    double time_scale,
    double time_offset,
    ScalarType model_dtype,
    bool last) {
  const ScalarType accumulate = accumulation_dtype({x.scalar_type(), velocity.scalar_type()});
  ScalarType model = storage_dtype(velocity.scalar_type(), accumulate);
  if (uncond_velocity && uncond_velocity->scalar_type() != velocity.scalar_type()) {
    model = accumulate;
  }
  const ScalarType state = x.scalar_type() == model ? model : accumulate;
  const bool has_input = !last && model_dtype != accumulate;

  Forward kernel;
  kernel.new_average = empty(x.sizes(), accumulate, x);
  kernel.velocity = ready(velocity, model);
  if (average) {
    kernel.average = ready(*average, accumulate);
  }
  if (uncond_velocity) {
    kernel.uncond = ready(*uncond_velocity, model);
  }
  if (!last) {
    kernel.new_x = empty(x.sizes(), accumulate, x);
    kernel.x = ready(x, state);
    if (has_input && model_dtype == model) {
      kernel.model_input = empty(x.sizes(), model, x);
    }
  }
  run(kernel, state, model, Times(x.sizes(), sigma, sigma_next, weight, accumulate), guidance_scale, sign);
  if (last) {
    return {empty({0}, accumulate, x), kernel.new_average, empty({0}, model_dtype, x), sigma_next.new_empty({0})};
  }
  if (has_input && !kernel.model_input.defined()) {
    kernel.model_input = kernel.new_x.to(model_dtype);
  }
  return {
      kernel.new_x,
      kernel.new_average,
      has_input ? kernel.model_input : empty({0}, model_dtype, x),
      next_model_time(sigma_next, time_scale, time_offset)};
}

std::tuple<Tensor, Tensor, Tensor> rollout_step_backward(
    const OptionalTensor& grad_x,
    const OptionalTensor& grad_average,
    const OptionalTensor& grad_input,
    const Tensor& velocity,
    const OptionalTensor& uncond_velocity,
    const Tensor& sigma,
    const Tensor& sigma_next,
    const Tensor& weight,
    double guidance_scale,
    int64_t sign,
    ScalarType x_dtype) {
  ScalarType accumulate = accumulation_dtype({velocity.scalar_type()});
  for (const OptionalTensor* grad : {&grad_x, &grad_average, &grad_input}) {
    if (*grad) {
      accumulate = accumulation_dtype({accumulate, (*grad)->scalar_type()});
    }
  }
  ScalarType model = storage_dtype(velocity.scalar_type(), accumulate);
  if (uncond_velocity && uncond_velocity->scalar_type() != velocity.scalar_type()) {
    model = accumulate;
  }
  if (grad_input && grad_input->scalar_type() != model) { // rounded to the dtype of the velocities it would lose bits
    model = accumulate;
  }
  const ScalarType state = x_dtype == model ? model : accumulate;

  Backward kernel;
  kernel.grad_x_out = empty(velocity.sizes(), state, velocity);
  kernel.grad_velocity = empty(velocity.sizes(), model, velocity);
  if (uncond_velocity) {
    kernel.grad_uncond = empty(velocity.sizes(), model, velocity);
  }
  if (grad_x) {
    kernel.grad_x = ready(*grad_x, accumulate);
  }
  if (grad_average) {
    kernel.grad_average = ready(*grad_average, accumulate);
  }
  if (grad_input) {
    kernel.grad_input = ready(*grad_input, model);
  }
  run(kernel, state, model, Times(velocity.sizes(), sigma, sigma_next, weight, accumulate), guidance_scale, sign);
  return {
      cast(kernel.grad_x_out, x_dtype),
      cast(kernel.grad_velocity, velocity.scalar_type()),
      uncond_velocity ? cast(kernel.grad_uncond, uncond_velocity->scalar_type()) : velocity.new_empty({0})};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CPU, m) {
  m.impl("rollout_step", &rollout_step);
  m.impl("rollout_step_backward", &rollout_step_backward);
}

} // namespace anyflow
