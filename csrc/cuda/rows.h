#pragma once

#include <cstdint>

namespace anyflow::cuda {

// How a tensor lies under its times: in rows of `inner` elements that share one of each; row
// (b * middle + c) * frames + f takes the times at b * frames + f.
struct Rows {
  int64_t middle, frames, inner;
};

// A tensor's samples, [count, size].
struct Samples {
  int64_t count, size;
};

} // namespace anyflow::cuda
