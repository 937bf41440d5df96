// A model with storage of its own on one rank, for tests of layers and models.
#ifndef STRETTO_TESTS_SUPPORT_HARNESS_H_
#define STRETTO_TESTS_SUPPORT_HARNESS_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "stretto/core/rng.h"
#include "stretto/data/batch.h"
#include "stretto/model/model.h"
#include "stretto/parallel/executor.h"

namespace stretto::testing {

// Packed documents of the given lengths with ids, targets and weights drawn from `seed`; about one
// token in seven is masked out.
inline PackedBatch RandomBatch(const std::vector<int64_t>& lengths, int64_t vocabulary,
                               uint64_t seed) {
  PackedBatch b;
  b.Clear();
  const Rng rng(seed, "test/batch");
  uint64_t n = 0;
  for (int64_t length : lengths) {
    for (int64_t t = 0; t < length; ++t) {
      b.ids.push_back(static_cast<int32_t>(rng.Below(n++, static_cast<uint64_t>(vocabulary))));
      b.targets.push_back(static_cast<int32_t>(rng.Below(n++, static_cast<uint64_t>(vocabulary))));
      b.weights.push_back(rng.Below(n++, 7) == 0 ? 0.0f : 1.0f);
      b.positions.push_back(static_cast<int32_t>(t));
    }
    b.cu_seqlens.push_back(static_cast<int32_t>(b.tokens()));
    b.max_length = std::max(b.max_length, length);
  }
  return b;
}

// Reads and writes single elements of f64, f32 and bf16 tensors as doubles.
inline double Get(const Tensor& t, int64_t i) {
  const int64_t row = i / t.row_elements(), column = i % t.row_elements();
  switch (t.dtype) {
    case DType::kF64:
      return t.as<double>(row)[column];
    case DType::kF32:
      return t.as<float>(row)[column];
    default:
      return static_cast<float>(t.as<BFloat16>(row)[column]);
  }
}
inline void Set(const Tensor& t, int64_t i, double v) {
  const int64_t row = i / t.row_elements(), column = i % t.row_elements();
  switch (t.dtype) {
    case DType::kF64:
      t.as<double>(row)[column] = v;
      break;
    case DType::kF32:
      t.as<float>(row)[column] = static_cast<float>(v);
      break;
    default:
      t.as<BFloat16>(row)[column] = BFloat16(static_cast<float>(v));
  }
}

// Parameters, gradients and a stream for one graph.
class Harness {
 public:
  // Runs on `kernels` instead of those of the CPU when given.
  Harness(const Graph& graph, uint64_t seed, StreamOptions options = {},
          const KernelTable* kernels = nullptr)
      : graph_(graph) {
    stream_ = std::move(Stream::Create(Device::Cpu(), options)).value();
    kernels_ = kernels != nullptr ? kernels : KernelsFor(Device::Cpu()).value();
    const DType acc = AccumulateType(graph.dtype);
    std::vector<Tensor> constants;
    for (const ParameterInfo& p : graph.parameters) {
      parameters.push_back(Allocate(p, graph.dtype));
      gradients.push_back(Allocate(p, acc));
      InitialValues(p.spec, seed, 0, parameters.back());
    }
    for (const ConstantInfo& c : graph.constants) {
      storage_.emplace_back(static_cast<size_t>(c.rows * c.columns) + 1);
      constants.push_back(Tensor::Of(storage_.back().data(), c.dtype, {c.rows, c.columns}));
      for (int64_t i = 0; i < c.rows * c.columns; ++i) {
        Set(constants.back(), i, c.value(i / c.columns, i % c.columns));
      }
    }
    run_.emplace(ops::Context{stream_.get(), kernels_});
    run_->SetStorage(parameters, gradients, constants, Tensor::Of(loss_total, DType::kF64, {2}));
  }

  Run& run() { return *run_; }
  Stream& stream() { return *stream_; }
  const KernelTable& kernels() const { return *kernels_; }
  const Graph& graph() const { return graph_; }

  // Runs one micro-batch in an arena filled with NaN, so that reading what nothing wrote shows.
  absl::Status RunBatch(const ActionList& actions, const PackedBatch& batch,
                        int64_t extra_capacity = 3) {
    auto layout = PlanFrame(graph_, actions, batch.tokens() + extra_capacity);
    if (!layout.ok()) return layout.status();
    frame_memory_.assign(static_cast<size_t>(layout->bytes()) / 8 + 8,
                         std::numeric_limits<double>::quiet_NaN());
    Frame frame(&graph_, &actions, &*layout, reinterpret_cast<std::byte*>(frame_memory_.data()));
    frame.tokens = ViewsOf(batch);
    Execute(graph_, actions, *run_, frame);
    return stream_->Synchronize();
  }

  std::vector<Tensor> parameters, gradients;
  double loss_total[2] = {};

 private:
  Tensor Allocate(const ParameterInfo& p, DType dtype) {
    const int64_t rows = std::max(p.rows(), p.padded_rows);
    storage_.emplace_back(static_cast<size_t>(rows * p.columns()) + 1);
    return p.spec.shape.size() > 1
               ? Tensor::Of(storage_.back().data(), dtype, {p.rows(), p.columns()})
               : Tensor::Of(storage_.back().data(), dtype, {p.rows()});
  }

  const Graph& graph_;
  std::unique_ptr<Stream> stream_;
  const KernelTable* kernels_ = nullptr;
  std::vector<std::vector<double>> storage_;  // doubles: large enough for every type
  std::vector<double> frame_memory_;
  std::optional<Run> run_;
};

// Small models of each family with nothing that divides evenly where it need not.
inline ModelConfig OddModel(const std::string& family, bool tied = true) {
  ModelConfig c;
  c.family = family;
  c.vocabulary = 53;
  c.layers = 2;
  c.hidden = 20;
  c.heads = family == "gpt2" ? 4 : 6;
  c.kv_heads = family == "gpt2" ? 4 : 2;
  c.head_dim = family == "gpt2" ? 5 : 6;  // rotary needs pairs; 6 * 6 != 20
  c.ffn = 27;
  c.max_positions = 19;
  c.tie_embeddings = tied;
  c.init_std = 0.3;
  return c;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_HARNESS_H_
