// torch.ops.monet: the operations as the framework sees them. Checks shapes, allocates results, hands raw pointers to
// the kernels. Gradients are put together in monet_train/kernels (one autograd function an operation).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <limits>
#include <tuple>

#include "cpu/route.h"
#include "parallel.h"

namespace monet {

void run_tasks(int64_t count, void (*task)(const void*, int64_t), const void* context) {
  if (count <= 0) return;
  if (count == 1) return task(context, 0);
  // Tasks are taken one by one: groups differ in size, and other processes may share the cores.
  std::atomic<int64_t> next{0};
  const int64_t workers = smaller(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t index = next++; index < count; index = next++) task(context, index);
  });
}

namespace {

using at::Tensor;

// The four index tensors of a Pairs, in the order in which Python hands them over.
using Layout = at::TensorList;

Pairs pairs_of(Layout layout, int64_t experts) {
  TORCH_CHECK(layout.size() == 4, "a layout has 4 tensors, got ", layout.size());
  for (const Tensor& part : layout)
    TORCH_CHECK(part.scalar_type() == at::kInt && part.is_contiguous(), "a layout is made of contiguous int32 tensors");
  const Pairs pairs{
      layout[2].numel() - 1,          experts,
      layout[0].numel(),              layout[0].const_data_ptr<int32_t>(),
      layout[1].const_data_ptr<int32_t>(), layout[2].const_data_ptr<int32_t>(),
      layout[3].const_data_ptr<int32_t>()};
  TORCH_CHECK(layout[1].numel() == pairs.blocks() * experts + 1, "the layout is of another number of half-experts");
  return pairs;
}

void check_values(const Tensor& values, const Pairs& pairs) {
  TORCH_CHECK(
      values.dim() == 2 && values.size(0) == pairs.count && values.is_contiguous(),
      "values must be contiguous [pairs, heads]");
}

Tensor head_moments(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 3, "logits must be [tokens, heads, experts]");
  const Tensor z = logits.contiguous();
  Tensor sums = at::empty({2, z.size(1)}, z.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "monet::head_moments", [&] {
    cpu::head_moments(z.const_data_ptr<scalar_t>(), z.size(0), z.size(1), z.size(2), sums.mutable_data_ptr<double>());
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& logits, const Tensor& threshold) {
  TORCH_CHECK(logits.dim() == 3, "logits must be [tokens, heads, experts]");
  TORCH_CHECK(
      threshold.dim() == 1 && threshold.size(0) == logits.size(1) && threshold.scalar_type() == logits.scalar_type(),
      "threshold must be [heads], in the type of the logits");
  const Tensor z = logits.contiguous(), cut = threshold.contiguous();
  const int64_t tokens = z.size(0), heads = z.size(1), experts = z.size(2);
  TORCH_CHECK(experts > 0, "there must be at least one half-expert");
  TORCH_CHECK(
      tokens <= std::numeric_limits<int32_t>::max() / experts, tokens, " tokens are too many for one call; split them");
  const int64_t words = cpu::Marks<float>::words(experts), blocks = ceil_div(tokens, kBlockTokens);

  const auto ints = z.options().dtype(at::kInt);
  Tensor active = at::empty({tokens, words}, z.options().dtype(at::kLong));
  Tensor rows = at::empty({2, tokens, heads}, z.options());
  Tensor group_start = at::empty({blocks * experts + 1}, ints), row_start = at::empty({tokens + 1}, ints);
  Tensor gates, token, row_pair;
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "monet::route", [&] {
    const cpu::Marks<scalar_t> marks{
        reinterpret_cast<uint64_t*>(active.mutable_data_ptr<int64_t>()), rows.mutable_data_ptr<scalar_t>(),
        rows.mutable_data_ptr<scalar_t>() + tokens * heads};
    const scalar_t* logits_data = z.const_data_ptr<scalar_t>();
    int32_t* starts = row_start.mutable_data_ptr<int32_t>();
    cpu::mark_active(logits_data, cut.const_data_ptr<scalar_t>(), tokens, heads, experts, marks, starts);
    const int64_t count = starts[tokens];
    token = at::empty({count}, ints);
    row_pair = at::empty({count}, ints);
    gates = at::empty({count, heads}, z.options());
    cpu::place_pairs(
        marks.active, tokens, experts, starts, token.mutable_data_ptr<int32_t>(),
        group_start.mutable_data_ptr<int32_t>(), row_pair.mutable_data_ptr<int32_t>());
    const Pairs pairs = pairs_of({token, group_start, row_start, row_pair}, experts);
    cpu::active_softmax(logits_data, marks, pairs, heads, gates.mutable_data_ptr<scalar_t>());
  });
  return {gates, token, group_start, row_start, row_pair};
}

Tensor route_backward(const Tensor& gates, const Tensor& dgates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(layout, experts);
  check_values(gates, pairs);
  const Tensor given = dgates.contiguous();
  Tensor dlogits = at::empty_like(gates);
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "monet::route_backward", [&] {
    cpu::active_softmax_backward(
        gates.const_data_ptr<scalar_t>(), given.const_data_ptr<scalar_t>(), pairs, gates.size(1),
        dlogits.mutable_data_ptr<scalar_t>());
  });
  return dlogits;
}

Tensor scatter_dense(const Tensor& values, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(layout, experts);
  const Tensor given = values.contiguous();
  check_values(given, pairs);
  Tensor dense = at::empty({pairs.tokens, given.size(1), experts}, given.options());
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "monet::scatter_dense", [&] {
    cpu::scatter_dense(
        given.const_data_ptr<scalar_t>(), pairs, given.size(1), dense.mutable_data_ptr<scalar_t>());
  });
  return dense;
}

Tensor gather_dense(const Tensor& dense, Layout layout) {
  const Pairs pairs = pairs_of(layout, dense.size(2));
  const Tensor given = dense.contiguous();
  Tensor values = at::empty({pairs.count, given.size(1)}, given.options());
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "monet::gather_dense", [&] {
    cpu::gather_dense(
        given.const_data_ptr<scalar_t>(), pairs, given.size(1), values.mutable_data_ptr<scalar_t>());
  });
  return values;
}

Tensor sum_over_tokens(const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(layout, experts);
  const Tensor given = gates.contiguous();
  check_values(given, pairs);
  Tensor totals = at::empty({given.size(1), experts}, given.options());
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "monet::sum_over_tokens", [&] {
    cpu::sum_over_tokens(
        given.const_data_ptr<scalar_t>(), pairs, given.size(1), totals.mutable_data_ptr<scalar_t>());
  });
  return totals;
}

Tensor sum_over_tokens_backward(const Tensor& dtotals, Layout layout) {
  const Pairs pairs = pairs_of(layout, dtotals.size(1));
  const Tensor given = dtotals.contiguous();
  Tensor dgates = at::empty({pairs.count, given.size(0)}, given.options());
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "monet::sum_over_tokens_backward", [&] {
    cpu::sum_over_tokens_backward(
        given.const_data_ptr<scalar_t>(), pairs, given.size(0), dgates.mutable_data_ptr<scalar_t>());
  });
  return dgates;
}

Tensor sum_of_largest(const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(layout, experts);
  const Tensor given = gates.contiguous();
  check_values(given, pairs);
  Tensor totals = at::empty({given.size(1)}, given.options());
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "monet::sum_of_largest", [&] {
    cpu::sum_of_largest(
        given.const_data_ptr<scalar_t>(), pairs, given.size(1), totals.mutable_data_ptr<scalar_t>());
  });
  return totals;
}

Tensor sum_of_largest_backward(const Tensor& gates, const Tensor& dtotals, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(layout, experts);
  const Tensor given = gates.contiguous(), dgiven = dtotals.contiguous();
  check_values(given, pairs);
  Tensor dgates = at::empty_like(given);
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "monet::sum_of_largest_backward", [&] {
    cpu::sum_of_largest_backward(
        given.const_data_ptr<scalar_t>(), dgiven.const_data_ptr<scalar_t>(), pairs, given.size(1),
        dgates.mutable_data_ptr<scalar_t>());
  });
  return dgates;
}

std::string built_with() { return MONET_TORCH_VERSION; }

}  // namespace
}  // namespace monet

TORCH_LIBRARY(monet, m) {
  m.def("built_with() -> str", &monet::built_with);
  m.def("head_moments(Tensor logits) -> Tensor");
  m.def("route(Tensor logits, Tensor threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("route_backward(Tensor gates, Tensor dgates, Tensor[] layout, int experts) -> Tensor");
  m.def("scatter_dense(Tensor values, Tensor[] layout, int experts) -> Tensor");
  m.def("gather_dense(Tensor dense, Tensor[] layout) -> Tensor");
  m.def("sum_over_tokens(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_over_tokens_backward(Tensor dtotals, Tensor[] layout) -> Tensor");
  m.def("sum_of_largest(Tensor gates, Tensor[] layout, int experts) -> Tensor");
  m.def("sum_of_largest_backward(Tensor gates, Tensor dtotals, Tensor[] layout, int experts) -> Tensor");
}

TORCH_LIBRARY_IMPL(monet, CPU, m) {
  m.impl("head_moments", &monet::head_moments);
  m.impl("route", &monet::route);
  m.impl("route_backward", &monet::route_backward);
  m.impl("scatter_dense", &monet::scatter_dense);
  m.impl("gather_dense", &monet::gather_dense);
  m.impl("sum_over_tokens", &monet::sum_over_tokens);
  m.impl("sum_over_tokens_backward", &monet::sum_over_tokens_backward);
  m.impl("sum_of_largest", &monet::sum_of_largest);
  m.impl("sum_of_largest_backward", &monet::sum_of_largest_backward);
}
