#include "stretto/observe/progress.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "src/observe/file.h"

namespace stretto {
namespace {

// Lines of a fixed length, each with "name microseconds step", filled with blanks.
constexpr int kLine = 64;
enum Line { kMet, kRestored, kFirstStep, kBeat };

}  // namespace

std::string ProgressPath(const std::string& directory, int rank) {
  return absl::StrCat(directory, "/rank-", rank, ".progress");
}

absl::StatusOr<ProgressFile> ProgressFile::Create(const std::string& directory, int rank) {
  const std::string path = ProgressPath(directory, rank);
  ProgressFile file;
  file.descriptor_ = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file.descriptor_ < 0) {
    return observe_internal::FileError("opened for writing", path, errno);
  }
  return file;
}

ProgressFile::~ProgressFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

void ProgressFile::Write(int line, const char* name, int64_t step) {
  if (descriptor_ < 0) return;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  char text[kLine + 1];
  const int64_t microseconds = int64_t{now.tv_sec} * 1000000 + now.tv_nsec / 1000;
  const int length =
      std::snprintf(text, sizeof(text), "%.16s %" PRId64 " %" PRId64, name, microseconds, step);
  for (int i = length; i < kLine - 1; ++i) text[i] = ' ';
  text[kLine - 1] = '\n';
  [[maybe_unused]] const ssize_t written = pwrite(descriptor_, text, kLine, off_t{kLine} * line);
}

void ProgressFile::Met() { Write(kMet, "met", 0); }
void ProgressFile::Restored(int64_t step) {
  Write(kRestored, "restored", step);
  Write(kBeat, "restored", step);
}
void ProgressFile::Step(int64_t step) {
  if (!stepped_) Write(kFirstStep, "first", step);
  stepped_ = true;
  Write(kBeat, "step", step);
}
void ProgressFile::Beat(const char* doing, int64_t step) { Write(kBeat, doing, step); }

RankProgress ParseProgress(const std::string& text) {
  RankProgress progress;
  for (int line = kMet; line <= kBeat; ++line) {
    const size_t begin = static_cast<size_t>(line) * kLine;
    if (text.size() < begin + kLine) break;
    std::istringstream words(text.substr(begin, kLine));
    std::string name;
    int64_t microseconds = 0, step = 0;
    if (!(words >> name >> microseconds >> step)) continue;  // a hole: not marked yet
    const double time = static_cast<double>(microseconds) * 1e-6;
    if (line == kMet) {
      progress.met = time;
    } else if (line == kRestored) {
      progress.restored = time;
      progress.restored_step = step;
    } else if (line == kFirstStep) {
      progress.first_step = time;
    } else {
      progress.beat = time;
      progress.step = step;
      progress.doing = name;
    }
  }
  return progress;
}

absl::Status WriteJobFacts(const std::string& directory, const JobFacts& facts) {
  const nlohmann::ordered_json j = {{"output", facts.output},
                                    {"flight_directory", facts.flight_directory},
                                    {"dp", facts.dp},
                                    {"pp", facts.pp},
                                    {"tp", facts.tp},
                                    {"cp", facts.cp},
                                    {"dp_fixed", facts.dp_fixed}};
  return observe_internal::ReplaceFile(
      directory + "/job.json",
      j.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

std::optional<JobFacts> ReadJobFacts(const std::string& directory) {
  std::ifstream file(directory + "/job.json");
  if (!file) return std::nullopt;
  const nlohmann::json j = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!j.is_object()) return std::nullopt;
  for (const char* key : {"output", "flight_directory"}) {
    if (!j.contains(key) || !j[key].is_string()) return std::nullopt;
  }
  for (const char* key : {"dp", "pp", "tp", "cp"}) {
    if (!j.contains(key) || !j[key].is_number_integer() || j[key].get<int64_t>() < 1) {
      return std::nullopt;
    }
  }
  if (!j.contains("dp_fixed") || !j["dp_fixed"].is_boolean()) return std::nullopt;
  return JobFacts{.output = j["output"].get<std::string>(),
                  .flight_directory = j["flight_directory"].get<std::string>(),
                  .dp = j["dp"].get<int64_t>(),
                  .pp = j["pp"].get<int64_t>(),
                  .tp = j["tp"].get<int64_t>(),
                  .cp = j["cp"].get<int64_t>(),
                  .dp_fixed = j["dp_fixed"].get<bool>()};
}

}  // namespace stretto
