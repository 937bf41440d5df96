// A plan of sequences on the virtual clock, with the executor's own program: what comes out is
// simulated.
#ifndef STRETTO_SIM_SEQUENCE_SIMULATION_H_
#define STRETTO_SIM_SEQUENCE_SIMULATION_H_

#include <string>

#include "stretto/core/status.h"
#include "stretto/plan/program.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/sim/timeline.h"

namespace stretto {

struct SequenceSimulation {
  Program program;
  Timeline timeline;

  double makespan() const { return timeline.seconds; }
  // Of what ranks work, without waiting.
  double mean() const;
};

// 1F1B over the plan's levels; every rank of a ring takes its item's time.
absl::StatusOr<SequenceSimulation> SimulateSequences(const SequencePlan& plan);

// One transformer layer of LLaMA-7B with 8 key heads on `tensor` ranks, by the times and messages
// in ByteScale's figures (arXiv 2502.21231). Nobody measured them here:
// - forward takes 0.355 s + 0.00969 s^2 milliseconds for s Ki tokens on 8 tensor ranks (fit of the
//   figure of times by length; that it is for 8 follows from its FLOPs), backward twice that;
// - a step of a ring takes 1.43 ms and 0.0588 ms for each Ki tokens a rank has (1.9 ms on 39 ranks
//   and 1.5 ms on 256 ranks for 312 Ki tokens, on 2 tensor ranks). On one machine it takes 20 us
//   and goes at 150 GB/s (assumed).
SequenceCost ByteScaleCost(int tensor);
// Activations of it for each token: 34 bytes a feature (Korthikanti et al. 2022, arXiv 2205.05198,
// table 2, without attention's matrix), spread over the tensor ranks; a host link of 25 GB/s,
// shared by nobody (assumed).
SequenceMemory ByteScaleMemory(int tensor);

// A picture of who works when: one row for each of at most 64 pipelines, rings in colours by their
// number of ranks, what waits in white. First stages, forward and backward as one.
std::string DrawSequences(const SequenceSimulation& simulation, const std::string& title);

}  // namespace stretto

#endif  // STRETTO_SIM_SEQUENCE_SIMULATION_H_
