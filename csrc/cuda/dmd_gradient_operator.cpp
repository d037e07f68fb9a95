// The operator dmd_gradient on CUDA: tensors in, launches of dmd_gradient.cu out.
#include "dmd_gradient.h"

#include "../objective_dtypes.h"
#include "tiling.h"

#include <ATen/ops/zeros.h>

#include <tuple>

namespace anyflow::cuda {
namespace {

std::tuple<Tensor, Tensor> dmd_gradient(
    const Tensor& x,
    const Tensor& sigma,
    const Tensor& x_sigma,
    const Tensor& real_velocity,
    const Tensor& fake_velocity,
    const OptionalTensor& uncond_real_velocity,
    double guidance_scale,
    int64_t sign) {
  const auto [accumulate, model, clean, noised] =
      DmdGradientDtypes(x, x_sigma, real_velocity, fake_velocity, uncond_real_velocity);
  const Samples samples = samples_of(x.sizes());

  const Tensor gradient = empty(x.sizes(), accumulate, x);
  if (x.numel() == 0) {
    return {at::zeros({samples.count}, gradient.options()), gradient};
  }
  const Tensor loss = empty({samples.count}, accumulate, x);
  const Tensor x_in = ready(x, clean), x_sigma_in = ready(x_sigma, noised);
  const Tensor real = ready(real_velocity, model), fake = ready(fake_velocity, model);
  const Tensor uncond = ready_if_given(uncond_real_velocity, model);
  const Tiling<1> tiling(x.sizes(), {sigma}, accumulate);

  const DmdGradientLaunch launch{samples, guidance_scale, sign, clean, noised, model, x.device().index()};
  const int64_t count = dmd_gradient_partials(launch);
  const Tensor partials = count > 0 ? empty({count}, accumulate, x) : Tensor();
  const Tensor normalisers = count > 0 ? empty({samples.count}, accumulate, x) : Tensor();
  launch_dmd_gradient(
      launch,
      {x_in.const_data_ptr(),
       x_sigma_in.const_data_ptr(),
       real.const_data_ptr(),
       fake.const_data_ptr(),
       data_of(uncond),
       tiling.times[0].const_data_ptr(),
       loss.mutable_data_ptr(),
       gradient.mutable_data_ptr(),
       mutable_data_of(partials),
       mutable_data_of(normalisers),
       tiling.rows});
  return {loss, gradient};
}

Tensor dmd_gradient_backward(const Tensor& grad_loss, const Tensor& gradient, ScalarType dtype) {
  const ScalarType accumulate = gradient.scalar_type();
  const ScalarType storage = storage_dtype(dtype, accumulate);
  const Tensor grad_x = empty(gradient.sizes(), storage, gradient);
  if (gradient.numel() > 0) {
    const Tensor of_loss = ready(grad_loss, accumulate), kept = ready(gradient, accumulate);
    launch_dmd_gradient_backward(
        samples_of(gradient.sizes()),
        storage,
        gradient.device().index(),
        {of_loss.const_data_ptr(), kept.const_data_ptr(), grad_x.mutable_data_ptr()});
  }
  return cast(grad_x, dtype);
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CUDA, m) {
  m.impl("dmd_gradient", &dmd_gradient);
  m.impl("dmd_gradient_backward", &dmd_gradient_backward);
}

} // namespace anyflow::cuda
