// Snapshots of a GPU's memory: by the copy engine into the keeper's memory, and through the ring.
#include "tests/cuda/gpu_test.h"
#include "tests/support/snapshot_cases.h"

namespace stretto {
namespace {

class CudaSnapshots : public testing::GpuTest, public ::testing::WithParamInterface<bool> {
 protected:
  const Device gpu_ = Device::Cuda(0);
};

TEST_P(CudaSnapshots, PartsOfAnUpdateWaitForTheirOwnCopies) {
  testing::CheckPartsWaitForTheirOwnCopies(gpu_, StreamMode::kDevice, GetParam(), /*wait=*/true);
}

TEST_P(CudaSnapshots, WithoutTheWaitASnapshotIsTorn) {
  testing::CheckPartsWaitForTheirOwnCopies(gpu_, StreamMode::kDevice, GetParam(), /*wait=*/false);
}

TEST_P(CudaSnapshots, GoThereAndBack) {
  testing::CheckThereAndBack(gpu_, StreamMode::kDevice, GetParam());
}

INSTANTIATE_TEST_SUITE_P(DirectOrRing, CudaSnapshots, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Direct" : "Ring"; });

}  // namespace
}  // namespace stretto
