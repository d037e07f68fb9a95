// x_s = (1 - s) x0 + s noise at sigma, sigma_plus and sigma_minus,  velocity = noise - x0
#include "objective_dtypes.h"
#include "times.h"

#include <tuple>

namespace anyflow {
namespace {

using Sigmas = Times<3>; // where two are absent they repeat the first

Sigmas sigmas_over(
    at::IntArrayRef shape,
    const Tensor& sigma,
    const OptionalTensor& sigma_plus,
    const OptionalTensor& sigma_minus,
    ScalarType dtype) {
  return Sigmas(shape, {sigma, sigma_plus.value_or(sigma), sigma_minus.value_or(sigma)}, dtype);
}

template <class Acc>
struct Coefficients {
  std::array<Lanes<Acc>, 3> of_noise, of_x0;
};

template <class Acc>
Coefficients<Acc> coefficients(const std::array<Lanes<Acc>, 3>& sigmas) {
  const Lanes<Acc> one(Acc(1));
  return {sigmas, {one - sigmas[0], one - sigmas[1], one - sigmas[2]}};
}

struct Forward {
  std::array<Tensor, 3> inputs; // the last two undefined: not wanted
  Tensor velocity, x0, noise;

  // Latents of type T, inputs of type M.
  template <class T, class M>
  void run(const Sigmas& sigmas) {
    using Acc = Accumulator<T>;
    const auto data = sigmas.data<Acc>();
    const T* const x0_in = x0.const_data_ptr<T>();
    const T* const noise_in = noise.const_data_ptr<T>();
    Acc* const velocity_out = velocity.data_ptr<Acc>();
    const std::array<M*, 3> out{
        data_or_null<M>(inputs[0]), data_or_null<M>(inputs[1]), data_or_null<M>(inputs[2])};
    const int wanted = out[1] ? 3 : 1;
    const bool stream = past_caches({velocity, inputs[0], inputs[1], inputs[2]}, {x0, noise});
    for_chunks(x0.numel(), [&](int64_t begin, int64_t end) {
      sigmas.for_rows(data, begin, end, coefficients<Acc>, [&](int64_t at, int64_t size, auto at_times) {
        const Output<Acc> to_velocity(velocity_out + at, stream);
        const std::array<Output<M>, 3> to{
            output_at(out[0], at, stream), output_at(out[1], at, stream), output_at(out[2], at, stream)};
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const Coefficients<Acc> c = at_times(i, count);
          const Lanes<Acc> x0_lanes = load_lanes<Acc>(x0_in + at + i, count);
          const Lanes<Acc> noise_lanes = load_lanes<Acc>(noise_in + at + i, count);
          store_lanes(noise_lanes - x0_lanes, to_velocity, i, count);
          for (int n = 0; n < wanted; ++n) {
            store_lanes(fma(c.of_noise[n], noise_lanes, c.of_x0[n] * x0_lanes), to[n], i, count);
          }
        });
      });
    });
  }
};

struct Backward {
  Tensor grad_x0, grad_noise;
  std::array<Tensor, 3> grads; // of the inputs; undefined: zero
  Tensor grad_velocity; // undefined: zero

  // Gradients of the inputs of type M, results of type T.
  template <class M, class T>
  void run(const Sigmas& sigmas) {
    using Acc = Accumulator<T>;
    const auto data = sigmas.data<Acc>();
    T* const dx0_out = grad_x0.data_ptr<T>();
    T* const dnoise_out = grad_noise.data_ptr<T>();
    const Acc* const gv = const_data_or_null<Acc>(grad_velocity);
    const std::array<const M*, 3> g{
        const_data_or_null<M>(grads[0]), const_data_or_null<M>(grads[1]), const_data_or_null<M>(grads[2])};
    const bool stream = past_caches({grad_x0, grad_noise}, {grads[0], grads[1], grads[2], grad_velocity});
    for_chunks(grad_x0.numel(), [&](int64_t begin, int64_t end) {
      sigmas.for_rows(data, begin, end, coefficients<Acc>, [&](int64_t at, int64_t size, auto at_times) {
        const Output<T> to_x0(dx0_out + at, stream), to_noise(dnoise_out + at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const Coefficients<Acc> c = at_times(i, count);
          Lanes<Acc> dnoise = load_or_zero<Acc>(gv, at + i, count);
          Lanes<Acc> dx0 = Lanes<Acc>(Acc(0)) - dnoise;
          for (int n = 0; n < 3; ++n) {
            if (g[n]) {
              const Lanes<Acc> grad = load_lanes<Acc>(g[n] + at + i, count);
              dx0 = fma(c.of_x0[n], grad, dx0);
              dnoise = fma(c.of_noise[n], grad, dnoise);
            }
          }
          store_lanes(dx0, to_x0, i, count);
          store_lanes(dnoise, to_noise, i, count);
        });
      });
    });
  }
};

template <class Kernel>
void run(Kernel& kernel, ScalarType from, ScalarType to, const Sigmas& sigmas) {
  with_dtype(from, [&]<class F>(F) {
    with_dtype(to, [&]<class T>(T) {
      if constexpr (std::is_same_v<Accumulator<F>, Accumulator<T>>) { // as storage_dtype has it
        kernel.template run<F, T>(sigmas);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_inputs(
    const Tensor& x0,
    const Tensor& noise,
    const Tensor& sigma,
    const OptionalTensor& sigma_plus,
    const OptionalTensor& sigma_minus,
    ScalarType model_dtype) {
  const auto [accumulate, latents, model] = IntervalInputsDtypes(x0.scalar_type(), noise.scalar_type(), model_dtype);
  Forward kernel;
  kernel.velocity = empty(x0.sizes(), accumulate, x0);
  for (int n = 0; n < (sigma_plus ? 3 : 1); ++n) {
    kernel.inputs[n] = empty(x0.sizes(), model, x0);
  }
  kernel.x0 = ready(x0, latents);
  kernel.noise = ready(noise, latents);
  run(kernel, latents, model, sigmas_over(x0.sizes(), sigma, sigma_plus, sigma_minus, accumulate));
  const auto result = [&](const Tensor& input) {
    return input.defined() ? cast(input, model_dtype) : empty({0}, model_dtype, x0);
  };
  return {result(kernel.inputs[0]), result(kernel.inputs[1]), result(kernel.inputs[2]), kernel.velocity};
}

std::tuple<Tensor, Tensor> interval_inputs_backward(
    const OptionalTensor& grad_x,
    const OptionalTensor& grad_plus,
    const OptionalTensor& grad_minus,
    const OptionalTensor& grad_velocity,
    const Tensor& sigma,
    const OptionalTensor& sigma_plus,
    const OptionalTensor& sigma_minus,
    ScalarType x0_dtype,
    ScalarType noise_dtype) {
  const auto [accumulate, latents, model] =
      IntervalInputsDtypes::backward(x0_dtype, noise_dtype, {&grad_x, &grad_plus, &grad_minus});
  const std::array<const OptionalTensor*, 3> grads{&grad_x, &grad_plus, &grad_minus};
  Backward kernel;
  Tensor like;
  for (int n = 0; n < 3; ++n) {
    if (*grads[n]) {
      like = kernel.grads[n] = ready(**grads[n], model);
    }
  }
  if (grad_velocity) {
    like = kernel.grad_velocity = ready(*grad_velocity, accumulate);
  }
  kernel.grad_x0 = empty(like.sizes(), latents, like);
  kernel.grad_noise = empty(like.sizes(), latents, like);
  run(kernel, model, latents, sigmas_over(like.sizes(), sigma, sigma_plus, sigma_minus, accumulate));
  return {cast(kernel.grad_x0, x0_dtype), cast(kernel.grad_noise, noise_dtype)};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CPU, m) {
  m.impl("interval_inputs", &interval_inputs);
  m.impl("interval_inputs_backward", &interval_inputs_backward);
}

} // namespace anyflow
