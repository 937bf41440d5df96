// Trainer::Sample: text from the model, one token at a time.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/copy.h"

namespace stretto {
namespace {

// Draws an index from softmax(logits / temperature) over the top_k largest (0: all). Temperature 0
// takes the largest.
int32_t Draw(const std::vector<float>& logits, double temperature, int64_t top_k, double uniform,
             std::vector<int32_t>* order) {
  order->resize(logits.size());
  std::iota(order->begin(), order->end(), 0);
  const auto larger = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  const size_t k =
      top_k > 0 ? std::min<size_t>(static_cast<size_t>(top_k), logits.size()) : logits.size();
  std::partial_sort(order->begin(), order->begin() + static_cast<std::ptrdiff_t>(k), order->end(),
                    larger);
  if (temperature <= 0) return order->front();
  const double top = logits[order->front()];
  double sum = 0;
  for (size_t i = 0; i < k; ++i) sum += std::exp((logits[(*order)[i]] - top) / temperature);
  double target = uniform * sum;
  for (size_t i = 0; i < k; ++i) {
    target -= std::exp((logits[(*order)[i]] - top) / temperature);
    if (target < 0) return (*order)[i];
  }
  return (*order)[k - 1];
}

}  // namespace

absl::StatusOr<std::string> Trainer::Sample(const std::string& prompt, int64_t tokens,
                                            double temperature, int64_t top_k) {
  Impl& t = *impl_;
  if (t.plan.step.stages > 1 || t.tp_group.size() > 1) {
    return absl::UnimplementedError(
        "text is sampled from a whole model only; start again from the checkpoint with "
        "parallel.pp=1 and parallel.tp=1");
  }
  STRETTO_RETURN_IF_ERROR(t.WaitParameters());
  const StagePlan& whole = t.plan.stages.front();
  Trainer::Impl::Stage& stage = t.stages.front();
  std::string text;
  // Where every rank keeps a part of the parameters all ranks compute, and rank 0 draws.
  const bool together = t.zero() == 3, first = t.world.rank() == 0;
  const auto tell = [&](std::vector<int64_t>* numbers) -> absl::Status {
    if (!together) return absl::OkStatus();
    return t.comm->Wait(t.comm->Broadcast(
        t.comm->all(),
        Tensor::Of(numbers->data(), DType::kI64, {static_cast<int64_t>(numbers->size())}),
        /*root_index=*/0, "sample"));
  };
  const auto generate = [&]() -> absl::Status {
    std::vector<int32_t> ids;
    absl::Status encoded;
    if (first) encoded = t.tokenizer->Encode(prompt, &ids);
    if (together) encoded = t.world.Agree("reading the prompt", encoded);
    STRETTO_RETURN_IF_ERROR(encoded);
    if (ids.empty()) ids.push_back(static_cast<int32_t>(t.tokenizer->end_of_text()));
    std::vector<int64_t> told = {static_cast<int64_t>(ids.size())};
    STRETTO_RETURN_IF_ERROR(tell(&told));
    ids.resize(static_cast<size_t>(told[0]));
    told.assign(ids.begin(), ids.end());
    STRETTO_RETURN_IF_ERROR(tell(&told));
    ids.assign(told.begin(), told.end());
    told.resize(1);
    const size_t prompt_size = ids.size();
    const int64_t context = std::min(t.config.data.sequence_length, t.config.model.max_positions);
    const Rng rng(static_cast<uint64_t>(t.config.seed), "sample",
                  static_cast<uint64_t>(t.state.step));
    // Ids above the tokenizer's (padding of the vocabulary) are never drawn.
    const int64_t vocabulary = t.tokenizer->vocabulary();
    const Graph& graph = whole.model.graph;
    const ParameterInfo& head = graph.parameters[static_cast<size_t>(whole.model.head.value)];
    const int64_t width = head.columns();
    STRETTO_ASSIGN_OR_RETURN(
        const Arena logits_arena,
        Arena::Create(t.stream->device(), "sampling", 8 * head.rows() + 4 * head.rows()));
    const Device device = t.stream->device();
    const Tensor logits = Tensor::Of(logits_arena.data(), graph.dtype, {1, head.rows()}, device);
    const Tensor wide =
        Tensor::Of(logits_arena.data() + 8 * head.rows(), DType::kF32, {1, head.rows()}, device);
    std::vector<float> values(static_cast<size_t>(vocabulary));
    std::vector<int32_t> order;
    PackedBatch batch;
    stage.evaluation_run->BeginStep();
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t length = std::min<int64_t>(context, static_cast<int64_t>(ids.size()));
      batch.Clear();
      for (int64_t k = 0; k < length; ++k) {
        batch.ids.push_back(ids[ids.size() - static_cast<size_t>(length - k)]);
        batch.targets.push_back(0);
        batch.weights.push_back(0);
        batch.positions.push_back(static_cast<int32_t>(k));
      }
      batch.cu_seqlens.push_back(static_cast<int32_t>(length));
      batch.max_length = length;
      Frame frame(&graph, &whole.evaluation_actions, &whole.evaluation_frame, stage.frames.data(),
                  device);
      STRETTO_ASSIGN_OR_RETURN(frame.tokens, t.worker->feeder().Feed(batch));
      // Everything but the head, which is only needed for the last token.
      ActionList body = whole.evaluation_actions;
      body.actions.pop_back();
      ActionHooks* const hooks = stage.dp->evaluation_hooks(*stage.evaluation_run);
      Execute(graph, body, *stage.evaluation_run, frame, hooks);
      const Tensor hidden = frame.Value(whole.model.final_hidden).Rows(length - 1, 1);
      const size_t last = body.actions.size();
      const Action& action = whole.evaluation_actions.actions[last];
      if (hooks != nullptr) hooks->Before(last, action);
      ops::Linear(t.ops(), logits, Tensor::Of(hidden.data, hidden.dtype, {1, width}, device),
                  stage.evaluation_run->Parameter(whole.model.head), {});
      if (hooks != nullptr) hooks->After(last, action);
      ops::Copy(t.ops(), wide, logits);
      STRETTO_RETURN_IF_ERROR(t.stream->Synchronize());
      if (first) {
        STRETTO_RETURN_IF_ERROR(CopyToHost(values.data(), wide.Columns(0, vocabulary)));
        told[0] = Draw(values, temperature, top_k, rng.Uniform(static_cast<uint64_t>(i)), &order);
      }
      STRETTO_RETURN_IF_ERROR(tell(&told));
      t.progress.Beat("sample", t.state.step);
      const auto next = static_cast<int32_t>(told[0]);
      if (next == t.tokenizer->end_of_text()) break;
      ids.push_back(next);
    }
    ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(prompt_size));
    if (!first) return absl::OkStatus();
    STRETTO_ASSIGN_OR_RETURN(text, t.tokenizer->Decode(ids));
    return absl::OkStatus();
  };
  STRETTO_RETURN_IF_ERROR(
      t.world.Agree("sampling", together || first ? generate() : absl::OkStatus()));
  return text;
}

}  // namespace stretto
