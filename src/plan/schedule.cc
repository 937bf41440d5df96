#include "stretto/plan/schedule.h"

#include <algorithm>
#include <deque>
#include <iterator>
#include <tuple>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr ScheduleKind kKinds[] = {ScheduleKind::kGPipe, ScheduleKind::kOneF1B,
                                   ScheduleKind::kInterleaved, ScheduleKind::kZeroBubbleH1,
                                   ScheduleKind::kVShaped};

using Order = std::vector<StageAction>;

int RoundUp(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

Order GPipe(int rank, int micro_batches) {
  Order order;
  for (int m = 0; m < micro_batches; ++m) order.push_back({StageWork::kForward, rank, m});
  for (int m = 0; m < micro_batches; ++m) order.push_back({StageWork::kBackward, rank, m});
  return order;
}

// Rank r runs ahead by as many forwards as there are ranks behind it.
int Ahead(int ranks, int rank, int micro_batches) {
  return std::min(micro_batches, ranks - 1 - rank);
}

Order OneF1B(int ranks, int rank, int micro_batches) {
  Order order;
  const int ahead = Ahead(ranks, rank, micro_batches);
  for (int m = 0; m < ahead; ++m) order.push_back({StageWork::kForward, rank, m});
  for (int m = 0; m < micro_batches; ++m) {
    if (m + ahead < micro_batches) order.push_back({StageWork::kForward, rank, m + ahead});
    order.push_back({StageWork::kBackward, rank, m});
  }
  return order;
}

// 1F1B whose rank r postpones the weight halves of its first r micro-batches: the last rank, which
// holds the fewest activations in 1F1B, postpones the most, and no rank holds more than the first.
// In the middle, where every rank is busy, backward is whole. Those before wait for the last
// micro-batches again, behind each of which the oldest weight half comes. Nobody waits for rank 0.
Order ZeroBubbleH1(int ranks, int rank, int micro_batches) {
  Order order;
  const int ahead = Ahead(ranks, rank, micro_batches);
  for (int m = 0; m < ahead; ++m) order.push_back({StageWork::kForward, rank, m});
  std::deque<StageAction> postponed;
  const auto weight = [&] {
    order.push_back(postponed.front());
    postponed.pop_front();
  };
  for (int m = 0; m < micro_batches; ++m) {
    if (m + ahead < micro_batches) order.push_back({StageWork::kForward, rank, m + ahead});
    const bool begins = m < rank, ends = m >= micro_batches - (ranks - 1);
    if (rank == 0 || (!begins && !ends)) {
      order.push_back({StageWork::kBackward, rank, m});
      continue;
    }
    order.push_back({StageWork::kBackwardInput, rank, m});
    postponed.push_back({StageWork::kBackwardWeight, rank, m});
    if (!begins) weight();
  }
  while (!postponed.empty()) weight();
  return order;
}

// Micro-batches go through the chunks of a rank in groups of as many as there are ranks.
Order Interleaved(int ranks, int chunks, int rank, int micro_batches) {
  Order order;
  const int group = ranks * chunks, all = micro_batches * chunks;
  const auto action = [&](StageWork work, int k) {
    const int turn = k % group / ranks;
    const int chunk = work == StageWork::kForward ? turn : chunks - 1 - turn;
    return StageAction{work, chunk * ranks + rank, k / group * ranks + k % ranks};
  };
  const int ahead = std::min(all, 2 * (ranks - 1 - rank) + (chunks - 1) * ranks);
  for (int k = 0; k < ahead; ++k) order.push_back(action(StageWork::kForward, k));
  for (int k = 0; k < all; ++k) {
    if (k + ahead < all) order.push_back(action(StageWork::kForward, k + ahead));
    order.push_back(action(StageWork::kBackward, k));
  }
  return order;
}

// Stage `rank` going down and its mirror image going up again. In the phases below, "near" is the
// first of them and "far" the second.
class VShaped {
 public:
  VShaped(int ranks, int rank) : ranks_(ranks), rank_(rank) {}

  Order Run(int micro_batches) {
    const int behind = ranks_ - 1 - rank_, here = rank_ + 1;
    for (int i = 0; i < 2 * behind; ++i) Forward(kNear);
    for (int i = 0; i < here; ++i) {
      Forward(kNear);
      Forward(kFar);
    }
    for (int i = 0; i < behind; ++i) {
      Backward(kFar, true);
      Weight();
      Forward(kFar);
    }
    for (int i = 0; i < micro_batches - 2 * ranks_ + here; ++i) {
      // At the turn both chunks are on one rank, so its first backward needs the forward before it.
      Pair(kNear, kFar, /*woven=*/i > 0 || behind > 0);
      Pair(kFar, kNear, true);
    }
    for (int i = 0; i < behind; ++i) {
      Backward(kFar, false);
      Pair(kFar, kNear, true);
    }
    // From the middle on the weight halves are kept for later, when there is nothing else to do.
    for (int i = 0; i < here; ++i) {
      const bool middle = i == here / 2;
      Backward(kFar, i > here / 2 || (middle && rank_ % 2 == 1));
      Backward(kNear, i >= here / 2);
    }
    for (int i = 0; i < behind; ++i) {
      Weight();
      Backward(kNear, true);
    }
    while (!postponed_.empty()) Weight();
    return std::move(order_);
  }

 private:
  static constexpr int kNear = 0, kFar = 1;
  int StageOf(int chunk) const { return chunk == kNear ? rank_ : 2 * ranks_ - 1 - rank_; }
  void Forward(int chunk) {
    order_.push_back({StageWork::kForward, StageOf(chunk), forwards_[chunk]++});
  }
  void Backward(int chunk, bool postpone_weight) {
    const int m = backwards_[chunk]++;
    order_.push_back(
        {postpone_weight ? StageWork::kBackwardInput : StageWork::kBackward, StageOf(chunk), m});
    if (postpone_weight) postponed_.push_back({StageWork::kBackwardWeight, StageOf(chunk), m});
  }
  void Pair(int forward, int backward, bool woven) {
    Forward(forward);
    order_.back().with_next = woven;
    Backward(backward, false);
  }
  void Weight() {
    order_.push_back(postponed_.front());
    postponed_.pop_front();
  }

  int ranks_, rank_;
  int forwards_[2] = {}, backwards_[2] = {};
  std::deque<StageAction> postponed_;
  Order order_;
};

std::string Text(const StageAction& a) {
  return absl::StrCat(Name(a.work), " of micro-batch ", a.micro_batch, " on stage ", a.stage);
}

// Which halves of which micro-batch a stage has done.
class Progress {
 public:
  explicit Progress(const Schedule& s)
      : micro_batches_(s.micro_batches),
        stages_(s.stages),
        done_(static_cast<size_t>(s.stages) * static_cast<size_t>(s.micro_batches)) {}

  // Whether the action has been done already, in whole or in part.
  bool Repeats(const StageAction& a) { return (At(a.stage, a.micro_batch) & Bits(a.work)) != 0; }
  bool Ready(const StageAction& a) {
    const int m = a.micro_batch;
    switch (a.work) {
      case StageWork::kForward:
        return a.stage == 0 || (At(a.stage - 1, m) & kF);
      case StageWork::kBackward:
      case StageWork::kBackwardInput:
        return (At(a.stage, m) & kF) && (a.stage + 1 == stages_ || (At(a.stage + 1, m) & kB));
      case StageWork::kBackwardWeight:
        return At(a.stage, m) & kB;
    }
    return false;
  }
  void Do(const StageAction& a) { At(a.stage, a.micro_batch) |= Bits(a.work); }
  bool Complete(int stage, int m) { return At(stage, m) == (kF | kB | kW); }

 private:
  static constexpr uint8_t kF = 1, kB = 2, kW = 4;
  static uint8_t Bits(StageWork work) {
    switch (work) {
      case StageWork::kForward:
        return kF;
      case StageWork::kBackward:
        return kB | kW;
      case StageWork::kBackwardInput:
        return kB;
      case StageWork::kBackwardWeight:
        return kW;
    }
    return 0;
  }
  uint8_t& At(int stage, int m) {
    return done_[static_cast<size_t>(stage) * static_cast<size_t>(micro_batches_) +
                 static_cast<size_t>(m)];
  }
  int micro_batches_, stages_;
  std::vector<uint8_t> done_;
};

}  // namespace

const char* Name(StageWork work) {
  switch (work) {
    case StageWork::kForward:
      return "forward";
    case StageWork::kBackward:
      return "backward";
    case StageWork::kBackwardInput:
      return "backward input";
    case StageWork::kBackwardWeight:
      return "backward weight";
  }
  return "?";
}

const char* Name(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::kGPipe:
      return "gpipe";
    case ScheduleKind::kOneF1B:
      return "1f1b";
    case ScheduleKind::kInterleaved:
      return "interleaved";
    case ScheduleKind::kZeroBubbleH1:
      return "zb-h1";
    case ScheduleKind::kVShaped:
      return "v-shaped";
  }
  return "?";
}

absl::StatusOr<ScheduleKind> ParseScheduleKind(const std::string& name) {
  for (ScheduleKind kind : kKinds) {
    if (name == Name(kind)) return kind;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "there is no schedule '", name, "'; choose gpipe, 1f1b, interleaved, zb-h1 or v-shaped"));
}

absl::StatusOr<Schedule> MakeSchedule(ScheduleKind kind, int ranks, int chunks, int micro_batches) {
  constexpr int kMost = 1 << 20;
  if (ranks < 1 || chunks < 1 || micro_batches < 0 || ranks > kMost || micro_batches > kMost ||
      chunks > kMost / ranks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a schedule was asked for with ", ranks, " ranks, ", chunks, " chunks and ", micro_batches,
        " micro-batches; give at least 1, 1 and 0, and at most ", kMost, " of each"));
  }
  const bool v = kind == ScheduleKind::kVShaped;
  if (kind != ScheduleKind::kInterleaved && chunks != (v ? 2 : 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the ", Name(kind), " schedule has ", v ? 2 : 1, v ? " chunks" : " chunk",
        " of layers a rank, not ", chunks, "; only the interleaved schedule takes any number"));
  }
  Schedule s = {
      .kind = kind, .ranks = ranks, .stages = ranks * chunks, .micro_batches = micro_batches};
  for (int stage = 0; stage < s.stages; ++stage) {
    s.rank_of_stage.push_back(v && stage >= ranks ? s.stages - 1 - stage : stage % ranks);
  }
  for (int rank = 0; rank < ranks; ++rank) {
    Order order;
    switch (kind) {
      case ScheduleKind::kGPipe:
        order = GPipe(rank, micro_batches);
        break;
      case ScheduleKind::kOneF1B:
        order = OneF1B(ranks, rank, micro_batches);
        break;
      case ScheduleKind::kZeroBubbleH1:
        order = ZeroBubbleH1(ranks, rank, micro_batches);
        break;
      case ScheduleKind::kInterleaved:
        order = Interleaved(ranks, chunks, rank, RoundUp(micro_batches, ranks));
        break;
      case ScheduleKind::kVShaped:
        order = VShaped(ranks, rank).Run(std::max(micro_batches, 2 * ranks));
        break;
    }
    Order& kept = s.of_rank.emplace_back();
    for (const StageAction& a : order) {
      if (a.micro_batch < micro_batches) {
        kept.push_back(a);
      } else if (!kept.empty() && kept.back().with_next) {
        kept.back().with_next = false;  // its partner is one of those left out
      }
    }
  }
  return s;
}

absl::Status CheckSchedule(const Schedule& s) {
  if (static_cast<int>(s.of_rank.size()) != s.ranks ||
      static_cast<int>(s.rank_of_stage.size()) != s.stages) {
    return absl::InvalidArgumentError(
        absl::StrCat("a schedule of ", s.ranks, " ranks and ", s.stages, " stages has ",
                     s.of_rank.size(), " orders and ", s.rank_of_stage.size(), " places"));
  }
  for (int rank = 0; rank < s.ranks; ++rank) {
    for (const StageAction& a : s.of_rank[static_cast<size_t>(rank)]) {
      const bool known = a.stage >= 0 && a.stage < s.stages && a.micro_batch >= 0 &&
                         a.micro_batch < s.micro_batches;
      if (!known || s.rank_of_stage[static_cast<size_t>(a.stage)] != rank) {
        return absl::InvalidArgumentError(
            absl::StrCat("rank ", rank, " is to run ", Text(a), ", which is ",
                         known ? "another rank's" : "outside the schedule"));
      }
    }
  }
  Progress progress(s);
  std::vector<size_t> next(s.of_rank.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t rank = 0; rank < s.of_rank.size(); ++rank) {
      const Order& order = s.of_rank[rank];
      while (next[rank] < order.size()) {
        // A unit starts when all of it can.
        size_t end = next[rank] + 1;
        while (order[end - 1].with_next && end < order.size()) ++end;
        const auto unit = order.begin() + static_cast<std::ptrdiff_t>(next[rank]);
        const auto unit_end = order.begin() + static_cast<std::ptrdiff_t>(end);
        for (auto a = unit; a != unit_end; ++a) {
          if (progress.Repeats(*a)) {
            return absl::InvalidArgumentError(
                absl::StrCat("rank ", rank, " runs ", Text(*a), " a second time"));
          }
        }
        if (!std::all_of(unit, unit_end, [&](const StageAction& a) { return progress.Ready(a); })) {
          break;
        }
        for (auto a = unit; a != unit_end; ++a) progress.Do(*a);
        next[rank] = end;
        moved = true;
      }
    }
  }
  for (size_t rank = 0; rank < s.of_rank.size(); ++rank) {
    if (next[rank] == s.of_rank[rank].size()) continue;
    return absl::InvalidArgumentError(absl::StrCat("the order cannot be run: rank ", rank,
                                                   " waits for ever before ",
                                                   Text(s.of_rank[rank][next[rank]])));
  }
  for (int stage = 0; stage < s.stages; ++stage) {
    for (int m = 0; m < s.micro_batches; ++m) {
      if (!progress.Complete(stage, m)) {
        return absl::InvalidArgumentError(
            absl::StrCat("stage ", stage, " does not finish micro-batch ", m));
      }
    }
  }
  return absl::OkStatus();
}

std::vector<StageAction> OneOrder(const Schedule& s) {
  // When forward and backward of a micro-batch are over, by stage.
  const auto place = [&](bool forward, int stage, int micro_batch) {
    return 2 * (static_cast<size_t>(stage) * static_cast<size_t>(s.micro_batches) +
                static_cast<size_t>(micro_batch)) +
           (forward ? 1 : 0);
  };
  std::vector<int64_t> finished(
      2 * static_cast<size_t>(s.stages) * static_cast<size_t>(s.micro_batches), -1);
  struct Start {
    int64_t at = 0;
    StageAction action;
  };
  std::vector<Start> starts;
  std::vector<size_t> next(s.of_rank.size(), 0);
  std::vector<int64_t> now(s.of_rank.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t rank = 0; rank < s.of_rank.size(); ++rank) {
      for (; next[rank] < s.of_rank[rank].size(); ++next[rank]) {
        const StageAction& a = s.of_rank[rank][next[rank]];
        const bool forward = a.work == StageWork::kForward;
        int64_t ready = 0;
        if (forward && a.stage > 0) ready = finished[place(true, a.stage - 1, a.micro_batch)];
        if (a.work == StageWork::kBackward || a.work == StageWork::kBackwardInput) {
          if (a.stage + 1 < s.stages) ready = finished[place(false, a.stage + 1, a.micro_batch)];
        }
        if (ready < 0) break;
        const int64_t start = std::max(now[rank], ready);
        starts.push_back({start, a});
        now[rank] = start + 1;
        if (a.work != StageWork::kBackwardWeight) {
          finished[place(forward, a.stage, a.micro_batch)] = start + 1;
        }
        moved = true;
      }
    }
  }
  const auto key = [](const Start& x) {
    return std::tuple(x.at, -x.action.stage, x.action.work, x.action.micro_batch);
  };
  std::sort(starts.begin(), starts.end(),
            [&](const Start& a, const Start& b) { return key(a) < key(b); });
  std::vector<StageAction> order;
  for (const Start& start : starts) order.push_back(start.action);
  return order;
}

std::vector<int> FramesInFlight(const Schedule& s) {
  std::vector<int> most(static_cast<size_t>(s.stages), 0), now = most;
  for (const Order& order : s.of_rank) {
    for (const StageAction& a : order) {
      int& held = now[static_cast<size_t>(a.stage)];
      if (a.work == StageWork::kForward) {
        int& peak = most[static_cast<size_t>(a.stage)];
        peak = std::max(peak, ++held);
      } else if (a.work != StageWork::kBackwardInput) {
        --held;
      }
    }
  }
  return most;
}

double PublishedBubble(ScheduleKind kind, int ranks, int chunks, double forward,
                       double backward_input, double backward_weight, double pair) {
  const double waits = ranks - 1;
  switch (kind) {
    case ScheduleKind::kGPipe:
    case ScheduleKind::kOneF1B:
      return waits * (forward + backward_input + backward_weight);
    case ScheduleKind::kInterleaved:
      return waits * (forward + backward_input + backward_weight) / chunks;
    case ScheduleKind::kZeroBubbleH1:
      return waits * (forward + backward_input - backward_weight);
    case ScheduleKind::kVShaped: {
      const double w = backward_weight / 2, b = backward_input / 2 + w;  // of one chunk
      return waits * (pair + b - 3 * w);
    }
  }
  return 0;
}

}  // namespace stretto
