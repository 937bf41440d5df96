#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/ops/ops.h"
#include "tests/cuda/nccl_ranks.h"
#include "tests/cuda/on_gpu.h"
#include "tests/support/collective_cases.h"

namespace stretto {
namespace {

using testing::Data;
using testing::Differs;
using testing::Mix;
using testing::Reference;
using testing::Slice;
using testing::Values;

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
    STRETTO_RETURN_IF_ERROR(world.Agree("bytes", CheckBytes(world, device, carrier)));
  }
  return world.Agree("alone", CheckAlone(device));
}

}  // namespace stretto
