// Random programs on real ranks: every action checks what reached it, and those who share an item
// exchange something, as ring attention would.
#ifndef STRETTO_TESTS_SUPPORT_PIPELINE_CASES_H_
#define STRETTO_TESTS_SUPPORT_PIPELINE_CASES_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/parallel/pipeline.h"
#include "tests/support/random_items.h"

namespace stretto::testing {

inline constexpr int64_t kBoundaryWidth = 3;

// What stage `stage` makes of an item on one pipeline; nobody else makes the same.
inline float Made(bool forward, int stage, int item, int pipeline, int64_t element) {
  return static_cast<float>(((item * 64 + stage) * 16 + pipeline) * 2 + (forward ? 1 : 0)) +
         0.125f * static_cast<float>(element % 7);
}

class CheckingWorker : public StageWorker {
 public:
  CheckingWorker(Communicator& comm, const Group& group, const Program& program)
      : comm_(comm), group_(group), program_(program) {}

  int64_t Tokens(int item) const override {
    const PlanItem& i = program_.items[static_cast<size_t>(item)];
    // Shares differ by at most one row.
    const auto n = static_cast<int64_t>(i.pipelines.size());
    const int64_t place =
        std::find(i.pipelines.begin(), i.pipelines.end(), pipeline()) - i.pipelines.begin();
    return i.tokens / n + (place < i.tokens % n ? 1 : 0);
  }

  absl::Status Run(const ProgramAction& a, Tensor in, Tensor out) override {
    ++actions_;
    const bool forward = a.work == StageWork::kForward;
    const auto wrong = [&](const std::string& what) {
      return absl::DataLossError(absl::StrCat(what, " in the ", Name(a.work), " of item ", a.item,
                                              " on stage ", a.stage, ", rank ", group_.index));
    };
    const bool takes = a.work != StageWork::kBackwardWeight &&
                       (forward ? a.stage > 0 : a.stage + 1 < program_.stages);
    if (takes != in.present()) return wrong("an input is missing, or one too many");
    if (in.present()) {
      if (in.rows() != Tokens(a.item)) return wrong("the input has another number of rows");
      const int from = forward ? a.stage - 1 : a.stage + 1;
      for (int64_t i = 0; i < in.elements(); ++i) {
        if (in.as<float>()[i] != Made(forward, from, a.item, pipeline(), i)) {
          return wrong("the input is not what the stage before made");
        }
      }
    }
    STRETTO_RETURN_IF_ERROR(Exchange(a));
    if (out.present()) {
      for (int64_t i = 0; i < out.elements(); ++i) {
        out.as<float>()[i] = Made(forward, a.stage, a.item, pipeline(), i);
      }
    }
    return absl::OkStatus();
  }

  int actions() const { return actions_; }

 private:
  int pipeline() const { return group_.index / program_.pipeline_ranks; }

  // Passes a number around the ring of those who share the item; each gets its neighbour's.
  absl::Status Exchange(const ProgramAction& a) {
    const std::vector<int>& ring = program_.items[static_cast<size_t>(a.item)].pipelines;
    if (ring.size() < 2 || a.work == StageWork::kBackwardWeight) return absl::OkStatus();
    const auto place =
        static_cast<size_t>(std::find(ring.begin(), ring.end(), pipeline()) - ring.begin());
    const int after = ring[(place + 1) % ring.size()];
    const int before = ring[(place + ring.size() - 1) % ring.size()];
    float mine = Made(a.work == StageWork::kForward, a.stage, a.item, pipeline(), 0), theirs = 0;
    comm_.Send(group_, Tensor::Of(&mine, DType::kF32, {1}), program_.RankOf(after, a.stage),
               "ring");
    const Ticket ticket = comm_.Receive(group_, Tensor::Of(&theirs, DType::kF32, {1}),
                                        program_.RankOf(before, a.stage), "ring");
    STRETTO_RETURN_IF_ERROR(comm_.Wait(ticket));
    STRETTO_RETURN_IF_ERROR(comm_.WaitAll());
    if (theirs != Made(a.work == StageWork::kForward, a.stage, a.item, before, 0)) {
      return absl::DataLossError("the ring brought another rank's number");
    }
    return absl::OkStatus();
  }

  Communicator& comm_;
  const Group& group_;
  const Program& program_;
  int actions_ = 0;
};

inline absl::Status RunProgram(Communicator& comm, const Group& group, const Program& program) {
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(Device::Cpu()));
  Budget budget(-1, -1, -1);
  int64_t capacity = 0;
  for (const PlanItem& item : program.items) capacity = std::max(capacity, item.tokens);
  STRETTO_ASSIGN_OR_RETURN(
      const auto executor,
      PipelineExecutor::Create(comm, group, *stream, BuffersOf(program, group.index), capacity,
                               kBoundaryWidth, DType::kF32, budget));
  CheckingWorker worker(comm, group, program);
  const RankProgram mine(program, group.index);
  for (int step = 0; step < 2; ++step) STRETTO_RETURN_IF_ERROR(executor->Run(mine, worker));
  STRETTO_RETURN_IF_ERROR(executor->Finish());
  const auto expected = 2 * program.of_rank[static_cast<size_t>(group.index)].size();
  if (worker.actions() != static_cast<int>(expected)) {
    return absl::InternalError(absl::StrCat(worker.actions(), " actions ran, not ", expected));
  }
  // What this rank sent, in its order, is what the program says.
  std::vector<std::string> planned, sent;
  for (int step = 0; step < 2; ++step) {
    for (const BoundaryMessage& m : MessagesOf(program, group.index)) {
      planned.push_back(absl::StrCat(m.receive ? "from " : "to ", m.peer, ": item ", m.item));
    }
  }
  for (const FlightRecord& r : comm.recorder().Snapshot()) {
    const std::string label = r.label;
    const size_t item = label.find("of item "), stage = label.find(" from stage");
    if (item == std::string::npos) continue;
    sent.push_back(absl::StrCat(r.op == CommOp::kReceive ? "from " : "to ", r.peer, ": item ",
                                label.substr(item + 8, stage - item - 8)));
  }
  // The recorder keeps the newest, of all programs that ran here.
  if (sent.size() < planned.size() && comm.recorder().Snapshot().size() < 4000) {
    return absl::InternalError("the recorder lacks messages");
  }
  const size_t known = std::min(sent.size(), planned.size());
  if (!std::equal(sent.end() - static_cast<std::ptrdiff_t>(known), sent.end(),
                  planned.end() - static_cast<std::ptrdiff_t>(known))) {
    return absl::InternalError(
        absl::StrCat("rank ", group.index, " sent and received in another order than planned"));
  }
  return absl::OkStatus();
}

inline absl::StatusOr<Program> RandomProgram(uint64_t seed, bool levels = true) {
  const RandomShape shape = DrawShape(seed);
  return (levels ? MakeProgram : MakeProgramWithoutLevels)(shape.kind, shape.pipelines,
                                                           shape.pipeline_ranks, shape.chunks,
                                                           DrawItems(shape.pipelines, seed));
}

// The programs of `seeds` seeds that are for as many ranks as the world has.
inline absl::StatusOr<int> RunRandomPrograms(World& world, uint64_t seeds) {
  Communicator comm(world);
  int ran = 0;
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    STRETTO_ASSIGN_OR_RETURN(const Program program, RandomProgram(seed));
    if (program.ranks() != world.size()) continue;
    const absl::Status status = RunProgram(comm, comm.all(), program);
    if (!status.ok()) {
      return absl::Status(status.code(),
                          absl::StrCat("seed ", seed, ": ", std::string(status.message())));
    }
    ++ran;
  }
  STRETTO_RETURN_IF_ERROR(world.Barrier("all programs ran"));
  return ran;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_PIPELINE_CASES_H_
