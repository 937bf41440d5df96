// What the parts of nccl_ranks do with data on GPUs.
#ifndef STRETTO_TESTS_CUDA_ON_GPU_H_
#define STRETTO_TESTS_CUDA_ON_GPU_H_

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "tests/support/collective_cases.h"

namespace stretto {

// A copy of some data on a GPU.
struct OnGpu {
  Arena arena;
  Tensor tensor;

  static absl::StatusOr<OnGpu> Of(const testing::Data& data, Device device) {
    OnGpu on;
    STRETTO_ASSIGN_OR_RETURN(
        on.arena, Arena::Create(device, "test", static_cast<int64_t>(data.bytes.size()) + 256));
    on.tensor = Tensor::Of(on.arena.data(), data.dtype, {data.elements()}, device);
    STRETTO_RETURN_IF_ERROR(CopyFromHost(on.tensor, data.bytes.data()));
    return on;
  }
  absl::StatusOr<testing::Data> Read() const {
    testing::Data data(tensor.dtype, tensor.elements());
    STRETTO_RETURN_IF_ERROR(CopyToHost(data.bytes.data(), tensor));
    return data;
  }
};

// Who carries all-gathers and reduce-scatters.
enum class Carrier : uint8_t { kNccl, kCopyEngines };

// Before a group's operations. Without copy engines the tests would prove nothing about them.
inline absl::Status Prepare(Communicator& c, const Group& g, Carrier carrier) {
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

}  // namespace stretto

#endif  // STRETTO_TESTS_CUDA_ON_GPU_H_
