#include "stretto/model/layer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "stretto/model/float8.h"

namespace stretto {

Builder::Builder(DType dtype, Strategies strategies, const KernelTable* kernels)
    : strategies_(std::move(strategies)), kernels_(kernels) {
  graph_.dtype = dtype;
  graph_.tokens = strategies_.tokens;
}
Builder::~Builder() = default;

absl::Status Builder::Add(const std::string& name, std::unique_ptr<Layer> layer) {
  if (!status_.ok()) return status_;
  current_ = static_cast<int>(graph_.layers.size());
  prefix_ = name;
  Layer* raw = layer.get();
  graph_.layers.push_back(std::move(layer));
  graph_.layer_names.push_back(name);
  graph_.layer_block.push_back(block_);
  graph_.layer_timing.emplace_back();
  absl::Status declared = raw->Declare(*this);
  if (!declared.ok()) {
    Fail(absl::Status(declared.code(),
                      absl::StrCat("layer ", name, ": ", std::string(declared.message()))));
  }
  ++block_layers_;
  current_ = -1;
  return status_;
}

void Builder::BeginBlock() {
  if (block_ >= 0) {
    Fail(absl::InvalidArgumentError(
        absl::StrCat("a block begins inside another one", AfterLastLayer(),
                     "; the layers of a block follow each other, so end the other one first")));
  }
  block_ = blocks_++;
  block_layers_ = 0;
}

void Builder::EndBlock() {
  if (block_ < 0) {
    Fail(absl::InvalidArgumentError(
        absl::StrCat("a block ends that has not begun", AfterLastLayer(), "; call BeginBlock")));
  }
  block_ = -1;
}

std::string Builder::AfterLastLayer() const {
  return graph_.layer_names.empty() ? "" : absl::StrCat(" after layer ", graph_.layer_names.back());
}

void Builder::Fail(absl::Status error) {
  if (status_.ok()) status_ = std::move(error);
}

// What the action lists and the frame planner rely on (graph.cc).
absl::Status Builder::CheckGraph() const {
  // Layers that change in place what their own block does not write again cannot run again.
  std::vector<bool> once(graph_.layers.size(), false);
  for (const SlotInfo& s : graph_.slots) {
    if (!s.modified_by_reader) continue;
    if (s.readers.size() != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("slot ", s.name, " is changed in place by one of its ", s.readers.size(),
                       " readers; give the others a copy"));
    }
    const int reader = s.readers[0].layer;
    if (s.producer < 0 || graph_.layer_block[s.producer] < 0 ||
        graph_.layer_block[s.producer] != graph_.layer_block[reader]) {
      once[reader] = true;
    }
    if (s.own_uses & (kInBackwardInput | kInBackwardWeight)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "slot ", s.name, " is changed in place by layer ", graph_.layer_names[reader],
          ", but the layer that writes it reads it in backward; give the reader a copy"));
    }
  }
  for (const SlotInfo& s : graph_.slots) {
    if (s.modified_by_reader && s.producer >= 0 && once[s.producer] &&
        graph_.layer_block[s.producer] >= 0 &&
        graph_.layer_block[s.producer] == graph_.layer_block[s.readers[0].layer]) {
      return absl::InvalidArgumentError(absl::StrCat(
          "slot ", s.name, " is changed in place in the block of layer ",
          graph_.layer_names[s.producer],
          ", which writes it and itself changes a slot from outside of that block, so that neither "
          "can be computed again; put a copy between them"));
    }
    if (s.gelu_of >= 0 || s.swiglu_of >= 0) {
      for (const SlotInfo::Reader& r : s.readers) {
        if (!r.writes_grad) continue;
        return absl::InvalidArgumentError(absl::StrCat(
            "layer ", graph_.layer_names[r.layer], " sends a gradient to slot ", s.name,
            ", which is an activation that its reader differentiates through; name what it was "
            "made from in gelu_input or swiglu_input"));
      }
      // Who differentiates through an activation writes that gradient and does not add to it.
      const SlotInfo& source = graph_.slots[std::max(s.gelu_of, s.swiglu_of)];
      const auto writers = std::count_if(source.readers.begin(), source.readers.end(),
                                         [](const SlotInfo::Reader& r) { return r.writes_grad; });
      if (writers > 1) {
        return absl::InvalidArgumentError(
            absl::StrCat(writers, " layers send a gradient to slot ", source.name, ", which slot ",
                         s.name, " is an activation of; one layer may, give the others a copy"));
      }
    }
    if (s.share_with < 0) continue;
    const SlotInfo& output = graph_.slots[s.share_with];
    if (output.producer != s.share_layer || output.width != s.width || output.dtype != s.dtype ||
        output.shard != s.shard) {
      return absl::InvalidArgumentError(absl::StrCat(
          "layer ", graph_.layer_names[s.share_layer], " shares the gradient of slot ", s.name,
          " with slot ", output.name, "; that must be an output of it of the same shape and type"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Graph> Builder::Finish() {
  if (block_ >= 0) {
    Fail(absl::InvalidArgumentError(
        absl::StrCat("a block has not ended", AfterLastLayer(), "; call EndBlock")));
  }
  STRETTO_RETURN_IF_ERROR(status_);
  STRETTO_RETURN_IF_ERROR(CheckGraph());
  return std::move(graph_);
}

bool Builder::InDeclare(const std::string& what) {
  if (current_ >= 0) return true;
  Fail(absl::InvalidArgumentError(
      absl::StrCat(what, " belongs to no layer; call this from a layer's Declare")));
  return false;
}

DType Builder::accumulate_type() const { return AccumulateType(graph_.dtype); }
int64_t Builder::Width(SlotId slot) const {
  return slot.valid() ? graph_.slots[slot.value].width : 0;
}

bool Builder::IsShard(SlotId slot) const { return slot.valid() && graph_.slots[slot.value].shard; }

bool Builder::IsGeluOf(SlotId slot, SlotId pre) const {
  return slot.valid() && pre.valid() && graph_.slots[slot.value].gelu_of == pre.value;
}

bool Builder::IsSwigluOf(SlotId slot, SlotId gate_up) const {
  return slot.valid() && gate_up.valid() && graph_.slots[slot.value].swiglu_of == gate_up.value;
}

bool Builder::KeptByProducer(SlotId slot) const {
  return slot.valid() &&
         (graph_.slots[slot.value].own_uses & (kInBackwardInput | kInBackwardWeight)) != 0;
}
bool Builder::IsCheap(SlotId slot) const { return slot.valid() && graph_.slots[slot.value].cheap; }

void Builder::Reads(SlotId slot, unsigned uses, bool writes_grad) {
  if (!InDeclare("the reader of a slot")) return;
  if (!slot.valid()) {
    Fail(absl::InvalidArgumentError(absl::StrCat(prefix_, " reads a slot that does not exist")));
    return;
  }
  SlotInfo& info = graph_.slots[slot.value];
  for (const SlotInfo::Reader& r : info.readers) {
    if (r.layer == current_) {
      Fail(absl::InvalidArgumentError(
          absl::StrCat(prefix_, " reads slot ", info.name, " twice; declare it once")));
      return;
    }
  }
  info.readers.push_back({current_, uses, writes_grad});
}

SlotId Builder::Input(const std::string& name, int64_t width, bool shard) {
  SlotInfo s;
  s.name = name;
  s.kind = SlotKind::kInput;
  s.width = width;
  s.shard = shard && graph_.tokens.ranks > 1;
  s.dtype = graph_.dtype;
  graph_.slots.push_back(std::move(s));
  return {static_cast<int>(graph_.slots.size()) - 1};
}

SlotId Builder::Output(const std::string& name, int64_t width, const OutputOptions& options) {
  if (!InDeclare("slot " + name)) return {};
  SlotInfo s;
  s.name = prefix_ + "." + name;
  s.kind = SlotKind::kActivation;
  s.width = width;
  s.dtype = graph_.dtype;
  s.producer = current_;
  s.own_uses = options.value_uses;
  s.grad_uses = options.grad_uses;
  s.cheap = options.cheap;
  s.boundary = options.boundary;
  s.recompute_source = options.recompute_source;
  s.recomputed_if_dropped = options.recomputed_if_dropped;
  s.gelu_of = options.gelu_of.value;
  s.swiglu_of = options.swiglu_of.value;
  s.grad_changed_by_producer = options.grad_changed_by_producer;
  s.shard = options.shard && graph_.tokens.ranks > 1;
  graph_.slots.push_back(std::move(s));
  return {static_cast<int>(graph_.slots.size()) - 1};
}

SlotId Builder::Saved(const std::string& name, int64_t width, DType dtype, unsigned uses,
                      const SavedOptions& options) {
  if (!InDeclare("slot " + name)) return {};
  SlotInfo s;
  s.name = prefix_ + "." + name;
  s.kind = SlotKind::kSaved;
  s.width = width;
  s.dtype = dtype;
  s.producer = current_;
  s.own_uses = uses;
  s.fixed_bytes = options.fixed_bytes;
  s.cheap = options.cheap;
  s.recomputed_if_dropped = options.recomputed_if_dropped;
  s.recompute_source = options.recompute_source;
  s.shard = options.shard && graph_.tokens.ranks > 1;
  graph_.slots.push_back(std::move(s));
  return {static_cast<int>(graph_.slots.size()) - 1};
}

SlotId Builder::Scratch(const std::string& name, int64_t width, DType dtype, unsigned uses,
                        int64_t fixed_bytes) {
  const SlotId id = Saved(name, width, dtype, uses, {.fixed_bytes = fixed_bytes});
  if (id.valid()) graph_.slots[id.value].kind = SlotKind::kScratch;
  return id;
}

void Builder::Circulates(int64_t width, DType dtype) {
  if (InDeclare("rings")) graph_.rings.push_back({current_, width, dtype});
}

void Builder::Exchanges(ActionKind at, int64_t width, DType dtype, const std::string& label,
                        const ExchangeOptions& options) {
  if (!InDeclare("an exchange")) return;
  graph_.exchanges.push_back({.layer = current_,
                              .at = at,
                              .sum = options.sum,
                              .width = width,
                              .dtype = dtype,
                              .label = label,
                              .every_token = options.every_token,
                              .unless_kept = options.unless_kept.value,
                              .for_weight = options.for_weight});
}

void Builder::ModifiesInPlace(SlotId slot) {
  if (slot.valid()) graph_.slots[slot.value].modified_by_reader = true;
}

void Builder::ShareGradient(SlotId input, SlotId output) {
  if (!input.valid() || !output.valid()) return;
  SlotInfo& info = graph_.slots[input.value];
  if (info.share_with >= 0) return;  // one partner is enough
  info.share_with = output.value;
  info.share_layer = current_;
}

ParamId Builder::Parameter(ParameterSpec spec) { return CopyOfParameter(prefix_, std::move(spec)); }

ParamId Builder::CopyOfParameter(const std::string& owner, ParameterSpec spec) {
  if (!InDeclare("parameter " + spec.name)) return {};
  spec.name = owner + "." + spec.name;
  // Parts of one parameter may be apart.
  std::string key = spec.name;
  for (const Range& range : spec.part.rows) absl::StrAppend(&key, "[", range.first, "]");
  if (!parameter_names_.insert(std::move(key)).second) {
    Fail(absl::InvalidArgumentError(
        absl::StrCat("parameter ", spec.name, " is declared twice; layer names must differ")));
  }
  ParameterInfo info;
  info.owned = spec.part.whole.empty() ? graph_.tokens.index == 0 : spec.part.owned;
  info.spec = std::move(spec);
  info.layers.push_back(current_);
  graph_.parameters.push_back(std::move(info));
  return {static_cast<int>(graph_.parameters.size()) - 1};
}

void Builder::UsesParameter(ParamId param) {
  if (!param.valid() || !InDeclare("the user of a parameter")) return;
  graph_.parameters[param.value].layers.push_back(current_);
}

void Builder::PadRows(ParamId param, int64_t rows) {
  if (!param.valid()) return;
  int64_t& padded = graph_.parameters[param.value].padded_rows;
  padded = std::max(padded, rows);
}

ConstantId Builder::Constant(ConstantInfo info) {
  for (size_t i = 0; i < graph_.constants.size(); ++i) {
    if (graph_.constants[i].name == info.name) return {static_cast<int>(i)};
  }
  graph_.constants.push_back(std::move(info));
  return {static_cast<int>(graph_.constants.size()) - 1};
}

Float8OperandId Builder::Float8Operand(const std::string& name, DType format) {
  graph_.float8_operands.push_back({prefix_ + "." + name, format});
  return {static_cast<int>(graph_.float8_operands.size()) - 1};
}

Float8WeightId Builder::Float8Weight(ParamId param, Float8OperandId operand) {
  graph_.float8_weights.push_back({param, operand});
  return {static_cast<int>(graph_.float8_weights.size()) - 1};
}

void Builder::KeepToEnd(SlotId slot) {
  if (slot.valid()) graph_.slots[slot.value].keep_to_end = true;
}

int64_t Frame::ValueOffset(SlotId slot) const {
  return action_.kind == ActionKind::kForward ? layout_->forward_offset[slot.value]
                                              : layout_->backward_offset[slot.value];
}

Tensor Frame::View(const SlotInfo& slot, int64_t offset, int64_t rows) const {
  if (offset < 0) return {};
  return Tensor::Of(memory_ + offset, slot.dtype, {rows, slot.width}, device_);
}

Tensor Frame::Value(SlotId slot) const {
  const SlotInfo& info = graph_->slots[slot.value];
  return View(info, ValueOffset(slot), Rows(info));
}

Tensor Frame::Padded(SlotId slot) const {
  const SlotInfo& info = graph_->slots[slot.value];
  return View(info, ValueOffset(slot), StoredRows(*graph_, info, tokens.tokens));
}

Tensor Frame::PaddedGrad(SlotId slot) const {
  const SlotInfo& info = graph_->slots[slot.value];
  return View(info, layout_->grad_offset[slot.value], StoredRows(*graph_, info, tokens.tokens));
}

Tensor Frame::Fixed(SlotId slot) const {
  const SlotInfo& info = graph_->slots[slot.value];
  const int64_t offset = ValueOffset(slot), size = SizeOf(info.dtype);
  if (offset < 0 || info.fixed_bytes == 0) return {};
  const int64_t rows = StoredRows(*graph_, info, layout_->token_capacity);
  return Tensor::Of(memory_ + offset + rows * info.width * size, info.dtype,
                    {info.fixed_bytes / size}, device_);
}

Tensor Frame::Grad(SlotId slot) const {
  const SlotInfo& info = graph_->slots[slot.value];
  return View(info, layout_->grad_offset[slot.value], Rows(info));
}

bool Frame::AccumulateGrad(SlotId slot) const {
  // Backward visits readers from the last to the first: only the last one finds nothing there.
  const auto& readers = graph_->slots[slot.value].readers;
  for (auto r = readers.rbegin(); r != readers.rend(); ++r) {
    if (r->writes_grad) return r->layer != action_.layer;
  }
  return false;
}

void Run::SetStorage(std::vector<Tensor> parameters, std::vector<Tensor> gradients,
                     std::vector<Tensor> constants, Tensor loss_total) {
  parameters_ = std::move(parameters);
  gradients_ = std::move(gradients);
  constants_ = std::move(constants);
  loss_total_ = loss_total;
  touched_.gradients.assign(parameters_.size(), 0);
}

void Run::SetFloat8(Float8State* state) {
  float8_ = state;
  touched_.codes.assign(state == nullptr ? 0 : static_cast<size_t>(state->weights()), 0);
}

void Run::BeginStep() {
  touched_.gradients.assign(touched_.gradients.size(), 0);
  touched_.loss = false;
  touched_.codes.assign(touched_.codes.size(), 0);
  touched_.just_in_time = float8_ != nullptr && float8_->just_in_time();
}

}  // namespace stretto
