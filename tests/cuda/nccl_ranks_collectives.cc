#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/ops/ops.h"
#include "tests/cuda/nccl_ranks.h"
#include "tests/support/collective_cases.h"

namespace stretto {
namespace {

using testing::Data;
using testing::Differs;
using testing::Mix;
using testing::Reference;
using testing::Slice;
using testing::Values;

// A copy of some data on a GPU.
struct OnGpu {
  Arena arena;
  Tensor tensor;

  static absl::StatusOr<OnGpu> Of(const Data& data, Device device) {
    OnGpu on;
    STRETTO_ASSIGN_OR_RETURN(
        on.arena, Arena::Create(device, "test", static_cast<int64_t>(data.bytes.size()) + 256));
    on.tensor = Tensor::Of(on.arena.data(), data.dtype, {data.elements()}, device);
    STRETTO_RETURN_IF_ERROR(CopyFromHost(on.tensor, data.bytes.data()));
    return on;
  }
  absl::StatusOr<Data> Read() const {
    Data data(tensor.dtype, tensor.elements());
    STRETTO_RETURN_IF_ERROR(CopyToHost(data.bytes.data(), tensor));
    return data;
  }
};

double At(const Data& data, int64_t i) {
  const std::byte* p = data.bytes.data();
  switch (data.dtype) {
    case DType::kF64:
      return reinterpret_cast<const double*>(p)[i];
    case DType::kF32:
      return reinterpret_cast<const float*>(p)[i];
    case DType::kBF16:
      return static_cast<float>(reinterpret_cast<const BFloat16*>(p)[i]);
    default:
      return 0;
  }
}

// Whether `got` is the sum of `all` to the rounding of its type; integers exactly.
bool IsSum(const Data& got, const Data& expected, const std::vector<Data>& all, int64_t begin = 0) {
  const double unit = got.dtype == DType::kF64   ? 0x1p-52
                      : got.dtype == DType::kF32 ? 0x1p-23
                                                 : 0x1p-7;
  if (got.dtype == DType::kI32 || got.dtype == DType::kI64) return got == expected;
  for (int64_t i = 0; i < got.elements(); ++i) {
    double size = 0;
    for (const Data& d : all) size += std::fabs(At(d, begin + i));
    const double bound = unit * static_cast<double>(all.size()) * size;
    if (!(std::fabs(At(got, i) - At(expected, i)) <= bound)) return false;
  }
  return true;
}

// Who carries all-gathers and reduce-scatters.
enum class Carrier : uint8_t { kNccl, kCopyEngines };

// Before a group's operations. Without copy engines the tests would prove nothing about them.
absl::Status Prepare(Communicator& c, const Group& g, Carrier carrier) {
  if (carrier == Carrier::kNccl) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(const std::string why, c.UseCopyEngines(g));
  if (!why.empty()) {
    return absl::UnavailableError(absl::StrCat("the copy engines cannot serve a group: ", why));
  }
  // Again is no other channel, and no agreement: ranks may do it when they like.
  if (c.world().rank() > 0) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(const std::string again, c.UseCopyEngines(g));
  if (again.empty()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the copy engines serve a group only once: ", again));
}

// Whether copy engines carried what the group sent since it had sent `sent` and they `copied`.
absl::Status CarriedBy(Communicator& c, const Group& g, Carrier carrier, int64_t sent,
                       int64_t copied, const std::string& what) {
  sent = c.BytesSent(g.name) - sent;
  copied = c.BytesCopied(g.name) - copied;
  if (copied == (carrier == Carrier::kCopyEngines ? sent : 0)) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("copy engines carried ", copied, " of the ", sent, " bytes of ", what));
}

// The cases of tests/support/collective_cases.h on a GPU.
absl::Status CheckCollectives(Communicator& c, const Group& g, Device device, DType dtype,
                              int64_t elements, uint64_t* hash, Carrier carrier) {
  const int n = g.size();
  const std::string what = absl::StrCat(Name(dtype), "[", elements, "] over ", n, " GPUs");
  const uint64_t salt = static_cast<uint64_t>(elements) * 31 + static_cast<uint64_t>(dtype);
  const auto me = static_cast<std::size_t>(g.index);
  const int64_t mine = g.index * elements;
  std::vector<Data> whole, wide;
  for (int r : g.ranks) {
    whole.push_back(Values(dtype, elements, r, salt));
    wide.push_back(Values(dtype, elements * n, r, salt + 1));
  }
  if (dtype != DType::kU8) {
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      STRETTO_ASSIGN_OR_RETURN(const OnGpu data, OnGpu::Of(whole[me], device));
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(g, data.tensor, op, "case")));
      STRETTO_ASSIGN_OR_RETURN(const Data got, data.Read());
      const Data expected = Reference(whole, op);
      if (!(op == ReduceOp::kSum ? IsSum(got, expected, whole) : got == expected)) {
        return Differs("all_reduce of " + what);
      }
      Mix(got, hash);
    }
    const Data expected = Slice(Reference(wide, ReduceOp::kSum), mine, elements);
    STRETTO_ASSIGN_OR_RETURN(const OnGpu input, OnGpu::Of(wide[me], device));
    STRETTO_ASSIGN_OR_RETURN(const OnGpu output, OnGpu::Of(Data(dtype, elements), device));
    // The order of the ranks, so the host's bits.
    const bool copied =
        carrier == Carrier::kCopyEngines && (dtype == DType::kF32 || dtype == DType::kBF16);
    const int64_t sent = c.BytesSent(g.name), sent_copied = c.BytesCopied(g.name);
    STRETTO_RETURN_IF_ERROR(c.Wait(c.ReduceScatter(g, output.tensor, input.tensor, "case")));
    STRETTO_ASSIGN_OR_RETURN(const Data got, output.Read());
    if (!(copied ? got == expected : IsSum(got, expected, wide, mine))) {
      return Differs("reduce_scatter of " + what);
    }
    STRETTO_ASSIGN_OR_RETURN(const Data kept, input.Read());
    if (!(kept == wide[me])) return Differs("the input of reduce_scatter of " + what);
    Mix(got, hash);
    const Ticket in_place =
        c.ReduceScatter(g, input.tensor.Rows(mine, elements), input.tensor, "in place");
    STRETTO_RETURN_IF_ERROR(c.Wait(in_place));
    STRETTO_ASSIGN_OR_RETURN(const Data after, input.Read());
    const Data own = Slice(after, mine, elements);
    if (!(copied ? own == expected : IsSum(own, expected, wide, mine))) {
      return Differs("reduce_scatter in place of " + what);
    }
    STRETTO_RETURN_IF_ERROR(CarriedBy(c, g, copied ? carrier : Carrier::kNccl, sent, sent_copied,
                                      "reduce_scatter of " + what));
  }

  Data gathered(dtype, elements * n);
  for (int p = 0; p < n; ++p) {
    std::memcpy(gathered.bytes.data() + p * elements * SizeOf(dtype),
                whole[static_cast<std::size_t>(p)].bytes.data(), whole[0].bytes.size());
  }
  STRETTO_ASSIGN_OR_RETURN(const OnGpu part, OnGpu::Of(whole[me], device));
  const int64_t sent = c.BytesSent(g.name), sent_copied = c.BytesCopied(g.name);
  for (const bool in_place : {false, true}) {
    Data start(dtype, elements * n);
    if (in_place) {
      std::memcpy(start.bytes.data() + mine * SizeOf(dtype), whole[me].bytes.data(),
                  whole[me].bytes.size());
    }
    STRETTO_ASSIGN_OR_RETURN(const OnGpu all, OnGpu::Of(start, device));
    STRETTO_RETURN_IF_ERROR(c.Wait(c.AllGather(
        g, all.tensor, in_place ? all.tensor.Rows(mine, elements) : part.tensor, "case")));
    STRETTO_ASSIGN_OR_RETURN(const Data got, all.Read());
    if (!(got == gathered)) return Differs("all_gather of " + what);
  }
  STRETTO_RETURN_IF_ERROR(CarriedBy(c, g, carrier, sent, sent_copied, "all_gather of " + what));

  for (const int root : {0, n - 1}) {
    STRETTO_ASSIGN_OR_RETURN(
        const OnGpu data, OnGpu::Of(g.index == root ? whole[me] : Data(dtype, elements), device));
    STRETTO_RETURN_IF_ERROR(c.Wait(c.Broadcast(g, data.tensor, root, "case")));
    STRETTO_ASSIGN_OR_RETURN(const Data got, data.Read());
    if (!(got == whole[static_cast<std::size_t>(root)])) return Differs("broadcast of " + what);
  }

  // Uneven counts, some of them none.
  const auto count = [&](int from, int to) { return (from + 2 * to) * 37 % (elements + 1); };
  std::vector<int64_t> sends, receives;
  int64_t sent_elements = 0;
  Data exchanged(dtype, 0);
  for (int p = 0; p < n; ++p) {
    sends.push_back(count(g.index, p));
    receives.push_back(count(p, g.index));
    sent_elements += sends.back();
    int64_t begin = 0, total = 0;
    for (int q = 0; q < n; ++q) {
      if (q < g.index) begin += count(p, q);
      total += count(p, q);
    }
    const Data theirs = Slice(Values(dtype, total, g.ranks[static_cast<std::size_t>(p)], salt + 2),
                              begin, receives.back());
    exchanged.bytes.insert(exchanged.bytes.end(), theirs.bytes.begin(), theirs.bytes.end());
  }
  STRETTO_ASSIGN_OR_RETURN(const OnGpu input,
                           OnGpu::Of(Values(dtype, sent_elements, g.ranks[me], salt + 2), device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu output,
                           OnGpu::Of(Data(dtype, exchanged.elements()), device));
  STRETTO_RETURN_IF_ERROR(
      c.Wait(c.AllToAll(g, output.tensor, receives, input.tensor, sends, "case")));
  STRETTO_ASSIGN_OR_RETURN(const Data got, output.Read());
  if (!(got == exchanged)) return Differs("all_to_all of " + what);

  // Both ways at once round the ring, two messages each way, receives and sends mixed.
  const int next = (g.index + 1) % n;
  const int previous = (g.index + n - 1) % n;
  STRETTO_ASSIGN_OR_RETURN(const OnGpu first, OnGpu::Of(Data(dtype, elements), device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu second, OnGpu::Of(Data(dtype, elements), device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu other,
                           OnGpu::Of(Values(dtype, elements, g.ranks[me], salt + 3), device));
  const Ticket receive1 = c.Receive(g, first.tensor, previous, "ring");
  const Ticket send1 = c.Send(g, part.tensor, next, "ring");
  const Ticket send2 = c.Send(g, other.tensor, next, "ring");
  const Ticket receive2 = c.Receive(g, second.tensor, previous, "ring");
  for (const Ticket t : {receive2, send1, receive1, send2}) STRETTO_RETURN_IF_ERROR(c.Wait(t));
  STRETTO_ASSIGN_OR_RETURN(const Data first_got, first.Read());
  STRETTO_ASSIGN_OR_RETURN(const Data second_got, second.Read());
  const auto from = static_cast<std::size_t>(previous);
  if (!(first_got == whole[from]) ||
      !(second_got == Values(dtype, elements, g.ranks[from], salt + 3))) {
    return Differs("send and receive of " + what);
  }
  return absl::OkStatus();
}

// Reduce-scatters that add to what is there. Small integers, which both types hold exactly.
absl::Status CheckAdds(Communicator& c, const Group& g, Device device, DType dtype,
                       Carrier carrier) {
  const int n = g.size();
  std::vector<int64_t> sizes = {3, 1000, 0, 70001, 5'000'000};
  // More than one launch adds; over more ranks so many tensors are left to NCCL.
  if (carrier == Carrier::kNccl || n <= 4) sizes.insert(sizes.end(), 70, 33);
  const auto value = [](int rank, std::size_t item, int64_t i) {
    return static_cast<double>((i * 7 + rank * 3 + static_cast<int64_t>(item)) % 11);
  };
  const auto set = [](Data& data, int64_t i, double v) {
    if (data.dtype == DType::kF32) {
      data.tensor().as<float>()[i] = static_cast<float>(v);
    } else {
      data.tensor().as<BFloat16>()[i] = BFloat16(static_cast<float>(v));
    }
  };
  std::vector<OnGpu> inputs, outputs;
  std::vector<Tensor> in, out;
  for (std::size_t k = 0; k < sizes.size(); ++k) {
    Data input(dtype, sizes[k] * n), output(dtype, sizes[k]);
    for (int64_t i = 0; i < sizes[k] * n; ++i) {
      set(input, i, value(g.ranks[static_cast<std::size_t>(g.index)], k, i));
    }
    for (int64_t i = 0; i < sizes[k]; ++i) set(output, i, static_cast<double>(i % 5));
    STRETTO_ASSIGN_OR_RETURN(OnGpu input_on, OnGpu::Of(input, device));
    STRETTO_ASSIGN_OR_RETURN(OnGpu output_on, OnGpu::Of(output, device));
    in.push_back(input_on.tensor);
    out.push_back(output_on.tensor);
    inputs.push_back(std::move(input_on));
    outputs.push_back(std::move(output_on));
  }
  const int64_t sent = c.BytesSent(g.name), copied = c.BytesCopied(g.name);
  STRETTO_RETURN_IF_ERROR(c.Wait(c.ReduceScatterAddMany(g, out, in, "adds")));
  STRETTO_RETURN_IF_ERROR(
      CarriedBy(c, g, carrier, sent, copied, absl::StrCat("a sum in ", Name(dtype))));
  for (std::size_t k = 0; k < sizes.size(); ++k) {
    STRETTO_ASSIGN_OR_RETURN(const Data got, outputs[k].Read());
    for (int64_t i = 0; i < sizes[k]; ++i) {
      double expected = static_cast<double>(i % 5);
      for (const int r : g.ranks) expected += value(r, k, g.index * sizes[k] + i);
      if (At(got, i) != expected) {
        return Differs(absl::StrCat("element ", i, " of item ", k, " of a sum in ", Name(dtype),
                                    " that is added, ", At(got, i), " for ", expected));
      }
    }
  }
  return absl::OkStatus();
}

// A bucket and operations of two groups in flight, waited for in another order; operations on one
// tensor follow each other without a wait.
absl::Status CheckManyInFlight(Communicator& c, const Group& g, const Group& sub, Device device,
                               uint64_t* hash) {
  const int n = g.size();
  const std::vector<int64_t> sizes = {3, 1000, 0, 70001, 17};
  std::vector<std::vector<Data>> everybody;
  std::vector<OnGpu> inputs, outputs, gathered;
  std::vector<Tensor> in, out, all;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    everybody.emplace_back();
    for (int r : g.ranks) everybody[i].push_back(Values(DType::kF32, sizes[i] * n, r, 900 + i));
    STRETTO_ASSIGN_OR_RETURN(OnGpu input,
                             OnGpu::Of(everybody[i][static_cast<std::size_t>(g.index)], device));
    STRETTO_ASSIGN_OR_RETURN(OnGpu output, OnGpu::Of(Data(DType::kF32, sizes[i]), device));
    STRETTO_ASSIGN_OR_RETURN(OnGpu whole, OnGpu::Of(Data(DType::kF32, sizes[i] * n), device));
    in.push_back(input.tensor);
    out.push_back(output.tensor);
    all.push_back(whole.tensor);
    inputs.push_back(std::move(input));
    outputs.push_back(std::move(output));
    gathered.push_back(std::move(whole));
  }
  // Integers, so that sums of sums are exact.
  std::vector<Data> of;
  for (int r : g.ranks) of.push_back(Values(DType::kI64, 40001, r, 700));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu chain,
                           OnGpu::Of(of[static_cast<std::size_t>(g.index)], device));
  std::vector<Ticket> tickets;
  tickets.push_back(c.ReduceScatterMany(g, out, in, "bucket"));
  tickets.push_back(c.AllReduce(g, chain.tensor, ReduceOp::kSum, "chain"));
  tickets.push_back(c.AllReduce(sub, chain.tensor, ReduceOp::kSum, "chain"));
  tickets.push_back(c.AllGatherMany(g, all, out, "bucket"));
  tickets.push_back(c.AllReduce(g, chain.tensor, ReduceOp::kMax, "chain"));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu message, OnGpu::Of(Data(DType::kF32, 70001), device));
  const int previous = (g.index + n - 1) % n;
  tickets.push_back(c.Send(g, in[3].Rows(0, 70001), (g.index + 1) % n, "message"));
  tickets.push_back(c.Receive(g, message.tensor, previous, "message"));
  for (std::size_t k = tickets.size(); k-- > 0;) STRETTO_RETURN_IF_ERROR(c.Wait(tickets[k]));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    STRETTO_ASSIGN_OR_RETURN(const Data got, gathered[i].Read());
    if (!IsSum(got, Reference(everybody[i], ReduceOp::kSum), everybody[i])) {
      return Differs(absl::StrCat("bucket item ", i));
    }
    Mix(got, hash);
  }
  STRETTO_ASSIGN_OR_RETURN(const Data received, message.Read());
  if (!(received == Slice(everybody[3][static_cast<std::size_t>(previous)], 0, 70001))) {
    return Differs("a message between collectives");
  }
  Data sum = Reference(of, ReduceOp::kSum);
  std::vector<Data> scaled;  // groups may differ in size: the largest and the smallest multiple
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> group_sizes,
                           c.world().AllGather("sizes", absl::StrCat(sub.size())));
  for (const std::string& size : group_sizes) {
    scaled.push_back(sum);
    for (int64_t i = 0; i < sum.elements(); ++i) {
      scaled.back().tensor().as<int64_t>()[i] *= std::stoll(size);
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const Data got, chain.Read());
  if (!(got == Reference(scaled, ReduceOp::kMax))) return Differs("operations on one tensor");
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> RunCases(World& world, Device device, Carrier carrier) {
  Communicator c(world);
  uint64_t hash = 1469598103934665603ull;
  RankList half, ring;  // any order is a ring; half is a group of one when there are two ranks
  for (int r = world.size() - 1; r >= 0; --r) {
    ring.push_back(r);
    if (r % 2 == world.rank() % 2) half.push_back(r);
  }
  STRETTO_ASSIGN_OR_RETURN(const Group before, c.MakeGroup("half", half));
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  STRETTO_ASSIGN_OR_RETURN(const Group after, c.MakeGroup("ring", ring));
  for (const Group* g : {&c.all(), &before, &after}) {
    STRETTO_RETURN_IF_ERROR(Prepare(c, *g, carrier));
  }
  for (const DType dtype :
       {DType::kF64, DType::kF32, DType::kBF16, DType::kI32, DType::kI64, DType::kU8}) {
    for (const int64_t elements :
         {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{1021}, int64_t{33331}}) {
      STRETTO_RETURN_IF_ERROR(
          CheckCollectives(c, c.all(), device, dtype, elements, &hash, carrier));
    }
    STRETTO_RETURN_IF_ERROR(CheckCollectives(c, before, device, dtype, 3001, &hash, carrier));
    STRETTO_RETURN_IF_ERROR(CheckCollectives(c, after, device, dtype, 3001, &hash, carrier));
  }
  // Copy engines take two rounds.
  const int64_t large = carrier == Carrier::kNccl ? 4300003 : 9000001;
  STRETTO_RETURN_IF_ERROR(CheckCollectives(c, c.all(), device, DType::kF32, large, &hash, carrier));
  STRETTO_RETURN_IF_ERROR(CheckManyInFlight(c, c.all(), before, device, &hash));
  STRETTO_RETURN_IF_ERROR(CheckManyInFlight(c, after, before, device, &hash));
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    STRETTO_RETURN_IF_ERROR(CheckAdds(c, c.all(), device, dtype, carrier));
    STRETTO_RETURN_IF_ERROR(CheckAdds(c, after, device, dtype, carrier));
  }
  STRETTO_RETURN_IF_ERROR(c.WaitAll());
  return hash;
}

// Kernels on one stream before an operation and on another one after it, with no wait of the host.
absl::Status CheckStreams(World& world, Device device) {
  constexpr int64_t kElements = 4 << 20;
  constexpr int kRounds = 6;
  STRETTO_ASSIGN_OR_RETURN(const KernelTable* kernels, KernelsFor(device));
  STRETTO_ASSIGN_OR_RETURN(const auto before, Stream::Create(device));
  STRETTO_ASSIGN_OR_RETURN(const auto after, Stream::Create(device));
  const Data empty(DType::kF32, kElements);
  STRETTO_ASSIGN_OR_RETURN(const OnGpu data, OnGpu::Of(empty, device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu sum, OnGpu::Of(empty, device));
  std::vector<OnGpu> sources;
  for (int round = 0; round < kRounds; ++round) {
    Data values(DType::kF32, kElements);
    for (int64_t i = 0; i < kElements; ++i) {
      values.tensor().as<float>()[i] = static_cast<float>((i + round) % 97 + world.rank());
    }
    STRETTO_ASSIGN_OR_RETURN(OnGpu source, OnGpu::Of(values, device));
    sources.push_back(std::move(source));
  }
  Communicator c(world);
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  ops::Zero({after.get(), kernels}, sum.tensor);
  for (const OnGpu& source : sources) {
    ops::Zero({before.get(), kernels}, data.tensor);
    ops::Add({before.get(), kernels}, data.tensor, source.tensor);
    const Ticket ticket =
        c.AllReduce(c.all(), data.tensor, ReduceOp::kSum, "streams", before->Record());
    STRETTO_RETURN_IF_ERROR(c.Wait(*after, ticket));
    ops::Add({after.get(), kernels}, sum.tensor, data.tensor);
    before->Wait(after->Record());
  }
  STRETTO_RETURN_IF_ERROR(after->Synchronize());
  STRETTO_ASSIGN_OR_RETURN(Data got, sum.Read());
  const int n = world.size();
  for (int64_t i = 0; i < kElements; ++i) {
    float expected = 0;
    for (int round = 0; round < kRounds; ++round) {
      expected += static_cast<float>(n * ((i + round) % 97) + n * (n - 1) / 2);
    }
    if (got.tensor().as<float>()[i] != expected) return Differs("a sum over streams");
  }
  return c.WaitAll();
}

// Many operations submitted ahead of a device that has not begun with the first one, more than its
// queues take, of several groups and kinds; then one of many items after the other.
absl::Status CheckFarAhead(World& world, Device device, Carrier carrier) {
  constexpr int64_t kRows = 900, kColumns = 257, kItems = 1500;
  const int n = world.size(), me = world.rank();
  Communicator c(world);
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  RankList reversed;
  for (int r = n - 1; r >= 0; --r) reversed.push_back(r);
  STRETTO_ASSIGN_OR_RETURN(const Group ring, c.MakeGroup("ring", reversed));
  STRETTO_RETURN_IF_ERROR(Prepare(c, c.all(), carrier));
  const auto stream = Stream::Create(device);
  STRETTO_RETURN_IF_ERROR(stream.status());
  const auto value = [](int rank, int64_t row, int64_t i) {
    return static_cast<int32_t>((row * 31 + i * 7 + rank * 13) % 1009);
  };
  Data values(DType::kI32, kRows * kColumns);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < kColumns; ++i) {
      values.tensor().as<int32_t>()[row * kColumns + i] = value(me, row, i);
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const OnGpu data, OnGpu::Of(values, device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu received, OnGpu::Of(values, device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu work, OnGpu::Of(Data(DType::kU8, 512 << 20), device));
  for (int i = 0; i < 600; ++i) {  // longer than the delays of all operations
    CopyBytes(**stream, work.tensor.data, work.tensor.data + (256 << 20), 256 << 20);
  }
  const Event begin = (*stream)->Record();
  for (int64_t row = 0; row < kRows; ++row) {
    const Tensor mine = data.tensor.Rows(row * kColumns, kColumns);
    const Tensor theirs = received.tensor.Rows(row * kColumns, kColumns);
    if (row % 3 == 2) {
      c.Receive(c.all(), theirs, (me + n - 1) % n, "ahead", begin);
      c.Send(c.all(), mine, (me + 1) % n, "ahead", begin);
    } else {
      c.AllReduce(row % 3 == 0 ? c.all() : ring, mine, ReduceOp::kSum, "ahead", begin);
    }
  }
  STRETTO_RETURN_IF_ERROR(c.WaitAll());
  STRETTO_ASSIGN_OR_RETURN(Data got, data.Read());
  STRETTO_ASSIGN_OR_RETURN(Data messages, received.Read());
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < kColumns; ++i) {
      int32_t expected = row % 3 == 2 ? value((me + n - 1) % n, row, i) : 0;
      for (int r = 0; r < n && row % 3 != 2; ++r) expected += value(r, row, i);
      Data& of = row % 3 == 2 ? messages : got;
      if (of.tensor().as<int32_t>()[row * kColumns + i] != expected) {
        return Differs(absl::StrCat("operation ", row, " of many ahead"));
      }
    }
  }

  Data parts(DType::kI32, kItems * n);
  for (int64_t i = 0; i < kItems * n; ++i) parts.tensor().as<int32_t>()[i] = value(me, i, 0);
  STRETTO_ASSIGN_OR_RETURN(const OnGpu items, OnGpu::Of(parts, device));
  std::vector<Tensor> wholes, own;
  for (int64_t i = 0; i < kItems; ++i) {
    wholes.push_back(items.tensor.Rows(i * n, n));
    own.push_back(items.tensor.Rows(i * n + me, 1));
  }
  for (int round = 0; round < 8; ++round) c.AllGatherMany(c.all(), wholes, own, "items");
  STRETTO_RETURN_IF_ERROR(c.WaitAll());
  STRETTO_ASSIGN_OR_RETURN(Data gathered, items.Read());
  for (int64_t i = 0; i < kItems * n; ++i) {
    if (gathered.tensor().as<int32_t>()[i] != value(static_cast<int>(i % n), i, 0)) {
      return Differs("an all-gather of many items");
    }
  }
  return (*stream)->Synchronize();
}

// Gathers of inputs that the other ranks read where they are: each of them is overwritten as soon
// as its gather is over, and ranks are late in turn.
absl::Status CheckShared(World& world, Device device) {
  constexpr int64_t kElements = 100'000, kRounds = 24;
  const int n = world.size(), me = world.rank();
  // Outlive the communicator.
  STRETTO_ASSIGN_OR_RETURN(const OnGpu shared,
                           OnGpu::Of(Data(DType::kI32, kElements * (n + 3)), device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu wholes,
                           OnGpu::Of(Data(DType::kI32, kRounds * kElements * n), device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu apart, OnGpu::Of(Data(DType::kI32, kElements * n), device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu work, OnGpu::Of(Data(DType::kU8, 128 << 20), device));
  const auto value = [](int rank, int64_t round, int64_t i) {
    return static_cast<int32_t>(1'000'000 * rank + 1000 * round + i % 997);
  };
  Data mine(DType::kI32, kRounds * kElements);
  for (int64_t i = 0; i < kRounds * kElements; ++i) {
    mine.tensor().as<int32_t>()[i] = value(me, i / kElements, i % kElements);
  }
  STRETTO_ASSIGN_OR_RETURN(const OnGpu values, OnGpu::Of(mine, device));
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(device));
  Communicator c(world);
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  STRETTO_RETURN_IF_ERROR(Prepare(c, c.all(), Carrier::kCopyEngines));
  STRETTO_ASSIGN_OR_RETURN(const std::string other,
                           c.ShareMemory(c.all(), shared.tensor, /*layout=*/me == 0 ? 1 : 2));
  if (other.find("not laid out alike") == std::string::npos) {
    return absl::InternalError(absl::StrCat("memory of two layouts was shared: '", other, "'"));
  }
  STRETTO_ASSIGN_OR_RETURN(const std::string why, c.ShareMemory(c.all(), shared.tensor, 1));
  if (!why.empty()) return absl::UnavailableError("memory cannot be shared: " + why);

  const Tensor input = shared.tensor.Rows(kElements, kElements);  // not at its beginning
  const Tensor within = shared.tensor.Rows(3 * kElements, kElements * n);
  for (int64_t round = 0; round < kRounds; ++round) {
    if (round % n == me) {
      CopyBytes(*stream, work.tensor.data, work.tensor.data + (64 << 20), 64 << 20);
    }
    // Out of the shared memory into it, in place within it, and to another place.
    const bool in_place = round % 3 == 1;
    const Tensor own = in_place ? within.Rows(me * kElements, kElements) : input;
    CopyBytes(*stream, own.data, values.tensor.Rows(round * kElements, kElements).data,
              own.bytes());
    const Tensor whole = wholes.tensor.Rows(round * kElements * n, kElements * n);
    const Tensor to = round % 3 == 2 ? whole : within;
    STRETTO_RETURN_IF_ERROR(
        c.Wait(*stream, c.AllGather(c.all(), to, own, "shared", stream->Record())));
    if (to.data != whole.data) CopyBytes(*stream, whole.data, to.data, to.bytes());
    // Others use slots, in between.
    if (round % 4 == 3) {
      STRETTO_RETURN_IF_ERROR(c.Wait(
          *stream,
          c.AllGather(c.all(), apart.tensor, values.tensor.Rows(round * kElements, kElements),
                      "not shared", stream->Record())));
    }
  }
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  STRETTO_ASSIGN_OR_RETURN(Data got, wholes.Read());
  for (int64_t i = 0; i < kRounds * kElements * n; ++i) {
    const int64_t round = i / (kElements * n), of = i % (kElements * n);
    if (got.tensor().as<int32_t>()[i] !=
        value(static_cast<int>(of / kElements), round, of % kElements)) {
      return Differs(absl::StrCat("element ", of, " of gather ", round, " of shared memory"));
    }
  }
  return c.WaitAll();
}

// Sums and gathers that read what the one before wrote, submitted ahead of a device that has not
// begun with the first.
absl::Status CheckChain(World& world, Device device, Carrier carrier) {
  constexpr int64_t kElements = 1 << 16;
  const int n = world.size(), me = world.rank();
  int rounds = 0;  // each multiplies by n, and 2^100 is in the range of f32
  for (double size = n; size < 0x1p100; size *= n) ++rounds;
  Communicator c(world);
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  STRETTO_RETURN_IF_ERROR(Prepare(c, c.all(), carrier));
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(device));
  Data values(DType::kF32, kElements * n);
  for (int64_t i = 0; i < kElements * n; ++i) {
    values.tensor().as<float>()[i] = static_cast<float>(i % 7 + me);
  }
  STRETTO_ASSIGN_OR_RETURN(const OnGpu data, OnGpu::Of(values, device));
  STRETTO_ASSIGN_OR_RETURN(const OnGpu work, OnGpu::Of(Data(DType::kU8, 512 << 20), device));
  for (int i = 0; i < 200; ++i) {
    CopyBytes(*stream, work.tensor.data, work.tensor.data + (256 << 20), 256 << 20);
  }
  const Event begin = stream->Record();
  const Tensor own = data.tensor.Rows(me * kElements, kElements);
  Ticket last = 0;
  for (int round = 0; round < rounds; ++round) {
    c.ReduceScatter(c.all(), own, data.tensor, "chain", begin);
    last = c.AllGather(c.all(), data.tensor, own, "chain");
  }
  STRETTO_RETURN_IF_ERROR(c.Wait(*stream, last));
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  STRETTO_ASSIGN_OR_RETURN(Data got, data.Read());
  for (int64_t i = 0; i < kElements * n; ++i) {
    const double expected = (n * static_cast<double>(i % 7) + n * (n - 1) / 2) *
                            std::pow(static_cast<double>(n), rounds - 1);
    if (!(std::fabs(got.tensor().as<float>()[i] - expected) <= 1e-5 * expected)) {
      return Differs("a chain of sums and gathers");
    }
  }
  return c.WaitAll();
}

// The first operation of a communicator is larger than any that has warmed it up.
absl::Status CheckLargeAtOnce(World& world, Device device, Carrier carrier) {
  constexpr int64_t kElements = 24 << 20;
  const int n = world.size(), me = world.rank();
  Data values(DType::kI32, kElements * n);
  for (int64_t i = 0; i < kElements * n; ++i) {
    values.tensor().as<int32_t>()[i] = static_cast<int32_t>(i % 8191) + me;
  }
  STRETTO_ASSIGN_OR_RETURN(const OnGpu data, OnGpu::Of(values, device));
  const auto expect = [&](const char* what, int64_t begin, auto expected) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(Data got, data.Read());
    for (int64_t i = begin; i < begin + kElements; ++i) {
      if (got.tensor().as<int32_t>()[i] != expected(i)) return Differs(what);
    }
    return absl::OkStatus();
  };
  for (const CommOp op : {CommOp::kReduceScatter, CommOp::kAllReduce, CommOp::kAllGather}) {
    STRETTO_RETURN_IF_ERROR(CopyFromHost(data.tensor, values.bytes.data()));
    Communicator c(world);
    STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
    STRETTO_RETURN_IF_ERROR(Prepare(c, c.all(), carrier));
    const Tensor own = data.tensor.Rows(me * kElements, kElements);
    if (op == CommOp::kReduceScatter) {
      STRETTO_RETURN_IF_ERROR(c.Wait(c.ReduceScatter(c.all(), own, data.tensor, "large")));
      STRETTO_RETURN_IF_ERROR(expect("a large reduce-scatter", me * kElements, [&](int64_t i) {
        return n * static_cast<int32_t>(i % 8191) + n * (n - 1) / 2;
      }));
    } else if (op == CommOp::kAllReduce) {
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(c.all(), data.tensor, ReduceOp::kMax, "large")));
      STRETTO_RETURN_IF_ERROR(expect("a large all-reduce", 0, [&](int64_t i) {
        return static_cast<int32_t>(i % 8191) + n - 1;
      }));
    } else {
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllGather(c.all(), data.tensor, own, "large")));
      const int next = (me + 1) % n;
      STRETTO_RETURN_IF_ERROR(expect("a large all-gather", next * kElements, [&](int64_t i) {
        return static_cast<int32_t>(i % 8191) + next;
      }));
    }
  }
  return absl::OkStatus();
}

// Bytes are counted alike, whatever carries the data.
absl::Status CheckBytes(World& world, Device device, Carrier carrier) {
  Communicator c(world);
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  STRETTO_RETURN_IF_ERROR(Prepare(c, c.all(), carrier));
  const int n = world.size();
  const std::vector<int64_t> counts(static_cast<std::size_t>(n), 5);
  int64_t sent[2] = {};
  for (const bool on_gpu : {false, true}) {
    for (const int64_t elements : {int64_t{1}, int64_t{1000}, int64_t{70001}}) {
      Data part(DType::kF32, elements + 5 * n), whole(DType::kF32, (elements + 5 * n) * n);
      STRETTO_ASSIGN_OR_RETURN(const OnGpu gpu_part, OnGpu::Of(part, device));
      STRETTO_ASSIGN_OR_RETURN(const OnGpu gpu_whole, OnGpu::Of(whole, device));
      const Tensor p = on_gpu ? gpu_part.tensor : part.tensor();
      const Tensor w = on_gpu ? gpu_whole.tensor : whole.tensor();
      const Group& g = c.all();
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(g, p, ReduceOp::kMax, "bytes")));
      STRETTO_RETURN_IF_ERROR(c.Wait(c.ReduceScatter(g, p, w, "bytes")));
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllGather(g, w, p, "bytes")));
      STRETTO_RETURN_IF_ERROR(c.Wait(c.Broadcast(g, w, n - 1, "bytes")));
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllToAll(g, w, counts, p, counts, "bytes")));
      const Ticket send = c.Send(g, p, (g.index + 1) % n, "bytes");
      STRETTO_RETURN_IF_ERROR(
          c.Wait(c.Receive(g, w.Rows(0, p.rows()), (g.index + n - 1) % n, "bytes")));
      STRETTO_RETURN_IF_ERROR(c.Wait(send));
    }
    sent[on_gpu] = c.BytesSent("all") - sent[0];
  }
  if (sent[0] == sent[1]) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("the host counts ", sent[0], " bytes and the GPU ", sent[1]));
}

// One rank alone needs no other, nor NCCL.
absl::Status CheckAlone(Device device) {
  return World::RunThreads(1, [&](World& world) -> absl::Status {
    Communicator c(world);
    STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
    uint64_t hash = 0;
    STRETTO_RETURN_IF_ERROR(
        CheckCollectives(c, c.all(), device, DType::kF32, 1021, &hash, Carrier::kNccl));
    Data host(DType::kF32, 10);
    STRETTO_ASSIGN_OR_RETURN(const OnGpu gpu, OnGpu::Of(host, device));
    const absl::Status mixed = c.Wait(c.AllGather(c.all(), gpu.tensor, host.tensor(), "mixed"));
    if (std::string(mixed.message()).find("must be on one device") == std::string::npos) {
      return absl::InternalError(absl::StrCat("a mixed all_gather gave '", mixed.ToString(), "'"));
    }
    return absl::OkStatus();
  });
}

}  // namespace

absl::Status CheckCollectives(World& world) {
  const Device device = Device::Cuda(world.info().local_rank);
  for (const Carrier carrier : {Carrier::kNccl, Carrier::kCopyEngines}) {
    STRETTO_ASSIGN_OR_RETURN(const uint64_t first, RunCases(world, device, carrier));
    STRETTO_ASSIGN_OR_RETURN(const uint64_t second, RunCases(world, device, carrier));
    STRETTO_RETURN_IF_ERROR(world.Agree(
        "same bits", first == second ? absl::OkStatus() : Differs("a second run of the cases")));
    STRETTO_RETURN_IF_ERROR(world.Agree("chain", CheckChain(world, device, carrier)));
    STRETTO_RETURN_IF_ERROR(world.Agree("far ahead", CheckFarAhead(world, device, carrier)));
    STRETTO_RETURN_IF_ERROR(world.Agree("large at once", CheckLargeAtOnce(world, device, carrier)));
    STRETTO_RETURN_IF_ERROR(world.Agree("bytes", CheckBytes(world, device, carrier)));
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("shared memory", CheckShared(world, device)));
  STRETTO_RETURN_IF_ERROR(world.Agree("streams", CheckStreams(world, device)));
  return world.Agree("alone", CheckAlone(device));
}

}  // namespace stretto
