#include "benchmarks/kernel_cases.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_format.h"

namespace stretto::bench {
namespace {

double Positive(int64_t i) { return SmallValue(i) + 1; }

void AddProducts(const KernelShapes& s, std::vector<KernelCase>* cases) {
  const auto add = [&](const std::string& name, int64_t in, int64_t out, bool bias) {
    const std::string label = absl::StrFormat("linear %s %dx%d", name, in, out);
    const double flops = 2.0 * static_cast<double>(s.tokens * in * out);
    const KernelOperand x = {s.dtype, {s.tokens, in}}, y = {s.dtype, {s.tokens, out}};
    const KernelOperand w = {s.dtype, {out, in}}, b = {s.dtype, {out}};
    cases->push_back(
        {label + " forward", 0, flops, {y, x, w, b}, [bias](ops::Context c, const Tensors& t) {
           ops::Linear(c, t[0], t[1], t[2], bias ? t[3] : Tensor());
         }});
    cases->push_back(
        {label + " backward input", 0, flops, {x, y, w}, [](ops::Context c, const Tensors& t) {
           ops::LinearBackwardInput(c, t[0], t[1], t[2], false);
         }});
    cases->push_back({label + " backward weight",
                      0,
                      flops,
                      {{s.wide(), {out, in}}, {s.wide(), {out}}, y, x},
                      [bias](ops::Context c, const Tensors& t) {
                        ops::LinearBackwardWeight(c, t[0], bias ? t[1] : Tensor(), t[2], t[3],
                                                  true);
                      }});
  };
  add("qkv", s.hidden, s.qkv(), true);
  add("out", s.hidden, s.hidden, true);
  add("up", s.hidden, s.ffn, true);
  add("down", s.ffn, s.hidden, true);
  add("head", s.hidden, s.vocabulary, false);
  const KernelOperand x = {s.dtype, {s.tokens, s.hidden}}, y = {s.dtype, {s.tokens, s.ffn}};
  const double flops = 2.0 * static_cast<double>(s.tokens * s.hidden * s.ffn);
  cases->push_back(
      {"linear up and gelu forward",
       0,
       flops,
       {y, y, x, {s.dtype, {s.ffn, s.hidden}}, {s.dtype, {s.ffn}}},
       [](ops::Context c, const Tensors& t) { ops::LinearGelu(c, t[0], t[1], t[2], t[3], t[4]); }});
  cases->push_back({"linear down and gelu backward",
                    0,
                    flops,
                    {y, x, {s.dtype, {s.hidden, s.ffn}}, y},
                    [](ops::Context c, const Tensors& t) {
                      ops::LinearBackwardInputGelu(c, t[0], t[1], t[2], t[3]);
                    }});
}

// The same layers' products in FP8, and what makes their operands. Only for bf16, and only widths
// that FP8 layers take.
void AddFloat8(const KernelShapes& s, std::vector<KernelCase>* cases) {
  constexpr int64_t kUnit = Float8Kernels::kAlignment;
  if (s.dtype != DType::kBF16) return;
  const int64_t padded = Float8Kernels::Padded(s.tokens);
  const KernelOperand one = {DType::kF32, {1}, [](int64_t) { return 1.0; }};
  const auto add = [&](const std::string& name, int64_t in, int64_t out) {
    if (in % kUnit != 0 || out % kUnit != 0) return;
    const std::string label = absl::StrFormat("fp8 %s %dx%d", name, in, out);
    const double flops = 2.0 * static_cast<double>(s.tokens * in * out);
    const KernelOperand x = {s.dtype, {s.tokens, in}}, y = {s.dtype, {s.tokens, out}};
    const KernelOperand w8 = {DType::kE4M3, {out, in}}, w8t = {DType::kE4M3, {in, out}};
    const KernelOperand x8 = {DType::kE4M3, {s.tokens, in}}, x8t = {DType::kE4M3, {in, padded}};
    const KernelOperand dy8 = {DType::kE5M2, {s.tokens, out}}, dy8t = {DType::kE5M2, {out, padded}};
    cases->push_back({label + " forward",
                      0,
                      flops,
                      {y, x8, w8, one, {s.dtype, {out}}},
                      [](ops::Context c, const Tensors& t) {
                        ops::Float8Product(c, t[0], t[1], t[2], t[3], t[3], t[4], false, true);
                      }});
    cases->push_back({label + " backward input",
                      0,
                      flops,
                      {x, dy8, w8t, one},
                      [](ops::Context c, const Tensors& t) {
                        ops::Float8Product(c, t[0], t[1], t[2], t[3], t[3], {}, false, false);
                      }});
    cases->push_back({label + " backward weight",
                      0,
                      flops,
                      {{s.wide(), {out, in}}, dy8t, x8t, one},
                      [](ops::Context c, const Tensors& t) {
                        ops::Float8Product(c, t[0], t[1], t[2], t[3], t[3], {}, true, false);
                      }});
  };
  add("qkv", s.hidden, s.qkv());
  add("out", s.hidden, s.hidden);
  add("up", s.hidden, s.ffn);
  add("down", s.ffn, s.hidden);
  if (s.hidden % kUnit != 0) return;
  const auto elements = static_cast<double>(s.tokens * s.hidden);
  cases->push_back({"fp8 quantize and transpose",
                    4 * elements,
                    0,
                    {{DType::kE4M3, {s.tokens, s.hidden}},
                     {DType::kE4M3, {s.hidden, padded}},
                     {s.dtype, {s.tokens, s.hidden}},
                     one,
                     one},
                    [](ops::Context c, const Tensors& t) {
                      ops::Float8Quantize(c, t[0], t[1], t[2], t[3], t[4]);
                    }});
  cases->push_back(
      {"fp8 quantize",
       3 * elements,
       0,
       {{DType::kE4M3, {s.tokens, s.hidden}}, {s.dtype, {s.tokens, s.hidden}}, one},
       [](ops::Context c, const Tensors& t) { ops::Float8Quantize(c, t[0], {}, t[1], t[2], {}); }});
}

void AddAttention(const KernelShapes& s, bool causal, std::vector<KernelCase>* cases) {
  const int64_t length = std::min(s.length, s.tokens);
  const int64_t sequences = s.tokens / length;
  const int64_t tokens = sequences * length;
  const double pairs = static_cast<double>(sequences) * static_cast<double>(length) *
                       (causal ? static_cast<double>(length + 1) / 2 : static_cast<double>(length));
  const double flops = 4 * static_cast<double>(s.hidden) * pairs;
  const KernelOperand qkv = {s.dtype, {tokens, s.qkv()}}, o = {s.dtype, {tokens, s.hidden}};
  const KernelOperand statistics = {s.wide(), {tokens, s.heads}};
  const KernelOperand cu = {DType::kI32, {sequences + 1}, [length](int64_t i) {
                              return static_cast<double>(i * length);
                            }};
  const auto shape = [length, causal,
                      scale = 1 / std::sqrt(static_cast<double>(s.head_dim()))](Tensor t) {
    AttentionShape shape;
    shape.cu_q = shape.cu_k = t;
    shape.max_q = shape.max_k = shape.uniform = length;
    shape.causal = causal;
    shape.scale = scale;
    return shape;
  };
  const auto part = [s](const Tensor& t, int i) {
    const int64_t heads = i == 0 ? s.heads : s.kv_heads;
    const int64_t first = i == 0 ? 0 : s.heads + (i - 1) * s.kv_heads;
    return t.Columns(first * s.head_dim(), heads * s.head_dim()).Heads(heads);
  };
  const std::string label =
      absl::StrFormat("attention %dx%d%s", sequences, length, causal ? "" : ", no mask");
  cases->push_back({label + " forward",
                    0,
                    flops,
                    {o, statistics, qkv, cu},
                    [=](ops::Context c, const Tensors& t) {
                      ops::Attention(c, t[0].Heads(s.heads), t[1], part(t[2], 0), part(t[2], 1),
                                     part(t[2], 2), shape(t[3]));
                    }});
  // Statistics far above the scores: the probabilities stay small numbers.
  const KernelOperand above = {s.wide(), {tokens, s.heads}, [](int64_t) { return 10.0; }};
  cases->push_back({label + " backward",
                    0,
                    2.5 * flops,
                    {qkv, statistics, o, o, above, qkv, cu},
                    [=](ops::Context c, const Tensors& t) {
                      ops::AttentionBackward(c, part(t[0], 0), part(t[0], 1), part(t[0], 2), t[1],
                                             t[2].Heads(s.heads), t[3].Heads(s.heads), t[4],
                                             part(t[5], 0), part(t[5], 1), part(t[5], 2),
                                             shape(t[6]));
                    }});
}

void AddRows(const KernelShapes& s, const KernelTable& kernels, std::vector<KernelCase>* cases) {
  const auto e = static_cast<double>(SizeOf(s.dtype));
  const double row = e * static_cast<double>(s.tokens * s.hidden);
  const double ffn = e * static_cast<double>(s.tokens * s.ffn);
  const KernelOperand x = {s.dtype, {s.tokens, s.hidden}}, w = {s.dtype, {s.hidden}};
  const KernelOperand statistic = {s.wide(), {s.tokens}, Positive}, dw = {s.wide(), {s.hidden}};
  for (const bool mean : {true, false}) {
    const std::string label = mean ? "layernorm" : "rmsnorm";
    const auto only = [mean](Tensor t) { return mean ? t : Tensor(); };
    cases->push_back({label + " + residual forward",
                      4 * row,
                      0,
                      {x, x, statistic, statistic, x, x, w, w},
                      [only](ops::Context c, const Tensors& t) {
                        ops::Norm(c, t[0], t[1], only(t[2]), t[3], t[4], t[5], t[6], only(t[7]),
                                  1e-5);
                      }});
    cases->push_back({label + " backward input",
                      4 * row,
                      0,
                      {x, x, x, statistic, statistic, w},
                      [only](ops::Context c, const Tensors& t) {
                        ops::NormBackwardInput(c, t[0], t[1], t[2], only(t[3]), t[4], t[5], true);
                      }});
    // Both halves, as layers run them: the first leaves sums for the second, or both read the rows.
    const int64_t sums = kernels.norm->PartialBytes(s.dtype, s.hidden, mean) / SizeOf(s.wide());
    const KernelOperand partials = {s.wide(), {std::max<int64_t>(sums, 1)}};
    cases->push_back(
        {label + " backward",
         (sums > 0 ? 4 : 6) * row,
         0,
         {x, x, x, statistic, statistic, w, dw, dw, partials},
         [only, sums](ops::Context c, const Tensors& t) {
           const Tensor left = sums > 0 ? t[8] : Tensor();
           ops::NormBackwardInput(c, t[0], t[1], t[2], only(t[3]), t[4], t[5], true, left);
           ops::NormBackwardWeight(c, t[6], only(t[7]), t[1], t[2], only(t[3]), t[4], true, left);
         }});
  }
  const KernelOperand f = {s.dtype, {s.tokens, s.ffn}}, ff = {s.dtype, {s.tokens, 2 * s.ffn}};
  cases->push_back({"gelu forward", 2 * ffn, 0, {f, f}, [](ops::Context c, const Tensors& t) {
                      ops::Gelu(c, t[0], t[1]);
                    }});
  cases->push_back({"gelu backward", 3 * ffn, 0, {f, f, f}, [](ops::Context c, const Tensors& t) {
                      ops::GeluBackward(c, t[0], t[1], t[2], false);
                    }});
  cases->push_back({"swiglu forward", 3 * ffn, 0, {f, ff}, [](ops::Context c, const Tensors& t) {
                      ops::Swiglu(c, t[0], t[1]);
                    }});
  cases->push_back(
      {"swiglu backward", 5 * ffn, 0, {ff, f, ff}, [](ops::Context c, const Tensors& t) {
         ops::SwigluBackward(c, t[0], t[1], t[2], false);
       }});
  const int64_t length = s.length;
  const KernelOperand positions = {
      DType::kI32, {s.tokens}, [length](int64_t i) { return static_cast<double>(i % length); }};
  const KernelOperand ids = {DType::kI32, {s.tokens}, [v = s.vocabulary](int64_t i) {
                               return static_cast<double>((i * 7919) % v);
                             }};
  cases->push_back(
      {"embedding forward",
       3 * row,
       0,
       {x, ids, {s.dtype, {s.vocabulary, s.hidden}}, positions, {s.dtype, {length, s.hidden}}},
       [](ops::Context c, const Tensors& t) { ops::Embedding(c, t[0], t[1], t[2], t[3], t[4]); }});
  const double touched =
      static_cast<double>(std::min(s.vocabulary, s.tokens) * s.hidden * SizeOf(s.wide()));
  cases->push_back({"embedding backward",
                    row + 2 * touched,
                    0,
                    {{s.wide(), {s.vocabulary, s.hidden}}, x, ids},
                    [](ops::Context c, const Tensors& t) {
                      ops::EmbeddingBackward(c, t[0], t[1], t[2], true);
                    }});
}

// What stands between the projection and attention: queries and keys, which lie side by side with
// the values behind them.
void AddRotary(const KernelShapes& s, std::vector<KernelCase>* cases) {
  if (s.head_dim() % 2 != 0) return;
  const int64_t heads = s.heads + s.kv_heads;
  const double part =
      static_cast<double>(SizeOf(s.dtype)) * static_cast<double>(s.tokens * heads * s.head_dim());
  const KernelOperand qkv = {s.dtype, {s.tokens, s.qkv()}}, weight = {s.dtype, {s.head_dim()}};
  const KernelOperand rotated = {s.dtype, {s.tokens, heads * s.head_dim()}};
  const KernelOperand rstd = {s.wide(), {s.tokens, heads}, Positive};
  const KernelOperand partials = {s.wide(), {RotaryKernels::kPartials, 2, s.head_dim()}};
  const KernelOperand positions = {DType::kI32, {s.tokens}, [length = s.length](int64_t i) {
                                     return static_cast<double>(i % length);
                                   }};
  // Of true angles: what is rotated in place again and again keeps its size.
  const auto table = [&](double (*function)(double)) {
    return KernelOperand{s.wide(), {s.length, s.head_dim() / 2}, [function](int64_t i) {
                           return function(static_cast<double>(i));
                         }};
  };
  const KernelOperand cos = table([](double a) { return std::cos(a); });
  const KernelOperand sin = table([](double a) { return std::sin(a); });
  const auto of = [heads, width = heads * s.head_dim()](const Tensor& t) {
    return t.Columns(0, width).Heads(heads);
  };
  const auto args = [queries = s.heads](const Tensors& t, size_t weights) {
    RotaryArgs a;
    a.positions = t[0];
    a.cos = t[1];
    a.sin = t[2];
    if (weights == 0) return a;
    a.q_weight = t[weights];
    a.k_weight = t[weights + 1];
    a.query_heads = queries;
    a.eps = 1e-6;
    return a;
  };
  cases->push_back({"rope",
                    2 * part,
                    0,
                    {positions, cos, sin, qkv},
                    [of, args](ops::Context c, const Tensors& t) {
                      ops::Rope(c, of(t[3]), {}, of(t[3]), args(t, 0));
                    }});
  cases->push_back({"qk norm and rope forward",
                    2 * part,
                    0,
                    {positions, cos, sin, weight, weight, rotated, rstd, qkv},
                    [of, args](ops::Context c, const Tensors& t) {
                      ops::Rope(c, of(t[5]), t[6], of(t[7]), args(t, 3));
                    }});
  cases->push_back({"qk norm and rope backward input",
                    3 * part,
                    0,
                    {positions, cos, sin, weight, weight, qkv, qkv, qkv, rstd, partials},
                    [of, args](ops::Context c, const Tensors& t) {
                      ops::RopeBackwardInput(c, of(t[5]), of(t[6]), of(t[7]), t[8], t[9],
                                             args(t, 3));
                    }});
  const KernelOperand gradient = {s.wide(), {s.head_dim()}};
  cases->push_back({"qk norm backward weight",
                    static_cast<double>(partials.bytes()),
                    0,
                    {gradient, gradient, partials},
                    [](ops::Context c, const Tensors& t) {
                      ops::RopeBackwardWeight(c, t[0], t[1], t[2], true);
                    }});
}

void AddLoss(const KernelShapes& s, std::vector<KernelCase>* cases) {
  const double logits = static_cast<double>(SizeOf(s.dtype) * s.tokens * s.vocabulary);
  const KernelOperand x = {s.dtype, {s.tokens, s.vocabulary}};
  const KernelOperand state = {s.wide(), {s.tokens, 3}, Positive};
  const KernelOperand targets = {DType::kI32, {s.tokens}, [v = s.vocabulary](int64_t i) {
                                   return static_cast<double>((i * 7919) % v);
                                 }};
  cases->push_back(
      {"loss fold", logits, 0, {state, x, targets}, [](ops::Context c, const Tensors& t) {
         ops::LossFold(c, t[0], t[1], t[2], 0, true);
       }});
  cases->push_back(
      {"loss backward", 2 * logits, 0, {x, state, targets}, [](ops::Context c, const Tensors& t) {
         ops::LossBackward(c, t[0], t[1], t[2], {}, 0);
       }});
  cases->push_back({"loss fused",
                    2 * logits,
                    0,
                    {x, {s.wide(), {s.tokens}}, {DType::kF64, {2}}, targets},
                    [](ops::Context c, const Tensors& t) {
                      ops::LossFused(c, t[0], t[1], t[2], t[3], {}, false);
                    }});
}

// One launch over a model's parameters as one tensor: m, v and with `masters` the master beside it.
void AddUpdate(const KernelShapes& s, const char* name, DType moments, bool masters,
               std::vector<KernelCase>* cases) {
  const KernelOperand param = {s.dtype, {s.parameters}}, wide = {s.wide(), {s.parameters}};
  const KernelOperand m = {moments, {s.parameters}}, v = {moments, {s.parameters}, Positive};
  const KernelOperand scalars = {DType::kF64, {StepScalars::kCount}, [](int64_t i) {
                                   return i == StepScalars::kScale ? 1e-6 : 0.0;
                                 }};
  const auto size = [](DType dtype) { return static_cast<double>(SizeOf(dtype)); };
  // The gradient is read and the moments are read and written; so is the master, of which param is
  // a copy that is written, or else param.
  const double bytes = size(s.wide()) + 4 * size(moments) +
                       (masters ? 2 * size(s.wide()) + size(s.dtype) : 2 * size(s.dtype));
  KernelCase update = {
      name, bytes * static_cast<double>(s.parameters), 0, {param, wide, m, v, scalars}};
  if (masters) update.operands.push_back(wide);
  update.items = [masters](const Tensors& t) -> std::vector<OptimizerItem> {
    return {
        {.param = t[0], .grad = t[1], .m = t[2], .v = t[3], .master = masters ? t[5] : Tensor()}};
  };
  update.run_table = [](ops::Context c, const Tensors& t, const OptimizerTable& table) {
    ops::AdamW(c, table, {.scalars = t[4], .lr = 1e-4});
  };
  cases->push_back(std::move(update));
}

void AddOptimizer(const KernelShapes& s, std::vector<KernelCase>* cases) {
  const int64_t n = s.parameters;
  const bool bf16 = s.dtype == DType::kBF16;
  const KernelOperand wide = {s.wide(), {n}};
  const auto size = static_cast<double>(SizeOf(s.wide()));
  AddUpdate(s, "adamw", s.wide(), bf16, cases);
  if (s.dtype != DType::kF64) AddUpdate(s, "adamw bf16 moments", DType::kBF16, bf16, cases);
  if (bf16) AddUpdate(s, "adamw bf16 moments, no masters", DType::kBF16, false, cases);
  KernelCase squares = {
      "sum of squares", size * static_cast<double>(n), 0, {{DType::kF64, {1}}, wide}};
  squares.items = [](const Tensors& t) -> std::vector<OptimizerItem> {
    return {{.param = t[1], .grad = t[1], .m = t[1], .v = t[1]}};
  };
  squares.run_table = [](ops::Context c, const Tensors& t, const OptimizerTable& table) {
    ops::AddSumSquares(c, t[0], table);
  };
  cases->push_back(std::move(squares));
  cases->push_back(
      {"zero", size * static_cast<double>(n), 0, {wide}, [](ops::Context c, const Tensors& t) {
         ops::Zero(c, t[0]);
       }});
  cases->push_back({"add",
                    3 * size * static_cast<double>(n),
                    0,
                    {wide, wide},
                    [](ops::Context c, const Tensors& t) { ops::Add(c, t[0], t[1]); }});
}

}  // namespace

std::vector<KernelCase> KernelCases(const KernelShapes& s, const KernelTable& kernels) {
  std::vector<KernelCase> cases;
  AddProducts(s, &cases);
  if (kernels.float8 != nullptr) AddFloat8(s, &cases);
  for (const bool causal : {true, false}) AddAttention(s, causal, &cases);
  AddRows(s, kernels, &cases);
  AddRotary(s, &cases);
  AddLoss(s, &cases);
  AddOptimizer(s, &cases);
  return cases;
}

KernelCase CopyCase(Device device) {
  const int64_t n = int64_t{1} << (device.kind == DeviceKind::kCpu ? 24 : 26);
  const KernelOperand x = {DType::kF32, {n}};
  return {"copy", 8.0 * static_cast<double>(n), 0, {x, x}, [](ops::Context c, const Tensors& t) {
            ops::Copy(c, t[0], t[1]);
          }};
}
KernelCase ProductCase(Device device, DType dtype) {
  const int64_t n = device.kind == DeviceKind::kCpu ? 1024 : 8192;
  const KernelOperand x = {dtype, {n, n}};
  return {absl::StrFormat("product %dx%dx%d", n, n, n),
          0,
          2.0 * static_cast<double>(n * n * n),
          {x, x, x},
          [](ops::Context c, const Tensors& t) { ops::Linear(c, t[0], t[1], t[2], {}); }};
}

}  // namespace stretto::bench
