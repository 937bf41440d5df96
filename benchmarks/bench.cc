// stretto-bench: speed of kernels, of communication and of whole steps, and comparison of two runs.
#include "benchmarks/bench.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/core/config.h"
#include "stretto/core/log.h"
#include "stretto/core/rng.h"
#include "tools/files.h"

namespace stretto::bench {
namespace {

struct Command {
  const char* name;
  const char* summary;
  int (*run)(int argc, const char* const* argv);
};
constexpr Command kCommands[] = {
    {"kernels", "each kernel on a model's shapes, beside this device's copy and product", &Kernels},
    {"comm", "collectives and point to point between all ranks; run it under mpirun", &Comm},
    {"train", "whole optimizer steps of a configuration on random tokens", &Train},
    {"compare", "two files that --json wrote", &Compare},
    {"fit", "a cost model of a configuration on these ranks, for stretto-plan --suggest", &Fit},
    {"varlen", "steps of documents of unequal length, static meshes beside dynamic ones", &Varlen},
    {"snapshot", "steps with and without snapshots in memory, beside the link's rate", &Snapshot},
    {"predict", "steps of several layouts beside what a cost model predicts", &Predict},
};

std::string Help() {
  std::string text =
      "usage: stretto-bench COMMAND [options]\n"
      "Measures; compare figures of one machine only.\n\ncommands:\n";
  for (const Command& command : kCommands) {
    std::string name = absl::StrCat("  ", command.name);
    name.resize(12, ' ');
    absl::StrAppend(&text, name, command.summary, "\n");
  }
  return text + "\nstretto-bench COMMAND --help lists its options.\n";
}

}  // namespace

absl::Status Results::Write(const std::string& path) const {
  if (path.empty()) return absl::OkStatus();
  STRETTO_RETURN_IF_ERROR(CheckNoPipe(path));
  Json json = {{"program", "stretto-bench"},
               {"command", command},
               {"device", device},
               {"ranks", ranks},
               {"results", results}};
  std::ofstream file(path);
  file << json.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
  file.close();
  if (!file) {
    return absl::UnavailableError(absl::StrCat("the results cannot be written to ", path,
                                               "; check the folder and the space on its disk"));
  }
  return absl::OkStatus();
}

std::string Draft(const std::string& path) {
  std::error_code ignored;
  const auto status = std::filesystem::symlink_status(path, ignored);
  const bool replaceable = std::filesystem::is_regular_file(status) ||
                           status.type() == std::filesystem::file_type::not_found;
  return replaceable ? path + ".tmp" : path;
}

absl::Status CheckWritable(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  const std::string draft = Draft(path);
  if (draft != path) {
    const absl::Status written = WriteTextFile(draft, "");
    std::remove(draft.c_str());
    return written;
  }
  STRETTO_RETURN_IF_ERROR(CheckNoPipe(path));
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored))
    errno = EISDIR;
  else if (access(path.c_str(), W_OK) == 0)
    return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(path, " could not be written: ", std::strerror(errno)));
}

int Fail(const absl::Status& status, int code) {
  std::fflush(stdout);
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return code;
}

absl::StatusOr<TrainConfig> LoadOne(const std::string& subcommand,
                                    const std::vector<std::string>& files,
                                    const std::vector<std::string>& sets) {
  if (files.size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("stretto-bench ", subcommand, " needs one configuration file; see --help"));
  }
  TrainConfig config;
  STRETTO_RETURN_IF_ERROR(LoadConfig(files[0], sets, ConfigRef(&config)));
  return config;
}

absl::Status SameEverywhere(World& world, TrainConfig config, const std::string& options) {
  const std::string mine = absl::StrCat(PrintConfig(ConfigRef(&config)), options);
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("options", absl::StrCat(StableHash(mine))));
  absl::Status same;
  for (int r = 1; r < world.size() && same.ok(); ++r) {
    if (all[static_cast<size_t>(r)] == all[0]) continue;
    same = absl::FailedPreconditionError(
        absl::StrCat("rank ", r, " was started with another configuration or other options than ",
                     "rank 0; give all ranks the same file and options"));
  }
  return world.Agree("comparing options", same);
}

absl::Status CheckOutput(World& world, const std::string& path) {
  return world.Agree("opening the output",
                     world.rank() == 0 ? CheckWritable(path) : absl::OkStatus());
}

void Tell(const World& world, const std::string& line) {
  if (world.rank() != 0) return;
  std::fprintf(stderr, "stretto-bench: %s\n", line.c_str());
}

int RunInWorld(const std::function<absl::Status(World&)>& work) {
  auto world = World::Create({});
  if (!world.ok()) return Fail(world.status(), ExitCodeOf(world.status()));
  const absl::Status status = work(**world);
  if (status.ok()) return EndProgram(status);
  // One rank speaks for all where all know, and all leave together.
  const bool agreed = IsAgreed(status);
  const int code = agreed ? ExitCodeOf(status) : kFailed;
  if (!agreed || (*world)->rank() == 0) Fail(status, code);
  if (agreed) return code;
  // Rank 0's holds the control plane, where others look for the reason.
  if ((*world)->failed()) world->reset();
  std::fflush(stdout);
  _exit(kFailed);
}

absl::StatusOr<Device> ChooseDevice(const std::string& device, int local_rank) {
  if (device == "cpu") return Device::Cpu();
  const absl::StatusOr<DeviceInfo> info = DescribeDevice(Device::Cuda(local_rank));
  if (info.ok()) return Device::Cuda(local_rank);
  if (device == "cuda") return info.status();
  // A machine with too few GPUs is an error: some ranks on GPUs and some not measures nothing.
  if (local_rank > 0 && DescribeDevice(Device::Cuda(0)).ok()) return info.status();
  return Device::Cpu();
}

namespace {

int Main(int argc, const char* const* argv) {
  if (argc < 2) {
    return Fail(absl::InvalidArgumentError("stretto-bench needs a command; see --help"), kUsage);
  }
  const std::string name = argv[1];
  if (name == "--help" || name == "-h") return EndProgram(PrintText(Help()));
  SetLogLevel(LogLevel::kWarning);
  std::vector<std::string> names;
  for (const Command& command : kCommands) {
    if (name == command.name) return command.run(argc - 1, argv + 1);
    names.push_back(command.name);
  }
  const std::string nearest = NearestName(name, names);
  return Fail(absl::InvalidArgumentError(absl::StrCat(
                  "stretto-bench does not know '", name, "'",
                  nearest.empty() ? "; see --help" : "; did you mean " + nearest + "?")),
              kUsage);
}

}  // namespace
}  // namespace stretto::bench

int main(int argc, char** argv) { return stretto::bench::Main(argc, argv); }
