// loss_b = mean weight (p - target)^2,  p = sign (u_c + (g - 1) u_u) / g,
// target = v - interval sign (u_plus - u_minus) / gap / g
#include "objective_dtypes.h"
#include "times.h"

#include <tuple>

namespace anyflow {
namespace {

// The weight, and what the difference of u_plus and u_minus is multiplied with; it is not looked at where the interval
// is zero.
template <class Acc>
struct Coefficients {
  Lanes<Acc> weight, factor, interval;
  bool differs; // anywhere in these lanes
};

struct Forward {
  Tensor loss, unweighted, residual; // the last undefined: not wanted
  Tensor prediction, target, uncond, u_plus, u_minus; // undefined: absent

  // The target velocity of type V, predictions of type P, those that are subtracted of type D.
  template <class V, class P, class D>
  void run(const Times<3>& times, double guidance, int64_t sign) {
    using Acc = Accumulator<P>;
    const auto data = times.data<Acc>();
    const P* const p_in = prediction.const_data_ptr<P>();
    const V* const v_in = target.const_data_ptr<V>();
    const P* const u_in = const_data_or_null<P>(uncond);
    const D* const plus_in = const_data_or_null<D>(u_plus);
    const D* const minus_in = const_data_or_null<D>(u_minus);
    Acc* const residual_out = data_or_null<Acc>(residual);
    const Lanes<Acc> of_cond(static_cast<Acc>(u_in ? double(sign) / guidance : double(sign)));
    const Lanes<Acc> of_uncond(static_cast<Acc>(double(sign) * (guidance - 1) / guidance));
    const Lanes<Acc> of_difference(static_cast<Acc>(double(sign) / guidance));
    const auto prepare = [&](const std::array<Lanes<Acc>, 3>& lanes) {
      const auto& [interval, gap, weight] = lanes;
      return Coefficients<Acc>{weight, of_difference * (interval / gap), interval, !all_zero(interval)};
    };
    const Samples samples(prediction.sizes());
    std::vector<Acc> sums(samples.count * samples.chunks), weighted(samples.count * samples.chunks);
    const bool stream = residual_out && past_caches({residual}, {prediction, target, uncond, u_plus, u_minus});
    samples.for_chunks([&](int64_t, int64_t chunk, int64_t begin, int64_t end) {
      Lanes<Acc> total(Acc(0)), total_weighted(Acc(0));
      times.for_rows(data, begin, end, prepare, [&](int64_t at, int64_t size, auto at_times) {
        const Output<Acc> to = output_at(residual_out, at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const Coefficients<Acc> c = at_times(i, count);
          Lanes<Acc> d = of_cond * load_lanes<Acc>(p_in + at + i, count);
          if (u_in) {
            d = fma(of_uncond, load_lanes<Acc>(u_in + at + i, count), d);
          }
          d = d - load_lanes<Acc>(v_in + at + i, count);
          if (plus_in && c.differs) {
            const Lanes<Acc> difference =
                load_lanes<Acc>(plus_in + at + i, count) - load_lanes<Acc>(minus_in + at + i, count);
            d = d + zero_where_zero(c.interval, c.factor * difference);
          }
          if (to) {
            store_lanes(d, to, i, count);
          }
          const Lanes<Acc> square = d * d;
          total = total + square;
          total_weighted = fma(c.weight, square, total_weighted);
        });
      });
      sums[chunk] = sum(total);
      weighted[chunk] = sum(total_weighted);
    });
    for (int64_t sample = 0; sample < samples.count; ++sample) {
      loss.data_ptr<Acc>()[sample] = static_cast<Acc>(samples.mean(weighted, sample));
      unweighted.data_ptr<Acc>()[sample] = static_cast<Acc>(samples.mean(sums, sample));
    }
  }
};

struct Backward {
  Tensor grad_prediction;
  Tensor grad_loss, grad_unweighted; // undefined: zero
  Tensor residual;

  template <class P>
  void run(const Times<1>& weights, double guidance, int64_t sign) {
    using Acc = Accumulator<P>;
    const auto data = weights.data<Acc>();
    const Acc* const of_loss = const_data_or_null<Acc>(grad_loss);
    const Acc* const of_unweighted = const_data_or_null<Acc>(grad_unweighted);
    const Acc* const d = residual.const_data_ptr<Acc>();
    P* const out = grad_prediction.data_ptr<P>();
    const Samples samples(residual.sizes());
    const Acc factor = static_cast<Acc>(2.0 * double(sign) / guidance / double(std::max<int64_t>(1, samples.size)));
    const bool stream = past_caches({grad_prediction}, {residual});
    samples.for_chunks([&](int64_t sample, int64_t, int64_t begin, int64_t end) {
      const Lanes<Acc> of_weight(of_loss ? factor * of_loss[sample] : Acc(0));
      const Lanes<Acc> rest(of_unweighted ? factor * of_unweighted[sample] : Acc(0));
      const auto prepare = [&](const std::array<Lanes<Acc>, 1>& weight) {
        return of_loss ? fma(of_weight, weight[0], rest) : rest;
      };
      weights.for_rows(data, begin, end, prepare, [&](int64_t at, int64_t size, auto at_times) {
        const Output<P> to(out + at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          store_lanes(at_times(i, count) * load_lanes<Acc>(d + at + i, count), to, i, count);
        });
      });
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> flowmap_loss(
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
  const FlowmapLossDtypes dtypes(prediction, target_velocity, uncond_prediction, u_plus, u_minus);
  const auto [accumulate, model, velocity, difference] = dtypes;

  Forward kernel;
  kernel.loss = empty({prediction.size(0)}, accumulate, prediction);
  kernel.unweighted = empty({prediction.size(0)}, accumulate, prediction);
  if (need_residual) {
    kernel.residual = empty(prediction.sizes(), accumulate, prediction);
  }
  kernel.prediction = ready(prediction, model);
  kernel.target = ready(target_velocity, velocity);
  kernel.uncond = ready_if_given(uncond_prediction, model);
  kernel.u_plus = ready_if_given(u_plus, difference);
  kernel.u_minus = ready_if_given(u_minus, difference);
  const Times<3> times(prediction.sizes(), {interval.value_or(weight), gap.value_or(weight), weight}, accumulate);
  with_dtype(model, [&]<class P>(P) {
    using Acc = Accumulator<P>;
    const auto with_velocity = [&]<class V>(V) {
      dtypes.difference == dtypes.model ? kernel.run<V, P, P>(times, guidance_scale, sign)
                                        : kernel.run<V, P, Acc>(times, guidance_scale, sign);
    };
    dtypes.velocity == dtypes.model ? with_velocity(P{}) : with_velocity(Acc{});
  });
  return {kernel.loss, kernel.unweighted, need_residual ? kernel.residual : empty({0}, accumulate, prediction)};
}

Tensor flowmap_loss_backward(
    const OptionalTensor& grad_loss,
    const OptionalTensor& grad_unweighted,
    const Tensor& residual,
    const Tensor& weight,
    double guidance_scale,
    int64_t sign,
    ScalarType dtype) {
  const ScalarType accumulate = residual.scalar_type();
  const ScalarType model = storage_dtype(dtype, accumulate);
  Backward kernel;
  kernel.grad_prediction = empty(residual.sizes(), model, residual);
  kernel.grad_loss = ready_if_given(grad_loss, accumulate);
  kernel.grad_unweighted = ready_if_given(grad_unweighted, accumulate);
  kernel.residual = ready(residual, accumulate);
  with_dtype(model, [&]<class P>(P) {
    kernel.run<P>(Times<1>(residual.sizes(), {weight}, accumulate), guidance_scale, sign);
  });
  return cast(kernel.grad_prediction, dtype);
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CPU, m) {
  m.impl("flowmap_loss", &flowmap_loss);
  m.impl("flowmap_loss_backward", &flowmap_loss_backward);
}

} // namespace anyflow
