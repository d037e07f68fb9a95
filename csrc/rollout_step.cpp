// x' = x + (sigma_next - sigma) v,  average' = average + weight v,  v = sign (v_u + guidance_scale (v_c - v_u))
#include "rollout_dtypes.h"
#include "times.h"

#include <tuple>

namespace anyflow {
namespace {

// sigma, sigma_next and weight, and what a step takes of them: sigma_next - sigma and weight.
using StepTimes = Times<3>;

template <class Acc>
std::pair<Lanes<Acc>, Lanes<Acc>> coefficients(const std::array<Lanes<Acc>, 3>& times) {
  return {times[1] - times[0], times[2]};
}

struct Forward {
  Tensor new_x, new_average, model_input; // undefined: not wanted
  Tensor x, average, velocity, uncond; // undefined: absent

  template <class X, class V>
  void run(const StepTimes& times, double guidance, int64_t sign) {
    using Acc = Accumulator<V>;
    const auto time = times.data<Acc>();
    Acc* const x_out = data_or_null<Acc>(new_x);
    Acc* const average_out = new_average.data_ptr<Acc>();
    V* const input_out = data_or_null<V>(model_input);
    const X* const x_in = const_data_or_null<X>(x);
    const Acc* const average_in = const_data_or_null<Acc>(average);
    const V* const v_in = velocity.const_data_ptr<V>();
    const V* const u_in = const_data_or_null<V>(uncond);
    const Lanes<Acc> scale(static_cast<Acc>(guidance)), direction(static_cast<Acc>(sign));
    const bool stream = past_caches({new_x, new_average, model_input}, {x, average, velocity, uncond});
    for_chunks(new_average.numel(), [&](int64_t begin, int64_t end) {
      times.for_rows(time, begin, end, coefficients<Acc>, [&](int64_t at, int64_t size, auto at_times) {
        const auto to_x = output_at(x_out, at, stream);
        const auto to_average = output_at(average_out, at, stream);
        const auto to_input = output_at(input_out, at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const auto [step, weight] = at_times(i, count);
          Lanes<Acc> v = load_lanes<Acc>(v_in + at + i, count);
          if (u_in) {
            const Lanes<Acc> u = load_lanes<Acc>(u_in + at + i, count);
            v = fma(scale, v - u, u);
          }
          v = direction * v;
          store_lanes(fma(weight, v, load_or_zero<Acc>(average_in, at + i, count)), to_average, i, count);
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
  void run(const StepTimes& times, double guidance, int64_t sign) {
    using Acc = Accumulator<V>;
    const auto time = times.data<Acc>();
    X* const dx_out = grad_x_out.data_ptr<X>();
    V* const dv_out = grad_velocity.data_ptr<V>();
    V* const du_out = data_or_null<V>(grad_uncond);
    const Acc* const gx = const_data_or_null<Acc>(grad_x);
    const Acc* const ga = const_data_or_null<Acc>(grad_average);
    const V* const gi = const_data_or_null<V>(grad_input);
    const Lanes<Acc> direction(static_cast<Acc>(sign));
    const Lanes<Acc> scale(static_cast<Acc>(du_out ? guidance : 1.0)), rest(static_cast<Acc>(1.0 - guidance));
    const bool stream = past_caches({grad_x_out, grad_velocity, grad_uncond}, {grad_x, grad_average, grad_input});
    for_chunks(grad_velocity.numel(), [&](int64_t begin, int64_t end) {
      times.for_rows(time, begin, end, coefficients<Acc>, [&](int64_t at, int64_t size, auto at_times) {
        const auto to_x = output_at(dx_out, at, stream);
        const auto to_v = output_at(dv_out, at, stream);
        const auto to_u = output_at(du_out, at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const auto [step, weight] = at_times(i, count);
          const Lanes<Acc> dx = load_or_zero<Acc>(gx, at + i, count) + load_or_zero<Acc>(gi, at + i, count);
          store_lanes(dx, to_x, i, count);
          const Lanes<Acc> dv = direction * fma(weight, load_or_zero<Acc>(ga, at + i, count), step * dx);
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
void run(Kernel& kernel, ScalarType state, ScalarType model, const StepTimes& times, double guidance, int64_t sign) {
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
  const auto [accumulate, model, state] = RolloutDtypes(x, velocity, uncond_velocity);
  const bool has_input = !last && model_dtype != accumulate;

  Forward kernel;
  kernel.new_average = empty(x.sizes(), accumulate, x);
  kernel.velocity = ready(velocity, model);
  kernel.average = ready_if_given(average, accumulate);
  kernel.uncond = ready_if_given(uncond_velocity, model);
  if (!last) {
    kernel.new_x = empty(x.sizes(), accumulate, x);
    kernel.x = ready(x, state);
    if (has_input && model_dtype == model) {
      kernel.model_input = empty(x.sizes(), model, x);
    }
  }
  run(kernel, state, model, StepTimes(x.sizes(), {sigma, sigma_next, weight}, accumulate), guidance_scale, sign);
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
  const auto [accumulate, model, state] =
      RolloutDtypes::backward(x_dtype, velocity, uncond_velocity, {&grad_x, &grad_average, &grad_input}, grad_input);

  Backward kernel;
  kernel.grad_x_out = empty(velocity.sizes(), state, velocity);
  kernel.grad_velocity = empty(velocity.sizes(), model, velocity);
  if (uncond_velocity) {
    kernel.grad_uncond = empty(velocity.sizes(), model, velocity);
  }
  kernel.grad_x = ready_if_given(grad_x, accumulate);
  kernel.grad_average = ready_if_given(grad_average, accumulate);
  kernel.grad_input = ready_if_given(grad_input, model);
  run(kernel, state, model, StepTimes(velocity.sizes(), {sigma, sigma_next, weight}, accumulate), guidance_scale, sign);
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
