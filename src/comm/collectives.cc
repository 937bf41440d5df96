#include "src/comm/collectives.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "src/comm/reduce.h"

namespace stretto {
namespace {

constexpr int64_t kWindow = 4;
constexpr int64_t kStagingBytes = 16 << 20;  // of one reduce-scatter in flight, at most
constexpr int64_t kLongestStaged = 1 << 20;  // bytes of a segment that is added
constexpr int64_t kShortestStaged = 64 << 10;
constexpr int64_t kLongestDirect = 4 << 20;    // bytes of a segment that goes to its place
constexpr int64_t kShortAllReduce = 64 << 10;  // bytes of data
constexpr int64_t kShortGathered = 256 << 10;  // bytes of everybody's data
constexpr int64_t kPartMultiple = 64;          // elements; parts start on cache lines

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int Lanes(const Operation& o) { return o.point_to_point() ? 1 : o.group->size() - 1; }

// Lanes start at the next rank, so that not everybody begins with rank 0.
int PeerOf(const Operation& o, int lane) {
  return o.point_to_point() ? o.peer : (o.group->index + 1 + lane) % o.group->size();
}

int LaneOf(const Operation& o, int peer) {
  return (peer - o.group->index - 1 + o.group->size()) % o.group->size();
}

// All-reduce and broadcast cut a tensor of any size; the others have equal parts.
bool CutsWhole(const Operation& o) {
  return o.op == CommOp::kAllReduce || o.op == CommOp::kBroadcast;
}

int64_t LongestPart(const Operation& o, const Operation::Item& item) {
  if (!CutsWhole(o)) return item.elements;
  const int64_t unit =
      CeilDiv(CeilDiv(item.elements, o.group->size()), kPartMultiple) * kPartMultiple;
  return std::min(unit, item.elements);
}

Operation::Part PartOf(const Operation& o, const Operation::Item& item, int rank) {
  const int64_t longest = LongestPart(o, item);
  if (!CutsWhole(o)) return {rank * longest, longest};
  const int64_t begin = std::min(rank * longest, item.elements);
  return {begin, std::min(longest, item.elements - begin)};
}

Pattern PatternOf(const Operation& o) { return o.patterns[o.phase]; }

// Elements on the longest lane of this phase.
int64_t LaneElements(const Operation& o, const Operation::Item& item) {
  switch (PatternOf(o)) {
    case Pattern::kReduceScatter:
    case Pattern::kAllGather:
    case Pattern::kScatter:
      return LongestPart(o, item);
    case Pattern::kGatherReduce:
    case Pattern::kFan:
    case Pattern::kSend:
    case Pattern::kReceive:
      return item.elements;
    case Pattern::kAllToAll: {
      int64_t longest = 0;
      for (int64_t n : o.send_counts) longest = std::max(longest, n);
      for (int64_t n : o.receive_counts) longest = std::max(longest, n);
      return longest;
    }
  }
  return 0;
}

bool AtEnd(const Operation& o, const Operation::Cursor& c) { return c.item == o.items.size(); }

void SkipEmpty(const Operation& o, Operation::Cursor* c) {
  while (!AtEnd(o, *c) && c->offset >= LaneElements(o, o.items[c->item])) {
    ++c->item;
    c->offset = 0;
  }
}

void Next(const Operation& o, Operation::Cursor* c) {
  c->offset += o.segment;
  ++c->step;
  SkipEmpty(o, c);
}

std::byte* Staged(const Operation& o, int64_t step, int lane) {
  const int64_t bytes = o.segment * SizeOf(o.dtype);
  // One lane more than there are: the place of one's own data in a gather-and-reduce.
  return o.staging.data.get() + ((step % o.window) * (Lanes(o) + 1) + lane) * bytes;
}

Operation::Span Cut(const Operation& o, const Operation::Cursor& c, std::byte* base, int64_t begin,
                    int64_t count) {
  const int64_t n = std::clamp<int64_t>(count - c.offset, 0, o.segment);
  return {base + (begin + c.offset) * SizeOf(o.dtype), n};
}

// What goes to `peer` at a step; no elements: nothing.
Operation::Span SendSpan(const Operation& o, const Operation::Cursor& c, int peer) {
  const Operation::Item& item = o.items[c.item];
  const int me = o.group->index;
  switch (PatternOf(o)) {
    case Pattern::kReduceScatter: {
      const Operation::Part part = PartOf(o, item, peer);
      return Cut(o, c, item.input, part.begin, part.count);
    }
    case Pattern::kAllGather: {
      if (o.op == CommOp::kBroadcast && peer == o.peer) return {};  // the root has it
      const Operation::Part part = PartOf(o, item, me);
      return Cut(o, c, item.output, part.begin, part.count);
    }
    case Pattern::kGatherReduce: {
      const Operation::Span span = Cut(o, c, item.input, 0, item.elements);
      return {Staged(o, c.step, Lanes(o)), span.elements};
    }
    case Pattern::kScatter: {
      if (me != o.peer) return {};
      const Operation::Part part = PartOf(o, item, peer);
      return Cut(o, c, item.input, part.begin, part.count);
    }
    case Pattern::kFan:
      return me == o.peer ? Cut(o, c, item.input, 0, item.elements) : Operation::Span();
    case Pattern::kAllToAll:
      return Cut(o, c, item.input, o.send_begins[static_cast<std::size_t>(peer)],
                 o.send_counts[static_cast<std::size_t>(peer)]);
    case Pattern::kSend:
      return Cut(o, c, item.input, 0, item.elements);
    case Pattern::kReceive:
      return {};
  }
  return {};
}

// Where what comes from `peer` at a step goes.
Operation::Span ReceiveSpan(const Operation& o, const Operation::Cursor& c, int peer) {
  const Operation::Item& item = o.items[c.item];
  const int me = o.group->index;
  switch (PatternOf(o)) {
    case Pattern::kReduceScatter: {
      const Operation::Part part = PartOf(o, item, me);
      const Operation::Span span = Cut(o, c, item.input, part.begin, part.count);
      return {Staged(o, c.step, LaneOf(o, peer)), span.elements};
    }
    case Pattern::kAllGather: {
      if (o.op == CommOp::kBroadcast && me == o.peer) return {};
      const Operation::Part part = PartOf(o, item, peer);
      return Cut(o, c, item.output, part.begin, part.count);
    }
    case Pattern::kGatherReduce: {
      const Operation::Span span = Cut(o, c, item.input, 0, item.elements);
      return {Staged(o, c.step, LaneOf(o, peer)), span.elements};
    }
    case Pattern::kScatter: {
      if (me == o.peer || peer != o.peer) return {};
      const Operation::Part part = PartOf(o, item, me);
      return Cut(o, c, item.output, part.begin, part.count);
    }
    case Pattern::kFan:
      return me != o.peer && peer == o.peer ? Cut(o, c, item.output, 0, item.elements)
                                            : Operation::Span();
    case Pattern::kAllToAll:
      return Cut(o, c, item.output, o.receive_begins[static_cast<std::size_t>(peer)],
                 o.receive_counts[static_cast<std::size_t>(peer)]);
    case Pattern::kReceive:
      return Cut(o, c, item.output, 0, item.elements);
    case Pattern::kSend:
      return {};
  }
  return {};
}

void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  if (to != from && bytes > 0) std::memmove(to, from, static_cast<std::size_t>(bytes));
}

bool Stages(Pattern p) { return p == Pattern::kReduceScatter || p == Pattern::kGatherReduce; }

}  // namespace

StagingPool::Buffer StagingPool::Take(int64_t bytes) {
  auto best = idle_.end();
  for (auto i = idle_.begin(); i != idle_.end(); ++i) {
    if (i->bytes >= bytes && (best == idle_.end() || i->bytes < best->bytes)) best = i;
  }
  Buffer buffer;
  if (best != idle_.end()) {
    buffer = std::move(*best);
    idle_.erase(best);
    return buffer;
  }
  // Powers of two, so that operations of similar sizes share their buffers; and at once as many as
  // run at a time, because how many do in which step depends on timing.
  const int64_t rounded =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(bytes, 1))));
  for (int i = 0; i < at_a_time_; ++i) {
    buffer.bytes = rounded;
    buffer.data.reset(static_cast<std::byte*>(
        ::operator new(static_cast<std::size_t>(rounded), std::align_val_t(kAlignment))));
    idle_.push_back(std::move(buffer));
  }
  buffer = std::move(idle_.back());
  idle_.pop_back();
  return buffer;
}

void StagingPool::Return(Buffer buffer) {
  if (buffer.data != nullptr) idle_.push_back(std::move(buffer));
}

void Operation::Reset() {
  items.clear();
  send_counts.clear();
  send_begins.clear();
  receive_counts.clear();
  receive_begins.clear();
  after = Event();
  started = false;
  device = OnDevice::kNo;
  ready = false;
  copied = false;
  region = -1;
  launches = 0;
  done = Event();
  reduce = ReduceOp::kSum;
  adds = false;
  peer = -1;
  phases = phase = 0;
  record = trace = -1;
  bytes_sent = 0;
}

bool Operation::ReserveLike(const Operation& other) {
  bool grew = false;
  const auto like = [&grew](auto& mine, const auto& theirs) {
    if (mine.capacity() >= theirs.capacity()) return;
    mine.reserve(theirs.capacity());
    grew = true;
  };
  like(items, other.items);
  like(send_counts, other.send_counts);
  like(send_begins, other.send_begins);
  like(receive_counts, other.receive_counts);
  like(receive_begins, other.receive_begins);
  like(receives, other.receives);
  like(sends, other.sends);
  like(sources, other.sources);
  return grew;
}

namespace {

void ChoosePhases(Operation& o) {
  const int n = o.group->size();
  const int64_t size = SizeOf(o.dtype);
  const auto then = [&o](Pattern p) { o.patterns[o.phases++] = p; };
  o.phases = o.phase = 0;
  switch (o.op) {
    case CommOp::kAllReduce: {
      if (n == 1) break;
      const int64_t bytes = o.items[0].elements * size;
      if (bytes <= kShortAllReduce && bytes * n <= kShortGathered) {
        then(Pattern::kGatherReduce);
      } else {
        then(Pattern::kReduceScatter);
        then(Pattern::kAllGather);
      }
      break;
    }
    case CommOp::kReduceScatter:
      then(Pattern::kReduceScatter);
      break;
    case CommOp::kAllGather:
      if (n > 1) then(Pattern::kAllGather);
      break;
    case CommOp::kBroadcast:
      if (n == 1) break;
      if (n == 2 || o.items[0].elements * size <= kShortAllReduce) {
        then(Pattern::kFan);
      } else {
        then(Pattern::kScatter);
        then(Pattern::kAllGather);
      }
      break;
    case CommOp::kAllToAll:
      if (n > 1) then(Pattern::kAllToAll);
      break;
    case CommOp::kSend:
      then(Pattern::kSend);
      break;
    case CommOp::kReceive:
      then(Pattern::kReceive);
      break;
    case CommOp::kBarrier:
      break;
  }
}

// Elements of one item that go to `peer` in the current phase.
int64_t ElementsTo(const Operation& o, const Operation::Item& item, int peer) {
  const int me = o.group->index;
  switch (PatternOf(o)) {
    case Pattern::kReduceScatter:
      return PartOf(o, item, peer).count;
    case Pattern::kAllGather:
      if (o.op == CommOp::kBroadcast && peer == o.peer) return 0;  // the root has it
      return PartOf(o, item, me).count;
    case Pattern::kGatherReduce:
    case Pattern::kSend:
      return item.elements;
    case Pattern::kScatter:
      return me == o.peer ? PartOf(o, item, peer).count : 0;
    case Pattern::kFan:
      return me == o.peer ? item.elements : 0;
    case Pattern::kAllToAll:
      return o.send_counts[static_cast<std::size_t>(peer)];
    case Pattern::kReceive:
      return 0;
  }
  return 0;
}

}  // namespace

int64_t BytesToSend(Operation& o) {
  int64_t elements = 0;
  ChoosePhases(o);
  for (; o.phase < o.phases; ++o.phase) {
    for (const Operation::Item& item : o.items) {
      for (int lane = 0; lane < Lanes(o); ++lane) elements += ElementsTo(o, item, PeerOf(o, lane));
    }
  }
  return elements * SizeOf(o.dtype);
}

void Engine::Start(Operation& o) {
  o.started = true;
  const std::size_t me = static_cast<std::size_t>(o.group->index);
  const int64_t size = SizeOf(o.dtype);
  ChoosePhases(o);
  if (o.op == CommOp::kAllGather) {
    for (const Operation::Item& item : o.items) {
      Copy(item.output + static_cast<int64_t>(me) * item.elements * size, item.input,
           item.elements * size);
    }
  } else if (o.op == CommOp::kAllToAll) {
    Copy(o.items[0].output + o.receive_begins[me] * size,
         o.items[0].input + o.send_begins[me] * size, o.send_counts[me] * size);
  }
  if (o.phases > 0) BeginPhase(o);
}

void Engine::BeginPhase(Operation& o) {
  const Pattern pattern = PatternOf(o);
  const int64_t size = SizeOf(o.dtype);
  const int lanes = Lanes(o);
  int64_t longest = 0;
  for (const Operation::Item& item : o.items) longest = std::max(longest, LaneElements(o, item));
  int64_t bytes = kLongestDirect;
  o.window = kWindow;
  if (pattern == Pattern::kReduceScatter) {
    bytes =
        std::clamp(kStagingBytes / (kWindow * std::max(lanes, 1)), kShortestStaged, kLongestStaged);
  } else if (pattern == Pattern::kGatherReduce) {
    bytes = kShortAllReduce;
    o.window = 1;
  }
  // The same on both sides of a lane: the longest lane itself is not (all-to-all), so it may
  // shorten a segment only where it does not change how any lane is cut.
  o.segment = std::max<int64_t>(1, std::min(bytes / size, longest));
  const std::size_t slots = static_cast<std::size_t>(o.window * lanes);
  o.receives.assign(slots, -1);
  o.sends.assign(slots, -1);
  if (Stages(pattern) && o.staging.data == nullptr) {
    o.staging = pool_.Take(o.window * (lanes + 1) * o.segment * size);
  }
  o.receive_next = Operation::Cursor();
  SkipEmpty(o, &o.receive_next);
  o.receive_head = o.send_next = o.send_head = o.receive_next;
}

absl::StatusOr<bool> Engine::PostReceives(Operation& o) {
  bool posted = false;
  const int lanes = Lanes(o);
  while (!AtEnd(o, o.receive_next) && o.receive_next.step < o.receive_head.step + o.window) {
    for (int lane = 0; lane < lanes; ++lane) {
      const int peer = PeerOf(o, lane);
      const Operation::Span span = ReceiveSpan(o, o.receive_next, peer);
      if (span.elements == 0) continue;
      before_post_(o);
      STRETTO_ASSIGN_OR_RETURN(
          o.receives[static_cast<std::size_t>((o.receive_next.step % o.window) * lanes + lane)],
          transport_.Receive(span.data, span.elements * SizeOf(o.dtype),
                             o.group->ranks[static_cast<std::size_t>(peer)], o.tag));
    }
    posted = true;
    Next(o, &o.receive_next);
  }
  return posted;
}

absl::StatusOr<bool> Engine::PostSends(Operation& o) {
  bool posted = false;
  const int lanes = Lanes(o);
  while (!AtEnd(o, o.send_next) && o.send_next.step < o.send_head.step + o.window) {
    if (PatternOf(o) == Pattern::kGatherReduce) {
      const Operation::Item& item = o.items[o.send_next.item];
      const Operation::Span own = Cut(o, o.send_next, item.input, 0, item.elements);
      Copy(Staged(o, o.send_next.step, lanes), own.data, own.elements * SizeOf(o.dtype));
    }
    for (int lane = 0; lane < lanes; ++lane) {
      const int peer = PeerOf(o, lane);
      const Operation::Span span = SendSpan(o, o.send_next, peer);
      if (span.elements == 0) continue;
      const int64_t bytes = span.elements * SizeOf(o.dtype);
      before_post_(o);
      STRETTO_ASSIGN_OR_RETURN(
          o.sends[static_cast<std::size_t>((o.send_next.step % o.window) * lanes + lane)],
          transport_.Send(span.data, bytes, o.group->ranks[static_cast<std::size_t>(peer)], o.tag));
      o.bytes_sent += bytes;
    }
    posted = true;
    Next(o, &o.send_next);
  }
  return posted;
}

absl::StatusOr<bool> Engine::TestStep(std::vector<Transport::Request>& requests, const Operation& o,
                                      int64_t step) {
  const int lanes = Lanes(o);
  bool done = true;
  for (int lane = 0; lane < lanes; ++lane) {
    Transport::Request& request =
        requests[static_cast<std::size_t>((step % o.window) * lanes + lane)];
    if (request < 0) continue;
    STRETTO_ASSIGN_OR_RETURN(const bool finished, transport_.Test(request));
    if (finished) {
      request = -1;
    } else {
      done = false;
    }
  }
  return done;
}

void Engine::Add(Operation& o) {
  const Operation::Cursor& c = o.receive_head;
  const Operation::Item& item = o.items[c.item];
  const int n = o.group->size();
  const int me = o.group->index;
  const bool whole = PatternOf(o) == Pattern::kGatherReduce;
  const Operation::Part part = whole ? Operation::Part{0, item.elements} : PartOf(o, item, me);
  const Operation::Span own = Cut(o, c, item.input, part.begin, part.count);
  if (own.elements == 0) return;
  // A reduce-scatter writes the part alone; an all-reduce writes it in its place.
  const int64_t base = CutsWhole(o) ? part.begin : 0;
  std::byte* output = item.output + (base + c.offset) * SizeOf(o.dtype);
  if (n == 1) {
    Copy(output, own.data, own.elements * SizeOf(o.dtype));
    return;
  }
  o.sources.resize(static_cast<std::size_t>(n));
  for (int p = 0; p < n; ++p) {
    o.sources[static_cast<std::size_t>(p)] = p == me ? own.data : Staged(o, c.step, LaneOf(o, p));
  }
  Reduce(o.dtype, o.reduce, output, o.sources.data(), n, own.elements);
}

absl::StatusOr<bool> Engine::Advance(Operation& o, bool* advanced) {
  while (o.phase < o.phases) {
    bool moved = false;
    STRETTO_ASSIGN_OR_RETURN(const bool posted_receives, PostReceives(o));
    STRETTO_ASSIGN_OR_RETURN(const bool posted_sends, PostSends(o));
    moved = posted_receives || posted_sends;
    if (o.receive_head.step < o.receive_next.step) {
      STRETTO_ASSIGN_OR_RETURN(const bool done, TestStep(o.receives, o, o.receive_head.step));
      if (done) {
        if (Stages(PatternOf(o))) Add(o);
        Next(o, &o.receive_head);
        moved = true;
      }
    }
    if (o.send_head.step < o.send_next.step) {
      STRETTO_ASSIGN_OR_RETURN(const bool done, TestStep(o.sends, o, o.send_head.step));
      if (done) {
        Next(o, &o.send_head);
        moved = true;
      }
    }
    if (AtEnd(o, o.receive_head) && AtEnd(o, o.send_head)) {
      // The next phase may write where this one's sends read, so it starts when they are done.
      if (++o.phase < o.phases) BeginPhase(o);
      moved = true;
    }
    if (!moved) return false;
    *advanced = true;
  }
  return true;
}

void Engine::Release(Operation& o) {
  pool_.Return(std::move(o.staging));
  o.staging = StagingPool::Buffer();
}

}  // namespace stretto
