// Memory, streams, events and copies on a GPU.
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/phase_timer.h"
#include "stretto/core/stream.h"
#include "stretto/ops/ops.h"
#include "tests/cuda/gpu_test.h"

namespace stretto {
namespace {

class CudaCore : public testing::GpuTest {
 protected:
  const Device gpu_ = Device::Cuda(0);
};

TEST_F(CudaCore, DescribesTheDevice) {
  const DeviceInfo info = DescribeDevice(gpu_).value();
  EXPECT_FALSE(info.name.empty());
  EXPECT_GE(info.devices, 1);
  EXPECT_GT(info.total_bytes, int64_t{1} << 30);
  EXPECT_LE(info.free_bytes, info.total_bytes);
  EXPECT_GE(info.major, 9);
}

TEST_F(CudaCore, AGpuThatIsNotThereIsNamed) {
  const absl::Status status = DescribeDevice(Device::Cuda(99)).status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_NE(std::string(status.message()).find("GPU 99"), std::string::npos) << status.message();
  EXPECT_FALSE(Stream::Create(Device::Cuda(99)).ok());
  EXPECT_FALSE(Arena::Create(Device::Cuda(99), "a", 8).ok());
}

TEST_F(CudaCore, ArenasAreZeroedAndRowsTravelThereAndBack) {
  const Arena arena = Arena::Create(gpu_, "rows", 7 * 40).value();
  std::vector<float> values(7 * 10, -1);
  const Tensor all = Tensor::Of(arena.data(), DType::kF32, {7, 10}, gpu_);
  ASSERT_TRUE(CopyToHost(values.data(), all).ok());
  for (float v : values) EXPECT_EQ(v, 0);

  std::vector<float> part(7 * 3);
  std::iota(part.begin(), part.end(), 1.0f);
  ASSERT_TRUE(CopyFromHost(all.Columns(4, 3), part.data()).ok());
  ASSERT_TRUE(CopyToHost(values.data(), all).ok());
  for (int r = 0; r < 7; ++r) {
    for (int c = 0; c < 10; ++c) {
      EXPECT_EQ(values[r * 10 + c], c >= 4 && c < 7 ? part[r * 3 + c - 4] : 0);
    }
  }
}

// More than one buffer of them.
TEST_F(CudaCore, RowsAreFilledFromTheHostPieceByPiece) {
  constexpr int64_t kRows = 30001, kColumns = 333;
  const Arena arena = Arena::Create(gpu_, "rows", kRows * kColumns * 4).value();
  const Tensor all = Tensor::Of(arena.data(), DType::kF32, {kRows, kColumns}, gpu_);
  int64_t next = 0;
  const absl::Status status = FillFromHost(all, [&](int64_t first, const Tensor& rows) {
    EXPECT_EQ(first, next);
    next += rows.rows();
    for (int64_t r = 0; r < rows.rows(); ++r) {
      for (int64_t c = 0; c < kColumns; ++c) {
        rows.as<float>(r)[c] = static_cast<float>((first + r) * 7 + c);
      }
    }
    return absl::OkStatus();
  });
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(next, kRows);
  std::vector<float> values(kRows * kColumns);
  ASSERT_TRUE(CopyToHost(values.data(), all).ok());
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    ASSERT_EQ(values[i], static_cast<float>(i / kColumns * 7 + i % kColumns)) << i;
  }
}

TEST_F(CudaCore, KernelsReadAndWriteHostArenasWhereTheyLie) {
  constexpr int64_t kCount = 100003;
  const Arena host = Arena::CreateHost(gpu_, "host", 2 * kCount * 4).value();
  EXPECT_EQ(host.device().kind, DeviceKind::kCpu);
  auto* const values = reinterpret_cast<float*>(host.data());
  for (int64_t i = 0; i < 2 * kCount; ++i) ASSERT_EQ(values[i], 0) << "not zeroed";
  for (int64_t i = 0; i < kCount; ++i) values[i] = static_cast<float>(i);
  const auto stream = Stream::Create(gpu_).value();
  const ops::Context context{stream.get(), KernelsFor(gpu_).value()};
  const Tensor from = Tensor::Of(values, DType::kF32, {kCount}, gpu_);
  const Tensor to = Tensor::Of(values + kCount, DType::kF32, {kCount}, gpu_);
  ops::Add(context, to, from);
  ops::Add(context, to, from);
  ASSERT_TRUE(stream->Synchronize().ok());
  for (int64_t i = 0; i < kCount; ++i) ASSERT_EQ(values[kCount + i], 2 * static_cast<float>(i));
}

// Also while the engine that copies to the device has other work: the host goes on when the bytes
// have left its memory, but no stream waits for that engine by itself.
TEST_F(CudaCore, WhatWasCopiedFromTheHostHasArrived) {
  constexpr int64_t kLarge = int64_t{1} << 28, kMost = 1 << 20;
  const Arena host = Arena::CreateHost(gpu_, "host", kLarge).value();
  const Arena device = Arena::Create(gpu_, "device", kLarge).value();
  const Arena arena = Arena::Create(gpu_, "values", 2 * kMost * 4).value();
  const auto busy = Stream::Create(gpu_).value(), stream = Stream::Create(gpu_).value();
  const ops::Context context{stream.get(), KernelsFor(gpu_).value()};
  std::vector<float> values(kMost), sums(kMost);
  float before = 0, round = 0;
  for (int64_t count : {256, 1 << 10, 1 << 14, 1 << 17, 1 << 20}) {
    const Tensor x = Tensor::Of(arena.data(), DType::kF32, {count}, gpu_);
    const Tensor sum = Tensor::Of(arena.data() + kMost * 4, DType::kF32, {count}, gpu_);
    ops::Zero(context, sum);
    ASSERT_TRUE(stream->Synchronize().ok());
    before = 0;
    for (int i = 0; i < 8; ++i) {
      CopyBytes(*busy, device.data(), host.data(), kLarge);
      values.assign(values.size(), ++round);
      before += round;
      ASSERT_TRUE(CopyFromHost(x, values.data()).ok());
      ops::Add(context, sum, x);
      ASSERT_TRUE(stream->Synchronize().ok());
    }
    ASSERT_TRUE(CopyToHost(sums.data(), sum).ok());
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(sums[i], before) << i << " of " << count;
  }
  ASSERT_TRUE(busy->Synchronize().ok());
}

TEST_F(CudaCore, TooMuchMemoryIsRefusedInOneSentence) {
  const absl::Status status = Arena::Create(gpu_, "huge", int64_t{1} << 42).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_NE(std::string(status.message()).find("huge"), std::string::npos);
  // The failure does not stick to what comes after.
  EXPECT_TRUE(Arena::Create(gpu_, "small", 1024).ok());
  const auto stream = Stream::Create(gpu_).value();
  EXPECT_TRUE(stream->Synchronize().ok());
}

TEST_F(CudaCore, CapturedWorkRunsAgainOnWhatLiesThereThen) {
  const auto stream = Stream::Create(gpu_).value();
  const KernelTable* kernels = KernelsFor(gpu_).value();
  const ops::Context context{stream.get(), kernels};
  const Arena memory = Arena::Create(gpu_, "capture", 2 * 1024).value();
  const Tensor x = Tensor::Of(memory.data(), DType::kF32, {256}, gpu_);
  const Tensor y = Tensor::Of(memory.data() + 1024, DType::kF32, {256}, gpu_);
  ASSERT_TRUE(stream->CanCapture());
  ASSERT_TRUE(stream->BeginCapture().ok());
  for (int i = 0; i < 3; ++i) ops::Add(context, y, x);
  absl::StatusOr<StreamGraph> graph = stream->EndCapture();
  ASSERT_TRUE(graph.ok()) << graph.status().message();
  std::vector<float> values(256, 1.0f);
  ASSERT_TRUE(CopyFromHost(x, values.data()).ok());
  stream->Launch(*graph);
  ASSERT_TRUE(stream->Synchronize().ok());
  values.assign(256, 2.0f);
  ASSERT_TRUE(CopyFromHost(x, values.data()).ok());
  stream->Launch(*graph);
  ASSERT_TRUE(stream->Synchronize().ok());
  ASSERT_TRUE(CopyToHost(values.data(), y).ok());
  for (float v : values) EXPECT_EQ(v, 3 + 6);  // nothing ran while it was captured
}

TEST_F(CudaCore, PhasesAreAsLongAsTheDeviceTakes) {
  const auto stream = Stream::Create(gpu_).value();
  constexpr int64_t kCount = int64_t{1} << 28;
  const Arena memory = Arena::Create(gpu_, "phases", 2 * kCount).value();
  const Tensor x = Tensor::Of(memory.data(), DType::kU8, {kCount}, gpu_);
  PhaseTimer timer(*stream, 3);
  for (int round = 0; round < 2; ++round) {
    timer.Restart(0);
    EXPECT_EQ(timer.Begin(1), 0);
    for (int i = 0; i < 40; ++i) CopyBytes(*stream, memory.data() + kCount, x.data, kCount);
    EXPECT_EQ(timer.Begin(0), 1);
    timer.End();
    ASSERT_TRUE(stream->Synchronize().ok());
    const std::vector<double>& seconds = timer.Seconds();
    // 20 GB are moved, at no more than 10 TB/s.
    EXPECT_GT(seconds[1], 2e-3);
    EXPECT_LT(seconds[0], seconds[1]);
    EXPECT_EQ(seconds[2], 0);
  }
}

TEST_F(CudaCore, EventsOrderStreams) {
  const auto first = Stream::Create(gpu_).value(), second = Stream::Create(gpu_).value();
  const KernelTable* kernels = KernelsFor(gpu_).value();
  constexpr int64_t kCount = int64_t{1} << 26;
  const Arena memory = Arena::Create(gpu_, "events", 3 * kCount * 4).value();
  const auto part = [&](int i) {
    return Tensor::Of(memory.data() + i * kCount * 4, DType::kF32, {kCount}, gpu_);
  };
  std::vector<float> ones(kCount, 1.0f);
  ASSERT_TRUE(CopyFromHost(part(0), ones.data()).ok());
  const ops::Context a{first.get(), kernels}, b{second.get(), kernels};
  for (int i = 0; i < 300; ++i) ops::Add(a, part(1), part(0));  // more points than events
  const Event done = first->Record();
  second->Wait(done);
  ops::Copy(b, part(2), part(1));
  ASSERT_TRUE(second->Synchronize().ok());
  EXPECT_TRUE(done.Done());
  std::vector<float> result(kCount);
  ASSERT_TRUE(CopyToHost(result.data(), part(2)).ok());
  EXPECT_EQ(result.front(), 300);
  EXPECT_EQ(result.back(), 300);
}

TEST_F(CudaCore, ManyEventsStayInOrder) {
  const auto stream = Stream::Create(gpu_).value();
  std::vector<Event> events;
  for (int i = 0; i < 1000; ++i) events.push_back(stream->Record());
  ASSERT_TRUE(stream->Synchronize().ok());
  for (const Event& event : events) EXPECT_TRUE(event.Done());
}

TEST_F(CudaCore, HostCodeInAQueueFailsTheStream) {
  const auto stream = Stream::Create(gpu_).value();
  bool ran = false;
  bool* const flag = &ran;
  stream->Enqueue([flag] { *flag = true; });
  EXPECT_FALSE(stream->Synchronize().ok());
  EXPECT_FALSE(ran);
}

// A table of products as checkpoints hold it from before the second operand had a type of its own.
TEST(CudaChoices, TablesOfEarlierVersionsAreRead) {
  const absl::StatusOr<const KernelTable*> kernels = KernelsFor(Device::Cuda(0));
  ASSERT_TRUE(kernels.ok()) << kernels.status().message();
  const std::string algorithm(128, 'a');
  // No such version: never used. The type is 14.
  const std::string fields = "matmul 7 7 64 32 16 14 0 1 0 16 16 64 0 256 0 1 4096";
  ASSERT_TRUE((*kernels)->import_choices(fields + " 0 " + algorithm + "\n").ok());
  EXPECT_NE((*kernels)->export_choices().find(fields + " 14 0 0 " + algorithm), std::string::npos)
      << (*kernels)->export_choices();
  // Its own lines come back as they are, and others are refused.
  ASSERT_TRUE((*kernels)->import_choices((*kernels)->export_choices()).ok());
  EXPECT_FALSE((*kernels)->import_choices(fields + " 3 0 " + algorithm + "\n").ok());
  EXPECT_FALSE((*kernels)->import_choices("matmul\n").ok());
}

}  // namespace
}  // namespace stretto
