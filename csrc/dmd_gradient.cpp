// gradient_b = (x0_fake - x0_real) / mean|x - x0_real|,  loss_b = mean (x - stopgrad(x - gradient))^2 / 2,
// x0 = x_sigma - sigma sign v,  v_real = v_u + guidance_scale (v_c - v_u)
#include "objective_dtypes.h"
#include "times.h"

#include <cmath>
#include <tuple>

namespace anyflow {
namespace {

struct Forward {
  Tensor loss, gradient;
  Tensor x, x_sigma, real, fake, uncond; // the last undefined: absent

  // The sample of type X, noised of type S, velocities of type V.
  template <class X, class S, class V>
  void run(const Times<1>& sigmas, double guidance, int64_t sign) {
    using Acc = Accumulator<V>;
    const auto data = sigmas.data<Acc>();
    const X* const x_in = x.const_data_ptr<X>();
    const S* const x_sigma_in = x_sigma.const_data_ptr<S>();
    const V* const real_in = real.const_data_ptr<V>();
    const V* const fake_in = fake.const_data_ptr<V>();
    const V* const uncond_in = const_data_or_null<V>(uncond);
    Acc* const gradient_out = gradient.data_ptr<Acc>();
    const Lanes<Acc> scale(static_cast<Acc>(guidance)), direction(static_cast<Acc>(sign)), zero(Acc(0));
    const auto prepare = [&](const std::array<Lanes<Acc>, 1>& sigma) { return direction * sigma[0]; };
    // The real velocity, and what the fake one is short of it, from the element `at` on.
    const auto scores = [&](int64_t at, auto count) {
      Lanes<Acc> v = load_lanes<Acc>(real_in + at, count);
      if (uncond_in) {
        const Lanes<Acc> u = load_lanes<Acc>(uncond_in + at, count);
        v = fma(scale, v - u, u);
      }
      return std::pair(v, v - load_lanes<Acc>(fake_in + at, count));
    };

    const Samples samples(x.sizes());
    std::vector<Acc> distances(samples.count * samples.chunks), squares(samples.count * samples.chunks);
    samples.for_chunks([&](int64_t, int64_t chunk, int64_t begin, int64_t end) {
      Lanes<Acc> distance(Acc(0)), square(Acc(0));
      sigmas.for_rows(data, begin, end, prepare, [&](int64_t at, int64_t size, auto at_times) {
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          const Lanes<Acc> sigma = at_times(i, count);
          const auto [v, short_of] = scores(at + i, count);
          const Lanes<Acc> x0_real = load_lanes<Acc>(x_sigma_in + at + i, count) - sigma * v;
          distance = distance + abs(load_lanes<Acc>(x_in + at + i, count) - x0_real);
          const Lanes<Acc> difference = sigma * short_of;
          square = fma(difference, difference, square);
        });
      });
      distances[chunk] = sum(distance);
      squares[chunk] = sum(square);
    });

    std::vector<Acc> normalisers(samples.count); // zero where the sample is of no use
    for (int64_t sample = 0; sample < samples.count; ++sample) {
      const Acc normaliser = static_cast<Acc>(samples.mean(distances, sample));
      const Acc size = static_cast<Acc>(samples.mean(squares, sample) / normaliser / normaliser);
      const bool usable = std::isfinite(size); // nor is it where the normaliser is zero
      normalisers[sample] = usable ? normaliser : Acc(0);
      loss.data_ptr<Acc>()[sample] = usable ? size / 2 : Acc(0);
    }

    const bool stream = past_caches({gradient}, {real, fake, uncond});
    samples.for_chunks([&](int64_t sample, int64_t, int64_t begin, int64_t end) {
      const bool usable = normalisers[sample] > 0;
      const Lanes<Acc> normaliser(normalisers[sample]);
      sigmas.for_rows(data, begin, end, prepare, [&](int64_t at, int64_t size, auto at_times) {
        const Output<Acc> to(gradient_out + at, stream);
        for_lanes<Acc>(size, [&](int64_t i, auto count) {
          store_lanes(usable ? at_times(i, count) * scores(at + i, count).second / normaliser : zero, to, i, count);
        });
      });
    });
  }
};

template <class X>
void backward(Tensor& grad_x, const Tensor& grad_loss, const Tensor& gradient) {
  using Acc = Accumulator<X>;
  const Acc* const upstream = grad_loss.const_data_ptr<Acc>();
  const Acc* const from = gradient.const_data_ptr<Acc>();
  X* const out = grad_x.data_ptr<X>();
  const Samples samples(gradient.sizes());
  const bool stream = past_caches({grad_x}, {gradient});
  samples.for_chunks([&](int64_t sample, int64_t, int64_t begin, int64_t end) {
    const Lanes<Acc> factor(upstream[sample] / static_cast<Acc>(samples.size));
    const Output<X> to(out + begin, stream);
    for_lanes<Acc>(end - begin, [&](int64_t i, auto count) {
      store_lanes(factor * load_lanes<Acc>(from + begin + i, count), to, i, count);
    });
  });
}

std::tuple<Tensor, Tensor> dmd_gradient(
    const Tensor& x,
    const Tensor& sigma,
    const Tensor& x_sigma,
    const Tensor& real_velocity,
    const Tensor& fake_velocity,
    const OptionalTensor& uncond_real_velocity,
    double guidance_scale,
    int64_t sign) {
  const auto dtypes = DmdGradientDtypes(x, x_sigma, real_velocity, fake_velocity, uncond_real_velocity);
  const auto [accumulate, model, clean, noised] = dtypes;

  Forward kernel;
  kernel.loss = empty({x.size(0)}, accumulate, x);
  kernel.gradient = empty(x.sizes(), accumulate, x);
  kernel.x = ready(x, clean);
  kernel.x_sigma = ready(x_sigma, noised);
  kernel.real = ready(real_velocity, model);
  kernel.fake = ready(fake_velocity, model);
  kernel.uncond = ready_if_given(uncond_real_velocity, model);
  const Times<1> sigmas(x.sizes(), {sigma}, accumulate);
  with_dtype(model, [&]<class V>(V) {
    using Acc = Accumulator<V>;
    const auto with_clean = [&]<class X>(X) {
      dtypes.noised == dtypes.model ? kernel.run<X, V, V>(sigmas, guidance_scale, sign)
                                    : kernel.run<X, Acc, V>(sigmas, guidance_scale, sign);
    };
    dtypes.clean == dtypes.model ? with_clean(V{}) : with_clean(Acc{});
  });
  return {kernel.loss, kernel.gradient};
}

Tensor dmd_gradient_backward(const Tensor& grad_loss, const Tensor& gradient, ScalarType dtype) {
  const ScalarType accumulate = gradient.scalar_type();
  const ScalarType storage = storage_dtype(dtype, accumulate);
  Tensor grad_x = empty(gradient.sizes(), storage, gradient);
  with_dtype(storage, [&]<class X>(X) {
    backward<X>(grad_x, ready(grad_loss, accumulate), ready(gradient, accumulate));
  });
  return cast(grad_x, dtype);
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CPU, m) {
  m.impl("dmd_gradient", &dmd_gradient);
  m.impl("dmd_gradient_backward", &dmd_gradient_backward);
}

} // namespace anyflow
