// Times laid over a tensor, and loops over its samples.
#pragma once

#include "common.h"

#include <array>
#include <utility>
#include <vector>

namespace anyflow {

// With as many dimensions as the tensor: one element, or [B] with ones behind.
inline Tensor over(at::IntArrayRef shape, const Tensor& time) {
  if (time.dim() == int64_t(shape.size())) {
    return time;
  }
  std::vector<int64_t> sizes(shape.size(), 1);
  if (time.numel() != 1) {
    sizes[0] = time.size(0);
  }
  return time.reshape(sizes);
}

// N times under a tensor: rows of `inner` elements share one of each. Where rows would be shorter than a vector, every
// element has its own.
template <std::size_t N>
struct Times {
  std::array<Tensor, N> values; // one for each row
  int64_t inner;

  Times(at::IntArrayRef shape, std::array<Tensor, N> times, ScalarType dtype) : values(std::move(times)) {
    constexpr int64_t shortest = 2 * Lanes<float>::size;
    const int64_t rank = int64_t(shape.size());
    int64_t kept = 0; // dimensions along which a time varies, and all before them
    for (Tensor& time : values) {
      time = over(shape, time);
      int64_t varies = rank;
      while (varies > kept && time.size(varies - 1) == 1) {
        --varies;
      }
      kept = varies;
    }
    inner = 1;
    for (int64_t i = kept; i < rank; ++i) {
      inner *= shape[i];
    }
    if (inner < shortest && kept > 0) {
      inner = 1;
      kept = rank;
    }
    std::vector<int64_t> rows(shape.begin(), shape.end());
    std::fill(rows.begin() + kept, rows.end(), 1);
    for (Tensor& time : values) {
      time = ready(time.sizes() == at::IntArrayRef(rows) ? time : time.expand(rows), dtype);
    }
  }

  template <class Acc>
  std::array<const Acc*, N> data() const {
    std::array<const Acc*, N> pointers;
    for (std::size_t n = 0; n < N; ++n) {
      pointers[n] = values[n].template const_data_ptr<Acc>();
    }
    return pointers;
  }

  // f(from, size, at) for the pieces of [begin, end) that lie in one row; at(i, count) gives what `prepare` makes of
  // the times at the elements from + i.
  template <class Acc, class Prepare, class F>
  void for_rows(const std::array<const Acc*, N>& data, int64_t begin, int64_t end, Prepare&& prepare, F&& f) const {
    std::array<Lanes<Acc>, N> lanes;
    if (inner == 1) {
      return f(begin, end - begin, [&](int64_t i, auto count) {
        for (std::size_t n = 0; n < N; ++n) {
          lanes[n] = load_lanes<Acc>(data[n] + begin + i, count);
        }
        return prepare(lanes);
      });
    }
    for (int64_t row = begin / inner; begin < end; ++row) {
      const int64_t next = std::min(end, (row + 1) * inner);
      for (std::size_t n = 0; n < N; ++n) {
        lanes[n] = Lanes<Acc>(data[n][row]);
      }
      const auto prepared = prepare(lanes);
      f(begin, next - begin, [&prepared](int64_t, auto) { return prepared; });
      begin = next;
    }
  }
};

// Samples of equal size, cut into chunks, none of which lies in two samples.
struct Samples {
  int64_t count, size, chunks;

  explicit Samples(at::IntArrayRef shape) : count(shape[0]), size(1) {
    for (const int64_t length : shape.slice(1)) {
      size *= length;
    }
    chunks = chunks_of(size);
  }

  // f(sample, chunk of all, begin, end) in parallel, in one region for all samples.
  template <class F>
  void for_chunks(F&& f) const {
    constexpr int64_t elements = 4 * CHUNK; // less is done sooner than a thread wakes up
    const int64_t grain = std::max<int64_t>(1, elements / std::max<int64_t>(1, std::min(size, CHUNK)));
    at::parallel_for(0, count * chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t sample = chunk / chunks, within = chunk % chunks * CHUNK;
        f(sample, chunk, sample * size + within, sample * size + std::min(size, within + CHUNK));
      }
      drain_streams();
    });
  }

  // The mean of a sample from the sums of all chunks, in their order: the same for every number of threads. Zero for a
  // sample without elements.
  template <class Acc>
  double mean(const std::vector<Acc>& sums, int64_t sample) const {
    double total = 0;
    for (int64_t chunk = sample * chunks; chunk < (sample + 1) * chunks; ++chunk) {
      total += sums[chunk];
    }
    return total / double(std::max<int64_t>(1, size));
  }
};

template <class Acc, class T>
Lanes<Acc> load_or_zero(const T* from, int64_t at, auto count) {
  return from ? load_lanes<Acc>(from + at, count) : Lanes<Acc>(Acc(0));
}

template <class T>
Output<T> output_at(T* data, int64_t at, bool stream) {
  return Output<T>(data ? data + at : nullptr, stream);
}

} // namespace anyflow
