#include "stretto/observe/step_trace.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/observe/file.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

using observe_internal::FileError;
using observe_internal::WriteAll;

// Rows from the top; those of communication follow.
constexpr const char* kRows[] = {"steps", "host", "compute", "exposed"};

int PlaceOf(const TraceSlice& slice) {
  const auto* row = std::find(std::begin(kRows), std::end(kRows), slice.row);
  return static_cast<int>(row - std::begin(kRows));
}

// Refuses what a trace must not replace: anything but a trace or a name that is free.
absl::Status CheckReplaceable(const std::string& path) {
  std::error_code error;
  const std::filesystem::file_type type = std::filesystem::symlink_status(path, error).type();
  if (type == std::filesystem::file_type::not_found) return absl::OkStatus();
  bool trace = false;
  if (type == std::filesystem::file_type::regular) {
    std::ifstream file(path, std::ios::binary);
    std::string begin(std::char_traits<char>::length(kChromeTraceBegin), '\0');
    file.read(begin.data(), static_cast<std::streamsize>(begin.size()));
    trace = file.gcount() == 0 || begin == kChromeTraceBegin;
  }
  if (trace) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the trace would replace '", path,
      "', which is no trace; set metrics.trace_file to a new name or to that of an older trace"));
}

// A file that appears under its name when it is complete.
class Writer {
 public:
  explicit Writer(const std::string& path) : path_(path), temporary_(path + ".tmp") {
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd_ < 0) status_ = FileError("opened for writing", temporary_, errno);
  }
  ~Writer() {
    if (fd_ < 0) return;
    close(fd_);
    unlink(temporary_.c_str());
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  const absl::Status& status() const { return status_; }
  // After an error nothing is written any more.
  void Write(const std::string& text) {
    if (status_.ok()) status_ = WriteAll(fd_, temporary_, text);
  }
  absl::Status Finish() {
    STRETTO_RETURN_IF_ERROR(status_);
    if (close(std::exchange(fd_, -1)) != 0) status_ = FileError("written", temporary_, errno);
    if (status_.ok() && std::rename(temporary_.c_str(), path_.c_str()) != 0) {
      status_ = FileError("replaced", path_, errno);
    }
    if (!status_.ok()) unlink(temporary_.c_str());
    return status_;
  }

 private:
  std::string path_, temporary_;
  int fd_ = -1;
  absl::Status status_;
};

// What goes in front of a rank's part on its way to rank 0.
enum Header : int { kSize, kLost, kError, kHeader };

std::string End(int64_t error_ns, int64_t lost, int64_t ranks) {
  return ChromeTraceEnd({{"source", JsonString("measured")},
                         {"ranks", absl::StrCat(ranks)},
                         {"clock_error_us", absl::StrFormat("%.3f", 1e-3 * error_ns)},
                         {"lost_actions", absl::StrCat(lost)}});
}

void Report(const std::string& file, int64_t lost) {
  LogInfo(absl::StrCat("the trace is in ", file));
  if (lost > 0) {
    LogWarning(absl::StrCat(file, " lacks ", lost,
                            " actions for which there was no room, or of which the device did not "
                            "tell the time; trace fewer steps (metrics.trace_steps)"));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<StepTrace>> StepTrace::Create(Communicator& comm, Stream& stream,
                                                             const StepTraceOptions& options) {
  if (comm.world().rank() == 0) {
    const std::string parent = std::filesystem::path(options.file).parent_path().string();
    STRETTO_RETURN_IF_ERROR(observe_internal::MakeDirectories(parent));
    // Now rather than after the steps.
    STRETTO_RETURN_IF_ERROR(CheckReplaceable(options.file));
    STRETTO_RETURN_IF_ERROR(Writer(options.file).status());
  }
  auto trace = std::unique_ptr<StepTrace>(new StepTrace(comm, stream, options));
  trace->recorder_ = std::make_unique<TraceRecorder>(stream, options.capacity);
  return trace;
}

StepTrace::~StepTrace() {
  if (recorder_ == nullptr || !open_) return;
  int64_t lost = 0;
  Take(&lost);
}

absl::StatusOr<TraceRecorder*> StepTrace::BeginStep(int64_t step) {
  if (recorder_ == nullptr || step < options_.first_step ||
      step - options_.first_step >= options_.steps) {
    return nullptr;
  }
  if (!open_) {
    STRETTO_ASSIGN_OR_RETURN(clock_, AlignClocks(comm_, options_.clock));
    error_ns_ = clock_.error_ns + recorder_->Tie(stream_);
    // Rank 0's time now is the start of everybody's axis.
    int64_t start = options_.clock();
    const Tensor word = Tensor::Of(&start, DType::kI64, {1});
    STRETTO_RETURN_IF_ERROR(comm_.Wait(comm_.Broadcast(comm_.all(), word, 0, "trace")));
    origin_ns_ = start - clock_.offset_ns;
    open_ = true;
    comm_.SetTrace(recorder_.get());
  }
  recorder_->SetStep(step);
  step_action_ = recorder_->Open("steps", "step", absl::StrCat("step ", step).c_str());
  recorder_->Begin(step_action_);
  last_step_ = step;
  return recorder_.get();
}

bool StepTrace::EndStep() {
  if (recorder_ == nullptr || !open_) return false;
  recorder_->End(std::exchange(step_action_, -1));
  recorder_->SetStep(-1);
  return last_step_ - options_.first_step >= options_.steps - 1;
}

std::string StepTrace::Take(int64_t* lost) {
  comm_.SetTrace(nullptr);
  // Marks on the CPU are written by the stream; a GPU may never get there after an error.
  if (stream_.device().kind == DeviceKind::kCpu) stream_.Synchronize().IgnoreError();
  std::vector<TraceSlice> slices = recorder_->Slices(SteadyNanoseconds());
  for (TraceSlice& slice : slices) {
    slice.begin_ns -= origin_ns_;
    slice.end_ns -= origin_ns_;
  }
  std::stable_sort(slices.begin(), slices.end(), [](const TraceSlice& a, const TraceSlice& b) {
    return PlaceOf(a) < PlaceOf(b);
  });
  *lost = recorder_->lost();
  recorder_.reset();
  return ChromeTraceProcess(
      comm_.world().rank(), options_.process,
      absl::StrFormat("clock to %.1f us", 1e-3 * static_cast<double>(error_ns_)), slices);
}

absl::Status StepTrace::Close() {
  if (recorder_ == nullptr || !open_) return absl::OkStatus();
  std::array<int64_t, kHeader> header = {};
  std::string part = Take(&header[kLost]);
  header[kSize] = static_cast<int64_t>(part.size());
  header[kError] = error_ns_;
  const Group& all = comm_.all();
  const Tensor numbers = Tensor::Of(header.data(), DType::kI64, {kHeader});
  const auto bytes = [](std::string& text) {
    return Tensor::Of(text.data(), DType::kU8, {static_cast<int64_t>(text.size())});
  };
  if (all.index != 0) {
    STRETTO_RETURN_IF_ERROR(comm_.Wait(comm_.Send(all, numbers, 0, "trace")));
    return comm_.Wait(comm_.Send(all, bytes(part), 0, "trace"));
  }
  Writer writer(options_.file);
  writer.Write(kChromeTraceBegin);
  writer.Write(part);
  int64_t lost = header[kLost], error = header[kError];
  for (int rank = 1; rank < all.size(); ++rank) {
    STRETTO_RETURN_IF_ERROR(comm_.Wait(comm_.Receive(all, numbers, rank, "trace")));
    part.resize(static_cast<size_t>(header[kSize]));
    STRETTO_RETURN_IF_ERROR(comm_.Wait(comm_.Receive(all, bytes(part), rank, "trace")));
    writer.Write(kChromeTraceSeparator);
    writer.Write(part);
    lost += header[kLost];
    error = std::max(error, header[kError]);
  }
  writer.Write(End(error, lost, all.size()));
  STRETTO_RETURN_IF_ERROR(writer.Finish());
  Report(options_.file, lost);
  return absl::OkStatus();
}

absl::Status StepTrace::CloseAlone() {
  if (recorder_ == nullptr || !open_) return absl::OkStatus();
  int64_t lost = 0;
  const std::string part = Take(&lost);
  const std::string file = absl::StrCat(options_.file, ".rank", comm_.world().rank(), ".json");
  STRETTO_RETURN_IF_ERROR(
      observe_internal::MakeDirectories(std::filesystem::path(file).parent_path().string()));
  STRETTO_RETURN_IF_ERROR(CheckReplaceable(file));
  Writer writer(file);
  writer.Write(kChromeTraceBegin);
  writer.Write(part);
  writer.Write(End(error_ns_, lost, 1));
  STRETTO_RETURN_IF_ERROR(writer.Finish());
  Report(file, lost);
  return absl::OkStatus();
}

}  // namespace stretto
