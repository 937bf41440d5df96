#include "stretto/parallel/pipeline.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/parallel/step_phase.h"

namespace stretto {
namespace {

// What an action makes for a neighbouring stage, or takes from it.
struct Boundary {
  bool there = false;
  bool forward = true;
  int from = 0, to = 0;  // stages
};

Boundary MadeBy(const Program& program, const ProgramAction& a) {
  if (a.work == StageWork::kForward)
    return {a.stage + 1 < program.stages, true, a.stage, a.stage + 1};
  if (a.work == StageWork::kBackwardWeight) return {};
  return {a.stage > 0, false, a.stage, a.stage - 1};
}
Boundary TakenBy(const Program& program, const ProgramAction& a) {
  if (a.work == StageWork::kForward) return {a.stage > 0, true, a.stage - 1, a.stage};
  if (a.work == StageWork::kBackwardWeight) return {};
  return {a.stage + 1 < program.stages, false, a.stage + 1, a.stage};
}
bool Travels(const Program& program, const Boundary& b) {
  return program.place_of_stage[static_cast<size_t>(b.from)] !=
         program.place_of_stage[static_cast<size_t>(b.to)];
}

using Key = std::tuple<bool, int, int>;  // forward, stage that makes it, item

// By what a message is: the order of the action on `rank` that makes it.
std::map<Key, int64_t> OrdersOf(const Program& program, int rank) {
  std::map<Key, int64_t> orders;
  for (const ProgramAction& a : program.of_rank[static_cast<size_t>(rank)]) {
    const Boundary made = MadeBy(program, a);
    if (made.there) orders[{made.forward, made.from, a.item}] = a.order;
  }
  return orders;
}

std::string Label(const BoundaryMessage& m) {
  return absl::StrCat(m.forward ? "activations" : "gradients", " of item ", m.item, " from stage ",
                      m.stage);
}

}  // namespace

std::vector<BoundaryMessage> MessagesOf(const Program& program, int rank) {
  const int pipeline = rank / program.pipeline_ranks;
  std::map<int, std::map<Key, int64_t>> orders;  // by rank, where asked for
  std::vector<BoundaryMessage> messages;
  const auto& actions = program.of_rank[static_cast<size_t>(rank)];
  for (size_t i = 0; i < actions.size(); ++i) {
    const ProgramAction& a = actions[i];
    const Boundary made = MadeBy(program, a), taken = TakenBy(program, a);
    if (made.there && Travels(program, made)) {
      messages.push_back({.order = a.order,
                          .peer = program.RankOf(pipeline, made.to),
                          .receive = false,
                          .forward = made.forward,
                          .stage = made.from,
                          .item = a.item,
                          .action = static_cast<int>(i)});
    }
    if (taken.there && Travels(program, taken)) {
      const int peer = program.RankOf(pipeline, taken.from);
      auto [found, fresh] = orders.try_emplace(peer);
      if (fresh) found->second = OrdersOf(program, peer);
      const auto order = found->second.find({taken.forward, taken.from, a.item});
      messages.push_back({.order = order == found->second.end() ? -1 : order->second,
                          .peer = peer,
                          .receive = true,
                          .forward = taken.forward,
                          .stage = taken.from,
                          .item = a.item,
                          .action = static_cast<int>(i)});
    }
  }
  std::stable_sort(
      messages.begin(), messages.end(),
      [](const BoundaryMessage& a, const BoundaryMessage& b) { return a.order < b.order; });
  return messages;
}

BoundaryBuffers BuffersOf(const Program& program, int rank) {
  // +1 where a message is made, -1 where it is taken; at one order the making comes first.
  using Changes = std::vector<std::tuple<int64_t, int, int>>;  // order, 0 or 1, change
  const int pipeline = rank / program.pipeline_ranks;
  std::map<int, std::map<Key, int64_t>> takers;
  const auto taken_at = [&](int peer, const Key& key) -> int64_t {
    auto [found, fresh] = takers.try_emplace(peer);
    if (fresh) {
      for (const ProgramAction& a : program.of_rank[static_cast<size_t>(peer)]) {
        const Boundary taken = TakenBy(program, a);
        if (taken.there) found->second[{taken.forward, taken.from, a.item}] = a.order;
      }
    }
    const auto at = found->second.find(key);
    return at == found->second.end() ? INT64_MAX : at->second;
  };
  Changes sends, receives, kept;
  const auto add = [](Changes& changes, int64_t made, int64_t taken) {
    changes.emplace_back(made, 0, 1);
    changes.emplace_back(taken, 1, -1);
  };
  for (const BoundaryMessage& m : MessagesOf(program, rank)) {
    const int taker = m.receive ? rank : m.peer;
    add(m.receive ? receives : sends, m.order, taken_at(taker, {m.forward, m.stage, m.item}));
  }
  for (const ProgramAction& a : program.of_rank[static_cast<size_t>(rank)]) {
    const Boundary made = MadeBy(program, a);
    if (!made.there || Travels(program, made)) continue;
    const int taker = program.RankOf(pipeline, made.to);
    add(kept, a.order, taken_at(taker, {made.forward, made.from, a.item}));
  }
  const auto most = [](Changes& changes) {
    std::sort(changes.begin(), changes.end());
    int now = 0, peak = 0;
    for (const auto& [order, kind, change] : changes) peak = std::max(peak, now += change);
    return peak;
  };
  return {.sends = most(sends), .receives = most(receives), .kept = most(kept)};
}

RankProgram::RankProgram(Program program, int rank) : program_(std::move(program)), rank_(rank) {
  messages_ = MessagesOf(program_, rank_);
  ends_.resize(actions().size());
  for (size_t m = 0; m < messages_.size(); ++m) {
    labels_.push_back(Label(messages_[m]));
    Ends& ends = ends_[static_cast<size_t>(messages_[m].action)];
    (messages_[m].receive ? ends.takes : ends.makes) = static_cast<int>(m);
  }
  std::map<Key, int> makers;
  for (size_t i = 0; i < actions().size(); ++i) {
    const ProgramAction& a = actions()[i];
    const Boundary made = MadeBy(program_, a), taken = TakenBy(program_, a);
    if (made.there && !Travels(program_, made)) {
      ends_[i].keeps = true;
      makers[{made.forward, made.from, a.item}] = static_cast<int>(i);
    }
    if (taken.there && !Travels(program_, taken)) {
      const auto maker = makers.find({taken.forward, taken.from, a.item});
      if (maker != makers.end()) ends_[i].takes_kept = maker->second;
    }
  }
}

namespace {

int64_t BufferBytes(int64_t token_capacity, int64_t width, DType dtype) {
  constexpr int64_t kAlignment = 256;
  return (token_capacity * width * SizeOf(dtype) + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

int64_t PipelineExecutor::Bytes(const BoundaryBuffers& buffers, int64_t token_capacity,
                                int64_t width, DType dtype) {
  return BufferBytes(token_capacity, width, dtype) *
         (buffers.sends + buffers.receives + buffers.kept);
}

void BoundaryBuffers::Include(const BoundaryBuffers& other) {
  sends = std::max(sends, other.sends);
  receives = std::max(receives, other.receives);
  kept = std::max(kept, other.kept);
}

absl::StatusOr<std::unique_ptr<PipelineExecutor>> PipelineExecutor::Create(
    Communicator& comm, const Group& group, Stream& stream, const BoundaryBuffers& buffers,
    int64_t token_capacity, int64_t width, DType dtype, Budget& budget) {
  auto executor = std::unique_ptr<PipelineExecutor>(new PipelineExecutor(comm, group, stream));
  executor->token_capacity_ = token_capacity;
  const int64_t total = Bytes(buffers, token_capacity, width, dtype);
  STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(stream.device()), "boundaries", total));
  STRETTO_ASSIGN_OR_RETURN(executor->arena_, Arena::Create(stream.device(), "boundaries", total));
  std::byte* next = executor->arena_.data();
  const auto fill = [&](Pool& pool, int count) {
    for (int i = 0; i < count; ++i, next += BufferBytes(token_capacity, width, dtype)) {
      pool.buffers.push_back(
          {.memory = Tensor::Of(next, dtype, {token_capacity, width}, stream.device())});
    }
  };
  fill(executor->sends_, buffers.sends);
  fill(executor->receives_, buffers.receives);
  fill(executor->kept_, buffers.kept);
  return executor;
}

PipelineExecutor::~PipelineExecutor() = default;

Tensor PipelineExecutor::View(const Buffer& buffer, int64_t tokens) const {
  return buffer.memory.Rows(0, tokens);
}

absl::Status PipelineExecutor::Wait(Ticket ticket) {
  return TimedWait(comm_, stream_, timer_, StepPhase::kExposedPipeline, ticket);
}

absl::StatusOr<PipelineExecutor::Buffer*> PipelineExecutor::Take(Pool& pool) {
  // The one that has been free for longest; of those that are still being sent, the oldest.
  for (size_t i = 0; i < pool.buffers.size(); ++i) {
    Buffer& buffer = pool.buffers[(pool.next + i) % pool.buffers.size()];
    if (buffer.taken) continue;
    pool.next = (pool.next + i + 1) % pool.buffers.size();
    if (buffer.ticket != 0) STRETTO_RETURN_IF_ERROR(Wait(buffer.ticket));
    buffer.ticket = 0;
    buffer.taken = true;
    return &buffer;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("rank ", comm_.world().rank(), " has ", pool.buffers.size(),
                   " buffers for what travels between stages, and the program needs more; create "
                   "the executor for this program"));
}

// Sends and receives of two ranks follow each other in one order on both, and on all ranks
// together.
absl::Status PipelineExecutor::ReceiveUntil(const RankProgram& program, int64_t order,
                                            const StageWorker& worker) {
  const std::vector<BoundaryMessage>& messages = program.messages_;
  for (; submitted_ < messages.size() && messages[submitted_].order < order; ++submitted_) {
    const BoundaryMessage& m = messages[submitted_];
    if (worker.Empty(m.item)) continue;       // neither end submits it
    if (!m.receive) return absl::OkStatus();  // its own action submits it
    const TraceScope scope(comm_.trace(), {.stage = m.stage,
                                           .item = m.item,
                                           .micro_batch = worker.MicroBatch(m.item),
                                           .order = m.order});
    STRETTO_ASSIGN_OR_RETURN(Buffer* const buffer, Take(receives_));
    arriving_[submitted_] = buffer;
    tickets_[submitted_] = comm_.Receive(group_, View(*buffer, worker.Tokens(m.item)), m.peer,
                                         program.labels_[submitted_], buffer->free);
  }
  return absl::OkStatus();
}

absl::Status PipelineExecutor::RunTraced(StageWorker& worker, const ProgramAction& action,
                                         Tensor in, Tensor out) {
  const TraceSpan span(comm_.trace(), "compute", Name(action.work), &stream_);
  return worker.Run(action, in, out);
}

absl::Status PipelineExecutor::Run(const RankProgram& program, StageWorker& worker) {
  const int rank = group_.index;
  if (program.program().ranks() != group_.size() || program.rank() != rank) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the program is for ", program.program().ranks(), " ranks as rank ", program.rank(),
        " runs it, the executor for ", group_.size(), " as rank ", rank, " does"));
  }
  submitted_ = 0;
  arriving_.assign(program.messages_.size(), nullptr);
  tickets_.assign(program.messages_.size(), 0);
  kept_by_.assign(program.actions().size(), nullptr);
  for (size_t i = 0; i < program.actions().size(); ++i) {
    const ProgramAction& a = program.actions()[i];
    const RankProgram::Ends& ends = program.ends_[i];
    const int64_t tokens = worker.Empty(a.item) ? 0 : worker.Tokens(a.item);
    if (tokens > token_capacity_) {
      return absl::FailedPreconditionError(
          absl::StrCat("item ", a.item, " has ", tokens, " tokens on rank ", comm_.world().rank(),
                       ", the executor was created for ", token_capacity_));
    }
    STRETTO_RETURN_IF_ERROR(ReceiveUntil(program, a.order, worker));
    TraceTags tags = TagsOf(a);
    tags.micro_batch = worker.MicroBatch(a.item);
    const TraceScope scope(comm_.trace(), tags);
    Tensor in, out;
    if (worker.Empty(a.item)) {
      STRETTO_RETURN_IF_ERROR(RunTraced(worker, a, in, out));
      comm_.Progress();
      continue;
    }
    Buffer* in_buffer = nullptr;
    Buffer* out_buffer = nullptr;
    const Boundary taken = TakenBy(program.program(), a);
    if (taken.there) {
      if (ends.takes >= 0) {
        in_buffer = arriving_[static_cast<size_t>(ends.takes)];
      } else if (ends.takes_kept >= 0) {
        in_buffer = kept_by_[static_cast<size_t>(ends.takes_kept)];
      }
      if (in_buffer == nullptr) {
        return absl::InternalError(absl::StrCat("rank ", comm_.world().rank(), " is to run item ",
                                                a.item, " on stage ", a.stage,
                                                " before what it needs; check the program"));
      }
      if (ends.takes >= 0) {
        STRETTO_RETURN_IF_ERROR(Wait(tickets_[static_cast<size_t>(ends.takes)]));
      }
      in = View(*in_buffer, tokens);
    }
    if (ends.makes >= 0 || ends.keeps) {
      STRETTO_ASSIGN_OR_RETURN(out_buffer, Take(ends.keeps ? kept_ : sends_));
      out = View(*out_buffer, tokens);
    }
    STRETTO_RETURN_IF_ERROR(RunTraced(worker, a, in, out));
    if (in_buffer != nullptr) {
      in_buffer->free = stream_.Record();
      in_buffer->taken = false;
    }
    if (ends.makes >= 0) {
      const auto m = static_cast<size_t>(ends.makes);
      out_buffer->ticket =
          comm_.Send(group_, out, program.messages_[m].peer, program.labels_[m], stream_.Record());
      out_buffer->taken = false;
      submitted_ = m + 1;
    } else if (ends.keeps) {
      kept_by_[i] = out_buffer;
    }
    comm_.Progress();
  }
  return comm_.status();
}

absl::Status PipelineExecutor::Finish() {
  for (Buffer& buffer : sends_.buffers) {
    if (buffer.ticket == 0) continue;
    // The host waits, and on the CPU the stream with it.
    const ExposedWait wait(comm_, stream_, timer_, StepPhase::kExposedPipeline);
    STRETTO_RETURN_IF_ERROR(comm_.Wait(std::exchange(buffer.ticket, 0)));
  }
  return absl::OkStatus();
}

}  // namespace stretto
