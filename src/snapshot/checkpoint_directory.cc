#include "src/snapshot/checkpoint_directory.h"

#include <fcntl.h>
#include <stdio.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/snapshot/file_io.h"
#include "stretto/core/log.h"

namespace stretto::snapshot_internal {
namespace {

namespace fs = std::filesystem;

constexpr char kPrefix[] = "step-";

const char* Temporary(StepWriter writer) {
  return writer == StepWriter::kKeeper ? ".keeper.tmp" : ".tmp";
}

// "step-00000100" + suffix -> 100.
bool ParseStep(const std::string& name, const std::string& suffix, int64_t* step) {
  const std::string prefix = kPrefix;
  if (name.size() < prefix.size() + 8 + suffix.size() ||
      name.compare(0, prefix.size(), prefix) != 0 ||
      name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) {
    return false;
  }
  const std::string digits =
      name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
  return digits.find_first_not_of("0123456789") == std::string::npos &&
         absl::SimpleAtoi(digits, step);
}

absl::Status RemoveAll(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) return IoError(error.value(), "remove", path);
  return absl::OkStatus();
}

absl::Status Rename(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) {
    return IoError(errno, absl::StrCat("rename ", from, " to"), to);
  }
  return absl::OkStatus();
}

absl::Status RemoveCommitted(const std::string& root, int64_t step, StepWriter writer) {
  STRETTO_RETURN_IF_ERROR(RemoveTemporary(root, step, writer));
  const absl::Status renamed = Rename(StepPath(root, step), TemporaryPath(root, step, writer));
  std::error_code ignored;
  if (!renamed.ok() && !fs::exists(StepPath(root, step), ignored)) return absl::OkStatus();
  STRETTO_RETURN_IF_ERROR(renamed);
  return RemoveTemporary(root, step, writer);
}

}  // namespace

std::string StepPath(const std::string& root, int64_t step) {
  return absl::StrFormat("%s/%s%08d", root, kPrefix, step);
}

std::string TemporaryPath(const std::string& root, int64_t step, StepWriter writer) {
  return StepPath(root, step) + Temporary(writer);
}

absl::StatusOr<std::vector<int64_t>> ListSteps(const std::string& root) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(root));
  std::vector<int64_t> steps;
  for (const std::string& name : names) {
    int64_t step = 0;
    std::error_code ignored;
    const std::string path = absl::StrCat(root, "/", name);
    // The name must be the one that this step is given, so that no step appears twice.
    if (ParseStep(name, "", &step) && StepPath(root, step) == path &&
        fs::is_directory(path, ignored)) {
      steps.push_back(step);
    }
  }
  std::sort(steps.begin(), steps.end(), std::greater<>());
  return steps;
}

absl::Status PrepareTemporary(const std::string& root, int64_t step, StepWriter writer) {
  STRETTO_RETURN_IF_ERROR(MakeDirectories(root));
  STRETTO_RETURN_IF_ERROR(RemoveTemporary(root, step, writer));
  return MakeDirectories(TemporaryPath(root, step, writer));
}

absl::Status CommitTemporary(const std::string& root, int64_t step, StepWriter writer) {
  const std::string temporary = TemporaryPath(root, step, writer);
  const std::string final_path = StepPath(root, step);
  STRETTO_RETURN_IF_ERROR(SyncDirectory(temporary));
  std::error_code error;
  if (!fs::exists(final_path, error)) {
    const absl::Status renamed = Rename(temporary, final_path);
    if (renamed.ok()) return SyncDirectory(root);
    if (!fs::exists(final_path, error)) return renamed;
  }
  // The run went back and passed this step again, or another writer was faster.
  if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, final_path.c_str(), RENAME_EXCHANGE) != 0) {
    const std::string old = final_path + ".old" + Temporary(writer);
    STRETTO_RETURN_IF_ERROR(RemoveAll(old));
    STRETTO_RETURN_IF_ERROR(Rename(final_path, old));
    STRETTO_RETURN_IF_ERROR(Rename(temporary, final_path));
    STRETTO_RETURN_IF_ERROR(RemoveAll(old));
    return SyncDirectory(root);
  }
  STRETTO_RETURN_IF_ERROR(SyncDirectory(root));
  return RemoveTemporary(root, step, writer);
}

absl::Status RemoveTemporary(const std::string& root, int64_t step, StepWriter writer) {
  return RemoveAll(TemporaryPath(root, step, writer));
}

void Prune(const std::string& root, int64_t step, int keep, fs::file_time_type started,
           const std::set<int64_t>& damaged, StepWriter writer) {
  absl::StatusOr<std::vector<int64_t>> steps = ListSteps(root);
  if (!steps.ok()) {
    LogWarning(absl::StrCat("old checkpoints stay: ", steps.status().ToString()));
    return;
  }
  std::stable_partition(steps->begin(), steps->end(),
                        [&](int64_t other) { return damaged.count(other) == 0; });
  int kept = 1;  // `step`
  for (const int64_t other : *steps) {
    if (keep <= 0 || other == step || kept++ < keep) continue;
    const absl::Status removed = RemoveCommitted(root, other, writer);
    if (!removed.ok()) LogWarning(absl::StrCat("an old checkpoint stays: ", removed.ToString()));
  }

  const absl::StatusOr<std::vector<std::string>> names = ListDirectory(root);
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    int64_t other = 0;
    if (!ParseStep(name, Temporary(writer), &other) &&
        !ParseStep(name, std::string(".old") + Temporary(writer), &other)) {
      continue;
    }
    std::error_code unknown;
    const std::string path = absl::StrCat(root, "/", name);
    const fs::file_time_type changed = fs::last_write_time(path, unknown);
    if (other >= step && (unknown || changed >= started)) continue;
    const absl::Status removed = RemoveAll(path);
    if (!removed.ok()) LogWarning(absl::StrCat("a stale directory stays: ", removed.ToString()));
  }
}

}  // namespace stretto::snapshot_internal
