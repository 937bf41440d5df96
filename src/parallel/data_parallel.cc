#include "stretto/parallel/data_parallel.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "stretto/core/copy.h"
#include "stretto/core/thread_pool.h"
#include "stretto/model/model.h"

namespace stretto {

std::vector<std::vector<int>> MakeBuckets(const Graph& graph, int64_t bucket_bytes) {
  std::vector<int> order(graph.parameters.size());
  std::iota(order.begin(), order.end(), 0);
  // Backward visits layers downwards, so a gradient is complete after the first layer that uses it.
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return graph.parameters[a].layers.front() > graph.parameters[b].layers.front();
  });
  std::vector<std::vector<int>> buckets;
  int64_t bytes = 0;
  int last_layer = -1;
  for (int p : order) {
    const int layer = graph.parameters[p].layers.front();
    if (buckets.empty() || (bytes >= bucket_bytes && layer != last_layer)) {
      buckets.emplace_back();
      bytes = 0;
    }
    buckets.back().push_back(p);
    bytes += graph.parameters[p].elements() * SizeOf(AccumulateType(graph.dtype));
    last_layer = layer;
  }
  return buckets;
}

namespace {

constexpr int64_t kAlignment = 64;
int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t StoredElements(const ParameterInfo& p, int ranks) {
  return std::max(CutRows(p.rows(), ranks, 0).part * ranks, p.padded_rows) * p.columns();
}
// A tensor of a parameter's rank: [rows, columns], or [rows] for vectors.
Tensor View(const ParameterInfo& p, std::byte* data, DType dtype, int64_t rows, Device device) {
  return p.spec.shape.size() > 1 ? Tensor::Of(data, dtype, {rows, p.columns()}, device)
                                 : Tensor::Of(data, dtype, {rows}, device);
}

// The initial values of a parameter, drawn by all threads of the pool: an element's value does not
// depend on who draws it.
absl::Status FillParameter(const ParameterSpec& spec, uint64_t seed, ThreadPool& pool,
                           const Tensor& parameter) {
  return FillFromHost(parameter, [&](int64_t first, const Tensor& rows) {
    pool.ParallelFor(rows.rows(), 1, [&](int64_t begin, int64_t end, int) {
      InitialValues(spec, seed, first + begin, rows.Rows(begin, end - begin));
    });
    return absl::OkStatus();
  });
}

absl::Status FillConstant(const ConstantInfo& c, const Tensor& constant) {
  return FillFromHost(constant, [&](int64_t first, const Tensor& rows) {
    for (int64_t r = 0; r < rows.rows(); ++r) {
      for (int64_t k = 0; k < c.columns; ++k) {
        const double v = c.value(first + r, k);
        if (c.dtype == DType::kF64) {
          rows.as<double>(r)[k] = v;
        } else {
          rows.as<float>(r)[k] = static_cast<float>(v);
        }
      }
    }
    return absl::OkStatus();
  });
}

}  // namespace

StorageBytes DataParallelStorage(const Graph& graph, int ranks) {
  StorageBytes bytes;
  for (const ParameterInfo& p : graph.parameters) {
    const int64_t n = StoredElements(p, ranks);
    bytes.parameters += Aligned(n * SizeOf(graph.dtype));
    bytes.gradients += Aligned(n * SizeOf(AccumulateType(graph.dtype)));
  }
  return bytes;
}

class DataParallel::Hooks : public ActionHooks {
 public:
  Hooks(DataParallel& owner, bool last) : owner_(owner), last_(last) {}
  void BeginPass(bool backward) override {
    owner_.Enter(backward ? StepPhase::kBackward : StepPhase::kForward);
  }
  bool ActsAt(const Action& action) const override {
    if (owner_.group_.size() == 1) return false;
    if (action.kind == ActionKind::kForward) {
      const std::vector<int>& buckets = owner_.layer_buckets_[action.layer];
      return std::any_of(buckets.begin(), buckets.end(),
                         [&](int b) { return owner_.buckets_[b].gather != 0; });
    }
    return action.kind == ActionKind::kBackwardWeight && SubmittedAfter(action.layer) != nullptr;
  }
  void BeforeForward(int layer) override {
    absl::Status status = owner_.WaitLayer(layer);
    if (!status.ok()) owner_.stream_.Fail(std::move(status));
  }
  void AfterBackwardWeight(int layer) override {
    if (Bucket* bucket = SubmittedAfter(layer)) owner_.SubmitReduce(*owner_.run_, *bucket);
  }
  void BetweenActions() override { owner_.comm_.Progress(); }

 private:
  // The bucket that is complete after this layer and can leave, or null. Buckets leave in order.
  Bucket* SubmittedAfter(int layer) const {
    if (!last_ || !owner_.options_.overlap) return nullptr;
    for (Bucket& bucket : owner_.buckets_) {
      if (!bucket.submitted) return bucket.ready_layer == layer ? &bucket : nullptr;
    }
    return nullptr;
  }

  DataParallel& owner_;
  bool last_;
};

DataParallel::DataParallel(Communicator& comm, const Group& group, const Graph& graph,
                           Stream& stream, const KernelTable& kernels,
                           const DataParallelOptions& options)
    : comm_(comm),
      group_(group),
      graph_(graph),
      stream_(stream),
      ops_{&stream, &kernels},
      options_(options),
      plain_hooks_(std::make_unique<Hooks>(*this, false)),
      last_hooks_(std::make_unique<Hooks>(*this, true)) {}
DataParallel::~DataParallel() = default;

absl::StatusOr<std::unique_ptr<DataParallel>> DataParallel::Create(
    Communicator& comm, const Group& group, const Graph& graph, Stream& stream,
    const KernelTable& kernels, uint64_t seed, Budget& budget, const DataParallelOptions& options) {
  auto dp =
      std::unique_ptr<DataParallel>(new DataParallel(comm, group, graph, stream, kernels, options));
  const int n = group.size();
  const DType acc = AccumulateType(graph.dtype);
  const StorageBytes bytes = DataParallelStorage(graph, n);
  int64_t constant_bytes = 0;
  for (const ConstantInfo& c : graph.constants) {
    constant_bytes += Aligned(c.rows * c.columns * SizeOf(c.dtype));
  }
  const Device device = stream.device();
  const auto make = [&](const char* name, int64_t size, Arena* arena) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(device), name, size));
    STRETTO_ASSIGN_OR_RETURN(*arena, Arena::Create(stream.device(), name, size));
    return absl::OkStatus();
  };
  STRETTO_RETURN_IF_ERROR(make("parameters", bytes.parameters, &dp->parameter_arena_));
  STRETTO_RETURN_IF_ERROR(make("gradients", bytes.gradients, &dp->gradient_arena_));
  STRETTO_RETURN_IF_ERROR(make("constants", constant_bytes, &dp->constant_arena_));

  ThreadPool pool(options.threads);
  std::vector<Tensor> stored_values, stored_grads;  // with padding rows
  std::byte* value = dp->parameter_arena_.data();
  std::byte* grad = dp->gradient_arena_.data();
  for (size_t i = 0; i < graph.parameters.size(); ++i) {
    const ParameterInfo& p = graph.parameters[i];
    const RowCut cut = CutRows(p.rows(), n, group.index);
    const int64_t stored = cut.part * n;
    stored_values.push_back(View(p, value, graph.dtype, stored, device));
    stored_grads.push_back(View(p, grad, acc, stored, device));
    dp->parameters_.push_back(View(p, value, graph.dtype, p.rows(), device));
    dp->gradients_.push_back(View(p, grad, acc, p.rows(), device));
    dp->shards_.push_back({ParamId{static_cast<int>(i)}, cut.first,
                           dp->parameters_.back().Rows(cut.first, cut.count),
                           dp->gradients_.back().Rows(cut.first, cut.count)});
    STRETTO_RETURN_IF_ERROR(FillParameter(p.spec, seed, pool, dp->parameters_.back()));
    value += Aligned(StoredElements(p, n) * SizeOf(graph.dtype));
    grad += Aligned(StoredElements(p, n) * SizeOf(acc));
  }

  std::byte* constant = dp->constant_arena_.data();
  for (const ConstantInfo& c : graph.constants) {
    const Tensor t = Tensor::Of(constant, c.dtype, {c.rows, c.columns}, device);
    STRETTO_RETURN_IF_ERROR(FillConstant(c, t));
    dp->constants_.push_back(t);
    constant += Aligned(t.bytes());
  }

  dp->layer_buckets_.resize(graph.layers.size());
  for (std::vector<int>& params : MakeBuckets(graph, options.bucket_bytes)) {
    const int index = static_cast<int>(dp->buckets_.size());
    Bucket bucket;
    bucket.ready_layer = static_cast<int>(graph.layers.size());
    bucket.reduce_label = absl::StrCat("grad bucket ", index);
    bucket.gather_label = absl::StrCat("param bucket ", index);
    for (int p : params) {
      const RowCut cut = CutRows(graph.parameters[p].rows(), n, group.index);
      bucket.ready_layer = std::min(bucket.ready_layer, graph.parameters[p].layers.front());
      bucket.grad_inputs.push_back(stored_grads[p]);
      bucket.grad_outputs.push_back(stored_grads[p].Rows(cut.part * group.index, cut.part));
      bucket.value_outputs.push_back(stored_values[p]);
      bucket.value_inputs.push_back(stored_values[p].Rows(cut.part * group.index, cut.part));
      for (int layer : graph.parameters[p].layers) {
        std::vector<int>& of_layer = dp->layer_buckets_[layer];
        if (std::find(of_layer.begin(), of_layer.end(), index) == of_layer.end()) {
          of_layer.push_back(index);
        }
      }
    }
    bucket.params = std::move(params);
    dp->buckets_.push_back(std::move(bucket));
  }
  return dp;
}

void DataParallel::Attach(Run* run, Tensor loss_total) const {
  run->SetStorage(parameters_, gradients_, constants_, loss_total);
}

void DataParallel::BeginStep(Run& run) {
  run.BeginStep();
  run_ = &run;
  for (Bucket& bucket : buckets_) bucket.submitted = false;
}

ActionHooks& DataParallel::hooks(bool last_micro_batch) {
  return last_micro_batch ? *last_hooks_ : *plain_hooks_;
}

void DataParallel::SubmitReduce(Run& run, Bucket& bucket) {
  bucket.submitted = true;
  for (int p : bucket.params) {
    const Run::Target target = run.Gradient(ParamId{p});
    if (!target.accumulate) ops::Zero(ops_, target.tensor);  // no micro-batch of this rank wrote it
  }
  if (group_.size() == 1) return;
  bucket.reduce = comm_.ReduceScatterMany(group_, bucket.grad_outputs, bucket.grad_inputs,
                                          bucket.reduce_label, stream_.Record());
}

absl::Status DataParallel::FinishGradients(Run& run) {
  // The optimizer is about to change what the gathers send. Forward has waited for them, but a rank
  // without micro-batches ran none.
  STRETTO_RETURN_IF_ERROR(WaitParameters());
  for (Bucket& bucket : buckets_) {
    if (!bucket.submitted) SubmitReduce(run, bucket);
  }
  for (Bucket& bucket : buckets_) {
    STRETTO_RETURN_IF_ERROR(TimedWait(&bucket.reduce));
  }
  return absl::OkStatus();
}

absl::Status DataParallel::GatherParameters() {
  if (group_.size() == 1) return absl::OkStatus();
  // In the order of the next forward, which is the reverse of backward's.
  for (auto bucket = buckets_.rbegin(); bucket != buckets_.rend(); ++bucket) {
    bucket->gather = comm_.AllGatherMany(group_, bucket->value_outputs, bucket->value_inputs,
                                         bucket->gather_label, stream_.Record());
  }
  return options_.overlap ? absl::OkStatus() : WaitParameters();
}

absl::Status DataParallel::WaitLayer(int layer) {
  for (int index : layer_buckets_[layer]) {
    STRETTO_RETURN_IF_ERROR(TimedWait(&buckets_[index].gather));
  }
  return absl::OkStatus();
}

absl::Status DataParallel::WaitParameters() {
  for (Bucket& bucket : buckets_) {
    STRETTO_RETURN_IF_ERROR(TimedWait(&bucket.gather));
  }
  return absl::OkStatus();
}

absl::Status DataParallel::TimedWait(Ticket* ticket) {
  if (*ticket == 0) return absl::OkStatus();
  const int before = Enter(StepPhase::kExposed);
  absl::Status status = comm_.Wait(stream_, *ticket);
  if (before >= 0) Enter(static_cast<StepPhase>(before));
  *ticket = 0;
  return status;
}

int DataParallel::Enter(StepPhase phase) {
  return options_.timer == nullptr ? -1 : options_.timer->Begin(static_cast<int>(phase));
}

absl::Status DataParallel::Register(StateRegistry* registry, ParamId without) const {
  for (const ParameterShard& shard : shards_) {
    if (shard.param.value == without.value) continue;
    const ParameterInfo& info = graph_.parameters[shard.param.value];
    STRETTO_RETURN_IF_ERROR(RegisterRows(registry, "", info, shard.first_row, shard.value));
  }
  return absl::OkStatus();
}

int64_t DataParallel::bytes() const {
  return parameter_arena_.bytes() + gradient_arena_.bytes() + constant_arena_.bytes();
}

}  // namespace stretto
