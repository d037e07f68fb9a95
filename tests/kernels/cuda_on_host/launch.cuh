// In the place of csrc/cuda/launch.cuh: runs the kernels on the CPU, so that their results can be compared.
//
// Each CUDA thread is a fiber with a stack of its own. The threads of a block run one after the other, each up to the
// next barrier, in an order that CUDA_ON_HOST_ORDER turns round ("reverse"); so do the blocks. A result that depends on
// the order shows a missing barrier. Blocks of a launch_together stop at grid_barrier; their shared memory does not
// outlive it.
#pragma once

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  int64_t x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

using Body = void (*)(const void* context);

// Calls body(context) once for each thread of the grid.
void run(dim3 blocks, int threads, bool together, Body body, const void* context);

void block_barrier();
void grid_barrier();
// What the thread of this warp whose lane differs by the bits of `lanes` has brought; value is replaced.
void shuffle_xor(void* value, size_t size, int lanes);

} // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::block_barrier();
}

inline void __stwb(uint4* to, uint4 value) {
  *to = value;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  cuda_on_host::shuffle_xor(&value, sizeof(T), lanes);
  return value;
}

double sinpi(double x);
double cospi(double x);
float sinpif(float x);
float cospif(float x);

#include <c10/core/Device.h>

#include <algorithm>
#include <cmath>
#include <tuple>

using std::exp;
using std::exp2;
using std::fabs;
using std::memcpy;
using std::rint;

namespace anyflow::cuda {

template <class... Parameters>
void launch_on_host(
    bool together, void (*kernel)(Parameters...), dim3 blocks, int threads, const Parameters&... arguments) {
  const std::tuple context(kernel, std::tuple<Parameters...>(arguments...));
  using Context = decltype(context);
  cuda_on_host::run(
      blocks, threads, together,
      [](const void* from) {
        const auto& [function, values] = *static_cast<Context*>(from);
        std::apply(function, values);
      },
      &context);
}

template <class... Parameters>
void launch(
    c10::DeviceIndex, void (*kernel)(Parameters...), dim3 blocks, int threads, const Parameters&... arguments) {
  launch_on_host(false, kernel, blocks, threads, arguments...);
}

// Few, so that blocks take several tasks.
template <class... Parameters>
int64_t resident_blocks(c10::DeviceIndex, void (*)(Parameters...), int) {
  return 3;
}

template <class... Parameters>
void launch_together(
    c10::DeviceIndex, void (*kernel)(Parameters...), dim3 blocks, int threads, const Parameters&... arguments) {
  launch_on_host(true, kernel, blocks, threads, arguments...);
}

inline void grid_barrier() {
  cuda_on_host::grid_barrier();
}

} // namespace anyflow::cuda
