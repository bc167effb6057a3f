// torch.ops.monet on a GPU: the dense products go to the framework (cuBLAS), what lies between them to the kernels of
// csrc/cuda. Device and stream are reached through the framework's interface for all devices, so that this file compiles
// against a framework without CUDA; the tests run it on the CPU, with the kernels emulated.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <torch/library.h>

#include <vector>

#include "../cuda/experts.h"
#include "../cuda/route.h"
#include "tensors.h"

#ifndef MONET_CUDA_DEVICE
#define MONET_CUDA_DEVICE CUDA
#endif

namespace monet {
namespace {

using cuda::Dense;

// Makes the device of a tensor current, and knows the stream that work on it goes to.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.device()) {
    if (tensor.is_cuda())
      stream_ = c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
  }
  cuda::Stream stream() const { return stream_; }

 private:
  c10::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

// A matrix whose rows have `parts` times the units of all half-experts.
template <class S>
Dense<S> dense(Tensor& tensor, int parts) {
  return {write<S>(tensor), parts};
}
template <class S>
Dense<const S> dense(const Tensor& tensor, int parts) {
  return {read<S>(tensor), parts};
}

// ---- the router

Tensor head_moments(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 3, "logits must be [tokens, heads, half-experts]");
  const OnDevice device(logits);
  const Tensor z = logits.contiguous();
  const auto doubles = z.options().dtype(at::kDouble);
  Tensor sums = at::empty({2, z.size(1)}, doubles);
  Tensor partial = at::empty({cuda::moment_chunks(z.size(0)), 2, z.size(1)}, doubles);
  with_wide_type(z, [&](auto zero) {
    using T = decltype(zero);
    cuda::head_moments(
        device.stream(), read<T>(z), z.size(0), z.size(1), z.size(2), write<double>(partial), write<double>(sums));
  });
  return sums;
}

GatesAndLayout route(const Tensor& logits, const Tensor& threshold) {
  check_route(logits, threshold);
  const OnDevice device(logits);
  const Tensor z = logits.contiguous(), cut = threshold.contiguous();
  const int64_t tokens = z.size(0), heads = z.size(1), experts = z.size(2);
  const auto ints = z.options().dtype(at::kInt);
  Tensor active = at::empty({tokens, cuda::mark_words(experts)}, ints);
  Tensor largest = at::empty({tokens, heads}, z.options()), cuts = at::empty_like(largest);
  Tensor row_start = at::empty({tokens + 1}, ints);
  Tensor group_start = at::empty({blocks_of(tokens) * experts + 1}, ints);
  return with_wide_type(z, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Marks<T> marks{write<uint32_t>(active), write<T>(largest), write<T>(cuts)};
    cuda::mark_active(
        device.stream(), read<T>(z), read<T>(cut), tokens, heads, experts, marks, write<int32_t>(row_start));
    // The one wait for the device: nothing can be allocated before the number of pairs is known.
    const int64_t count = row_start.select(0, tokens).item<int32_t>();
    Tensor token = at::empty({count}, ints), row_pair = at::empty({count}, ints);
    Tensor gates = at::empty({count, heads}, z.options());
    cuda::place_pairs(
        device.stream(), marks.active, tokens, experts, read<int32_t>(row_start), write<int32_t>(token),
        write<int32_t>(group_start), write<int32_t>(row_pair));
    const Pairs pairs = pairs_of(z, {token, group_start, row_start, row_pair}, experts);
    cuda::active_softmax(device.stream(), read<T>(z), marks, pairs, heads, write<T>(gates));
    return std::make_tuple(gates, token, group_start, row_start, row_pair);
  });
}

// Gradients of the logits, [tokens, heads, experts]: 0 where a gate is 0.
Tensor route_backward(const Tensor& dgates, const Tensor& gates, Layout layout, int64_t experts) {
  const OnDevice device(gates);
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs), dgiven = values_of(dgates, pairs);
  Tensor by_pair = at::empty_like(given);
  Tensor dlogits = at::empty({pairs.tokens, given.size(1), experts}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::active_softmax_backward(
        device.stream(), read<T>(given), read<T>(dgiven), pairs, given.size(1), write<T>(by_pair));
    cuda::scatter_dense(device.stream(), read<T>(by_pair), pairs, given.size(1), write<T>(dlogits));
  });
  return dlogits;
}

Tensor dense_gates(const Tensor& values, Layout layout, int64_t experts) {
  const OnDevice device(values);
  const Pairs pairs = pairs_of(values, layout, experts);
  const Tensor given = values_of(values, pairs);
  Tensor all = at::empty({pairs.tokens, given.size(1), experts}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::scatter_dense(device.stream(), read<T>(given), pairs, given.size(1), write<T>(all));
  });
  return all;
}

Tensor dense_gates_backward(const Tensor& ddense, const Tensor& gates, Layout layout, int64_t experts) {
  const OnDevice device(gates);
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = ddense.contiguous();
  Tensor dgates = at::empty_like(values_of(gates, pairs));
  check_dense(given, gates, pairs);
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::gather_dense(device.stream(), read<T>(given), pairs, given.size(1), write<T>(dgates));
  });
  return dgates;
}

Tensor sum_over_tokens(const Tensor& gates, Layout layout, int64_t experts) {
  const OnDevice device(gates);
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs);
  Tensor totals = at::empty({given.size(1), experts}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::sum_over_tokens(device.stream(), read<T>(given), pairs, given.size(1), write<T>(totals));
  });
  return totals;
}

Tensor sum_over_tokens_backward(const Tensor& dtotals, const Tensor& gates, Layout layout, int64_t experts) {
  const OnDevice device(gates);
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = dtotals.contiguous();
  Tensor dgates = at::empty_like(values_of(gates, pairs));
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::sum_over_tokens_backward(device.stream(), read<T>(given), pairs, given.size(0), write<T>(dgates));
  });
  return dgates;
}

Tensor sum_of_largest(const Tensor& gates, Layout layout, int64_t experts) {
  const OnDevice device(gates);
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs);
  Tensor totals = at::empty({given.size(1)}, given.options());
  Tensor largest = at::empty({pairs.tokens, given.size(1)}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::sum_of_largest(device.stream(), read<T>(given), pairs, given.size(1), write<T>(largest), write<T>(totals));
  });
  return totals;
}

Tensor sum_of_largest_backward(const Tensor& dtotals, const Tensor& gates, Layout layout, int64_t experts) {
  const OnDevice device(gates);
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs), dgiven = dtotals.contiguous();
  Tensor dgates = at::empty_like(given);
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cuda::sum_of_largest_backward(
        device.stream(), read<T>(given), read<T>(dgiven), pairs, given.size(1), write<T>(dgates));
  });
  return dgates;
}

// The dense products, though only active logits have a gradient: gathering the rows of these costs more.
TwoTensors router_logits_backward(const Tensor& dlogits, const Tensor& x, const Tensor& weight) {
  const Tensor dz = dlogits.flatten(1);
  check_router_gradient(dz, x, weight);
  const Tensor rounded = dz.to(x.scalar_type());
  return {at::mm(rounded, weight), at::mm(rounded.t(), x)};
}

// ---- the expert layers

// Whether the kernels for few tokens serve: the rows of half-experts that they read lie in memory only where output
// weights are stored by columns. Others go through the dense products.
bool few_tokens(const Tensor& x, TensorList output_weights) {
  if (x.size(0) >= cuda::kFewTokens) return false;
  for (const Tensor& v : output_weights)
    if (!v.t().is_contiguous()) return false;
  return true;
}

// The gradient of a bias from gradients by pair.
Tensor bias_gradient(const Tensor& ds, Layout layout, const Tensor& bias, int64_t units) {
  const Tensor sums = sum_over_tokens(ds, layout, bias.size(0) / units);
  return sums.t().reshape(-1).to(bias.scalar_type());
}

// The gradient of the linear map y = x w^T with respect to w, stored as w is.
Tensor weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& w) {
  Tensor dw = empty_gradient(w);
  at::mm_out(dw, dy.t(), x);
  return dw;
}

std::vector<Tensor> vertical_experts(
    const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList w) {
  const OnDevice device(tokens);
  const Tensor x = tokens.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const int64_t units = check_vertical(x, w, experts), half = x.size(1) / 2;
  const Tensor u1 = w[0].contiguous(), bias1 = w[1].contiguous(), u2 = w[2].contiguous(), bias2 = w[3].contiguous();
  Tensor out = at::empty_like(x), left = out.narrow(1, 0, half), right = out.narrow(1, half, half);
  Tensor s1 = one.by_pair(units), s2 = two.by_pair(units);
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    if (few_tokens(x, w.slice(4))) {
      Tensor own1 = at::empty_like(s1), cross1 = at::empty_like(s1);
      Tensor own2 = at::empty_like(s2), cross2 = at::empty_like(s2);
      cuda::project<S>(
          device.stream(), one.pairs, units, x.size(1), read<S>(x), read<S>(u1), read<S>(bias1), write<C>(s1));
      cuda::project<S>(
          device.stream(), two.pairs, units, x.size(1), read<S>(x), read<S>(u2), read<S>(bias2), write<C>(s2));
      cuda::mix_vertical_by_pair<C>(
          device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), units, write<C>(s1), write<C>(s2),
          {write<C>(own1), write<C>(cross1), write<C>(own2), write<C>(cross2)});
      cuda::combine<S>(
          device.stream(), one.pairs, units, half, {read<C>(own1), read<S>(w[4])}, {read<C>(cross1), read<S>(w[5])},
          write<S>(left), x.size(1));
      cuda::combine<S>(
          device.stream(), two.pairs, units, half, {read<C>(cross2), read<S>(w[6])}, {read<C>(own2), read<S>(w[7])},
          write<S>(right), x.size(1));
      return;
    }
    const Tensor product1 = at::mm(x, u1.t()), product2 = at::mm(x, u2.t());
    Tensor mix1 = at::empty({x.size(0), 2 * u1.size(0)}, x.options()), mix2 = at::empty_like(mix1);
    cuda::mix_vertical<S>(
        device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), units, {read<S>(product1), read<S>(bias1)},
        {read<S>(product2), read<S>(bias2)}, write<C>(s1), write<C>(s2), dense<S>(mix1, 2), dense<S>(mix2, 2));
    at::mm_out(left, mix1, at::cat({w[4], w[5]}, 1).t());
    at::mm_out(right, mix2, at::cat({w[7], w[6]}, 1).t());
  });
  return {out, s1, s2};
}

std::vector<Tensor> vertical_experts_backward(
    const Tensor& dout, const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const OptionalTensor& mask, TensorList w, TensorList kept) {
  const Tensor &s1 = kept[0], &s2 = kept[1];
  const OnDevice device(tokens);
  const Tensor x = tokens.contiguous(), d = dout.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const int64_t units = check_vertical(x, w, experts), half = x.size(1) / 2, inner = units * experts;
  const Tensor left = d.narrow(1, 0, half), right = d.narrow(1, half, half);
  const Tensor dmix1 = at::mm(left, at::cat({w[4], w[5]}, 1)), dmix2 = at::mm(right, at::cat({w[7], w[6]}, 1));
  Tensor mix1 = at::empty_like(dmix1), mix2 = at::empty_like(dmix2), ds = at::empty_like(dmix1);
  Tensor ds1 = at::empty_like(s1), ds2 = at::empty_like(s2);
  Tensor dgates1 = at::empty_like(one.gates), dgates2 = at::empty_like(two.gates);
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    cuda::mix_vertical_backward<S>(
        device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), units,
        {.s1 = read<C>(s1), .s2 = read<C>(s2), .dmix1 = dense<S>(dmix1, 2), .dmix2 = dense<S>(dmix2, 2),
         .mix1 = dense<S>(mix1, 2), .mix2 = dense<S>(mix2, 2), .ds = dense<S>(ds, 2), .ds1 = write<C>(ds1),
         .ds2 = write<C>(ds2), .dgates1 = write<C>(dgates1), .dgates2 = write<C>(dgates2)});
  });
  const auto part = [&](const Tensor& parts, int64_t index) { return parts.narrow(1, index * inner, inner); };
  return {
      at::mm(ds, at::cat({w[0], w[2]}, 0)), dgates1, dgates2,
      weight_gradient(part(ds, 0), x, w[0]), bias_gradient(ds1, layout1, w[1], units),
      weight_gradient(part(ds, 1), x, w[2]), bias_gradient(ds2, layout2, w[3], units),
      weight_gradient(left, part(mix1, 0), w[4]), weight_gradient(left, part(mix1, 1), w[5]),
      weight_gradient(right, part(mix2, 1), w[6]), weight_gradient(right, part(mix2, 0), w[7])};
}

std::vector<Tensor> horizontal_experts(
    const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList w) {
  const OnDevice device(tokens);
  const Tensor x = tokens.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const int64_t units = check_horizontal(x, w, experts), d = x.size(1);
  const Tensor u = w[0].contiguous(), bias = w[1].contiguous();
  Tensor out = at::empty_like(x), s1 = one.by_pair(units);
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    if (few_tokens(x, w.slice(2))) {
      Tensor y = two.by_pair(units);
      cuda::project<S>(device.stream(), one.pairs, units, d, read<S>(x), read<S>(u), read<S>(bias), write<C>(s1));
      cuda::mix_horizontal_by_pair<C>(
          device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), units, write<C>(s1), write<C>(y));
      cuda::combine<S>(device.stream(), two.pairs, units, d, {read<C>(y), read<S>(w[2])}, {}, write<S>(out), d);
      return;
    }
    const Tensor product = at::mm(x, u.t());
    Tensor y = at::empty_like(product);
    cuda::mix_horizontal<S>(
        device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), units, {read<S>(product), read<S>(bias)}, write<C>(s1),
        dense<S>(y, 1));
    at::mm_out(out, y, w[2].t());
  });
  return {out, s1};
}

std::vector<Tensor> horizontal_experts_backward(
    const Tensor& dout, const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const OptionalTensor& mask, TensorList w, TensorList kept) {
  const Tensor& s1 = kept[0];
  const OnDevice device(tokens);
  const Tensor x = tokens.contiguous(), d = dout.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const int64_t units = check_horizontal(x, w, experts);
  const Tensor dy = at::mm(d, w[2]);
  Tensor y = at::empty_like(dy), ds = at::empty_like(dy), ds1 = at::empty_like(s1);
  Tensor dgates1 = at::empty_like(one.gates), dgates2 = at::empty_like(two.gates);
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    cuda::mix_horizontal_backward<S>(
        device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), units,
        {.s1 = read<C>(s1), .dy = dense<S>(dy, 1), .y = dense<S>(y, 1), .ds = dense<S>(ds, 1), .ds1 = write<C>(ds1),
         .dgates1 = write<C>(dgates1), .dgates2 = write<C>(dgates2)});
  });
  return {
      at::mm(ds, w[0]), dgates1, dgates2, weight_gradient(ds, x, w[0]), bias_gradient(ds1, layout1, w[1], units),
      weight_gradient(d, y, w[2])};
}

TwoTensors expert_weights(
    const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts, const Tensor& mask) {
  const OnDevice device(gates1);
  const SideTensors one(gates1, layout1, experts), two(gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  Tensor totals1 = at::empty({one.pairs.count}, one.gates.options());
  Tensor totals2 = at::empty({two.pairs.count}, two.gates.options());
  with_wide_type(one.gates, [&](auto zero) {
    using C = decltype(zero);
    cuda::masked_totals<C>(
        device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), write<C>(totals1), write<C>(totals2));
  });
  return {totals1, totals2};
}

TwoTensors expert_weights_backward(
    const Tensor& dtotals1, const Tensor& dtotals2, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const Tensor& mask) {
  const OnDevice device(gates1);
  const SideTensors one(gates1, layout1, experts), two(gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const Tensor d1 = dtotals1.contiguous(), d2 = dtotals2.contiguous();
  check_totals(d1, d2, one, two);
  Tensor dgates1 = at::empty_like(one.gates), dgates2 = at::empty_like(two.gates);
  with_wide_type(one.gates, [&](auto zero) {
    using C = decltype(zero);
    cuda::masked_totals_backward<C>(
        device.stream(), one.side<C>(), two.side<C>(), m.mask<C>(), read<C>(d1), read<C>(d2), write<C>(dgates1),
        write<C>(dgates2));
  });
  return {dgates1, dgates2};
}

// b [experts, width] is the output layer of half-experts with one unit, whose value is the sum of a pair's gates. For
// many tokens a dense product over all half-experts reads b once for all of them.
Tensor expert_bias(const Tensor& gates, Layout layout, const Tensor& b) {
  const OnDevice device(gates);
  const Tensor rows = b.contiguous();
  const int64_t tokens = layout[2].numel() - 1, experts = b.size(0), width = b.size(1);
  Tensor out = at::empty({tokens, width}, b.options());
  const SideTensors side(out, gates, layout, experts);
  with_type(b, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    if (tokens < cuda::kFewTokens) {
      Tensor totals = side.by_pair(1);
      cuda::gate_totals_by_pair<C>(device.stream(), side.side<C>(), write<C>(totals));
      cuda::combine<S>(
          device.stream(), side.pairs, 1, width, {read<C>(totals), read<S>(rows)}, {}, write<S>(out), width);
      return;
    }
    Tensor totals = at::empty({tokens, experts}, b.options());
    cuda::gate_totals<S>(device.stream(), side.side<C>(), dense<S>(totals, 1));
    at::mm_out(out, totals, rows);
  });
  return out;
}

TwoTensors expert_bias_backward(
    const Tensor& dout, const Tensor& gates, Layout layout, const Tensor& b) {
  const OnDevice device(gates);
  const Tensor d = dout.contiguous();
  const SideTensors side(d, gates, layout, b.size(0));
  const Tensor dtotals = at::mm(d, b.t());
  Tensor totals = at::empty_like(dtotals), dgates = at::empty_like(side.gates);
  with_type(b, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    cuda::gate_totals<S>(device.stream(), side.side<C>(), dense<S>(totals, 1));
    cuda::gate_totals_backward<S>(device.stream(), side.side<C>(), dense<S>(dtotals, 1), write<C>(dgates));
  });
  return {dgates, weight_gradient(totals, d, b)};
}

}  // namespace
}  // namespace monet

TORCH_LIBRARY_IMPL(MONET_LIBRARY, MONET_CUDA_DEVICE, m) {
#include "operations.inl"
}
