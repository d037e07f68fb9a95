#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace anyflow::cuda {

// A linear layer: contiguous [outputs, inputs] and [outputs], in a storage dtype.
struct Layer {
  const void *weight, *bias; // bias null: none
  c10::ScalarType dtype;
  int64_t outputs, inputs;
  bool aligned; // every row of the weight starts at a multiple of 16 bytes
};

struct Embedder {
  Layer first, second;
  c10::ScalarType rounded; // to which the features are rounded
};

// tau = of_t t + of_r r, in units of which scale_of_phase makes radians at the highest frequency.
struct Sinusoid {
  const void *t, *r; // [rows], float32 or float64
  bool double_times, cos_first;
  int64_t channels;
  double steps, log2_max_period, time_scale;
  int of_t, of_r; // of the delta embedder's time
};

// With at least one row and one output channel. Scratch and gate are in the accumulator's dtype.
struct FlowmapEmbedding {
  Sinusoid sinusoid;
  Embedder embedders[2]; // base, delta
  const void* gate;
  int64_t rows, channels;
  c10::ScalarType accumulate;
  c10::DeviceIndex device;

  // [rows, hidden] of each embedder
  void* hidden[2]; // after the SiLU
  void* pre[2]; // before it; null: not wanted
  void* features[2]; // [rows, sinusoid.channels], rounded; null: not wanted
};

struct FlowmapOutput {
  void *y, *silu; // [rows, channels]; silu null: not wanted
  c10::ScalarType dtype;
};

struct BlendBackward {
  const void *grad, *grad_silu; // [rows, channels]; grad_silu null: zero
  c10::ScalarType grad_dtype, grad_silu_dtype;
  void* dy; // [rows, channels]: the gradient of the blend
  void *partials, *grad_gate; // null: not wanted
};

// The gradients of a layer's weight and bias: scale * grad^T input, over all rows.
struct LayerGradient {
  const void *grad, *input; // [rows, outputs], [rows, inputs]
  void *weight, *bias; // null: not wanted
  c10::ScalarType dtype;
  int64_t outputs, inputs;
  int factor; // 0: 1 - gate, 1: gate, 2: one
  bool aligned;
};

// y and silu, in one launch where there are few rows, else in two. Writes `hidden` on the way.
void launch_flowmap_embedding(const FlowmapEmbedding& given, const FlowmapOutput& out);

// For the backward pass, one launch each. hidden, pre and features:
void launch_hidden(const FlowmapEmbedding& given);
int64_t blend_partials(const FlowmapEmbedding& given);
void launch_blend_backward(const FlowmapEmbedding& given, const BlendBackward& blend);
// The gradients of `pre`, [rows, hidden] of each embedder; null: not wanted.
void launch_hidden_backward(const FlowmapEmbedding& given, const void* dy, void* const (&grad_pre)[2]);
void launch_layer_gradients(const FlowmapEmbedding& given, const LayerGradient (&layers)[4]);

} // namespace anyflow::cuda
