// Times under the elements of a thread, and samples of which several blocks have a part each.
#pragma once

#include "device.cuh"
#include "rows.h"

#include <utility>

namespace anyflow::cuda {

// What read(time) gives for consecutive elements: read again where a row ends.
template <class Read>
struct UnderTimes {
  using Found = decltype(std::declval<const Read&>()(int64_t{}));

  const Rows& rows;
  Read read;
  int64_t row;
  int64_t end; // of the row, counted from the start of the span
  int count;
  Found found{};

  __device__ UnderTimes(const Rows& rows, const Span& span, const Read& read)
      : rows(rows), read(read), row(span.at / rows.inner), end((row + 1) * rows.inner - span.at), count(span.count) {
    if (count > 0) {
      found = read(time());
    }
  }

  __device__ int64_t time() const { return row / rows.frames / rows.middle * rows.frames + row % rows.frames; }

  __device__ bool one_row() const { return end >= count; }

  // At the span's element i: of every one, in order.
  __device__ const Found& at(int i) {
    if (i == end && i < count) {
      ++row;
      end += rows.inner;
      found = read(time());
    }
    return found;
  }
};

template <class Acc>
__device__ Acc time_at(const void* times, int64_t time) {
  return static_cast<const Acc*>(times)[time];
}

// ---- samples

// Each sample is the work of `count` blocks, one after the other, none of which has elements of two.
struct Parts {
  int64_t size; // of a sample
  unsigned count;
  bool aligned; // the arrays and, in them, each sample

  __device__ int64_t sample() const { return blockIdx.x / count; }

  template <int N>
  __device__ Span own_span() const {
    const int64_t first = sample() * size, within = blockIdx.x % count;
    return Span(first + (within * THREADS + threadIdx.x) * N, N, first + size, aligned);
  }
};

template <int N>
int64_t parts_of(const Samples& samples) {
  return ceil_div(samples.size, int64_t(THREADS) * N);
}

template <int N>
Parts parts(const Samples& samples, bool aligned) {
  return {samples.size, unsigned(parts_of<N>(samples)), aligned && samples.size % N == 0};
}

// Of one block: the sums over all parts of its sample, where each part left its own.
template <class Acc, int N>
__device__ Values<Acc, N> sum_of_parts(const Values<Acc, N>* partials, unsigned count) {
  Values<Acc, N> own{};
  for (unsigned part = threadIdx.x; part < count; part += THREADS) {
    const Values<Acc, N> found = partials[int64_t(blockIdx.x) * count + part];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      own[i] += found[i];
    }
  }
  return block_sums<THREADS>(own);
}

} // namespace anyflow::cuda
