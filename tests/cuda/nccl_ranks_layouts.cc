#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/train/trainer.h"
#include "tests/cuda/nccl_ranks.h"
#include "tests/support/collective_cases.h"
#include "tests/support/rank_main.h"

namespace stretto {
namespace {

using testing::Differs;

// With copy engines: an error unless they carried most of what either axis sent, which is more than
// the gathers, or the sums, alone.
absl::StatusOr<std::vector<double>> TrainLosses(World& world, const TrainConfig& config) {
  std::vector<double> losses;
  STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
  while (trainer->step() < config.steps) {
    STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
    losses.push_back(stats.loss);
  }
  STRETTO_ASSIGN_OR_RETURN(const double evaluated, trainer->Evaluate());
  losses.push_back(evaluated);
  for (const char* axis : {"dp", "tp"}) {
    const int64_t sent = trainer->BytesSent(axis), copied = trainer->BytesCopied(axis);
    if (config.parallel.copy_engines == "auto" ? 4 * copied >= 3 * sent : copied == 0) continue;
    return absl::InternalError(
        absl::StrCat("copy engines carried ", copied, " of ", sent, " bytes of axis ", axis));
  }
  STRETTO_RETURN_IF_ERROR(trainer->Finish());
  return losses;
}

// On rank 0's GPU; empty on other ranks, whose losses are those of rank 0.
absl::StatusOr<std::vector<double>> LossesOfOne(World& world, const TrainConfig& config) {
  std::vector<double> alone;
  absl::Status ran;
  if (world.rank() == 0) {
    ran = World::RunThreads(1, [&](World& one) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(alone, TrainLosses(one, config));
      return absl::OkStatus();
    });
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("one GPU", ran));
  return alone;
}

// Whether the first `count` losses of several GPUs are those of one, where this rank has them.
absl::Status CloseTo(const std::vector<double>& alone, const std::vector<double>& losses,
                     std::size_t count, const std::string& name) {
  for (std::size_t i = 0; i < std::min(count, alone.size()); ++i) {
    if (std::fabs(losses[i] - alone[i]) <= 1e-5 * alone[i]) continue;
    return absl::InternalError(absl::StrCat(name, ", step ", i + 1, ": loss ", losses[i],
                                            " on several GPUs, ", alone[i], " on one"));
  }
  return absl::OkStatus();
}

}  // namespace

// Every level of ZeRO gives the losses of one GPU, and the same bits again, also from graphs.
absl::Status CheckLayouts(World& world, const testing::ScratchDirectory& scratch) {
  for (const char* family : {"gpt2", "qwen3"}) {
    STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, family));
    config.runtime.device = "cuda";
    config.steps = 4;
    config.model.layers = 4;    // two stages on each of two ranks
    config.model.kv_heads = 2;  // one on each
    STRETTO_ASSIGN_OR_RETURN(const std::vector<double> alone, LossesOfOne(world, config));
    struct Layout {
      const char* name;
      int zero = 1, pp = 1, tp = 1;
      const char* schedule = "1f1b";
      int tp_chunks = 1;
      bool tp_overlap = true;
      bool again = false;   // also a second run, which has to give the same bits
      bool graphs = false;  // ... and one that replays captured work
      bool copies = false;  // by copy engines
    };
    const Layout layouts[] = {
        {.name = "zero 1", .again = true, .graphs = true},
        {.name = "zero 2", .zero = 2},
        {.name = "zero 3", .zero = 3, .graphs = true},
        {.name = "pp 2", .pp = 2, .again = true, .graphs = true},
        {.name = "pp 2, zb-h1", .pp = 2, .schedule = "zb-h1", .graphs = true},
        {.name = "pp 2, v-shaped", .pp = 2, .schedule = "v-shaped", .graphs = true},
        {.name = "tp 2", .tp = 2, .again = true},
        {.name = "tp 2, nothing overlapped", .tp = 2, .tp_overlap = false},
        {.name = "tp 2 in 2 chunks", .tp = 2, .tp_chunks = 2, .again = true},
        {.name = "tp 2 in 3 chunks", .tp = 2, .tp_chunks = 3, .tp_overlap = false},
        {.name = "pp 2, tp 2, zero 2", .zero = 2, .pp = 2, .tp = 2},
        {.name = "pp 2, tp 2, zb-h1", .pp = 2, .tp = 2, .schedule = "zb-h1", .again = true},
        {.name = "tp 2, zero 3", .zero = 3, .tp = 2, .again = true},
        {.name = "pp 2, zero 3", .zero = 3, .pp = 2, .again = true},
        {.name = "zero 1, copied", .copies = true},
        {.name = "zero 3, copied", .zero = 3, .again = true, .graphs = true, .copies = true},
        {.name = "tp 2 in 2 chunks, copied",
         .tp = 2,
         .tp_chunks = 2,
         .again = true,
         .copies = true},
        {.name = "tp 2, zero 3, copied", .zero = 3, .tp = 2, .again = true, .copies = true},
    };
    for (const Layout& layout : layouts) {
      if (world.size() % (layout.pp * layout.tp) != 0) continue;
      config = testing::With(config, {.dp = world.size() / (layout.pp * layout.tp),
                                      .pp = layout.pp,
                                      .tp = layout.tp,
                                      .zero = layout.zero,
                                      .schedule = layout.schedule,
                                      .pieces = layout.tp_chunks});
      config.parallel.tp_overlap = layout.tp_overlap;
      config.parallel.copy_engines = layout.copies ? "auto" : "off";
      const std::string name = absl::StrCat(family, ", ", layout.name);
      if (world.rank() == 0) {
        std::printf("%s\n", name.c_str());
        std::fflush(stdout);
      }
      config.runtime.graphs = false;
      STRETTO_ASSIGN_OR_RETURN(const std::vector<double> losses, TrainLosses(world, config));
      absl::Status verdict;
      if (layout.again) {
        STRETTO_ASSIGN_OR_RETURN(const std::vector<double> again, TrainLosses(world, config));
        if (losses != again) verdict = Differs(absl::StrCat("a second run of ", name));
      }
      if (layout.graphs) {
        config.runtime.graphs = true;
        STRETTO_ASSIGN_OR_RETURN(const std::vector<double> replayed, TrainLosses(world, config));
        if (losses != replayed) verdict = Differs(absl::StrCat("a run with graphs of ", name));
      }
      verdict.Update(CloseTo(alone, losses, alone.size(), name));
      STRETTO_RETURN_IF_ERROR(world.Agree("comparing", verdict));
    }
  }
  return absl::OkStatus();
}

// Documents of unequal length, which GPUs share by rings: the losses of one GPU that has room for
// each of them, and the same bits again, also where what does not communicate is replayed.
absl::Status CheckDocuments(World& world, const testing::ScratchDirectory& scratch) {
  for (const char* family : {"gpt2", "qwen3"}) {
    STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, family));
    config.runtime.device = "cuda";
    config.steps = 4;
    config.model.layers = 4;
    config.model.kv_heads = 2;
    config.data.documents = true;
    config.data.sequence_length = 29;
    config.batch.tokens = 230;
    config.batch.capacity = 30;
    STRETTO_ASSIGN_OR_RETURN(const std::vector<double> alone, LossesOfOne(world, config));
    struct Sharing {
      const char* name;
      const char* mesh;
      int cp = 1, pp = 1, tp = 1;
      int64_t capacity = 15;
      const char* schedule = "1f1b";
    };
    const Sharing sharings[] = {
        {.name = "static", .mesh = "static", .cp = 2},
        {.name = "dynamic", .mesh = "dynamic"},
        {.name = "dynamic, short documents", .mesh = "dynamic", .capacity = 30},
        {.name = "unbalanced", .mesh = "unbalanced"},
        {.name = "dynamic, pp 2", .mesh = "dynamic", .pp = 2, .schedule = "zb-h1"},
        {.name = "dynamic, pp 2, interleaved",
         .mesh = "dynamic",
         .pp = 2,
         .schedule = "interleaved"},
        {.name = "dynamic, tp 2", .mesh = "dynamic", .tp = 2},
        {.name = "dynamic, pp 2, tp 2", .mesh = "dynamic", .pp = 2, .tp = 2},
    };
    for (const Sharing& sharing : sharings) {
      const int replica = sharing.cp * sharing.pp * sharing.tp;
      if (world.size() % replica != 0) continue;
      // Where fewer ranks share documents, each holds more of them.
      const int64_t data_ranks = world.size() / (sharing.pp * sharing.tp);
      const int64_t capacity = std::max(sharing.capacity, (30 + data_ranks - 1) / data_ranks);
      config.parallel = {.dp = world.size() / replica,
                         .cp = sharing.cp,
                         .mesh = sharing.mesh,
                         .pp = sharing.pp,
                         .tp = sharing.tp,
                         .schedule = sharing.schedule,
                         .bucket_bytes = 4096};
      config.batch.capacity = capacity;
      config.runtime.graphs = false;
      const std::string name = absl::StrCat(family, ", documents, ", sharing.name);
      if (world.rank() == 0) {
        std::printf("%s\n", name.c_str());
        std::fflush(stdout);
      }
      STRETTO_ASSIGN_OR_RETURN(const std::vector<double> losses, TrainLosses(world, config));
      STRETTO_ASSIGN_OR_RETURN(const std::vector<double> again, TrainLosses(world, config));
      absl::Status verdict;
      if (losses != again) verdict = Differs(absl::StrCat("a second run of ", name));
      config.runtime.graphs = sharing.tp == 1;
      STRETTO_ASSIGN_OR_RETURN(const std::vector<double> replayed, TrainLosses(world, config));
      if (losses != replayed) verdict = Differs(absl::StrCat("a run with graphs of ", name));
      // The last one is of an evaluation, over samples that a rank holds.
      verdict.Update(CloseTo(alone, losses, alone.size() - 1, name));
      STRETTO_RETURN_IF_ERROR(world.Agree("comparing", verdict));
    }
  }
  return absl::OkStatus();
}

}  // namespace stretto
