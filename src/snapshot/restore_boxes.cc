#include "src/snapshot/restore_boxes.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/snapshot/manifest.h"
#include "stretto/core/copy.h"

namespace stretto::snapshot_internal {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;
constexpr auto kConnectTimeout = std::chrono::seconds(10);

// Rows and columns; more dimensions than two count as columns of the first.
struct Extent {
  int64_t first_row, rows, first_column, columns;
};

int64_t Product(const std::vector<int64_t>& shape, size_t from) {
  int64_t n = 1;
  for (size_t i = from; i < shape.size(); ++i) n *= shape[i];
  return n;
}

}  // namespace

BoxSource::BoxSource(Restorable restorable, std::string token, std::string job)
    : restorable_(std::move(restorable)), token_(std::move(token)), job_(std::move(job)) {}

absl::StatusOr<SlotReader*> BoxSource::ReaderOf(int node) {
  const auto found = readers_.find(node);
  if (found != readers_.end()) return &found->second;
  STRETTO_ASSIGN_OR_RETURN(SlotReader reader,
                           SlotReader::Connect(restorable_.peers[static_cast<size_t>(node)], token_,
                                               job_, net::After(kConnectTimeout)));
  return &readers_.emplace(node, std::move(reader)).first->second;
}

absl::Status BoxSource::Fetch(int node, int rank, int64_t offset, int64_t bytes, void* out) {
  STRETTO_ASSIGN_OR_RETURN(SlotReader* const reader, ReaderOf(node));
  auto* to = static_cast<std::byte*>(out);
  // One request ahead of what is received.
  int64_t asked = 0;
  const auto ask = [&]() -> absl::Status {
    const int64_t n = std::min(kPiece, bytes - asked);
    STRETTO_RETURN_IF_ERROR(
        reader->Request(restorable_.id, SlotState::kCommitted, rank, offset + asked, n));
    asked += n;
    return absl::OkStatus();
  };
  for (int64_t got = 0; got < bytes;) {
    if (asked == got) STRETTO_RETURN_IF_ERROR(ask());
    const int64_t n = std::min(kPiece, bytes - got);
    if (asked < bytes) STRETTO_RETURN_IF_ERROR(ask());
    const absl::Status answered = reader->Answer(to + got, n);
    if (absl::IsNotFound(answered)) {  // a round has taken it away since it was told of
      return absl::UnavailableError(
          absl::StrCat(std::string(answered.message()), " any more: start again"));
    }
    STRETTO_RETURN_IF_ERROR(answered);
    got += n;
  }
  return absl::OkStatus();
}

absl::Status BoxSource::Open() {
  if (restorable_.manifests.size() != restorable_.peers.size()) {
    return absl::InternalError("a snapshot without the manifests of all nodes");
  }
  for (size_t node = 0; node < restorable_.manifests.size(); ++node) {
    const absl::Status opened = OpenNode(static_cast<int>(node));
    if (absl::IsDataLoss(opened)) LetCheck(static_cast<int>(node));
    STRETTO_RETURN_IF_ERROR(opened);
  }
  return absl::OkStatus();
}

absl::Status BoxSource::OpenNode(int node) {
  STRETTO_ASSIGN_OR_RETURN(const NodeManifest manifest,
                           DecodeManifest(restorable_.manifests[static_cast<size_t>(node)]));
  for (const RankPart& part : manifest.ranks) {
    std::string text(static_cast<size_t>(part.contents_bytes), '\0');
    const std::string where = absl::StrCat("the snapshot of step ", restorable_.id.epoch, ", rank ",
                                           part.rank, " on node ", node);
    STRETTO_RETURN_IF_ERROR(Fetch(node, part.rank, part.payload_bytes - part.contents_bytes,
                                  part.contents_bytes, text.data()));
    if (HashOf(text) != part.contents_checksum) {
      return absl::DataLossError(absl::StrCat(where, " has a damaged table of contents"));
    }
    STRETTO_ASSIGN_OR_RETURN(SlotContents contents, DecodeContents(text, where));
    if (trainer_state_.empty()) trainer_state_ = contents.trainer_state;
    for (SlotEntry& entry : contents.entries) {
      const int64_t bytes = Product(entry.shape, 0) * SizeOf(entry.dtype);
      if (entry.bytes != 0 && entry.bytes != bytes) {
        return absl::DataLossError(absl::StrCat(where, " has a damaged table of contents"));
      }
      Part known{node, part.rank, std::move(entry)};
      parts_[known.entry.name].push_back(std::move(known));
    }
  }
  return absl::OkStatus();
}

void BoxSource::LetCheck(int node) {
  std::byte none;
  const absl::StatusOr<SlotReader*> reader = ReaderOf(node);
  if (reader.ok() &&
      (*reader)->Request(restorable_.id, SlotState::kCommitted, kSoundness, 0, 0).ok()) {
    (*reader)->Answer(&none, 0, kVerifying).IgnoreError();
  }
}

absl::Status BoxSource::Fill(const StateEntry& entry) {
  const auto found = parts_.find(entry.name);
  if (found == parts_.end()) {
    return absl::NotFoundError(absl::StrCat("the snapshot of step ", restorable_.id.epoch,
                                            " has no tensor ", entry.name,
                                            "; it is of another model"));
  }
  const Tensor& local = entry.local;
  const int64_t bytes = local.bytes(), size = SizeOf(entry.dtype);
  if (bytes == 0) return absl::OkStatus();
  std::vector<int64_t> shape(local.dims.begin(), local.dims.begin() + local.rank);
  const Extent mine{entry.first_row, shape[0], entry.first_column, Product(shape, 1)};
  std::vector<std::byte> target(static_cast<size_t>(bytes)), source;
  int64_t filled = 0;
  for (const Part& part : found->second) {
    const SlotEntry& from = part.entry;
    if (from.global_shape != entry.global_shape || from.dtype != entry.dtype) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the snapshot of step ", restorable_.id.epoch, " has ", entry.name, " as ",
          Name(from.dtype), " ", ShapeText(from.global_shape), ", not as ", Name(entry.dtype), " ",
          ShapeText(entry.global_shape), "; restart with the settings that wrote it"));
    }
    if (from.bytes == 0) continue;
    const Extent theirs{from.first_row, from.shape[0], from.first_column, Product(from.shape, 1)};
    const int64_t first_row = std::max(mine.first_row, theirs.first_row);
    const int64_t rows =
        std::min(mine.first_row + mine.rows, theirs.first_row + theirs.rows) - first_row;
    const int64_t first_column = std::max(mine.first_column, theirs.first_column);
    const int64_t columns =
        std::min(mine.first_column + mine.columns, theirs.first_column + theirs.columns) -
        first_column;
    if (rows <= 0 || columns <= 0) continue;
    // Whole boxes: the checksum is of the whole.
    source.resize(static_cast<size_t>(from.bytes));
    STRETTO_RETURN_IF_ERROR(Fetch(part.node, part.rank, from.offset, from.bytes, source.data()));
    if (XXH3_64bits(source.data(), source.size()) != from.checksum) {
      LetCheck(part.node);
      return absl::DataLossError(absl::StrCat("the bytes of ", entry.name, " of rank ", part.rank,
                                              " on node ", part.node,
                                              " are not those that were written"));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t to =
          (first_row + r - mine.first_row) * mine.columns + (first_column - mine.first_column);
      const int64_t at = (first_row + r - theirs.first_row) * theirs.columns +
                         (first_column - theirs.first_column);
      std::memcpy(&target[static_cast<size_t>(to * size)], &source[static_cast<size_t>(at * size)],
                  static_cast<size_t>(columns * size));
    }
    filled += rows * columns;
  }
  // Owned boxes do not overlap, so the count says that nothing is missing.
  if (filled != mine.rows * mine.columns) {
    return absl::NotFoundError(absl::StrCat("the snapshot of step ", restorable_.id.epoch, " has ",
                                            filled, " of the ", mine.rows * mine.columns,
                                            " elements of ", entry.name, " that this rank needs"));
  }
  return CopyFromHost(local, target.data());
}

}  // namespace stretto::snapshot_internal
