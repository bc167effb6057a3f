// What the bindings of all devices share: tensors checked and taken apart for kernels that know no framework.
#pragma once

#include <ATen/ATen.h>

#include <limits>

#include "../numbers.h"
#include "../pairs.h"
#include "operations.h"

namespace monet {

// ---- tensors to pointers

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* write(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
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
inline at::TensorOptions accumulator(const Tensor& tensor) {
  return tensor.options().dtype(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Pointers of another device must not reach a kernel.
inline void check_device(const Tensor& like, const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device() == like.device(), name, " is on ", tensor.device(), ", other tensors on ", like.device());
}

// ---- gates

// The pairs that values or gates on the device of `like` belong to.
inline Pairs pairs_of(const Tensor& like, Layout layout, int64_t experts) {
  TORCH_CHECK(layout.size() == 4, "a layout has 4 tensors, not ", layout.size());
  for (const Tensor& part : layout) {
    TORCH_CHECK(part.scalar_type() == at::kInt && part.is_contiguous(), "a layout is of contiguous int32 tensors");
    check_device(like, part, "a layout");
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

// Values [pairs, heads] made contiguous.
inline Tensor values_of(const Tensor& values, const Pairs& pairs) {
  TORCH_CHECK(values.dim() == 2 && values.size(0) == pairs.count, "values must be [", pairs.count, " pairs, heads]");
  return values.contiguous();
}

// A dense tensor that goes with gates of so many pairs, [tokens, heads, experts].
inline void check_dense(const Tensor& dense, const Tensor& gates, const Pairs& pairs) {
  TORCH_CHECK(
      dense.dim() == 3 && dense.size(0) == pairs.tokens && dense.size(1) == gates.size(1) &&
          dense.size(2) == pairs.experts && dense.scalar_type() == gates.scalar_type(),
      "a dense gradient must be [tokens, heads, half-experts], in the type of the gates");
  check_device(gates, dense, "a dense gradient");
}

// ---- the router

inline Tensor router_logits(const Tensor& x, const Tensor& weight, int64_t heads) {
  const Tensor z = at::linear(x, weight).unflatten(-1, {heads, -1});
  return z.scalar_type() == at::kDouble ? z : z.to(at::kFloat);
}

inline void check_route(const Tensor& logits, const Tensor& threshold) {
  TORCH_CHECK(logits.dim() == 3 && logits.size(2) > 0, "logits must be [tokens, heads, half-experts]");
  TORCH_CHECK(
      threshold.dim() == 1 && threshold.size(0) == logits.size(1) && threshold.scalar_type() == logits.scalar_type(),
      "threshold must be [heads], in the type of the logits");
  check_device(logits, threshold, "threshold");
  TORCH_CHECK(
      logits.size(0) <= std::numeric_limits<int32_t>::max() / logits.size(2), logits.size(0),
      " tokens are too many for one call; split them");
}

// ---- the expert layers

inline void check_matrix(const Tensor& like, const Tensor& weight, int64_t rows, int64_t columns, const char* name) {
  TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, name, " must be [", rows, ", ", columns,
      "], not ", weight.sizes());
  TORCH_CHECK(
      weight.scalar_type() == like.scalar_type(), name, " is ", weight.scalar_type(), " and the tokens are ",
      like.scalar_type());
  check_device(like, weight, name);
}

// One side of an expert layer: its gates in the type of sums, and what a pair needs.
struct SideTensors {
  SideTensors(const Tensor& gates, Layout layout, int64_t experts)
      : pairs(pairs_of(gates, layout, experts)), gates(values_of(gates, pairs)) {}
  SideTensors(const Tensor& x, const Tensor& gates, Layout layout, int64_t experts)
      : SideTensors(gates, layout, experts) {
    TORCH_CHECK(pairs.tokens == x.size(0), "gates of ", pairs.tokens, " tokens for ", x.size(0));
    TORCH_CHECK(gates.scalar_type() == accumulator(x).dtype(), "gates must be in the type of sums");
    check_device(x, gates, "a gate");
  }

  template <class C>
  Side<C> side() const {
    return {pairs, read<C>(gates), gates.size(1)};
  }
  Tensor by_pair(int64_t units) const { return at::empty({pairs.count, units}, gates.options()); }

  Pairs pairs;
  Tensor gates;
};

// The factors of the experts, [1 or heads, experts, experts] in the type of sums.
struct MaskTensor {
  MaskTensor(const OptionalTensor& mask, const SideTensors& one, const SideTensors& two) {
    TORCH_CHECK(one.gates.size(1) == two.gates.size(1), "the two sides have different numbers of heads");
    if (!mask) return;
    const int64_t heads = one.gates.size(1), experts = one.pairs.experts;
    TORCH_CHECK(
        mask->dim() == 3 && (mask->size(0) == 1 || mask->size(0) == heads) && mask->size(1) == experts &&
            mask->size(2) == experts,
        "mask must be [1 or ", heads, ", ", experts, ", ", experts, "], not ", mask->sizes());
    TORCH_CHECK(mask->scalar_type() == one.gates.scalar_type(), "mask must be in the type of sums");
    check_device(one.gates, *mask, "mask");
    factors = mask->contiguous();
  }

  template <class C>
  Mask<C> mask() const {
    if (!factors.defined()) return {nullptr, 0};
    return {read<C>(factors), factors.size(0) == 1 ? 0 : factors.stride(0)};
  }

  Tensor factors;
};

inline void check_totals(
    const Tensor& totals1, const Tensor& totals2, const SideTensors& one, const SideTensors& two) {
  TORCH_CHECK(
      totals1.numel() == one.pairs.count && totals2.numel() == two.pairs.count, "gradients of totals must be [pairs]");
}

// The weights of a vertical layer: u1, its bias, u2, its bias, v11, v12, v21, v22. Units of a half-expert.
inline int64_t check_vertical(const Tensor& x, TensorList w, int64_t experts) {
  TORCH_CHECK(w.size() == 8, "a vertical layer has 8 weights");
  const int64_t d = x.size(1), inner = w[0].size(0);
  TORCH_CHECK(d % 2 == 0 && inner % experts == 0, "sizes do not fit: d ", d, ", ", inner, " units, ", experts);
  check_matrix(x, w[0], inner, d, "u1");
  check_matrix(x, w[2], inner, d, "u2");
  check_matrix(x, w[1].unsqueeze(0), 1, inner, "u1's bias");
  check_matrix(x, w[3].unsqueeze(0), 1, inner, "u2's bias");
  for (const Tensor& v : w.slice(4)) check_matrix(x, v, d / 2, inner, "v");
  return inner / experts;
}

// The weights of a horizontal layer: u, its bias, v. Units of a half-expert.
inline int64_t check_horizontal(const Tensor& x, TensorList w, int64_t experts) {
  TORCH_CHECK(w.size() == 3, "a horizontal layer has 3 weights");
  const int64_t d = x.size(1), inner = w[0].size(0);
  TORCH_CHECK(inner % experts == 0, "sizes do not fit: ", inner, " units of ", experts, " half-experts");
  check_matrix(x, w[0], inner, d, "u");
  check_matrix(x, w[1].unsqueeze(0), 1, inner, "u's bias");
  check_matrix(x, w[2], d, inner, "v");
  return inner / experts;
}

// What router_logits_backward takes: dlogits [tokens, rows], x [tokens, d], w [rows, d].
inline void check_router_gradient(const Tensor& dlogits, const Tensor& x, const Tensor& w) {
  check_matrix(x, w, dlogits.size(1), x.size(1), "weight");
  TORCH_CHECK(dlogits.size(0) == x.size(0), "gradients of ", dlogits.size(0), " tokens for ", x.size(0));
  TORCH_CHECK(dlogits.scalar_type() == accumulator(x).dtype(), "gradients of logits must be in the type of sums");
  check_device(x, dlogits, "a gradient of logits");
}

// Room for the gradient of a weight, stored by columns if the weight is.
inline Tensor empty_gradient(const Tensor& weight) {
  if (weight.is_contiguous() || !weight.t().is_contiguous()) return at::empty(weight.sizes(), weight.options());
  return at::empty({weight.size(1), weight.size(0)}, weight.options()).t();
}

}  // namespace monet
