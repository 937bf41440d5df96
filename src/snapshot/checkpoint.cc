#include "stretto/snapshot/checkpoint.h"

#include <atomic>
#include <cstring>
#include <filesystem>
#include <limits>
#include <new>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/format.h"
#include "src/core/start_thread.h"
#include "src/snapshot/checkpoint_directory.h"
#include "src/snapshot/json.h"
#include "src/snapshot/manifest.h"
#include "src/snapshot/safetensors_writer.h"
#include "stretto/core/copy.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

using nlohmann::json;
using snapshot_internal::CommitTemporary;
using snapshot_internal::DumpJson;
using snapshot_internal::FilesOf;
using snapshot_internal::IndexShards;
using snapshot_internal::kManifestName;
using snapshot_internal::Manifest;
using snapshot_internal::ManifestFile;
using snapshot_internal::ManifestToJson;
using snapshot_internal::ParseJson;
using snapshot_internal::PrepareTemporary;
using snapshot_internal::Prune;
using snapshot_internal::RemoveTemporary;
using snapshot_internal::ShardFileName;
using snapshot_internal::ShardMetadata;
using snapshot_internal::TemporaryPath;
using snapshot_internal::WriteSafetensorsFile;
using snapshot_internal::WriteWholeFile;
using snapshot_internal::WrittenFile;

// How long a writer that is destroyed in the middle of a write waits for other ranks.
constexpr auto kGrace = std::chrono::seconds(5);

// What one rank tells the others over the control plane: a status, the step that it is at, and the
// files that it has written.
struct Report {
  absl::Status status;
  int64_t step = 0;
  std::vector<WrittenFile> files;
};

std::string Encode(const Report& report) {
  std::string message(report.status.message());
  json value = {{"code", static_cast<int>(report.status.code())},
                {"message", message},
                {"step", report.step}};
  json& files = value["files"] = json::array();
  for (const WrittenFile& file : report.files) {
    files.push_back({{"bytes", file.bytes}, {"digest", file.digest}});
  }
  // A file name in the message may be anything but UTF-8.
  return value.dump(-1, ' ', true, json::error_handler_t::replace);
}

absl::StatusOr<Report> Decode(const std::string& text) {
  STRETTO_ASSIGN_OR_RETURN(const json value, ParseJson(text, "checkpoint report"));
  Report report;
  try {
    report.status = absl::Status(static_cast<absl::StatusCode>(value.at("code").get<int>()),
                                 value.at("message").get<std::string>());
    report.step = value.at("step").get<int64_t>();
    for (const json& file : value.at("files")) {
      report.files.push_back({file.at("bytes").get<int64_t>(), file.at("digest").get<uint64_t>()});
    }
  } catch (const json::exception& e) {
    return absl::InternalError(absl::StrCat("checkpoint report: ", WithoutJsonTag(e.what())));
  }
  return report;
}

// `status` with the rank in front, once.
absl::Status FromRank(int rank, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrCat("rank ", rank, ": ", std::string(status.message())));
}

// One save as the thread that writes it needs it.
struct Job {
  absl::Status staged;  // why this rank cannot save, found while staging
  int64_t step = 0;
  int64_t number = 0;  // of this save among those of the writer
  struct File {
    std::vector<SafetensorsItem> items;
    std::map<std::string, std::string> metadata;
  };
  std::vector<File> files;
  std::string trainer_state;
};

}  // namespace

struct CheckpointWriter::Impl {
  Impl(World& world, CheckpointOptions options)
      : world(world),
        options(std::move(options)),
        started(std::filesystem::file_time_type::clock::now()) {}

  // Fills the job from the registry; an error goes into job->staged, so that this rank still takes
  // part in the agreement and the others do not wait for it in vain.
  void Stage(const StateRegistry& registry, Job* job);
  absl::Status StageTensors(const StateRegistry& registry, Job* job);
  // Writes, agrees, commits.
  absl::Status Run(const Job& job);
  absl::Status Commit(const Job& job, const std::vector<std::vector<WrittenFile>>& files);
  absl::StatusOr<Report> WaitFor(const std::string& key, int rank, const std::string& what,
                                 std::chrono::milliseconds more = {});
  // An error of the control plane, with what this rank did.
  absl::Status Saving(int64_t step, const absl::Status& status) const;
  // Waits for the write in progress and returns its result; OK when there is none.
  absl::Status Join();

  World& world;
  const CheckpointOptions options;
  const std::filesystem::file_time_type started;
  std::set<int64_t> damaged;  // steps of the directory that rotation does not count
  std::string prefix;         // of this writer's keys; empty before the first save
  int64_t saves = 0;
  std::unique_ptr<char[]> staging;
  int64_t staging_bytes = 0;
  std::thread thread;
  absl::Status thread_result;  // written by the thread, read after it was joined
  absl::Status first_error;    // since the last Finish
  std::atomic<int64_t> committed{-1};
  // When waits for other ranks end whatever the time-out, in ticks of the steady clock.
  std::atomic<int64_t> last_call{std::numeric_limits<int64_t>::max()};
};

absl::Status CheckpointWriter::Impl::StageTensors(const StateRegistry& registry, Job* job) {
  int64_t total = 0;
  bool copy = options.async;  // what lies on a device passes through the host anyway
  std::vector<Tensor> sources;
  for (const std::vector<const StateEntry*>& entries : FilesOf(registry)) {
    Job::File& file = job->files.emplace_back();
    for (const StateEntry* entry : entries) {
      const Tensor& local = entry->local;
      copy = copy || local.device.kind != DeviceKind::kCpu;
      sources.push_back(local);
      SafetensorsItem item;
      item.name = entry->name;
      item.dtype = entry->dtype;
      item.shape.assign(local.dims.begin(), local.dims.begin() + local.rank);
      item.data = local.data;
      total += local.bytes();
      file.items.push_back(std::move(item));
    }
    STRETTO_ASSIGN_OR_RETURN(file.metadata, ShardMetadata(registry, entries));
  }
  if (!copy) return absl::OkStatus();

  if (total > staging_bytes) {
    staging.reset();
    staging_bytes = 0;
    staging.reset(new (std::nothrow) char[total]);
    if (staging == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no memory for a staging buffer of ", total,
                       " bytes; on a CPU checkpoint.async=false does without"));
    }
    staging_bytes = total;
  }
  char* cursor = staging.get();
  size_t i = 0;
  for (Job::File& file : job->files) {
    for (SafetensorsItem& item : file.items) {
      STRETTO_RETURN_IF_ERROR(CopyToHost(cursor, sources[i]));
      item.data = cursor;
      cursor += sources[i++].bytes();
    }
  }
  return absl::OkStatus();
}

void CheckpointWriter::Impl::Stage(const StateRegistry& registry, Job* job) {
  job->staged = StageTensors(registry, job);
  if (!job->staged.ok()) return;
  if (job->step < 0) {
    job->staged = absl::InvalidArgumentError(absl::StrCat("step ", job->step, " is negative"));
    return;
  }
  if (world.rank() != 0) return;
  const absl::StatusOr<json> state = ParseJson(job->trainer_state, "trainer state");
  if (!state.ok()) {
    job->staged = state.status();
  } else if (!state->is_object()) {
    job->staged = absl::InvalidArgumentError("the trainer state is no JSON object");
  }
}

absl::Status CheckpointWriter::Impl::Saving(int64_t step, const absl::Status& status) const {
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrCat(std::string(status.message()), " while rank ", world.rank(),
                                   " took part in the checkpoint of step ", step));
}

absl::StatusOr<Report> CheckpointWriter::Impl::WaitFor(const std::string& key, int rank,
                                                       const std::string& what,
                                                       std::chrono::milliseconds more) {
  const auto deadline = std::chrono::steady_clock::now() + options.timeout + more;
  while (true) {
    // Short waits, to look between them whether the rank still lives.
    const absl::StatusOr<std::string> value =
        world.store().Get(key, std::chrono::milliseconds(500));
    if (value.ok()) return Decode(*value);
    if (!absl::IsDeadlineExceeded(value.status())) {
      return absl::Status(value.status().code(),
                          absl::StrCat(std::string(value.status().message()), " before rank ", rank,
                                       " had ", what));
    }
    for (const char* gone : {"dead/", "left/"}) {
      if (!world.store().TryGet(absl::StrCat(gone, rank)).ok()) continue;
      // It may have reported just before it left.
      const absl::StatusOr<std::string> last = world.store().TryGet(key);
      if (last.ok()) return Decode(*last);
      return absl::UnavailableError(
          absl::StrCat("rank ", rank, " died or left before it had ", what));
    }
    const auto now = std::chrono::steady_clock::now();
    if (now.time_since_epoch().count() > last_call.load()) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", rank, " has not ", what, " before this rank gave up"));
    }
    if (now > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", rank, " has not ", what, " within ",
                       std::chrono::duration_cast<std::chrono::seconds>(options.timeout).count(),
                       " s; look whether it hangs or its disk is slow"));
    }
  }
}

absl::Status CheckpointWriter::Impl::Commit(const Job& job,
                                            const std::vector<std::vector<WrittenFile>>& files) {
  const std::string temporary = TemporaryPath(options.directory, job.step);
  Manifest manifest;
  manifest.step = job.step;
  manifest.world_size = world.size();
  manifest.trainer_state = job.trainer_state;
  for (int rank = 0; rank < world.size(); ++rank) {
    const std::vector<WrittenFile>& of_rank = files[static_cast<size_t>(rank)];
    for (size_t k = 0; k < of_rank.size(); ++k) {
      manifest.files.push_back(
          {ShardFileName(rank, static_cast<int>(k), static_cast<int>(of_rank.size())),
           of_rank[k].bytes, of_rank[k].digest, rank});
    }
  }
  STRETTO_RETURN_IF_ERROR(IndexShards(temporary, &manifest));
  STRETTO_ASSIGN_OR_RETURN(const std::string text, ManifestToJson(manifest));
  STRETTO_RETURN_IF_ERROR(
      WriteWholeFile(absl::StrCat(temporary, "/", kManifestName), text).status());
  STRETTO_RETURN_IF_ERROR(CommitTemporary(options.directory, job.step));
  damaged.erase(job.step);  // replaced by a whole one
  Prune(options.directory, job.step, options.keep, started, damaged);
  return absl::OkStatus();
}

// Order of events: rank 0 makes the directory and says so ("begin"); every rank writes its file and
// reports; rank 0 commits when all reports are good and tells the outcome. A rank that cannot write
// reports that instead, and the last report is awaited even then, since the directory may only be
// removed when nobody writes into it any more.
absl::Status CheckpointWriter::Impl::Run(const Job& job) {
  Store& store = world.store();
  const int rank = world.rank();
  const std::string save = absl::StrCat(prefix, job.number, "/");
  const std::string of_step = absl::StrCat(" of the checkpoint of step ", job.step);

  Report begin;
  begin.step = job.step;
  if (rank == 0) {
    begin.status = job.staged.ok() ? PrepareTemporary(options.directory, job.step) : job.staged;
    begin.status = FromRank(0, begin.status);
    STRETTO_RETURN_IF_ERROR(Saving(job.step, store.Set(save + "begin", Encode(begin))));
  } else {
    STRETTO_ASSIGN_OR_RETURN(begin, WaitFor(save + "begin", 0, "made the directory" + of_step));
  }
  STRETTO_RETURN_IF_ERROR(begin.status);

  Report mine;
  mine.step = job.step;
  mine.status = job.staged;
  if (mine.status.ok() && begin.step != job.step) {
    mine.status = absl::InvalidArgumentError(absl::StrCat(
        "saves step ", job.step, " while rank 0 saves step ", begin.step, "; call Save alike"));
  }
  if (mine.status.ok()) {
    const std::string temporary = TemporaryPath(options.directory, job.step);
    for (size_t k = 0; k < job.files.size() && mine.status.ok(); ++k) {
      const absl::StatusOr<WrittenFile> written = WriteSafetensorsFile(
          absl::StrCat(
              temporary, "/",
              ShardFileName(rank, static_cast<int>(k), static_cast<int>(job.files.size()))),
          job.files[k].items, job.files[k].metadata);
      mine.status = written.status();
      if (written.ok()) mine.files.push_back(*written);
    }
    if (mine.status.ok()) mine.status = snapshot_internal::SyncDirectory(temporary);
  }
  if (rank != 0) {
    STRETTO_RETURN_IF_ERROR(
        Saving(job.step, store.Set(absl::StrCat(save, "rank/", rank), Encode(mine))));
    // Rank 0 waits for the others just as long, and then says for whom in vain.
    STRETTO_ASSIGN_OR_RETURN(
        const Report outcome,
        WaitFor(save + "outcome", 0, "decided on the commit" + of_step, kGrace));
    return outcome.status;
  }

  Report outcome;
  outcome.step = job.step;
  outcome.status = FromRank(0, mine.status);
  std::vector<std::vector<WrittenFile>> files = {mine.files};
  for (int other = 1; other < world.size(); ++other) {
    const absl::StatusOr<Report> report =
        WaitFor(absl::StrCat(save, "rank/", other), other, "written its part" + of_step);
    if (outcome.status.ok()) {
      outcome.status = report.ok() ? FromRank(other, report->status) : report.status();
    }
    files.push_back(report.ok() ? report->files : std::vector<WrittenFile>());
  }
  if (outcome.status.ok()) outcome.status = Commit(job, files);
  if (!outcome.status.ok()) {
    RemoveTemporary(options.directory, job.step).IgnoreError();  // the reason is the first error
  }
  // Every rank has reported, so every rank has read the outcome of the save before this one.
  store.Erase(absl::StrCat(prefix, job.number - 1, "/")).IgnoreError();
  STRETTO_RETURN_IF_ERROR(Saving(job.step, store.Set(save + "outcome", Encode(outcome))));
  return outcome.status;
}

absl::Status CheckpointWriter::Impl::Join() {
  if (!thread.joinable()) return absl::OkStatus();
  thread.join();
  if (first_error.ok()) first_error = thread_result;
  return thread_result;
}

CheckpointWriter::CheckpointWriter(World& world, CheckpointOptions options)
    : impl_(std::make_unique<Impl>(world, std::move(options))) {}

CheckpointWriter::~CheckpointWriter() {
  // Without Finish the run ends by an error, and the rank that a write waits for may be the reason.
  impl_->last_call = (std::chrono::steady_clock::now() + kGrace).time_since_epoch().count();
  impl_->Join().IgnoreError();
}

void CheckpointWriter::Distrust(const std::vector<int64_t>& steps) {
  impl_->Join().IgnoreError();  // kept in first_error, which Finish returns
  impl_->damaged.insert(steps.begin(), steps.end());
}

absl::Status CheckpointWriter::Save(int64_t step, const StateRegistry& registry,
                                    const std::string& trainer_state) {
  Impl& impl = *impl_;
  const absl::Status earlier = impl.Join();
  if (impl.prefix.empty()) {
    // The same number on all ranks: how many writers this rank has used in this world.
    const absl::StatusOr<int64_t> writer =
        impl.world.store().Add(absl::StrCat("checkpoint/writers/", impl.world.rank()), 1);
    STRETTO_RETURN_IF_ERROR(impl.Saving(step, writer.status()));
    impl.prefix = absl::StrCat("checkpoint/", *writer, "/");
  }
  Job job;
  job.step = step;
  job.number = ++impl.saves;
  job.trainer_state = trainer_state;
  impl.Stage(registry, &job);
  auto run = [&impl](const Job& job) {
    const absl::Status result = impl.Run(job);
    if (result.ok()) impl.committed = job.step;
    return result;
  };
  const auto shared = std::make_shared<const Job>(std::move(job));
  if (impl.options.async) {
    absl::StatusOr<std::thread> thread = StartThread(
        "the checkpoint writer", [&impl, run, shared] { impl.thread_result = run(*shared); });
    if (thread.ok()) {
      impl.thread = *std::move(thread);
      return earlier;
    }
    // The other ranks count on this one's part, and a slow save is better than none.
    LogWarning(absl::StrCat(
        "step ", step, " is saved while training waits: ", std::string(thread.status().message())));
  }
  const absl::Status result = run(*shared);
  if (impl.first_error.ok()) impl.first_error = result;
  return earlier.ok() ? result : earlier;
}

absl::Status CheckpointWriter::Finish() {
  impl_->Join().IgnoreError();
  return std::exchange(impl_->first_error, absl::OkStatus());
}

int64_t CheckpointWriter::last_committed_step() const { return impl_->committed; }

}  // namespace stretto
