// Operations in the device's queues: submitted far ahead, behind each other, between streams, and
// with a part of them aside.
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/copy.h"
#include "stretto/ops/ops.h"
#include "tests/cuda/nccl_ranks.h"
#include "tests/cuda/on_gpu.h"

namespace stretto {
namespace {

using testing::Data;
using testing::Differs;

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

}  // namespace

absl::Status CheckQueues(World& world) {
  const Device device = Device::Cuda(world.info().local_rank);
  for (const Carrier carrier : {Carrier::kNccl, Carrier::kCopyEngines}) {
    STRETTO_RETURN_IF_ERROR(world.Agree("chain", CheckChain(world, device, carrier)));
    STRETTO_RETURN_IF_ERROR(world.Agree("far ahead", CheckFarAhead(world, device, carrier)));
    STRETTO_RETURN_IF_ERROR(world.Agree("large at once", CheckLargeAtOnce(world, device, carrier)));
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("shared memory", CheckShared(world, device)));
  return world.Agree("streams", CheckStreams(world, device));
}

}  // namespace stretto
