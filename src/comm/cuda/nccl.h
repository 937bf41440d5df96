// Collectives between NVIDIA GPUs through NCCL.
#ifndef STRETTO_SRC_COMM_CUDA_NCCL_H_
#define STRETTO_SRC_COMM_CUDA_NCCL_H_

#include <memory>
#include <vector>

#include "src/comm/device_collectives.h"

namespace stretto {

// See ConnectDevices. Refuses two ranks on one GPU.
absl::StatusOr<std::unique_ptr<DeviceCollectives>> ConnectNccl(World& world, Device device);

// See DescribeCollectives.
std::vector<LibraryInfo> DescribeNccl();

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_CUDA_NCCL_H_
