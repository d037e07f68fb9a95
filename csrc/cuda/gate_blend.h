#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace anyflow::cuda {

// Contiguous arrays of `numel` elements, at least one, in the storage dtypes; the gate is in the accumulator's.
struct GateBlend {
  const void *base, *delta, *gate;
  int64_t numel;
  c10::ScalarType base_dtype, delta_dtype;
  c10::DeviceIndex device;
};

void launch_gate_blend(const GateBlend& given, void* y);

// How many partial sums the backward pass makes for the gradient of the gate.
int64_t gate_blend_partials(const GateBlend& given);

// Without partials, base and delta are not read and grad_gate is not written.
void launch_gate_blend_backward(
    const GateBlend& given, const void* grad, void* grad_base, void* grad_delta, void* partials, void* grad_gate);

} // namespace anyflow::cuda
