// The operator interval_inputs on CUDA: tensors in, launches of interval_inputs.cu out.
#include "interval_inputs.h"

#include "../objective_dtypes.h"
#include "tiling.h"

#include <tuple>

namespace anyflow::cuda {
namespace {

Sigmas sigmas_of(const Tiling<3>& tiling) {
  return {{data_of(tiling.times[0]), data_of(tiling.times[1]), data_of(tiling.times[2])}, tiling.rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_inputs(
    const Tensor& x0,
    const Tensor& noise,
    const Tensor& sigma,
    const OptionalTensor& sigma_plus,
    const OptionalTensor& sigma_minus,
    ScalarType model_dtype) {
  const auto [accumulate, latents, model] = IntervalInputsDtypes(x0.scalar_type(), noise.scalar_type(), model_dtype);

  const Tensor velocity = empty(x0.sizes(), accumulate, x0);
  std::array<Tensor, 3> inputs;
  for (int n = 0; n < (sigma_plus ? 3 : 1); ++n) {
    inputs[n] = empty(x0.sizes(), model, x0);
  }
  if (x0.numel() > 0) {
    const Tensor x0_in = ready(x0, latents), noise_in = ready(noise, latents);
    const Tiling<3> tiling(
        x0.sizes(), {sigma, sigma_plus.value_or(Tensor()), sigma_minus.value_or(Tensor())}, accumulate);
    launch_interval_inputs(
        {sigmas_of(tiling), x0.numel(), latents, model, x0.device().index()},
        {x0_in.const_data_ptr(),
         noise_in.const_data_ptr(),
         {mutable_data_of(inputs[0]), mutable_data_of(inputs[1]), mutable_data_of(inputs[2])},
         velocity.mutable_data_ptr()});
  }
  const auto result = [&](const Tensor& input) {
    return input.defined() ? cast(input, model_dtype) : empty({0}, model_dtype, x0);
  };
  return {result(inputs[0]), result(inputs[1]), result(inputs[2]), velocity};
}

std::tuple<Tensor, Tensor> interval_inputs_backward(
    const OptionalTensor& grad_x,
    const OptionalTensor& grad_plus,
    const OptionalTensor& grad_minus,
    const OptionalTensor& grad_velocity,
    const Tensor& sigma,
    const OptionalTensor& sigma_plus,
    const OptionalTensor& sigma_minus,
    ScalarType x0_dtype,
    ScalarType noise_dtype) {
  const auto [accumulate, latents, model] =
      IntervalInputsDtypes::backward(x0_dtype, noise_dtype, {&grad_x, &grad_plus, &grad_minus});
  const std::array<const OptionalTensor*, 3> given{&grad_x, &grad_plus, &grad_minus};
  std::array<Tensor, 3> grads, sigmas{sigma, sigma_plus.value_or(Tensor()), sigma_minus.value_or(Tensor())};
  const Tensor of_velocity = ready_if_given(grad_velocity, accumulate);
  Tensor like = of_velocity;
  for (int n = 0; n < 3; ++n) {
    grads[n] = ready_if_given(*given[n], model);
    if (*given[n]) {
      like = grads[n];
    } else {
      sigmas[n] = Tensor(); // whatever stands there is not looked at
    }
  }
  const Tensor dx0 = empty(like.sizes(), latents, like), dnoise = empty(like.sizes(), latents, like);
  if (like.numel() > 0) {
    const Tiling<3> tiling(like.sizes(), sigmas, accumulate);
    launch_interval_inputs_backward(
        {sigmas_of(tiling), like.numel(), latents, model, like.device().index()},
        {{data_of(grads[0]), data_of(grads[1]), data_of(grads[2])},
         data_of(of_velocity),
         dx0.mutable_data_ptr(),
         dnoise.mutable_data_ptr()});
  }
  return {cast(dx0, x0_dtype), cast(dnoise, noise_dtype)};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CUDA, m) {
  m.impl("interval_inputs", &interval_inputs);
  m.impl("interval_inputs_backward", &interval_inputs_backward);
}

} // namespace anyflow::cuda
