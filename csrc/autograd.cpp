// Autograd of the operators whose own work is so short that autograd in Python would cost more than it. What is saved
// and what comes back is as the contracts in anyflow_kernels/<op>/__init__.py have it; the kernels themselves are
// reached through the dispatcher, for whichever device and backend.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace anyflow {
namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// Python defines the schemas after this library is loaded: an operator is looked up at its first call.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool wants_gradient(const Tensor& tensor) {
  return tensor.requires_grad();
}

bool wants_gradient(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

template <class T>
bool wants_gradient(const T&) {
  return false;
}

// The operator of a Function, which has its name and signature: through the Function where a gradient is wanted.
template <class Node, class Signature = typename Node::Signature>
struct Operator;

template <class Node, class Result, class... Arguments>
struct Operator<Node, Result(Arguments...)> {
  static Result run(Arguments... arguments) {
    if (!at::GradMode::is_enabled() || !(wants_gradient(arguments) || ...)) {
      return below(arguments...);
    }
    if constexpr (std::is_same_v<Result, Tensor>) {
      return Node::apply(arguments...);
    } else {
      return in_tuple(Node::apply(arguments...), std::make_index_sequence<std::tuple_size_v<Result>>());
    }
  }

  static Result below(Arguments... arguments) {
    static const auto operation = find<Result(Arguments...)>(Node::name);
    const at::AutoDispatchBelowADInplaceOrView guard;
    return operation.call(arguments...);
  }

 private:
  template <std::size_t... I>
  static Result in_tuple(const variable_list& results, std::index_sequence<I...>) {
    return {results[I]...};
  }
};

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

OptionalTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// ---- gate_blend

using GateBlendBackwardSignature =
    std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool);

struct GateBlend : public Function<GateBlend> {
  static constexpr char name[] = "anyflow_kernels::gate_blend";
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&);

  static Tensor forward(AutogradContext* context, const Tensor& base, const Tensor& delta, const Tensor& gate) {
    context->save_for_backward({base, delta, gate});
    return Operator<GateBlend>::below(base, delta, gate);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation = find<GateBlendBackwardSignature>("anyflow_kernels::gate_blend_backward");
    const auto saved = context->get_saved_variables();
    auto [base, delta, gate] = operation.call(grads[0], saved[0], saved[1], saved[2], context->needs_input_grad(2));
    return {base, delta, gate};
  }
};

// ---- rollout_step

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using RolloutStepBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
    const Tensor&, const Tensor&, const Tensor&, double, int64_t, ScalarType);

struct RolloutStep : public Function<RolloutStep> {
  static constexpr char name[] = "anyflow_kernels::rollout_step";
  using Signature = Four(
      const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
      const Tensor&, double, int64_t, double, double, ScalarType, bool);

  static variable_list forward(
      AutogradContext* context,
      const Tensor& x,
      const OptionalTensor& average,
      const Tensor& velocity,
      const OptionalTensor& uncond_velocity,
      const Tensor& sigma,
      const Tensor& sigma_next,
      const Tensor& weight,
      double guidance_scale,
      int64_t sign,
      double time_scale,
      double time_offset,
      ScalarType model_dtype,
      bool last) {
    auto [new_x, new_average, model_input, model_time] = Operator<RolloutStep>::below(
        x, average, velocity, uncond_velocity, sigma, sigma_next, weight, guidance_scale, sign, time_scale,
        time_offset, model_dtype, last);
    context->save_for_backward({velocity, or_undefined(uncond_velocity), sigma, sigma_next, weight});
    context->saved_data["guidance_scale"] = guidance_scale;
    context->saved_data["sign"] = sign;
    context->saved_data["x_dtype"] = x.scalar_type();
    if (average) {
      context->saved_data["average_dtype"] = average->scalar_type();
    }
    context->set_materialize_grads(false);
    variable_list constant{model_time};
    if (last) {
      constant.insert(constant.end(), {new_x, model_input});
    } else if (model_dtype == new_x.scalar_type()) { // x itself is the model's input, this one is empty
      constant.push_back(model_input);
    }
    context->mark_non_differentiable(constant);
    return {new_x, new_average, model_input, model_time};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation = find<RolloutStepBackwardSignature>("anyflow_kernels::rollout_step_backward");
    variable_list results(13); // one for each argument of forward
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) {
      return results;
    }
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    std::tie(results[0], results[2], results[3]) = operation.call(
        or_none(grads[0]), or_none(grads[1]), or_none(grads[2]), saved[0], or_none(saved[1]), saved[2], saved[3],
        saved[4], data["guidance_scale"].toDouble(), data["sign"].toInt(), data["x_dtype"].toScalarType());
    if (!saved[1].defined()) {
      results[3] = Tensor();
    }
    if (data.count("average_dtype") && grads[1].defined()) {
      results[1] = grads[1].to(data["average_dtype"].toScalarType());
    }
    return results;
  }
};

// ---- interval_inputs

using IntervalInputsBackwardSignature = std::tuple<Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, ScalarType, ScalarType);

struct IntervalInputs : public Function<IntervalInputs> {
  static constexpr char name[] = "anyflow_kernels::interval_inputs";
  using Signature = Four(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, ScalarType);

  static variable_list forward(
      AutogradContext* context,
      const Tensor& x0,
      const Tensor& noise,
      const Tensor& sigma,
      const OptionalTensor& sigma_plus,
      const OptionalTensor& sigma_minus,
      ScalarType model_dtype) {
    auto [x, x_plus, x_minus, velocity] =
        Operator<IntervalInputs>::below(x0, noise, sigma, sigma_plus, sigma_minus, model_dtype);
    context->save_for_backward({sigma, or_undefined(sigma_plus), or_undefined(sigma_minus)});
    context->saved_data["x0_dtype"] = x0.scalar_type();
    context->saved_data["noise_dtype"] = noise.scalar_type();
    context->set_materialize_grads(false);
    if (!sigma_plus) {
      context->mark_non_differentiable({x_plus, x_minus});
    }
    return {x, x_plus, x_minus, velocity};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation = find<IntervalInputsBackwardSignature>("anyflow_kernels::interval_inputs_backward");
    variable_list results(6); // one for each argument of forward
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined() && !grads[3].defined()) {
      return results;
    }
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    std::tie(results[0], results[1]) = operation.call(
        or_none(grads[0]), or_none(grads[1]), or_none(grads[2]), or_none(grads[3]), saved[0], or_none(saved[1]),
        or_none(saved[2]), data["x0_dtype"].toScalarType(), data["noise_dtype"].toScalarType());
    return results;
  }
};

// ---- flowmap_loss

using Three = std::tuple<Tensor, Tensor, Tensor>;
using FlowmapLossBackwardSignature = Tensor(
    const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, int64_t, ScalarType);

struct FlowmapLoss : public Function<FlowmapLoss> {
  static constexpr char name[] = "anyflow_kernels::flowmap_loss";
  using Signature = Three(
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const Tensor&, double, int64_t, bool);

  static variable_list forward(
      AutogradContext* context,
      const Tensor& prediction,
      const Tensor& target_velocity,
      const OptionalTensor& uncond_prediction,
      const OptionalTensor& u_plus,
      const OptionalTensor& u_minus,
      const OptionalTensor& interval,
      const OptionalTensor& gap,
      const Tensor& weight,
      double guidance_scale,
      int64_t sign,
      bool need_residual) {
    auto [loss, unweighted, residual] = Operator<FlowmapLoss>::below(
        prediction, target_velocity, uncond_prediction, u_plus, u_minus, interval, gap, weight, guidance_scale, sign,
        need_residual);
    context->save_for_backward({residual, weight});
    context->saved_data["guidance_scale"] = guidance_scale;
    context->saved_data["sign"] = sign;
    context->saved_data["dtype"] = prediction.scalar_type();
    context->set_materialize_grads(false);
    context->mark_non_differentiable({residual});
    return {loss, unweighted, residual};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation = find<FlowmapLossBackwardSignature>("anyflow_kernels::flowmap_loss_backward");
    variable_list results(11); // one for each argument of forward
    if (!grads[0].defined() && !grads[1].defined()) {
      return results;
    }
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    results[0] = operation.call(
        or_none(grads[0]), or_none(grads[1]), saved[0], saved[1], data["guidance_scale"].toDouble(),
        data["sign"].toInt(), data["dtype"].toScalarType());
    return results;
  }
};

// ---- dmd_gradient

using Two = std::tuple<Tensor, Tensor>;
using DmdGradientBackwardSignature = Tensor(const Tensor&, const Tensor&, ScalarType);

struct DmdGradient : public Function<DmdGradient> {
  static constexpr char name[] = "anyflow_kernels::dmd_gradient";
  using Signature = Two(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
      int64_t);

  static variable_list forward(
      AutogradContext* context,
      const Tensor& x,
      const Tensor& sigma,
      const Tensor& x_sigma,
      const Tensor& real_velocity,
      const Tensor& fake_velocity,
      const OptionalTensor& uncond_real_velocity,
      double guidance_scale,
      int64_t sign) {
    auto [loss, gradient] = Operator<DmdGradient>::below(
        x, sigma, x_sigma, real_velocity, fake_velocity, uncond_real_velocity, guidance_scale, sign);
    context->save_for_backward({gradient});
    context->saved_data["dtype"] = x.scalar_type();
    context->set_materialize_grads(false);
    context->mark_non_differentiable({gradient});
    return {loss, gradient};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation = find<DmdGradientBackwardSignature>("anyflow_kernels::dmd_gradient_backward");
    variable_list results(8); // one for each argument of forward
    if (grads[0].defined()) {
      results[0] = operation.call(
          grads[0], context->get_saved_variables()[0], context->saved_data["dtype"].toScalarType());
    }
    return results;
  }
};

// ---- flowmap_embedding

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using FlowmapEmbeddingBackwardSignature = Nine(
    const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
    const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
    const Tensor&, int64_t, bool, double, double, double, double, std::string_view, bool, bool, bool);

struct FlowmapEmbedding : public Function<FlowmapEmbedding> {
  static constexpr char name[] = "anyflow_kernels::flowmap_embedding";
  using Signature = std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
      const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t, bool, double,
      double, double, double, std::string_view, bool);

  static variable_list forward(
      AutogradContext* context,
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
    auto [embedding, silu] = Operator<FlowmapEmbedding>::below(
        t, r, base_weight_1, base_bias_1, base_weight_2, base_bias_2, delta_weight_1, delta_bias_1, delta_weight_2,
        delta_bias_2, gate, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period, time_scale,
        deltatime_type, with_silu);
    const variable_list weights{
        base_weight_1, or_undefined(base_bias_1), base_weight_2, or_undefined(base_bias_2),
        delta_weight_1, or_undefined(delta_bias_1), delta_weight_2, or_undefined(delta_bias_2)};
    const auto wanted = [&](size_t first) {
      return std::any_of(weights.begin() + first, weights.begin() + first + 4, [](const Tensor& weight) {
        return weight.defined() && weight.requires_grad();
      });
    };
    variable_list saved{t, r, gate};
    saved.insert(saved.end(), weights.begin(), weights.end());
    context->save_for_backward(std::move(saved));
    auto& data = context->saved_data;
    data["options"] = std::tuple(num_channels, flip_sin_to_cos);
    data["scales"] = std::vector<double>{downscale_freq_shift, scale, max_period, time_scale};
    data["deltatime_type"] = std::string(deltatime_type);
    data["needs"] = std::tuple(wanted(0), wanted(4), gate.requires_grad());
    context->set_materialize_grads(false);
    if (!with_silu) {
      context->mark_non_differentiable({silu});
    }
    return {embedding, silu};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation =
        find<FlowmapEmbeddingBackwardSignature>("anyflow_kernels::flowmap_embedding_backward");
    variable_list results(19); // one for each argument of forward
    if (!grads[0].defined() && !grads[1].defined()) {
      return results;
    }
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const auto [num_channels, flip_sin_to_cos] = data["options"].to<std::tuple<int64_t, bool>>();
    const auto scales = data["scales"].toDoubleVector();
    const auto [need_base, need_delta, need_gate] = data["needs"].to<std::tuple<bool, bool, bool>>();
    const Tensor grad = grads[0].defined() ? grads[0] : at::zeros_like(grads[1]);
    std::tie(
        results[2], results[3], results[4], results[5], results[6], results[7], results[8], results[9], results[10]) =
        operation.call(
            grad, or_none(grads[1]), saved[0], saved[1], saved[3], or_none(saved[4]), saved[5], or_none(saved[6]),
            saved[7], or_none(saved[8]), saved[9], or_none(saved[10]), saved[2], num_channels, flip_sin_to_cos,
            scales[0], scales[1], scales[2], scales[3], data["deltatime_type"].toStringRef(), need_base, need_delta,
            need_gate);
    for (size_t i = 0; i < 8; ++i) { // empty where nothing was asked for
      if (!saved[3 + i].defined() || !(i < 4 ? need_base : need_delta)) {
        results[2 + i] = Tensor();
      }
    }
    if (!need_gate) {
      results[10] = Tensor();
    }
    return results;
  }
};

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, Autograd, m) {
  m.impl("flowmap_embedding", &Operator<FlowmapEmbedding>::run);
  m.impl("gate_blend", &Operator<GateBlend>::run);
  m.impl("rollout_step", &Operator<RolloutStep>::run);
  m.impl("interval_inputs", &Operator<IntervalInputs>::run);
  m.impl("flowmap_loss", &Operator<FlowmapLoss>::run);
  m.impl("dmd_gradient", &Operator<DmdGradient>::run);
}

} // namespace anyflow
