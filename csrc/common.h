// What the CPU kernels share: dtypes, vectors of two registers, chunks, and stores past the cache.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <type_traits>

namespace anyflow {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- dtypes

inline ScalarType accumulation_dtype(std::initializer_list<ScalarType> dtypes) {
  for (const ScalarType dtype : dtypes) {
    if (dtype == at::kDouble) {
      return at::kDouble;
    }
  }
  return at::kFloat;
}

// The dtype in which a kernel reads or writes a tensor: its own where the kernel is compiled for it, else the
// accumulator's, with a conversion before or after.
inline ScalarType storage_dtype(ScalarType dtype, ScalarType accumulate) {
  const bool reduced = dtype == at::kBFloat16 || dtype == at::kHalf;
  return accumulate == at::kFloat && reduced ? dtype : accumulate;
}

template <class F>
void with_dtype(ScalarType storage, F&& f) {
  switch (storage) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(at::BFloat16{});
    case at::kHalf: return f(at::Half{});
    default: TORCH_INTERNAL_ASSERT(false, "no kernel for ", storage);
  }
}

template <class F>
void with_accumulator(ScalarType accumulate, F&& f) {
  accumulate == at::kDouble ? f(double{}) : f(float{});
}

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Both without a call of the dispatcher where there is nothing to do: these calls are half of what a small input costs.
inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

inline Tensor ready(const Tensor& tensor, ScalarType dtype) {
  const Tensor converted = cast(tensor, dtype);
  return converted.is_contiguous() ? converted : converted.contiguous();
}

// Undefined where it is absent.
inline Tensor ready_if_given(const OptionalTensor& tensor, ScalarType dtype) {
  return tensor ? ready(*tensor, dtype) : Tensor();
}

inline Tensor empty(at::IntArrayRef shape, ScalarType dtype, const Tensor& like) {
  return at::empty(shape, like.options().dtype(dtype));
}

template <class T>
T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<T>() : nullptr;
}

template <class T>
const T* const_data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// ---- vectors

// Two registers of accumulators: as many values as one register holds in bfloat16 or float16.
template <class Acc>
struct Lanes {
  using Vector = at::vec::Vectorized<Acc>;
  static constexpr int64_t size = 2 * Vector::size();

  Vector low, high;

  Lanes() = default;
  Lanes(Vector low, Vector high) : low(low), high(high) {}
  explicit Lanes(Acc value) : low(value), high(value) {}

  friend Lanes operator+(const Lanes& a, const Lanes& b) {
    return {a.low + b.low, a.high + b.high};
  }
  friend Lanes operator-(const Lanes& a, const Lanes& b) {
    return {a.low - b.low, a.high - b.high};
  }
  friend Lanes operator*(const Lanes& a, const Lanes& b) {
    return {a.low * b.low, a.high * b.high};
  }
  friend Lanes operator/(const Lanes& a, const Lanes& b) {
    return {a.low / b.low, a.high / b.high};
  }
};

// a * b + c, rounded once.
template <class Acc>
Lanes<Acc> fma(const Lanes<Acc>& a, const Lanes<Acc>& b, const Lanes<Acc>& c) {
  return {at::vec::fmadd(a.low, b.low, c.low), at::vec::fmadd(a.high, b.high, c.high)};
}

template <class Acc>
Lanes<Acc> sigmoid(const Lanes<Acc>& x) {
  const Lanes<Acc> one(Acc(1));
  return one / (one + Lanes<Acc>(x.low.neg().exp(), x.high.neg().exp()));
}

template <class Acc>
Lanes<Acc> silu(const Lanes<Acc>& x) {
  return x * sigmoid(x);
}

template <class Acc>
Lanes<Acc> silu_derivative(const Lanes<Acc>& x) {
  const Lanes<Acc> one(Acc(1)), s = sigmoid(x);
  return s * fma(x, one - s, one);
}

template <class Acc>
Lanes<Acc> abs(const Lanes<Acc>& x) {
  return {x.low.abs(), x.high.abs()};
}

template <class Acc>
bool all_zero(const Lanes<Acc>& x) {
  using Vector = typename Lanes<Acc>::Vector;
  constexpr unsigned all = (1u << Vector::size()) - 1;
  return unsigned(x.low.zero_mask()) == all && unsigned(x.high.zero_mask()) == all;
}

// x, but zero where `by` is, whatever x is there.
template <class Acc>
Lanes<Acc> zero_where_zero(const Lanes<Acc>& by, const Lanes<Acc>& x) {
  using Vector = typename Lanes<Acc>::Vector;
  const Vector zero(Acc(0));
  return {Vector::blendv(x.low, zero, by.low == zero), Vector::blendv(x.high, zero, by.high == zero)};
}

// In a fixed order, by halves.
template <class Acc>
Acc sum(const Lanes<Acc>& x) {
  using Vector = typename Lanes<Acc>::Vector;
  return at::vec::vec_reduce_all<Acc>([](Vector& a, Vector& b) { return a + b; }, x.low + x.high);
}

// How many values of a Lanes are read or written; Full is all of them, known to the compiler.
template <class Acc>
using Full = std::integral_constant<int64_t, Lanes<Acc>::size>;

// Values past count are zero.
template <class Acc, class T, class Count = Full<Acc>>
Lanes<Acc> load_lanes(const T* from, Count count = {}) {
  using Vector = typename Lanes<Acc>::Vector;
  if constexpr (!std::is_same_v<Count, Full<Acc>>) {
    Acc values[Lanes<Acc>::size] = {};
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<Acc>(from[i]);
    }
    return load_lanes<Acc>(values);
  } else if constexpr (std::is_same_v<T, Acc>) {
    return {Vector::loadu(from), Vector::loadu(from + Vector::size())};
  } else {
    static_assert(at::vec::Vectorized<T>::size() == Lanes<Acc>::size);
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
    return {low, high};
  }
}

// An output, from some element on. Where the arrays outgrow the caches, a store that goes past them saves reading each
// line before it is overwritten; it needs an aligned address.
template <class T>
struct Output {
  T* data;
  bool stream;

  Output(T* data, bool stream)
      : data(data), stream(stream && reinterpret_cast<std::uintptr_t>(data) % sizeof(at::vec::Vectorized<T>) == 0) {}
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
void store_register(const at::vec::Vectorized<T>& values, T* to, [[maybe_unused]] bool stream) {
#if defined(CPU_CAPABILITY_AVX512)
  if (stream) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_stream_ps(to, values);
    } else if constexpr (std::is_same_v<T, double>) {
      return _mm512_stream_pd(to, values);
    } else {
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if (stream) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm256_stream_ps(to, values);
    } else if constexpr (std::is_same_v<T, double>) {
      return _mm256_stream_pd(to, values);
    } else {
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), values);
    }
  }
#endif
  values.store(to);
}

template <class Acc, class T, class Count = Full<Acc>>
void store_lanes(const Lanes<Acc>& lanes, const Output<T>& to, int64_t at, Count count = {}) {
  using Vector = typename Lanes<Acc>::Vector;
  if constexpr (!std::is_same_v<Count, Full<Acc>>) {
    Acc values[Lanes<Acc>::size];
    lanes.low.store(values);
    lanes.high.store(values + Vector::size());
    for (int64_t i = 0; i < count; ++i) {
      to.data[at + i] = static_cast<T>(values[i]);
    }
  } else if constexpr (std::is_same_v<T, Acc>) {
    store_register(lanes.low, to.data + at, to.stream);
    store_register(lanes.high, to.data + at + Vector::size(), to.stream);
  } else {
    store_register(at::vec::convert_from_float<T>(lanes.low, lanes.high), to.data + at, to.stream);
  }
}

// ---- loops

constexpr int64_t CHUNK = 8192; // elements that one thread takes in a row, however many threads there are

// f(position, count) for consecutive Lanes of [0, size).
template <class Acc, class F>
void for_lanes(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + Lanes<Acc>::size <= size; i += Lanes<Acc>::size) {
    f(i, Full<Acc>{});
  }
  if (i < size) {
    f(i, size - i);
  }
}

inline int64_t chunks_of(int64_t size) {
  return (size + CHUNK - 1) / CHUNK;
}

inline void drain_streams() {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  _mm_sfence();
#endif
}

// f(begin, end) for every chunk of [0, size), in parallel.
template <class F>
void for_chunks(int64_t size, F&& f) {
  constexpr int64_t grain = 4; // chunks: less is done sooner than a thread wakes up
  at::parallel_for(0, chunks_of(size), grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      f(chunk * CHUNK, std::min(size, (chunk + 1) * CHUNK));
    }
    drain_streams();
  });
}

// Whether the operating system has yet to make the pages of an array, or may have to. It zeroes each at the first store
// into it, and so brings it into the caches. glibc, as it is usually set, takes new pages for nearly every array of
// 32 MiB or more.
inline bool pages_are_new([[maybe_unused]] const Tensor& array) {
#if defined(__linux__)
  static const std::uintptr_t page = sysconf(_SC_PAGESIZE);
  const auto middle = reinterpret_cast<std::uintptr_t>(array.const_data_ptr()) + array.nbytes() / 2; // no header there
  unsigned char in_memory = 0;
  return mincore(reinterpret_cast<void*>(middle / page * page), 1, &in_memory) != 0 || !(in_memory & 1);
#else
  return true;
#endif
}

using Arrays = std::initializer_list<std::reference_wrapper<const Tensor>>;

// Whether a kernel's stores go past the caches, by what it writes and reads (undefined: absent): where the caches will
// hold little of it when it is next read, and the pages are not on their way into them anyhow. Between two calls a
// network runs, and after it such stores cost nothing at 5 MiB and gain a tenth to a fifth from 20 MiB on; called in a
// row, with all in the third-level cache, they gain from 30 MiB on.
inline bool past_caches(Arrays results, Arrays inputs) {
  std::size_t moved = 0;
  for (const Arrays arrays : {results, inputs}) {
    for (const Tensor& array : arrays) {
      moved += array.defined() ? array.nbytes() : 0;
    }
  }
  return moved > std::size_t(12) << 20 && std::none_of(results.begin(), results.end(), [](const Tensor& result) {
           return result.defined() && pages_are_new(result);
         });
}

} // namespace anyflow
