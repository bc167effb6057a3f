// Tensors checked and taken apart for kernels that know no framework.
#pragma once

#include <ATen/ATen.h>

#include <limits>

#include "../experts.h"
#include "operations.h"

namespace monet {

// ---- tensors to pointers

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of a matrix whose rows are contiguous, from a column on.
template <class S>
Rows<const S> read_rows(const Tensor& matrix, int64_t column = 0) {
  return {read<S>(matrix) + column, matrix.stride(0)};
}
template <class S>
Rows<S> write_rows(const Tensor& matrix, int64_t column = 0) {
  return {write<S>(matrix) + column, matrix.stride(0)};
}

// f(zero of the tensor's number type).
template <class F>
auto with_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(BFloat16{});
    case at::kDouble: return f(double{});
    default: TORCH_CHECK(false, "the expert kernels take fp32, bf16 or fp64, not ", tensor.scalar_type());
  }
}
template <class F>
auto with_wide_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    default: TORCH_CHECK(false, "the router kernels take fp32 or fp64, not ", tensor.scalar_type());
  }
}

// The type of sums over values of `tensor`, and of the gates that go with it.
inline at::ScalarType accumulator(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- checks

// Pointers of another device must not reach a kernel.
inline void check_device(const Tensor& like, const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device() == like.device(), name, " is on ", tensor.device(), ", other tensors on ", like.device());
}

inline void check_matrix(const Tensor& like, const Tensor& weight, int64_t rows, int64_t columns, const char* name) {
  TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, name, " must be [", rows, ", ", columns,
      "], not ", weight.sizes());
  TORCH_CHECK(
      weight.scalar_type() == like.scalar_type(), name, " is ", weight.scalar_type(), " and the tokens are ",
      like.scalar_type());
  check_device(like, weight, name);
}

// A gradient that goes with gates: contiguous, of this shape, in the type of the gates.
inline Tensor gradient(const Tensor& like, const Tensor& given, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(given.sizes() == shape, name, " must be ", shape, ", not ", given.sizes());
  TORCH_CHECK(given.scalar_type() == like.scalar_type(), name, " must be in the type of the gates");
  check_device(like, given, name);
  return given.contiguous();
}

// ---- gates

// The pairs that values or gates on the device of `like` belong to.
inline Pairs pairs_of(const Tensor& like, Layout layout, int64_t experts) {
  TORCH_CHECK(layout.size() == 4, "a layout has 4 tensors, not ", layout.size());
  for (const Tensor& index : layout) {
    TORCH_CHECK(index.scalar_type() == at::kInt && index.is_contiguous(), "a layout is of contiguous int32 tensors");
    check_device(like, index, "a layout");
  }
  const Pairs pairs{
      .tokens = layout[2].numel() - 1,
      .experts = experts,
      .count = layout[0].numel(),
      .token = read<int32_t>(layout[0]),
      .group_start = read<int32_t>(layout[1]),
      .row_start = read<int32_t>(layout[2]),
      .row_pair = read<int32_t>(layout[3])};
  TORCH_CHECK(layout[1].numel() == pairs.blocks() * experts + 1, "the layout is not of ", experts, " half-experts");
  return pairs;
}

// Gates of one side, with the pairs that they belong to.
struct SideTensors {
  SideTensors(const Tensor& given, Layout layout, int64_t experts) : pairs(pairs_of(given, layout, experts)) {
    TORCH_CHECK(given.dim() == 2 && given.size(0) == pairs.count, "values must be [", pairs.count, " pairs, heads]");
    gates = given.contiguous();
  }
  // Beside tokens: of as many, and in the type of sums over them.
  SideTensors(const Tensor& x, const Tensor& given, Layout layout, int64_t experts)
      : SideTensors(given, layout, experts) {
    TORCH_CHECK(pairs.tokens == x.size(0), "gates of ", pairs.tokens, " tokens for ", x.size(0));
    TORCH_CHECK(gates.scalar_type() == accumulator(x), "gates must be in the type of sums");
    check_device(x, gates, "a gate");
  }

  template <class C>
  Side<C> side() const {
    return {pairs, read<C>(gates), heads()};
  }
  int64_t heads() const { return gates.size(1); }
  // For values of this side.
  Tensor by_pair(int64_t units) const { return at::empty({pairs.count, units}, gates.options()); }
  Tensor dense() const { return at::empty({pairs.tokens, heads(), pairs.experts}, gates.options()); }
  Tensor by_half_expert() const { return at::empty({heads(), pairs.experts}, gates.options()); }

  Pairs pairs;
  Tensor gates;
};

// Gates of both sides, and the factors of the experts: [1 or heads, experts, experts] in the type of sums, or none.
struct RoutingTensors {
  RoutingTensors(const SideTensors& side1, const SideTensors& side2, const OptionalTensor& mask)
      : one(side1), two(side2) {
    TORCH_CHECK(one.heads() == two.heads(), "the two sides have different numbers of heads");
    if (!mask) return;
    const int64_t heads = one.heads(), experts = one.pairs.experts;
    TORCH_CHECK(
        mask->dim() == 3 && (mask->size(0) == 1 || mask->size(0) == heads) && mask->size(1) == experts &&
            mask->size(2) == experts,
        "mask must be [1 or ", heads, ", ", experts, ", ", experts, "], not ", mask->sizes());
    TORCH_CHECK(mask->scalar_type() == one.gates.scalar_type(), "mask must be in the type of sums");
    check_device(one.gates, *mask, "mask");
    factors = mask->contiguous();
  }

  template <class C>
  Routing<C> routing() const {
    return {one.side<C>(), two.side<C>(), mask<C>()};
  }
  template <class C>
  Mask<C> mask() const {
    if (!factors.defined()) return {nullptr, 0};
    return {read<C>(factors), factors.size(0) == 1 ? 0 : factors.stride(0)};
  }

  SideTensors one, two;
  Tensor factors;
};

// ---- the expert layers

// An expert layer: tokens [tokens, d], their routing, and weights whose shapes fit.
struct Layer {
  int64_t experts() const { return routing.one.pairs.experts; }
  int64_t width() const { return x.size(1); }

  Tensor x;
  RoutingTensors routing;
  TensorList weights;
  int64_t units;  // of a half-expert
};

// The weights by number.
enum Vertical : size_t { kU1, kU1Bias, kU2, kU2Bias, kV11, kV12, kV21, kV22, kVerticalWeights };
enum Horizontal : size_t { kU, kUBias, kV, kHorizontalWeights };

inline Layer vertical_layer(
    const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList w) {
  const Tensor x = tokens.contiguous();
  TORCH_CHECK(w.size() == kVerticalWeights, "a vertical layer has 8 weights");
  const int64_t d = x.size(1), inner = w[kU1].size(0);
  TORCH_CHECK(d % 2 == 0 && inner % experts == 0, "sizes do not fit: d ", d, ", ", inner, " units, ", experts);
  check_matrix(x, w[kU1], inner, d, "u1");
  check_matrix(x, w[kU2], inner, d, "u2");
  check_matrix(x, w[kU1Bias].unsqueeze(0), 1, inner, "u1's bias");
  check_matrix(x, w[kU2Bias].unsqueeze(0), 1, inner, "u2's bias");
  for (const Tensor& v : w.slice(kV11)) check_matrix(x, v, d / 2, inner, "v");
  return {x, {{x, gates1, layout1, experts}, {x, gates2, layout2, experts}, mask}, w, inner / experts};
}

inline Layer horizontal_layer(
    const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList w) {
  const Tensor x = tokens.contiguous();
  TORCH_CHECK(w.size() == kHorizontalWeights, "a horizontal layer has 3 weights");
  const int64_t d = x.size(1), inner = w[kU].size(0);
  TORCH_CHECK(inner % experts == 0, "sizes do not fit: ", inner, " units of ", experts, " half-experts");
  check_matrix(x, w[kU], inner, d, "u");
  check_matrix(x, w[kUBias].unsqueeze(0), 1, inner, "u's bias");
  check_matrix(x, w[kV], d, inner, "v");
  return {x, {{x, gates1, layout1, experts}, {x, gates2, layout2, experts}, mask}, w, inner / experts};
}

// What the backward pass of a layer takes beside its inputs: the gradient of its output, which is returned
// contiguous, and pre-activations by pair of these sides.
inline Tensor check_backward(
    const Layer& layer, const Tensor& dout, TensorList kept, std::initializer_list<const SideTensors*> sides) {
  check_matrix(layer.x, dout, layer.x.size(0), layer.width(), "a gradient");
  TORCH_CHECK(kept.size() == sides.size(), "the backward pass takes ", sides.size(), " tensors of the forward pass");
  size_t index = 0;
  for (const SideTensors* side : sides) {
    const Tensor& s = kept[index++];
    TORCH_CHECK(
        s.dim() == 2 && s.size(0) == side->pairs.count && s.size(1) == layer.units && s.is_contiguous() &&
            s.scalar_type() == side->gates.scalar_type(),
        "pre-activations must be [pairs, units], in the type of sums");
    check_device(layer.x, s, "a pre-activation");
  }
  return dout.contiguous();
}

// Gates that meet an output bias: in the type of sums over its rows.
inline void check_bias(const SideTensors& side, const Tensor& like) {
  TORCH_CHECK(side.gates.scalar_type() == accumulator(like), "gates must be in the type of sums");
  check_device(like, side.gates, "a gate");
}

// For the gradient of a weight, stored by columns if the weight is.
inline Tensor empty_gradient(const Tensor& weight) {
  if (weight.is_contiguous() || !weight.t().is_contiguous()) return at::empty(weight.sizes(), weight.options());
  return at::empty({weight.size(1), weight.size(0)}, weight.options()).t();
}

// Gradients of what a layer takes, not yet filled. Output weights begin with number first_output.
struct LayerGradients {
  LayerGradients(const Layer& layer, size_t first_output)
      : x(at::empty_like(layer.x)), gates1(at::empty_like(layer.routing.one.gates)),
        gates2(at::empty_like(layer.routing.two.gates)) {
    for (const Tensor& weight : layer.weights) {
      const bool output = weights.size() >= first_output;
      weights.push_back(output ? empty_gradient(weight) : at::empty(weight.sizes(), weight.options()));
    }
  }
  std::vector<Tensor> list() const {
    std::vector<Tensor> all{x, gates1, gates2};
    all.insert(all.end(), weights.begin(), weights.end());
    return all;
  }

  Tensor x, gates1, gates2;
  std::vector<Tensor> weights;
};

}  // namespace monet
