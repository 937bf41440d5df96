#include "src/train/rank_clock.h"

#include <utility>

namespace stretto::train_internal {
namespace {

constexpr size_t Index(int i) { return static_cast<size_t>(i); }

}  // namespace

RankClock::RankClock(const TrainConfig& config, const Links& links,
                     std::vector<StageSeconds> stages)
    : overlap_(config.parallel.overlap),
      prefetch_(config.parallel.prefetch),
      zero_(stages.front().plan->buckets.zero),
      links_(links) {
  for (StageSeconds& seconds : stages) {
    Stage& stage = stages_.emplace_back();
    stage.seconds = std::move(seconds);
    const BucketPlan& buckets = stage.seconds.plan->buckets;
    const size_t layers = stage.seconds.plan->model.graph.layers.size();
    for (auto* times : {&stage.input, &stage.summed, &stage.weight}) times->assign(layers, 0);
    stage.reduced.assign(buckets.buckets.size(), 0);
    stage.gathered.assign(buckets.buckets.size(), 0);
    stage.stays.resize(buckets.training.stays.size());
  }
  // What the step before it started under the forward of this one.
  if (links_.dp > 1 && prefetch_) GatherParameters();
}

void RankClock::Begin(const Program& program, int rank, size_t first, size_t count, double offset) {
  offset_ = offset;
  first_ = first;
  count_ = count;
  for (Stage& stage : stages_) {
    stage.works.clear();
    stage.next = 0;
    FindHalves(program.of_rank[Index(rank)], stage.seconds.plan->stage, program.items.size(),
               &stage.apart);
    stage.backwards_left = 0;
    for (const ProgramAction& a : program.of_rank[Index(rank)]) {
      if (a.stage != stage.seconds.plan->stage) continue;
      stage.works.push_back(a.work);
      stage.backwards_left += EndsBackward(a.work) ? 1 : 0;
    }
  }
  more_ = first + program.items.size() < count;
}

double RankClock::Run(const ProgramAction& action, double start) {
  const double begin = offset_ + start;
  now_ = begin + std::exchange(debt_, 0);
  for (Stage& stage : stages_) {
    if (stage.seconds.plan->stage == action.stage) Run(stage, action);
  }
  return now_ - begin;
}

double RankClock::FinishGradients(double start) {
  now_ = start + std::exchange(debt_, 0);
  for (auto stage = stages_.rbegin(); stage != stages_.rend(); ++stage) {
    if (links_.dp > 1) FinishGradients(*stage);
    now_ += stage->seconds.partial;
    tensor_ += stage->seconds.partial;
  }
  return now_;
}

double RankClock::GatherAtEnd(double start) {
  now_ = start;
  if (links_.dp == 1 || prefetch_) return now_;
  GatherParameters();
  now_ += std::exchange(debt_, 0);
  for (Stage& stage : stages_) WaitParameters(stage);
  return now_;
}

void RankClock::Repeat(const Totals& before, double seconds, double count) {
  compute_ += count * (compute_ - before.compute);
  tensor_ += count * (tensor_ - before.tensor);
  data_ += count * (data_ - before.data);
  ForTimes([&](double& t) {
    if (t > 0) t += count * seconds;
  });
}

std::vector<double> RankClock::Ahead(double end) {
  std::vector<double> ahead;
  ForTimes([&](const double& t) { ahead.push_back(std::max(0.0, t - end)); });
  return ahead;
}

double RankClock::Submit(double seconds, double* held_up) {
  const double serial = (1 - links_.hidden) * seconds;
  *held_up += serial;
  data_ += serial;
  channel_ = std::max(channel_, now_) + links_.hidden * seconds;
  return channel_;
}

void RankClock::WaitFor(double* finish, double* exposed) {
  if (*finish > now_) {
    *exposed += *finish - now_;
    now_ = *finish;
  }
  *finish = 0;
}

void RankClock::Layer(Stage& stage, const Action& action, bool finishes_apart, double seconds,
                      double exchange) {
  const auto l = Index(action.layer);
  const auto start = [&] {
    const double serial = (1 - links_.hidden) * exchange;
    now_ += serial;
    tensor_ += serial;
    tensor_channel_ = std::max(tensor_channel_, now_) + links_.hidden * exchange;
    return tensor_channel_;
  };
  double waited = exchange;
  switch (action.kind) {
    case ActionKind::kStartInput:
      stage.input[l] = start();
      return;
    case ActionKind::kStartWeight:
      stage.weight[l] = start();
      return;
    case ActionKind::kFinishInput:
      return WaitFor(&stage.summed[l], &tensor_);
    case ActionKind::kBackwardWeight:
      WaitFor(&stage.weight[l], &tensor_);
      break;
    case ActionKind::kBackwardInput:
      WaitFor(&stage.input[l], &tensor_);
      if (finishes_apart) waited = 0;
      break;
    case ActionKind::kForward:
    case ActionKind::kRecompute:
      break;
  }
  // The first piece is waited for, the others travel under products.
  const double hidden = links_.hidden * std::min(waited, seconds) * (1 - 1.0 / links_.pieces);
  now_ += seconds + waited - hidden;
  compute_ += seconds;
  tensor_ += waited - hidden;
  if (waited == 0 && exchange > 0) stage.summed[l] = start();
}

void RankClock::GatherParameters() {
  for (Stage& stage : stages_) {
    if (zero_ == 3) {
      GatherFor(stage, 0, &debt_);
      continue;
    }
    for (size_t b = stage.gathered.size(); b-- > 0;) {
      stage.gathered[b] = Submit(stage.seconds.gather[b], &debt_);
    }
  }
}

void RankClock::WaitParameters(Stage& stage) {
  for (double& finish : stage.gathered) WaitFor(&finish);
  const std::vector<BucketStay>& stays = stage.seconds.plan->buckets.training.stays;
  for (size_t s = 0; s < stays.size(); ++s) {
    if (!stays[s].gradients) WaitFor(&stage.stays[s].finish);
  }
}

void RankClock::FinishGradients(Stage& stage) {
  WaitParameters(stage);
  if (zero_ > 1) {
    const std::vector<BucketStay>& stays = stage.seconds.plan->buckets.training.stays;
    for (size_t s = 0; s < stays.size(); ++s) {
      if (stays[s].gradients) Collect(stage.stays[s]);
    }
    return;
  }
  while (stage.submitted < stage.reduced.size()) SubmitReduce(stage);
  for (double& finish : stage.reduced) WaitFor(&finish);
}

void RankClock::SubmitReduce(Stage& stage) {
  const size_t bucket = stage.submitted++;
  stage.reduced[bucket] = Submit(stage.seconds.reduce[bucket], &now_);
}

void RankClock::Gather(Stage& stage, int stay, double* held_up) {
  Stay& state = stage.stays[Index(stay)];
  if (state.submitted) return;
  state.submitted = true;
  const int bucket = stage.seconds.plan->buckets.training.stays[Index(stay)].bucket;
  state.finish = Submit(stage.seconds.gather[Index(bucket)], held_up);
}

void RankClock::GatherFor(Stage& stage, size_t action, double* held_up) {
  const BucketTimeline& timeline = stage.seconds.plan->buckets.training;
  if (!prefetch_ || action >= timeline.before.size()) return;
  for (const BucketEvent& event : timeline.before[action]) {
    if (event.kind == BucketEventKind::kCollect) return;
    if (event.kind == BucketEventKind::kGather && !event.ahead) {
      Gather(stage, event.stay, held_up);
    }
  }
}

void RankClock::Collect(Stay& stay) {
  if (!stay.submitted) return;
  stay.submitted = false;
  WaitFor(&stay.finish);
}

void RankClock::Do(Stage& stage, const BucketEvent& event, bool last) {
  Stay& stay = stage.stays[Index(event.stay)];
  const int bucket = stage.seconds.plan->buckets.training.stays[Index(event.stay)].bucket;
  switch (event.kind) {
    case BucketEventKind::kCollect:
      return Collect(stay);
    case BucketEventKind::kGather:
      if (prefetch_ && !(event.ahead && last)) Gather(stage, event.stay, &now_);
      return;
    case BucketEventKind::kOpen:
      return;
    case BucketEventKind::kUse:
      Gather(stage, event.stay, &now_);
      return WaitFor(&stay.finish);
    case BucketEventKind::kRelease:
      stay.submitted = false;
      return;
    case BucketEventKind::kReduce:
      stay.submitted = true;
      stay.finish = Submit(stage.seconds.reduce[Index(bucket)], &now_);
      if (!overlap_) Collect(stay);
      return;
  }
}

void RankClock::Run(Stage& stage, const ProgramAction& action) {
  const StageSeconds& s = stage.seconds;
  const StageSeconds::List& list =
      s.whole && stage.apart[Index(action.item)] == 0 ? *s.whole : s.list;
  const StageSeconds::Sizes& sizes =
      first_ + Index(action.item) + 1 == count_ ? list.rest : list.full;
  const BucketTimeline& timeline = s.plan->buckets.training;
  const std::vector<Action>& actions = list.actions->actions;
  const auto [first, end] = list.parts.Of(action.work);
  const bool last = EndsBackward(action.work) && stage.backwards_left == 1 && !more_;
  if (EndsBackward(action.work)) --stage.backwards_left;
  ++stage.next;
  for (size_t i = first; i < end; ++i) {
    if (links_.dp > 1 && actions[i].kind == ActionKind::kForward && zero_ < 3) {
      for (const int b : s.layer_buckets[Index(actions[i].layer)]) WaitFor(&stage.gathered[b]);
    }
    if (zero_ > 1) {
      for (const BucketEvent& event : timeline.before[i]) Do(stage, event, last);
    }
    Layer(stage, actions[i], list.finishes_apart[Index(actions[i].layer)] != 0, sizes.layer[i],
          sizes.exchange[i]);
    if (zero_ > 1) {
      for (const BucketEvent& event : timeline.after[i]) Do(stage, event, last);
    } else if (links_.dp > 1 && last && overlap_ &&
               actions[i].kind == ActionKind::kBackwardWeight &&
               stage.submitted < s.ready_layer.size() &&
               s.ready_layer[stage.submitted] == actions[i].layer) {
      SubmitReduce(stage);
    }
  }
  if (zero_ == 3 && stage.next < stage.works.size()) {
    GatherFor(stage, s.list.parts.Of(stage.works[stage.next]).first, &now_);
  }
}
}  // namespace stretto::train_internal
