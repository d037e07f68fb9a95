// y = base + gate (delta - base)
#include "gate_blend.h"

#include "device.cuh"

namespace anyflow::cuda {
namespace {

template <class T, class U>
__global__ void __launch_bounds__(THREADS) gate_blend_fwd_kernel(
    T* y, const T* base, const U* delta, const Accumulator<T>* gate, int64_t numel, bool aligned) {
  using Acc = Accumulator<T>;
  constexpr int N = lanes_of<T, U>();
  const Span span = own_span<N>(numel, aligned);
  const auto e = load<Acc, N>(base, span), d = load<Acc, N>(delta, span);
  const Acc g = *gate;
  Values<Acc, N> blend;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    blend[i] = e[i] + g * (d[i] - e[i]);
  }
  store(y, span, blend);
}

template <class T, class U>
__global__ void __launch_bounds__(THREADS) gate_blend_bwd_kernel(
    T* grad_base,
    U* grad_delta,
    Accumulator<T>* partials,
    const T* grad,
    const T* base,
    const U* delta,
    const Accumulator<T>* gate,
    int64_t numel,
    bool aligned) {
  using Acc = Accumulator<T>;
  constexpr int N = lanes_of<T, U>();
  const Span span = own_span<N>(numel, aligned);
  const auto dy = load<Acc, N>(grad, span), e = load<Acc, N>(base, span), d = load<Acc, N>(delta, span);
  const Acc g = *gate;
  Values<Acc, N> de, dd;
  Acc total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    de[i] = (Acc(1) - g) * dy[i];
    dd[i] = g * dy[i];
    total += dy[i] * (d[i] - e[i]);
  }
  store(grad_base, span, de);
  store(grad_delta, span, dd);
  if (partials) {
    total = block_sum<THREADS>(total);
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = total;
    }
  }
}

template <class F>
void with_dtypes(const GateBlend& given, F&& f) {
  if (given.base_dtype == ScalarType::Double) {
    f(double{}, double{});
  } else {
    with_storage<float>(given.base_dtype, [&]<class T>(T) {
      with_storage<float>(given.delta_dtype, [&]<class U>(U) { f(T{}, U{}); });
    });
  }
}

template <class T, class U>
int64_t blocks_of(int64_t numel) {
  return ceil_div(numel, int64_t(THREADS) * lanes_of<T, U>());
}

} // namespace

void launch_gate_blend(const GateBlend& given, void* y) {
  with_dtypes(given, [&]<class T, class U>(T, U) {
    launch(
        given.device,
        gate_blend_fwd_kernel<T, U>,
        dim3(blocks_of<T, U>(given.numel)),
        THREADS,
        static_cast<T*>(y),
        static_cast<const T*>(given.base),
        static_cast<const U*>(given.delta),
        static_cast<const Accumulator<T>*>(given.gate),
        given.numel,
        aligned(y, given.base, given.delta));
  });
}

int64_t gate_blend_partials(const GateBlend& given) {
  int64_t count = 0;
  with_dtypes(given, [&]<class T, class U>(T, U) { count = blocks_of<T, U>(given.numel); });
  return count;
}

void launch_gate_blend_backward(
    const GateBlend& given, const void* grad, void* grad_base, void* grad_delta, void* partials, void* grad_gate) {
  with_dtypes(given, [&]<class T, class U>(T, U) {
    using Acc = Accumulator<T>;
    const int64_t blocks = blocks_of<T, U>(given.numel);
    launch(
        given.device,
        gate_blend_bwd_kernel<T, U>,
        dim3(blocks),
        THREADS,
        static_cast<T*>(grad_base),
        static_cast<U*>(grad_delta),
        static_cast<Acc*>(partials),
        static_cast<const T*>(grad),
        partials ? static_cast<const T*>(given.base) : nullptr,
        partials ? static_cast<const U*>(given.delta) : nullptr,
        static_cast<const Acc*>(given.gate),
        given.numel,
        aligned(grad_base, grad_delta, grad, given.base, given.delta));
    if (partials) {
      launch(
          given.device,
          sum_partials_kernel<Acc>,
          dim3(1),
          THREADS,
          static_cast<Acc*>(grad_gate),
          static_cast<const Acc*>(partials),
          blocks);
    }
  });
}

} // namespace anyflow::cuda
