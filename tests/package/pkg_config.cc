// Touches the top and the bottom of the library, so that linking needs all of it.
#include <cstdio>

#include "stretto/train/trainer.h"

int main() {
  const absl::Status status = stretto::World::RunThreads(2, [](stretto::World& world) {
    stretto::TrainConfig config;
    config.data.train = "/nonexistent/tokens.bin";
    config.output = "/nonexistent";
    const auto trainer = stretto::Trainer::Create(world, config);
    return trainer.ok() ? absl::InternalError("trained on a file that does not exist")
                        : absl::OkStatus();
  });
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
