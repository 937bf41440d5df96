// What a model is made of once it is declared: slots, parameters and layers as plain data, and the
// list of actions that a micro-batch runs through.
#ifndef STRETTO_MODEL_GRAPH_H_
#define STRETTO_MODEL_GRAPH_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/cut.h"
#include "stretto/core/dtype.h"
#include "stretto/core/memory_plan.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"
#include "stretto/core/tensor.h"

namespace stretto {

class Layer;

// A value of [tokens, width], and, unless declared without, its gradient of the same shape and
// type. The tokens are all of the micro-batch, or this rank's part of them (SlotInfo::shard).
struct SlotId {
  int value = -1;
  bool valid() const { return value >= 0; }
  bool operator==(const SlotId&) const = default;
};
struct ParamId {
  int value = -1;
  bool valid() const { return value >= 0; }
  bool operator==(const ParamId&) const = default;
};
struct ConstantId {
  int value = -1;
  bool valid() const { return value >= 0; }
};
struct Float8OperandId {
  int value = -1;
};
struct Float8WeightId {
  int value = -1;
};

// Which halves of a layer's work touch a slot.
enum Use : unsigned {
  kInForward = 1u,
  kInBackwardInput = 2u,
  kInBackwardWeight = 4u,
  // Scratch of W that a recomputation uses in place of what it has for kInForward, where it gathers
  // for both (ActionList::filled_again).
  kInRecompute = 8u,
};

enum class SlotKind : uint8_t {
  kActivation,  // an output that other layers read; has a gradient
  kSaved,       // written by a layer's forward pass for its own backward pass; no gradient
  kScratch,     // holds nothing between the declared uses
  kInput,       // filled from outside the graph (tests, pipeline boundaries)
};

// The ranks of a tensor axis, which share the tokens of a micro-batch where slots hold a part of
// them only (sequence parallelism), and the place of this one. The tokens are cut into pieces of
// neighbours, and each piece into equal parts for the ranks, so that a piece travels on its own
// while layers work on another one. Parts have equal rows in storage; those behind the last token
// are padding. With one piece a rank's part is that of CutRows.
struct TokenCut {
  static constexpr int kMostPieces = 16;
  int ranks = 1, index = 0;
  int pieces = 1;  // at most; there are no more than a rank has rows
};
// This rank's part of all pieces, one behind the other: rows in storage, and how many of them, all
// in front, are tokens.
struct TokenPart {
  int64_t rows = 0, count = 0;
};
TokenPart PartOf(const TokenCut& cut, int64_t tokens);
// One of the pieces: its rows among a rank's own, and among all tokens.
struct TokenPiece {
  Range part, whole;
  Range mine;       // this rank's rows of `whole`
  int64_t all = 0;  // tokens in `whole`
  int64_t own = 0;  // tokens in `mine`
};
int PiecesOf(const TokenCut& cut, int64_t tokens);
TokenPiece PieceOf(const TokenCut& cut, int64_t tokens, int piece);

struct SlotInfo {
  std::string name;
  SlotKind kind = SlotKind::kActivation;
  int64_t width = 0;   // elements per token
  bool shard = false;  // holds this rank's part of the tokens (Graph::tokens), not all of them;
                       // never with one rank
  int64_t fixed_bytes = 0;  // further bytes that do not depend on the tokens
  DType dtype = DType::kF32;
  int producer = -1;                      // layer; -1 for kInput
  unsigned own_uses = 0;                  // how the producer itself uses the value after writing it
  unsigned grad_uses = 0;                 // how the producer uses the gradient (it is read there)
  bool cheap = false;                     // worth recomputing under Recompute::kNormsAndActivations
  bool boundary = false;                  // kept under Recompute::kBlock
  bool modified_by_reader = false;        // its only reader changes it in place (RoPE on q and k)
  bool recompute_source = false;          // while this is kept its layer recomputes from it alone
  bool recomputed_if_dropped = false;     // otherwise its layer's Recompute leaves it alone
  bool grad_changed_by_producer = false;  // the producer's B adds to the gradient in place
  bool keep_to_end = false;               // readable after the last forward action
  int gelu_of =
      -1;  // the value is gelu of this slot's: who reads both may differentiate through it
  int swiglu_of = -1;  // likewise silu(gate) * up of [gate | up]
  struct Reader {
    int layer;
    unsigned uses;
    bool writes_grad;  // the layer's BackwardInput writes this slot's gradient
  };
  std::vector<Reader> readers;  // ascending layer
  // Gradients that the reader `share_layer` leaves equal to this slot's gradient: see
  // Builder::ShareGradient.
  int share_with = -1;
  int share_layer = -1;
};

enum class Init : uint8_t { kZeros, kOnes, kNormal };

// Which part of a parameter a rank of a tensor axis has.
struct ParameterPart {
  std::vector<int64_t> whole;  // shape of the whole parameter; empty: this one is whole
  std::vector<Range> rows;     // of the whole, whose rows are those of the part, one range behind
                               // the other
  int64_t first_column = 0;    // of the whole
  // Where several ranks have the same part: whether this one counts and saves it.
  bool owned = true;
  // Of partial gradients: the ranks have `copies` different parts of this shape among them, and
  // those that have this one, number `copy`, add up.
  int64_t copy = 0, copies = 1;
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;  // [rows] or [rows, columns] on this rank
  Init init = Init::kNormal;
  double std = 0.02;         // kNormal
  bool weight_decay = true;  // by convention matrices decay, biases and norm weights do not
  ParameterPart part;
  // Each rank of the tensor axis that has the parameter has a part of its gradient, from the tokens
  // or heads that it sees: the parts are added up before the update.
  bool partial_gradient = false;

  const std::vector<int64_t>& whole_shape() const {
    return part.whole.empty() ? shape : part.whole;
  }
};

struct ParameterInfo {
  ParameterSpec spec;
  std::vector<int> layers;  // that use it, ascending
  // Storage of the parameter and of its gradient has at least this many rows on every rank; those
  // behind rows() hold zeros. They exist in storage alone.
  int64_t padded_rows = 0;
  // false: another rank of the tensor axis has the same, and counts and saves it.
  bool owned = true;
  int64_t rows() const { return spec.shape[0]; }
  int64_t columns() const { return spec.shape.size() > 1 ? spec.shape[1] : 1; }
  int64_t elements() const { return rows() * columns(); }
};

// A range of rows of a parameter on this rank, and where it lies in the whole one: columns
// [first_column, first_column + columns()) of rows [whole, whole + rows.count).
struct ParameterBox {
  Range rows;
  int64_t whole = 0;
};
// Rows [first, first + count) of this rank's part as boxes of the whole.
std::vector<ParameterBox> BoxesOf(const ParameterSpec& spec, int64_t first, int64_t count);
// Adds `local`, rows [first_row, first_row + local.rows()) of this rank's part of the parameter or
// of something of its shape, under `prefix` and the parameter's name.
absl::Status RegisterRows(StateRegistry* registry, const std::string& prefix,
                          const ParameterInfo& info, int64_t first_row, const Tensor& local);

// A table that never changes after set-up, e.g. cosines and sines.
struct ConstantInfo {
  std::string name;
  int64_t rows = 0, columns = 0;
  DType dtype = DType::kF32;
  std::function<double(int64_t row, int64_t column)> value;
};

// A tensor that a layer multiplies in FP8, with a scale of its own: see model/float8.h.
struct Float8OperandInfo {
  std::string name;
  DType format = DType::kE4M3;
};
// A matrix of which FP8 copies are kept.
struct Float8WeightInfo {
  ParamId param;
  Float8OperandId operand;
};

enum class ActionKind : uint8_t {
  kForward,         // F
  kRecompute,       // R: forward again, for what backward needs and was dropped
  kBackwardInput,   // B
  kBackwardWeight,  // W
  // What a layer exchanges with other ranks around its halves (Layer::Exchange), for other actions
  // to come in between.
  kStartInput,   // asks for what B needs of other ranks
  kFinishInput,  // waits for what B has sent them to add up
  kStartWeight,  // asks for what W needs of other ranks
};
// "F", "R", "B", "W"; ">B", "B>" and ">W" for what starts and ends their exchanges.
const char* Name(ActionKind kind);
// Whether the action belongs to the weights' half of backward.
inline bool OfWeights(ActionKind kind) {
  return kind == ActionKind::kBackwardWeight || kind == ActionKind::kStartWeight;
}
struct Action {
  ActionKind kind = ActionKind::kForward;
  int layer = 0;
  bool operator==(const Action&) const = default;
};

// What a layer exchanges with the other ranks of the tensor axis in an action: [tokens, width], in
// pieces (TokenCut).
struct ExchangeInfo {
  int layer = 0;
  ActionKind at = ActionKind::kForward;  // where it starts; kForward: in a recomputation, too
  bool sum = false;                      // scattered over the ranks, or a gather of their parts
  int64_t width = 0;
  DType dtype = DType::kF32;
  std::string label;         // of its operations
  bool every_token = false;  // a gather, whole, of what each rank has of all tokens
  int unless_kept = -1;      // a recomputation does without while this slot is kept
  bool for_weight = false;   // what a recomputation gathers serves W, too
};

// What a layer passes around the ranks that share a micro-batch's documents (Builder::Circulates).
struct RingInfo {
  int layer = 0;
  int64_t width = 0;  // elements a token
  DType dtype = DType::kF32;
};

enum class Recompute : uint8_t {
  kNone,                 // everything is kept
  kNormsAndActivations,  // outputs of norms and element-wise activations are dropped
  kBlock,                // everything inside a transformer block is dropped
};
const char* Name(Recompute recompute);

// Where the time of a layer is to be found among times that were measured by name, perhaps in
// another graph of the model, cut otherwise.
struct LayerTiming {
  // It does the work of a layer of this name, too, which other graphs have apart; "": it does not.
  std::string includes;
  // Other graphs have its work in a layer of this name, with whose time it may have been measured.
  std::string included_in;
  // It copies what comes from a neighbouring stage or goes there: part of what it takes to bring
  // it.
  bool between_stages = false;
};

// A declared model. Immutable after Builder::Finish.
struct Graph {
  DType dtype = DType::kF32;
  std::vector<std::unique_ptr<Layer>> layers;  // in forward order
  std::vector<std::string> layer_names;
  std::vector<int> layer_block;  // transformer block of a layer, -1 outside
  std::vector<LayerTiming> layer_timing;
  std::vector<SlotInfo> slots;
  TokenCut tokens;
  std::vector<ExchangeInfo> exchanges;
  std::vector<RingInfo> rings;
  std::vector<ParameterInfo> parameters;
  std::vector<ConstantInfo> constants;
  std::vector<Float8OperandInfo> float8_operands;
  std::vector<Float8WeightInfo> float8_weights;

  Graph();
  ~Graph();
  Graph(Graph&&) noexcept;
  Graph& operator=(Graph&&) noexcept;

  int64_t ParameterElements() const;
  // Readable listing: layers with their slots and parameters.
  std::string Describe() const;
};

// The actions of one micro-batch. Backward starts with the last layer; W follows its B unless
// `defer_weights`, in which case all W come after all B, or `overlap` and there are layers that
// exchange: then W waits for the next exchange of an input's half, which travels while it runs.
// The order among W is always the same.
struct ActionList {
  std::vector<Action> actions;
  std::vector<bool> dropped;  // by slot: the value is dropped after forward and recomputed
  // By layer: its recomputation gathers what its W needs too, which therefore starts no exchange.
  std::vector<bool> filled_again;
  bool training = true;
};
ActionList TrainingActions(const Graph& graph, Recompute recompute, bool defer_weights = false,
                           bool overlap = true);
// Forward only.
ActionList EvaluationActions(const Graph& graph);
std::string Describe(const Graph& graph, const ActionList& list);
// The operations over the tensor axis when the actions run on `tokens` tokens, in their order.
struct PlannedExchange {
  const ExchangeInfo* info = nullptr;
  int64_t rows = 0;   // that this rank sends each other one
  size_t action = 0;  // of the list, that starts it
};
std::vector<PlannedExchange> ExchangesOf(const Graph& graph, const ActionList& list,
                                         int64_t tokens);
// Payload bytes that this rank sends in them.
int64_t ExchangedBytes(const Graph& graph, const ActionList& list, int64_t tokens);

// Rows of storage that a slot has in a frame for `tokens` tokens: with the padding that makes the
// parts of a tensor axis equal.
int64_t StoredRows(const Graph& graph, const SlotInfo& slot, int64_t tokens);

// Where the slots of one frame lie.
struct FrameLayout {
  int64_t token_capacity = 0;
  std::vector<int64_t> forward_offset;   // by slot, for F; -1: not there
  std::vector<int64_t> backward_offset;  // by slot, for R, B and W
  std::vector<int64_t> grad_offset;      // by slot; -1: no gradient
  std::vector<uint8_t> grad_shared;  // by slot: its gradient lies where share_with's gradient lies
  MemoryPlan plan;
  int64_t bytes() const { return plan.arena_bytes; }
};
absl::StatusOr<FrameLayout> PlanFrame(const Graph& graph, const ActionList& actions,
                                      int64_t token_capacity);

}  // namespace stretto

#endif  // STRETTO_MODEL_GRAPH_H_
