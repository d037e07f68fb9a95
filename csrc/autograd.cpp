// Autograd of the operators whose own work is so short that autograd in Python would cost more than it. What is saved
// and what comes back is as the contracts in anyflow_kernels/<op>/__init__.py have it; the kernels themselves are
// reached through the dispatcher, for whichever device and backend.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>

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

bool wants_gradient(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) {
    return false;
  }
  for (const Tensor* tensor : tensors) {
    if (tensor && tensor->requires_grad()) {
      return true;
    }
  }
  return false;
}

const Tensor* pointer(const OptionalTensor& tensor) {
  return tensor ? &*tensor : nullptr;
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

OptionalTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// ---- gate_blend

using GateBlendSignature = Tensor(const Tensor&, const Tensor&, const Tensor&);
using GateBlendBackwardSignature =
    std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool);

Tensor call_gate_blend(const Tensor& base, const Tensor& delta, const Tensor& gate) {
  static const auto operation = find<GateBlendSignature>("anyflow_kernels::gate_blend");
  const at::AutoDispatchBelowADInplaceOrView below;
  return operation.call(base, delta, gate);
}

struct GateBlend : public Function<GateBlend> {
  static Tensor forward(AutogradContext* context, const Tensor& base, const Tensor& delta, const Tensor& gate) {
    context->save_for_backward({base, delta, gate});
    return call_gate_blend(base, delta, gate);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto operation = find<GateBlendBackwardSignature>("anyflow_kernels::gate_blend_backward");
    const auto saved = context->get_saved_variables();
    auto [base, delta, gate] = operation.call(grads[0], saved[0], saved[1], saved[2], context->needs_input_grad(2));
    return {base, delta, gate};
  }
};

Tensor gate_blend(const Tensor& base, const Tensor& delta, const Tensor& gate) {
  return wants_gradient({&base, &delta, &gate}) ? GateBlend::apply(base, delta, gate)
                                                : call_gate_blend(base, delta, gate);
}

// ---- rollout_step

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using RolloutStepSignature = Four(
    const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
    const Tensor&, double, int64_t, double, double, ScalarType, bool);
using RolloutStepBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
    const Tensor&, const Tensor&, const Tensor&, double, int64_t, ScalarType);

template <class... Arguments>
Four call_rollout_step(const Arguments&... arguments) {
  static const auto operation = find<RolloutStepSignature>("anyflow_kernels::rollout_step");
  const at::AutoDispatchBelowADInplaceOrView below;
  return operation.call(arguments...);
}

struct RolloutStep : public Function<RolloutStep> {
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
    auto [new_x, new_average, model_input, model_time] = call_rollout_step(
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

Four rollout_step(
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
  if (!wants_gradient({&x, pointer(average), &velocity, pointer(uncond_velocity)})) {
    return call_rollout_step(
        x, average, velocity, uncond_velocity, sigma, sigma_next, weight, guidance_scale, sign, time_scale,
        time_offset, model_dtype, last);
  }
  auto results = RolloutStep::apply(
      x, average, velocity, uncond_velocity, sigma, sigma_next, weight, guidance_scale, sign, time_scale, time_offset,
      model_dtype, last);
  return {results[0], results[1], results[2], results[3]};
}

// ---- interval_inputs

using IntervalInputsSignature = Four(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, ScalarType);
using IntervalInputsBackwardSignature = std::tuple<Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, ScalarType, ScalarType);

template <class... Arguments>
Four call_interval_inputs(const Arguments&... arguments) {
  static const auto operation = find<IntervalInputsSignature>("anyflow_kernels::interval_inputs");
  const at::AutoDispatchBelowADInplaceOrView below;
  return operation.call(arguments...);
}

struct IntervalInputs : public Function<IntervalInputs> {
  static variable_list forward(
      AutogradContext* context,
      const Tensor& x0,
      const Tensor& noise,
      const Tensor& sigma,
      const OptionalTensor& sigma_plus,
      const OptionalTensor& sigma_minus,
      ScalarType model_dtype) {
    auto [x, x_plus, x_minus, velocity] =
        call_interval_inputs(x0, noise, sigma, sigma_plus, sigma_minus, model_dtype);
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

Four interval_inputs(
    const Tensor& x0,
    const Tensor& noise,
    const Tensor& sigma,
    const OptionalTensor& sigma_plus,
    const OptionalTensor& sigma_minus,
    ScalarType model_dtype) {
  if (!wants_gradient({&x0, &noise})) {
    return call_interval_inputs(x0, noise, sigma, sigma_plus, sigma_minus, model_dtype);
  }
  auto results = IntervalInputs::apply(x0, noise, sigma, sigma_plus, sigma_minus, model_dtype);
  return {results[0], results[1], results[2], results[3]};
}

// ---- flowmap_loss

using Three = std::tuple<Tensor, Tensor, Tensor>;
using FlowmapLossSignature = Three(
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const Tensor&, double, int64_t, bool);
using FlowmapLossBackwardSignature = Tensor(
    const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, int64_t, ScalarType);

template <class... Arguments>
Three call_flowmap_loss(const Arguments&... arguments) {
  static const auto operation = find<FlowmapLossSignature>("anyflow_kernels::flowmap_loss");
  const at::AutoDispatchBelowADInplaceOrView below;
  return operation.call(arguments...);
}

struct FlowmapLoss : public Function<FlowmapLoss> {
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
    auto [loss, unweighted, residual] = call_flowmap_loss(
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

Three flowmap_loss(
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
  if (!wants_gradient({&prediction})) {
    return call_flowmap_loss(
        prediction, target_velocity, uncond_prediction, u_plus, u_minus, interval, gap, weight, guidance_scale, sign,
        need_residual);
  }
  auto results = FlowmapLoss::apply(
      prediction, target_velocity, uncond_prediction, u_plus, u_minus, interval, gap, weight, guidance_scale, sign,
      need_residual);
  return {results[0], results[1], results[2]};
}

// ---- dmd_gradient

using Two = std::tuple<Tensor, Tensor>;
using DmdGradientSignature = Two(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, int64_t);
using DmdGradientBackwardSignature = Tensor(const Tensor&, const Tensor&, ScalarType);

template <class... Arguments>
Two call_dmd_gradient(const Arguments&... arguments) {
  static const auto operation = find<DmdGradientSignature>("anyflow_kernels::dmd_gradient");
  const at::AutoDispatchBelowADInplaceOrView below;
  return operation.call(arguments...);
}

struct DmdGradient : public Function<DmdGradient> {
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
    auto [loss, gradient] = call_dmd_gradient(
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

Two dmd_gradient(
    const Tensor& x,
    const Tensor& sigma,
    const Tensor& x_sigma,
    const Tensor& real_velocity,
    const Tensor& fake_velocity,
    const OptionalTensor& uncond_real_velocity,
    double guidance_scale,
    int64_t sign) {
  if (!wants_gradient({&x})) {
    return call_dmd_gradient(
        x, sigma, x_sigma, real_velocity, fake_velocity, uncond_real_velocity, guidance_scale, sign);
  }
  auto results = DmdGradient::apply(
      x, sigma, x_sigma, real_velocity, fake_velocity, uncond_real_velocity, guidance_scale, sign);
  return {results[0], results[1]};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, Autograd, m) {
  m.impl("gate_blend", &gate_blend);
  m.impl("rollout_step", &rollout_step);
  m.impl("interval_inputs", &interval_inputs);
  m.impl("flowmap_loss", &flowmap_loss);
  m.impl("dmd_gradient", &dmd_gradient);
}

} // namespace anyflow
