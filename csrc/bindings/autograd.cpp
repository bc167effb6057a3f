// The gradients of the operations. The backward pass of an operation is an operation too: torch.compile and
// torch.export trace through this file and see one node for each. There are no second derivatives.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "operations.h"

namespace monet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr size_t kLayoutTensors = 4;

// ---- calls

template <size_t size>
struct Name {
  constexpr Name(const char (&from)[size]) { std::copy_n(from, size, text); }
  char text[size];
};

// An operation as the dispatcher finds it: what a device implements, or what stands for it while a program is traced.
template <Name name, class Type>
struct Operation;
template <Name name, class Result, class... Arguments>
struct Operation<name, Result(Arguments...)> {
  // In a forward pass: below autograd, which is here already.
  static Result forward(Arguments... arguments) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return find().call(std::forward<Arguments>(arguments)...);
  }
  // In a backward pass: through autograd, which refuses a second derivative where one is asked for.
  static Result backward(Arguments... arguments) { return find().call(std::forward<Arguments>(arguments)...); }

 private:
  static const c10::TypedOperatorHandle<Result(Arguments...)>& find() {
    static const auto found =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow((std::string(C10_STRINGIZE(MONET_LIBRARY) "::") + name.text).c_str(), "")
            .template typed<Result(Arguments...)>();
    return found;
  }
};

// Whether a gradient may be asked for. Where not, nothing is kept for it.
template <class... Tensors>
bool differentiable(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}
bool any_differentiable(TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return differentiable(tensor); });
}

// ---- what is kept for a backward pass

void keep(AutogradContext* ctx, std::initializer_list<TensorList> lists) {
  variable_list all;
  for (const TensorList list : lists) all.insert(all.end(), list.begin(), list.end());
  ctx->save_for_backward(std::move(all));
}

// Takes it apart, in the order in which it was kept.
class Kept {
 public:
  explicit Kept(AutogradContext* ctx) : tensors_(ctx->get_saved_variables()) {}

  const Tensor& tensor() { return tensors_[next_++]; }
  OptionalTensor optional() {
    const Tensor& found = tensor();
    return found.defined() ? OptionalTensor(found) : std::nullopt;
  }
  TensorList list(size_t count) {
    next_ += count;
    return TensorList(tensors_).slice(next_ - count, count);
  }
  Layout layout() { return list(kLayoutTensors); }
  TensorList rest() { return list(tensors_.size() - next_); }

 private:
  variable_list tensors_;
  size_t next_ = 0;
};

// Gradients in the places of an operation's inputs.
class Gradients {
 public:
  Gradients& of(const Tensor& gradient) {
    list_.push_back(gradient);
    return *this;
  }
  Gradients& of(TensorList gradients) {
    list_.insert(list_.end(), gradients.begin(), gradients.end());
    return *this;
  }
  Gradients& none(size_t inputs = 1) {
    list_.resize(list_.size() + inputs);
    return *this;
  }
  Gradients& none_of_layout() { return none(kLayoutTensors); }
  operator variable_list() { return std::move(list_); }

 private:
  variable_list list_;
};

// ---- the router

using LogitsForward = Operation<"router_logits", type::router_logits>;
using LogitsBackward = Operation<"router_logits_backward", type::router_logits_backward>;

struct Logits : Function<Logits> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, int64_t heads) {
    keep(ctx, {{x, weight}});
    return LogitsForward::forward(x, weight, heads);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    Kept kept(ctx);
    const Tensor &x = kept.tensor(), &weight = kept.tensor();
    const auto [dx, dweight] = LogitsBackward::backward(gradients[0], x, weight);
    return Gradients().of(dx).of(dweight).none();
  }
};

Tensor router_logits(const Tensor& x, const Tensor& weight, int64_t heads) {
  if (!differentiable(x, weight)) return LogitsForward::forward(x, weight, heads);
  return Logits::apply(x, weight, heads);
}

using RouteForward = Operation<"route", type::route>;
using RouteBackward = Operation<"route_backward", type::route_backward>;

struct Route : Function<Route> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& threshold) {
    const auto [gates, token, group_start, row_start, row_pair] = RouteForward::forward(logits, threshold);
    const variable_list outputs{gates, token, group_start, row_start, row_pair};
    keep(ctx, {outputs});
    ctx->saved_data["experts"] = logits.sym_size(2);
    ctx->set_materialize_grads(false);  // of a layout there are none
    return outputs;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return Gradients().none(2);
    Kept kept(ctx);
    const Tensor& gates = kept.tensor();
    const int64_t experts = ctx->saved_data["experts"].toSymInt().guard_int(__FILE__, __LINE__);
    return Gradients().of(RouteBackward::backward(gradients[0], gates, kept.layout(), experts)).none();
  }
};

GatesAndLayout route(const Tensor& logits, const Tensor& threshold) {
  if (!differentiable(logits)) return RouteForward::forward(logits, threshold);
  const variable_list out = Route::apply(logits, threshold);
  return {out[0], out[1], out[2], out[3], out[4]};
}

// ---- functions of the gates of one side

template <class Forward, class Backward>
struct OfGates : Function<OfGates<Forward, Backward>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gates, Layout layout, int64_t experts) {
    keep(ctx, {gates, layout});
    ctx->saved_data["experts"] = experts;
    return Forward::forward(gates, layout, experts);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    Kept kept(ctx);
    const Tensor& gates = kept.tensor();
    const int64_t experts = ctx->saved_data["experts"].toInt();
    return Gradients().of(Backward::backward(gradients[0], gates, kept.layout(), experts)).none_of_layout().none();
  }
};

template <class Forward, class Backward>
Tensor of_gates(const Tensor& gates, Layout layout, int64_t experts) {
  if (!differentiable(gates)) return Forward::forward(gates, layout, experts);
  return OfGates<Forward, Backward>::apply(gates, layout, experts);
}

// ---- the expert layers

template <class Forward, class Backward>
struct Experts : Function<Experts<Forward, Backward>> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2,
      int64_t experts, const OptionalTensor& mask, TensorList weights) {
    variable_list outputs = Forward::forward(x, gates1, layout1, gates2, layout2, experts, mask, weights);
    const TensorList for_backward = TensorList(outputs).slice(1);
    keep(ctx, {{x, gates1, gates2, mask.value_or(Tensor())}, layout1, layout2, weights, for_backward});
    ctx->saved_data["experts"] = experts;
    ctx->saved_data["weights"] = static_cast<int64_t>(weights.size());
    ctx->mark_non_differentiable(for_backward.vec());
    ctx->set_materialize_grads(false);
    return outputs;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    Kept kept(ctx);
    const Tensor &x = kept.tensor(), &gates1 = kept.tensor(), &gates2 = kept.tensor();
    const OptionalTensor mask = kept.optional();
    const Layout layout1 = kept.layout(), layout2 = kept.layout();
    const TensorList weights = kept.list(ctx->saved_data["weights"].toInt());
    if (!gradients[0].defined()) return Gradients().none(3 + 2 * kLayoutTensors + 2 + weights.size());
    const int64_t experts = ctx->saved_data["experts"].toInt();
    const std::vector<Tensor> found = Backward::backward(
        gradients[0], x, gates1, layout1, gates2, layout2, experts, mask, weights, kept.rest());
    return Gradients()
        .of(found[0]).of(found[1]).none_of_layout().of(found[2]).none_of_layout()
        .none().none().of(TensorList(found).slice(3));
  }
};

template <class Forward, class Backward>
std::vector<Tensor> experts(
    const Tensor& x, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList weights) {
  if (!differentiable(x, gates1, gates2) && !any_differentiable(weights))
    return Forward::forward(x, gates1, layout1, gates2, layout2, experts, mask, weights);
  return Experts<Forward, Backward>::apply(x, gates1, layout1, gates2, layout2, experts, mask, weights);
}

using WeightsForward = Operation<"expert_weights", type::expert_weights>;
using WeightsBackward = Operation<"expert_weights_backward", type::expert_weights_backward>;

struct Weights : Function<Weights> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
      const Tensor& mask) {
    keep(ctx, {{gates1, gates2, mask}, layout1, layout2});
    ctx->saved_data["experts"] = experts;
    const auto [weights1, weights2] = WeightsForward::forward(gates1, layout1, gates2, layout2, experts, mask);
    return {weights1, weights2};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    Kept kept(ctx);
    const Tensor &gates1 = kept.tensor(), &gates2 = kept.tensor(), &mask = kept.tensor();
    const Layout layout1 = kept.layout(), layout2 = kept.layout();
    const int64_t experts = ctx->saved_data["experts"].toInt();
    const auto [dgates1, dgates2] =
        WeightsBackward::backward(gradients[0], gradients[1], gates1, layout1, gates2, layout2, experts, mask);
    return Gradients().of(dgates1).none_of_layout().of(dgates2).none_of_layout().none().none();
  }
};

TwoTensors expert_weights(
    const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts, const Tensor& mask) {
  if (!differentiable(gates1, gates2))
    return WeightsForward::forward(gates1, layout1, gates2, layout2, experts, mask);
  const variable_list out = Weights::apply(gates1, layout1, gates2, layout2, experts, mask);
  return {out[0], out[1]};
}

using BiasForward = Operation<"expert_bias", type::expert_bias>;
using BiasBackward = Operation<"expert_bias_backward", type::expert_bias_backward>;

struct Bias : Function<Bias> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gates, Layout layout, const Tensor& b) {
    keep(ctx, {{gates, b}, layout});
    return BiasForward::forward(gates, layout, b);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    Kept kept(ctx);
    const Tensor &gates = kept.tensor(), &b = kept.tensor();
    const auto [dgates, db] = BiasBackward::backward(gradients[0], gates, kept.layout(), b);
    return Gradients().of(dgates).none_of_layout().of(db);
  }
};

Tensor expert_bias(const Tensor& gates, Layout layout, const Tensor& b) {
  if (!differentiable(gates, b)) return BiasForward::forward(gates, layout, b);
  return Bias::apply(gates, layout, b);
}

}  // namespace
}  // namespace monet

#define OF_GATES(name)                                                                                             \
  m.impl(name, &monet::of_gates<monet::Operation<name, monet::type::of_gates>,                                     \
                                monet::Operation<name "_backward", monet::type::of_gates_backward>>)
#define EXPERTS(name)                                                                                              \
  m.impl(name, &monet::experts<monet::Operation<name, monet::type::experts>,                                       \
                               monet::Operation<name "_backward", monet::type::experts_backward>>)

TORCH_LIBRARY_IMPL(MONET_LIBRARY, Autograd, m) {
  m.impl("router_logits", &monet::router_logits);
  m.impl("route", &monet::route);
  OF_GATES("dense_gates");
  OF_GATES("sum_over_tokens");
  OF_GATES("sum_of_largest");
  EXPERTS("vertical_experts");
  EXPERTS("horizontal_experts");
  m.impl("expert_weights", &monet::expert_weights);
  m.impl("expert_bias", &monet::expert_bias);
  for (const char* name :
       {"router_logits_backward", "route_backward", "dense_gates_backward", "sum_over_tokens_backward",
        "sum_of_largest_backward", "vertical_experts_backward", "horizontal_experts_backward",
        "expert_weights_backward", "expert_bias_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}
