// In which dtypes the kernels of rollout_step read and write, on every device.
#pragma once

#include "common.h"

#include <initializer_list>

namespace anyflow {

struct RolloutDtypes {
  ScalarType accumulate;
  ScalarType model; // of the velocities, and of the model's input where it has the same
  ScalarType state; // of x: the accumulator's or, at the start of a rollout, the model's

  RolloutDtypes(ScalarType accumulate, ScalarType x, const Tensor& velocity, const OptionalTensor& uncond_velocity)
      : accumulate(accumulate), model(storage_dtype(velocity.scalar_type(), accumulate)) {
    if (uncond_velocity && uncond_velocity->scalar_type() != velocity.scalar_type()) {
      model = accumulate;
    }
    state = x == model ? model : accumulate;
  }

  // Of the forward.
  RolloutDtypes(const Tensor& x, const Tensor& velocity, const OptionalTensor& uncond_velocity)
      : RolloutDtypes(
            accumulation_dtype({x.scalar_type(), velocity.scalar_type()}), x.scalar_type(), velocity,
            uncond_velocity) {}

  // Of the backward.
  static RolloutDtypes backward(
      ScalarType x,
      const Tensor& velocity,
      const OptionalTensor& uncond_velocity,
      std::initializer_list<const OptionalTensor*> grads,
      const OptionalTensor& grad_input) {
    ScalarType accumulate = accumulation_dtype({velocity.scalar_type()});
    for (const OptionalTensor* grad : grads) {
      if (*grad) {
        accumulate = accumulation_dtype({accumulate, (*grad)->scalar_type()});
      }
    }
    RolloutDtypes dtypes(accumulate, x, velocity, uncond_velocity);
    if (grad_input && grad_input->scalar_type() != dtypes.model) { // rounded to the velocities' it would lose bits
      dtypes.model = accumulate;
      dtypes.state = accumulate;
    }
    return dtypes;
  }
};

} // namespace anyflow
