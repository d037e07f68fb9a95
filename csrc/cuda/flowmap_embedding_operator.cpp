// The operator flowmap_embedding on CUDA: tensors in, launches of flowmap_embedding.cu out.
#include "flowmap_embedding.h"

#include "../common.h"

#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <string_view>
#include <tuple>

namespace anyflow::cuda {
namespace {

bool aligned_rows(const Tensor& matrix) {
  const int64_t bytes = matrix.size(1) * int64_t(matrix.element_size());
  return reinterpret_cast<std::uintptr_t>(matrix.const_data_ptr()) % 16 == 0 && bytes % 16 == 0;
}

// The weights of a layer as the kernels read them.
struct LayerTensors {
  Tensor weight, bias;
  Layer layer{};

  LayerTensors(const Tensor& weight, const OptionalTensor& bias, ScalarType accumulate) {
    layer.dtype = storage_dtype(weight.scalar_type(), accumulate);
    layer.outputs = weight.size(0);
    layer.inputs = weight.size(1);
    this->weight = ready(weight, layer.dtype);
    layer.weight = this->weight.const_data_ptr();
    layer.aligned = aligned_rows(this->weight);
    if (bias) {
      this->bias = ready(*bias, layer.dtype);
      layer.bias = this->bias.const_data_ptr();
    }
  }
};

struct Arguments {
  Tensor t, r, gate;
  std::array<LayerTensors, 4> layers; // base and delta, two each
  std::array<Tensor, 6> scratch;
  FlowmapEmbedding given{};

  Arguments(
      const Tensor& t,
      const Tensor& r,
      const Tensor& base_weight_1,
      const OptionalTensor& base_bias_1,
      const Tensor& base_weight_2,
      const OptionalTensor& base_bias_2,
      const Tensor& delta_weight_1,
      const OptionalTensor& delta_bias_1,
      const Tensor& delta_weight_2,
      const OptionalTensor& delta_bias_2,
      const Tensor& gate,
      int64_t num_channels,
      bool flip_sin_to_cos,
      double downscale_freq_shift,
      double scale,
      double max_period,
      double time_scale,
      std::string_view deltatime_type,
      ScalarType accumulate)
      : gate(ready(gate, accumulate)),
        layers{
            LayerTensors(base_weight_1, base_bias_1, accumulate),
            LayerTensors(base_weight_2, base_bias_2, accumulate),
            LayerTensors(delta_weight_1, delta_bias_1, accumulate),
            LayerTensors(delta_weight_2, delta_bias_2, accumulate)} {
    const ScalarType times = accumulation_dtype({t.scalar_type(), r.scalar_type()});
    this->t = ready(t, times);
    this->r = ready(r, times);
    Sinusoid& sinusoid = given.sinusoid;
    sinusoid.t = this->t.const_data_ptr();
    sinusoid.r = this->r.const_data_ptr();
    sinusoid.double_times = times == at::kDouble;
    sinusoid.cos_first = flip_sin_to_cos;
    sinusoid.channels = num_channels;
    sinusoid.steps = double(num_channels / 2) - downscale_freq_shift;
    sinusoid.log2_max_period = std::log2(max_period);
    sinusoid.time_scale = time_scale * scale;
    sinusoid.of_t = deltatime_type == "r" ? 0 : deltatime_type == "t-r" ? 1 : -1;
    sinusoid.of_r = deltatime_type == "t-r" ? -1 : 1;
    for (int embedder = 0; embedder < 2; ++embedder) {
      const Tensor& weight_1 = embedder == 0 ? base_weight_1 : delta_weight_1;
      given.embedders[embedder] = {layers[2 * embedder].layer, layers[2 * embedder + 1].layer, weight_1.scalar_type()};
    }
    given.gate = this->gate.const_data_ptr();
    given.rows = t.numel();
    given.channels = base_weight_2.size(0);
    given.accumulate = accumulate;
    given.device = t.device().index();
  }

  void* allocate(int which, int64_t width) {
    scratch[which] = empty({given.rows, width}, given.accumulate, t);
    return scratch[which].mutable_data_ptr();
  }

  int64_t hidden(int embedder) const { return given.embedders[embedder].first.outputs; }
};

ScalarType accumulation_of(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d) {
  return accumulation_dtype({a.scalar_type(), b.scalar_type(), c.scalar_type(), d.scalar_type()});
}

// A dtype of which the kernels read and write single values; others are converted before or after.
ScalarType single_dtype(ScalarType dtype, ScalarType accumulate) {
  const bool known = dtype == at::kDouble || storage_dtype(dtype, at::kFloat) == dtype;
  return known ? dtype : accumulate;
}

std::tuple<Tensor, Tensor> flowmap_embedding(
    const Tensor& t,
    const Tensor& r,
    const Tensor& base_weight_1,
    const OptionalTensor& base_bias_1,
    const Tensor& base_weight_2,
    const OptionalTensor& base_bias_2,
    const Tensor& delta_weight_1,
    const OptionalTensor& delta_bias_1,
    const Tensor& delta_weight_2,
    const OptionalTensor& delta_bias_2,
    const Tensor& gate,
    int64_t num_channels,
    bool flip_sin_to_cos,
    double downscale_freq_shift,
    double scale,
    double max_period,
    double time_scale,
    std::string_view deltatime_type,
    bool with_silu) {
  const ScalarType accumulate = accumulation_of(base_weight_1, base_weight_2, delta_weight_1, delta_weight_2);
  const ScalarType dtype = base_weight_2.scalar_type(), written = single_dtype(dtype, accumulate);
  const int64_t rows = t.numel(), channels = base_weight_2.size(0);
  Tensor y = empty({rows, channels}, written, base_weight_2);
  Tensor silu = with_silu ? empty({rows, channels}, written, base_weight_2) : empty({0}, written, base_weight_2);
  if (y.numel() > 0) {
    Arguments arguments(
        t, r, base_weight_1, base_bias_1, base_weight_2, base_bias_2, delta_weight_1, delta_bias_1, delta_weight_2,
        delta_bias_2, gate, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale,
        deltatime_type, accumulate);
    for (int embedder = 0; embedder < 2; ++embedder) {
      arguments.given.hidden[embedder] = arguments.allocate(embedder, arguments.hidden(embedder));
    }
    launch_flowmap_embedding(
        arguments.given, {y.mutable_data_ptr(), with_silu ? silu.mutable_data_ptr() : nullptr, written});
  }
  return {cast(y, dtype), cast(silu, dtype)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients flowmap_embedding_backward(
    const Tensor& grad,
    const OptionalTensor& grad_silu,
    const Tensor& t,
    const Tensor& r,
    const Tensor& base_weight_1,
    const OptionalTensor& base_bias_1,
    const Tensor& base_weight_2,
    const OptionalTensor& base_bias_2,
    const Tensor& delta_weight_1,
    const OptionalTensor& delta_bias_1,
    const Tensor& delta_weight_2,
    const OptionalTensor& delta_bias_2,
    const Tensor& gate,
    int64_t num_channels,
    bool flip_sin_to_cos,
    double downscale_freq_shift,
    double scale,
    double max_period,
    double time_scale,
    std::string_view deltatime_type,
    bool need_base,
    bool need_delta,
    bool need_gate) {
  const ScalarType accumulate = accumulation_of(base_weight_1, base_weight_2, delta_weight_1, delta_weight_2);
  Arguments arguments(
      t, r, base_weight_1, base_bias_1, base_weight_2, base_bias_2, delta_weight_1, delta_bias_1, delta_weight_2,
      delta_bias_2, gate, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale,
      deltatime_type, accumulate);
  FlowmapEmbedding& given = arguments.given;
  const bool nothing = given.rows == 0 || given.channels == 0;
  const std::array<bool, 2> needed = {need_base, need_delta};

  std::array<Tensor, 8> grads; // undefined: not needed, or no bias
  Tensor grad_gate;
  for (int i = 0; i < 4; ++i) {
    const LayerTensors& layer = arguments.layers[i];
    if (needed[i / 2]) {
      const auto like = [&](const Tensor& weight) {
        return nothing ? at::zeros(weight.sizes(), weight.options()) : empty(weight.sizes(), layer.layer.dtype, weight);
      };
      grads[2 * i] = like(layer.weight);
      grads[2 * i + 1] = layer.bias.defined() ? like(layer.bias) : Tensor();
    }
  }
  if (need_gate) {
    grad_gate = nothing ? at::zeros(gate.sizes(), gate.options()) : empty(gate.sizes(), accumulate, gate);
  }

  if (!nothing) {
    for (int embedder = 0; embedder < 2; ++embedder) {
      given.hidden[embedder] = arguments.allocate(3 * embedder, arguments.hidden(embedder));
      given.pre[embedder] = arguments.allocate(3 * embedder + 1, arguments.hidden(embedder));
      given.features[embedder] = arguments.allocate(3 * embedder + 2, num_channels);
    }
    launch_hidden(given);

    Tensor dy;
    if (need_gate || grad_silu) {
      const auto readable = [&](const Tensor& tensor) {
        return ready(tensor, single_dtype(tensor.scalar_type(), accumulate));
      };
      const Tensor from_y = readable(grad), from_silu = grad_silu ? readable(*grad_silu) : Tensor();
      const Tensor partials = need_gate ? empty({blend_partials(given)}, accumulate, t) : Tensor();
      dy = empty({given.rows, given.channels}, accumulate, t);
      BlendBackward blend{};
      blend.grad = from_y.const_data_ptr();
      blend.grad_dtype = from_y.scalar_type();
      if (grad_silu) {
        blend.grad_silu = from_silu.const_data_ptr();
        blend.grad_silu_dtype = from_silu.scalar_type();
      }
      blend.dy = dy.mutable_data_ptr();
      if (need_gate) {
        blend.partials = partials.mutable_data_ptr();
        blend.grad_gate = grad_gate.mutable_data_ptr();
      }
      launch_blend_backward(given, blend);
    } else {
      dy = ready(grad, accumulate);
    }

    std::array<Tensor, 2> grad_pre;
    void* grad_pre_data[2] = {};
    LayerGradient layers[4] = {};
    for (int embedder = 0; embedder < 2; ++embedder) {
      if (!needed[embedder]) {
        continue;
      }
      grad_pre[embedder] = empty({given.rows, arguments.hidden(embedder)}, accumulate, t);
      grad_pre_data[embedder] = grad_pre[embedder].mutable_data_ptr();
      for (int i = 2 * embedder; i < 2 * embedder + 2; ++i) {
        const Layer& layer = arguments.layers[i].layer;
        const bool first = i % 2 == 0;
        layers[i].grad = first ? grad_pre_data[embedder] : dy.const_data_ptr();
        layers[i].input = first ? given.features[embedder] : given.hidden[embedder];
        layers[i].weight = grads[2 * i].mutable_data_ptr();
        layers[i].bias = grads[2 * i + 1].defined() ? grads[2 * i + 1].mutable_data_ptr() : nullptr;
        layers[i].dtype = layer.dtype;
        layers[i].outputs = layer.outputs;
        layers[i].inputs = layer.inputs;
        layers[i].factor = first ? 2 : embedder; // grad_pre has it already
        layers[i].aligned = aligned_rows(grads[2 * i]);
      }
    }
    if (need_base || need_delta) {
      launch_hidden_backward(given, dy.const_data_ptr(), grad_pre_data);
      launch_layer_gradients(given, layers);
    }
  }

  const auto finished = [&](const Tensor& found, const Tensor& input) {
    return found.defined() ? cast(found, input.scalar_type()) : t.new_empty({0});
  };
  return {
      finished(grads[0], base_weight_1),
      finished(grads[1], base_weight_1),
      finished(grads[2], base_weight_2),
      finished(grads[3], base_weight_2),
      finished(grads[4], delta_weight_1),
      finished(grads[5], delta_weight_1),
      finished(grads[6], delta_weight_2),
      finished(grads[7], delta_weight_2),
      finished(grad_gate, gate)};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CUDA, m) {
  m.impl("flowmap_embedding", &flowmap_embedding);
  m.impl("flowmap_embedding_backward", &flowmap_embedding_backward);
}

} // namespace anyflow::cuda
