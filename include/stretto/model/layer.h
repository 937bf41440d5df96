// Layers with explicit backward in two halves, and what they are given to work with.
#ifndef STRETTO_MODEL_LAYER_H_
#define STRETTO_MODEL_LAYER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/status.h"
#include "stretto/core/tensor.h"
#include "stretto/model/graph.h"
#include "stretto/ops/ops.h"

namespace stretto {

class Builder;
class ContextAxis;  // parallel/context.h
class Float8State;  // model/float8.h
class Frame;
class Run;
class TensorAxis;  // parallel/tensor_parallel.h

// One differentiable piece of a model. Inputs and outputs are slots; the constructor receives the
// input slots, Declare declares everything else. Forward and the two backward halves only enqueue
// work on run.ops().stream and keep no state of their own: everything lives in the frame.
//
// BackwardInput writes the gradients of all input slots that have one (frame.Grad(x).present()),
// adding when frame.AccumulateGrad(x). BackwardWeight writes the gradients of the parameters
// through run.Gradient(p) and may run much later, in any order with other layers' BackwardWeight.
class Layer {
 public:
  virtual ~Layer() = default;
  virtual const char* kind() const = 0;  // "linear", "norm", ...
  virtual absl::Status Declare(Builder& b) = 0;
  virtual void Forward(Run& run, Frame& frame) const = 0;
  // Forward again for the slots that were dropped. frame.Dropped(slot) says which.
  virtual void Recompute(Run& run, Frame& frame) const { Forward(run, frame); }
  virtual void BackwardInput(Run& run, Frame& frame) const = 0;
  virtual void BackwardWeight(Run& run, Frame& frame) const = 0;
  // In which halves (Use) the layer reads its parameters, recomputation being part of forward, and
  // in which it writes their gradients. In others they need not be there.
  virtual unsigned ReadsParameters() const { return kInForward | kInBackwardInput; }
  virtual unsigned WritesGradients() const { return kInBackwardWeight; }
  // kStartInput, kFinishInput or kStartWeight, where the layer has declared that it exchanges there
  // (Builder::Exchanges).
  virtual void Exchange(ActionKind /*kind*/, Run& /*run*/, Frame& /*frame*/) const {}
  // Whether, for this micro-batch, the action exchanges something with ranks that are not the same
  // for every micro-batch: it is then enqueued anew each time, and never replayed.
  virtual bool Communicates(ActionKind /*kind*/, const Frame& /*frame*/) const { return false; }
};

// How a linear layer's weight is meant to be cut when a tensor axis exists.
enum class Role : uint8_t {
  kColumn,  // output features are cut
  kRow,     // input features are cut; outputs are summed
  kReplicated,
};

// What a cut of a linear layer's features has to respect: they are `parts` side by side, such as
// [q | k | v] or [gate | up], each of `groups` equal groups that stay whole, such as the heads that
// share a key head. Each rank has the same groups of every part.
//
// Where there are fewer groups than ranks, each rank has one, and several ranks the same: those
// deal out the `members` of a group of the first part (query heads) among them, and each has the
// other parts (the key head) as a copy.
struct Features {
  std::vector<int64_t> parts;  // features of each; empty: all are one part
  int64_t groups = 0;          // 0: each feature is one
  int64_t members = 1;         // equal ones of a group of the first part
};

struct LinearOptions {
  bool bias = false;
  double init_std = 0.02;
  // The layer has two outputs, y and gelu(y), computed as one operation. Its reader takes gelu(y)
  // as `x` and says so in gelu_input: it then sends the gradient straight to y.
  SlotId* gelu_output = nullptr;
  // `x` is gelu of this slot.
  SlotId gelu_input;
  // `x` is silu(gate) * up of this slot, [gate | up] (Builder::GatedLinear). The layer then sends
  // the gradient straight there.
  SlotId swiglu_input;
  // Of the features that the layer's role cuts: outputs of a column layer, inputs of a row layer.
  Features features;
};
struct NormOptions {
  bool rms = true;
  double eps = 1e-5;
};
struct AttentionOptions {
  int64_t heads = 1, kv_heads = 1, head_dim = 1;
  bool qk_norm = false;
  double norm_eps = 1e-6;
  bool rotary = false;
  int64_t max_positions = 0;
  std::function<double(int64_t i)> inverse_frequency;  // of rotary pair i in [0, head_dim / 2)
};

// One strategy for each role; an axis of size 1 gets the local one (design: parallelism never
// touches model code). Replace a member to inject another. What follows a layer takes its input as
// it comes: norms and element-wise layers work on all tokens or on a part of them, and on all
// features or a part.
struct Strategies {
  TokenCut tokens;  // of the graph
  std::function<std::unique_ptr<Layer>(SlotId x, Role role, int64_t in, int64_t out,
                                       const LinearOptions& options, SlotId* y)>
      linear;
  // As Builder::GatedLinear; empty: a column layer of `linear` and a layer for the activation.
  // Where it is there, `linear` makes layers that know LinearOptions::swiglu_input.
  std::function<std::unique_ptr<Layer>(SlotId x, int64_t in, int64_t features,
                                       const LinearOptions& options, SlotId* act, SlotId* gate_up)>
      gated_linear;
  std::function<std::unique_ptr<Layer>(SlotId qkv, const AttentionOptions& options, SlotId* o)>
      attention;
  std::function<std::unique_ptr<Layer>(int64_t vocabulary, int64_t width, int64_t positions,
                                       double init_std, SlotId* y, ParamId* table)>
      embedding;
  // As Builder::LossHead.
  std::function<std::unique_ptr<Layer>(SlotId x, int64_t vocabulary, int64_t chunk, ParamId tied,
                                       double init_std, const std::string& tied_to,
                                       ParamId* weight)>
      loss_head;
};
Strategies LocalStrategies();

// Collects the declaration of a model. The convenience calls at the top add a standard layer and
// return its output slot.
class Builder {
 public:
  // `kernels`: of the backend that the graph is meant for, which layers may ask what it wants to be
  // kept for it. The graph runs on every backend all the same.
  explicit Builder(DType dtype, Strategies strategies = LocalStrategies(),
                   const KernelTable* kernels = nullptr);
  ~Builder();

  // Adds a layer under `name` (prefixes its parameters and slots) and calls its Declare.
  absl::Status Add(const std::string& name, std::unique_ptr<Layer> layer);

  // Each returns an invalid slot after an error, which Finish reports; so model code needs no
  // checks.
  SlotId Input(const std::string& name, int64_t width, bool shard = false);  // filled from outside
  SlotId Embedding(const std::string& name, int64_t vocabulary, int64_t width, int64_t positions,
                   double init_std, ParamId* table = nullptr);  // positions 0: none learned
  SlotId Linear(const std::string& name, Role role, SlotId x, int64_t in, int64_t out,
                const LinearOptions& options = {});
  // silu(gate) * up, where [gate | up], of `features` each, is a column layer without a bias of x;
  // `act`: the name of the activation's layer where it is one of its own. Returns the product and
  // what its one reader, a linear layer, is to name in swiglu_input: [gate | up], or nothing where
  // the activation's layer sends the gradient there.
  std::pair<SlotId, SlotId> GatedLinear(const std::string& name, const std::string& act, SlotId x,
                                        int64_t in, int64_t features, double init_std = 0.02);
  SlotId Norm(const std::string& name, SlotId x, const NormOptions& options = {});
  // sum = x + branch and norm(sum), as one layer. Returns {sum, norm}.
  std::pair<SlotId, SlotId> AddNorm(const std::string& name, SlotId x, SlotId branch,
                                    const NormOptions& options = {});
  SlotId Gelu(const std::string& name, SlotId x);
  SlotId Swiglu(const std::string& name, SlotId gate_up);
  SlotId Attention(const std::string& name, SlotId qkv, const AttentionOptions& options);
  // Head and loss over `vocabulary` entries in chunks of at most `chunk` (0: one chunk). `tied` is
  // the embedding's table, or invalid for weights of its own. Returns the head's weight.
  // `tied_to`: the layer that has the table, when it is in another part of the model.
  ParamId LossHead(const std::string& name, SlotId x, int64_t vocabulary, int64_t chunk,
                   ParamId tied, double init_std, const std::string& tied_to = "");
  // Where a model is cut into parts that run on different ranks: the part begins with what the part
  // before it ended with, [tokens, width]; of a tensor axis each rank hands on its part of them.
  SlotId StageInput(const std::string& name, int64_t width);
  // x + branch leaves for the next part.
  void StageOutput(const std::string& name, SlotId x, SlotId branch);
  // Layers added between BeginBlock and EndBlock belong to one transformer block (recompute unit).
  // Blocks do not nest.
  void BeginBlock();
  void EndBlock();
  // True while no layer has been added to the open block.
  bool AtBlockStart() const { return block_ >= 0 && block_layers_ == 0; }

  absl::StatusOr<Graph> Finish();

  // --- For Declare ---
  const std::string& layer_name() const { return prefix_; }
  DType dtype() const { return graph_.dtype; }
  DType accumulate_type() const;
  const KernelTable* kernels() const { return kernels_; }  // null: not known
  int64_t Width(SlotId slot) const;
  bool IsShard(SlotId slot) const;  // see SlotInfo
  const TokenCut& tokens() const { return graph_.tokens; }
  bool IsGeluOf(SlotId slot, SlotId pre) const;
  bool IsSwigluOf(SlotId slot, SlotId gate_up) const;
  // Whether the layer that writes `slot` reads it again in backward, so that it is there anyway.
  bool KeptByProducer(SlotId slot) const;
  bool IsCheap(SlotId slot) const;  // see SlotInfo
  // The layer reads `slot` in the given halves and, unless told otherwise, writes its gradient.
  void Reads(SlotId slot, unsigned uses, bool writes_grad = true);
  struct OutputOptions {
    unsigned value_uses = 0;  // halves in which this layer itself reads its output again
    unsigned grad_uses = kInBackwardInput | kInBackwardWeight;  // ... reads the output's gradient
    bool cheap = false;                                         // see SlotInfo
    bool boundary = false;
    bool recompute_source = false;
    bool recomputed_if_dropped = false;
    bool grad_changed_by_producer = false;
    SlotId gelu_of;      // see SlotInfo
    SlotId swiglu_of;    // see SlotInfo
    bool shard = false;  // see SlotInfo
  };
  SlotId Output(const std::string& name, int64_t width, const OutputOptions& options);
  // Written in forward, read in `uses`; no gradient.
  struct SavedOptions {
    int64_t fixed_bytes = 0;  // on top of the tokens', behind them (Frame::Fixed)
    bool cheap = false;       // see SlotInfo, as the next
    bool recomputed_if_dropped = false;
    bool recompute_source = false;
    bool shard = false;  // see SlotInfo
  };
  SlotId Saved(const std::string& name, int64_t width, DType dtype, unsigned uses) {
    return Saved(name, width, dtype, uses, SavedOptions());
  }
  SlotId Saved(const std::string& name, int64_t width, DType dtype, unsigned uses,
               const SavedOptions& options);
  // Undefined content at the first of `uses`, kept from there to the last. `fixed_bytes` come on
  // top of the tokens' (Frame::Fixed); with them `width` may be 0.
  SlotId Scratch(const std::string& name, int64_t width, DType dtype, unsigned uses,
                 int64_t fixed_bytes = 0);
  // The running layer exchanges [tokens, width] with the other ranks of the tensor axis in this
  // action, those of an action in the order of these calls. What a plan of the traffic counts, and
  // what puts kStartInput, kFinishInput (behind an exchange in kBackwardInput) and kStartWeight
  // into the lists of actions: slots that a half uses are there from the start of its exchange to
  // its end.
  struct ExchangeOptions {
    bool sum = false;          // see ExchangeInfo
    bool every_token = false;  // see ExchangeInfo
    SlotId unless_kept;        // see ExchangeInfo
    bool for_weight = false;   // see ExchangeInfo
  };
  void Exchanges(ActionKind at, int64_t width, DType dtype, const std::string& label) {
    Exchanges(at, width, dtype, label, ExchangeOptions());
  }
  void Exchanges(ActionKind at, int64_t width, DType dtype, const std::string& label,
                 const ExchangeOptions& options);
  // The running layer passes [tokens, width] around the ranks that share a micro-batch's documents,
  // in forward and again in the input's half of backward, where the same in the accumulate type
  // comes behind. What a plan of the traffic counts.
  void Circulates(int64_t width, DType dtype);
  // The layer changes `slot` in place in Forward; it must be the slot's only reader.
  void ModifiesInPlace(SlotId slot);
  // After this layer's BackwardInput grad(input) equals grad(output): the planner may give both the
  // same memory when their lifetimes allow it. The layer copies unless
  // frame.Grad(input).data == frame.Grad(output).data.
  void ShareGradient(SlotId input, SlotId output);
  ParamId Parameter(ParameterSpec spec);
  // A parameter that bears the name of layer `owner`, which is in another part of the model: a copy
  // of that layer's own (tied weights, cut apart).
  ParamId CopyOfParameter(const std::string& owner, ParameterSpec spec);
  // Uses a parameter that another layer declared (tied weights).
  void UsesParameter(ParamId param);
  // Asks for storage of `rows` rows at least (ParameterInfo::padded_rows), where a kernel runs
  // better on more rows than there are: see PaddedRows.
  void PadRows(ParamId param, int64_t rows);
  ConstantId Constant(ConstantInfo info);  // the same name returns the same constant
  // A tensor that the running layer's products take in FP8 (E4M3 or E5M2), and FP8 copies of a
  // matrix among them.
  Float8OperandId Float8Operand(const std::string& name, DType format);
  Float8WeightId Float8Weight(ParamId param, Float8OperandId operand);
  // Keeps a slot readable after forward (the final hidden state, for sampling).
  void KeepToEnd(SlotId slot);
  // Records an error; the first one is returned by Finish.
  void Fail(absl::Status error);

 private:
  absl::Status CheckGraph() const;
  bool InDeclare(const std::string& what);  // fails by name when no layer is being declared
  std::string AfterLastLayer() const;       // for messages

  Graph graph_;
  Strategies strategies_;
  const KernelTable* kernels_;
  absl::Status status_;
  std::unordered_set<std::string> parameter_names_;
  std::string prefix_;
  int current_ = -1;
  int block_ = -1;
  int blocks_ = 0;
  int block_layers_ = 0;
};

// How the documents of a micro-batch lie on the ranks that share them (PackedBatch::Ring), for
// attention. Each place in the ring has of every document, one behind the other, its tokens in
// front and in the back; all places know where those of all others lie.
struct RingViews {
  struct Place {
    int rank = 0;        // along the data axis
    int64_t tokens = 0;  // of all documents
    int64_t longest = 0, longest_front = 0;
    Tensor cu;     // i32 [documents + 1]: where documents begin
    Tensor front;  // i32 [documents]: how many of a document's tokens lie in front
  };
  int index = 0;              // this rank's place
  std::vector<Place> places;  // in ring order
  // Of this rank: where the back of each document begins, and how long it is.
  Tensor back_cu;       // i32 [documents + 1]
  Tensor back_lengths;  // i32 [documents]
  int64_t longest_back = 0;

  int size() const { return static_cast<int>(places.size()); }
  // The place that is `steps` places before this rank's.
  int Before(int steps) const { return (index - steps % size() + size()) % size(); }
};

// The tokens of a micro-batch on the device, and their document boundaries.
struct TokenViews {
  int64_t tokens = 0;
  Tensor ids, targets;  // i32 [tokens]
  Tensor positions;     // i32 [tokens], restarting at each document
  Tensor weights;       // f32 [tokens]
  Tensor cu_seqlens;    // i32 [documents + 1]
  int64_t max_length = 0;
  int64_t uniform = 0;  // > 0: every document has exactly this many tokens
  // Ranks that share the documents, of which these tokens are a part; then positions do not restart
  // at 0, and `ring` says who has the others. It lives as long as the other views.
  int ring_size = 1;
  const RingViews* ring = nullptr;
};

// The planned activation memory of one micro-batch in flight, with that micro-batch's tokens.
class Frame {
 public:
  // `memory` has layout->bytes() bytes on `device`.
  Frame(const Graph* graph, const ActionList* actions, const FrameLayout* layout, std::byte* memory,
        Device device = Device::Cpu())
      : graph_(graph), actions_(actions), layout_(layout), memory_(memory), device_(device) {}

  TokenViews tokens;
  // What enters and leaves this part of the model, [tokens, width]: activations in forward,
  // gradients in backward. Absent at the model's own ends. With a tensor axis of this rank's part
  // of the tokens.
  struct Boundary {
    Tensor in, out;
  } boundary;

  Tensor Value(SlotId slot) const;  // [tokens, width], of all tokens or of this rank's part
  // The same and its gradient with the rows that make the parts of all ranks equal: what
  // collectives take. The rows behind the tokens hold anything.
  Tensor Padded(SlotId slot) const;
  Tensor PaddedGrad(SlotId slot) const;
  const TokenCut& cut() const { return graph_->tokens; }
  // The slot's fixed bytes as elements of its type; absent for slots without.
  Tensor Fixed(SlotId slot) const;
  // [tokens, width], or absent for slots without a gradient.
  Tensor Grad(SlotId slot) const;
  // True when grad(slot) already holds another reader's contribution, for the running layer.
  bool AccumulateGrad(SlotId slot) const;
  bool Dropped(SlotId slot) const { return actions_->dropped[slot.value]; }
  // Whether the running layer's recomputation gathers for its W, too.
  bool FilledAgain() const { return actions_->filled_again[static_cast<size_t>(action_.layer)]; }
  bool training() const { return actions_->training; }
  const std::byte* memory() const { return memory_; }

  void Begin(const Action& action) { action_ = action; }  // executor only

 private:
  int64_t ValueOffset(SlotId slot) const;
  Tensor View(const SlotInfo& slot, int64_t offset, int64_t rows) const;
  int64_t Rows(const SlotInfo& slot) const {
    return slot.shard ? PartOf(graph_->tokens, tokens.tokens).count : tokens.tokens;
  }

  const Graph* graph_;
  const ActionList* actions_;
  const FrameLayout* layout_;
  std::byte* memory_;
  Device device_;
  Action action_;
};

// A parameter or a gradient with the rows that Builder::PadRows asked for.
inline Tensor PaddedRows(Tensor t, int64_t rows) {
  t.dims[0] = rows;
  return t;
}

// What a running layer works with besides its frame. Neither knows a model.
class Run {
 public:
  explicit Run(ops::Context ops) : ops_(ops) {}

  ops::Context ops() const { return ops_; }
  Tensor Parameter(ParamId id) const { return parameters_[id.value]; }
  Tensor Constant(ConstantId id) const { return constants_[id.value]; }
  // Where a parameter's gradient goes, and whether something is there already in this step.
  struct Target {
    Tensor tensor;
    bool accumulate = false;
  };
  Target Gradient(ParamId id) {
    uint8_t& touched = touched_.gradients[static_cast<size_t>(id.value)];
    const Target t{gradients_[id.value], touched != 0};
    touched = 1;
    return t;
  }
  // f64 [2]: sum of token losses and of token weights of this step so far.
  Target LossTotal() {
    const Target t{loss_total_, touched_.loss};
    touched_.loss = true;
    return t;
  }

  // The ranks that share the layers; null where the driver has none.
  TensorAxis* tensor_axis() const { return tensor_axis_; }
  // The ranks among which those are that share documents; null where the driver has none.
  ContextAxis* context_axis() const { return context_axis_; }
  // Scales and FP8 weights; null where the driver has none.
  Float8State* float8() const { return float8_; }
  // True for the first to ask since BeginStep, who then makes the weight's FP8 codes.
  bool TakeStaleCodes(Float8WeightId id) {
    uint8_t& made = touched_.codes[static_cast<size_t>(id.value)];
    return std::exchange(made, uint8_t{1}) == 0;
  }

  // --- For whoever drives the step ---
  void SetFloat8(Float8State* state);
  void SetTensorAxis(TensorAxis* axis) { tensor_axis_ = axis; }
  void SetContextAxis(ContextAxis* axis) { context_axis_ = axis; }
  void SetStorage(std::vector<Tensor> parameters, std::vector<Tensor> gradients,
                  std::vector<Tensor> constants, Tensor loss_total);
  // A parameter, or where its gradient goes from now on, with nothing accumulated there yet. Absent
  // while it is nowhere in full.
  void SetParameter(ParamId id, const Tensor& value) {
    parameters_[static_cast<size_t>(id.value)] = value;
  }
  void SetGradient(ParamId id, const Tensor& gradient) {
    gradients_[static_cast<size_t>(id.value)] = gradient;
    touched_.gradients[static_cast<size_t>(id.value)] = 0;
  }
  // Nothing has been accumulated yet, and parameters may have changed.
  void BeginStep();
  // What has been written since BeginStep and is added to, or used, from now on.
  struct Touched {
    std::vector<uint8_t> gradients;  // by parameter
    bool loss = false;
    std::vector<uint8_t> codes;  // by FP8 weight
    bool just_in_time = false;   // FP8 scales (Float8State)
    bool operator==(const Touched&) const = default;
  };
  const Touched& touched() const { return touched_; }
  // For work that is enqueued without asking for its targets again.
  void SetTouched(const Touched& touched) { touched_ = touched; }

 private:
  ops::Context ops_;
  std::vector<Tensor> parameters_, gradients_, constants_;
  Touched touched_;
  Tensor loss_total_;
  Float8State* float8_ = nullptr;
  TensorAxis* tensor_axis_ = nullptr;
  ContextAxis* context_axis_ = nullptr;
};

}  // namespace stretto

#endif  // STRETTO_MODEL_LAYER_H_
