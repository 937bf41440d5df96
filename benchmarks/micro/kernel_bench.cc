// Speed of the CPU kernels on the shapes of GPT-2 124M: one table, GFLOP/s or GB/s.
//
//   stretto-kernel-bench [threads = 2] [tokens = 256] [f32 | bf16 | f64] [repetitions = 7]
//
// Linear layers stand beside plain OpenBLAS calls on the same operands, cut by hand into equal
// column ranges (row ranges for the weight gradient) on as many threads: "blas" is that floor and
// "ratio" our speed over it. Both are measured alternately in one run, the best repetition counts,
// so a busy machine disturbs them alike. Attention, activations, norm, loss and optimizer have the
// machine as floor: the bytes that they must move, or the multiplications that they must do.
#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "stretto/core/arena.h"
#include "stretto/core/exit_code.h"
#include "stretto/ops/ops.h"

namespace {

using stretto::AccumulateType;
using stretto::DType;
using stretto::Tensor;
namespace ops = stretto::ops;

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Bench {
 public:
  Bench(int threads, int64_t tokens, DType dtype, int repetitions)
      : threads_(threads), tokens_(tokens), dtype_(dtype), repetitions_(repetitions) {}

  absl::Status Start() {
    stretto::StreamOptions options;
    options.threads = threads_;
    STRETTO_ASSIGN_OR_RETURN(stream_, stretto::Stream::Create(stretto::Device::Cpu(), options));
    STRETTO_ASSIGN_OR_RETURN(const auto* kernels, stretto::KernelsFor(stretto::Device::Cpu()));
    context_ = {stream_.get(), kernels};
    openblas_set_num_threads(1);
    return absl::OkStatus();
  }

  absl::Status Run() {
    absl::PrintF("%s, %d threads, %d tokens, OpenBLAS kernels %s\n", stretto::Name(dtype_),
                 threads_, tokens_, openblas_get_corename());
    absl::PrintF("%-24s %10s %12s %10s %8s\n", "kernel", "ms", "rate", "blas", "ratio");
    struct {
      const char* name;
      int64_t in, out;
    } const layers[] = {{"qkv", 768, 2304},
                        {"out", 768, 768},
                        {"fc", 768, 3072},
                        {"proj", 3072, 768},
                        {"head", 768, 50257}};
    for (const auto& layer : layers)
      STRETTO_RETURN_IF_ERROR(Linear(layer.name, layer.in, layer.out));
    STRETTO_RETURN_IF_ERROR(Attention(64));
    STRETTO_RETURN_IF_ERROR(Attention(tokens_));
    STRETTO_RETURN_IF_ERROR(Attention(1024));
    STRETTO_RETURN_IF_ERROR(Rows());
    STRETTO_RETURN_IF_ERROR(Optimizer());
    return stream_->Synchronize();
  }

 private:
  // A tensor of small numbers; lives until the next Clear().
  absl::StatusOr<Tensor> Make(DType dtype, std::initializer_list<int64_t> dims) {
    Tensor t = Tensor::Of(nullptr, dtype, dims);
    STRETTO_ASSIGN_OR_RETURN(
        auto arena, stretto::Arena::Create(stretto::Device::Cpu(), "bench", t.bytes() + 64, true));
    t.data = arena.data();
    arenas_.push_back(std::move(arena));
    for (int64_t i = 0; i < t.elements(); ++i) {
      const float x = static_cast<float>((i * 7919) % 1000) / 1000.0f - 0.5f;
      if (dtype == DType::kF32) t.as<float>()[i] = x;
      if (dtype == DType::kF64) t.as<double>()[i] = x;
      if (dtype == DType::kBF16) t.as<stretto::BFloat16>()[i] = stretto::BFloat16(x);
    }
    return t;
  }

  // Best time of each body, run in turns.
  std::vector<double> Times(const std::vector<std::function<void()>>& bodies) {
    std::vector<double> best(bodies.size(), 1e30);
    for (int r = 0; r <= repetitions_; ++r) {
      for (size_t i = 0; i < bodies.size(); ++i) {
        const double start = Seconds();
        bodies[i]();
        if (r > 0) best[i] = std::min(best[i], Seconds() - start);  // the first one warms up
      }
    }
    return best;
  }
  double Time(const std::function<void()>& body) { return Times({body})[0]; }

  static void Print(const std::string& name, double seconds, double work, const char* unit) {
    absl::PrintF("%-24s %10.3f %6.1f %-5s\n", name, 1e3 * seconds, work / seconds / 1e9, unit);
  }

  // C [m, n] = op(A) op(B) over equal ranges of columns or rows, f32 only.
  void PlainBlas(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                 const float* b, int64_t ldb, float* c, bool columns) {
    stream_->pool().ParallelFor(columns ? n : m, 48, [&](int64_t begin, int64_t end, int) {
      const int64_t i = columns ? 0 : begin;
      const int64_t j = columns ? begin : 0;
      cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
                  columns ? m : end - begin, columns ? end - begin : n, k, 1.0f,
                  a + (ta ? i : i * lda), lda, b + (tb ? j * ldb : j), ldb, 0.0f, c + i * n + j, n);
    });
  }

  absl::Status Linear(const std::string& name, int64_t in, int64_t out) {
    arenas_.clear();
    const DType wide = AccumulateType(dtype_);
    STRETTO_ASSIGN_OR_RETURN(Tensor x, Make(dtype_, {tokens_, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor w, Make(dtype_, {out, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor bias, Make(dtype_, {out}));
    STRETTO_ASSIGN_OR_RETURN(Tensor y, Make(dtype_, {tokens_, out}));
    STRETTO_ASSIGN_OR_RETURN(Tensor dx, Make(dtype_, {tokens_, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor dw, Make(wide, {out, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor db, Make(wide, {out}));
    STRETTO_ASSIGN_OR_RETURN(Tensor fx, Make(DType::kF32, {tokens_, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor fw, Make(DType::kF32, {out, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor fy, Make(DType::kF32, {tokens_, out}));
    STRETTO_ASSIGN_OR_RETURN(Tensor fdx, Make(DType::kF32, {tokens_, in}));
    STRETTO_ASSIGN_OR_RETURN(Tensor fdw, Make(DType::kF32, {out, in}));
    const float* px = fx.as<float>();
    const float* pw = fw.as<float>();
    float* py = fy.as<float>();
    const auto row = [&](const char* what, const std::function<void()>& ours,
                         const std::function<void()>& plain) {
      const std::vector<double> t = Times({ours, plain});
      const double flops = 2.0 * tokens_ * in * out;
      absl::PrintF("%-24s %10.3f %6.1f GF/s %10.1f %8.2f\n", name + " " + what, 1e3 * t[0],
                   flops / t[0] / 1e9, flops / t[1] / 1e9, t[1] / t[0]);
    };
    row(
        "forward", [&] { ops::Linear(context_, y, x, w, bias); },
        [&] { PlainBlas(false, true, tokens_, out, in, px, in, pw, in, py, true); });
    row(
        "backward input", [&] { ops::LinearBackwardInput(context_, dx, y, w, false); },
        [&] { PlainBlas(false, false, tokens_, in, out, py, out, pw, in, fdx.as<float>(), true); });
    row(
        "backward weight", [&] { ops::LinearBackwardWeight(context_, dw, db, y, x, true); },
        [&] { PlainBlas(true, false, out, in, tokens_, py, out, px, in, fdw.as<float>(), false); });
    return stream_->status();
  }

  // 12 heads of 64, causal, sequences of `length` tokens; at least `tokens_` tokens in all. Counts
  // the multiplications below the diagonal only.
  absl::Status Attention(int64_t length) {
    arenas_.clear();
    const int64_t sequences = std::max<int64_t>(1, tokens_ / length);
    const int64_t tokens = sequences * length;
    STRETTO_ASSIGN_OR_RETURN(Tensor qkv, Make(dtype_, {tokens, 3 * 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor dqkv, Make(dtype_, {tokens, 3 * 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor o, Make(dtype_, {tokens, 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor d_o, Make(dtype_, {tokens, 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor lse, Make(AccumulateType(dtype_), {tokens, 12}));
    STRETTO_ASSIGN_OR_RETURN(Tensor delta, Make(AccumulateType(dtype_), {tokens, 12}));
    STRETTO_ASSIGN_OR_RETURN(Tensor cu, Make(DType::kI32, {sequences + 1}));
    for (int64_t i = 0; i <= sequences; ++i) cu.as<int32_t>()[i] = static_cast<int32_t>(i * length);
    const auto part = [](const Tensor& t, int i) { return t.Columns(i * 768, 768).Heads(12); };
    const stretto::AttentionShape shape = {cu, cu, length, length, true, 0.125};
    const double flops = 2.0 * 2.0 * 12 * 64 * sequences * length * (length + 1) / 2;
    const std::string name = absl::StrFormat("attention %dx%d", sequences, length);
    Print(name + " fwd", Time([&] {
            ops::Attention(context_, o.Heads(12), lse, part(qkv, 0), part(qkv, 1), part(qkv, 2),
                           shape);
          }),
          flops, "GF/s");
    Print(name + " bwd", Time([&] {
            ops::AttentionBackward(context_, part(dqkv, 0), part(dqkv, 1), part(dqkv, 2), delta,
                                   d_o.Heads(12), o.Heads(12), lse, part(qkv, 0), part(qkv, 1),
                                   part(qkv, 2), shape);
          }),
          2.5 * flops, "GF/s");
    return stream_->status();
  }

  absl::Status Rows() {
    arenas_.clear();
    const DType wide = AccumulateType(dtype_);
    const double size = static_cast<double>(SizeOf(dtype_));
    STRETTO_ASSIGN_OR_RETURN(Tensor x, Make(dtype_, {tokens_, 3072}));
    STRETTO_ASSIGN_OR_RETURN(Tensor y, Make(dtype_, {tokens_, 3072}));
    STRETTO_ASSIGN_OR_RETURN(Tensor dx, Make(dtype_, {tokens_, 3072}));
    const double wide_bytes = size * tokens_ * 3072;
    Print("gelu fwd", Time([&] { ops::Gelu(context_, y, x); }), 2 * wide_bytes, "GB/s");
    Print("gelu bwd", Time([&] { ops::GeluBackward(context_, dx, y, x, false); }), 3 * wide_bytes,
          "GB/s");

    STRETTO_ASSIGN_OR_RETURN(Tensor h, Make(dtype_, {tokens_, 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor r, Make(dtype_, {tokens_, 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor n, Make(dtype_, {tokens_, 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor dn, Make(dtype_, {tokens_, 768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor w, Make(dtype_, {768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor dw, Make(wide, {768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor db, Make(wide, {768}));
    STRETTO_ASSIGN_OR_RETURN(Tensor mean, Make(wide, {tokens_}));
    STRETTO_ASSIGN_OR_RETURN(Tensor rstd, Make(wide, {tokens_}));
    const double bytes = size * tokens_ * 768;
    Print("layernorm + residual fwd",
          Time([&] { ops::Norm(context_, n, h, mean, rstd, r, dn, w, w, 1e-5); }), 4 * bytes,
          "GB/s");
    Print("layernorm bwd input",
          Time([&] { ops::NormBackwardInput(context_, dn, n, h, mean, rstd, w, true); }), 4 * bytes,
          "GB/s");
    Print("layernorm bwd weight",
          Time([&] { ops::NormBackwardWeight(context_, dw, db, n, h, mean, rstd, true); }),
          2 * bytes, "GB/s");

    STRETTO_ASSIGN_OR_RETURN(Tensor logits, Make(dtype_, {tokens_, 50257}));
    STRETTO_ASSIGN_OR_RETURN(Tensor state, Make(wide, {tokens_, 3}));
    STRETTO_ASSIGN_OR_RETURN(Tensor targets, Make(DType::kI32, {tokens_}));
    const double logit_bytes = size * tokens_ * 50257;
    Print("loss fold", Time([&] { ops::LossFold(context_, state, logits, targets, 0, true); }),
          logit_bytes, "GB/s");
    Print("loss bwd", Time([&] { ops::LossBackward(context_, logits, state, targets, {}, 0); }),
          2 * logit_bytes, "GB/s");
    STRETTO_ASSIGN_OR_RETURN(Tensor dtable, Make(wide, {50257, 768}));
    Print("embedding bwd",
          Time([&] { ops::EmbeddingBackward(context_, dtable, n, targets, true); }), 2 * bytes,
          "GB/s");
    return stream_->status();
  }

  absl::Status Optimizer() {
    arenas_.clear();
    const DType wide = AccumulateType(dtype_);
    const int64_t n = int64_t{1} << 24;
    stretto::OptimizerItem item;
    STRETTO_ASSIGN_OR_RETURN(item.param, Make(dtype_, {n}));
    STRETTO_ASSIGN_OR_RETURN(item.grad, Make(wide, {n}));
    STRETTO_ASSIGN_OR_RETURN(item.m, Make(wide, {n}));
    STRETTO_ASSIGN_OR_RETURN(item.v, Make(wide, {n}));
    if (wide != dtype_) {
      STRETTO_ASSIGN_OR_RETURN(item.master, Make(wide, {n}));
    }
    STRETTO_ASSIGN_OR_RETURN(const stretto::OptimizerTable table,
                             stretto::OptimizerTable::Create(item.param.device, {item}));
    stretto::AdamWArgs args;
    STRETTO_ASSIGN_OR_RETURN(args.scalars, Make(DType::kF64, {stretto::StepScalars::kCount}));
    for (int i = 0; i < stretto::StepScalars::kCount; ++i) args.scalars.as<double>()[i] = 0;
    args.scalars.as<double>()[stretto::StepScalars::kScale] = 1e-6;
    args.lr = 1e-4;
    ops::Zero(context_, item.v);  // second moments are never negative
    const double size = static_cast<double>(SizeOf(wide));
    const double bytes = (wide == dtype_ ? 7 * size : 7 * size + 2) * static_cast<double>(n);
    Print("adamw 16M", Time([&] { ops::AdamW(context_, table, args); }), bytes, "GB/s");
    STRETTO_ASSIGN_OR_RETURN(Tensor total, Make(DType::kF64, {1}));
    Print("sum of squares 16M", Time([&] { ops::AddSumSquares(context_, total, table); }),
          size * static_cast<double>(n), "GB/s");
    Print("copy 16M (memory floor)", Time([&] { ops::Copy(context_, item.m, item.grad); }),
          2 * size * static_cast<double>(n), "GB/s");
    return stream_->status();
  }

  int threads_;
  int64_t tokens_;
  DType dtype_;
  int repetitions_;
  std::unique_ptr<stretto::Stream> stream_;
  ops::Context context_;
  std::vector<stretto::Arena> arenas_;
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const int64_t tokens = argc > 2 ? std::atoll(argv[2]) : 256;
  const auto dtype = stretto::ParseDType(argc > 3 ? argv[3] : "f32");
  const int repetitions = argc > 4 ? std::atoi(argv[4]) : 7;
  if (threads < 1 || tokens < 1 || repetitions < 1 || !dtype.has_value()) {
    absl::FPrintF(stderr, "usage: %s [threads] [tokens] [f32 | bf16 | f64] [repetitions]\n",
                  argv[0]);
    return 2;
  }
  Bench bench(threads, tokens, *dtype, repetitions);
  absl::Status status = bench.Start();
  if (status.ok()) status = bench.Run();
  return stretto::EndProgram(status);
}
