// Trainer::Create: what the copy engines need that carry exchanges of an axis, unless
// parallel.copy_engines is off.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/log.h"
#include "stretto/core/rng.h"

namespace stretto {
namespace {

std::string LayoutOf(const FrameLayout& frame) {
  return absl::StrCat(frame.bytes(), ":", absl::StrJoin(frame.forward_offset, ","), ":",
                      absl::StrJoin(frame.backward_offset, ","), ":",
                      absl::StrJoin(frame.grad_offset, ","));
}

// Where the frames of a stage have what.
uint64_t LayoutOf(const StagePlan& stage) {
  return StableHash(absl::StrCat(stage.frames, ";", stage.frame_bytes(), ";",
                                 LayoutOf(stage.train_frame), ";", LayoutOf(stage.evaluation_frame),
                                 ";", stage.whole ? LayoutOf(stage.whole->frame) : ""));
}

}  // namespace

absl::Status Trainer::Impl::SetUpCopyEngines() {
  for (const Group* axis : {&dp_group, &tp_group}) {
    if (axis->size() == 1) continue;
    const Resource memory = MemoryOf(stream->device());
    const std::string owner = absl::StrCat("copy window of ", axis->name);
    STRETTO_RETURN_IF_ERROR(budget.Reserve(memory, owner, Communicator::kCopyEngineBytes));
    STRETTO_ASSIGN_OR_RETURN(const std::string why, comm->UseCopyEngines(*axis));
    (axis == &dp_group ? dp_copied : tp_copied) = why.empty();
    if (why.empty()) continue;
    budget.Release(memory, owner);
    if (world.rank() == 0) {
      Log(config.parallel.copy_engines == "on" ? LogLevel::kWarning : LogLevel::kInfo,
          absl::StrCat("parallel.copy_engines: not on axis ", axis->name,
                       ", which NCCL's kernels serve: ", why));
    }
  }
  return absl::OkStatus();
}

// Parameters, which the data axis gathers, and activations, which the tensor axis does, need no
// copy on their way. Where ranks of an axis hold them at different places (heads that do not
// divide, say) they pass through windows.
absl::Status Trainer::Impl::ShareMemory() {
  const auto share = [&](const Group& axis, const Tensor& memory, uint64_t layout) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(const std::string why, comm->ShareMemory(axis, memory, layout));
    if (!why.empty() && world.rank() == 0) {
      LogInfo(absl::StrCat("parallel.copy_engines: windows serve axis ", axis.name, ": ", why));
    }
    return absl::OkStatus();
  };
  for (size_t i = 0; i < stages.size(); ++i) {
    // All ranks come to each of these calls, also those that have nothing there.
    if (dp_copied) {
      const Tensor parameters = stages[i].dp->parameter_memory();
      const uint64_t layout =
          StableHash(absl::StrCat(parameters.bytes(), " ", plan.stages[i].buckets.zero));
      STRETTO_RETURN_IF_ERROR(share(dp_group, parameters, layout));
    }
    if (tp_copied) {
      const Arena& frames = stages[i].frames;
      const Tensor activations =
          Tensor::Of(frames.data(), DType::kU8, {frames.bytes()}, frames.device());
      STRETTO_RETURN_IF_ERROR(share(tp_group, activations, LayoutOf(plan.stages[i])));
    }
  }
  return absl::OkStatus();
}

}  // namespace stretto
