// Committed snapshots on disk, as checkpoints that the ordinary loader reads (checkpoint.h): each
// keeper writes the files of its node's ranks, node 0's makes them a checkpoint.
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/start_thread.h"
#include "src/snapshot/checkpoint_directory.h"
#include "src/snapshot/keeper_impl.h"
#include "src/snapshot/manifest.h"
#include "src/snapshot/safetensors_writer.h"
#include "stretto/core/log.h"

namespace stretto {

using snapshot_internal::CommitTemporary;
using snapshot_internal::FilesOf;
using snapshot_internal::IndexShards;
using snapshot_internal::KeeperSlots;
using snapshot_internal::kManifestName;
using snapshot_internal::Manifest;
using snapshot_internal::ManifestFile;
using snapshot_internal::ManifestToJson;
using snapshot_internal::PrepareTemporary;
using snapshot_internal::Prune;
using snapshot_internal::RankPart;
using snapshot_internal::RemoveTemporary;
using snapshot_internal::ShardFileName;
using snapshot_internal::ShardMetadata;
using snapshot_internal::StepWriter;
using snapshot_internal::TemporaryPath;
using snapshot_internal::WriteSafetensorsFile;
using snapshot_internal::WriteWholeFile;
using snapshot_internal::WrittenFile;

namespace {

// A rank's registry as its slot has it. Boxes of others are known by name and shape only.
absl::StatusOr<StateRegistry> RegistryOf(const SlotContents& contents, std::byte* payload) {
  StateRegistry registry;
  for (const SlotEntry& from : contents.entries) {
    StateEntry entry;
    entry.name = from.name;
    entry.dtype = from.dtype;
    entry.global_shape = from.global_shape;
    entry.local.dtype = from.dtype;
    if (from.bytes > 0) {
      Tensor& local = entry.local;
      local.data = payload + from.offset;
      for (const int64_t d : from.shape) local.dims[local.rank++] = d;
      local.row_stride = local.row_elements();
      if (local.bytes() != from.bytes) {
        return absl::DataLossError(absl::StrCat("a slot has ", from.name, " with a wrong size"));
      }
      entry.first_row = from.first_row;
      entry.first_column = from.first_column;
    }
    STRETTO_RETURN_IF_ERROR(registry.Add(std::move(entry)));
  }
  return registry;
}

// The files of one rank. DATA_LOSS when they may have other bytes than the rank has written: their
// own digests would not tell.
absl::Status WriteRank(const SlotMemory& memory, const SlotIdentity& identity,
                       const std::string& directory, std::vector<ManifestFile>* written) {
  STRETTO_ASSIGN_OR_RETURN(const SlotContents contents, memory.ReadContents(identity));
  STRETTO_ASSIGN_OR_RETURN(const StateRegistry registry, RegistryOf(contents, memory.payload()));
  const auto files = FilesOf(registry);
  for (size_t k = 0; k < files.size(); ++k) {
    std::vector<SafetensorsItem> items;
    for (const StateEntry* entry : files[k]) {
      SafetensorsItem& item = items.emplace_back();
      item.name = entry->name;
      item.dtype = entry->dtype;
      item.shape.assign(entry->local.dims.begin(), entry->local.dims.begin() + entry->local.rank);
      item.data = entry->local.data;
    }
    STRETTO_ASSIGN_OR_RETURN(const auto metadata, ShardMetadata(registry, files[k]));
    const std::string name =
        ShardFileName(identity.rank, static_cast<int>(k), static_cast<int>(files.size()));
    const absl::StatusOr<WrittenFile> file =
        WriteSafetensorsFile(absl::StrCat(directory, "/", name), items, metadata);
    STRETTO_RETURN_IF_ERROR(memory.Whole());  // else the system could not read it
    STRETTO_RETURN_IF_ERROR(file.status());
    written->push_back({name, file->bytes, file->digest, identity.rank});
  }
  return memory.VerifyData(contents);
}

}  // namespace

// Node 0: makes the directory, then asks all for their parts.
void Keeper::Impl::Spill(const SnapshotId& id) {
  const auto now = net::Clock::now();
  if (spilling || now - last_spill < options.spill_interval) return;
  last_spill = now;
  spilling = Spilling{.id = id};
  InBackground([this, id] {
    const Told told(PrepareTemporary(options.directory, id.epoch, StepWriter::kKeeper));
    Post([this, id, told] {
      if (const absl::Status made = told.status(); !made.ok()) {
        LogWarning(absl::StrCat("the snapshot of step ", id.epoch,
                                " is not written to disk: ", std::string(made.message())));
        spilling.reset();
        return;
      }
      for (int node = 1; node < layout.nodes(); ++node) {
        wire::Writer out;
        out.Int(Kind::kSpill);
        snapshot_internal::Put(out, id);
        if (Connection* const peer = PeerOf(node); peer != nullptr) {
          Send(*peer, out);
        } else {
          spilling->failed = absl::UnavailableError(absl::StrCat("node ", node, " is gone"));
          spilling->reports[node] = {};
        }
      }
      SpillMine(id);
    });
  });
}

void Keeper::Impl::InBackground(std::function<void()> body) {
  if (spiller.joinable()) spiller.join();  // what it did has been told
  absl::StatusOr<std::thread> thread = StartThread("a keeper's files", body);
  if (thread.ok()) {
    spiller = *std::move(thread);
  } else {
    body();
  }
}

void Keeper::Impl::SpillMine(const SnapshotId& id) {
  int slot = -1;
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& record = protocol.slots()[static_cast<size_t>(s)];
    if (record.state == SlotState::kCommitted && record.id == id) slot = s;
  }
  if (slot < 0) {
    TellSpilled(id, absl::NotFoundError("it was replaced by a newer one"), {});
    return;
  }
  if (writes_files) {  // for a leader that was replaced meanwhile
    TellSpilled(id, absl::UnavailableError("it still writes an older one"), {});
    return;
  }
  writes_files = true;
  protocol.Hold(slot, true);
  InBackground([this, id, slot] {
    Tell("spill", id);
    absl::Status status;
    std::vector<ManifestFile> files;
    const std::string directory = TemporaryPath(options.directory, id.epoch, StepWriter::kKeeper);
    for (const RankPart& part : slots->ManifestOf(slot).ranks) {
      const auto memory = slots->MemoryOf(slot, part.rank);
      if (status.ok() && memory != nullptr) {
        status = WriteRank(*memory, {options.job, part.layout, part.rank}, directory, &files);
      }
    }
    if (status.ok()) status = snapshot_internal::SyncDirectory(directory);
    // A round may have taken the slot away meanwhile.
    if (status.ok()) {
      status =
          slots->Look(id, SlotState::kCommitted, snapshot_internal::kWholeShard, 0, 0).status();
    }
    Post([this, id, slot, told = Told(status), files] {
      writes_files = false;
      protocol.Hold(slot, false);
      Tell("spilled", id);
      if (absl::IsDataLoss(told.status())) Damaged(id, told.message);
      TellSpilled(id, told.status(), files);
    });
  });
}

void Keeper::Impl::TellSpilled(const SnapshotId& id, const absl::Status& status,
                               const std::vector<ManifestFile>& files) {
  wire::Writer out;
  out.Int(Kind::kSpilled);
  snapshot_internal::Put(out, id);
  snapshot_internal::Put(out, status);
  out.Int(static_cast<uint32_t>(files.size()));
  for (const ManifestFile& file : files) {
    out.Text(file.name).Int(file.bytes).Int(file.digest).Int(static_cast<int32_t>(file.rank));
  }
  if (options.node != 0) {
    if (Connection* const leader = PeerOf(0); leader != nullptr) Send(*leader, out);
    return;
  }
  const std::string text = out.Frame().substr(sizeof(uint32_t) + sizeof(Kind));
  wire::Reader in = snapshot_internal::ReaderOn(text);
  Spilled(0, in);
}

void Keeper::Impl::Spilled(int node, wire::Reader& frame) {
  const SnapshotId id = snapshot_internal::GetId(frame);
  const absl::Status status = snapshot_internal::GetStatus(frame);
  std::vector<ManifestFile> files;
  for (uint32_t left = frame.Int<uint32_t>(); left > 0 && frame.ok(); --left) {
    ManifestFile& file = files.emplace_back();
    file.name = frame.Text();
    file.bytes = frame.Int<int64_t>();
    file.digest = frame.Int<uint64_t>();
    file.rank = frame.Int<int32_t>();
  }
  if (!frame.ok() || !spilling || spilling->id != id) return;
  if (spilling->failed.ok() && !status.ok()) {
    spilling->failed = absl::Status(
        status.code(), absl::StrCat("node ", node, ": ", std::string(status.message())));
  }
  spilling->reports[node] = std::move(files);
  FinishSpill();
}

void Keeper::Impl::ForgetSpiller(int node) {
  if (!spilling || spilling->reports.count(node) > 0) return;
  spilling->failed = absl::UnavailableError(absl::StrCat("node ", node, " is gone"));
  spilling->reports[node] = {};
  FinishSpill();
}

// When all have written, or said that they could not.
void Keeper::Impl::FinishSpill() {
  if (static_cast<int>(spilling->reports.size()) < layout.nodes()) return;
  const SnapshotId id = spilling->id;
  Manifest manifest;
  manifest.step = id.epoch;
  std::map<int, std::vector<ManifestFile>> by_rank;
  for (const auto& [node, files] : spilling->reports) {
    for (const ManifestFile& file : files) by_rank[file.rank].push_back(file);
  }
  for (const auto& [rank, files] : by_rank) {
    manifest.files.insert(manifest.files.end(), files.begin(), files.end());
  }
  absl::Status status = spilling->failed;
  const int slot = protocol.restorable();
  std::string name;
  for (int s = 0; s < kSlots && status.ok(); ++s) {
    if (protocol.slots()[static_cast<size_t>(s)].id != id) continue;
    for (const RankPart& part : slots->ManifestOf(s).ranks) {
      manifest.world_size = part.world_size;
      const auto memory = slots->MemoryOf(s, part.rank);
      if (memory == nullptr) continue;
      const auto contents = memory->ReadContents({options.job, part.layout, part.rank});
      status = contents.status();
      if (contents.ok()) manifest.trainer_state = contents->trainer_state;
    }
  }
  if (status.ok() && (slot < 0 || manifest.world_size == 0)) {
    status = absl::NotFoundError("it was replaced by a newer one");
  }
  InBackground([this, id, manifest = std::move(manifest), so_far = Told(status)]() mutable {
    const auto commit = [&]() -> absl::Status {
      STRETTO_RETURN_IF_ERROR(so_far.status());
      const std::string directory = TemporaryPath(options.directory, id.epoch, StepWriter::kKeeper);
      STRETTO_RETURN_IF_ERROR(IndexShards(directory, &manifest));
      STRETTO_ASSIGN_OR_RETURN(const std::string text, ManifestToJson(manifest));
      STRETTO_RETURN_IF_ERROR(
          WriteWholeFile(absl::StrCat(directory, "/", kManifestName), text).status());
      STRETTO_RETURN_IF_ERROR(CommitTemporary(options.directory, id.epoch, StepWriter::kKeeper));
      Prune(options.directory, id.epoch, options.keep, started, {}, StepWriter::kKeeper);
      return absl::OkStatus();
    };
    const Told told(commit());
    if (!told.status().ok())
      RemoveTemporary(options.directory, id.epoch, StepWriter::kKeeper).IgnoreError();
    Post([this, id, told] {
      const absl::Status committed = told.status();
      spilling.reset();
      if (committed.ok()) {
        LogInfo(
            absl::StrCat("the snapshot of step ", id.epoch, " is written to ", options.directory));
      } else {
        LogWarning(absl::StrCat("the snapshot of step ", id.epoch,
                                " is not written to disk: ", std::string(committed.message())));
      }
    });
  });
}

}  // namespace stretto
