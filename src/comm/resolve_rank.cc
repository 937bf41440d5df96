// Which rank is this process? One resolver, one fixed order of launchers.
#include <cstdlib>
#include <optional>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "stretto/comm/world.h"

namespace stretto {
namespace {

struct Launcher {
  const char* name;
  const char* size;
  const char* rank;
  const char* local_rank;
  const char* local_size;
  const char* node;
};

// Slurm comes last: its variables leak into mpirun and torchrun inside an allocation.
constexpr Launcher kLaunchers[] = {
    {"torchrun", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"},
    {"Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_NODE_RANK"},
    {"PMI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ""},
    {"Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE",
     "SLURM_NODEID"},
};

using Getenv = std::function<const char*(const char*)>;

absl::StatusOr<std::optional<int>> Number(const Getenv& env, const char* name) {
  const char* text = *name == '\0' ? nullptr : env(name);
  if (text == nullptr || *text == '\0') return std::optional<int>();
  int value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the environment variable ", name, "='", text,
                     "' is not a number >= 0; unset it or start the program through a launcher"));
  }
  return std::optional<int>(value);
}

absl::StatusOr<std::optional<RankInfo>> Ask(const Getenv& env, const Launcher& l) {
  const bool slurm = std::string(l.name) == "Slurm";
  STRETTO_ASSIGN_OR_RETURN(std::optional<int> rank, Number(env, l.rank));
  STRETTO_ASSIGN_OR_RETURN(std::optional<int> size, Number(env, l.size));
  if (slurm && !size.has_value()) {
    STRETTO_ASSIGN_OR_RETURN(size, Number(env, "SLURM_NTASKS"));
  }
  if (!rank.has_value() && !size.has_value()) return std::optional<RankInfo>();
  // An allocation's shell has the number of tasks but no task of its own.
  if (slurm && (!rank.has_value() || !size.has_value())) return std::optional<RankInfo>();
  if (!rank.has_value() || !size.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat(rank.has_value() ? l.rank : l.size, " is set without ",
                     rank.has_value() ? l.size : l.rank, "; set both or neither"));
  }
  if (*size < 1 || *rank >= *size) {
    return absl::InvalidArgumentError(absl::StrCat(l.rank, "=", *rank, " is outside the world of ",
                                                   l.size, "=", *size,
                                                   "; ranks count from 0 to the size minus 1"));
  }
  RankInfo info;
  info.rank = *rank;
  info.size = *size;
  info.source = l.name;
  STRETTO_ASSIGN_OR_RETURN(const std::optional<int> local_rank, Number(env, l.local_rank));
  info.local_rank = local_rank.value_or(0);
  // Slurm writes lists such as "2(x3)" for the tasks of a node: not a number, and not needed.
  std::optional<int> local_size;
  if (slurm) {
    const char* text = env(l.local_size);
    int value = 0;
    if (text != nullptr && absl::SimpleAtoi(text, &value)) local_size = value;
  } else {
    STRETTO_ASSIGN_OR_RETURN(local_size, Number(env, l.local_size));
  }
  info.local_size = local_size.value_or(info.local_rank + 1);
  if (info.local_size <= info.local_rank) {
    return absl::InvalidArgumentError(absl::StrCat(l.local_rank, "=", info.local_rank,
                                                   " is outside ", l.local_size, "=",
                                                   info.local_size, "; unset one of them"));
  }
  STRETTO_ASSIGN_OR_RETURN(const std::optional<int> node, Number(env, l.node));
  info.node = node.value_or(0);
  return std::optional<RankInfo>(info);
}

}  // namespace

absl::StatusOr<RankInfo> ResolveRank(const Getenv& getenv_function) {
  const Getenv env = getenv_function ? getenv_function
                                     : Getenv([](const char* name) { return std::getenv(name); });
  std::optional<RankInfo> chosen;
  for (const Launcher& l : kLaunchers) {
    absl::StatusOr<std::optional<RankInfo>> asked = Ask(env, l);
    if (!asked.ok()) {
      if (!chosen.has_value()) return asked.status();
      chosen->warnings.push_back(std::string(asked.status().message()));
      continue;
    }
    if (!asked->has_value()) continue;
    if (!chosen.has_value()) {
      chosen = **asked;
    } else if ((*asked)->rank != chosen->rank || (*asked)->size != chosen->size) {
      chosen->warnings.push_back(absl::StrCat(chosen->source, " says rank ", chosen->rank, " of ",
                                              chosen->size, " but ", (*asked)->source,
                                              " says rank ", (*asked)->rank, " of ", (*asked)->size,
                                              "; using ", chosen->source));
    }
  }
  return chosen.value_or(RankInfo());
}

}  // namespace stretto
