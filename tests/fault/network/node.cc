// Trains and says what it measured: a rank of two_nodes.py.
//
//   network_node CONFIG.json [section.name=value]...
//
// Prints "STEP rank number loss", with all digits of the loss, and at the end "SECONDS rank s" of
// all steps but the first, and for each axis "BYTES rank axis sent planned" of a step; "FAULT rank
// r: ..." after an error.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "stretto/core/log.h"
#include "stretto/train/memory.h"
#include "stretto/train/trainer.h"

namespace stretto {
namespace {

absl::Status Train(World& world, const TrainConfig& config, std::unique_ptr<Trainer>& trainer) {
  STRETTO_ASSIGN_OR_RETURN(trainer, Trainer::Create(world, config));
  STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                           PlanRun(trainer->config(), world.size(), world.rank()));
  const std::pair<const char*, int64_t> planned[] = {
      {"dp", plan.gradient_bytes_sent + plan.parameter_bytes_sent},
      {"pp", plan.boundary_bytes_sent + plan.tied_bytes_sent},
      {"tp", plan.tensor_bytes_sent},
      {"all", plan.scalar_bytes_sent}};
  // Asking for a parameter waits until the gather that a step has started is over.
  const std::string some = trainer->model().graph.parameters.front().spec.name;
  std::vector<int64_t> before;
  auto begin = std::chrono::steady_clock::now();
  while (trainer->step() < config.steps) {
    STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
    STRETTO_RETURN_IF_ERROR(trainer->Parameter(some).status());
    std::printf("STEP %d %d %.17g\n", world.rank(), static_cast<int>(stats.step), stats.loss);
    std::fflush(stdout);
    if (stats.step > 1) continue;
    for (const auto& [axis, unused] : planned) before.push_back(trainer->BytesSent(axis));
    begin = std::chrono::steady_clock::now();
  }
  std::printf("SECONDS %d %.3f\n", world.rank(),
              std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  for (size_t i = 0; i < before.size(); ++i) {
    const auto& [axis, bytes] = planned[i];
    const int64_t sent = trainer->BytesSent(axis) - before[i];
    if (sent % (config.steps - 1) != 0) return absl::InternalError("steps send unlike bytes");
    std::printf("BYTES %d %s %lld %lld\n", world.rank(), axis,
                static_cast<long long>(sent / (config.steps - 1)), static_cast<long long>(bytes));
  }
  return trainer->Finish();
}

int Main(int argc, char** argv) {
  TrainConfig config;
  absl::Status status = argc < 2 ? absl::InvalidArgumentError("name a configuration")
                                 : LoadConfig(argv[1], {argv + 2, argv + argc}, ConfigRef(&config));
  std::unique_ptr<Trainer> trainer;
  int rank = -1;
  if (status.ok()) {
    auto world = World::Create({.timeout = std::chrono::milliseconds(
                                    static_cast<int64_t>(config.runtime.timeout_seconds * 1000))});
    status = world.status();
    if (world.ok()) {
      rank = (*world)->rank();
      status = Train(**world, config, trainer);
    }
    if (!status.ok()) std::printf("FAULT %d: %s\n", rank, std::string(status.message()).c_str());
    std::fflush(stdout);
    trainer.reset();
  } else {
    std::fprintf(stderr, "network_node: %s\n", std::string(status.message()).c_str());
  }
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) { return stretto::Main(argc, argv); }
