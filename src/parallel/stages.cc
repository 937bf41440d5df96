#include "stretto/parallel/stages.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {

absl::StatusOr<std::vector<int64_t>> CutBlocks(int64_t blocks, int stages, double block,
                                               double first, double last) {
  if (stages < 1 || blocks < stages) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a model of ", blocks, blocks == 1 ? " block" : " blocks", " cannot be cut into ", stages,
        " stages, each of which needs a block; use fewer stages or more layers"));
  }
  // Blocks cost the same, so giving each one to the stage that is cheapest with it is best.
  std::vector<int64_t> counts(static_cast<size_t>(stages), 1);
  const auto cost_with_one_more = [&](size_t s) {
    double cost = static_cast<double>(counts[s] + 1) * block;
    if (s == 0) cost += first;
    if (s + 1 == counts.size()) cost += last;
    return cost;
  };
  for (int64_t given = stages; given < blocks; ++given) {
    size_t cheapest = 0;
    for (size_t s = 1; s < counts.size(); ++s) {
      if (cost_with_one_more(s) < cost_with_one_more(cheapest)) cheapest = s;
    }
    ++counts[cheapest];
  }
  return counts;
}

ListParts PartsOf(const ActionList& list) {
  const std::vector<Action>& actions = list.actions;
  ListParts parts = {.end = actions.size()};
  while (parts.forward_end < parts.end && actions[parts.forward_end].kind == ActionKind::kForward) {
    ++parts.forward_end;
  }
  // Behind the last action that is not a weight half.
  parts.weights_begin = parts.end;
  while (parts.weights_begin > parts.forward_end &&
         OfWeights(actions[parts.weights_begin - 1].kind)) {
    --parts.weights_begin;
  }
  return parts;
}

std::pair<size_t, size_t> ListParts::Of(StageWork work) const {
  switch (work) {
    case StageWork::kForward:
      return {0, forward_end};
    case StageWork::kBackward:
      return {forward_end, end};
    case StageWork::kBackwardInput:
      return {forward_end, weights_begin};
    case StageWork::kBackwardWeight:
      return {weights_begin, end};
  }
  return {0, 0};
}

// Memory for one micro-batch, and what is in it.
struct ModelStages::Slot {
  std::byte* memory = nullptr;
  std::unique_ptr<TokenFeeder> feeder;
  std::optional<Frame> frame;
  int item = -1;  // -1: free
};

struct ModelStages::Stage {
  StageMemory memory;
  StageParts parts;
  std::vector<Slot> slots;
  ListParts list, whole;
  std::vector<uint8_t> apart;    // by item of the program
  int backwards_left = 0;        // in this program
  std::vector<StageWork> works;  // of this stage in the program, in its order
  size_t next = 0;               // among them
};

ModelStages::ModelStages(Stream& stream) : stream_(stream) {}
ModelStages::~ModelStages() = default;

absl::StatusOr<std::unique_ptr<ModelStages>> ModelStages::Create(
    Stream& stream, const std::vector<StageMemory>& stages, int64_t token_capacity, Budget& budget,
    const RingCapacity& rings) {
  auto worker = std::unique_ptr<ModelStages>(new ModelStages(stream));
  for (const StageMemory& memory : stages) {
    Stage& stage = worker->stages_.emplace_back();
    stage.memory = memory;
    for (int k = 0; k < memory.frames; ++k) {
      Slot& slot = stage.slots.emplace_back();
      slot.memory = memory.memory + k * memory.frame_bytes;
      STRETTO_ASSIGN_OR_RETURN(slot.feeder,
                               TokenFeeder::Create(stream, token_capacity, budget, rings));
    }
  }
  return worker;
}

absl::Status ModelStages::Use(const std::vector<StageParts>& parts) {
  for (size_t i = 0; i < stages_.size(); ++i) {
    Stage& stage = stages_[i];
    stage.parts = parts[i];
    for (const auto& [list, cut] :
         {std::pair(&stage.parts.list, &stage.list), std::pair(&stage.parts.whole, &stage.whole)}) {
      if (list->actions == nullptr) continue;
      if (list->layout->bytes() > stage.memory.frame_bytes) {
        return absl::InvalidArgumentError(
            absl::StrCat("a frame of stage ", stage.memory.stage, " needs ", list->layout->bytes(),
                         " bytes, there are ", stage.memory.frame_bytes));
      }
      *cut = PartsOf(*list->actions);
    }
    const DataParallel* const parameters = stage.parts.parameters;
    if (stage.parts.whole.actions != nullptr && parameters != nullptr && parameters->zero() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("stage ", stage.memory.stage, " has two lists of actions, and ZeRO-",
                       parameters->zero(), " plans its buckets for one; give it one"));
    }
  }
  return absl::OkStatus();
}

void ModelStages::SetBatches(const RankProgram& program, std::span<const PackedBatch> batches,
                             size_t first, bool more) {
  batches_ = batches;
  first_ = first;
  more_ = more;
  for (Stage& stage : stages_) {
    stage.backwards_left = 0;
    stage.works.clear();
    stage.next = 0;
    FindHalves(program.actions(), stage.memory.stage, program.program().items.size(), &stage.apart);
    for (const ProgramAction& a : program.actions()) {
      if (a.stage == stage.memory.stage) stage.works.push_back(a.work);
      if (a.stage == stage.memory.stage &&
          (a.work == StageWork::kBackward || a.work == StageWork::kBackwardWeight)) {
        ++stage.backwards_left;
      }
    }
  }
}

TokenFeeder& ModelStages::feeder() { return *stages_.front().slots.front().feeder; }

int64_t ModelStages::Tokens(int item) const {
  const TokenCut& cut = stages_.front().parts.graph->tokens;
  return PartOf(cut, BatchOf(item).tokens()).count;
}

absl::StatusOr<ModelStages::Slot*> ModelStages::SlotOf(Stage& stage, int item) {
  for (Slot& slot : stage.slots) {
    if (slot.item == item) return &slot;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("stage ", stage.memory.stage, " has ", stage.slots.size(),
                   " frames for micro-batches in flight, ",
                   item < 0 ? "all of them in use; the program needs more"
                            : absl::StrCat("none with item ", item, "; check the program")));
}

absl::Status ModelStages::Run(const ProgramAction& action, Tensor in, Tensor out) {
  const auto found = std::find_if(stages_.begin(), stages_.end(),
                                  [&](const Stage& s) { return s.memory.stage == action.stage; });
  if (found == stages_.end()) {
    return absl::FailedPreconditionError(
        absl::StrCat("stage ", action.stage, " does not lie on this rank; check the program"));
  }
  Stage& stage = *found;
  const StageParts& p = stage.parts;
  const bool forward = action.work == StageWork::kForward;
  const bool whole =
      p.whole.actions != nullptr && stage.apart[static_cast<size_t>(action.item)] == 0;
  const ActionList& actions = *(whole ? p.whole : p.list).actions;
  const FrameLayout& layout = *(whole ? p.whole : p.list).layout;
  const auto [first, end] = (whole ? stage.whole : stage.list).Of(action.work);
  const bool done = action.work == StageWork::kBackward ||
                    action.work == StageWork::kBackwardWeight ||
                    (forward && end == actions.actions.size());
  ActionHooks* hooks = nullptr;
  if (p.parameters != nullptr && p.local) {
    hooks = p.parameters->local_hooks(*p.run, actions.training);
  } else if (p.parameters != nullptr && !actions.training) {
    hooks = p.parameters->evaluation_hooks(*p.run);
  } else if (p.parameters != nullptr) {
    // Gradients leave with the last weight half of the step on this stage.
    hooks = &p.parameters->hooks(!forward && done && stage.backwards_left == 1 && !more_);
  }
  if (done && !forward) --stage.backwards_left;
  // What comes next on this stage may have to wait for its neighbour: its parameters travel
  // meanwhile.
  ++stage.next;
  const auto gather_for_next = [&] {
    if (p.parameters == nullptr || p.local || !actions.training) return;
    if (stage.next >= stage.works.size()) return;
    p.parameters->GatherFor(stage.list.Of(stage.works[stage.next]).first);
  };
  if (Empty(action.item)) {
    if (hooks != nullptr) FollowHooks(actions, first, end, *hooks);
    gather_for_next();
    return absl::OkStatus();
  }
  STRETTO_ASSIGN_OR_RETURN(Slot* const slot, SlotOf(stage, forward ? -1 : action.item));
  if (forward) {
    const PackedBatch& batch = BatchOf(action.item);
    if (batch.tokens() > layout.token_capacity) {
      return absl::InternalError(absl::StrCat("a micro-batch has ", batch.tokens(),
                                              " tokens, the frame was planned for ",
                                              layout.token_capacity));
    }
    slot->item = action.item;
    slot->frame.emplace(p.graph, &actions, &layout, slot->memory, stream_.device());
    STRETTO_ASSIGN_OR_RETURN(slot->frame->tokens, slot->feeder->Feed(batch));
    if (const RingViews* const ring = slot->frame->tokens.ring) {
      for (const RingViews::Place& place : ring->places) {
        if (place.tokens <= layout.token_capacity) continue;
        return absl::InternalError(
            absl::StrCat("a rank that shares a micro-batch has ", place.tokens,
                         " tokens of it, the frame was planned for ", layout.token_capacity));
      }
    }
  }
  Frame& frame = *slot->frame;
  frame.boundary = {in, out};
  ExecuteSome(*p.graph, actions, first, end, *p.run, frame, hooks, replays_);
  if (done) slot->item = -1;
  gather_for_next();
  return absl::OkStatus();
}

}  // namespace stretto
