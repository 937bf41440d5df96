#include "stretto/parallel/tensor_parallel.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/parallel/tensor_layers.h"
#include "stretto/parallel/step_phase.h"

namespace stretto {

void TensorAxis::Gather(Stream& stream, Tensor whole, Tensor part, const std::string& label) {
  Wait(stream, comm_.AllGather(group_, whole, part, label, stream.Record()));
}

void TensorAxis::StartGather(Stream& stream, const TokenPiece& piece, int i, Tensor whole,
                             Tensor part, const std::string& label) {
  Started(stream, whole, i,
          comm_.AllGather(group_, whole.Rows(piece.whole.first, piece.whole.count),
                          part.Rows(piece.part.first, piece.part.count), label, stream.Record()));
}

void TensorAxis::StartSum(Stream& stream, const TokenPiece& piece, int i, Tensor whole, Tensor part,
                          const std::string& label) {
  const Tensor mine = part.present() ? part.Rows(piece.part.first, piece.part.count)
                                     : whole.Rows(piece.mine.first, piece.mine.count);
  Started(stream, whole, i,
          comm_.ReduceScatter(group_, mine, whole.Rows(piece.whole.first, piece.whole.count), label,
                              stream.Record()));
}

TensorAxis::UnderWay* TensorAxis::Find(const std::byte* whole) {
  for (UnderWay& u : under_way_) {
    if (u.whole == whole) return &u;
  }
  return nullptr;
}

void TensorAxis::Started(Stream& stream, const Tensor& whole, int i, Ticket ticket) {
  UnderWay* u = Find(i == 0 ? nullptr : whole.data);
  if (u == nullptr || (i == 0 && Find(whole.data) != nullptr) || i != u->started) {
    stream.Fail(absl::InternalError(absl::StrCat(
        "piece ", i, " of an exchange over the tensor axis starts out of turn; at most ",
        kMostUnderWay, " are under way, each with its own tensor, and pieces start in order")));
    return;
  }
  u->whole = whole.data;
  u->tickets[static_cast<size_t>(i)] = ticket;
  ++u->started;
  if (at_once_) Wait(stream, ticket);
}

void TensorAxis::Wait(Stream& stream, const Tensor& whole, int i, int pieces) {
  UnderWay* const u = Find(whole.data);
  if (u == nullptr || u->waited != i || u->started <= i) {
    stream.Fail(absl::InternalError(absl::StrCat(
        "piece ", i, " of an exchange over the tensor axis is waited for, but ",
        u == nullptr ? 0 : u->started, " have been started and ", u == nullptr ? 0 : u->waited,
        " waited for; a layer's exchanges are actions ", "of their own (Layer::Exchange)")));
    return;
  }
  Wait(stream, u->tickets[static_cast<size_t>(i)]);
  if (++u->waited == pieces) *u = UnderWay();
}

void TensorAxis::Wait(Stream& stream, Ticket ticket) {
  absl::Status status = TimedWait(comm_, stream, timer_, StepPhase::kExposedTensor, ticket);
  if (!status.ok()) stream.Fail(std::move(status));
}

Strategies TensorStrategies(int ranks, int index, int pieces, Strategies within) {
  Strategies s = std::move(within);
  if (ranks == 1) return s;
  const TokenCut axis = {ranks, index, std::clamp(pieces, 1, TokenCut::kMostPieces)};
  s.tokens = axis;
  s.gated_linear = nullptr;
  s.linear = [local = s.linear](SlotId x, Role role, int64_t in, int64_t out,
                                const LinearOptions& options, SlotId* y) -> std::unique_ptr<Layer> {
    switch (role) {
      case Role::kColumn:
        return std::make_unique<internal::ColumnLinearLayer>(x, in, out, options, y);
      case Role::kRow:
        return std::make_unique<internal::RowLinearLayer>(x, in, out, options, y);
      case Role::kReplicated:
        break;
    }
    return local(x, role, in, out, options, y);
  };
  s.attention = [local = s.attention, axis](SlotId qkv, const AttentionOptions& options,
                                            SlotId* o) {
    // Query heads stay with the key head that they share.
    AttentionOptions mine = options;
    const int64_t share = options.heads / std::max<int64_t>(1, options.kv_heads);
    if (options.kv_heads < axis.ranks && share > 1) {
      const internal::GroupPlace place = internal::PlaceInGroups(options.kv_heads, axis);
      mine.kv_heads = 1;
      mine.heads = CutEvenly(share, place.ranks, place.index).count;
    } else {
      mine.kv_heads = CutEvenly(options.kv_heads, axis.ranks, axis.index).count;
      mine.heads = share * mine.kv_heads;
    }
    return local(qkv, mine, o);
  };
  s.embedding = [](int64_t vocabulary, int64_t width, int64_t positions, double init_std, SlotId* y,
                   ParamId* table) {
    return std::make_unique<internal::VocabularyEmbeddingLayer>(vocabulary, width, positions,
                                                                init_std, y, table);
  };
  s.loss_head = [](SlotId x, int64_t vocabulary, int64_t chunk, ParamId tied, double init_std,
                   const std::string& tied_to, ParamId* weight) {
    return std::make_unique<internal::VocabularyLossHeadLayer>(x, vocabulary, chunk, tied, init_std,
                                                               tied_to, weight);
  };
  return s;
}

namespace {

// Elements that each of the ranks adds up, of all shards of partial gradients together.
int64_t PackedPart(const Graph& graph, int ranks, int index) {
  int64_t elements = 0;
  for (const ParameterInfo& p : graph.parameters) {
    if (p.spec.partial_gradient) {
      elements += CutRows(p.rows(), ranks, index).count * p.columns() * p.spec.part.copies;
    }
  }
  return CutRows(elements, graph.tokens.ranks, 0).part;
}

}  // namespace

PartialGradients::Costs PartialGradients::CostsOf(const Graph& graph, int ranks, int index) {
  if (graph.tokens.ranks == 1) return {};
  const int64_t part = PackedPart(graph, ranks, index) * SizeOf(AccumulateType(graph.dtype));
  // A scattered sum, and a gather of the parts.
  return {part * graph.tokens.ranks, 2 * part * (graph.tokens.ranks - 1)};
}

absl::StatusOr<std::unique_ptr<PartialGradients>> PartialGradients::Create(
    Communicator& comm, const Group& group, const Graph& graph, const DataParallel& parameters,
    ops::Context ops, Budget& budget, PhaseTimer* timer) {
  auto sums = std::unique_ptr<PartialGradients>(new PartialGradients(comm, group, ops, timer));
  if (graph.tokens.ranks == 1) return sums;
  const Group& data = parameters.group();
  const int64_t bytes = CostsOf(graph, data.size(), data.index).memory;
  const Device device = ops.stream->device();
  STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(device), "partial gradients", bytes));
  STRETTO_ASSIGN_OR_RETURN(sums->memory_, Arena::Create(device, "partial gradients", bytes));
  const int64_t elements = PackedPart(graph, data.size(), data.index) * graph.tokens.ranks;
  sums->packed_ = Tensor::Of(sums->memory_.data(), AccumulateType(graph.dtype), {elements}, device);
  int64_t next = 0;
  for (const ParameterShard& shard : parameters.shards()) {
    const ParameterSpec& spec = graph.parameters[static_cast<size_t>(shard.param.value)].spec;
    const int64_t count = shard.grad.elements();
    if (!spec.partial_gradient || count == 0) continue;
    sums->items_.push_back({.grad = shard.grad.Flat(),
                            .packed = sums->packed_.Rows(next, count * spec.part.copies),
                            .mine = sums->packed_.Rows(next + spec.part.copy * count, count)});
    next += count * spec.part.copies;
  }
  return sums;
}

absl::Status PartialGradients::Sum() {
  if (!packed_.present() || packed_.elements() == 0) return absl::OkStatus();
  for (const Item& item : items_) {
    if (item.packed.elements() > item.mine.elements()) ops::Zero(ops_, item.packed);
    ops::Copy(ops_, item.mine, item.grad);
  }
  const int64_t part = packed_.elements() / group_.size();
  const Tensor mine = packed_.Rows(part * group_.index, part);
  Stream& stream = *ops_.stream;
  static const std::string kSum = "partial gradients", kGather = "summed gradients";
  for (const bool gather : {false, true}) {
    const Ticket ticket = gather
                              ? comm_.AllGather(group_, packed_, mine, kGather, stream.Record())
                              : comm_.ReduceScatter(group_, mine, packed_, kSum, stream.Record());
    STRETTO_RETURN_IF_ERROR(TimedWait(comm_, stream, timer_, StepPhase::kExposedTensor, ticket));
  }
  for (const Item& item : items_) ops::Copy(ops_, item.grad, item.mine);
  return absl::OkStatus();
}

namespace internal {

TensorAxis* AxisOf(const Run& run) {
  if (run.tensor_axis() == nullptr) {
    run.ops().stream->Fail(absl::FailedPreconditionError(
        "a layer that is cut over a tensor axis runs without one; give the run a TensorAxis "
        "(Run::SetTensorAxis)"));
  }
  return run.tensor_axis();
}

void StartGather(Run& run, const Frame& frame, SlotId whole, const Tensor& part,
                 const std::string& label) {
  TensorAxis* const axis = AxisOf(run);
  if (axis == nullptr) return;
  const int64_t tokens = frame.tokens.tokens;
  for (int i = 0; i < PiecesOf(frame.cut(), tokens); ++i) {
    axis->StartGather(*run.ops().stream, PieceOf(frame.cut(), tokens, i), i, frame.Padded(whole),
                      part, label);
  }
}

void WaitForPieces(Run& run, const Frame& frame, SlotId whole) {
  AsPiecesArrive(run, frame, whole, [](Range) {});
}

void StartSum(Run& run, const Frame& frame, SlotId whole, const TokenPiece& piece, int i,
              const Tensor& part, const std::string& label) {
  TensorAxis* const axis = AxisOf(run);
  if (axis == nullptr) return;
  const Tensor all = frame.Padded(whole);
  // Sums over the rows behind the tokens have to be defined.
  const int64_t padding = piece.whole.count - piece.all;
  if (padding > 0) ops::Zero(run.ops(), all.Rows(piece.whole.first + piece.all, padding));
  axis->StartSum(*run.ops().stream, piece, i, all, part, label);
}

Tensor GradientTarget(const Frame& frame, SlotId slot) {
  return frame.AccumulateGrad(slot) ? Tensor() : frame.PaddedGrad(slot);
}

void FinishGradient(Run& run, const Frame& frame, SlotId slot, SlotId whole) {
  WaitForPieces(run, frame, whole);
  if (!frame.AccumulateGrad(slot)) return;
  const int64_t tokens = frame.tokens.tokens;
  for (int i = 0; i < PiecesOf(frame.cut(), tokens); ++i) {
    const TokenPiece piece = PieceOf(frame.cut(), tokens, i);
    ops::Add(run.ops(), frame.Grad(slot).Rows(piece.part.first, piece.own),
             frame.Padded(whole).Rows(piece.mine.first, piece.own));
  }
}

}  // namespace internal
}  // namespace stretto
