// What the kernels share: dtypes, accesses of 16 bytes, and sums in a fixed order.
#pragma once

#include "launch.cuh"

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

namespace anyflow::cuda {

using c10::ScalarType;

constexpr int WARP = 32;
constexpr int THREADS = 256; // of a block, unless a kernel says otherwise

// ---- dtypes

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(T{}) for the storage dtypes under an accumulator.
template <class Acc, class F>
__host__ __device__ void with_storage(ScalarType dtype, F&& f) {
  if constexpr (std::is_same_v<Acc, double>) {
    f(double{});
  } else if (dtype == ScalarType::BFloat16) {
    f(c10::BFloat16{});
  } else if (dtype == ScalarType::Half) {
    f(c10::Half{});
  } else {
    f(float{});
  }
}

// For any of the four.
template <class F>
void with_dtype(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(double{}) : with_storage<float>(dtype, f);
}

// Tensors of which each thread reads or writes single values: in any of the four dtypes.
template <class Acc>
__device__ Acc load_as(const void* from, ScalarType dtype, int64_t at) {
  switch (dtype) {
    case ScalarType::Double: return static_cast<Acc>(static_cast<const double*>(from)[at]);
    case ScalarType::BFloat16: return static_cast<Acc>(static_cast<const c10::BFloat16*>(from)[at]);
    case ScalarType::Half: return static_cast<Acc>(static_cast<const c10::Half*>(from)[at]);
    default: return static_cast<Acc>(static_cast<const float*>(from)[at]);
  }
}

template <class Acc>
__device__ void store_as(void* to, ScalarType dtype, int64_t at, Acc value) {
  switch (dtype) {
    case ScalarType::Double: static_cast<double*>(to)[at] = static_cast<double>(value); break;
    case ScalarType::BFloat16: static_cast<c10::BFloat16*>(to)[at] = static_cast<c10::BFloat16>(float(value)); break;
    case ScalarType::Half: static_cast<c10::Half*>(to)[at] = static_cast<c10::Half>(float(value)); break;
    default: static_cast<float*>(to)[at] = static_cast<float>(value);
  }
}

// ---- elements

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How many elements a thread takes: 16 bytes of the narrowest tensor.
template <class... T>
constexpr int lanes_of() {
  int size = 16;
  ((size = int(sizeof(T)) < size ? int(sizeof(T)) : size), ...);
  return 16 / size;
}

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

// Which elements a thread has: N, all of which it may access at once where the arrays are aligned, or fewer at the end.
struct Span {
  int64_t at;
  int count;
  bool whole;

  __device__ Span(int64_t at, int lanes, int64_t size, bool aligned)
      : at(at), count(at >= size ? 0 : size - at < lanes ? int(size - at) : lanes), whole(aligned && count == lanes) {}
};

template <int N>
__device__ Span own_span(int64_t size, bool aligned) {
  return Span((int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N, N, size, aligned);
}

template <class Acc, int N>
struct Values {
  Acc values[N];

  __device__ Acc& operator[](int i) { return values[i]; }
  __device__ const Acc& operator[](int i) const { return values[i]; }
};

// Zeros past the end, and where there is no array.
template <class Acc, int N, class T>
__device__ Values<Acc, N> load(const T* from, const Span& span) {
  Values<Acc, N> found;
  if (from && span.whole) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from + span.at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      found[i] = static_cast<Acc>(pack.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      found[i] = from && i < span.count ? static_cast<Acc>(from[span.at + i]) : Acc(0);
    }
  }
  return found;
}

template <class T, class Acc, int N>
__device__ void store(T* to, const Span& span, const Values<Acc, N>& values) {
  if (span.whole) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      pack.values[i] = static_cast<T>(values[i]);
    }
    // Assigned, the vectors could be taken apart again, to share single stores with the other branch.
    uint4 vectors[sizeof(pack) / 16];
    memcpy(vectors, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < int(sizeof(pack) / 16); ++i) {
      __stwb(reinterpret_cast<uint4*>(to + span.at) + i, vectors[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < span.count) {
        to[span.at + i] = static_cast<T>(values[i]);
      }
    }
  }
}

// ---- functions

template <class Acc>
__device__ Acc sigmoid(Acc x) {
  return Acc(1) / (Acc(1) + exp(-x));
}

template <class Acc>
__device__ Acc silu(Acc x) {
  return x * sigmoid(x);
}

template <class Acc>
__device__ Acc silu_derivative(Acc x) {
  const Acc s = sigmoid(x);
  return s * (Acc(1) + x * (Acc(1) - s));
}

// ---- sums, whose order depends on nothing but the sizes

template <class Acc>
__device__ Acc warp_sum(Acc value) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, lane);
  }
  return value;
}

// Over a block of SIZE threads, every one of which calls this once.
template <int SIZE, class Acc, int N>
__device__ Values<Acc, N> block_sums(const Values<Acc, N>& values) {
  __shared__ Acc of_warp[N][SIZE / WARP];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Acc value = warp_sum(values[i]);
    if (threadIdx.x % WARP == 0) {
      of_warp[i][threadIdx.x / WARP] = value;
    }
  }
  __syncthreads();
  Values<Acc, N> totals{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    for (const Acc other : of_warp[i]) {
      totals[i] += other;
    }
  }
  return totals;
}

template <int SIZE, class Acc>
__device__ Acc block_sum(Acc value) {
  return block_sums<SIZE>(Values<Acc, 1>{{value}})[0];
}

// Of one block: total = the sum of `count` partial sums.
template <class Acc>
__global__ void __launch_bounds__(THREADS) sum_partials_kernel(Acc* total, const Acc* partials, int64_t count) {
  Acc own = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) {
    own += partials[i];
  }
  own = block_sum<THREADS>(own);
  if (threadIdx.x == 0) {
    *total = own;
  }
}

} // namespace anyflow::cuda
