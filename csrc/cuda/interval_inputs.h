#pragma once

#include "rows.h"

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace anyflow::cuda {

struct Sigmas {
  const void* values[3]; // at sigma, sigma_plus and sigma_minus, in the accumulator's dtype; null: absent
  Rows rows;
};

// Contiguous arrays of `numel` elements, at least one: x0, the noise and their gradients in the dtype of the latents,
// the inputs and theirs in the model's, the velocity and its in the accumulator's.
struct IntervalInputs {
  const void *x0, *noise;
  void *inputs[3], *velocity; // at each sigma; null: not wanted
};

struct IntervalInputsBackward {
  const void *inputs[3], *velocity; // null: zero, and then the sigma is absent as well
  void *x0, *noise;
};

struct IntervalInputsLaunch {
  Sigmas sigmas;
  int64_t numel;
  c10::ScalarType latents_dtype, model_dtype;
  c10::DeviceIndex device;
};

void launch_interval_inputs(const IntervalInputsLaunch& launch, const IntervalInputs& given);
void launch_interval_inputs_backward(const IntervalInputsLaunch& launch, const IntervalInputsBackward& grads);

} // namespace anyflow::cuda
