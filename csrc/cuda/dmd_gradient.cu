// gradient_b = (x0_fake - x0_real) / mean|x - x0_real|,  loss_b = mean (x - stopgrad(x - gradient))^2 / 2,
// x0 = x_sigma - sigma sign v,  v_real = v_u + guidance_scale (v_c - v_u)
#include "dmd_gradient.h"

#include "rows.cuh"

#include <limits>

namespace anyflow::cuda {
namespace {

template <class Acc>
using Sums = Values<Acc, 2>; // of the distances, and of the squares of the differences

template <class Acc>
struct Normalised {
  Acc normaliser, loss; // both zero where the sample is of no use
};

template <class Acc>
__device__ Normalised<Acc> normalised(const Sums<Acc>& sums, int64_t elements) {
  const Acc normaliser = sums[0] / static_cast<Acc>(elements);
  const Acc size = sums[1] / static_cast<Acc>(elements) / normaliser / normaliser;
  const bool usable = size < std::numeric_limits<Acc>::infinity(); // nor is it where the normaliser is zero
  return usable ? Normalised<Acc>{normaliser, size / 2} : Normalised<Acc>{0, 0};
}

template <class Acc, int N>
__device__ void store_gradient(void* gradient, const Span& span, Values<Acc, N> difference, Acc normaliser) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    difference[i] = normaliser > 0 ? difference[i] / normaliser : Acc(0);
  }
  store(static_cast<Acc*>(gradient), span, difference);
}

template <class Acc, int N>
struct Scores {
  Values<Acc, N> step, difference; // sigma v of the real score, and x0_fake - x0_real
};

template <class V, int N, class Acc>
__device__ Scores<Acc, N> scores(const DmdGradient& given, Acc scale, Acc direction, const Span& span) {
  const auto real = load<Acc, N>(static_cast<const V*>(given.real), span);
  const auto uncond = load<Acc, N>(static_cast<const V*>(given.uncond), span);
  const auto fake = load<Acc, N>(static_cast<const V*>(given.fake), span);
  UnderTimes under(given.rows, span, [&](int64_t time) { return direction * time_at<Acc>(given.sigma, time); });
  Scores<Acc, N> found;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Acc sigma = under.at(i), v = given.uncond ? uncond[i] + scale * (real[i] - uncond[i]) : real[i];
    found.step[i] = sigma * v;
    found.difference[i] = sigma * (v - fake[i]);
  }
  return found;
}

// The sample of type X, noised of type S, velocities of type V.
template <class X, class S, class V>
__global__ void __launch_bounds__(THREADS, 4) dmd_gradient_sums_kernel(
    DmdGradient given, Accumulator<V> scale, Accumulator<V> direction, Parts parts) {
  using Acc = Accumulator<V>;
  constexpr int N = lanes_of<X, S, V>();
  const Span span = parts.own_span<N>();
  const auto [step, difference] = scores<V, N>(given, scale, direction, span);
  const auto x_sigma = load<Acc, N>(static_cast<const S*>(given.x_sigma), span);
  const auto x = load<Acc, N>(static_cast<const X*>(given.x), span);
  Sums<Acc> sums{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[0] += fabs(x[i] - (x_sigma[i] - step[i]));
    sums[1] += difference[i] * difference[i];
  }
  sums = block_sums<THREADS>(sums);
  if (parts.count > 1) {
    if (threadIdx.x == 0) {
      static_cast<Sums<Acc>*>(given.partials)[blockIdx.x] = sums;
    }
    return;
  }
  const auto [normaliser, loss] = normalised(sums, parts.size);
  if (threadIdx.x == 0) {
    static_cast<Acc*>(given.loss)[parts.sample()] = loss;
  }
  store_gradient(given.gradient, span, difference, normaliser);
}

// A block for each sample.
template <class Acc>
__global__ void __launch_bounds__(THREADS) dmd_gradient_normalisers_kernel(DmdGradient given, Parts parts) {
  const Sums<Acc> sums = sum_of_parts(static_cast<const Sums<Acc>*>(given.partials), parts.count);
  if (threadIdx.x == 0) {
    const auto [normaliser, loss] = normalised(sums, parts.size);
    static_cast<Acc*>(given.normalisers)[blockIdx.x] = normaliser;
    static_cast<Acc*>(given.loss)[blockIdx.x] = loss;
  }
}

template <class V>
__global__ void __launch_bounds__(THREADS, 4) dmd_gradient_fwd_kernel(
    DmdGradient given, Accumulator<V> scale, Accumulator<V> direction, Parts parts) {
  using Acc = Accumulator<V>;
  constexpr int N = lanes_of<V, Acc>();
  const Span span = parts.own_span<N>();
  const Acc normaliser = static_cast<const Acc*>(given.normalisers)[parts.sample()];
  store_gradient(given.gradient, span, scores<V, N>(given, scale, direction, span).difference, normaliser);
}

template <class X>
__global__ void __launch_bounds__(THREADS, 4) dmd_gradient_bwd_kernel(DmdGradientBackward grads, Parts parts) {
  using Acc = Accumulator<X>;
  constexpr int N = lanes_of<X, Acc>();
  const Span span = parts.own_span<N>();
  const Acc factor = static_cast<const Acc*>(grads.loss)[parts.sample()] / static_cast<Acc>(parts.size);
  auto grad = load<Acc, N>(static_cast<const Acc*>(grads.gradient), span);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    grad[i] *= factor;
  }
  store(static_cast<X*>(grads.x), span, grad);
}

template <class F>
void with_dtypes(const DmdGradientLaunch& given, F&& f) {
  with_dtype(given.model_dtype, [&]<class V>(V) {
    using Acc = Accumulator<V>;
    const auto with_clean = [&]<class X>(X) {
      given.noised_dtype == given.model_dtype ? f(X{}, V{}, V{}) : f(X{}, Acc{}, V{});
    };
    given.clean_dtype == given.model_dtype ? with_clean(V{}) : with_clean(Acc{});
  });
}

} // namespace

int64_t dmd_gradient_partials(const DmdGradientLaunch& given) {
  int64_t count = 0;
  with_dtypes(given, [&]<class X, class S, class V>(X, S, V) { count = parts_of<lanes_of<X, S, V>()>(given.samples); });
  return count == 1 ? 0 : 2 * given.samples.count * count;
}

void launch_dmd_gradient(const DmdGradientLaunch& given, const DmdGradient& arrays) {
  const bool of_scores = aligned(arrays.real, arrays.fake, arrays.uncond, arrays.gradient);
  with_dtypes(given, [&]<class X, class S, class V>(X, S, V) {
    using Acc = Accumulator<V>;
    const Acc scale = static_cast<Acc>(given.guidance_scale), direction = static_cast<Acc>(given.sign);
    const Parts own = parts<lanes_of<X, S, V>()>(given.samples, of_scores && aligned(arrays.x, arrays.x_sigma));
    const dim3 blocks(given.samples.count * own.count);
    launch(given.device, dmd_gradient_sums_kernel<X, S, V>, blocks, THREADS, arrays, scale, direction, own);
    if (own.count > 1) {
      launch(given.device, dmd_gradient_normalisers_kernel<Acc>, dim3(given.samples.count), THREADS, arrays, own);
      const Parts again = parts<lanes_of<V, Acc>()>(given.samples, of_scores);
      launch(
          given.device, dmd_gradient_fwd_kernel<V>, dim3(given.samples.count * again.count), THREADS, arrays, scale,
          direction, again);
    }
  });
}

void launch_dmd_gradient_backward(
    const Samples& samples, c10::ScalarType dtype, c10::DeviceIndex device, const DmdGradientBackward& grads) {
  with_dtype(dtype, [&]<class X>(X) {
    const Parts own = parts<lanes_of<X, Accumulator<X>>()>(samples, aligned(grads.gradient, grads.x));
    launch(device, dmd_gradient_bwd_kernel<X>, dim3(samples.count * own.count), THREADS, grads, own);
  });
}

} // namespace anyflow::cuda
