// torch.ops.monet on the CPU: what is its own of implementation.h.
#include <ATen/Parallel.h>

#include <atomic>
#include <string>

#include "../cpu/instruction_sets.h"
#include "../cpu/mixing.h"
#include "../cpu/pair_products.h"
#include "../cpu/router.h"
#include "../cpu/sparse_rows.h"
#include "../cpu/tasks.h"
#include "../cpu/visits.h"
#include "implementation.h"

namespace monet {

void cpu::run_tasks(int64_t count, void (*task)(const void*, int64_t), const void* context) {
  if (count <= 0) return;
  // Tasks are taken one by one: groups differ in size, and other processes may share the cores.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, smaller(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t index = next++; index < count; index = next++) task(context, index);
  });
}

namespace {

using cpu::run;
using cpu::WeightGradient;

// From this share of entries on (one in so many) that are not 0, the dense product is the faster one.
constexpr int64_t kDenseShare = 8;

// ---- jobs over tensors, which must outlive them

template <class S>
Projection<S> projection(
    const SideTensors& side, Rows<const S> x, const Tensor& w, const Tensor* bias, const Tensor& out) {
  return {side.pairs, x, read_rows<S>(w), bias ? read<S>(*bias) : nullptr, out.size(1), w.size(1),
          write<Accumulator<S>>(out)};
}
template <class S>
Term<S> term(const SideTensors& side, const Tensor& y, const Tensor& w) {
  return {side.pairs, read<Accumulator<S>>(y), read_rows<S>(w), y.size(1)};
}
template <class S>
Combination<S> combination(const Term<S>& first, const Term<S>& second, int64_t columns, Rows<S> out) {
  return {{first, second}, 2, columns, out};
}
template <class S>
Combination<S> combination(const Term<S>& only, int64_t columns, Rows<S> out) {
  return {{only}, 1, columns, out};
}
// The gradient of an input weight, [units, width].
template <class S>
WeightGradient<S> input_gradient(const SideTensors& side, const Tensor& y, Rows<const S> x, const Tensor& du) {
  return {side.pairs, read<Accumulator<S>>(y), x, y.size(1), du.size(1), write<S>(du), false};
}
// The gradient of an output weight, [width, units]: from empty_gradient, in rows or in columns.
template <class S>
WeightGradient<S> output_gradient(const SideTensors& side, const Tensor& y, Rows<const S> x, const Tensor& dv) {
  return {side.pairs, read<Accumulator<S>>(y), x, y.size(1), dv.size(0), write<S>(dv), dv.is_contiguous()};
}

// ---- weights as the kernels read them

// An output weight, [width, experts * units] as published, as rows by half-expert. A weight that is stored by columns
// (a transposed view) is used as it lies; of any other a copy is made, in decoding of what is used.
template <class S>
Tensor expert_rows(const Tensor& v, const Pairs& pairs) {
  if (v.t().is_contiguous()) return v.t();
  const Tensor given = v.contiguous(), rows = at::empty({v.size(1), v.size(0)}, v.options());
  const cpu::Transposition<S> p{read<S>(given), v.size(0), v.size(1), write<S>(rows)};
  if (pairs.tokens < kDecodeTokens)
    run_for_pairs(p, pairs);
  else
    run(p);
  return rows;
}

template <class S>
struct VerticalWeights {
  explicit VerticalWeights(const Layer& layer)
      : u1(layer.weights[kU1].contiguous()), u1_bias(layer.weights[kU1Bias].contiguous()),
        u2(layer.weights[kU2].contiguous()), u2_bias(layer.weights[kU2Bias].contiguous()),
        v11(expert_rows<S>(layer.weights[kV11], layer.routing.one.pairs)),
        v12(expert_rows<S>(layer.weights[kV12], layer.routing.one.pairs)),
        v21(expert_rows<S>(layer.weights[kV21], layer.routing.two.pairs)),
        v22(expert_rows<S>(layer.weights[kV22], layer.routing.two.pairs)) {}

  Tensor u1, u1_bias, u2, u2_bias, v11, v12, v21, v22;
};

template <class S>
struct HorizontalWeights {
  explicit HorizontalWeights(const Layer& layer)
      : u(layer.weights[kU].contiguous()), u_bias(layer.weights[kUBias].contiguous()),
        v(expert_rows<S>(layer.weights[kV], layer.routing.two.pairs)) {}

  Tensor u, u_bias, v;
};

// The four tensors of a vertical mix, by pair.
struct MixTensors {
  MixTensors(const Tensor& like1, const Tensor& like2)
      : own1(at::empty_like(like1)), cross1(at::empty_like(like1)), own2(at::empty_like(like2)),
        cross2(at::empty_like(like2)) {}
  template <class C>
  VerticalMix<C> written() const {
    return {write<C>(own1), write<C>(cross1), write<C>(own2), write<C>(cross2)};
  }
  template <class C>
  VerticalMix<const C> given() const {
    return {read<C>(own1), read<C>(cross1), read<C>(own2), read<C>(cross2)};
  }

  Tensor own1, cross1, own2, cross2;
};

template <class C>
void bias_gradient(const SideTensors& side, const Tensor& ds, const Tensor& dbias) {
  const Tensor sums = dbias.scalar_type() == ds.scalar_type() ? dbias : at::empty(dbias.sizes(), ds.options());
  run(cpu::BiasGradient<C>{side.pairs, read<C>(ds), ds.size(1), write<C>(sums)});
  if (!sums.is_same(dbias)) dbias.copy_(sums);
}

// ---- the device

class Cpu {
 public:
  using Word = cpu::Word;

  explicit Cpu(const Tensor&) {}
  template <class P>
  void run(const P& p) const {
    cpu::run(p);
  }
  static int64_t moment_chunks(int64_t tokens) { return cpu::moment_chunks(tokens); }
  static int64_t read_back(const Tensor& numbers, int64_t index) { return read<int32_t>(numbers)[index]; }

  // Of a router's logits only the active ones have a gradient, 2% of them. Where few are not 0, they alone are
  // multiplied.
  static TwoTensors router_logits_backward(const Tensor& dz, const Tensor& x, const Tensor& weight) {
    return with_type(x, [&](auto zero) {
      using S = decltype(zero);
      using C = Accumulator<S>;
      const cpu::SparseRows<C> sparse(read<C>(dz), dz.size(0), dz.size(1));
      if (sparse.count() > dz.numel() / kDenseShare) return dense_router_logits_backward(dz, x, weight);
      const Tensor dx = at::empty_like(x), dweight = at::empty_like(weight);
      cpu::run(cpu::SparseProduct<S>{
          x.size(0), sparse.row_start(), sparse.column(), sparse.values(), read_rows<S>(weight), x.size(1),
          write_rows<S>(dx)});
      const cpu::SparseGroups<C> groups(sparse);
      cpu::run<WeightGradient, S>(
          {{groups.pairs(), groups.values(), read_rows<S>(x), 1, x.size(1), write<S>(dweight), false}});
      return TwoTensors(dx, dweight);
    });
  }

  template <class S>
  void vertical(S, const Layer& layer, const Tensor& out, const Tensor& s1, const Tensor& s2) const {
    using C = Accumulator<S>;
    const SideTensors &one = layer.routing.one, &two = layer.routing.two;
    const VerticalWeights<S> w(layer);
    const Rows<const S> x = read_rows<S>(layer.x);
    cpu::run<Projection, S>(
        {projection(one, x, w.u1, &w.u1_bias, s1), projection(two, x, w.u2, &w.u2_bias, s2)});
    const MixTensors mix(s1, s2);
    run(MixVertical<C>{layer.routing.routing<C>(), layer.units, read<C>(s1), read<C>(s2), mix.written<C>()});
    const int64_t half = layer.width() / 2;
    cpu::run<Combination, S>({
        combination(term<S>(one, mix.own1, w.v11), term<S>(one, mix.cross1, w.v12), half, write_rows<S>(out)),
        combination(term<S>(two, mix.cross2, w.v21), term<S>(two, mix.own2, w.v22), half, write_rows<S>(out, half))});
  }

  template <class S>
  void vertical_backward(
      S, const Layer& layer, const Tensor& dout, const Tensor& s1, const Tensor& s2, LayerGradients& gradients) const {
    using C = Accumulator<S>;
    const SideTensors &one = layer.routing.one, &two = layer.routing.two;
    const VerticalWeights<S> w(layer);
    const int64_t half = layer.width() / 2;
    const Rows<const S> x = read_rows<S>(layer.x), left = read_rows<S>(dout), right = read_rows<S>(dout, half);
    const MixTensors dmix(s1, s2), mix(s1, s2);
    cpu::run<Projection, S>({
        projection(one, left, w.v11, nullptr, dmix.own1), projection(one, left, w.v12, nullptr, dmix.cross1),
        projection(two, right, w.v21, nullptr, dmix.cross2), projection(two, right, w.v22, nullptr, dmix.own2)});
    const Tensor ds1 = at::empty_like(s1), ds2 = at::empty_like(s2);
    run(MixVerticalBackward<C>{
        .routing = layer.routing.routing<C>(), .units = layer.units, .s1 = read<C>(s1), .s2 = read<C>(s2),
        .dmix = dmix.given<C>(), .mix = mix.written<C>(), .ds1 = write<C>(ds1), .ds2 = write<C>(ds2),
        .dgates1 = write<C>(gradients.gates1), .dgates2 = write<C>(gradients.gates2)});
    cpu::run<Combination, S>({combination(
        term<S>(one, ds1, w.u1), term<S>(two, ds2, w.u2), layer.width(), write_rows<S>(gradients.x))});
    const std::vector<Tensor>& dw = gradients.weights;
    cpu::run<WeightGradient, S>({
        input_gradient(one, ds1, x, dw[kU1]), input_gradient(two, ds2, x, dw[kU2]),
        output_gradient(one, mix.own1, left, dw[kV11]), output_gradient(one, mix.cross1, left, dw[kV12]),
        output_gradient(two, mix.cross2, right, dw[kV21]), output_gradient(two, mix.own2, right, dw[kV22])});
    bias_gradient<C>(one, ds1, dw[kU1Bias]);
    bias_gradient<C>(two, ds2, dw[kU2Bias]);
  }

  template <class S>
  void horizontal(S, const Layer& layer, const Tensor& out, const Tensor& s1) const {
    using C = Accumulator<S>;
    const SideTensors &one = layer.routing.one, &two = layer.routing.two;
    const HorizontalWeights<S> w(layer);
    cpu::run<Projection, S>({projection(one, read_rows<S>(layer.x), w.u, &w.u_bias, s1)});
    const Tensor y = two.by_pair(layer.units);
    run(MixHorizontal<C>{layer.routing.routing<C>(), layer.units, read<C>(s1), write<C>(y)});
    cpu::run<Combination, S>({combination(term<S>(two, y, w.v), layer.width(), write_rows<S>(out))});
  }

  template <class S>
  void horizontal_backward(
      S, const Layer& layer, const Tensor& dout, const Tensor& s1, LayerGradients& gradients) const {
    using C = Accumulator<S>;
    const SideTensors &one = layer.routing.one, &two = layer.routing.two;
    const HorizontalWeights<S> w(layer);
    const Rows<const S> x = read_rows<S>(layer.x), d = read_rows<S>(dout);
    const Tensor dy = two.by_pair(layer.units), y = two.by_pair(layer.units), ds1 = at::empty_like(s1);
    cpu::run<Projection, S>({projection(two, d, w.v, nullptr, dy)});
    run(MixHorizontalBackward<C>{
        .routing = layer.routing.routing<C>(), .units = layer.units, .s1 = read<C>(s1), .dy = read<C>(dy),
        .y = write<C>(y), .ds1 = write<C>(ds1), .dgates1 = write<C>(gradients.gates1),
        .dgates2 = write<C>(gradients.gates2)});
    cpu::run<Combination, S>({combination(term<S>(one, ds1, w.u), layer.width(), write_rows<S>(gradients.x))});
    const std::vector<Tensor>& dw = gradients.weights;
    cpu::run<WeightGradient, S>({input_gradient(one, ds1, x, dw[kU]), output_gradient(two, y, d, dw[kV])});
    bias_gradient<C>(one, ds1, dw[kUBias]);
  }

  template <class S>
  void bias(S, const SideTensors& side, const Tensor& rows, const Tensor& out) const {
    using C = Accumulator<S>;
    const Tensor totals = side.by_pair(1), expert = at::empty({side.pairs.count}, rows.options().dtype(at::kInt));
    run(cpu::GateTotalsByToken<C>{side.side<C>(), write<C>(totals), write<int32_t>(expert)});
    run(cpu::SparseProduct<S>{
        side.pairs.tokens, side.pairs.row_start, read<int32_t>(expert), read<C>(totals), read_rows<S>(rows),
        rows.size(1), write_rows<S>(out)});
  }

  template <class S>
  void bias_backward(
      S, const SideTensors& side, const Tensor& rows, const Tensor& dout, const Tensor& dgates,
      const Tensor& db) const {
    using C = Accumulator<S>;
    const Tensor totals = side.by_pair(1), dtotals = side.by_pair(1);
    run(GateTotals<C>{side.side<C>(), write<C>(totals)});
    cpu::run<Projection, S>({projection(side, read_rows<S>(dout), rows, nullptr, dtotals)});
    run(GateTotalsBackward<C>{side.side<C>(), read<C>(dtotals), write<C>(dgates)});
    cpu::run<WeightGradient, S>({input_gradient(side, totals, read_rows<S>(dout), db)});
  }
};

// ---- visits of the active experts: of the CPU alone

template <class T, class Pointed = T>
Pointed* tally_of(const Tensor& tensor, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(
      tensor.sizes() == sizes && tensor.scalar_type() == c10::CppTypeToScalarType<T>::value && tensor.is_contiguous(),
      "the ", name, " of a tally must be ", sizes, ", contiguous, of type ", c10::CppTypeToScalarType<T>::value);
  return reinterpret_cast<Pointed*>(write<T>(tensor));
}

cpu::Tally tally_tensors(TensorList tally, int64_t experts) {
  TORCH_CHECK(tally.size() == 11, "a tally has 11 tensors, not ", tally.size());
  const int64_t rows = experts * experts, slots = tally[4].size(-1);
  TORCH_CHECK(slots == 0 || slots == cpu::kSlots, "a tally has 0 or ", cpu::kSlots, " slots, not ", slots);
  cpu::Tally p{};
  p.total = tally_of<double>(tally[0], {rows}, "total");
  p.square = tally_of<double>(tally[1], {rows}, "square");
  p.count = tally_of<int32_t>(tally[2], {rows}, "count");
  p.histogram = tally_of<int64_t>(tally[3], {rows, cpu::kHistogramBins}, "histogram");
  if (slots == 0) return p;
  p.score = tally_of<float>(tally[4], {rows, slots}, "score");
  p.hash = tally_of<int64_t, uint64_t>(tally[5], {rows, slots}, "hash");
  p.place = tally_of<int64_t>(tally[6], {rows, slots}, "place");
  p.contribution = tally_of<float>(tally[7], {rows, slots}, "contribution");
  p.scores = tally_of<at::Half, uint16_t>(tally[8], {rows, slots, cpu::kContext}, "scores");
  p.strong_bar = tally_of<float>(tally[9], {rows}, "strong_bar");
  p.sample_bar = tally_of<int64_t, uint64_t>(tally[10], {rows}, "sample_bar");
  return p;
}

// The pre-activations of one side in one layer, by pair: relu^2 of them is what its half-experts hold.
Tensor pre_activations(const SideTensors& side, const Tensor& x, const Tensor& u, const Tensor& c) {
  const int64_t experts = side.pairs.experts, d = x.size(1);
  TORCH_CHECK(
      u.dim() == 3 && u.size(0) == experts && u.size(2) == d && u.is_contiguous() && c.is_contiguous() &&
          c.sizes() == u.sizes().slice(0, 2),
      "the input weights of a reader must be [", experts, ", units, ", d, "] with biases [", experts, ", units]");
  const Tensor s = side.by_pair(u.size(1)), rows = u.view({-1, d});
  if (u.size(1) > 0) cpu::run<Projection, float>({projection(side, read_rows<float>(x), rows, &c, s)});
  return s;
}

// Readers over the tokens of a unit, and the pre-activations that they point to.
struct ReadersOfUnit {
  static constexpr size_t kTensors = 6;

  ReadersOfUnit(const SideTensors& one, const SideTensors& two, TensorList inputs, TensorList parts) {
    TORCH_CHECK(parts.size() == inputs.size() * kTensors, "every input has a reader of ", kTensors, " tensors");
    for (const Tensor& part : parts) TORCH_CHECK(part.scalar_type() == at::kFloat, "a reader is in fp32");
    for (size_t layer = 0; layer < inputs.size(); ++layer)
      add(one, two, inputs[layer], parts.slice(layer * kTensors, kTensors));
  }
  void add(const SideTensors& one, const SideTensors& two, const Tensor& x, TensorList part) {
    TORCH_CHECK(
        x.dim() == 2 && x.size(0) == one.pairs.tokens && x.scalar_type() == at::kFloat && x.is_contiguous(),
        "an input must be contiguous fp32, [", one.pairs.tokens, ", width]");
    const Tensor s1 = pre_activations(one, x, part[0], part[1]), s2 = pre_activations(two, x, part[2], part[3]);
    const int64_t n = s1.size(1) + s2.size(1) + 1, experts = one.pairs.experts;
    for (const Tensor& gram : part.slice(4))
      TORCH_CHECK(
          gram.sizes() == at::IntArrayRef({experts, n, n}) && gram.is_contiguous(), "a gram must be [", experts, ", ",
          n, ", ", n, "]");
    kept.insert(kept.end(), {s1, s2});
    readers.push_back(
        {read<float>(s1), read<float>(s2), s1.size(1), s2.size(1), read<float>(part[4]), read<float>(part[5])});
  }

  std::vector<Tensor> kept;
  std::vector<cpu::Reader> readers;
};

void visit_experts(
    const Tensor& gates1, Layout layout1, const Tensor& gates2, Layout layout2, int64_t experts, int64_t tokens,
    const Tensor& hashes, int64_t unit, TensorList inputs, TensorList readers, TensorList tally) {
  TORCH_CHECK(gates1.scalar_type() == at::kFloat && gates2.scalar_type() == at::kFloat, "gates must be fp32");
  const SideTensors one(gates1, layout1, experts), two(gates2, layout2, experts);
  TORCH_CHECK(one.heads() == two.heads(), "the two sides have different numbers of heads");
  TORCH_CHECK(one.pairs.tokens == two.pairs.tokens, "the two sides have different numbers of tokens");
  TORCH_CHECK(0 <= tokens && tokens <= one.pairs.tokens, tokens, " tokens of ", one.pairs.tokens);
  TORCH_CHECK(tokens <= cpu::kUnitPlaces && unit >= 0, "a unit has a number and at most ", cpu::kUnitPlaces, " tokens");
  TORCH_CHECK(
      hashes.scalar_type() == at::kLong && hashes.dim() == 1 && hashes.size(0) >= tokens && hashes.is_contiguous(),
      "hashes must be contiguous int64, one per token");
  const cpu::Tally sums = tally_tensors(tally, experts);
  const bool with_contexts = sums.score != nullptr;
  const ReadersOfUnit made(one, two, with_contexts ? inputs : TensorList{}, with_contexts ? readers : TensorList{});
  cpu::run(cpu::Visit{
      one.side<float>(), two.side<float>(), tokens, reinterpret_cast<const uint64_t*>(read<int64_t>(hashes)), unit,
      made.readers.data(), static_cast<int64_t>(made.readers.size()), sums});
}

std::string instruction_set() { return cpu::instruction_set(); }
bool select_instruction_set(const std::string& name) { return cpu::select_instruction_set(name.c_str()); }

}  // namespace
}  // namespace monet

TORCH_LIBRARY_IMPL(MONET_LIBRARY, CPU, m) {
  monet::register_operations<monet::Cpu>(m);
  m.impl("visit_experts", &monet::visit_experts);
}

// These have no tensor that would tell a device.
TORCH_LIBRARY_IMPL(MONET_LIBRARY, CatchAll, m) {
  m.impl("instruction_set", &monet::instruction_set);
  m.impl("select_instruction_set", &monet::select_instruction_set);
}
