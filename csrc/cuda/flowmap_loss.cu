// loss_b = mean weight (p - target)^2,  p = sign (u_c + (g - 1) u_u) / g,
// target = v - interval sign (u_plus - u_minus) / gap / g
#include "flowmap_loss.h"

#include "rows.cuh"

namespace anyflow::cuda {
namespace {

// What u_c, u_u and the difference are multiplied with.
template <class Acc>
struct Factors {
  Acc cond, uncond, difference;
};

// The weight, and what the difference of u_plus and u_minus is multiplied with, which does not matter where they do not
// differ: at an interval of zero.
template <class Acc>
struct Coefficients {
  Acc weight, factor;
  bool differs;
};

template <class Acc>
using Sums = Values<Acc, 2>; // of the squares, with their weight and without

template <class Acc>
__device__ void store_means(const FlowmapLoss& given, int64_t sample, int64_t size, const Sums<Acc>& sums) {
  static_cast<Acc*>(given.loss)[sample] = sums[0] / static_cast<Acc>(size);
  static_cast<Acc*>(given.unweighted)[sample] = sums[1] / static_cast<Acc>(size);
}

// The target velocity of type V, predictions of type P, those that are subtracted of type D.
template <class V, class P, class D>
__global__ void __launch_bounds__(THREADS, 4) flowmap_loss_fwd_kernel(
    FlowmapLoss given, Factors<Accumulator<P>> of, Parts parts) {
  using Acc = Accumulator<P>;
  constexpr int N = lanes_of<V, P, D>();
  const Span span = parts.own_span<N>();
  UnderTimes under(given.rows, span, [&](int64_t time) {
    Coefficients<Acc> found{time_at<Acc>(given.weight, time), 0, false};
    if (given.u_plus) {
      const Acc interval = time_at<Acc>(given.interval, time);
      found.differs = interval != 0;
      found.factor = of.difference * (interval / time_at<Acc>(given.gap, time));
    }
    return found;
  });
  const bool differs = under.found.differs || !under.one_row(); // else they are not even read
  const auto plus = load<Acc, N>(static_cast<const D*>(differs ? given.u_plus : nullptr), span);
  const auto minus = load<Acc, N>(static_cast<const D*>(differs ? given.u_minus : nullptr), span);
  Values<Acc, N> weight, residual;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Coefficients<Acc> at = under.at(i);
    weight[i] = at.weight;
    residual[i] = at.differs ? at.factor * (plus[i] - minus[i]) : Acc(0);
  }
  const auto p = load<Acc, N>(static_cast<const P*>(given.prediction), span);
  const auto u = load<Acc, N>(static_cast<const P*>(given.uncond), span);
  const auto v = load<Acc, N>(static_cast<const V*>(given.velocity), span);
  Sums<Acc> sums{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    residual[i] += of.cond * p[i] + of.uncond * u[i] - v[i];
    const Acc square = residual[i] * residual[i];
    sums[0] += weight[i] * square;
    sums[1] += square;
  }
  if (given.residual) {
    store(static_cast<Acc*>(given.residual), span, residual);
  }
  sums = block_sums<THREADS>(sums);
  if (threadIdx.x == 0) {
    if (parts.count == 1) {
      store_means(given, parts.sample(), parts.size, sums);
    } else {
      static_cast<Sums<Acc>*>(given.partials)[blockIdx.x] = sums;
    }
  }
}

// A block for each sample.
template <class Acc>
__global__ void __launch_bounds__(THREADS) flowmap_loss_means_kernel(FlowmapLoss given, Parts parts) {
  const Sums<Acc> sums = sum_of_parts(static_cast<const Sums<Acc>*>(given.partials), parts.count);
  if (threadIdx.x == 0) {
    store_means(given, blockIdx.x, parts.size, sums);
  }
}

template <class P>
__global__ void __launch_bounds__(THREADS, 4) flowmap_loss_bwd_kernel(
    FlowmapLossBackward grads, Accumulator<P> factor, Parts parts) {
  using Acc = Accumulator<P>;
  constexpr int N = lanes_of<P, Acc>();
  const Span span = parts.own_span<N>();
  const Acc of_weight = grads.loss ? factor * static_cast<const Acc*>(grads.loss)[parts.sample()] : Acc(0);
  const Acc rest = grads.unweighted ? factor * static_cast<const Acc*>(grads.unweighted)[parts.sample()] : Acc(0);
  UnderTimes under(grads.rows, span, [&](int64_t time) {
    return grads.loss ? of_weight * time_at<Acc>(grads.weight, time) + rest : rest;
  });
  auto grad = load<Acc, N>(static_cast<const Acc*>(grads.residual), span);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    grad[i] *= under.at(i);
  }
  store(static_cast<P*>(grads.prediction), span, grad);
}

template <class F>
void with_dtypes(const FlowmapLossLaunch& given, F&& f) {
  with_dtype(given.model_dtype, [&]<class P>(P) {
    using Acc = Accumulator<P>;
    const auto with_velocity = [&]<class V>(V) {
      given.difference_dtype == given.model_dtype ? f(V{}, P{}, P{}) : f(V{}, P{}, Acc{});
    };
    given.velocity_dtype == given.model_dtype ? with_velocity(P{}) : with_velocity(Acc{});
  });
}

} // namespace

int64_t flowmap_loss_partials(const FlowmapLossLaunch& given) {
  int64_t count = 0;
  with_dtypes(given, [&]<class V, class P, class D>(V, P, D) { count = parts_of<lanes_of<V, P, D>()>(given.samples); });
  return count == 1 ? 0 : 2 * given.samples.count * count;
}

void launch_flowmap_loss(const FlowmapLossLaunch& given, const FlowmapLoss& arrays) {
  const double sign = double(given.sign), g = given.guidance_scale;
  const bool all = aligned(
      arrays.prediction, arrays.uncond, arrays.velocity, arrays.u_plus, arrays.u_minus, arrays.residual);
  with_dtypes(given, [&]<class V, class P, class D>(V, P, D) {
    using Acc = Accumulator<P>;
    const Factors<Acc> of{
        static_cast<Acc>(arrays.uncond ? sign / g : sign),
        static_cast<Acc>(sign * (g - 1) / g),
        static_cast<Acc>(sign / g)};
    const Parts own = parts<lanes_of<V, P, D>()>(given.samples, all);
    const dim3 blocks(given.samples.count * own.count);
    launch(given.device, flowmap_loss_fwd_kernel<V, P, D>, blocks, THREADS, arrays, of, own);
    if (own.count > 1) {
      launch(given.device, flowmap_loss_means_kernel<Acc>, dim3(given.samples.count), THREADS, arrays, own);
    }
  });
}

void launch_flowmap_loss_backward(const FlowmapLossLaunch& given, const FlowmapLossBackward& grads) {
  const double factor = 2.0 * double(given.sign) / given.guidance_scale / double(given.samples.size);
  with_dtype(given.model_dtype, [&]<class P>(P) {
    using Acc = Accumulator<P>;
    const Parts own = parts<lanes_of<P, Acc>()>(given.samples, aligned(grads.residual, grads.prediction));
    const dim3 blocks(given.samples.count * own.count);
    launch(given.device, flowmap_loss_bwd_kernel<P>, blocks, THREADS, grads, static_cast<Acc>(factor), own);
  });
}

} // namespace anyflow::cuda
