#pragma once

#include "rows.h"

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace anyflow::cuda {

// Contiguous arrays of the samples' elements, of which there is at least one. The times and the results are in the
// accumulator's dtype.
struct FlowmapLoss {
  const void *prediction, *uncond; // in the model's dtype; uncond null: absent
  const void* velocity;
  const void *u_plus, *u_minus; // null: absent, and then so are interval and gap
  const void *interval, *gap, *weight;
  void *residual; // null: not wanted
  void *loss, *unweighted; // of each sample
  void* partials; // flowmap_loss_partials of them
  Rows rows;
};

struct FlowmapLossLaunch {
  Samples samples;
  double guidance_scale;
  int64_t sign;
  c10::ScalarType model_dtype;
  c10::ScalarType velocity_dtype, difference_dtype; // the model's, or the accumulator's
  c10::DeviceIndex device;
};

struct FlowmapLossBackward {
  const void *loss, *unweighted, *residual; // the first two null: zero
  const void* weight;
  void* prediction; // in the model's dtype, as the other two are in the accumulator's
  Rows rows;
};

// How many partial sums of both results the forward pass makes: none where a block has a sample for itself.
int64_t flowmap_loss_partials(const FlowmapLossLaunch& launch);

void launch_flowmap_loss(const FlowmapLossLaunch& launch, const FlowmapLoss& given);
void launch_flowmap_loss_backward(const FlowmapLossLaunch& launch, const FlowmapLossBackward& grads);

} // namespace anyflow::cuda
