#pragma once

#include "rows.h"

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace anyflow::cuda {

struct Times {
  const void *sigma, *sigma_next, *weight; // in the accumulator's dtype
  Rows rows;
};

// Contiguous arrays of `numel` elements, at least one. x is in the storage dtype of the state, the velocities and
// model_input in the model's, the averages and new_x in the accumulator's.
struct RolloutStep {
  const void *x, *average, *velocity, *uncond; // x null: the last step; average, uncond null: absent
  void *new_x, *new_average, *model_input; // new_x, model_input null: not wanted
  const void* next_times; // sigma_next as it was given, in the accumulator's dtype
  void* model_time; // null: not wanted
  int64_t next_times_count; // not more than numel
  double time_scale, time_offset;
};

struct RolloutStepBackward {
  const void *grad_x, *grad_average, *grad_input; // null: zero
  void *grad_x_out, *grad_velocity, *grad_uncond; // the last null: not wanted
};

struct RolloutLaunch {
  Times times;
  double guidance_scale;
  int64_t sign, numel;
  c10::ScalarType state_dtype, model_dtype; // the state is in the model's dtype or in the accumulator's
  c10::DeviceIndex device;
};

void launch_rollout_step(const RolloutLaunch& launch, const RolloutStep& step);
void launch_rollout_step_backward(const RolloutLaunch& launch, const RolloutStepBackward& step);

} // namespace anyflow::cuda
