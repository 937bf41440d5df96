#include <fcntl.h>
#include <isa-l/crc.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/observe/file.h"
#include "stretto/observe/metrics.h"

namespace stretto {
namespace {

using observe_internal::FileError;
using observe_internal::MakeDirectories;
using observe_internal::UnixSeconds;
using observe_internal::WriteAll;

// --- Protocol buffers, as far as event files need them ---
enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void AppendVarint(uint64_t value, std::string* out) {
  while (value >= 0x80) {
    out->push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  out->push_back(static_cast<char>(value));
}

void AppendTag(uint32_t field, WireType type, std::string* out) {
  AppendVarint((field << 3) | type, out);
}

template <class T>
void AppendLittleEndian(T value, std::string* out) {
  static_assert(std::endian::native == std::endian::little);
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out->append(bytes, sizeof(T));
}

void AppendBytes(uint32_t field, const std::string& bytes, std::string* out) {
  AppendTag(field, kBytes, out);
  AppendVarint(bytes.size(), out);
  out->append(bytes);
}

// Fields of tensorflow.Event and the messages in it.
constexpr uint32_t kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5,
                   kEventSessionLog = 7;
constexpr uint32_t kSummaryValue = 1, kValueTag = 1, kValueSimple = 2;
constexpr uint32_t kSessionLogStatus = 1, kSessionStart = 1;

std::string EventHeader(int64_t step) {
  std::string event;
  AppendTag(kEventWallTime, kFixed64, &event);
  AppendLittleEndian(UnixSeconds(), &event);
  if (step != 0) {
    AppendTag(kEventStep, kVarint, &event);
    AppendVarint(static_cast<uint64_t>(step), &event);
  }
  return event;
}

void AppendScalar(const char* tag, double value, std::string* summary) {
  std::string entry;
  AppendBytes(kValueTag, tag, &entry);
  AppendTag(kValueSimple, kFixed32, &entry);
  AppendLittleEndian(static_cast<float>(value), &entry);
  AppendBytes(kSummaryValue, entry, summary);
}

// --- TFRecord ---
// CRC-32C, rotated and offset, because a CRC of data that holds its own CRC is weak.
uint32_t MaskedCrc(const std::string& data) {
  auto* bytes = reinterpret_cast<unsigned char*>(const_cast<char*>(data.data()));
  const uint32_t crc = ~crc32_iscsi(bytes, static_cast<int>(data.size()), 0xffffffffu);
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

std::string Frame(const std::string& data) {
  std::string out;
  AppendLittleEndian(static_cast<uint64_t>(data.size()), &out);
  AppendLittleEndian(MaskedCrc(out), &out);
  out.append(data);
  AppendLittleEndian(MaskedCrc(data), &out);
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TensorBoardSink>> TensorBoardSink::Open(const std::string& directory,
                                                                       int64_t first_step) {
  STRETTO_RETURN_IF_ERROR(MakeDirectories(directory));
  char host[256] = "host";
  if (gethostname(host, sizeof(host)) != 0 || host[0] == '\0') std::strcpy(host, "host");
  host[sizeof(host) - 1] = '\0';
  static std::atomic<int> next{0};
  // TensorBoard reads the files of a directory in the order of their names: by start time.
  const std::string path =
      absl::StrFormat("%s/events.out.tfevents.%010d.%s.%d.%d", directory.empty() ? "." : directory,
                      static_cast<int64_t>(UnixSeconds()), host, getpid(), next.fetch_add(1));
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("created", path, errno);
  std::unique_ptr<TensorBoardSink> sink(new TensorBoardSink(path, fd));

  std::string version = EventHeader(0);
  AppendBytes(kEventFileVersion, "brain.Event:2", &version);
  std::string start = Frame(version);
  std::string log;
  AppendTag(kSessionLogStatus, kVarint, &log);
  AppendVarint(kSessionStart, &log);
  std::string session = EventHeader(first_step);
  AppendBytes(kEventSessionLog, log, &session);
  start += Frame(session);
  STRETTO_RETURN_IF_ERROR(WriteAll(fd, path, start));
  return sink;
}

TensorBoardSink::~TensorBoardSink() { (void)Finish(); }

absl::Status TensorBoardSink::Write(const StepStats& s) {
  if (fd_ < 0) {
    return absl::FailedPreconditionError(absl::StrCat(path_, " was finished; nothing can follow."));
  }
  std::string summary;
  AppendScalar("train/loss", s.loss, &summary);
  AppendScalar("train/grad_norm", s.grad_norm, &summary);
  AppendScalar("train/lr", s.lr, &summary);
  AppendScalar("train/skipped_total", static_cast<double>(s.skipped_total), &summary);
  if (s.eval_loss) AppendScalar("eval/loss", *s.eval_loss, &summary);
  AppendScalar("perf/tokens_per_second", s.tokens_per_second, &summary);
  AppendScalar("perf/step_ms", s.step_ms, &summary);
  AppendScalar("perf/data_ms", s.data_ms, &summary);
  AppendScalar("perf/forward_ms", s.forward_ms, &summary);
  AppendScalar("perf/backward_ms", s.backward_ms, &summary);
  AppendScalar("perf/update_ms", s.update_ms, &summary);
  AppendScalar("perf/comm_exposed_ms", s.comm_exposed_ms, &summary);
  AppendScalar("perf/exposed_data_ms", s.exposed_data_ms, &summary);
  AppendScalar("perf/exposed_tensor_ms", s.exposed_tensor_ms, &summary);
  AppendScalar("perf/exposed_context_ms", s.exposed_context_ms, &summary);
  AppendScalar("perf/exposed_pipeline_ms", s.exposed_pipeline_ms, &summary);
  AppendScalar("perf/exposed_world_ms", s.exposed_world_ms, &summary);
  AppendScalar("perf/exposed_snapshot_ms", s.exposed_snapshot_ms, &summary);
  if (s.mfu_causal > 0) AppendScalar("perf/mfu_causal", s.mfu_causal, &summary);
  if (s.mfu_palm > 0) AppendScalar("perf/mfu_palm", s.mfu_palm, &summary);
  if (s.memory_bytes > 0) {
    AppendScalar("perf/memory_gib", static_cast<double>(s.memory_bytes) / (1 << 30), &summary);
  }
  std::string event = EventHeader(s.step);
  AppendBytes(kEventSummary, summary, &event);
  return WriteAll(fd_, path_, Frame(event));
}

absl::Status TensorBoardSink::Finish() {
  const int fd = std::exchange(fd_, -1);
  if (fd >= 0 && close(fd) != 0) return FileError("written", path_, errno);
  return absl::OkStatus();
}

}  // namespace stretto
