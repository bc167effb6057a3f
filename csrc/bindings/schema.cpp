// torch.ops.monet: the operations as the framework sees them. Each device implements them in a file of its own; their
// gradients are in autograd.cpp; what torch.compile and torch.export must know of them is in
// monet_train/kernels/fake.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "library.h"

TORCH_LIBRARY(MONET_LIBRARY, m) {
  m.def("built_with() -> str", [] { return std::string(MONET_TORCH_VERSION); });
  m.def("built_from() -> str", [] { return std::string(MONET_SOURCES); });
  m.def("built_for_cuda() -> bool", [] {
    const auto route = c10::Dispatcher::singleton().findSchemaOrThrow(MONET_OPERATION("route"), "");
    return route.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  });
  m.def("instruction_set() -> str");
  m.def("select_instruction_set(str name) -> bool");

  m.def("router_logits(Tensor x, Tensor weight, int heads) -> Tensor");
  m.def("router_logits_backward(Tensor dlogits, Tensor x, Tensor weight) -> (Tensor, Tensor)");
  m.def("head_moments(Tensor logits) -> Tensor");
  m.def(
      "route(Tensor logits, Tensor threshold) -> "
      "(Tensor gates, Tensor token, Tensor group_start, Tensor row_start, Tensor row_pair)");
  m.def("route_backward(Tensor dgates, Tensor gates, Tensor[] layout, int experts) -> Tensor");

  m.def("dense_gates(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("dense_gates_backward(Tensor ddense, Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_over_tokens(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_over_tokens_backward(Tensor dtotals, Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_of_largest(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_of_largest_backward(Tensor dtotals, Tensor gates, Tensor[] layout, int experts) -> Tensor");

  m.def(
      "vertical_experts(Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, "
      "Tensor? mask, Tensor[] weights) -> Tensor[]");
  m.def(
      "vertical_experts_backward(Tensor dout, Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, "
      "Tensor[] layout2, int experts, Tensor? mask, Tensor[] weights, Tensor[] kept) -> Tensor[]");
  m.def(
      "horizontal_experts(Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, "
      "Tensor? mask, Tensor[] weights) -> Tensor[]");
  m.def(
      "horizontal_experts_backward(Tensor dout, Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, "
      "Tensor[] layout2, int experts, Tensor? mask, Tensor[] weights, Tensor[] kept) -> Tensor[]");
  m.def(
      "expert_weights(Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, Tensor mask) -> "
      "(Tensor, Tensor)");
  m.def(
      "expert_weights_backward(Tensor dweights1, Tensor dweights2, Tensor gates1, Tensor[] layout1, Tensor gates2, "
      "Tensor[] layout2, int experts, Tensor mask) -> (Tensor, Tensor)");
  m.def("expert_bias(Tensor gates, Tensor[] layout, Tensor b) -> Tensor");
  m.def("expert_bias_backward(Tensor dout, Tensor gates, Tensor[] layout, Tensor b) -> (Tensor, Tensor)");

  m.def(
      "visit_experts(Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, int tokens, "
      "Tensor hashes, int unit, Tensor[] inputs, Tensor[] readers, Tensor(a!)[] tally) -> ()");
}
