// The operations of schema.cpp as far as devices agree: checks, shapes, what is allocated. A device is a class with
//
//   Device(const Tensor& tensor)     makes the tensor's device current while it lives
//   run(const P& p)                  the kernel whose parameters are a P (../router.h, ../experts.h)
//   Word, moment_chunks(tokens)      what the router's kernels count in
//   read_back(int32 tensor, index)   a number that decides what is allocated
//
// and what devices do in ways of their own: the products of the router's gradient, of the expert layers and of the
// bias.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "tensors.h"

namespace monet {

// ---- the router

template <class Device>
Tensor router_logits(const Tensor& x, const Tensor& weight, int64_t heads) {
  const Device device(x);
  const Tensor z = at::linear(x, weight).unflatten(-1, {heads, -1});
  return z.scalar_type() == at::kDouble ? z : z.to(at::kFloat);
}

template <class Device>
TwoTensors router_logits_backward(const Tensor& dlogits, const Tensor& tokens, const Tensor& given) {
  const Device device(tokens);
  const Tensor dz = dlogits.flatten(1).contiguous(), x = tokens.contiguous(), weight = given.contiguous();
  check_matrix(x, weight, dz.size(1), x.size(1), "weight");
  TORCH_CHECK(dz.size(0) == x.size(0), "gradients of ", dz.size(0), " tokens for ", x.size(0));
  TORCH_CHECK(dz.scalar_type() == accumulator(x), "gradients of logits must be in the type of sums");
  check_device(x, dz, "a gradient of logits");
  return device.router_logits_backward(dz, x, weight);
}

// The dense products of the gradient.
inline TwoTensors dense_router_logits_backward(const Tensor& dz, const Tensor& x, const Tensor& weight) {
  const Tensor rounded = dz.to(x.scalar_type());
  return {at::mm(rounded, weight), at::mm(rounded.t(), x)};
}

template <class T>
Logits<T> logits_of(const Tensor& z) {
  return {read<T>(z), z.size(0), z.size(1), z.size(2)};
}

template <class Device>
Tensor head_moments(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 3, "logits must be [tokens, heads, half-experts]");
  const Device device(logits);
  const Tensor z = logits.contiguous();
  const auto doubles = z.options().dtype(at::kDouble);
  const Tensor sums = at::empty({2, z.size(1)}, doubles);
  const Tensor workspace = at::empty({Device::moment_chunks(z.size(0)), 2, z.size(1)}, doubles);
  with_wide_type(z, [&](auto zero) {
    using T = decltype(zero);
    device.run(HeadMoments<T>{logits_of<T>(z), write<double>(workspace), write<double>(sums)});
  });
  return sums;
}

template <class Device>
GatesAndLayout route(const Tensor& logits, const Tensor& threshold) {
  using Word = typename Device::Word;
  TORCH_CHECK(logits.dim() == 3 && logits.size(2) > 0, "logits must be [tokens, heads, half-experts]");
  TORCH_CHECK(
      threshold.dim() == 1 && threshold.size(0) == logits.size(1) && threshold.scalar_type() == logits.scalar_type(),
      "threshold must be [heads], in the type of the logits");
  check_device(logits, threshold, "threshold");
  const int64_t tokens = logits.size(0), heads = logits.size(1), experts = logits.size(2);
  TORCH_CHECK(
      tokens <= std::numeric_limits<int32_t>::max() / experts, tokens, " tokens are too many for one call; split them");
  const Device device(logits);
  const Tensor z = logits.contiguous(), cut = threshold.contiguous();
  const auto ints = z.options().dtype(at::kInt);
  const int64_t mark_bytes = words<Word>(experts) * static_cast<int64_t>(sizeof(Word));
  const Tensor active = at::empty({tokens, mark_bytes}, z.options().dtype(at::kByte));
  const Tensor largest = at::empty({tokens, heads}, z.options()), cuts = at::empty_like(largest);
  const Tensor row_start = at::empty({tokens + 1}, ints);
  const Tensor group_start = at::empty({blocks_of(tokens) * experts + 1}, ints);
  return with_wide_type(z, [&](auto zero) {
    using T = decltype(zero);
    const Logits<T> given = logits_of<T>(z);
    const Marks<T, Word> marks{write<Word>(active), write<T>(largest), write<T>(cuts)};
    device.run(MarkActive<T, Word>{given, read<T>(cut), marks, write<int32_t>(row_start)});
    const int64_t count = device.read_back(row_start, tokens);
    const Tensor token = at::empty({count}, ints), row_pair = at::empty({count}, ints);
    const Tensor gates = at::empty({count, heads}, z.options());
    device.run(PlacePairs<Word>{
        marks.active, tokens, experts, read<int32_t>(row_start), write<int32_t>(token), write<int32_t>(group_start),
        write<int32_t>(row_pair)});
    const Pairs pairs = pairs_of(z, {token, group_start, row_start, row_pair}, experts);
    device.run(ActiveSoftmax<T, Word>{given, marks, pairs, write<T>(gates)});
    return std::make_tuple(gates, token, group_start, row_start, row_pair);
  });
}

template <class Device>
Tensor route_backward(const Tensor& dgates, const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor given = gradient(gates, dgates, gates.sizes(), "a gradient of gates"), dlogits = side.dense();
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(ActiveSoftmaxBackward<T>{side.side<T>(), read<T>(given), write<T>(dlogits)});
  });
  return dlogits;
}

// ---- functions of the gates of one side

template <class Device>
Tensor dense_gates(const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor dense = side.dense();
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(DenseGates<T>{side.side<T>(), write<T>(dense)});
  });
  return dense;
}

template <class Device>
Tensor dense_gates_backward(const Tensor& ddense, const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor given = gradient(gates, ddense, {side.pairs.tokens, side.heads(), experts}, "a gradient of dense gates");
  const Tensor dgates = at::empty_like(side.gates);
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(DenseGatesBackward<T>{side.side<T>(), read<T>(given), write<T>(dgates)});
  });
  return dgates;
}

template <class Device>
Tensor sum_over_tokens(const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor totals = side.by_half_expert();
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(SumOverTokens<T>{side.side<T>(), write<T>(totals)});
  });
  return totals;
}

template <class Device>
Tensor sum_over_tokens_backward(const Tensor& dtotals, const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor given = gradient(gates, dtotals, {side.heads(), experts}, "a gradient of totals");
  const Tensor dgates = at::empty_like(side.gates);
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(SumOverTokensBackward<T>{side.side<T>(), read<T>(given), write<T>(dgates)});
  });
  return dgates;
}

template <class Device>
Tensor sum_of_largest(const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor totals = at::empty({side.heads()}, side.gates.options());
  const Tensor workspace = at::empty({side.pairs.tokens, side.heads()}, side.gates.options());
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(SumOfLargest<T>{side.side<T>(), write<T>(workspace), write<T>(totals)});
  });
  return totals;
}

template <class Device>
Tensor sum_of_largest_backward(const Tensor& dtotals, const Tensor& gates, Layout layout, int64_t experts) {
  const Device device(gates);
  const SideTensors side(gates, layout, experts);
  const Tensor given = gradient(gates, dtotals, {side.heads()}, "a gradient of totals");
  const Tensor dgates = at::empty_like(side.gates);
  with_wide_type(gates, [&](auto zero) {
    using T = decltype(zero);
    device.run(SumOfLargestBackward<T>{side.side<T>(), read<T>(given), write<T>(dgates)});
  });
  return dgates;
}

// ---- the expert layers

template <class Device>
std::vector<Tensor> vertical_experts(
    const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList weights) {
  const Device device(x);
  const Layer layer = vertical_layer(x, gates1, layout1, gates2, layout2, experts, mask, weights);
  const Tensor out = at::empty_like(layer.x);
  const Tensor s1 = layer.routing.one.by_pair(layer.units), s2 = layer.routing.two.by_pair(layer.units);
  with_type(x, [&](auto zero) { device.vertical(zero, layer, out, s1, s2); });
  return {out, s1, s2};
}

template <class Device>
std::vector<Tensor> vertical_experts_backward(
    const Tensor& dout, const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2,
    int64_t experts, const OptionalTensor& mask, TensorList weights, TensorList kept) {
  const Device device(x);
  const Layer layer = vertical_layer(x, gates1, layout1, gates2, layout2, experts, mask, weights);
  const Tensor d = check_backward(layer, dout, kept, {&layer.routing.one, &layer.routing.two});
  LayerGradients gradients(layer, kV11);
  with_type(x, [&](auto zero) { device.vertical_backward(zero, layer, d, kept[0], kept[1], gradients); });
  return gradients.list();
}

template <class Device>
std::vector<Tensor> horizontal_experts(
    const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList weights) {
  const Device device(x);
  const Layer layer = horizontal_layer(x, gates1, layout1, gates2, layout2, experts, mask, weights);
  const Tensor out = at::empty_like(layer.x), s1 = layer.routing.one.by_pair(layer.units);
  with_type(x, [&](auto zero) { device.horizontal(zero, layer, out, s1); });
  return {out, s1};
}

template <class Device>
std::vector<Tensor> horizontal_experts_backward(
    const Tensor& dout, const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2,
    int64_t experts, const OptionalTensor& mask, TensorList weights, TensorList kept) {
  const Device device(x);
  const Layer layer = horizontal_layer(x, gates1, layout1, gates2, layout2, experts, mask, weights);
  const Tensor d = check_backward(layer, dout, kept, {&layer.routing.one});
  LayerGradients gradients(layer, kV);
  with_type(x, [&](auto zero) { device.horizontal_backward(zero, layer, d, kept[0], gradients); });
  return gradients.list();
}

template <class Device>
TwoTensors expert_weights(
    const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts, const Tensor& mask) {
  const Device device(gates1);
  const RoutingTensors routing({gates1, layout1, experts}, {gates2, layout2, experts}, mask);
  const Tensor weights1 = at::empty({routing.one.pairs.count}, gates1.options());
  const Tensor weights2 = at::empty({routing.two.pairs.count}, gates2.options());
  with_wide_type(gates1, [&](auto zero) {
    using C = decltype(zero);
    device.run(ExpertWeights<C>{routing.routing<C>(), write<C>(weights1), write<C>(weights2)});
  });
  return {weights1, weights2};
}

template <class Device>
TwoTensors expert_weights_backward(
    const Tensor& dweights1, const Tensor& dweights2, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const Tensor& mask) {
  const Device device(gates1);
  const RoutingTensors routing({gates1, layout1, experts}, {gates2, layout2, experts}, mask);
  const Tensor d1 = gradient(gates1, dweights1, {routing.one.pairs.count}, "a gradient of weights");
  const Tensor d2 = gradient(gates2, dweights2, {routing.two.pairs.count}, "a gradient of weights");
  const Tensor dgates1 = at::empty_like(routing.one.gates), dgates2 = at::empty_like(routing.two.gates);
  with_wide_type(gates1, [&](auto zero) {
    using C = decltype(zero);
    device.run(ExpertWeightsBackward<C>{
        routing.routing<C>(), read<C>(d1), read<C>(d2), write<C>(dgates1), write<C>(dgates2)});
  });
  return {dgates1, dgates2};
}

// b [experts, width] is the output layer of half-experts with one unit, whose value is the sum of a pair's gates.
template <class Device>
Tensor expert_bias(const Tensor& gates, Layout layout, const Tensor& b) {
  const Device device(gates);
  const SideTensors side(gates, layout, b.size(0));
  const Tensor out = at::empty({side.pairs.tokens, b.size(1)}, b.options()), rows = b.contiguous();
  check_bias(side, out);
  with_type(b, [&](auto zero) { device.bias(zero, side, rows, out); });
  return out;
}

template <class Device>
TwoTensors expert_bias_backward(const Tensor& dout, const Tensor& gates, Layout layout, const Tensor& b) {
  const Device device(gates);
  const SideTensors side(gates, layout, b.size(0));
  const Tensor d = dout.contiguous(), rows = b.contiguous();
  check_matrix(rows, d, side.pairs.tokens, b.size(1), "a gradient");
  check_bias(side, d);
  const Tensor dgates = at::empty_like(side.gates), db = at::empty_like(rows);
  with_type(b, [&](auto zero) { device.bias_backward(zero, side, rows, d, dgates, db); });
  return {dgates, db};
}

// ---- registration

template <class Device>
void register_operations(torch::Library& m) {
  m.impl("router_logits", &router_logits<Device>);
  m.impl("router_logits_backward", &router_logits_backward<Device>);
  m.impl("head_moments", &head_moments<Device>);
  m.impl("route", &route<Device>);
  m.impl("route_backward", &route_backward<Device>);
  m.impl("dense_gates", &dense_gates<Device>);
  m.impl("dense_gates_backward", &dense_gates_backward<Device>);
  m.impl("sum_over_tokens", &sum_over_tokens<Device>);
  m.impl("sum_over_tokens_backward", &sum_over_tokens_backward<Device>);
  m.impl("sum_of_largest", &sum_of_largest<Device>);
  m.impl("sum_of_largest_backward", &sum_of_largest_backward<Device>);
  m.impl("vertical_experts", &vertical_experts<Device>);
  m.impl("vertical_experts_backward", &vertical_experts_backward<Device>);
  m.impl("horizontal_experts", &horizontal_experts<Device>);
  m.impl("horizontal_experts_backward", &horizontal_experts_backward<Device>);
  m.impl("expert_weights", &expert_weights<Device>);
  m.impl("expert_weights_backward", &expert_weights_backward<Device>);
  m.impl("expert_bias", &expert_bias<Device>);
  m.impl("expert_bias_backward", &expert_bias_backward<Device>);
}

}  // namespace monet
