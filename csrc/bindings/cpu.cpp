// torch.ops.monet on the CPU. Checks shapes, allocates results, hands raw pointers to the kernels. Gradients are put
// together in autograd.cpp.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

#include "../cpu/experts.h"
#include "../cpu/instruction_sets.h"
#include "../cpu/route.h"
#include "../cpu/sparse_rows.h"
#include "../parallel.h"
#include "tensors.h"

namespace monet {

void run_tasks(int64_t count, void (*task)(const void*, int64_t), const void* context) {
  if (count <= 0) return;
  // Tasks are taken one by one: groups differ in size, and other processes may share the cores.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, smaller(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t index = next++; index < count; index = next++) task(context, index);
  });
}

namespace {

using cpu::Rows;

// From this share of entries on (one in so many) that are not 0, the dense product is the faster one.
constexpr int64_t kDenseShare = 8;

// Rows of a matrix whose rows are contiguous.
template <class S>
Rows<const S> read_rows(const Tensor& matrix) {
  return {read<S>(matrix), matrix.stride(0)};
}

// ---- the router

Tensor head_moments(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 3, "logits must be [tokens, heads, half-experts]");
  const Tensor z = logits.contiguous();
  Tensor sums = at::empty({2, z.size(1)}, z.options().dtype(at::kDouble));
  with_wide_type(z, [&](auto zero) {
    using T = decltype(zero);
    cpu::head_moments(read<T>(z), z.size(0), z.size(1), z.size(2), write<double>(sums));
  });
  return sums;
}

GatesAndLayout route(const Tensor& logits, const Tensor& threshold) {
  check_route(logits, threshold);
  const Tensor z = logits.contiguous(), cut = threshold.contiguous();
  const int64_t tokens = z.size(0), heads = z.size(1), experts = z.size(2);
  const auto ints = z.options().dtype(at::kInt);
  Tensor active = at::empty({tokens, cpu::mark_words(experts)}, z.options().dtype(at::kLong));
  Tensor largest = at::empty({tokens, heads}, z.options()), cuts = at::empty_like(largest);
  Tensor row_start = at::empty({tokens + 1}, ints);
  Tensor group_start = at::empty({blocks_of(tokens) * experts + 1}, ints);
  return with_wide_type(z, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Marks<T> marks{write<uint64_t>(active), write<T>(largest), write<T>(cuts)};
    cpu::mark_active(read<T>(z), read<T>(cut), tokens, heads, experts, marks, write<int32_t>(row_start));
    const int64_t count = read<int32_t>(row_start)[tokens];
    Tensor token = at::empty({count}, ints), row_pair = at::empty({count}, ints);
    Tensor gates = at::empty({count, heads}, z.options());
    cpu::place_pairs(
        marks.active, tokens, experts, read<int32_t>(row_start), write<int32_t>(token), write<int32_t>(group_start),
        write<int32_t>(row_pair));
    const Pairs pairs = pairs_of(z, {token, group_start, row_start, row_pair}, experts);
    cpu::active_softmax(read<T>(z), marks, pairs, heads, write<T>(gates));
    return std::make_tuple(gates, token, group_start, row_start, row_pair);
  });
}

// Gradients of the logits, [tokens, heads, experts]: 0 where a gate is 0.
Tensor route_backward(const Tensor& dgates, const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs), dgiven = values_of(dgates, pairs);
  Tensor dlogits = at::empty({pairs.tokens, given.size(1), experts}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::active_softmax_backward(read<T>(given), read<T>(dgiven), pairs, given.size(1), write<T>(dlogits));
  });
  return dlogits;
}

Tensor dense_gates(const Tensor& values, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(values, layout, experts);
  const Tensor given = values_of(values, pairs);
  Tensor dense = at::empty({pairs.tokens, given.size(1), experts}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::scatter_dense(read<T>(given), pairs, given.size(1), write<T>(dense));
  });
  return dense;
}

Tensor dense_gates_backward(const Tensor& ddense, const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = ddense.contiguous();
  Tensor dgates = at::empty_like(values_of(gates, pairs));
  check_dense(given, gates, pairs);
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::gather_dense(read<T>(given), pairs, given.size(1), write<T>(dgates));
  });
  return dgates;
}

Tensor sum_over_tokens(const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs);
  Tensor totals = at::empty({given.size(1), experts}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::sum_over_tokens(read<T>(given), pairs, given.size(1), write<T>(totals));
  });
  return totals;
}

Tensor sum_over_tokens_backward(const Tensor& dtotals, const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = dtotals.contiguous();
  Tensor dgates = at::empty_like(values_of(gates, pairs));
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::sum_over_tokens_backward(read<T>(given), pairs, given.size(0), write<T>(dgates));
  });
  return dgates;
}

Tensor sum_of_largest(const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs);
  Tensor totals = at::empty({given.size(1)}, given.options());
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::sum_of_largest(read<T>(given), pairs, given.size(1), write<T>(totals));
  });
  return totals;
}

Tensor sum_of_largest_backward(const Tensor& dtotals, const Tensor& gates, Layout layout, int64_t experts) {
  const Pairs pairs = pairs_of(gates, layout, experts);
  const Tensor given = values_of(gates, pairs), dgiven = dtotals.contiguous();
  Tensor dgates = at::empty_like(given);
  with_wide_type(given, [&](auto zero) {
    using T = decltype(zero);
    cpu::sum_of_largest_backward(read<T>(given), read<T>(dgiven), pairs, given.size(1), write<T>(dgates));
  });
  return dgates;
}

// ---- the expert layers

// A weight of an output layer, [width, experts * units] as published, as rows by half-expert. A weight that is stored
// by columns (a transposed view) is used as it lies; of any other a copy is made, for few tokens of what they use.
Tensor expert_rows(const Tensor& v, const Pairs& pairs, int64_t units) {
  if (v.t().is_contiguous()) return v.t();
  const Tensor given = v.contiguous();
  Tensor rows = at::empty({v.size(1), v.size(0)}, v.options());
  with_type(v, [&](auto zero) {
    using S = decltype(zero);
    if (pairs.tokens < cpu::kFewTokens)
      cpu::transpose_used(read<S>(given), v.size(0), pairs, units, write<S>(rows));
    else
      cpu::transpose(read<S>(given), v.size(0), v.size(1), write<S>(rows));
  });
  return rows;
}

// Jobs over tensors; the tensors must outlive them.
template <class S>
cpu::Projection<S> projection(
    const SideTensors& side, const Tensor& x, int64_t column, const Tensor& w, const Tensor* bias, Tensor& out) {
  return {side.pairs, read_rows<S>(x).from_column(column), read_rows<S>(w), bias ? read<S>(*bias) : nullptr,
          out.size(1), w.size(1), write<Accumulator<S>>(out)};
}
template <class S>
cpu::Term<S> term(const SideTensors& side, const Tensor& y, const Tensor& w) {
  return {side.pairs, read<Accumulator<S>>(y), read_rows<S>(w), y.size(1)};
}
template <class S, size_t count>
cpu::Combination<S> combination(const cpu::Term<S> (&terms)[count], int64_t columns, Tensor& out, int64_t column) {
  return {terms, count, columns, {write<S>(out) + column, out.stride(0)}};
}
// The gradient of an input weight, [units, width].
template <class S>
cpu::WeightGradient<S> weight_gradient(
    const SideTensors& side, const Tensor& y, const Tensor& x, Tensor& dw) {
  return {side.pairs, read<Accumulator<S>>(y), read_rows<S>(x), y.size(1), dw.size(1), write<S>(dw), false};
}
// The gradient of an output weight, [width, units]: from empty_gradient, in rows or in columns.
template <class S>
cpu::WeightGradient<S> output_weight_gradient(
    const SideTensors& side, const Tensor& y, const Tensor& x, int64_t column, Tensor& dv) {
  return {side.pairs, read<Accumulator<S>>(y), read_rows<S>(x).from_column(column), y.size(1), dv.size(0),
          write<S>(dv), dv.is_contiguous()};
}
template <class S, size_t count>
void run(const cpu::Projection<S> (&jobs)[count]) {
  cpu::project(jobs, count);
}
template <class S, size_t count>
void run(const cpu::Combination<S> (&jobs)[count]) {
  cpu::combine(jobs, count);
}
template <class S, size_t count>
void run(const cpu::WeightGradient<S> (&jobs)[count]) {
  cpu::weight_gradients(jobs, count);
}

template <class S>
Tensor bias_gradient(const SideTensors& side, const Tensor& y, const Tensor& bias) {
  Tensor out = at::empty(bias.sizes(), y.options());
  cpu::bias_gradient(side.pairs, read<Accumulator<S>>(y), y.size(1), write<Accumulator<S>>(out));
  return out.to(bias.scalar_type());
}

// The weights of a vertical layer, checked and laid out for the kernels.
struct VerticalWeights {
  VerticalWeights(const Tensor& x, TensorList w, const Pairs& one, const Pairs& two) {
    units = check_vertical(x, w, one.experts);
    u1 = w[0].contiguous(), u1_bias = w[1].contiguous(), u2 = w[2].contiguous(), u2_bias = w[3].contiguous();
    v11 = expert_rows(w[4], one, units), v12 = expert_rows(w[5], one, units);
    v21 = expert_rows(w[6], two, units), v22 = expert_rows(w[7], two, units);
  }

  int64_t units;
  Tensor u1, u1_bias, u2, u2_bias, v11, v12, v21, v22;
};

template <class C>
cpu::VerticalMix<C> vertical_mix(Tensor& own1, Tensor& cross1, Tensor& own2, Tensor& cross2) {
  return {write<C>(own1), write<C>(cross1), write<C>(own2), write<C>(cross2)};
}

std::vector<Tensor> vertical_experts(
    const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList weights) {
  const Tensor x = tokens.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const VerticalWeights w(x, weights, one.pairs, two.pairs);
  Tensor out = at::empty_like(x);
  return with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    Tensor s1 = one.by_pair(w.units), s2 = two.by_pair(w.units);
    run<S>({projection<S>(one, x, 0, w.u1, &w.u1_bias, s1), projection<S>(two, x, 0, w.u2, &w.u2_bias, s2)});
    Tensor own1 = at::empty_like(s1), cross1 = at::empty_like(s1);
    Tensor own2 = at::empty_like(s2), cross2 = at::empty_like(s2);
    cpu::mix_vertical<C>(
        one.side<C>(), two.side<C>(), m.mask<C>(), read<C>(s1), read<C>(s2), w.units,
        vertical_mix<C>(own1, cross1, own2, cross2));
    const int64_t half = x.size(1) / 2;
    const cpu::Term<S> left[] = {term<S>(one, own1, w.v11), term<S>(one, cross1, w.v12)};
    const cpu::Term<S> right[] = {term<S>(two, cross2, w.v21), term<S>(two, own2, w.v22)};
    run<S>({combination<S>(left, half, out, 0), combination<S>(right, half, out, half)});
    return std::vector<Tensor>{out, s1, s2};
  });
}

std::vector<Tensor> vertical_experts_backward(
    const Tensor& dout, const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const OptionalTensor& mask, TensorList weights, TensorList kept) {
  const Tensor &s1 = kept[0], &s2 = kept[1];
  const Tensor x = tokens.contiguous(), d = dout.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const VerticalWeights w(x, weights, one.pairs, two.pairs);
  Tensor dx = at::empty_like(x), dgates1 = at::empty_like(one.gates), dgates2 = at::empty_like(two.gates);
  return with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    const int64_t half = x.size(1) / 2;
    Tensor down1 = at::empty_like(s1), dcross1 = at::empty_like(s1);
    Tensor down2 = at::empty_like(s2), dcross2 = at::empty_like(s2);
    run<S>({
        projection<S>(one, d, 0, w.v11, nullptr, down1), projection<S>(one, d, 0, w.v12, nullptr, dcross1),
        projection<S>(two, d, half, w.v21, nullptr, dcross2), projection<S>(two, d, half, w.v22, nullptr, down2)});

    Tensor own1 = at::empty_like(s1), cross1 = at::empty_like(s1), ds1 = at::empty_like(s1);
    Tensor own2 = at::empty_like(s2), cross2 = at::empty_like(s2), ds2 = at::empty_like(s2);
    cpu::mix_vertical_backward<C>(
        one.side<C>(), two.side<C>(), m.mask<C>(), read<C>(s1), read<C>(s2), w.units,
        {read<C>(down1), read<C>(dcross1), read<C>(down2), read<C>(dcross2)},
        vertical_mix<C>(own1, cross1, own2, cross2), write<C>(ds1), write<C>(ds2), write<C>(dgates1),
        write<C>(dgates2));

    const cpu::Term<S> into_x[] = {term<S>(one, ds1, w.u1), term<S>(two, ds2, w.u2)};
    run<S>({combination<S>(into_x, x.size(1), dx, 0)});
    Tensor du1 = at::empty_like(w.u1), du2 = at::empty_like(w.u2);
    Tensor dv11 = empty_gradient(weights[4]), dv12 = empty_gradient(weights[5]);
    Tensor dv21 = empty_gradient(weights[6]), dv22 = empty_gradient(weights[7]);
    run<S>({
        weight_gradient<S>(one, ds1, x, du1), weight_gradient<S>(two, ds2, x, du2),
        output_weight_gradient<S>(one, own1, d, 0, dv11), output_weight_gradient<S>(one, cross1, d, 0, dv12),
        output_weight_gradient<S>(two, cross2, d, half, dv21), output_weight_gradient<S>(two, own2, d, half, dv22)});
    return std::vector<Tensor>{
        dx, dgates1, dgates2, du1, bias_gradient<S>(one, ds1, w.u1_bias), du2, bias_gradient<S>(two, ds2, w.u2_bias),
        dv11, dv12, dv21, dv22};
  });
}

struct HorizontalWeights {
  HorizontalWeights(const Tensor& x, TensorList w, const Pairs& two) {
    units = check_horizontal(x, w, two.experts);
    u = w[0].contiguous(), u_bias = w[1].contiguous(), v = expert_rows(w[2], two, units);
  }

  int64_t units;
  Tensor u, u_bias, v;
};

std::vector<Tensor> horizontal_experts(
    const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts,
    const OptionalTensor& mask, TensorList weights) {
  const Tensor x = tokens.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const HorizontalWeights w(x, weights, two.pairs);
  Tensor out = at::empty_like(x);
  return with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    Tensor s1 = one.by_pair(w.units), y = two.by_pair(w.units);
    run<S>({projection<S>(one, x, 0, w.u, &w.u_bias, s1)});
    cpu::mix_horizontal<C>(one.side<C>(), two.side<C>(), m.mask<C>(), read<C>(s1), w.units, write<C>(y));
    const cpu::Term<S> terms[] = {term<S>(two, y, w.v)};
    run<S>({combination<S>(terms, x.size(1), out, 0)});
    return std::vector<Tensor>{out, s1};
  });
}

std::vector<Tensor> horizontal_experts_backward(
    const Tensor& dout, const Tensor& tokens, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const OptionalTensor& mask, TensorList weights, TensorList kept) {
  const Tensor& s1 = kept[0];
  const Tensor x = tokens.contiguous(), d = dout.contiguous();
  const SideTensors one(x, gates1, layout1, experts), two(x, gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const HorizontalWeights w(x, weights, two.pairs);
  Tensor dx = at::empty_like(x), dgates1 = at::empty_like(one.gates), dgates2 = at::empty_like(two.gates);
  return with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    Tensor dy = two.by_pair(w.units), y = two.by_pair(w.units), ds1 = at::empty_like(s1);
    run<S>({projection<S>(two, d, 0, w.v, nullptr, dy)});
    cpu::mix_horizontal_backward<C>(
        one.side<C>(), two.side<C>(), m.mask<C>(), read<C>(s1), w.units, read<C>(dy), write<C>(y), write<C>(ds1),
        write<C>(dgates1), write<C>(dgates2));
    const cpu::Term<S> into_x[] = {term<S>(one, ds1, w.u)};
    run<S>({combination<S>(into_x, x.size(1), dx, 0)});
    Tensor du = at::empty_like(w.u), dv = empty_gradient(weights[2]);
    run<S>({weight_gradient<S>(one, ds1, x, du), output_weight_gradient<S>(two, y, d, 0, dv)});
    return std::vector<Tensor>{dx, dgates1, dgates2, du, bias_gradient<S>(one, ds1, w.u_bias), dv};
  });
}

// What a mask leaves of each half-expert, [pairs of side 1] and [pairs of side 2].
TwoTensors expert_weights(
    const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts, const Tensor& mask) {
  const SideTensors one(gates1, layout1, experts), two(gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  Tensor totals1 = at::empty({one.pairs.count}, one.gates.options());
  Tensor totals2 = at::empty({two.pairs.count}, two.gates.options());
  with_wide_type(one.gates, [&](auto zero) {
    using C = decltype(zero);
    cpu::masked_totals<C>(one.side<C>(), two.side<C>(), m.mask<C>(), write<C>(totals1), write<C>(totals2));
  });
  return {totals1, totals2};
}

TwoTensors expert_weights_backward(
    const Tensor& dtotals1, const Tensor& dtotals2, const Tensor& gates1, Layout layout1, const Tensor& gates2,
    Layout layout2, int64_t experts, const Tensor& mask) {
  const SideTensors one(gates1, layout1, experts), two(gates2, layout2, experts);
  const MaskTensor m(mask, one, two);
  const Tensor d1 = dtotals1.contiguous(), d2 = dtotals2.contiguous();
  check_totals(d1, d2, one, two);
  Tensor dgates1 = at::empty_like(one.gates), dgates2 = at::empty_like(two.gates);
  with_wide_type(one.gates, [&](auto zero) {
    using C = decltype(zero);
    cpu::masked_totals_backward<C>(
        one.side<C>(), two.side<C>(), m.mask<C>(), read<C>(d1), read<C>(d2), write<C>(dgates1), write<C>(dgates2));
  });
  return {dgates1, dgates2};
}

Tensor gate_totals(const SideTensors& side) {
  Tensor totals = side.by_pair(1);
  with_wide_type(totals, [&](auto zero) {
    using C = decltype(zero);
    cpu::gate_totals(side.side<C>(), write<C>(totals));
  });
  return totals;
}

// b [experts, width] is the output layer of half-experts with one unit, whose value is the sum of a pair's gates.
Tensor expert_bias(const Tensor& gates, Layout layout, const Tensor& b) {
  const Tensor rows = b.contiguous();
  Tensor out = at::empty({layout[2].numel() - 1, b.size(1)}, b.options());
  const SideTensors side(out, gates, layout, b.size(0));
  Tensor totals = side.by_pair(1), expert = at::empty({side.pairs.count}, b.options().dtype(at::kInt));
  with_type(b, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    cpu::gate_totals_by_token(side.side<C>(), write<C>(totals), write<int32_t>(expert));
    cpu::multiply<S>({
        side.pairs.tokens, side.pairs.row_start, read<int32_t>(expert), read<C>(totals), read_rows<S>(rows), b.size(1),
        {write<S>(out), b.size(1)}});
  });
  return out;
}

TwoTensors expert_bias_backward(
    const Tensor& dout, const Tensor& gates, Layout layout, const Tensor& b) {
  const Tensor rows = b.contiguous(), d = dout.contiguous();
  const SideTensors side(d, gates, layout, b.size(0));
  Tensor dgates = at::empty_like(side.gates);
  return with_type(b, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    const Tensor totals = gate_totals(side);
    Tensor dtotals = at::empty_like(totals), db = at::empty_like(rows);
    run<S>({projection<S>(side, d, 0, rows, nullptr, dtotals)});
    cpu::gate_totals_backward(side.side<C>(), read<C>(dtotals), write<C>(dgates));
    run<S>({weight_gradient<S>(side, totals, d, db)});
    return std::make_tuple(dgates, db);
  });
}

// Of a router's logits only the active ones have a gradient, 2% of them. Where few are not 0, they alone are multiplied.
TwoTensors router_logits_backward(const Tensor& dlogits, const Tensor& tokens, const Tensor& weight) {
  const Tensor x = tokens.contiguous(), w = weight.contiguous(), dz = dlogits.flatten(1).contiguous();
  check_router_gradient(dz, x, w);
  const int64_t rows = w.size(0);
  return with_type(x, [&](auto zero) {
    using S = decltype(zero);
    using C = Accumulator<S>;
    const cpu::SparseRows<C> sparse(read<C>(dz), x.size(0), rows);
    if (sparse.count() > x.size(0) * rows / kDenseShare) {
      const Tensor dense = dz.to(x.scalar_type());
      return TwoTensors(at::mm(dense, w), at::mm(dense.t(), x));
    }
    Tensor dx = at::empty_like(x), dw = at::empty_like(w);
    cpu::multiply<S>({
        x.size(0), sparse.row_start(), sparse.column(), sparse.values(), read_rows<S>(w), x.size(1),
        {write<S>(dx), x.size(1)}});
    const cpu::SparseGroups<C> groups(sparse);
    run<S>({{groups.pairs(), groups.values(), read_rows<S>(x), 1, x.size(1), write<S>(dw), false}});
    return TwoTensors(dx, dw);
  });
}

std::string instruction_set() { return cpu::instruction_set(); }
bool select_instruction_set(const std::string& name) { return cpu::select_instruction_set(name.c_str()); }

}  // namespace
}  // namespace monet

TORCH_LIBRARY_IMPL(MONET_LIBRARY, CPU, m) {
#include "operations.inl"
}

// These have no tensor that would tell a device.
TORCH_LIBRARY_IMPL(MONET_LIBRARY, CatchAll, m) {
  m.impl("instruction_set", &monet::instruction_set);
  m.impl("select_instruction_set", &monet::select_instruction_set);
}
