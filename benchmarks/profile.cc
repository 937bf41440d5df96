// stretto-bench train CONFIG --profile: where a micro-batch's time goes. Runs forward and backward
// of the configured model on made-up tokens on one rank, waits after each action, and prints the
// milliseconds by kind of layer and by half, beside those of a device copy.
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "benchmarks/micro_batch.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/copy.h"
#include "stretto/ops/ops.h"
#include "stretto/train/memory.h"
#include "stretto/train/prediction.h"

namespace stretto::bench {
namespace {

// Median seconds of `work` over some repetitions of `inner` calls.
template <class Work>
double Time(Stream& stream, int inner, const Work& work) {
  std::vector<double> seconds;
  for (int i = 0; i < 7; ++i) {
    const double start = Now();
    for (int k = 0; k < inner; ++k) work();
    stream.Synchronize().IgnoreError();
    seconds.push_back((Now() - start) / inner);
  }
  return Median(seconds);
}

}  // namespace

absl::Status Profile(World& world, TrainConfig config, int64_t workspace_bytes, Results* results) {
  STRETTO_RETURN_IF_ERROR(config.Resolve(1));
  STRETTO_ASSIGN_OR_RETURN(const Device device, ChooseDevice(config.runtime.device, 0));
  config.runtime.device = device.kind == DeviceKind::kCpu ? "cpu" : "cuda";
  const int threads = config.runtime.threads > 0
                          ? static_cast<int>(config.runtime.threads)
                          : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  STRETTO_ASSIGN_OR_RETURN(
      const auto stream,
      Stream::Create(
          device, {.threads = threads,
                   .workspace_bytes =
                       workspace_bytes > 0 ? workspace_bytes : DeviceWorkspaceBytes(device.kind)}));
  Communicator comm(world);
  STRETTO_ASSIGN_OR_RETURN(const auto batch, MicroBatch::Create(config, comm, comm.all(), *stream));
  STRETTO_RETURN_IF_ERROR(batch->WarmUp());
  const Graph& graph = batch->graph();
  Run& run = batch->run();
  Frame& frame = batch->frame();

  constexpr int kRounds = 7;
  const double whole = Time(*stream, 1, [&] { batch->Step(); }) * 1e3;
  std::map<std::string, std::vector<double>> rounds;  // by layer kind and half: ms of each round
  std::vector<double> synchronous;
  for (int round = 0; round < kRounds; ++round) {
    std::map<std::string, double> sums;
    double total = 0;
    for (const Action& action : batch->actions().actions) {
      frame.Begin(action);
      const Layer& layer = *graph.layers[static_cast<size_t>(action.layer)];
      const double start = Now();
      if (action.kind == ActionKind::kForward) layer.Forward(run, frame);
      if (action.kind == ActionKind::kRecompute) layer.Recompute(run, frame);
      if (action.kind == ActionKind::kBackwardInput) layer.BackwardInput(run, frame);
      if (action.kind == ActionKind::kBackwardWeight) layer.BackwardWeight(run, frame);
      STRETTO_RETURN_IF_ERROR(stream->Synchronize());
      const double ms = (Now() - start) * 1e3;
      const std::string name = LayerKind(graph.layer_names[static_cast<size_t>(action.layer)]);
      sums[absl::StrFormat("%-16s %c", name, "FRBW"[static_cast<int>(action.kind)])] += ms;
      total += ms;
    }
    for (const auto& [name, ms] : sums) rounds[name].push_back(ms);
    synchronous.push_back(total);
  }
  results->command = "train --profile";
  results->device = DeviceName(device);
  const auto show = [&](const std::string& name, double ms) {
    absl::PrintF("%-20s %9.3f ms\n", name, ms);
    results->results.push_back({{"name", name}, {"seconds", ms * 1e-3}});
  };
  absl::PrintF("%s, %d tokens a micro-batch, %s\n", results->device,
               batch->plan().micro_batch_tokens, Name(graph.dtype));
  for (const auto& [name, ms] : rounds) show(name, Median(ms));
  show("waiting each time", Median(synchronous));
  show("micro-batch", whole);
  const double update = Time(*stream, 3, [&] { batch->Update(); });
  show("norm and update", update * 1e3);

  const int64_t bytes =
      std::min<int64_t>(batch->memory().bytes() / 2, int64_t{2} << 30) / 256 * 256;
  const auto half = [&](int i) {
    return Tensor::Of(batch->memory().data() + i * bytes, DType::kBF16, {bytes / 2}, device);
  };
  const double copy = Time(*stream, 5, [&] { ops::Copy(run.ops(), half(1), half(0)); });
  absl::PrintF("%-20s %9.1f GB/s\n", "copy", 2e-9 * static_cast<double>(bytes) / copy);
  return stream->Synchronize();
}

}  // namespace stretto::bench
