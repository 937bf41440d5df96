// Files of the snapshot layer: positioned reads, and writes that leave either a whole file or none.
#ifndef STRETTO_SRC_SNAPSHOT_FILE_IO_H_
#define STRETTO_SRC_SNAPSHOT_FILE_IO_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto::snapshot_internal {

// "cannot <what> <path>: <reason of errno>". A full disk, quota or file size limit is
// RESOURCE_EXHAUSTED, a missing file NOT_FOUND.
absl::Status IoError(int error, const std::string& what, const std::string& path);

// An open regular file. Reads from several threads are fine.
class FileReader {
 public:
  static absl::StatusOr<std::shared_ptr<const FileReader>> Open(const std::string& path);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }  // when it was opened
  // DATA_LOSS when the file ends before `offset + bytes`.
  absl::Status Read(int64_t offset, int64_t bytes, void* out) const;

 private:
  FileReader(std::string path, int descriptor, int64_t size)
      : path_(std::move(path)), descriptor_(descriptor), size_(size) {}
  std::string path_;
  int descriptor_;
  int64_t size_;
};

struct WrittenFile {
  int64_t bytes = 0;
  uint64_t digest = 0;  // XXH3, 64 bits
};

// Writes `path` as `path`.partial and renames it when all is on disk; without Commit the partial
// file is removed.
class FileWriter {
 public:
  // `total_bytes` is what will be appended; it lets a full disk be reported with what is missing.
  static absl::StatusOr<std::unique_ptr<FileWriter>> Create(const std::string& path,
                                                            int64_t total_bytes);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  absl::Status Append(const void* data, int64_t bytes);
  // Syncs, renames. INTERNAL when less or more than `total_bytes` was appended.
  absl::StatusOr<WrittenFile> Commit();

 private:
  FileWriter(std::string path, int descriptor, int64_t total_bytes);
  absl::Status Failed(int error, const std::string& what) const;
  std::string path_;
  std::string partial_;
  int descriptor_;
  int64_t total_bytes_;
  int64_t written_ = 0;
  struct Hash;
  std::unique_ptr<Hash> hash_;
};

absl::StatusOr<WrittenFile> WriteWholeFile(const std::string& path, const std::string& content);
// INVALID_ARGUMENT for a file larger than `max_bytes`.
absl::StatusOr<std::string> ReadWholeFile(const std::string& path, int64_t max_bytes);
absl::StatusOr<uint64_t> DigestFile(const FileReader& file);
uint64_t Digest(const std::string& text);

// 16 hexadecimal digits and back.
std::string ToHex(uint64_t digest);
bool FromHex(const std::string& text, uint64_t* digest);

// As mkdir -p.
absl::Status MakeDirectories(const std::string& path);
// Makes the directory's entries durable.
absl::Status SyncDirectory(const std::string& path);
// Names in a directory, sorted. NOT_FOUND when it does not exist.
absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_FILE_IO_H_
