#pragma once

#include "rows.h"

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace anyflow::cuda {

// Contiguous arrays of the samples' elements, of which there is at least one. Sigma and the results are in the
// accumulator's dtype.
struct DmdGradient {
  const void *x, *x_sigma;
  const void *real, *fake, *uncond; // in the model's dtype; uncond null: absent
  const void* sigma;
  void *loss, *gradient;
  void *partials, *normalisers; // dmd_gradient_partials of them, and one for each sample
  Rows rows;
};

struct DmdGradientLaunch {
  Samples samples;
  double guidance_scale;
  int64_t sign;
  c10::ScalarType clean_dtype, noised_dtype, model_dtype; // of x and x_sigma: the model's, or the accumulator's
  c10::DeviceIndex device;
};

struct DmdGradientBackward {
  const void *loss, *gradient; // in the accumulator's dtype
  void* x;
};

// How many partial sums the forward pass makes for the normalisers and the losses: none where a block has a sample for
// itself, and then it needs no normalisers either.
int64_t dmd_gradient_partials(const DmdGradientLaunch& launch);

void launch_dmd_gradient(const DmdGradientLaunch& launch, const DmdGradient& given);
void launch_dmd_gradient_backward(
    const Samples& samples, c10::ScalarType dtype, c10::DeviceIndex device, const DmdGradientBackward& grads);

} // namespace anyflow::cuda
