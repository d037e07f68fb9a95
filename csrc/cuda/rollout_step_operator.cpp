// The operator rollout_step on CUDA: tensors in, launches of rollout_step.cu out.
#include "rollout_step.h"

#include "../rollout_dtypes.h"
#include "tiling.h"

#include <tuple>

namespace anyflow::cuda {
namespace {

Times times_of(const Tiling<3>& tiling) {
  return {data_of(tiling.times[0]), data_of(tiling.times[1]), data_of(tiling.times[2]), tiling.rows};
}

Tensor model_time_of(const Tensor& sigma_next, double scale, double offset) {
  const ScalarType wide = accumulation_dtype({sigma_next.scalar_type()});
  return sigma_next.to(wide).mul(scale).add(offset).to(sigma_next.scalar_type()).contiguous();
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
  const bool own_time = sigma_next.scalar_type() == accumulate && x.numel() > 0; // computed in the same launch

  Tensor new_average = empty(x.sizes(), accumulate, x);
  Tensor new_x = last ? empty({0}, accumulate, x) : empty(x.sizes(), accumulate, x);
  Tensor model_input = has_input ? empty(x.sizes(), model_dtype, x) : empty({0}, model_dtype, x);
  Tensor model_time = last ? sigma_next.new_empty({0})
      : own_time           ? empty(sigma_next.sizes(), accumulate, x)
                           : model_time_of(sigma_next, time_scale, time_offset);
  if (x.numel() == 0) {
    return {new_x, new_average, model_input, model_time};
  }

  const Tensor v = ready(velocity, model);
  const Tensor u = ready_if_given(uncond_velocity, model);
  const Tensor average_in = ready_if_given(average, accumulate);
  const Tensor x_in = last ? Tensor() : ready(x, state);
  const Tensor next_times = sigma_next.contiguous();
  const Tiling<3> tiling(x.sizes(), {sigma, sigma_next, weight}, accumulate);
  RolloutStep step{};
  step.x = data_of(x_in);
  step.average = data_of(average_in);
  step.velocity = v.const_data_ptr();
  step.uncond = data_of(u);
  step.new_average = new_average.mutable_data_ptr();
  if (!last) {
    step.new_x = new_x.mutable_data_ptr();
    if (has_input && model_dtype == model) {
      step.model_input = model_input.mutable_data_ptr();
    }
    if (own_time) {
      step.next_times = next_times.const_data_ptr();
      step.model_time = model_time.mutable_data_ptr();
      step.next_times_count = next_times.numel();
      step.time_scale = time_scale;
      step.time_offset = time_offset;
    }
  }
  launch_rollout_step({times_of(tiling), guidance_scale, sign, x.numel(), state, model, x.device().index()}, step);
  if (has_input && !step.model_input) {
    model_input = new_x.to(model_dtype);
  }
  return {new_x, new_average, model_input, model_time};
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

  Tensor dx = empty(velocity.sizes(), state, velocity);
  Tensor dv = empty(velocity.sizes(), model, velocity);
  Tensor du = uncond_velocity ? empty(velocity.sizes(), model, velocity) : velocity.new_empty({0});
  if (velocity.numel() > 0) {
    const Tensor gx = ready_if_given(grad_x, accumulate);
    const Tensor ga = ready_if_given(grad_average, accumulate);
    const Tensor gi = ready_if_given(grad_input, model);
    const Tiling<3> tiling(velocity.sizes(), {sigma, sigma_next, weight}, accumulate);
    launch_rollout_step_backward(
        {times_of(tiling), guidance_scale, sign, velocity.numel(), state, model, velocity.device().index()},
        {data_of(gx),
         data_of(ga),
         data_of(gi),
         dx.mutable_data_ptr(),
         dv.mutable_data_ptr(),
         uncond_velocity ? du.mutable_data_ptr() : nullptr});
  }
  return {
      cast(dx, x_dtype),
      cast(dv, velocity.scalar_type()),
      uncond_velocity ? cast(du, uncond_velocity->scalar_type()) : du};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CUDA, m) {
  m.impl("rollout_step", &rollout_step);
  m.impl("rollout_step_backward", &rollout_step_backward);
}

} // namespace anyflow::cuda
