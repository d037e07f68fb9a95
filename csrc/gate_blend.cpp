// y = base + gate (delta - base)
#include "common.h"

#include <ATen/ops/full.h>

#include <tuple>
#include <vector>

namespace anyflow {
namespace {

template <class T, class U>
void forward(Tensor& y, const Tensor& base, const Tensor& delta, double gate) {
  using Acc = Accumulator<T>;
  const T* const e = base.const_data_ptr<T>();
  const U* const d = delta.const_data_ptr<U>();
  T* const out = y.data_ptr<T>();
  const Lanes<Acc> g(static_cast<Acc>(gate));
  const bool stream = past_caches({y}, {base, delta});
  for_chunks(y.numel(), [&](int64_t begin, int64_t end) {
    const Output<T> to(out + begin, stream);
    for_lanes<Acc>(end - begin, [&](int64_t i, auto count) {
      const Lanes<Acc> base_lanes = load_lanes<Acc>(e + begin + i, count);
      store_lanes(fma(g, load_lanes<Acc>(d + begin + i, count) - base_lanes, base_lanes), to, i, count);
    });
  });
}

// The gradient of the gate is summed in each chunk, and over the chunks in their order: the same for every number of
// threads.
template <class T, class U>
double backward(
    Tensor& grad_base, Tensor& grad_delta, const Tensor& grad, const Tensor& base, const Tensor& delta, double gate) {
  using Acc = Accumulator<T>;
  const T* const dy = grad.const_data_ptr<T>();
  const T* const e = const_data_or_null<T>(base);
  const U* const d = const_data_or_null<U>(delta);
  T* const de = grad_base.data_ptr<T>();
  U* const dd = grad_delta.data_ptr<U>();
  const Acc gate_value = static_cast<Acc>(gate);
  const Lanes<Acc> g(gate_value), rest(Acc(1) - gate_value);
  const bool stream = past_caches({grad_base, grad_delta}, {grad, base, delta});
  std::vector<Acc> partials(e ? chunks_of(grad.numel()) : 0);
  for_chunks(grad.numel(), [&](int64_t begin, int64_t end) {
    const Output<T> to_base(de + begin, stream);
    const Output<U> to_delta(dd + begin, stream);
    Lanes<Acc> total(Acc(0));
    for_lanes<Acc>(end - begin, [&](int64_t i, auto count) {
      const Lanes<Acc> dy_lanes = load_lanes<Acc>(dy + begin + i, count);
      store_lanes(rest * dy_lanes, to_base, i, count);
      store_lanes(g * dy_lanes, to_delta, i, count);
      if (e) {
        total = fma(dy_lanes, load_lanes<Acc>(d + begin + i, count) - load_lanes<Acc>(e + begin + i, count), total);
      }
    });
    if (e) {
      partials[begin / CHUNK] = sum(total);
    }
  });
  double total = 0;
  for (const Acc partial : partials) {
    total += partial;
  }
  return total;
}

template <class F>
void with_dtypes(ScalarType base, ScalarType delta, F&& f) {
  with_dtype(base, [&]<class T>(T t) {
    with_dtype(delta, [&]<class U>(U u) {
      if constexpr (std::is_same_v<Accumulator<T>, Accumulator<U>>) { // as storage_dtype has it
        f(t, u);
      }
    });
  });
}

Tensor gate_blend(const Tensor& base, const Tensor& delta, const Tensor& gate) {
  const ScalarType accumulate = accumulation_dtype({base.scalar_type(), delta.scalar_type()});
  const ScalarType base_dtype = storage_dtype(base.scalar_type(), accumulate);
  const ScalarType delta_dtype = storage_dtype(delta.scalar_type(), accumulate);
  Tensor y = empty(base.sizes(), base_dtype, base);
  const Tensor e = ready(base, base_dtype), d = ready(delta, delta_dtype);
  with_dtypes(base_dtype, delta_dtype, [&]<class T, class U>(T, U) {
    forward<T, U>(y, e, d, gate.item<double>());
  });
  return cast(y, base.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> gate_blend_backward(
    const Tensor& grad, const Tensor& base, const Tensor& delta, const Tensor& gate, bool need_gate) {
  const ScalarType accumulate = accumulation_dtype({base.scalar_type(), delta.scalar_type()});
  const ScalarType base_dtype = storage_dtype(base.scalar_type(), accumulate);
  const ScalarType delta_dtype = storage_dtype(delta.scalar_type(), accumulate);
  Tensor grad_base = empty(base.sizes(), base_dtype, base);
  Tensor grad_delta = empty(delta.sizes(), delta_dtype, delta);
  const Tensor dy = ready(grad, base_dtype);
  const Tensor e = need_gate ? ready(base, base_dtype) : Tensor();
  const Tensor d = need_gate ? ready(delta, delta_dtype) : Tensor();
  double grad_gate = 0;
  with_dtypes(base_dtype, delta_dtype, [&]<class T, class U>(T, U) {
    grad_gate = backward<T, U>(grad_base, grad_delta, dy, e, d, gate.item<double>());
  });
  return {
      cast(grad_base, base.scalar_type()),
      cast(grad_delta, delta.scalar_type()),
      at::full(gate.sizes(), grad_gate, gate.options())};
}

} // namespace

TORCH_LIBRARY_IMPL(anyflow_kernels, CPU, m) {
  m.impl("gate_blend", &gate_blend);
  m.impl("gate_blend_backward", &gate_blend_backward);
}

} // namespace anyflow
