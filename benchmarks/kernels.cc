// stretto-bench kernels: every kernel family on the shapes of one model, beside the copy rate and
// the matrix product of the same device in the same run.
//
// Bytes are those that a kernel has to move, each operand once; operations are multiplications and
// additions of the products (attention with a mask: below the diagonal). Operands rotate through
// copies of themselves that are larger than any cache, so that none of them is warm.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/float8.h"
#include "stretto/ops/ops.h"
#include "stretto/train/memory.h"
#include "tools/arguments.h"

namespace stretto::bench {
namespace {

constexpr int64_t kColdBytes = int64_t{256} << 20;  // more than the L2 of an H200, or most L3s
constexpr int64_t kAlignment = 256;

struct Shapes {
  int64_t tokens = 0, hidden = 768, heads = 12, kv_heads = 0, ffn = 0, vocabulary = 50304;
  int64_t length = 0, parameters = int64_t{1} << 24;
  DType dtype = DType::kF32;

  DType wide() const { return AccumulateType(dtype); }
  int64_t head_dim() const { return hidden / heads; }
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim(); }
};

using Value = double (*)(int64_t);
double Small(int64_t i) { return static_cast<double>((i * 7919) % 1000) / 1000.0 - 0.5; }
double Positive(int64_t i) { return static_cast<double>((i * 7919) % 1000) / 1000.0 + 0.5; }

struct Operand {
  DType dtype;
  std::vector<int64_t> dims;
  std::function<double(int64_t)> value = Small;

  Tensor At(std::byte* data, Device device) const {
    Tensor t = Tensor::Of(data, dtype, {}, device);
    for (const int64_t d : dims) t.dims[static_cast<size_t>(t.rank++)] = d;
    t.row_stride = t.row_elements();
    return t;
  }
  int64_t bytes() const {
    const int64_t n = At(nullptr, Device::Cpu()).bytes();
    return (n + kAlignment - 1) / kAlignment * kAlignment;
  }
};

using Tensors = std::vector<Tensor>;

struct Case {
  std::string name;
  double bytes = 0;  // that have to move; one of the two is 0
  double flops = 0;
  std::vector<Operand> operands;
  std::function<void(ops::Context, const Tensors&)> run = {};
  // Instead of `run`, for what works on a table of these items.
  std::function<std::vector<OptimizerItem>(const Tensors&)> items = {};
  std::function<void(ops::Context, const Tensors&, const OptimizerTable&)> run_table = {};
};

// ---------------------------------------------------------------------------------- the cases

void AddProducts(const Shapes& s, std::vector<Case>* cases) {
  const auto add = [&](const std::string& name, int64_t in, int64_t out, bool bias) {
    const std::string label = absl::StrFormat("linear %s %dx%d", name, in, out);
    const double flops = 2.0 * static_cast<double>(s.tokens * in * out);
    const Operand x = {s.dtype, {s.tokens, in}}, y = {s.dtype, {s.tokens, out}};
    const Operand w = {s.dtype, {out, in}}, b = {s.dtype, {out}};
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
  const Operand x = {s.dtype, {s.tokens, s.hidden}}, y = {s.dtype, {s.tokens, s.ffn}};
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
void AddFloat8(const Shapes& s, std::vector<Case>* cases) {
  constexpr int64_t kUnit = Float8Kernels::kAlignment;
  if (s.dtype != DType::kBF16) return;
  const int64_t padded = Float8Kernels::Padded(s.tokens);
  const Operand one = {DType::kF32, {1}, [](int64_t) { return 1.0; }};
  const auto add = [&](const std::string& name, int64_t in, int64_t out) {
    if (in % kUnit != 0 || out % kUnit != 0) return;
    const std::string label = absl::StrFormat("fp8 %s %dx%d", name, in, out);
    const double flops = 2.0 * static_cast<double>(s.tokens * in * out);
    const Operand x = {s.dtype, {s.tokens, in}}, y = {s.dtype, {s.tokens, out}};
    const Operand w8 = {DType::kE4M3, {out, in}}, w8t = {DType::kE4M3, {in, out}};
    const Operand x8 = {DType::kE4M3, {s.tokens, in}}, x8t = {DType::kE4M3, {in, padded}};
    const Operand dy8 = {DType::kE5M2, {s.tokens, out}}, dy8t = {DType::kE5M2, {out, padded}};
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

void AddAttention(const Shapes& s, bool causal, std::vector<Case>* cases) {
  const int64_t length = std::min(s.length, s.tokens);
  const int64_t sequences = s.tokens / length;
  const int64_t tokens = sequences * length;
  const double pairs = static_cast<double>(sequences) * static_cast<double>(length) *
                       (causal ? static_cast<double>(length + 1) / 2 : static_cast<double>(length));
  const double flops = 4 * static_cast<double>(s.hidden) * pairs;
  const Operand qkv = {s.dtype, {tokens, s.qkv()}}, o = {s.dtype, {tokens, s.hidden}};
  const Operand statistics = {s.wide(), {tokens, s.heads}};
  const Operand cu = {DType::kI32, {sequences + 1}, [length](int64_t i) {
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
  const Operand above = {s.wide(), {tokens, s.heads}, [](int64_t) { return 10.0; }};
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

void AddRows(const Shapes& s, std::vector<Case>* cases) {
  const auto e = static_cast<double>(SizeOf(s.dtype));
  const double row = e * static_cast<double>(s.tokens * s.hidden);
  const double ffn = e * static_cast<double>(s.tokens * s.ffn);
  const Operand x = {s.dtype, {s.tokens, s.hidden}}, w = {s.dtype, {s.hidden}};
  const Operand statistic = {s.wide(), {s.tokens}, Positive}, dw = {s.wide(), {s.hidden}};
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
    cases->push_back({label + " backward weight",
                      2 * row,
                      0,
                      {dw, dw, x, x, statistic, statistic},
                      [only](ops::Context c, const Tensors& t) {
                        ops::NormBackwardWeight(c, t[0], only(t[1]), t[2], t[3], only(t[4]), t[5],
                                                true);
                      }});
  }
  const Operand f = {s.dtype, {s.tokens, s.ffn}}, ff = {s.dtype, {s.tokens, 2 * s.ffn}};
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
  const Operand positions = {
      DType::kI32, {s.tokens}, [length](int64_t i) { return static_cast<double>(i % length); }};
  const Operand ids = {DType::kI32, {s.tokens}, [v = s.vocabulary](int64_t i) {
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
void AddRotary(const Shapes& s, std::vector<Case>* cases) {
  if (s.head_dim() % 2 != 0) return;
  const int64_t heads = s.heads + s.kv_heads;
  const double part =
      static_cast<double>(SizeOf(s.dtype)) * static_cast<double>(s.tokens * heads * s.head_dim());
  const Operand qkv = {s.dtype, {s.tokens, s.qkv()}}, weight = {s.dtype, {s.head_dim()}};
  const Operand rotated = {s.dtype, {s.tokens, heads * s.head_dim()}};
  const Operand rstd = {s.wide(), {s.tokens, heads}, Positive};
  const Operand partials = {s.wide(), {RotaryKernels::kPartials, 2, s.head_dim()}};
  const Operand positions = {DType::kI32, {s.tokens}, [length = s.length](int64_t i) {
                               return static_cast<double>(i % length);
                             }};
  // Of true angles: what is rotated in place again and again keeps its size.
  const auto table = [&](double (*function)(double)) {
    return Operand{s.wide(), {s.length, s.head_dim() / 2}, [function](int64_t i) {
                     return function(static_cast<double>(i));
                   }};
  };
  const Operand cos = table([](double a) { return std::cos(a); });
  const Operand sin = table([](double a) { return std::sin(a); });
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
  const Operand gradient = {s.wide(), {s.head_dim()}};
  cases->push_back({"qk norm backward weight",
                    static_cast<double>(partials.bytes()),
                    0,
                    {gradient, gradient, partials},
                    [](ops::Context c, const Tensors& t) {
                      ops::RopeBackwardWeight(c, t[0], t[1], t[2], true);
                    }});
}

void AddLoss(const Shapes& s, std::vector<Case>* cases) {
  const double logits = static_cast<double>(SizeOf(s.dtype) * s.tokens * s.vocabulary);
  const Operand x = {s.dtype, {s.tokens, s.vocabulary}};
  const Operand state = {s.wide(), {s.tokens, 3}, Positive};
  const Operand targets = {DType::kI32, {s.tokens}, [v = s.vocabulary](int64_t i) {
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
void AddUpdate(const Shapes& s, const char* name, DType moments, bool masters,
               std::vector<Case>* cases) {
  const Operand param = {s.dtype, {s.parameters}}, wide = {s.wide(), {s.parameters}};
  const Operand m = {moments, {s.parameters}}, v = {moments, {s.parameters}, Positive};
  const Operand scalars = {DType::kF64, {StepScalars::kCount}, [](int64_t i) {
                             return i == StepScalars::kScale ? 1e-6 : 0.0;
                           }};
  const auto size = [](DType dtype) { return static_cast<double>(SizeOf(dtype)); };
  // The gradient is read and the moments are read and written; so is the master, of which param is
  // a copy that is written, or else param.
  const double bytes = size(s.wide()) + 4 * size(moments) +
                       (masters ? 2 * size(s.wide()) + size(s.dtype) : 2 * size(s.dtype));
  Case update = {name, bytes * static_cast<double>(s.parameters), 0, {param, wide, m, v, scalars}};
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

void AddOptimizer(const Shapes& s, std::vector<Case>* cases) {
  const int64_t n = s.parameters;
  const bool bf16 = s.dtype == DType::kBF16;
  const Operand wide = {s.wide(), {n}};
  const auto size = static_cast<double>(SizeOf(s.wide()));
  AddUpdate(s, "adamw", s.wide(), bf16, cases);
  if (s.dtype != DType::kF64) AddUpdate(s, "adamw bf16 moments", DType::kBF16, bf16, cases);
  if (bf16) AddUpdate(s, "adamw bf16 moments, no masters", DType::kBF16, false, cases);
  Case squares = {"sum of squares", size * static_cast<double>(n), 0, {{DType::kF64, {1}}, wide}};
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

// What everything else stands beside.
Case CopyCase(Device device) {
  const int64_t n = int64_t{1} << (device.kind == DeviceKind::kCpu ? 24 : 26);
  const Operand x = {DType::kF32, {n}};
  return {"copy", 8.0 * static_cast<double>(n), 0, {x, x}, [](ops::Context c, const Tensors& t) {
            ops::Copy(c, t[0], t[1]);
          }};
}
Case ProductCase(Device device, DType dtype) {
  const int64_t n = device.kind == DeviceKind::kCpu ? 1024 : 8192;
  const Operand x = {dtype, {n, n}};
  return {absl::StrFormat("product %dx%dx%d", n, n, n),
          0,
          2.0 * static_cast<double>(n * n * n),
          {x, x, x},
          [](ops::Context c, const Tensors& t) { ops::Linear(c, t[0], t[1], t[2], {}); }};
}

// ----------------------------------------------------------------------------------- measuring

class Bench {
 public:
  Bench(Device device, int repetitions) : device_(device), repetitions_(repetitions) {}

  absl::Status Start(int threads) {
    STRETTO_ASSIGN_OR_RETURN(
        stream_, Stream::Create(device_, {.threads = threads,
                                          .workspace_bytes = DeviceWorkspaceBytes(device_.kind)}));
    STRETTO_ASSIGN_OR_RETURN(kernels_, KernelsFor(device_));
    return absl::OkStatus();
  }
  const KernelTable& kernels() const { return *kernels_; }

  // Median seconds of one call.
  absl::StatusOr<double> Time(const Case& c) {
    int64_t set_bytes = 0;
    for (const Operand& operand : c.operands) set_bytes += operand.bytes();
    const int64_t sets = std::clamp<int64_t>((kColdBytes + set_bytes - 1) / set_bytes, 1, 64);
    STRETTO_ASSIGN_OR_RETURN(const Arena arena, Arena::Create(device_, c.name, sets * set_bytes));
    std::vector<Tensors> tensors(static_cast<size_t>(sets));
    std::byte* at = arena.data();
    for (Tensors& set : tensors) {
      for (const Operand& operand : c.operands) {
        set.push_back(operand.At(at, device_));
        STRETTO_RETURN_IF_ERROR(Fill(operand, set.back()));
        at += operand.bytes();
      }
    }
    std::vector<OptimizerTable> tables(tensors.size());
    for (size_t i = 0; c.items != nullptr && i < tensors.size(); ++i) {
      STRETTO_ASSIGN_OR_RETURN(tables[i], OptimizerTable::Create(device_, c.items(tensors[i])));
    }
    const ops::Context context = {stream_.get(), kernels_};
    const auto run = [&](size_t i) {
      if (c.items != nullptr) return c.run_table(context, tensors[i], tables[i]);
      c.run(context, tensors[i]);
    };
    if (kernels_->set_measuring != nullptr) kernels_->set_measuring(true);
    run(0);
    if (kernels_->set_measuring != nullptr) kernels_->set_measuring(false);
    STRETTO_RETURN_IF_ERROR(stream_->Synchronize());
    // So many calls that starting and waiting for them is less than a hundredth.
    constexpr double kLong = 4e-3;
    size_t next = 0;
    const auto round = [&](int calls) -> absl::StatusOr<double> {
      const double begin = Now();
      for (int i = 0; i < calls; ++i) run(next++ % tensors.size());
      STRETTO_RETURN_IF_ERROR(stream_->Synchronize());
      return (Now() - begin) / calls;
    };
    STRETTO_RETURN_IF_ERROR(round(2).status());
    STRETTO_ASSIGN_OR_RETURN(const double first, round(2));
    const int calls = static_cast<int>(std::clamp(kLong / first, 1.0, 200.0));
    std::vector<double> seconds;
    for (int i = 0; i < repetitions_; ++i) {
      STRETTO_ASSIGN_OR_RETURN(seconds.emplace_back(), round(calls));
    }
    return Median(std::move(seconds));
  }

 private:
  // The first values come from the host; a large tensor repeats them.
  absl::Status Fill(const Operand& operand, const Tensor& t) {
    constexpr int64_t kPattern = int64_t{1} << 16;
    const int64_t n = std::min(t.elements(), kPattern), size = SizeOf(t.dtype);
    std::vector<std::byte> host(static_cast<size_t>(n * size));
    const Tensor values = Tensor::Of(host.data(), t.dtype, {n});
    for (int64_t i = 0; i < n; ++i) {
      const double x = operand.value(i);
      if (t.dtype == DType::kF32) values.as<float>()[i] = static_cast<float>(x);
      if (t.dtype == DType::kF64) values.as<double>()[i] = x;
      if (t.dtype == DType::kBF16) values.as<BFloat16>()[i] = BFloat16(static_cast<float>(x));
      if (t.dtype == DType::kE4M3) values.as<E4M3>()[i] = E4M3(static_cast<float>(100 * x));
      if (t.dtype == DType::kE5M2) values.as<E5M2>()[i] = E5M2(static_cast<float>(100 * x));
      if (t.dtype == DType::kI32) values.as<int32_t>()[i] = static_cast<int32_t>(x);
    }
    CopyBytes(*stream_, t.data, host.data(), n * size);
    for (int64_t filled = n * size; filled < t.bytes(); filled *= 2) {
      CopyBytes(*stream_, t.data + filled, t.data, std::min(filled, t.bytes() - filled));
    }
    return stream_->Synchronize();
  }

  Device device_;
  int repetitions_;
  std::unique_ptr<Stream> stream_;
  const KernelTable* kernels_ = nullptr;
};

struct Options {
  std::string device = "auto", dtype, only, json;
  int64_t threads = 0, repetitions = 9;
  Shapes shapes;
};

absl::Status Check(const Options& o) {
  const Shapes& s = o.shapes;
  for (const int64_t n : {s.tokens, s.hidden, s.heads, s.kv_heads, s.ffn, s.vocabulary, s.length,
                          s.parameters, o.threads, o.repetitions}) {
    if (n < 1 || n > (int64_t{1} << 32)) {
      return absl::InvalidArgumentError(
          "stretto-bench kernels needs sizes of 1 or more; see --help");
    }
  }
  if (s.hidden % s.heads != 0 || s.heads % s.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--hidden ", s.hidden, " must be a multiple of --heads ", s.heads,
                     ", and those a multiple of --kv-heads ", s.kv_heads));
  }
  return absl::OkStatus();
}

absl::Status Run(const Options& o, Device device) {
  Bench bench(device, static_cast<int>(o.repetitions));
  STRETTO_RETURN_IF_ERROR(bench.Start(static_cast<int>(o.threads)));
  if (!bench.kernels().supports(o.shapes.dtype)) {
    return absl::UnimplementedError(absl::StrCat("the ", bench.kernels().name,
                                                 " backend has no kernels for ", o.dtype,
                                                 "; choose another --dtype or --device"));
  }
  Results results = {.command = "kernels", .device = DeviceName(device)};
  double copy_rate = 0, product_rate = 0;
  const auto measure = [&](const Case& c) -> absl::Status {
    const auto seconds = bench.Time(c);
    if (absl::IsResourceExhausted(seconds.status())) {
      std::printf("%-44s skipped: %s\n", c.name.c_str(),
                  std::string(seconds.status().message()).c_str());
      return absl::OkStatus();
    }
    STRETTO_RETURN_IF_ERROR(seconds.status());
    const bool product = c.flops > 0;
    const double rate = (product ? c.flops : c.bytes) / *seconds;
    double& reference = product ? product_rate : copy_rate;
    if (reference == 0) reference = rate;  // the first of its kind
    std::printf("%-44s %10.4f %10.1f %s %8.3f\n", c.name.c_str(), 1e3 * *seconds, rate / 1e9,
                product ? "GFLOP/s" : "GB/s   ", rate / reference);
    std::fflush(stdout);
    Json json = {{"name", c.name}, {"seconds", *seconds}};
    json[product ? "flops_per_second" : "bytes_per_second"] = rate;
    json["share"] = rate / reference;
    results.results.push_back(std::move(json));
    return absl::OkStatus();
  };
  std::printf("%s, %s, %lld tokens\n%-44s %10s %18s %8s\n", results.device.c_str(),
              Name(o.shapes.dtype), static_cast<long long>(o.shapes.tokens), "kernel", "ms", "rate",
              "share");
  STRETTO_RETURN_IF_ERROR(measure(CopyCase(device)));
  STRETTO_RETURN_IF_ERROR(measure(ProductCase(device, o.shapes.dtype)));
  std::vector<Case> cases;
  AddProducts(o.shapes, &cases);
  if (bench.kernels().float8 != nullptr) AddFloat8(o.shapes, &cases);
  for (const bool causal : {true, false}) AddAttention(o.shapes, causal, &cases);
  AddRows(o.shapes, &cases);
  AddRotary(o.shapes, &cases);
  AddLoss(o.shapes, &cases);
  AddOptimizer(o.shapes, &cases);
  size_t chosen = 0;
  for (const Case& c : cases) {
    if (c.name.find(o.only) == std::string::npos) continue;
    ++chosen;
    STRETTO_RETURN_IF_ERROR(measure(c));
  }
  if (chosen == 0) {
    return absl::NotFoundError(
        absl::StrCat("no kernel has '", o.only, "' in its name; leave --only out to see them all"));
  }
  std::printf("share: of the rate of copy or product above\n");
  return results.Write(o.json);
}

}  // namespace

int Kernels(int argc, const char* const* argv) {
  Options o;
  Shapes& s = o.shapes;
  Arguments arguments("stretto-bench kernels",
                      "Times each kernel on the shapes of a model, GPT-2 124M by default. 0: what "
                      "fits the device.",
                      "");
  arguments.AddChoice("device", {"auto", "cuda", "cpu"}, "where", &o.device);
  arguments.AddChoice("dtype", {"f32", "bf16", "f64"}, "bf16 on a GPU, else f32, when left out",
                      &o.dtype);
  arguments.Add("tokens", "N", "of a micro-batch; 65536 on a GPU, 256 on a CPU", &s.tokens);
  arguments.Add("length", "N", "of a sequence; at most 1024", &s.length);
  arguments.Add("hidden", "N", "width", &s.hidden);
  arguments.Add("heads", "N", "of queries", &s.heads);
  arguments.Add("kv-heads", "N", "of keys; as many as of queries", &s.kv_heads);
  arguments.Add("ffn", "N", "width between up and down; four times hidden", &s.ffn);
  arguments.Add("vocabulary", "N", "columns of the logits", &s.vocabulary);
  arguments.Add("parameters", "N", "of the optimizer's tensors", &s.parameters);
  arguments.Add("threads", "N", "on a CPU; all processors", &o.threads);
  arguments.Add("repetitions", "N", "the median counts", &o.repetitions);
  arguments.Add("only", "TEXT", "kernels with this in their name", &o.only);
  arguments.Add("json", "FILE", "also write the results there", &o.json);
  if (const absl::Status parsed = arguments.Parse(argc, argv); !parsed.ok()) {
    return Fail(parsed, kUsage);
  }
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  const auto device = ChooseDevice(o.device, 0);
  if (!device.ok()) return Fail(device.status(), kFailed);
  const bool cpu = device->kind == DeviceKind::kCpu;
  if (o.dtype.empty()) o.dtype = cpu ? "f32" : "bf16";
  s.dtype = *ParseDType(o.dtype);
  if (s.tokens == 0) s.tokens = cpu ? 256 : 65536;
  if (s.length == 0) s.length = std::min<int64_t>(s.tokens, 1024);
  if (s.kv_heads == 0) s.kv_heads = s.heads;
  if (s.ffn == 0) s.ffn = 4 * s.hidden;
  if (o.threads == 0) o.threads = std::max(1u, std::thread::hardware_concurrency());
  if (const absl::Status checked = Check(o); !checked.ok()) return Fail(checked, kUsage);
  const absl::Status status = Run(o, *device);
  return status.ok() ? EndProgram(status) : Fail(status, kFailed);
}

}  // namespace stretto::bench
