// Which rank reads which sample, in which order: a pure function of (seed, step, layout).
#ifndef STRETTO_DATA_LOADER_H_
#define STRETTO_DATA_LOADER_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "stretto/core/rng.h"
#include "stretto/core/status.h"
#include "stretto/data/batch.h"
#include "stretto/data/dataset.h"

namespace stretto {

struct LoaderOptions {
  uint64_t seed = 0;
  bool shuffle = true;       // a keyed permutation an epoch; no index is built
  int64_t global_batch = 1;  // samples of one optimizer step, over all ranks
  int64_t micro_batch = 1;   // samples of one micro-batch, at most
  int rank = 0;              // place and size in the data-parallel group
  int ranks = 1;
  bool prefetch = true;  // read the next step from a background thread
};

// Global sample number g (counted over the whole run, starting at 0) is sample perm(g mod n) of
// epoch g div n. Step s takes the numbers [s * global_batch, (s + 1) * global_batch), cut into
// contiguous ranges for the ranks whose sizes differ by at most one. So a run continues with
// exactly the next sample on any number of ranks, from the step number alone.
class Loader {
 public:
  // `dataset` must outlive the loader.
  static absl::StatusOr<std::unique_ptr<Loader>> Create(const TokenDataset& dataset,
                                                        const LoaderOptions& options);
  ~Loader();

  // This rank's micro-batches of step `step` (0-based); empty when the batch has fewer samples than
  // ranks. Valid until the next call. Any step may follow any other; consecutive ones find their
  // data already read and allocate nothing. A sample that cannot be read fails the step that it is
  // in, and asking again reads again. One caller at a time.
  absl::StatusOr<const std::vector<PackedBatch>*> Step(int64_t step);
  // The sample numbers [first, last) of this rank in step `step`.
  std::pair<int64_t, int64_t> Range(int64_t step) const;
  // Most tokens that a micro-batch can have.
  int64_t micro_batch_capacity() const;

 private:
  Loader();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stretto

#endif  // STRETTO_DATA_LOADER_H_
