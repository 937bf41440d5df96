// Trainer::Create: what is done once before the first step.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/copy.h"
#include "stretto/core/thread_pool.h"

namespace stretto {

std::string SetUpTimes::Text() const {
  std::string text;
  for (const auto& [phase, seconds] : seconds_) {
    absl::StrAppendFormat(&text, "%s%s %.2f s", text.empty() ? "" : ", ", phase, seconds);
  }
  return text;
}

absl::Status Trainer::Impl::MeasurePeak() {
  const Arena& frames = stages.front().frames;
  peak_tflops = config.runtime.peak_tflops;
  if (peak_tflops > 0) return absl::OkStatus();
  // The best of a few square products in the model's type, in the activation arena. Long enough
  // that neither a moment's interruption nor the launch counts.
  const bool cpu = stream->device().kind == DeviceKind::kCpu;
  const DType dtype = first_graph().dtype;
  int64_t n = cpu ? 768 : 8192;
  const int products = cpu ? 2 : 20;
  while (n > 64 && 3 * n * n * SizeOf(dtype) > frames.bytes()) n /= 2;
  if (3 * n * n * SizeOf(dtype) > frames.bytes()) return absl::OkStatus();
  const auto matrix = [&](int i) {
    return Tensor::Of(frames.data() + i * n * n * SizeOf(dtype), dtype, {n, n}, stream->device());
  };
  // Numbers as a model has them: multiplying zeros draws less power, and a GPU then runs faster.
  const ParameterSpec noise = {.name = "peak", .shape = {n, n}, .std = 0.02};
  std::vector<std::byte> values(static_cast<size_t>(n * n * SizeOf(dtype)));
  ThreadPool pool(static_cast<int>(config.runtime.threads));
  pool.ParallelFor(n, 1, [&](int64_t begin, int64_t end, int) {
    const Tensor all = Tensor::Of(values.data(), dtype, {n, n});
    InitialValues(noise, 1, begin, all.Rows(begin, end - begin));
  });
  for (int i : {1, 2}) STRETTO_RETURN_IF_ERROR(CopyFromHost(matrix(i), values.data()));
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < products; ++k) ops::Linear(ops(), matrix(0), matrix(1), matrix(2), {});
    STRETTO_RETURN_IF_ERROR(stream->Synchronize());
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / products;
    peak_tflops = std::max(peak_tflops, 2.0 * static_cast<double>(n * n * n) / seconds / 1e12);
  }
  return absl::OkStatus();
}

absl::Status Trainer::Impl::WarmUp() {
  if (kernels->set_measuring == nullptr) return absl::OkStatus();
  std::vector<std::byte> scales;
  if (float8 != nullptr) {
    STRETTO_ASSIGN_OR_RETURN(scales, float8->Remember());
  }
  // Rank 0 measures, then everybody has its choices. Those of a checkpoint come first: a run that
  // was interrupted goes on with the same bits. With a pipeline or a tensor axis ranks need each
  // other, so that the others go through it while rank 0 measures.
  if (!state.choices.empty()) {
    STRETTO_RETURN_IF_ERROR(kernels->import_choices(state.choices));
  }
  std::vector<PackedBatch> batches(1);
  PackedBatch batch;
  batch.Clear();
  const int64_t length = std::min(config.data.sequence_length, plan.micro_batch_tokens);
  for (int64_t t = 0; t < plan.micro_batch_tokens; ++t) {
    const auto id = static_cast<int32_t>(t * 7919 % config.model.vocabulary);
    batch.ids.push_back(id);
    batch.targets.push_back(id);
    batch.weights.push_back(1);
    batch.positions.push_back(static_cast<int32_t>(t % length));
    if ((t + 1) % length == 0 || t + 1 == plan.micro_batch_tokens) {
      batch.cu_seqlens.push_back(static_cast<int32_t>(t + 1));
    }
  }
  batch.max_length = length;
  batches[0] = batch;
  if (plan.step.stages > 1) batches.resize(step_programs.front()->program().items.size(), batch);
  const auto run_through = [&]() -> absl::Status {
    // Gradients are written first and added to afterwards.
    for (int i = batches.size() > 1 ? 1 : 0; i < 2; ++i) {
      STRETTO_RETURN_IF_ERROR(RunBatches(batches, /*training=*/true, /*hooks=*/false));
    }
    for (Stage& stage : stages) stage.evaluation_run->BeginStep();
    STRETTO_RETURN_IF_ERROR(RunBatches(batches, /*training=*/false, /*hooks=*/false));
    // Nothing is under way when this thread goes on to wait for the other ranks.
    STRETTO_RETURN_IF_ERROR(comm->WaitAll());
    return stream->Synchronize();
  };
  for (Stage& stage : stages) stage.run->BeginStep();
  const bool together = config.parallel.tp > 1 || config.parallel.pp > 1;
  absl::Status measured;
  if (world.rank() == 0) {
    kernels->set_measuring(true);
    tensor_axis->WaitAtOnce(true);
    measured = run_through();
    tensor_axis->WaitAtOnce(false);
    kernels->set_measuring(false);
    state.choices = kernels->export_choices();
  } else if (together) {
    measured = run_through();
  }
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("measured choices", state.choices));
  if (world.rank() != 0 && measured.ok()) {
    state.choices = all[0];
    measured = kernels->import_choices(all[0]);
    if (!together && measured.ok()) measured = run_through();
  }
  if (float8 != nullptr && measured.ok()) measured = float8->Recall(scales);
  // From here on nothing is measured, so nothing stands in the way of capturing.
  if (config.runtime.graphs && stream->CanCapture()) replays.emplace(*stream);
  return measured;
}

}  // namespace stretto
