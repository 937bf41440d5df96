#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/observe/file.h"
#include "stretto/core/read_file.h"
#include "stretto/observe/metrics.h"

namespace stretto {
namespace {

using observe_internal::FileError;
using observe_internal::MakeDirectories;
using observe_internal::ReplaceFile;
using observe_internal::UnixSeconds;
using observe_internal::WriteAll;

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  STRETTO_RETURN_IF_ERROR(CheckRegularFile("the file of metrics", path));
  std::ifstream in(path, std::ios::binary);
  if (!in) return FileError("read", path, errno == 0 ? EIO : errno);
  std::ostringstream text;
  text << in.rdbuf();
  if (in.bad()) return FileError("read", path, EIO);
  return std::move(text).str();
}

// The record of one line, or a discarded value when the line is damaged or has no step.
nlohmann::json ParseRecord(const std::string& line) {
  nlohmann::json record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  const bool good =
      record.is_object() && record.contains("step") && record["step"].is_number_integer();
  return good ? record : nlohmann::json(nlohmann::json::value_t::discarded);
}

// Calls visit(line, ends_with_newline) for each line.
template <class Visit>
void ForEachLine(const std::string& text, Visit visit) {
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) {
      visit(text.substr(begin), false);
      return;
    }
    visit(text.substr(begin, end - begin), true);
    begin = end + 1;
  }
}

}  // namespace

std::string StepStatsJson(const StepStats& s, double unix_seconds) {
  // JSON has no NaN and no infinity: nlohmann writes both as null.
  nlohmann::ordered_json record;
  record["step"] = s.step;
  record["loss"] = s.loss;
  record["grad_norm"] = s.grad_norm;
  record["lr"] = s.lr;
  record["tokens"] = s.tokens;
  record["tokens_per_second"] = s.tokens_per_second;
  record["step_ms"] = s.step_ms;
  // A peak that nobody knows is no utilisation of zero.
  if (s.mfu_causal > 0) {
    record["mfu_causal"] = s.mfu_causal;
  } else {
    record["mfu_causal"] = nullptr;
  }
  if (s.mfu_palm > 0) {
    record["mfu_palm"] = s.mfu_palm;
  } else {
    record["mfu_palm"] = nullptr;
  }
  if (s.memory_bytes > 0) {
    record["memory_bytes"] = s.memory_bytes;
  } else {
    record["memory_bytes"] = nullptr;  // of a step that another process has done
  }
  record["skipped"] = s.skipped;
  record["skipped_total"] = s.skipped_total;
  if (s.eval_loss) record["eval_loss"] = *s.eval_loss;
  record["data_ms"] = s.data_ms;
  record["forward_ms"] = s.forward_ms;
  record["backward_ms"] = s.backward_ms;
  record["update_ms"] = s.update_ms;
  record["comm_exposed_ms"] = s.comm_exposed_ms;
  record["exposed_data_ms"] = s.exposed_data_ms;
  record["exposed_tensor_ms"] = s.exposed_tensor_ms;
  record["exposed_context_ms"] = s.exposed_context_ms;
  record["exposed_pipeline_ms"] = s.exposed_pipeline_ms;
  record["exposed_world_ms"] = s.exposed_world_ms;
  record["exposed_snapshot_ms"] = s.exposed_snapshot_ms;
  record["time"] = unix_seconds;
  return record.dump();
}

absl::StatusOr<std::unique_ptr<JsonLinesSink>> JsonLinesSink::Open(const std::string& path,
                                                                   int64_t first_step) {
  STRETTO_RETURN_IF_ERROR(MakeDirectories(std::filesystem::path(path).parent_path().string()));
  std::error_code ignored;
  int64_t newest = 0;
  if (std::filesystem::exists(path, ignored)) {
    STRETTO_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    std::string kept;
    ForEachLine(text, [&](const std::string& line, bool whole) {
      const nlohmann::json record = ParseRecord(line);
      if (!whole || record.is_discarded() || record["step"].get<int64_t>() >= first_step) return;
      absl::StrAppend(&kept, line, "\n");
      newest = record["step"].get<int64_t>();
    });
    if (kept != text) STRETTO_RETURN_IF_ERROR(ReplaceFile(path, kept));
  }
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("opened for writing", path, errno);
  return std::unique_ptr<JsonLinesSink>(new JsonLinesSink(path, fd, newest));
}

JsonLinesSink::~JsonLinesSink() { (void)Finish(); }

absl::Status JsonLinesSink::Write(const StepStats& stats) {
  if (fd_ < 0) {
    return absl::FailedPreconditionError(absl::StrCat(path_, " was finished; nothing can follow."));
  }
  newest_ = stats.step;
  return WriteAll(fd_, path_, absl::StrCat(StepStatsJson(stats, UnixSeconds()), "\n"));
}

absl::Status JsonLinesSink::Finish() {
  const int fd = std::exchange(fd_, -1);
  if (fd >= 0 && close(fd) != 0) return FileError("written", path_, errno);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<LossPoint>> ReadLossPoints(const std::string& metrics_jsonl) {
  STRETTO_ASSIGN_OR_RETURN(const std::string text, ReadFile(metrics_jsonl));
  std::vector<LossPoint> points;
  ForEachLine(text, [&](const std::string& line, bool) {
    const nlohmann::json record = ParseRecord(line);
    if (record.is_discarded()) return;
    LossPoint point;
    point.step = record["step"].get<int64_t>();
    point.train = std::numeric_limits<double>::quiet_NaN();
    const auto skipped = record.find("skipped");
    const bool applied = skipped == record.end() || !skipped->is_boolean() || !skipped->get<bool>();
    const auto loss = record.find("loss");
    if (applied && loss != record.end() && loss->is_number()) point.train = loss->get<double>();
    const auto eval = record.find("eval_loss");
    if (eval != record.end() && eval->is_number()) point.validation = eval->get<double>();
    points.push_back(point);
  });
  return points;
}

}  // namespace stretto
