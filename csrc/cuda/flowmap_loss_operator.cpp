// The operator flowmap_loss on CUDA: tensors in, launches of flowmap_loss.cu out.
#include "flowmap_loss.h"

#include "../objective_dtypes.h"
#include "tiling.h"

#include <ATen/ops/zeros.h>

#include <tuple>

namespace anyflow::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> flowmap_loss(
    const Tensor& prediction,
    const Tensor& target_velocity,
    const OptionalTensor& uncond_prediction,
    const OptionalTensor& u_plus,
    const OptionalTensor& u_minus,
    const OptionalTensor& interval,
    const OptionalTensor& gap,
    const Tensor& weight,
    double guidance_scale,
    int64_t sign,
    bool need_residual) {
  const auto [accumulate, model, velocity, difference] =
      FlowmapLossDtypes(prediction, target_velocity, uncond_prediction, u_plus, u_minus);
  const Samples samples = samples_of(prediction.sizes());

  const Tensor residual = empty(need_residual ? prediction.sizes() : at::IntArrayRef({0}), accumulate, prediction);
  if (prediction.numel() == 0) {
    const auto zeros = [&] { return at::zeros({samples.count}, residual.options()); };
    return {zeros(), zeros(), residual};
  }
  const Tensor loss = empty({samples.count}, accumulate, prediction);
  const Tensor unweighted = empty({samples.count}, accumulate, prediction);
  const Tensor p = ready(prediction, model), v = ready(target_velocity, velocity);
  const Tensor u = ready_if_given(uncond_prediction, model);
  const Tensor plus = ready_if_given(u_plus, difference), minus = ready_if_given(u_minus, difference);
  const Tiling<3> tiling(
      prediction.sizes(), {interval.value_or(Tensor()), gap.value_or(Tensor()), weight}, accumulate);

  const FlowmapLossLaunch launch{
      samples, guidance_scale, sign, model, velocity, difference, prediction.device().index()};
  const int64_t count = flowmap_loss_partials(launch);
  const Tensor partials = count > 0 ? empty({count}, accumulate, prediction) : Tensor();
  FlowmapLoss given{};
  given.prediction = p.const_data_ptr();
  given.uncond = data_of(u);
  given.velocity = v.const_data_ptr();
  given.u_plus = data_of(plus);
  given.u_minus = data_of(minus);
  given.interval = data_of(tiling.times[0]);
  given.gap = data_of(tiling.times[1]);
  given.weight = data_of(tiling.times[2]);
  given.residual = need_residual ? residual.mutable_data_ptr() : nullptr;
  given.loss = loss.mutable_data_ptr();
  given.unweighted = unweighted.mutable_data_ptr();
  given.partials = mutable_data_of(partials);
  given.rows = tiling.rows;
  launch_flowmap_loss(launch, given);
  return {loss, unweighted, residual};
}

Tensor flowmap_loss_backward(
    const OptionalTensor& grad_loss,
    const OptionalTensor& grad_unweighted,
    const Tensor& residual,
    const Tensor& weight,
    double guidance_scale,
    int64_t sign,
    ScalarType dtype) {
  const ScalarType accumulate = residual.scalar_type();
  const ScalarType model = storage_dtype(dtype, accumulate);
  const Tensor grad = empty(residual.sizes(), model, residual);
  if (residual.numel() > 0) {
    const Tensor d = ready(residual, accumulate);
    const Tensor of_loss = ready_if_given(grad_loss, accumulate);
    const Tensor of_unweighted = ready_if_given(grad_unweighted, accumulate);
    const Tiling<1> tiling(residual.sizes(), {weight}, accumulate);
    launch_flowmap_loss_backward(
        {samples_of(residual.sizes()), guidance_scale, sign, model, model, model, residual.device().index()},
        {data_of(of_loss),
         data_of(of_unweighted),
         d.const_data_ptr(),
         tiling.times[0].const_data_ptr(),
         grad.mutable_data_ptr(),
         tiling.rows});
  }
  return cast(grad, dtype);
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CUDA, m) {
  m.impl("flowmap_loss", &flowmap_loss);
  m.impl("flowmap_loss_backward", &flowmap_loss_backward);
}

} // namespace anyflow::cuda
