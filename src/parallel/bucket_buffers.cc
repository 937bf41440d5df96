#include "src/parallel/bucket_buffers.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/parallel/parameter_storage.h"
#include "stretto/parallel/step_phase.h"

namespace stretto::internal {

absl::Status TakeTicket(Communicator& comm, Stream& stream, PhaseTimer* timer, Ticket* ticket) {
  const Ticket taken = std::exchange(*ticket, 0);
  if (taken == 0) return absl::OkStatus();
  return TimedWait(comm, stream, timer, StepPhase::kExposedData, taken);
}

BucketBuffers::BucketBuffers(Communicator& comm, const Group& group, const Graph& graph,
                             ops::Context ops, const BucketPlan& plan, std::byte* memory,
                             const Shards& shards, const Options& options)
    : comm_(comm), group_(group), ops_(ops), options_(options) {
  MakeTimeline(graph, plan, plan.training, memory, shards, &training_);
  MakeTimeline(graph, plan, plan.evaluation, memory, shards, &evaluation_);
  added_.assign(plan.buckets.size(), 0);
  for (const std::vector<int>& params : plan.buckets) {
    sums_.emplace_back();
    for (const int p : params) sums_.back().push_back(shards.gradients[static_cast<size_t>(p)]);
  }
}

void BucketBuffers::MakeTimeline(const Graph& graph, const BucketPlan& plan,
                                 const BucketTimeline& from, std::byte* memory,
                                 const Shards& shards, Timeline* timeline) const {
  timeline->plan = &from;
  const Device device = ops_.stream->device();
  for (const BucketStay& s : from.stays) {
    Stay& stay = timeline->stays.emplace_back();
    stay.bucket = s.bucket;
    stay.gradients = s.gradients;
    stay.label = absl::StrCat(s.gradients ? "grad bucket " : "param bucket ", s.bucket);
    const DType dtype = s.gradients ? AccumulateType(graph.dtype) : graph.dtype;
    std::byte* at = memory + s.offset;
    stay.place = Tensor::Of(at, DType::kU8, {s.bytes}, device);
    for (const int p : plan.buckets[static_cast<size_t>(s.bucket)]) {
      const ParameterInfo& info = graph.parameters[static_cast<size_t>(p)];
      const RowCut cut = CutRows(info.rows(), group_.size(), group_.index);
      const int64_t arriving = cut.part * group_.size();
      const int64_t all = std::max(arriving, info.padded_rows);
      // What a gather brings includes the padding of the parts.
      const int64_t written = s.gradients ? info.rows() : arriving;
      stay.params.push_back(ParamId{p});
      stay.full.push_back(View(info, at, dtype, info.rows(), device));
      stay.stored.push_back(View(info, at, dtype, arriving, device));
      stay.parts.push_back(stay.stored.back().Rows(cut.part * group_.index, cut.part));
      stay.shards.push_back(
          (s.gradients ? shards.gradients : shards.values)[static_cast<size_t>(p)]);
      if (all > written) {
        stay.padding.push_back(View(info, at, dtype, all, device).Rows(written, all - written));
      }
      at += Aligned(StoredElements(info, group_.size()) * SizeOf(dtype));
    }
  }
}

void BucketBuffers::BeginStep() { std::fill(added_.begin(), added_.end(), 0); }

bool BucketBuffers::ActsBefore(bool training, size_t action) const {
  const std::vector<std::vector<BucketEvent>>& events =
      (training ? training_ : evaluation_).plan->before;
  return action < events.size() && !events[action].empty();
}

bool BucketBuffers::ActsAfter(bool training, size_t action) const {
  const std::vector<std::vector<BucketEvent>>& events =
      (training ? training_ : evaluation_).plan->after;
  return action < events.size() && !events[action].empty();
}

absl::Status BucketBuffers::Before(const Caller& caller, size_t action) {
  for (const BucketEvent& event : Of(caller.training).plan->before[action]) {
    STRETTO_RETURN_IF_ERROR(Do(caller, event));
  }
  return absl::OkStatus();
}

absl::Status BucketBuffers::After(const Caller& caller, size_t action) {
  for (const BucketEvent& event : Of(caller.training).plan->after[action]) {
    STRETTO_RETURN_IF_ERROR(Do(caller, event));
  }
  return absl::OkStatus();
}

absl::Status BucketBuffers::Do(const Caller& caller, const BucketEvent& event) {
  Stay& stay = Of(caller.training).stays[static_cast<size_t>(event.stay)];
  switch (event.kind) {
    case BucketEventKind::kCollect:
      return Collect(stay);
    case BucketEventKind::kGather:
      if (caller.communicate && options_.prefetch && !(event.ahead && caller.last)) Gather(stay);
      return absl::OkStatus();
    case BucketEventKind::kOpen:
      for (const Tensor& rows : stay.padding) ops::Zero(ops_, rows);
      for (size_t i = 0; i < stay.params.size(); ++i) {
        caller.run->SetGradient(stay.params[i], stay.full[i]);
      }
      return absl::OkStatus();
    case BucketEventKind::kUse:
      return Use(caller, stay);
    case BucketEventKind::kRelease:
      for (const ParamId p : stay.params) caller.run->SetParameter(p, {});
      stay.submitted = false;
      Poison(stay);
      return absl::OkStatus();
    case BucketEventKind::kReduce:
      return Reduce(caller, stay);
  }
  return absl::OkStatus();
}

void BucketBuffers::Gather(Stay& stay) {
  if (stay.submitted) return;  // ahead
  stay.submitted = true;
  const TraceScope scope(comm_.trace(), {.bucket = stay.bucket});
  // Whatever used the place before comes before on the stream.
  stay.ticket =
      comm_.AllGatherMany(group_, stay.stored, stay.shards, stay.label, ops_.stream->Record());
}

absl::Status BucketBuffers::Use(const Caller& caller, Stay& stay) {
  if (caller.communicate) {
    Gather(stay);
    STRETTO_RETURN_IF_ERROR(
        TakeTicket(comm_, *ops_.stream, caller.training ? options_.timer : nullptr, &stay.ticket));
  }
  for (const Tensor& rows : stay.padding) ops::Zero(ops_, rows);
  for (size_t i = 0; i < stay.params.size(); ++i) {
    caller.run->SetParameter(stay.params[i], stay.full[i]);
  }
  return absl::OkStatus();
}

absl::Status BucketBuffers::Reduce(const Caller& caller, Stay& stay) {
  for (const ParamId p : stay.params) {
    const Run::Target target = caller.run->Gradient(p);
    if (!target.accumulate) ops::Zero(ops_, target.tensor);  // nothing was written to it
    caller.run->SetGradient(p, {});
  }
  if (!caller.communicate) return absl::OkStatus();
  stay.submitted = true;
  const TraceScope scope(comm_.trace(), {.bucket = stay.bucket});
  const Event after = ops_.stream->Record();
  if (options_.add_in_transit) {
    const bool again = std::exchange(added_[static_cast<size_t>(stay.bucket)], uint8_t{1}) != 0;
    stay.ticket =
        again ? comm_.ReduceScatterAddMany(group_, stay.shards, stay.stored, stay.label, after)
              : comm_.ReduceScatterMany(group_, stay.shards, stay.stored, stay.label, after);
  } else {
    stay.ticket = comm_.ReduceScatterMany(group_, stay.parts, stay.stored, stay.label, after);
  }
  return options_.overlap ? absl::OkStatus() : Collect(stay);
}

absl::Status BucketBuffers::Collect(Stay& stay) {
  if (!stay.submitted) return absl::OkStatus();
  stay.submitted = false;
  STRETTO_RETURN_IF_ERROR(TakeTicket(comm_, *ops_.stream, options_.timer, &stay.ticket));
  if (!options_.add_in_transit) {
    const bool again = std::exchange(added_[static_cast<size_t>(stay.bucket)], uint8_t{1}) != 0;
    again ? ops::AddMany(ops_, stay.shards, stay.parts)
          : ops::CopyMany(ops_, stay.shards, stay.parts);
  }
  Poison(stay);
  return absl::OkStatus();
}

absl::Status BucketBuffers::FinishGradients() {
  for (Stay& stay : training_.stays) {
    if (stay.gradients) STRETTO_RETURN_IF_ERROR(Collect(stay));
  }
  for (size_t b = 0; b < sums_.size(); ++b) {
    if (added_[b] != 0) continue;
    for (const Tensor& sum : sums_[b]) ops::Zero(ops_, sum);  // there was no micro-batch at all
  }
  return absl::OkStatus();
}

void BucketBuffers::GatherFor(size_t action) {
  if (!options_.prefetch || action >= training_.plan->before.size()) return;
  for (const BucketEvent& event : training_.plan->before[action]) {
    if (event.kind == BucketEventKind::kCollect) return;  // the place may be that of these sums
    if (event.kind == BucketEventKind::kGather && !event.ahead) {
      Gather(training_.stays[static_cast<size_t>(event.stay)]);
    }
  }
}

absl::Status BucketBuffers::WaitGathers() {
  for (Timeline* timeline : {&training_, &evaluation_}) {
    for (Stay& stay : timeline->stays) {
      if (stay.gradients) continue;
      STRETTO_RETURN_IF_ERROR(TakeTicket(comm_, *ops_.stream, nullptr, &stay.ticket));
    }
  }
  return absl::OkStatus();
}

absl::Status BucketBuffers::Drop() {
  STRETTO_RETURN_IF_ERROR(WaitGathers());
  for (Timeline* timeline : {&training_, &evaluation_}) {
    for (Stay& stay : timeline->stays) {
      if (!stay.gradients) stay.submitted = false;
    }
  }
  return absl::OkStatus();
}

void BucketBuffers::Poison(const Stay& stay) const {
  if (!options_.poison || stay.place.device.kind != DeviceKind::kCpu) return;
  ops_.stream->Enqueue([place = stay.place] {
    std::memset(place.data, 0xff, static_cast<size_t>(place.bytes()));  // NaN in every type
  });
}

}  // namespace stretto::internal
