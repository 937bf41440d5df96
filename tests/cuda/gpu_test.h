// Tests that need a GPU.
#ifndef STRETTO_TESTS_CUDA_GPU_TEST_H_
#define STRETTO_TESTS_CUDA_GPU_TEST_H_

#include <gtest/gtest.h>

#include "stretto/core/device.h"

namespace stretto::testing {

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::Status usable = DescribeDevice(Device::Cuda(0)).status();
    if (!usable.ok()) GTEST_SKIP() << usable.message();
  }
};

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_CUDA_GPU_TEST_H_
