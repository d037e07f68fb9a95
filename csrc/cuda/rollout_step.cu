// x' = x + (sigma_next - sigma) v,  average' = average + weight v,  v = sign (v_u + guidance_scale (v_c - v_u))
#include "rollout_step.h"

#include "rows.cuh"

namespace anyflow::cuda {
namespace {

template <class Acc>
struct Coefficients {
  Acc step, weight;
};

template <class Acc>
__device__ Coefficients<Acc> coefficients(const Times& times, int64_t time) {
  return {
      time_at<Acc>(times.sigma_next, time) - time_at<Acc>(times.sigma, time), time_at<Acc>(times.weight, time)};
}

template <class X, class V>
__global__ void __launch_bounds__(THREADS, 4) rollout_step_fwd_kernel(
    RolloutStep given, Times times, double guidance_scale, int64_t sign, int64_t numel, bool aligned) {
  using Acc = Accumulator<V>;
  constexpr int N = lanes_of<X, V>();
  const Span span = own_span<N>(numel, aligned);
  auto v = load<Acc, N>(static_cast<const V*>(given.velocity), span);
  const auto v_u = load<Acc, N>(static_cast<const V*>(given.uncond), span);
  const Acc scale = static_cast<Acc>(guidance_scale), direction = static_cast<Acc>(sign);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = direction * (given.uncond ? v_u[i] + scale * (v[i] - v_u[i]) : v[i]);
  }
  auto x = load<Acc, N>(static_cast<const X*>(given.x), span);
  auto average = load<Acc, N>(static_cast<const Acc*>(given.average), span);
  UnderTimes under(times.rows, span, [&](int64_t time) { return coefficients<Acc>(times, time); });
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Coefficients<Acc> at = under.at(i);
    average[i] += at.weight * v[i];
    x[i] += at.step * v[i];
  }
  store(static_cast<Acc*>(given.new_average), span, average);
  if (given.new_x) {
    store(static_cast<Acc*>(given.new_x), span, x);
  }
  if (given.model_input) {
    store(static_cast<V*>(given.model_input), span, x);
  }
  for (int i = 0; given.model_time && i < span.count && span.at + i < given.next_times_count; ++i) {
    const Acc sigma = static_cast<const Acc*>(given.next_times)[span.at + i];
    static_cast<Acc*>(given.model_time)[span.at + i] =
        static_cast<Acc>(given.time_scale) * sigma + static_cast<Acc>(given.time_offset);
  }
}

template <class X, class V>
__global__ void __launch_bounds__(THREADS, 4) rollout_step_bwd_kernel(
    RolloutStepBackward given, Times times, double guidance_scale, int64_t sign, int64_t numel, bool aligned) {
  using Acc = Accumulator<V>;
  constexpr int N = lanes_of<X, V>();
  const Span span = own_span<N>(numel, aligned);
  auto dx = load<Acc, N>(static_cast<const Acc*>(given.grad_x), span);
  const auto grad_average = load<Acc, N>(static_cast<const Acc*>(given.grad_average), span);
  const auto grad_input = load<Acc, N>(static_cast<const V*>(given.grad_input), span);
  const Acc direction = static_cast<Acc>(sign);
  const Acc scale = given.grad_uncond ? static_cast<Acc>(guidance_scale) : Acc(1);
  const Acc rest = static_cast<Acc>(1 - guidance_scale);
  UnderTimes under(times.rows, span, [&](int64_t time) { return coefficients<Acc>(times, time); });
  Values<Acc, N> dv, du;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Coefficients<Acc> at = under.at(i);
    dx[i] += grad_input[i];
    const Acc both = direction * (at.step * dx[i] + at.weight * grad_average[i]);
    dv[i] = scale * both;
    du[i] = rest * both;
  }
  store(static_cast<X*>(given.grad_x_out), span, dx);
  store(static_cast<V*>(given.grad_velocity), span, dv);
  if (given.grad_uncond) {
    store(static_cast<V*>(given.grad_uncond), span, du);
  }
}

template <class F>
void with_dtypes(const RolloutLaunch& given, F&& f) {
  if (given.model_dtype == ScalarType::Double) {
    f(double{}, double{});
  } else {
    with_storage<float>(given.model_dtype, [&]<class V>(V) {
      given.state_dtype == given.model_dtype ? f(V{}, V{}) : f(float{}, V{});
    });
  }
}

template <class X, class V, class Given>
void launch_elementwise(
    const RolloutLaunch& given,
    void (*kernel)(Given, Times, double, int64_t, int64_t, bool),
    const Given& step,
    bool aligned) {
  launch(
      given.device,
      kernel,
      dim3(ceil_div(given.numel, int64_t(THREADS) * lanes_of<X, V>())),
      THREADS,
      step,
      given.times,
      given.guidance_scale,
      given.sign,
      given.numel,
      aligned);
}

} // namespace

void launch_rollout_step(const RolloutLaunch& given, const RolloutStep& step) {
  const bool all = aligned(
      step.x, step.average, step.velocity, step.uncond, step.new_x, step.new_average, step.model_input);
  with_dtypes(given, [&]<class X, class V>(X, V) {
    launch_elementwise<X, V>(given, rollout_step_fwd_kernel<X, V>, step, all);
  });
}

void launch_rollout_step_backward(const RolloutLaunch& given, const RolloutStepBackward& step) {
  const bool all = aligned(
      step.grad_x, step.grad_average, step.grad_input, step.grad_x_out, step.grad_velocity, step.grad_uncond);
  with_dtypes(given, [&]<class X, class V>(X, V) {
    launch_elementwise<X, V>(given, rollout_step_bwd_kernel<X, V>, step, all);
  });
}

} // namespace anyflow::cuda
