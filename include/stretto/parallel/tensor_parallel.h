// Tensor parallelism with sequence parallelism (Shoeybi et al., "Megatron-LM", arXiv 1909.08053;
// Korthikanti et al., "Reducing activation recomputation in large transformer models", arXiv
// 2205.05198): the ranks of a tensor axis share each layer.
//
// Between a row layer and the next column layer (residuals, norms) each rank has a part of the
// tokens and all features; from a column layer to the next row layer (attention, MLP) all tokens
// and a part of the features. A column layer gathers the tokens, a row layer sums what the ranks
// have computed and leaves each its part. docs/parallelism.md tells it by its order of events.
#ifndef STRETTO_PARALLEL_TENSOR_PARALLEL_H_
#define STRETTO_PARALLEL_TENSOR_PARALLEL_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/phase_timer.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"
#include "stretto/parallel/data_parallel.h"

namespace stretto {

// What the layers of one rank exchange with the other ranks of the axis: a run is given one
// (Run::SetTensorAxis), on as many ranks as the graph was built for. All ranks of the axis run the
// same actions in the same order. Waits only as long as work on the stream depends on the result;
// an error fails the stream.
//
// Tokens travel in pieces (TokenCut), each an operation of its own, which may be under way while
// the stream does something else: who waits for one names the tensor of all tokens that it fills or
// empties. Between start and wait the tensors of an exchange are the axis's.
class TensorAxis {
 public:
  static constexpr int kMostUnderWay = 8;  // exchanges; layers need four

  // `timer` is told of waits for other ranks (StepPhase::kExposedTensor); null: nobody is. All
  // outlive the axis.
  TensorAxis(Communicator& comm, const Group& group, PhaseTimer* timer = nullptr)
      : comm_(comm), group_(group), timer_(timer) {}
  const Group& group() const { return group_; }

  // `whole` receives the parts of all ranks in order; it has size() * part.elements() elements.
  void Gather(Stream& stream, Tensor whole, Tensor part, const std::string& label);
  // Begins to gather piece `i`: rows piece.whole of `whole` from rows piece.part of `part`, both of
  // which have all their rows.
  void StartGather(Stream& stream, const TokenPiece& piece, int i, Tensor whole, Tensor part,
                   const std::string& label);
  // Begins to add up piece `i`: rows piece.part of `part` receive this rank's rows of the sum of
  // all ranks' `whole`; without `part` they stay in their place in `whole`.
  void StartSum(Stream& stream, const TokenPiece& piece, int i, Tensor whole, Tensor part,
                const std::string& label);
  // What is enqueued from now on sees piece `i` of `pieces` of the exchange under way of `whole`.
  // Pieces are waited for in order, each once.
  void Wait(Stream& stream, const Tensor& whole, int i, int pieces);
  // While on, the stream waits for each exchange where it starts: for who measures kernels, which
  // what travels would slow down.
  void WaitAtOnce(bool on) { at_once_ = on; }

 private:
  struct UnderWay {
    const std::byte* whole = nullptr;  // null: none
    std::array<Ticket, TokenCut::kMostPieces> tickets{};
    int started = 0, waited = 0;
  };
  UnderWay* Find(const std::byte* whole);
  void Started(Stream& stream, const Tensor& whole, int i, Ticket ticket);
  void Wait(Stream& stream, Ticket ticket);

  Communicator& comm_;
  Group group_;
  PhaseTimer* timer_;
  bool at_once_ = false;
  std::array<UnderWay, kMostUnderWay> under_way_;
};

// Layers for rank `index` of an axis of `ranks` ranks, whose tokens travel in up to `pieces` pieces
// (TokenCut), with the attention of `within` on each rank's heads; with one rank `within`.
// Features, heads and the vocabulary are cut into parts that may differ by one; ranks may share a
// key head, and a layer that has less of anything else than there are ranks fails its Declare in
// one sentence.
Strategies TensorStrategies(int ranks, int index, int pieces = 1,
                            Strategies within = LocalStrategies());

// Adds up what the ranks of the axis have of the gradients of parameters that several of them have
// (ParameterSpec::partial_gradient): those of norms, of which each rank sees a part of the tokens
// or of the heads, and of key heads that ranks share. Works on the shards that data parallelism has
// left, so that they are summed once.
class PartialGradients {
 public:
  // Reserves its memory from `budget`. `timer` as TensorAxis has it. The objects outlive it.
  static absl::StatusOr<std::unique_ptr<PartialGradients>> Create(
      Communicator& comm, const Group& group, const Graph& graph, const DataParallel& parameters,
      ops::Context ops, Budget& budget, PhaseTimer* timer = nullptr);
  // After DataParallel::FinishGradients, on all ranks of the axis alike. Every rank then has the
  // same bits.
  absl::Status Sum();

  // Of Create, and of what Sum sends from a rank, on rank `index` of `ranks` data-parallel ranks.
  struct Costs {
    int64_t memory = 0, sent = 0;
  };
  static Costs CostsOf(const Graph& graph, int ranks, int index);

 private:
  PartialGradients(Communicator& comm, const Group& group, ops::Context ops, PhaseTimer* timer)
      : comm_(comm), group_(group), ops_(ops), timer_(timer) {}

  Communicator& comm_;
  Group group_;
  ops::Context ops_;
  PhaseTimer* timer_;
  Arena memory_;
  Tensor packed_;  // all of them one behind the other, in equal parts for the ranks
  struct Item {
    Tensor grad;    // where it comes from and returns to, flat
    Tensor packed;  // in `packed_`, of all copies
    Tensor mine;    // in that
  };
  std::vector<Item> items_;
};

}  // namespace stretto

#endif  // STRETTO_PARALLEL_TENSOR_PARALLEL_H_
