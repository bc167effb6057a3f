// torch.ops.monet on a GPU: what is its own of implementation.h. Dense products go to the framework (cuBLAS), what
// lies between them to the kernels of csrc/cuda. Device and stream are reached through the framework's interface for
// all devices, so that this file compiles against a framework without CUDA; the tests run it on the CPU, with the
// kernels emulated.
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>

#include "../cuda/kernels.h"
#include "implementation.h"

#ifndef MONET_CUDA_DEVICE
#define MONET_CUDA_DEVICE CUDA
#endif

namespace monet {
namespace {

using cuda::Dense;
using cuda::Product;

// A matrix whose rows hold the units of all half-experts `operands` times.
template <class S>
Dense<S> write_dense(const Tensor& tensor, int operands) {
  return {write<S>(tensor), operands};
}
template <class S>
Dense<const S> read_dense(const Tensor& tensor, int operands) {
  return {read<S>(tensor), operands};
}
template <class S>
Product<S> product(const Tensor& tensor, const Tensor& bias) {
  return {read<S>(tensor), read<S>(bias)};
}

// Whether the kernels of decoding serve: the rows of half-experts that they read lie in memory only where output
// weights are stored by columns. Others go through the dense products.
bool decodes(const Layer& layer, size_t first_output) {
  if (layer.x.size(0) >= kDecodeTokens) return false;
  for (const Tensor& v : layer.weights.slice(first_output))
    if (!v.t().is_contiguous()) return false;
  return true;
}

// The gradient of the linear map y = x w^T with respect to w.
void weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dw) {
  Tensor out = dw;
  at::mm_out(out, dy.t(), x);
}

class Cuda {
 public:
  using Word = cuda::Word;

  explicit Cuda(const Tensor& tensor) : guard_(tensor.device()) {
    if (tensor.is_cuda())
      stream_ = c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
  }
  template <class P>
  void run(const P& p) const {
    cuda::run(p, stream_);
  }
  static int64_t moment_chunks(int64_t tokens) { return cuda::moment_chunks(tokens); }
  // Waits for the device.
  static int64_t read_back(const Tensor& numbers, int64_t index) { return numbers.select(0, index).item<int32_t>(); }

  // Dense, though only active logits have a gradient: gathering the rows of these costs more.
  static TwoTensors router_logits_backward(const Tensor& dz, const Tensor& x, const Tensor& weight) {
    return dense_router_logits_backward(dz, x, weight);
  }

  template <class S>
  void vertical(S, const Layer& layer, const Tensor& out, const Tensor& s1, const Tensor& s2) const {
    using C = Accumulator<S>;
    const Tensor &x = layer.x, u1 = layer.weights[kU1].contiguous(), u2 = layer.weights[kU2].contiguous();
    const Tensor bias1 = layer.weights[kU1Bias].contiguous(), bias2 = layer.weights[kU2Bias].contiguous();
    const Tensor &v11 = layer.weights[kV11], &v12 = layer.weights[kV12];
    const Tensor &v21 = layer.weights[kV21], &v22 = layer.weights[kV22];
    const SideTensors &one = layer.routing.one, &two = layer.routing.two;
    const int64_t half = layer.width() / 2;
    if (decodes(layer, kV11)) {
      const Tensor own1 = at::empty_like(s1), cross1 = at::empty_like(s1);
      const Tensor own2 = at::empty_like(s2), cross2 = at::empty_like(s2);
      run(projection<S>(one, x, u1, bias1, s1));
      run(projection<S>(two, x, u2, bias2, s2));
      run(MixVertical<C>{
          layer.routing.routing<C>(), layer.units, read<C>(s1), read<C>(s2),
          {write<C>(own1), write<C>(cross1), write<C>(own2), write<C>(cross2)}});
      run(Combination<S>{{term<S>(one, own1, v11), term<S>(one, cross1, v12)}, 2, half, write_rows<S>(out)});
      run(Combination<S>{{term<S>(two, cross2, v21), term<S>(two, own2, v22)}, 2, half, write_rows<S>(out, half)});
      return;
    }
    const Tensor product1 = at::mm(x, u1.t()), product2 = at::mm(x, u2.t());
    const Tensor mix1 = at::empty({x.size(0), 2 * u1.size(0)}, x.options()), mix2 = at::empty_like(mix1);
    run(cuda::DenseMixVertical<S>{
        .routing = layer.routing.routing<C>(), .units = layer.units, .product1 = product<S>(product1, bias1),
        .product2 = product<S>(product2, bias2), .s1 = write<C>(s1), .s2 = write<C>(s2),
        .mix1 = write_dense<S>(mix1, 2), .mix2 = write_dense<S>(mix2, 2)});
    Tensor left = out.narrow(1, 0, half), right = out.narrow(1, half, half);
    at::mm_out(left, mix1, at::cat({v11, v12}, 1).t());
    at::mm_out(right, mix2, at::cat({v22, v21}, 1).t());
  }

  template <class S>
  void vertical_backward(
      S, const Layer& layer, const Tensor& dout, const Tensor& s1, const Tensor& s2, LayerGradients& gradients) const {
    using C = Accumulator<S>;
    const TensorList w = layer.weights;
    const int64_t half = layer.width() / 2, inner = layer.units * layer.experts();
    const Tensor left = dout.narrow(1, 0, half), right = dout.narrow(1, half, half);
    const Tensor dmix1 = at::mm(left, at::cat({w[kV11], w[kV12]}, 1));
    const Tensor dmix2 = at::mm(right, at::cat({w[kV22], w[kV21]}, 1));
    const Tensor mix1 = at::empty_like(dmix1), mix2 = at::empty_like(dmix2), ds = at::empty_like(dmix1);
    const Tensor ds1 = at::empty_like(s1), ds2 = at::empty_like(s2);
    run(cuda::DenseMixVerticalBackward<S>{
        .routing = layer.routing.routing<C>(), .units = layer.units, .s1 = read<C>(s1), .s2 = read<C>(s2),
        .dmix1 = read_dense<S>(dmix1, 2), .dmix2 = read_dense<S>(dmix2, 2), .mix1 = write_dense<S>(mix1, 2),
        .mix2 = write_dense<S>(mix2, 2), .ds = write_dense<S>(ds, 2), .ds1 = write<C>(ds1), .ds2 = write<C>(ds2),
        .dgates1 = write<C>(gradients.gates1), .dgates2 = write<C>(gradients.gates2)});
    const auto operand = [&](const Tensor& dense, int64_t index) { return dense.narrow(1, index * inner, inner); };
    const std::vector<Tensor>& dw = gradients.weights;
    at::mm_out(gradients.x, ds, at::cat({w[kU1], w[kU2]}, 0));
    weight_gradient(operand(ds, 0), layer.x, dw[kU1]);
    weight_gradient(operand(ds, 1), layer.x, dw[kU2]);
    weight_gradient(left, operand(mix1, 0), dw[kV11]);
    weight_gradient(left, operand(mix1, 1), dw[kV12]);
    weight_gradient(right, operand(mix2, 1), dw[kV21]);
    weight_gradient(right, operand(mix2, 0), dw[kV22]);
    bias_gradient<C>(layer.routing.one, ds1, dw[kU1Bias]);
    bias_gradient<C>(layer.routing.two, ds2, dw[kU2Bias]);
  }

  template <class S>
  void horizontal(S, const Layer& layer, const Tensor& out, const Tensor& s1) const {
    using C = Accumulator<S>;
    const Tensor &x = layer.x, u = layer.weights[kU].contiguous(), bias = layer.weights[kUBias].contiguous();
    const SideTensors &one = layer.routing.one, &two = layer.routing.two;
    if (decodes(layer, kV)) {
      const Tensor y = two.by_pair(layer.units);
      run(projection<S>(one, x, u, bias, s1));
      run(MixHorizontal<C>{layer.routing.routing<C>(), layer.units, read<C>(s1), write<C>(y)});
      run(Combination<S>{{term<S>(two, y, layer.weights[kV])}, 1, layer.width(), write_rows<S>(out)});
      return;
    }
    const Tensor product1 = at::mm(x, u.t()), y = at::empty_like(product1);
    run(cuda::DenseMixHorizontal<S>{
        layer.routing.routing<C>(), layer.units, product<S>(product1, bias), write<C>(s1), write_dense<S>(y, 1)});
    Tensor into = out;
    at::mm_out(into, y, layer.weights[kV].t());
  }

  template <class S>
  void horizontal_backward(
      S, const Layer& layer, const Tensor& dout, const Tensor& s1, LayerGradients& gradients) const {
    using C = Accumulator<S>;
    const Tensor dy = at::mm(dout, layer.weights[kV]);
    const Tensor y = at::empty_like(dy), ds = at::empty_like(dy), ds1 = at::empty_like(s1);
    run(cuda::DenseMixHorizontalBackward<S>{
        .routing = layer.routing.routing<C>(), .units = layer.units, .s1 = read<C>(s1), .dy = read_dense<S>(dy, 1),
        .y = write_dense<S>(y, 1), .ds = write_dense<S>(ds, 1), .ds1 = write<C>(ds1),
        .dgates1 = write<C>(gradients.gates1), .dgates2 = write<C>(gradients.gates2)});
    const std::vector<Tensor>& dw = gradients.weights;
    at::mm_out(gradients.x, ds, layer.weights[kU]);
    weight_gradient(ds, layer.x, dw[kU]);
    weight_gradient(dout, y, dw[kV]);
    bias_gradient<C>(layer.routing.one, ds1, dw[kUBias]);
  }

  // For many tokens a dense product over all half-experts reads the rows once for all of them.
  template <class S>
  void bias(S, const SideTensors& side, const Tensor& rows, const Tensor& out) const {
    using C = Accumulator<S>;
    if (side.pairs.tokens < kDecodeTokens) {
      const Tensor totals = side.by_pair(1);
      run(GateTotals<C>{side.side<C>(), write<C>(totals)});
      run(Combination<S>{
          {{side.pairs, read<C>(totals), read_rows<S>(rows), 1}}, 1, rows.size(1), write_rows<S>(out)});
      return;
    }
    const Tensor totals = at::empty({side.pairs.tokens, side.pairs.experts}, rows.options());
    run(cuda::DenseGateTotals<S>{side.side<C>(), write_dense<S>(totals, 1)});
    Tensor into = out;
    at::mm_out(into, totals, rows);
  }

  template <class S>
  void bias_backward(
      S, const SideTensors& side, const Tensor& rows, const Tensor& dout, const Tensor& dgates,
      const Tensor& db) const {
    using C = Accumulator<S>;
    const Tensor dtotals = at::mm(dout, rows.t()), totals = at::empty_like(dtotals);
    run(cuda::DenseGateTotals<S>{side.side<C>(), write_dense<S>(totals, 1)});
    run(cuda::DenseGateTotalsBackward<S>{side.side<C>(), read_dense<S>(dtotals, 1), write<C>(dgates)});
    weight_gradient(totals, dout, db);
  }

 private:
  // In decoding. Output weights are stored by columns: their rows by half-expert are contiguous.
  template <class S>
  static Projection<S> projection(
      const SideTensors& side, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& out) {
    return {side.pairs, read_rows<S>(x), read_rows<S>(w), read<S>(bias), out.size(1), w.size(1),
            write<Accumulator<S>>(out)};
  }
  template <class S>
  static Term<S> term(const SideTensors& side, const Tensor& y, const Tensor& v) {
    return {side.pairs, read<Accumulator<S>>(y), read_rows<S>(v.t()), y.size(1)};
  }

  template <class C>
  void bias_gradient(const SideTensors& side, const Tensor& ds, const Tensor& dbias) const {
    const int64_t units = ds.size(1);
    const Tensor sums = at::empty({units, side.pairs.experts}, ds.options());
    run(SumOverTokens<C>{{side.pairs, read<C>(ds), units}, write<C>(sums)});
    dbias.view({side.pairs.experts, units}).copy_(sums.t());
  }

  c10::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace
}  // namespace monet

TORCH_LIBRARY_IMPL(MONET_LIBRARY, MONET_CUDA_DEVICE, m) { monet::register_operations<monet::Cuda>(m); }
