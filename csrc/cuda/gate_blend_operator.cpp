// The operator gate_blend on CUDA: tensors in, launches of gate_blend.cu out.
#include "gate_blend.h"

#include "../common.h"

#include <ATen/ops/zeros.h>

#include <tuple>

namespace anyflow::cuda {
namespace {

// The tensors that the launches read, in the dtypes in which they read them.
struct Inputs {
  ScalarType accumulate;
  Tensor base, delta, gate; // the first two undefined: not read

  Inputs(const Tensor& base, const Tensor& delta, const Tensor& gate, bool read)
      : accumulate(accumulation_dtype({base.scalar_type(), delta.scalar_type()})), gate(ready(gate, accumulate)) {
    given.base_dtype = storage_dtype(base.scalar_type(), accumulate);
    given.delta_dtype = storage_dtype(delta.scalar_type(), accumulate);
    if (read) {
      this->base = ready(base, given.base_dtype);
      this->delta = ready(delta, given.delta_dtype);
      given.base = this->base.const_data_ptr();
      given.delta = this->delta.const_data_ptr();
    }
    given.gate = this->gate.const_data_ptr();
    given.numel = base.numel();
    given.device = base.device().index();
  }

  GateBlend given{};
};

Tensor gate_blend(const Tensor& base, const Tensor& delta, const Tensor& gate) {
  if (base.numel() == 0) {
    return empty(base.sizes(), base.scalar_type(), base);
  }
  const Inputs inputs(base, delta, gate, true);
  Tensor y = empty(base.sizes(), inputs.given.base_dtype, base);
  launch_gate_blend(inputs.given, y.mutable_data_ptr());
  return cast(y, base.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> gate_blend_backward(
    const Tensor& grad, const Tensor& base, const Tensor& delta, const Tensor& gate, bool need_gate) {
  if (base.numel() == 0) {
    return {
        empty(base.sizes(), base.scalar_type(), base),
        empty(delta.sizes(), delta.scalar_type(), delta),
        at::zeros(gate.sizes(), gate.options())};
  }
  const Inputs inputs(base, delta, gate, need_gate);
  const GateBlend& given = inputs.given;
  const Tensor dy = ready(grad, given.base_dtype);
  Tensor grad_base = empty(base.sizes(), given.base_dtype, base);
  Tensor grad_delta = empty(delta.sizes(), given.delta_dtype, delta);
  Tensor partials, grad_gate;
  if (need_gate) {
    partials = empty({gate_blend_partials(given)}, inputs.accumulate, base);
    grad_gate = empty(gate.sizes(), inputs.accumulate, base);
  } else {
    grad_gate = at::zeros(gate.sizes(), gate.options());
  }
  launch_gate_blend_backward(
      given,
      dy.const_data_ptr(),
      grad_base.mutable_data_ptr(),
      grad_delta.mutable_data_ptr(),
      need_gate ? partials.mutable_data_ptr() : nullptr,
      grad_gate.mutable_data_ptr());
  return {
      cast(grad_base, base.scalar_type()),
      cast(grad_delta, delta.scalar_type()),
      cast(grad_gate, gate.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CUDA, m) {
  m.impl("gate_blend", &gate_blend);
  m.impl("gate_blend_backward", &gate_blend_backward);
}

} // namespace anyflow::cuda
