// In which dtypes the kernels of interval_inputs, flowmap_loss and dmd_gradient read and write, on every device.
#pragma once

#include "common.h"

#include <initializer_list>

namespace anyflow {

// The storage dtype that the given tensors share, or the accumulator's.
inline ScalarType shared_storage(std::initializer_list<const Tensor*> tensors, ScalarType accumulate) {
  const ScalarType dtype = (*tensors.begin())->scalar_type();
  for (const Tensor* tensor : tensors) {
    if (tensor->scalar_type() != dtype) {
      return accumulate;
    }
  }
  return storage_dtype(dtype, accumulate);
}

struct IntervalInputsDtypes {
  ScalarType accumulate;
  ScalarType latents; // x0 and the noise, and their gradients
  ScalarType model; // the inputs, and their gradients

  IntervalInputsDtypes(ScalarType x0, ScalarType noise, ScalarType model_dtype)
      : accumulate(accumulation_dtype({x0, noise})),
        latents(x0 == noise ? storage_dtype(x0, accumulate) : accumulate),
        model(storage_dtype(model_dtype, accumulate)) {}

  // Of the backward: the inputs' gradients, those that are there, have one dtype.
  static IntervalInputsDtypes backward(
      ScalarType x0, ScalarType noise, std::initializer_list<const OptionalTensor*> grads) {
    ScalarType model_dtype = accumulation_dtype({x0, noise});
    for (const OptionalTensor* grad : grads) {
      if (*grad) {
        model_dtype = (*grad)->scalar_type();
      }
    }
    return {x0, noise, model_dtype};
  }
};

struct FlowmapLossDtypes {
  ScalarType accumulate;
  ScalarType model; // the predictions
  ScalarType velocity, difference; // of the target, of u_plus and u_minus: the model's, or the accumulator's

  FlowmapLossDtypes(
      const Tensor& prediction,
      const Tensor& target_velocity,
      const OptionalTensor& uncond_prediction,
      const OptionalTensor& u_plus,
      const OptionalTensor& u_minus)
      : accumulate(accumulation_dtype({prediction.scalar_type(), target_velocity.scalar_type()})),
        model(shared_storage({&prediction, uncond_prediction ? &*uncond_prediction : &prediction}, accumulate)),
        velocity(target_velocity.scalar_type() == model ? model : accumulate),
        difference(model) {
    for (const OptionalTensor* u : {&u_plus, &u_minus}) {
      if (*u && (*u)->scalar_type() != model) {
        difference = accumulate;
      }
    }
  }
};

struct DmdGradientDtypes {
  ScalarType accumulate;
  ScalarType model; // the velocities
  ScalarType clean, noised; // of x and x_sigma: the model's, or the accumulator's

  DmdGradientDtypes(
      const Tensor& x,
      const Tensor& x_sigma,
      const Tensor& real_velocity,
      const Tensor& fake_velocity,
      const OptionalTensor& uncond_real_velocity)
      : accumulate(accumulation_dtype({x.scalar_type(), x_sigma.scalar_type(), real_velocity.scalar_type()})),
        model(shared_storage(
            {&real_velocity, &fake_velocity, uncond_real_velocity ? &*uncond_real_velocity : &real_velocity},
            accumulate)),
        clean(x.scalar_type() == model ? model : accumulate),
        noised(x_sigma.scalar_type() == model ? model : accumulate) {}
};

} // namespace anyflow
