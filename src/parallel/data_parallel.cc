#include "stretto/parallel/data_parallel.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "src/parallel/bucket_buffers.h"
#include "src/parallel/parameter_storage.h"
#include "stretto/core/copy.h"
#include "stretto/core/thread_pool.h"
#include "stretto/model/model.h"
#include "stretto/parallel/bucket_plan.h"

namespace stretto {

using internal::Aligned;
using internal::BucketBuffers;
using internal::StoredElements;
using internal::View;

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

// The initial values of a parameter's rows from `row` on, drawn by all threads of the pool: an
// element's value does not depend on who draws it.
absl::Status FillParameter(const ParameterSpec& spec, uint64_t seed, ThreadPool& pool, int64_t row,
                           const Tensor& parameter) {
  return FillFromHost(parameter, [&](int64_t first, const Tensor& rows) {
    pool.ParallelFor(rows.rows(), 1, [&](int64_t begin, int64_t end, int) {
      InitialValues(spec, seed, row + first + begin, rows.Rows(begin, end - begin));
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

StorageBytes DataParallelStorage(const Graph& graph, int ranks, int zero) {
  StorageBytes bytes;
  for (const ParameterInfo& p : graph.parameters) {
    const int64_t full = StoredElements(p, ranks);
    const int64_t part = CutRows(p.rows(), ranks, 0).part * p.columns();
    bytes.parameters += Aligned((zero >= 3 ? part : full) * SizeOf(graph.dtype));
    bytes.gradients += Aligned((zero >= 2 ? part : full) * SizeOf(AccumulateType(graph.dtype)));
  }
  return bytes;
}

class DataParallel::Hooks : public ActionHooks {
 public:
  Hooks(DataParallel& owner, bool last) : owner_(owner), last_(last) {}
  void BeginPass(bool backward) override {
    owner_.Enter(backward ? StepPhase::kBackward : StepPhase::kForward);
  }
  bool ActsBefore(size_t index, const Action& action) const override {
    if (owner_.group_.size() == 1) return false;
    if (owner_.buffers_ != nullptr && owner_.buffers_->ActsBefore(true, index)) return true;
    if (action.kind != ActionKind::kForward) return false;
    const std::vector<int>& buckets = owner_.layer_buckets_[action.layer];
    return std::any_of(buckets.begin(), buckets.end(),
                       [&](int b) { return owner_.buckets_[b].gather != 0; });
  }
  bool ActsAfter(size_t index, const Action& action) const override {
    if (owner_.group_.size() == 1) return false;
    if (owner_.buffers_ != nullptr) return owner_.buffers_->ActsAfter(true, index);
    return action.kind == ActionKind::kBackwardWeight && SubmittedAfter(action.layer) != nullptr;
  }
  void Before(size_t index, const Action& action) override {
    absl::Status status;
    if (action.kind == ActionKind::kForward) status = owner_.WaitLayer(action.layer);
    if (owner_.buffers_ != nullptr) status.Update(owner_.buffers_->Before(Caller(), index));
    if (!status.ok()) owner_.stream_.Fail(std::move(status));
  }
  void After(size_t index, const Action& action) override {
    if (owner_.buffers_ != nullptr) {
      absl::Status status = owner_.buffers_->After(Caller(), index);
      if (!status.ok()) owner_.stream_.Fail(std::move(status));
    } else if (Bucket* bucket = SubmittedAfter(action.layer)) {
      owner_.SubmitReduce(*owner_.run_, *bucket);
    }
  }
  void BetweenActions() override { owner_.comm_.Progress(); }

 private:
  BucketBuffers::Caller Caller() const { return {.run = owner_.run_, .last = last_}; }
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

// Outside of training steps.
class DataParallel::BufferHooks : public ActionHooks {
 public:
  explicit BufferHooks(DataParallel& owner) : owner_(owner) {}
  ActionHooks* For(const BucketBuffers::Caller& caller) {
    caller_ = caller;
    return this;
  }
  bool ActsBefore(size_t index, const Action& /*action*/) const override {
    return owner_.buffers_->ActsBefore(caller_.training, index);
  }
  bool ActsAfter(size_t index, const Action& /*action*/) const override {
    return owner_.buffers_->ActsAfter(caller_.training, index);
  }
  void Before(size_t index, const Action& /*action*/) override {
    absl::Status status = owner_.buffers_->Before(caller_, index);
    if (!status.ok()) owner_.stream_.Fail(std::move(status));
  }
  void After(size_t index, const Action& /*action*/) override {
    absl::Status status = owner_.buffers_->After(caller_, index);
    if (!status.ok()) owner_.stream_.Fail(std::move(status));
  }
  void BetweenActions() override { owner_.comm_.Progress(); }

 private:
  DataParallel& owner_;
  BucketBuffers::Caller caller_;
};

DataParallel::DataParallel(Communicator& comm, const Group& group, const Graph& graph,
                           Stream& stream, const KernelTable& kernels, uint64_t seed,
                           const DataParallelOptions& options)
    : comm_(comm),
      group_(group),
      graph_(graph),
      stream_(stream),
      ops_{&stream, &kernels},
      options_(options),
      seed_(seed),
      zero_(options.buckets == nullptr ? 1 : options.buckets->zero),
      plain_hooks_(std::make_unique<Hooks>(*this, false)),
      last_hooks_(std::make_unique<Hooks>(*this, true)) {}
DataParallel::~DataParallel() = default;

absl::StatusOr<std::unique_ptr<DataParallel>> DataParallel::Create(
    Communicator& comm, const Group& group, const Graph& graph, Stream& stream,
    const KernelTable& kernels, uint64_t seed, Budget& budget, const DataParallelOptions& options) {
  auto dp = std::unique_ptr<DataParallel>(
      new DataParallel(comm, group, graph, stream, kernels, seed, options));
  const int n = group.size();
  const DType acc = AccumulateType(graph.dtype);
  const BucketPlan* const plan = options.buckets;
  if (plan != nullptr && plan->ranks != n) {
    return absl::InvalidArgumentError(absl::StrCat("the plan of buckets is for ", plan->ranks,
                                                   " ranks, and group ", group.name, " has ", n,
                                                   "; plan it for the group"));
  }
  const bool whole_parameters = dp->zero_ < 3, whole_gradients = dp->zero_ < 2;
  const StorageBytes bytes = DataParallelStorage(graph, n, dp->zero_);
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
  if (!whole_gradients) {
    STRETTO_RETURN_IF_ERROR(make("bucket buffers", plan->buffer_bytes, &dp->buffer_arena_));
  }

  std::vector<Tensor> stored_values, stored_grads;  // with padding rows; of shards, a part
  std::byte* value = dp->parameter_arena_.data();
  std::byte* grad = dp->gradient_arena_.data();
  for (size_t i = 0; i < graph.parameters.size(); ++i) {
    const ParameterInfo& p = graph.parameters[i];
    const RowCut cut = CutRows(p.rows(), n, group.index);
    // What lies here, the whole tensor as layers see it, and this rank's rows of it.
    const auto lay_out = [&](bool whole, DType dtype, std::byte** next, Tensor* stored,
                             Tensor* full) {
      *stored = View(p, *next, dtype, whole ? cut.part * n : cut.part, device);
      if (whole) *full = View(p, *next, dtype, p.rows(), device);
      *next += Aligned((whole ? StoredElements(p, n) : cut.part * p.columns()) * SizeOf(dtype));
      return whole ? full->Rows(cut.first, cut.count) : stored->Rows(0, cut.count);
    };
    const ParamId id{static_cast<int>(i)};
    const Tensor my_value = lay_out(whole_parameters, graph.dtype, &value,
                                    &stored_values.emplace_back(), &dp->parameters_.emplace_back());
    const Tensor my_grad = lay_out(whole_gradients, acc, &grad, &stored_grads.emplace_back(),
                                   &dp->gradients_.emplace_back());
    dp->shards_.push_back({id, cut.first, my_value, my_grad});
  }
  if (options.initialize) STRETTO_RETURN_IF_ERROR(dp->Initialize());

  std::byte* constant = dp->constant_arena_.data();
  for (const ConstantInfo& c : graph.constants) {
    const Tensor t = Tensor::Of(constant, c.dtype, {c.rows, c.columns}, device);
    STRETTO_RETURN_IF_ERROR(FillConstant(c, t));
    dp->constants_.push_back(t);
    constant += Aligned(t.bytes());
  }

  dp->layer_buckets_.resize(graph.layers.size());
  if (!whole_gradients) {
    dp->buffers_ = std::make_unique<BucketBuffers>(
        comm, dp->group_, graph, dp->ops_, *plan, dp->buffer_arena_.data(),
        BucketBuffers::Shards{.values = stored_values, .gradients = stored_grads},
        BucketBuffers::Options{.overlap = options.overlap,
                               .prefetch = options.prefetch,
                               .add_in_transit = options.add_in_transit,
                               .poison = options.poison,
                               .timer = options.timer});
    dp->evaluation_hooks_ = std::make_unique<BufferHooks>(*dp);
    dp->local_hooks_ = std::make_unique<BufferHooks>(*dp);
    if (!whole_parameters) {
      dp->value_parts_ = std::move(stored_values);
      return dp;
    }
  }
  for (std::vector<int>& params :
       plan != nullptr ? std::vector(plan->buckets) : MakeBuckets(graph, options.bucket_bytes)) {
    const int index = static_cast<int>(dp->buckets_.size());
    Bucket bucket;
    bucket.ready_layer = ReadyLayer(graph, params);
    bucket.reduce_label = absl::StrCat("grad bucket ", index);
    bucket.gather_label = absl::StrCat("param bucket ", index);
    for (int p : params) {
      const RowCut cut = CutRows(graph.parameters[p].rows(), n, group.index);
      if (whole_gradients) {
        bucket.grad_inputs.push_back(stored_grads[p]);
        bucket.grad_outputs.push_back(stored_grads[p].Rows(cut.part * group.index, cut.part));
      }
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

Tensor DataParallel::parameter_memory() const {
  return Tensor::Of(parameter_arena_.data(), DType::kU8, {parameter_arena_.bytes()},
                    parameter_arena_.device());
}

absl::Status DataParallel::Initialize() {
  ThreadPool pool(options_.threads);
  for (size_t i = 0; i < shards_.size(); ++i) {
    const ParameterSpec& spec = graph_.parameters[i].spec;
    const Tensor& whole = parameters_[i];  // absent where this rank keeps its shard alone
    STRETTO_RETURN_IF_ERROR(
        zero_ < 3 ? FillParameter(spec, seed_, pool, 0, whole)
                  : FillParameter(spec, seed_, pool, shards_[i].first_row, shards_[i].value));
  }
  return absl::OkStatus();
}

void DataParallel::Attach(Run* run, Tensor loss_total) const {
  run->SetStorage(parameters_, gradients_, constants_, loss_total);
}

void DataParallel::BeginStep(Run& run) {
  run.BeginStep();
  run_ = &run;
  for (Bucket& bucket : buckets_) bucket.submitted = false;
  if (buffers_ != nullptr) buffers_->BeginStep();
}

ActionHooks& DataParallel::hooks(bool last_micro_batch) {
  return last_micro_batch ? *last_hooks_ : *plain_hooks_;
}

void DataParallel::GatherFor(size_t action) {
  if (zero_ == 3) buffers_->GatherFor(action);
}

ActionHooks* DataParallel::evaluation_hooks(Run& run) {
  if (zero_ < 3) return nullptr;
  absl::Status dropped = buffers_->Drop();
  if (!dropped.ok()) stream_.Fail(std::move(dropped));
  return evaluation_hooks_->For({.run = &run, .training = false});
}

ActionHooks* DataParallel::local_hooks(Run& run, bool training) {
  if (buffers_ == nullptr) return nullptr;
  absl::Status waited = WaitParameters();
  waited.Update(buffers_->Drop());
  if (!waited.ok()) stream_.Fail(std::move(waited));
  return local_hooks_->For({.run = &run, .training = training, .communicate = false});
}

void DataParallel::SubmitReduce(Run& run, Bucket& bucket) {
  bucket.submitted = true;
  for (int p : bucket.params) {
    const Run::Target target = run.Gradient(ParamId{p});
    if (!target.accumulate) ops::Zero(ops_, target.tensor);  // no micro-batch of this rank wrote it
  }
  if (group_.size() == 1) return;
  const TraceScope scope(comm_.trace(), {.bucket = NumberOf(bucket)});
  bucket.reduce = comm_.ReduceScatterMany(group_, bucket.grad_outputs, bucket.grad_inputs,
                                          bucket.reduce_label, stream_.Record());
}

absl::Status DataParallel::FinishGradients(Run& run) {
  // The optimizer is about to change what the gathers send. Forward has waited for them, but a rank
  // without micro-batches ran none.
  STRETTO_RETURN_IF_ERROR(WaitParameters());
  if (zero_ == 3) STRETTO_RETURN_IF_ERROR(buffers_->Drop());
  if (buffers_ != nullptr) return buffers_->FinishGradients();
  for (Bucket& bucket : buckets_) {
    if (!bucket.submitted) SubmitReduce(run, bucket);
  }
  for (Bucket& bucket : buckets_) {
    STRETTO_RETURN_IF_ERROR(TakeTicket(&bucket.reduce));
  }
  return absl::OkStatus();
}

absl::Status DataParallel::GatherParameters() {
  if (group_.size() == 1) return absl::OkStatus();
  if (zero_ == 3) {
    buffers_->GatherFor(0);
    return absl::OkStatus();
  }
  // In the order of the next forward, which is the reverse of backward's.
  for (auto bucket = buckets_.rbegin(); bucket != buckets_.rend(); ++bucket) {
    const TraceScope scope(comm_.trace(), {.bucket = NumberOf(*bucket)});
    bucket->gather = comm_.AllGatherMany(group_, bucket->value_outputs, bucket->value_inputs,
                                         bucket->gather_label, stream_.Record());
  }
  return options_.prefetch ? absl::OkStatus() : WaitParameters();
}

absl::Status DataParallel::WaitLayer(int layer) {
  for (int index : layer_buckets_[layer]) {
    STRETTO_RETURN_IF_ERROR(TakeTicket(&buckets_[index].gather));
  }
  return absl::OkStatus();
}

absl::Status DataParallel::WaitParameters() {
  if (zero_ == 3) return buffers_->WaitGathers();
  for (Bucket& bucket : buckets_) {
    STRETTO_RETURN_IF_ERROR(TakeTicket(&bucket.gather));
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> DataParallel::CompleteParameter(ParamId id) {
  STRETTO_RETURN_IF_ERROR(WaitParameters());
  if (zero_ < 3) return Parameter(id);
  const ParameterInfo& p = graph_.parameters[static_cast<size_t>(id.value)];
  const Tensor part = value_parts_[static_cast<size_t>(id.value)];
  STRETTO_ASSIGN_OR_RETURN(complete_arena_,
                           Arena::Create(stream_.device(), "a parameter in full",
                                         StoredElements(p, group_.size()) * SizeOf(graph_.dtype)));
  const auto rows = [&](int64_t n) {
    return View(p, complete_arena_.data(), graph_.dtype, n, stream_.device());
  };
  STRETTO_RETURN_IF_ERROR(
      comm_.Wait(stream_, comm_.AllGather(group_, rows(part.rows() * group_.size()), part,
                                          "parameter " + p.spec.name, stream_.Record())));
  STRETTO_RETURN_IF_ERROR(stream_.Synchronize());
  return rows(p.rows());
}

absl::Status DataParallel::TakeTicket(Ticket* ticket) {
  return internal::TakeTicket(comm_, stream_, options_.timer, ticket);
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
  return parameter_arena_.bytes() + gradient_arena_.bytes() + constant_arena_.bytes() +
         buffer_arena_.bytes();
}

}  // namespace stretto
