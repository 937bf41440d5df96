// What follows a kernel that reads memory which is not there. It costs the process its context, so
// that each test body runs in a process of its own, which has to end by itself.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "stretto/core/arena.h"
#include "stretto/core/stream.h"
#include "stretto/ops/ops.h"
#include "tests/cuda/gpu_test.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

constexpr int kSaid = 7, kSilent = 8;
constexpr char kSentence[] =
    "GPU 0 failed: cudaErrorIllegalAddress .*; the work before this point is lost: start again "
    "from the last checkpoint";

// Enqueues a kernel that reads and writes where nothing is mapped.
void EnqueueWildKernel(Stream& stream) {
  const Tensor wild =
      Tensor::Of(reinterpret_cast<void*>(uintptr_t{1} << 20), DType::kF32, {4096}, stream.device());
  ops::Add({&stream, KernelsFor(stream.device()).value()}, wild, wild);
}

int Say(const absl::Status& status) {
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return status.ok() ? kSilent : kSaid;
}

class CudaFaultDeathTest : public testing::GpuTest {
 protected:
  CudaFaultDeathTest() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

int FaultOnAStream() {
  const Device gpu = Device::Cuda(0);
  const auto stream = Stream::Create(gpu).value(), other = Stream::Create(gpu).value();
  const Arena arena = Arena::Create(gpu, "held", 1 << 20).value();
  EnqueueWildKernel(*stream);
  const absl::Status first = stream->Synchronize();
  // The same for all that comes after: kernels, copies, other streams, new memory.
  const Tensor part = Tensor::Of(arena.data(), DType::kF32, {64}, gpu);
  ops::Add({other.get(), KernelsFor(gpu).value()}, part, part);
  for (const absl::Status& later :
       {stream->Synchronize(), other->Synchronize(), Stream::Create(gpu).status()}) {
    if (later.message() != first.message()) {
      std::fprintf(stderr, "later: ");
      Say(later);
      return kSilent;
    }
  }
  return Say(first);
}

TEST_F(CudaFaultDeathTest, EndsAStream) {
  EXPECT_EXIT(std::exit(FaultOnAStream()), ::testing::ExitedWithCode(kSaid), kSentence);
}

// Whichever call meets the error first.
int FaultBeforeProducts() {
  const Device gpu = Device::Cuda(0);
  const auto broken = Stream::Create(gpu).value(), stream = Stream::Create(gpu).value();
  const Arena arena = Arena::Create(gpu, "operands", 3 * 256 * 256 * 4).value();
  const auto matrix = [&](int i) {
    return Tensor::Of(arena.data() + i * 256 * 256 * 4, DType::kF32, {256, 256}, gpu);
  };
  const ops::Context c = {stream.get(), KernelsFor(gpu).value()};
  ops::Linear(c, matrix(0), matrix(1), matrix(2), {});
  EnqueueWildKernel(*broken);
  broken->Synchronize().IgnoreError();
  ops::Linear(c, matrix(0), matrix(1), matrix(2), {});
  return Say(stream->Synchronize());
}

TEST_F(CudaFaultDeathTest, IsNotBlamedOnTheNextProduct) {
  EXPECT_EXIT(std::exit(FaultBeforeProducts()), ::testing::ExitedWithCode(kSaid), kSentence);
}

int FaultInAStep() {
  const testing::ScratchDirectory directory;
  TrainConfig config = testing::TinyRun(directory, "qwen3");
  config.runtime.device = "cuda";
  absl::Status failed;
  const absl::Status ran = World::RunThreads(1, [&](World& world) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    STRETTO_RETURN_IF_ERROR(trainer->Step().status());
    STRETTO_ASSIGN_OR_RETURN(const auto beside, Stream::Create(Device::Cuda(0)));
    EnqueueWildKernel(*beside);
    failed = trainer->Step().status();
    // Nothing of what follows hangs either.
    if (trainer->Step().ok() || trainer->Save().ok()) return absl::InternalError("it went on");
    trainer->Finish().IgnoreError();
    return absl::OkStatus();
  });
  return ran.ok() ? Say(failed) : (Say(ran), kSilent);
}

TEST_F(CudaFaultDeathTest, EndsATrainer) {
  EXPECT_EXIT(std::exit(FaultInAStep()), ::testing::ExitedWithCode(kSaid), kSentence);
}

}  // namespace
}  // namespace stretto
