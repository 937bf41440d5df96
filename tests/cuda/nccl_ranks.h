// The parts of nccl_ranks. Each ends in an agreement of all ranks.
#ifndef STRETTO_TESTS_CUDA_NCCL_RANKS_H_
#define STRETTO_TESTS_CUDA_NCCL_RANKS_H_

#include "stretto/comm/world.h"
#include "tests/support/training.h"

namespace stretto {

// Collectives and messages on tensors of GPUs, by NCCL's kernels and by copy engines.
absl::Status CheckCollectives(World& world);
// ... submitted ahead of the device, on tensors of operations before them, and between streams.
absl::Status CheckQueues(World& world);
// The trainer against itself on one GPU: samples of one length in every layout, and documents.
absl::Status CheckLayouts(World& world, const testing::ScratchDirectory& scratch);
absl::Status CheckDocuments(World& world, const testing::ScratchDirectory& scratch);

}  // namespace stretto

#endif  // STRETTO_TESTS_CUDA_NCCL_RANKS_H_
