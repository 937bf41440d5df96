#include "src/comm/cuda/copy_engines.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "src/comm/cuda/sum_parts.h"
#include "src/core/start_thread.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

constexpr auto kFarewell = std::chrono::seconds(10);  // until others have finished with a window
constexpr auto kFarewellAfterError = std::chrono::seconds(1);  // where one may be gone
constexpr auto kLook = std::chrono::milliseconds(1);

}  // namespace

std::byte* CopyEngines::Slot(std::byte* window, uint32_t round) {
  return window + round % kSlots * kSlotBytes;
}

int64_t CopyEngines::Room(const Operation& o) {
  if (o.op == CommOp::kAllGather) return kSlotBytes;
  return kSlotBytes / (o.group->size() - 1) / CopyRounds::kAlignment * CopyRounds::kAlignment;
}

bool CopyEngines::InPlace(const Operation& o, const Operation::Item& item) {
  return item.input == item.output + o.group->index * item.elements * SizeOf(o.dtype);
}

int CopyEngines::RegionOf(const Channel& c, const Operation& o) {
  if (o.op != CommOp::kAllGather) return -1;
  const auto holds = [&](const Region& region) {
    const std::byte* const begin = region.own.data();
    const std::byte* const end = begin + region.own.size();
    return std::all_of(o.items.begin(), o.items.end(), [&](const Operation::Item& item) {
      int64_t bytes = item.elements * SizeOf(o.dtype);
      const std::byte* from = item.input;
      if (InPlace(o, item)) {  // the others' are beside it
        from = item.output;
        bytes *= c.group.size();
      }
      return bytes == 0 || (from >= begin && from < end && bytes <= end - from);
    });
  };
  const auto found = std::find_if(c.regions.begin(), c.regions.end(), holds);
  return found == c.regions.end() ? -1 : static_cast<int>(found - c.regions.begin());
}

CopyEngines::Channel* CopyEngines::Of(const Group& group) {
  for (Channel& c : channels_) {
    if (c.group.id == group.id) return &c;
  }
  return nullptr;
}

int64_t CopyEngines::Plan(Operation* operation) {
  Operation& o = *operation;
  const bool can =
      o.op == CommOp::kAllGather || (o.op == CommOp::kReduceScatter && CanSumParts(o.dtype));
  const Channel* const c = can ? Of(*o.group) : nullptr;
  if (c == nullptr) return 0;
  o.region = RegionOf(*c, o);
  if (o.region >= 0) {
    const int64_t launches = 3 + static_cast<int64_t>(o.items.size()) * o.group->size();
    return launches <= kMostLaunches ? launches : 0;
  }
  // A copy for each piece and other rank, and of an all-gather two within the rank.
  const int64_t of_piece = o.group->size() - 1 + (o.op == CommOp::kAllGather ? 2 : 0);
  const int64_t of_round = 4;  // flags, a sum, and a wait and an event around it
  int64_t launches = 0;
  CopyRounds rounds(o.items, SizeOf(o.dtype), Room(o));
  while (rounds.Next(&pieces_)) {
    launches += of_round + static_cast<int64_t>(pieces_.size()) * of_piece;
  }
  return launches <= kMostLaunches ? launches : 0;
}

void CopyEngines::Write(const Channel& c, int cell, uint32_t value) {
  CUstreamBatchMemOpParams& p = signals_.emplace_back();
  p = {};
  p.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
  p.writeValue.address = c.device_flags + static_cast<CUdeviceptr>(cell) * sizeof(uint32_t);
  p.writeValue.value = value;
  p.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;  // after all that the stream wrote before
}

void CopyEngines::Wait(const Channel& c, int cell, uint32_t value) {
  CUstreamBatchMemOpParams& p = signals_.emplace_back();
  p = {};
  p.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
  p.waitValue.address = c.device_flags + static_cast<CUdeviceptr>(cell) * sizeof(uint32_t);
  p.waitValue.value = value;
  p.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;  // cyclic: rounds may pass 2^32
}

absl::Status CopyEngines::Signal() {
  const CUresult result =
      batch_mem_op_(native(), static_cast<unsigned>(signals_.size()), signals_.data(), 0);
  signals_.clear();
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("CUDA: cuStreamBatchMemOp failed with error ", static_cast<int>(result)));
}

void CopyEngines::Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  if (to == from) return;
  to_.push_back(to);
  from_.push_back(from);
  bytes_.push_back(static_cast<size_t>(bytes));
}

absl::Status CopyEngines::CopyAll(Stream& stream) {
  cudaError_t error = cudaSuccess;
  if (!to_.empty()) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
    error = cudaMemcpyBatchAsync(to_.data(), from_.data(), bytes_.data(), to_.size(), &attributes,
                                 &first, 1, Native(stream));
  }
  to_.clear();
  from_.clear();
  bytes_.clear();
  return Called("cudaMemcpyBatchAsync", error);
}

absl::Status CopyEngines::AddParts(const Channel& c, const Operation& o, const std::byte* slot) {
  static_assert(SumTable::kMost >= CopyRounds::kMostPieces);
  const int64_t size = SizeOf(o.dtype);
  SumTable table;
  table.ranks = c.group.size();
  table.index = c.group.index;
  table.stride = Room(o);
  table.adds = o.adds;
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    table.pieces[table.count++] = {
        item.input + (c.group.index * item.elements + piece.begin) * size, slot + piece.at,
        item.output + piece.begin * size, piece.elements};
  }
  return Called("the addition of a reduce-scatter",
                SumParts(table, o.dtype, multiprocessors_, Native(*aside_)));
}

absl::Status CopyEngines::Meet(const Channel& c) {
  const int n = c.group.size(), me = c.group.index;
  for (int p = 0; p < n; ++p) {
    if (p != me) Write(c, Cell(p, me), c.rounds);
  }
  for (int p = 0; p < n; ++p) {
    if (p != me) Wait(c, Cell(me, p), c.rounds);
  }
  return Signal();
}

absl::Status CopyEngines::EnqueueRound(Channel* channel, const Operation& o) {
  Channel& c = *channel;
  const int n = c.group.size(), me = c.group.index;
  const bool gathers = o.op == CommOp::kAllGather;
  const int64_t size = SizeOf(o.dtype);
  std::byte* const window = c.windows[static_cast<size_t>(me)];
  // Everybody begins with another rank.
  const auto other = [&](int i) { return (me + i) % n; };
  const auto window_of = [&](int p) { return c.windows[static_cast<size_t>(p)]; };

  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    const std::byte* const input = item.input + piece.begin * size;
    const int64_t bytes = piece.elements * size;
    if (gathers) Copy(Slot(window, c.rounds) + piece.at, input, bytes);
    for (int i = 1; !gathers && i < n; ++i) {
      const int p = other(i);
      const int place = me < p ? me : me - 1;  // among the ranks other than p
      Copy(Slot(window_of(p), c.rounds) + place * Room(o) + piece.at,
           input + p * item.elements * size, bytes);
    }
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(stream_));
  stream_.Wait(c.summed);
  STRETTO_RETURN_IF_ERROR(Meet(c));
  if (!gathers) {
    Follow(*aside_, stream_);
    STRETTO_RETURN_IF_ERROR(AddParts(c, o, Slot(window, c.rounds)));
    c.summed = aside_->Record();
    return aside_->status();
  }
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    std::byte* const output = item.output + piece.begin * size;
    const int64_t bytes = piece.elements * size;
    for (int i = 1; i < n; ++i) {
      const int p = other(i);
      Copy(output + p * item.elements * size, Slot(window_of(p), c.rounds) + piece.at, bytes);
    }
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(stream_));
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    Copy(item.output + (me * item.elements + piece.begin) * size, item.input + piece.begin * size,
         piece.elements * size);
  }
  return CopyAll(*aside_);
}

absl::Status CopyEngines::EnqueueShared(Channel* c, const Region& region, const Operation& o) {
  const int n = c->group.size(), me = c->group.index;
  // Needs no other rank.
  for (const Operation::Item& item : o.items) {
    const int64_t bytes = item.elements * SizeOf(o.dtype);
    if (bytes > 0) Copy(item.output + me * bytes, item.input, bytes);
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(*aside_));
  ++c->rounds;
  STRETTO_RETURN_IF_ERROR(Meet(*c));
  for (const Operation::Item& item : o.items) {
    const int64_t bytes = item.elements * SizeOf(o.dtype);
    if (bytes == 0) continue;
    // In place each rank's part is at another place.
    const bool in_place = InPlace(o, item);
    for (int i = 1; i < n; ++i) {
      const int p = (me + i) % n;
      const std::ptrdiff_t at = item.input - region.own.data() + (in_place ? (p - me) * bytes : 0);
      Copy(item.output + p * bytes, region.bases[static_cast<size_t>(p)] + at, bytes);
    }
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(stream_));
  ++c->rounds;
  return Meet(*c);
}

absl::StatusOr<Stream*> CopyEngines::Enqueue(Channel* c, const Operation& o) {
  Order(o);
  const Region* const region = o.region >= 0 ? &c->regions[static_cast<size_t>(o.region)] : nullptr;
  if (region != nullptr && std::all_of(o.items.begin(), o.items.end(), [&](const auto& item) {
        return item.elements == 0 || InPlace(o, item);
      })) {
    STRETTO_RETURN_IF_ERROR(EnqueueShared(c, *region, o));
    return &stream_;
  }
  // What is aside begins when the operation does.
  Follow(*aside_, stream_);
  if (region != nullptr) {
    STRETTO_RETURN_IF_ERROR(EnqueueShared(c, *region, o));
  } else {
    CopyRounds rounds(o.items, SizeOf(o.dtype), Room(o));
    while (rounds.Next(&pieces_)) {
      ++c->rounds;
      STRETTO_RETURN_IF_ERROR(EnqueueRound(c, o));
    }
  }
  Follow(*aside_, stream_);
  const Event done = aside_->Record();
  EachTensor(o, [&](std::span<const std::byte> tensor) { ends_.push_back({done, tensor}); });
  STRETTO_RETURN_IF_ERROR(aside_->status());
  return aside_.get();
}

template <class Call>
void CopyEngines::EachTensor(const Operation& o, const Call& touches) {
  const bool gathers = o.op == CommOp::kAllGather;
  for (const Operation::Item& item : o.items) {
    const auto part = static_cast<size_t>(item.elements * SizeOf(o.dtype));
    const size_t whole = part * static_cast<size_t>(o.group->size());
    if (part == 0) continue;
    touches(std::span<const std::byte>(item.input, gathers ? part : whole));
    touches(std::span<const std::byte>(item.output, gathers ? whole : part));
  }
}

void CopyEngines::Order(const Operation& o) {
  ends_.erase(ends_.begin(), std::find_if(ends_.begin(), ends_.end(),
                                          [](const Aside& end) { return !end.done.Done(); }));
  const auto meet = [](std::span<const std::byte> a, std::span<const std::byte> b) {
    return a.data() < b.data() + b.size() && b.data() < a.data() + a.size();
  };
  // The last one that meets comes after the ones before it.
  for (auto end = ends_.rbegin(); end != ends_.rend(); ++end) {
    bool meets = false;
    EachTensor(
        o, [&](std::span<const std::byte> tensor) { meets = meets || meet(tensor, end->tensor); });
    if (!meets) continue;
    stream_.Wait(end->done);
    return;
  }
}

void CopyEngines::Join() {
  if (!ends_.empty()) stream_.Wait(ends_.back().done);
  ends_.clear();
}

absl::StatusOr<Stream*> CopyEngines::Issue(const Operation& o) { return Enqueue(Of(*o.group), o); }

bool CopyEngines::Busy() const {
  return cudaStreamQuery(native()) == cudaErrorNotReady ||
         (aside_ != nullptr && cudaStreamQuery(Native(*aside_)) == cudaErrorNotReady);
}

bool CopyEngines::Idle(Clock::time_point end) {
  while (Busy()) {
    if (Clock::now() > end) return false;
    std::this_thread::sleep_for(kLook);
  }
  return true;
}

void CopyEngines::EndWaits(const Channel& c) {
  for (int p = 0; c.flags != nullptr && p < c.group.size(); ++p) {
    std::atomic_ref<uint32_t>(c.flags[Cell(c.group.index, p)]).store(c.rounds + kFarAhead);
  }
}

bool CopyEngines::End(Clock::time_point end) {
  ended_ = true;
  return IdleWhile(end, [this] {
    for (const Channel& c : channels_) EndWaits(c);
  });
}

bool CopyEngines::IdleWhile(Clock::time_point end, const std::function<void()>& end_waits) {
  end_waits();
  // Again and again, since a rank that has not given up yet goes on to write its flags; and in a
  // thread that makes no call of CUDA, which another call might hold up.
  std::atomic<bool> done = false;
  absl::StatusOr<std::thread> again = StartThread("the end of copies", [&] {
    for (; !done; std::this_thread::sleep_for(kLook)) end_waits();
  });
  cudaSetDevice(stream_.device().index);
  const bool idle = Idle(end);
  done = true;
  if (again.ok()) again->join();
  return idle;
}

CopyEngines::~CopyEngines() {
  cudaSetDevice(stream_.device().index);
  for (Channel& c : channels_) {
    ++c.rounds;  // a last one, of nothing
    if (!ended_ && !Meet(c).ok()) ended_ = true;
  }
  if (!channels_.empty() && !Idle(Clock::now() + kFarewell)) {
    LogWarning("other ranks have not finished with the windows of the copy engines");
    End(Clock::now() + kFarewell);
  }
  // What a rank frees afterwards nobody may have mapped any more.
  for (Channel& c : channels_) {
    Unmap(&c);
    if (c.flags != nullptr) {
      std::atomic_ref<uint32_t>(c.flags[kUnmapped + c.group.index]).store(1);
    }
  }
  // A rank that died never says so.
  const Clock::time_point end = Clock::now() + (ended_ ? kFarewellAfterError : kFarewell);
  for (const Channel& c : channels_) {
    for (int p = 0; c.flags != nullptr && p < c.group.size(); ++p) {
      while (std::atomic_ref<uint32_t>(c.flags[kUnmapped + p]).load() == 0 && Clock::now() < end) {
        std::this_thread::sleep_for(kLook);
      }
    }
  }
  for (Channel& c : channels_) Close(&c);
}

}  // namespace stretto
