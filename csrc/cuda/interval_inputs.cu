// x_s = (1 - s) x0 + s noise at sigma, sigma_plus and sigma_minus,  velocity = noise - x0
#include "interval_inputs.h"

#include "rows.cuh"

namespace anyflow::cuda {
namespace {

template <class Acc>
__device__ Values<Acc, 3> read_sigmas(const Sigmas& sigmas, int64_t time) {
  Values<Acc, 3> found;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    found[n] = sigmas.values[n] ? time_at<Acc>(sigmas.values[n], time) : Acc(0);
  }
  return found;
}

// Latents of type T, inputs of type M.
template <class T, class M>
__global__ void __launch_bounds__(THREADS, 4) interval_inputs_fwd_kernel(
    IntervalInputs given, Sigmas sigmas, int64_t numel, bool aligned) {
  using Acc = Accumulator<T>;
  constexpr int N = lanes_of<T, M>();
  const Span span = own_span<N>(numel, aligned);
  const auto x0 = load<Acc, N>(static_cast<const T*>(given.x0), span);
  const auto noise = load<Acc, N>(static_cast<const T*>(given.noise), span);
  UnderTimes under(sigmas.rows, span, [&](int64_t time) { return read_sigmas<Acc>(sigmas, time); });
  Values<Acc, N> velocity, inputs[3];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Values<Acc, 3> sigma = under.at(i);
    velocity[i] = noise[i] - x0[i];
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      inputs[n][i] = (Acc(1) - sigma[n]) * x0[i] + sigma[n] * noise[i];
    }
  }
  store(static_cast<Acc*>(given.velocity), span, velocity);
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    if (given.inputs[n]) {
      store(static_cast<M*>(given.inputs[n]), span, inputs[n]);
    }
  }
}

template <class T, class M>
__global__ void __launch_bounds__(THREADS, 4) interval_inputs_bwd_kernel(
    IntervalInputsBackward grads, Sigmas sigmas, int64_t numel, bool aligned) {
  using Acc = Accumulator<T>;
  constexpr int N = lanes_of<T, M>();
  const Span span = own_span<N>(numel, aligned);
  auto dnoise = load<Acc, N>(static_cast<const Acc*>(grads.velocity), span);
  Values<Acc, N> inputs[3], dx0;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    inputs[n] = load<Acc, N>(static_cast<const M*>(grads.inputs[n]), span);
  }
  UnderTimes under(sigmas.rows, span, [&](int64_t time) { return read_sigmas<Acc>(sigmas, time); });
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Values<Acc, 3> sigma = under.at(i);
    dx0[i] = -dnoise[i];
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      dx0[i] += (Acc(1) - sigma[n]) * inputs[n][i];
      dnoise[i] += sigma[n] * inputs[n][i];
    }
  }
  store(static_cast<T*>(grads.x0), span, dx0);
  store(static_cast<T*>(grads.noise), span, dnoise);
}

template <class F>
void with_dtypes(const IntervalInputsLaunch& given, F&& f) {
  if (given.latents_dtype == ScalarType::Double) {
    f(double{}, double{});
  } else {
    with_storage<float>(given.latents_dtype, [&]<class T>(T) {
      with_storage<float>(given.model_dtype, [&]<class M>(M) { f(T{}, M{}); });
    });
  }
}

template <class T, class M, class Given>
void launch_elementwise(
    const IntervalInputsLaunch& given,
    void (*kernel)(Given, Sigmas, int64_t, bool),
    const Given& arrays,
    bool aligned) {
  const int64_t blocks = ceil_div(given.numel, int64_t(THREADS) * lanes_of<T, M>());
  launch(given.device, kernel, dim3(blocks), THREADS, arrays, given.sigmas, given.numel, aligned);
}

} // namespace

void launch_interval_inputs(const IntervalInputsLaunch& launch, const IntervalInputs& given) {
  const auto& [x, x_plus, x_minus] = given.inputs;
  const bool all = aligned(given.x0, given.noise, x, x_plus, x_minus, given.velocity);
  with_dtypes(launch, [&]<class T, class M>(T, M) {
    launch_elementwise<T, M>(launch, interval_inputs_fwd_kernel<T, M>, given, all);
  });
}

void launch_interval_inputs_backward(const IntervalInputsLaunch& launch, const IntervalInputsBackward& grads) {
  const auto& [x, x_plus, x_minus] = grads.inputs;
  const bool all = aligned(x, x_plus, x_minus, grads.velocity, grads.x0, grads.noise);
  with_dtypes(launch, [&]<class T, class M>(T, M) {
    launch_elementwise<T, M>(launch, interval_inputs_bwd_kernel<T, M>, grads, all);
  });
}

} // namespace anyflow::cuda
