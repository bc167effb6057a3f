// torch.ops.monet: the operations as the framework sees them. Each device implements them in a file of its own.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

TORCH_LIBRARY(monet, m) {
  m.def("built_with() -> str", [] { return std::string(MONET_TORCH_VERSION); });
  m.def("built_for_cuda() -> bool", [] {
    const auto route = c10::Dispatcher::singleton().findSchemaOrThrow("monet::route", "");
    return route.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  });
  m.def("instruction_set() -> str");
  m.def("select_instruction_set(str name) -> bool");
  m.def("head_moments(Tensor logits) -> Tensor");
  m.def("route(Tensor logits, Tensor threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("route_backward(Tensor gates, Tensor dgates, Tensor[] layout, int experts) -> Tensor");
  m.def("route_backward_sparse(Tensor gates, Tensor dgates, Tensor[] layout, int experts) -> (Tensor, Tensor)");
  m.def("linear_sparse_backward(Tensor token, Tensor row, Tensor values, Tensor x, Tensor w) -> (Tensor, Tensor)");
  m.def("scatter_dense(Tensor values, Tensor[] layout, int experts) -> Tensor");
  m.def("gather_dense(Tensor dense, Tensor[] layout) -> Tensor");
  m.def("sum_over_tokens(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_over_tokens_backward(Tensor dtotals, Tensor[] layout) -> Tensor");
  m.def("sum_of_largest(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_of_largest_backward(Tensor gates, Tensor dtotals, Tensor[] layout, int experts) -> Tensor");
  m.def(
      "vertical_experts(Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, "
      "Tensor? mask, Tensor[] weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "vertical_experts_backward(Tensor dout, Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, "
      "Tensor[] layout2, int experts, Tensor? mask, Tensor[] weights, Tensor s1, Tensor s2) -> Tensor[]");
  m.def(
      "horizontal_experts(Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, "
      "Tensor? mask, Tensor[] weights) -> (Tensor, Tensor)");
  m.def(
      "horizontal_experts_backward(Tensor dout, Tensor x, Tensor gates1, Tensor[] layout1, Tensor gates2, "
      "Tensor[] layout2, int experts, Tensor? mask, Tensor[] weights, Tensor s1) -> Tensor[]");
  m.def(
      "masked_totals(Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, Tensor mask) -> "
      "(Tensor, Tensor)");
  m.def(
      "masked_totals_backward(Tensor gates1, Tensor[] layout1, Tensor gates2, Tensor[] layout2, int experts, "
      "Tensor mask, Tensor dtotals1, Tensor dtotals2) -> (Tensor, Tensor)");
  m.def("expert_bias(Tensor gates, Tensor[] layout, Tensor b) -> Tensor");
  m.def("expert_bias_backward(Tensor dout, Tensor gates, Tensor[] layout, Tensor b) -> (Tensor, Tensor)");
}
