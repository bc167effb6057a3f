// The operations by their C++ types: what schema.cpp names, every device implements and autograd.cpp calls.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

#include "library.h"

namespace monet {

using at::Tensor;
using at::TensorList;
// The index tensors of a Pairs: token, group_start, row_start, row_pair.
using Layout = TensorList;
using OptionalTensor = std::optional<Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using GatesAndLayout = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace type {

using router_logits = Tensor(const Tensor& x, const Tensor& weight, int64_t heads);
using router_logits_backward = TwoTensors(const Tensor& dlogits, const Tensor& x, const Tensor& weight);
using head_moments = Tensor(const Tensor& logits);
using route = GatesAndLayout(const Tensor& logits, const Tensor& threshold);
using route_backward = Tensor(const Tensor& dgates, const Tensor& gates, Layout layout, int64_t experts);

// A function of the gates of one side.
using of_gates = Tensor(const Tensor& gates, Layout layout, int64_t experts);
using of_gates_backward = Tensor(const Tensor& dout, const Tensor& gates, Layout layout, int64_t experts);

// An expert layer: its output, then what its backward pass takes of the forward pass.
using experts = std::vector<Tensor>(
    const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList weights);
// Gradients of x, the gates of both sides and the weights.
using experts_backward = std::vector<Tensor>(
    const Tensor& dout, const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2,
    int64_t experts, const OptionalTensor& mask, TensorList weights, TensorList kept);

using expert_weights = TwoTensors(
    const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts, const Tensor& mask);
using expert_weights_backward = TwoTensors(
    const Tensor& dweights1, const Tensor& dweights2, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const Tensor& mask);
using expert_bias = Tensor(const Tensor& gates, Layout layout, const Tensor& b);
using expert_bias_backward = TwoTensors(const Tensor& dout, const Tensor& gates, Layout layout, const Tensor& b);

}  // namespace type
}  // namespace monet
