// How kernels are launched: on the tensors' device, on its current stream, checked, and without waiting for them.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>

#include <cstdint>

namespace anyflow::cuda {

template <class... Parameters>
void launch(
    c10::DeviceIndex device, void (*kernel)(Parameters...), dim3 blocks, int threads, const Parameters&... arguments) {
  if (blocks.x == 0) { // an error to CUDA
    return;
  }
  const c10::cuda::CUDAGuard guard(device);
  kernel<<<blocks, threads, 0, c10::cuda::getCurrentCUDAStream(device)>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// How many blocks of the kernel the device holds at once; 0 where its blocks cannot wait for each other.
template <class... Parameters>
int64_t resident_blocks(c10::DeviceIndex device, void (*kernel)(Parameters...), int threads) {
  const c10::cuda::CUDAGuard guard(device);
  int cooperative = 0, multiprocessors = 0, blocks = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  return cooperative ? int64_t(multiprocessors) * blocks : 0;
}

// Of at most resident_blocks, which may call grid_barrier.
template <class... Parameters>
void launch_together(
    c10::DeviceIndex device, void (*kernel)(Parameters...), dim3 blocks, int threads, const Parameters&... arguments) {
  const c10::cuda::CUDAGuard guard(device);
  void* pointers[] = {const_cast<Parameters*>(&arguments)...};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel),
      blocks,
      dim3(threads),
      pointers,
      0,
      c10::cuda::getCurrentCUDAStream(device)));
}

// What any block wrote to global memory before it, every block reads after it.
__device__ inline void grid_barrier() {
  cooperative_groups::this_grid().sync();
}

} // namespace anyflow::cuda
