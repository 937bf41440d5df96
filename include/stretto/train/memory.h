// What a run will hold in memory and send over the wire, from its configuration alone: no device,
// no data and no other rank is needed.
#ifndef STRETTO_TRAIN_MEMORY_H_
#define STRETTO_TRAIN_MEMORY_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "stretto/comm/mesh.h"
#include "stretto/core/status.h"
#include "stretto/model/model.h"
#include "stretto/optim/optimizer.h"
#include "stretto/parallel/bucket_plan.h"
#include "stretto/parallel/executor.h"
#include "stretto/parallel/pipeline.h"
#include "stretto/plan/program.h"
#include "stretto/train/config.h"

namespace stretto {

struct NamedBytes {
  std::string name;
  int64_t bytes = 0;
};

// A stage of the model as it lies on a rank; without a pipeline it is the whole model.
struct StagePlan {
  int stage = 0;
  Model model;
  ActionList train_actions, evaluation_actions;
  FrameLayout train_frame, evaluation_frame;
  // Where the step runs weight halves apart, with ZeRO-1: for its micro-batches whose backward it
  // runs as a whole (StageParts::whole).
  struct Whole {
    ActionList actions;
    FrameLayout frame;
  };
  std::optional<Whole> whole;
  BucketPlan buckets;
  int frames = 1;  // micro-batches in flight at most
  int64_t frame_bytes() const {
    const int64_t one = std::max(train_frame.bytes(), evaluation_frame.bytes());
    return whole ? std::max(one, whole->frame.bytes()) : one;
  }
  // The copy of a table that another stage updates (tied embeddings); invalid: there is none.
  ParamId copy;
};

// The ranks of a run as a mesh: "pp" outermost, then "dp", and "tp" innermost, so that the ranks
// that exchange most are neighbours on one machine. `config` must be resolved.
absl::StatusOr<Mesh> MeshOf(const TrainConfig& config, int ranks, int rank);
// FAILED_PRECONDITION when this rank's tensor axis is not on one machine: each of its layers would
// wait for the network several times. `machines`: of each rank.
absl::Status CheckMachines(const Mesh& mesh, const std::vector<int>& machines);

// The plan of one rank. Frames are planned by the same functions that the trainer runs.
struct RunPlan {
  std::vector<StagePlan> stages;  // ascending
  // Of a pipeline whose ranks have the most micro-batches; without a pipeline, of one micro-batch.
  Program step;
  BoundaryBuffers buffers;         // for any step, and for an evaluation
  std::vector<int64_t> blocks;     // transformer blocks of each stage of the model
  int64_t micro_batch_tokens = 0;  // capacity of a frame
  int64_t micro_batches = 1;       // in a step, of the rank that has most
  RingCapacity rings;              // of micro-batches that ranks share
  int64_t boundary_tokens = 0;     // of what travels between stages: of a tensor axis a rank's part
  // On the run's device: parameters, gradients, constants, optimizer state, activations.
  std::vector<NamedBytes> arenas;
  int64_t arena_bytes = 0;  // their sum
  // In page-locked host memory beside a GPU: what was offloaded. Empty on the CPU.
  std::vector<NamedBytes> host_arenas;
  int64_t host_arena_bytes = 0;  // their sum
  // What the process needs besides: constants measured as at-most values, not planned.
  std::vector<NamedBytes> overheads;
  int64_t overhead_bytes = 0;  // their sum

  bool on_gpu = false;
  // Of a snapshot: what this rank owns, with its table of contents, about.
  int64_t snapshot_bytes = 0;

  // Payload bytes that this rank sends in one step, by purpose.
  int64_t gradient_bytes_sent = 0;
  int64_t parameter_bytes_sent = 0;
  int64_t scalar_bytes_sent = 0;
  int64_t boundary_bytes_sent = 0;  // activations and their gradients between stages, when all
                                    // samples are full; of the rank with the most samples
  int64_t tied_bytes_sent = 0;      // of a table that two stages share
  int64_t tensor_bytes_sent = 0;    // over the tensor axis, when all samples are full; of the rank
                                    // with the most samples

  // Arenas and overheads as a table.
  std::string MemoryTable() const;
};

// Host memory of a machine for snapshots, its keeper being one of `keepers` that keep `parity`
// blocks of parity for each keepers - parity (docs/snapshots.md), and the same number of ranks with
// each; -1: the keeper's default. By purpose: the keeper's slots and parity, and the ranks'
// page-locked rings. INVALID_ARGUMENT for a code that is none.
absl::StatusOr<std::vector<NamedBytes>> SnapshotMemory(const RunPlan& plan, int ranks, int keepers,
                                                       int parity = -1);

// `config` must be resolved for `ranks` ranks; runtime.device says for which kind of device, "auto"
// counting as the CPU.
absl::StatusOr<RunPlan> PlanRun(const TrainConfig& config, int ranks, int rank);

// The numbers of micro-batches for which a rank may need a program: with a pipeline those of its
// steps (data-parallel ranks differ by one sample), the most first; without, micro-batches run one
// after the other.
std::vector<int> StepCounts(const TrainConfig& config);

// One step of a pipeline with `micro_batches` micro-batches, and forward alone of one of them.
absl::StatusOr<Program> StepProgram(const TrainConfig& config, int micro_batches);
absl::StatusOr<Program> EvaluationProgram(const TrainConfig& config);

// The optimizer that a configuration asks for.
AdamWOptions OptimizerOptions(const TrainConfig& config);

// Scratch memory that a stream of the trainer has for kernels and libraries; 0 on the CPU.
int64_t DeviceWorkspaceBytes(DeviceKind device);

absl::StatusOr<Recompute> ParseRecompute(const std::string& name);

// "1.25 GiB", "640 KiB".
std::string HumanBytes(int64_t bytes);

}  // namespace stretto

#endif  // STRETTO_TRAIN_MEMORY_H_
