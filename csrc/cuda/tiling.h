// Times laid over a tensor, as the kernels read them.
#pragma once

#include "../times.h"
#include "rows.h"

#include <array>
#include <optional>
#include <utility>
#include <vector>

namespace anyflow::cuda {

inline const void* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline void* mutable_data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

inline Samples samples_of(at::IntArrayRef shape) {
  const anyflow::Samples samples(shape);
  return {samples.count, samples.size};
}

// None when the times do not vary as (outer, broadcast, frames, broadcast).
inline std::optional<Rows> rows_under(at::IntArrayRef shape, at::IntArrayRef times_shape) {
  struct Run { // adjacent dimensions of one kind
    bool varies;
    int64_t length;
  };
  std::vector<Run> runs;
  for (size_t i = 0; i < shape.size(); ++i) {
    const bool varies = times_shape[i] == shape[i];
    if (shape[i] == 1) {
      continue;
    }
    if (!runs.empty() && runs.back().varies == varies) {
      runs.back().length *= shape[i];
    } else {
      runs.push_back({varies, shape[i]});
    }
  }
  if (runs.empty() || !runs[0].varies) {
    runs.insert(runs.begin(), {true, 1});
  }
  if (runs.size() > 4) {
    return std::nullopt;
  }
  const auto length = [&](size_t i) { return i < runs.size() ? runs[i].length : 1; };
  return runs.size() <= 2 ? Rows{1, 1, length(1)} : Rows{length(1), length(2), length(3)};
}

// N times of a tensor that has elements, one value of each for every row, or for every element where rows do not do.
template <std::size_t N>
struct Tiling {
  std::array<Tensor, N> times; // undefined: absent
  Rows rows;

  Tiling(at::IntArrayRef shape, std::array<Tensor, N> given, ScalarType dtype) : times(std::move(given)) {
    std::vector<int64_t> common(shape.size(), 1);
    for (Tensor& time : times) {
      if (time.defined()) {
        time = over(shape, time);
        for (size_t i = 0; i < shape.size(); ++i) {
          common[i] = std::max(common[i], time.size(i));
        }
      }
    }
    const std::optional<Rows> found = rows_under(shape, common);
    rows = found ? *found : *rows_under(shape, shape);
    const at::IntArrayRef wanted = found ? at::IntArrayRef(common) : shape;
    for (Tensor& time : times) {
      if (time.defined()) {
        time = ready(time.sizes() == wanted ? time : time.expand(wanted), dtype);
      }
    }
  }
};

} // namespace anyflow::cuda
