// When buckets come and go with ZeRO-2 and 3: plans are replayed without devices, and each rule
// that they keep is broken once to see that the replay notices.
#include "stretto/parallel/bucket_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "stretto/parallel/data_parallel.h"
#include "tests/support/harness.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

// A model with its lists.
struct Subject {
  Model model;
  ActionList training, evaluation;
  std::vector<std::vector<int>> buckets;
  BucketPlanOptions options;

  const Graph& graph() const { return model.graph; }
  BucketTimeline Training() const { return PlanTimeline(graph(), training, buckets, options); }
  BucketTimeline Evaluation() const { return PlanTimeline(graph(), evaluation, buckets, options); }
};

Subject Make(const std::string& family, bool tied, Recompute recompute, int64_t chunk,
             const BucketPlanOptions& options) {
  ModelConfig config = testing::OddModel(family, tied);
  config.layers = 3;
  EXPECT_TRUE(config.Resolve().ok());
  Subject s;
  s.model = BuildModel(config, {.loss_chunk = chunk}).value();
  s.training = TrainingActions(s.graph(), recompute, /*defer_weights=*/options.halves);
  s.evaluation = EvaluationActions(s.graph());
  s.buckets = MakeBuckets(s.graph(), options.bucket_bytes);
  s.options = options;
  return s;
}

// Goes through `micro_batches` micro-batches as a rank does and says what is wrong first. Pieces of
// a list, where it runs in pieces, take turns.
class Replay {
 public:
  Replay(const Subject& subject, const ActionList& list, const BucketTimeline& timeline)
      : subject_(subject), list_(list), timeline_(timeline), live_(timeline.stays.size(), kFree) {}

  std::string Run(int micro_batches) {
    const size_t end = list_.actions.size();
    std::vector<size_t> cuts = {0};
    if (subject_.options.pieces) {
      size_t forward = 0;
      while (forward < end && list_.actions[forward].kind == ActionKind::kForward) ++forward;
      cuts.push_back(forward);
      size_t weights = end;
      while (list_.actions[weights - 1].kind == ActionKind::kBackwardWeight) --weights;
      if (subject_.options.halves && list_.training) cuts.push_back(weights);
    }
    cuts.push_back(end);
    // Forward of all of them first, which a pipeline may do; without one, one after the other.
    if (!subject_.options.pieces) {
      for (int m = 0; m < micro_batches; ++m) Piece(0, end, m + 1 == micro_batches);
    } else {
      for (size_t c = 0; c + 1 < cuts.size(); ++c) {
        for (int m = 0; m < micro_batches; ++m) Piece(cuts[c], cuts[c + 1], true);
        for (size_t s = 0; s < live_.size(); ++s) {
          if (live_[s] != kFree) Wrong("a stay outlives its piece", static_cast<int>(s));
        }
      }
    }
    for (size_t s = 0; s < live_.size(); ++s) {
      const bool late = live_[s] == kLeaving;  // FinishGradients collects it
      if (live_[s] != kFree && !late) Wrong("a stay never ends", static_cast<int>(s));
      if (late) ++sums_[timeline_.stays[s].bucket];
    }
    if (!list_.training) return wrong_;
    for (size_t b = 0; b < subject_.buckets.size() && subject_.options.zero >= 2; ++b) {
      if (sums_[static_cast<int>(b)] != micro_batches * timeline_.reduces[b]) {
        Wrong("sums are missing", -1);
      }
    }
    return wrong_;
  }

 private:
  enum State { kFree, kComing, kUsed, kOpen, kLeaving };

  void Wrong(const std::string& what, int stay) {
    if (wrong_.empty()) {
      wrong_ = absl::StrCat(what, stay < 0 ? "" : absl::StrCat(" (stay ", stay, ")"));
    }
  }
  void Become(int stay, State from, State to) {
    State& state = live_[static_cast<size_t>(stay)];
    if (state != from) Wrong("an event does not follow what was before", stay);
    state = to;
    if (from != kFree) return;
    const BucketStay& mine = timeline_.stays[static_cast<size_t>(stay)];
    for (size_t s = 0; s < live_.size(); ++s) {
      const BucketStay& other = timeline_.stays[s];
      if (static_cast<int>(s) == stay || live_[s] == kFree) continue;
      if (mine.offset < other.offset + other.bytes && other.offset < mine.offset + mine.bytes) {
        Wrong("two stays share a place", stay);
      }
    }
    if (mine.offset < 0 || mine.offset + mine.bytes > timeline_.bytes) {
      Wrong("a place lies outside of the buffers", stay);
    }
  }
  void Do(const BucketEvent& e, bool last) {
    State& state = live_[static_cast<size_t>(e.stay)];
    switch (e.kind) {
      case BucketEventKind::kGather:
        if (e.ahead && last) return;
        if (state == kComing) return;  // ahead
        return Become(e.stay, kFree, kComing);
      case BucketEventKind::kUse:
        return Become(e.stay, kComing, kUsed);
      case BucketEventKind::kRelease:
        return Become(e.stay, kUsed, kFree);
      case BucketEventKind::kOpen:
        return Become(e.stay, kFree, kOpen);
      case BucketEventKind::kReduce:
        return Become(e.stay, kOpen, kLeaving);
      case BucketEventKind::kCollect:
        if (state == kFree) return;  // nothing left in an earlier micro-batch
        ++sums_[timeline_.stays[static_cast<size_t>(e.stay)].bucket];
        return Become(e.stay, kLeaving, kFree);
    }
  }
  bool Has(int bucket, bool gradients) const {
    for (size_t s = 0; s < live_.size(); ++s) {
      const BucketStay& stay = timeline_.stays[s];
      if (stay.bucket != bucket || stay.gradients != gradients) continue;
      if (live_[s] == (gradients ? kOpen : kUsed)) return true;
    }
    return false;
  }
  void Piece(size_t first, size_t end, bool last) {
    for (size_t a = first; a < end; ++a) {
      for (const BucketEvent& e : timeline_.before[a]) Do(e, last);
      const Action& action = list_.actions[a];
      const Layer& layer = *subject_.graph().layers[static_cast<size_t>(action.layer)];
      const bool forward =
          action.kind == ActionKind::kForward || action.kind == ActionKind::kRecompute;
      const unsigned half = forward                                     ? kInForward
                            : action.kind == ActionKind::kBackwardInput ? kInBackwardInput
                                                                        : kInBackwardWeight;
      for (size_t b = 0; b < subject_.buckets.size(); ++b) {
        const bool mine =
            std::any_of(subject_.buckets[b].begin(), subject_.buckets[b].end(), [&](int p) {
              const auto& layers = subject_.graph().parameters[static_cast<size_t>(p)].layers;
              return std::find(layers.begin(), layers.end(), action.layer) != layers.end();
            });
        if (!mine) continue;
        const auto bucket = static_cast<int>(b);
        if (subject_.options.zero >= 3 && (layer.ReadsParameters() & half) && !Has(bucket, false)) {
          Wrong("a layer runs without its parameters", -1);
        }
        if (subject_.options.zero >= 2 && list_.training && (layer.WritesGradients() & half) &&
            !Has(bucket, true)) {
          Wrong("a layer has no place for its gradients", -1);
        }
      }
      for (const BucketEvent& e : timeline_.after[a]) Do(e, last);
    }
  }

  const Subject& subject_;
  const ActionList& list_;
  const BucketTimeline& timeline_;
  std::vector<State> live_;
  std::map<int, int> sums_;  // collected by bucket
  std::string wrong_;
};

std::vector<Subject> Subjects() {
  std::vector<Subject> all;
  for (const int zero : {2, 3}) {
    for (const bool tied : {true, false}) {
      for (const Recompute recompute :
           {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
        for (const int64_t bucket_bytes : {1, 3000, 20000, 1 << 30}) {
          for (const int64_t chunk : {0, 64}) {
            for (const int runs : {0, 1, 2}) {
              all.push_back(Make(tied ? "gpt2" : "qwen3", tied, recompute, chunk,
                                 {.zero = zero,
                                  .ranks = 3,
                                  .bucket_bytes = bucket_bytes,
                                  .pieces = runs > 0,
                                  .halves = runs > 1}));
            }
          }
        }
      }
    }
  }
  return all;
}

TEST(BucketPlan, GivesEveryLayerWhatItNeeds) {
  for (const Subject& s : Subjects()) {
    const BucketTimeline training = s.Training(), evaluation = s.Evaluation();
    EXPECT_EQ(Replay(s, s.training, training).Run(3), "")
        << Describe(s.graph(), s.training, training);
    EXPECT_EQ(Replay(s, s.evaluation, evaluation).Run(2), "")
        << Describe(s.graph(), s.evaluation, evaluation);
  }
}

// Every event is needed where it is: without it, or with it one action too early where it ends
// something, or with a place moved by a byte into another's, the replay finds something wrong.
TEST(BucketPlan, ReplayNoticesWhatIsBroken) {
  const Subject s =
      Make("gpt2", true, Recompute::kBlock, 0, {.zero = 3, .ranks = 2, .bucket_bytes = 3000});
  const BucketTimeline sound = s.Training();
  int broken = 0;
  for (const bool after : {false, true}) {
    for (size_t a = 0; a < s.training.actions.size(); ++a) {
      for (size_t i = 0; i < (after ? sound.after : sound.before)[a].size(); ++i) {
        BucketTimeline t = sound;
        auto& events = after ? t.after : t.before;
        const BucketEvent event = events[a][i];
        events[a].erase(events[a].begin() + static_cast<std::ptrdiff_t>(i));
        if (event.ahead) {  // without it the gather starts later
          EXPECT_EQ(Replay(s, s.training, t).Run(3), "");
          continue;
        }
        // Without overlap of two micro-batches the last sums are collected at the step's end.
        EXPECT_NE(Replay(s, s.training, t).Run(3), "") << Name(event.kind) << " at " << a;
        ++broken;
        if (!after || event.kind == BucketEventKind::kCollect) continue;
        t.after[a - 1].push_back(event);
        EXPECT_NE(Replay(s, s.training, t).Run(3), "") << Name(event.kind) << " early at " << a;
        ++broken;
      }
    }
  }
  EXPECT_GT(broken, 80);
  int shared = 0;
  for (size_t i = 0; i < sound.stays.size(); ++i) {
    BucketTimeline t = sound;
    for (size_t k = 0; k < t.stays.size(); ++k) {
      if (k != i) t.stays[i].offset = t.stays[k].offset;
      shared += Replay(s, s.training, t).Run(2).find("share") != std::string::npos;
    }
  }
  EXPECT_GT(shared, 50);
}

// Two buckets of gradients and a few of parameters at a time, however many there are.
TEST(BucketPlan, BuffersDoNotGrowWithTheModel) {
  const auto bytes = [](int64_t layers, int zero, Recompute recompute) {
    ModelConfig config = testing::OddModel("qwen3", false);
    config.layers = layers;
    EXPECT_TRUE(config.Resolve().ok());
    const Model model = BuildModel(config).value();
    return PlanBuckets(model.graph, TrainingActions(model.graph, recompute),
                       EvaluationActions(model.graph),
                       {.zero = zero, .ranks = 4, .bucket_bytes = 1})
        .buffer_bytes;
  };
  for (const int zero : {2, 3}) {
    for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
      EXPECT_GT(bytes(3, zero, recompute), 0);
      EXPECT_EQ(bytes(3, zero, recompute), bytes(24, zero, recompute));
    }
  }
}

TEST(BucketPlan, OneRankHasNothingToShard) {
  const Subject s = Make("qwen3", false, Recompute::kNone, 0, {.zero = 3, .ranks = 1});
  const BucketPlan plan = PlanBuckets(s.graph(), s.training, s.evaluation, s.options);
  EXPECT_EQ(plan.zero, 1);
  EXPECT_EQ(plan.buffer_bytes, 0);
  EXPECT_EQ(SentBytes(s.graph(), plan, 5).gradients, 0);
}

// The events as text, for a model whose buckets are its layers.
TEST(BucketPlan, ReadsAsAListOfEvents) {
  Builder b(DType::kF32);
  const SlotId x = b.Embedding("embed", 8, 4, 0, 0.1);
  b.BeginBlock();
  const SlotId y = b.Linear("one", Role::kColumn, x, 4, 8);
  b.EndBlock();
  b.LossHead("head", b.Linear("two", Role::kRow, y, 8, 4), 8, 0, ParamId(), 0.1);
  const Graph graph = b.Finish().value();
  const ActionList list = TrainingActions(graph, Recompute::kNone);
  const BucketTimeline t =
      PlanTimeline(graph, list, MakeBuckets(graph, 1), {.zero = 3, .ranks = 2, .bucket_bytes = 1});
  EXPECT_THAT(Describe(graph, list, t), HasSubstr("before F embed: gather parameters 3 at "));
  // Buckets: 0 head, 1 two, 2 one, 3 embed; p: parameters, d: gradients.
  std::vector<std::string> events;
  const auto note = [&](const std::vector<BucketEvent>& at) {
    for (const BucketEvent& e : at) {
      const BucketStay& s = t.stays[static_cast<size_t>(e.stay)];
      events.push_back(
          absl::StrCat(Name(e.kind), e.ahead ? " ahead " : " ", s.gradients ? "d" : "p", s.bucket));
    }
  };
  for (size_t a = 0; a < list.actions.size(); ++a) {
    note(t.before[a]);
    events.push_back(absl::StrCat(std::string(1, "FRBW"[static_cast<int>(list.actions[a].kind)]),
                                  " ",
                                  graph.layer_names[static_cast<size_t>(list.actions[a].layer)]));
    note(t.after[a]);
  }
  EXPECT_EQ(absl::StrJoin(events, "; "),
            "gather p3; gather p2; use p3; F embed; release p3; gather p1; use p2; F one; "
            "release p2; gather p0; use p1; F two; gather p2; use p0; F head; B head; release p0; "
            "collect d3; open d0; W head; reduce d0; B two; release p1; open d1; W two; reduce d1; "
            "collect d0; gather ahead p3; use p2; B one; release p2; open d2; W one; reduce d2; "
            "collect d1; B embed; open d3; W embed; reduce d3; collect d2");
}

}  // namespace
}  // namespace stretto
