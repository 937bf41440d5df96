#include "stretto/model/layer.h"

#include "absl/strings/str_cat.h"

namespace stretto {

Builder::Builder(DType dtype, Strategies strategies) : strategies_(std::move(strategies)) {
  graph_.dtype = dtype;
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
  block_ = blocks_++;
  block_layers_ = 0;
}
void Builder::EndBlock() { block_ = -1; }

void Builder::Fail(absl::Status error) {
  if (status_.ok()) status_ = std::move(error);
}

absl::StatusOr<Graph> Builder::Finish() {
  if (!status_.ok()) return status_;
  for (const SlotInfo& s : graph_.slots) {
    if (s.modified_by_reader && s.readers.size() != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("slot ", s.name, " is changed in place by one of its ", s.readers.size(),
                       " readers; give the others a copy"));
    }
  }
  return std::move(graph_);
}

DType Builder::accumulate_type() const { return AccumulateType(graph_.dtype); }
int64_t Builder::Width(SlotId slot) const {
  return slot.valid() ? graph_.slots[slot.value].width : 0;
}

void Builder::Reads(SlotId slot, unsigned uses, bool writes_grad) {
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

SlotId Builder::Input(const std::string& name, int64_t width) {
  SlotInfo s;
  s.name = name;
  s.kind = SlotKind::kInput;
  s.width = width;
  s.dtype = graph_.dtype;
  graph_.slots.push_back(std::move(s));
  return {static_cast<int>(graph_.slots.size()) - 1};
}

SlotId Builder::Output(const std::string& name, int64_t width, const OutputOptions& options) {
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
  s.grad_changed_by_producer = options.grad_changed_by_producer;
  graph_.slots.push_back(std::move(s));
  return {static_cast<int>(graph_.slots.size()) - 1};
}

SlotId Builder::Saved(const std::string& name, int64_t width, DType dtype, unsigned uses) {
  SlotInfo s;
  s.name = prefix_ + "." + name;
  s.kind = SlotKind::kSaved;
  s.width = width;
  s.dtype = dtype;
  s.producer = current_;
  s.own_uses = uses;
  graph_.slots.push_back(std::move(s));
  return {static_cast<int>(graph_.slots.size()) - 1};
}

SlotId Builder::Scratch(const std::string& name, int64_t width, DType dtype, unsigned uses,
                        int64_t fixed_bytes) {
  const SlotId id = Saved(name, width, dtype, uses);
  graph_.slots[id.value].kind = SlotKind::kScratch;
  graph_.slots[id.value].fixed_bytes = fixed_bytes;
  return id;
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

ParamId Builder::Parameter(ParameterSpec spec) {
  spec.name = prefix_ + "." + spec.name;
  for (const ParameterInfo& p : graph_.parameters) {
    if (p.spec.name == spec.name) {
      Fail(absl::InvalidArgumentError(
          absl::StrCat("parameter ", spec.name, " is declared twice; layer names must differ")));
    }
  }
  ParameterInfo info;
  info.spec = std::move(spec);
  info.layers.push_back(current_);
  graph_.parameters.push_back(std::move(info));
  return {static_cast<int>(graph_.parameters.size()) - 1};
}

void Builder::UsesParameter(ParamId param) {
  if (param.valid()) graph_.parameters[param.value].layers.push_back(current_);
}

ConstantId Builder::Constant(ConstantInfo info) {
  for (size_t i = 0; i < graph_.constants.size(); ++i) {
    if (graph_.constants[i].name == info.name) return {static_cast<int>(i)};
  }
  graph_.constants.push_back(std::move(info));
  return {static_cast<int>(graph_.constants.size()) - 1};
}

void Builder::KeepToEnd(SlotId slot) {
  if (slot.valid()) graph_.slots[slot.value].keep_to_end = true;
}

Tensor Frame::Value(SlotId slot) const {
  const SlotInfo& info = graph_->slots[slot.value];
  const int64_t offset = action_.kind == ActionKind::kForward
                             ? layout_->forward_offset[slot.value]
                             : layout_->backward_offset[slot.value];
  if (offset < 0) return {};
  return Tensor::Of(memory_ + offset, info.dtype, {tokens.tokens, info.width});
}

Tensor Frame::Grad(SlotId slot) const {
  const int64_t offset = layout_->grad_offset[slot.value];
  if (offset < 0) return {};
  const SlotInfo& info = graph_->slots[slot.value];
  return Tensor::Of(memory_ + offset, info.dtype, {tokens.tokens, info.width});
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
  touched_.assign(parameters_.size(), 0);
}

void Run::BeginStep() {
  touched_.assign(touched_.size(), 0);
  loss_touched_ = false;
}

}  // namespace stretto
