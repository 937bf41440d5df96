#include "src/snapshot/file_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto::snapshot_internal {
namespace {

// One system call moves at most 2 GiB less a page on Linux; smaller pieces lose nothing.
constexpr int64_t kMaxTransfer = int64_t{1} << 30;

bool IsSpaceError(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

}  // namespace

absl::Status IoError(int error, const std::string& what, const std::string& path) {
  const std::string message = absl::StrCat("cannot ", what, " ", path);
  if (IsSpaceError(error)) {
    return absl::ResourceExhaustedError(absl::StrCat(message, ": ", std::strerror(error)));
  }
  return absl::ErrnoToStatus(error, message);
}

absl::StatusOr<std::shared_ptr<const FileReader>> FileReader::Open(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not hang; it means nothing for regular files.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return IoError(errno, "open", path);
  struct stat info;
  if (fstat(descriptor, &info) != 0) {
    const int error = errno;
    close(descriptor);
    return IoError(error, "inspect", path);
  }
  if (!S_ISREG(info.st_mode)) {
    close(descriptor);
    return absl::InvalidArgumentError(
        absl::StrCat("cannot read ", path, ": it is not a regular file"));
  }
  return std::shared_ptr<const FileReader>(new FileReader(path, descriptor, info.st_size));
}

FileReader::~FileReader() { close(descriptor_); }

absl::Status FileReader::Read(int64_t offset, int64_t bytes, void* out) const {
  char* cursor = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(descriptor_, cursor, std::min(bytes, kMaxTransfer), offset);
    if (got < 0) {
      if (errno == EINTR) continue;
      return IoError(errno, "read", path_);
    }
    if (got == 0) {
      return absl::DataLossError(absl::StrCat("cannot read ", path_, ": it ends at byte ", offset,
                                              ", ", bytes, " bytes too early"));
    }
    cursor += got;
    offset += got;
    bytes -= got;
  }
  return absl::OkStatus();
}

// What is written at once: its checksum is computed while it is in the cache.
constexpr int64_t kPiece = int64_t{8} << 20;

struct FileWriter::Hash {
  Hash() : state(XXH3_createState()) {
    if (state != nullptr) XXH3_64bits_reset(state);
  }
  ~Hash() { XXH3_freeState(state); }
  XXH3_state_t* state;
};

FileWriter::FileWriter(std::string path, int descriptor, int64_t total_bytes)
    : path_(std::move(path)),
      partial_(path_ + ".partial"),
      descriptor_(descriptor),
      total_bytes_(total_bytes),
      hash_(std::make_unique<Hash>()) {}

absl::StatusOr<std::unique_ptr<FileWriter>> FileWriter::Create(const std::string& path,
                                                               int64_t total_bytes) {
  const std::string partial = path + ".partial";
  const int descriptor = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor < 0) return IoError(errno, "create", partial);
  std::unique_ptr<FileWriter> writer(new FileWriter(path, descriptor, total_bytes));
  if (writer->hash_->state == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot write ", path, ": out of memory"));
  }
  return writer;
}

FileWriter::~FileWriter() {
  if (descriptor_ < 0) return;
  close(descriptor_);
  unlink(partial_.c_str());
}

absl::Status FileWriter::Failed(int error, const std::string& what) const {
  if (!IsSpaceError(error)) return IoError(error, what, path_);
  const char* advice = error == EFBIG ? "raise the file size limit (ulimit -f)"
                                      : "free at least that much there or choose another directory";
  return absl::ResourceExhaustedError(absl::StrCat(
      "cannot ", what, " ", path_, ": ", std::strerror(error), " after ", written_, " of ",
      total_bytes_, " bytes, ", total_bytes_ - written_, " bytes are missing; ", advice));
}

absl::Status FileWriter::Append(const void* data, int64_t bytes) {
  const char* cursor = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t put = write(descriptor_, cursor, std::min(bytes, kPiece));
    if (put < 0) {
      if (errno == EINTR) continue;
      return Failed(errno, "write");
    }
    XXH3_64bits_update(hash_->state, cursor, put);
    // The disk begins at once, not when memory has filled or Commit waits for it. Not all file
    // systems can.
    if (sync_file_range(descriptor_, written_, put, SYNC_FILE_RANGE_WRITE) != 0 &&
        (errno == EIO || IsSpaceError(errno))) {
      return Failed(errno, "write");
    }
    cursor += put;
    written_ += put;
    bytes -= put;
  }
  return absl::OkStatus();
}

absl::StatusOr<WrittenFile> FileWriter::Commit() {
  if (written_ != total_bytes_) {
    return absl::InternalError(
        absl::StrCat("wrote ", written_, " of ", total_bytes_, " bytes of ", path_));
  }
  // File systems with delayed allocation (NFS, quotas) report a full disk only here or at close.
  if (fsync(descriptor_) != 0) return Failed(errno, "write");
  const int descriptor = std::exchange(descriptor_, -1);
  if (close(descriptor) != 0) {
    const int error = errno;
    unlink(partial_.c_str());
    return Failed(error, "write");
  }
  if (rename(partial_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    unlink(partial_.c_str());
    return IoError(error, "rename the finished file to", path_);
  }
  return WrittenFile{written_, XXH3_64bits_digest(hash_->state)};
}

absl::StatusOr<WrittenFile> WriteWholeFile(const std::string& path, const std::string& content) {
  STRETTO_ASSIGN_OR_RETURN(auto writer, FileWriter::Create(path, content.size()));
  STRETTO_RETURN_IF_ERROR(writer->Append(content.data(), content.size()));
  return writer->Commit();
}

absl::StatusOr<std::string> ReadWholeFile(const std::string& path, int64_t max_bytes) {
  STRETTO_ASSIGN_OR_RETURN(auto file, FileReader::Open(path));
  if (file->size() > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", path, ": it has ", file->size(),
                                                   " bytes where at most ", max_bytes,
                                                   " make sense"));
  }
  std::string content(file->size(), '\0');
  STRETTO_RETURN_IF_ERROR(file->Read(0, content.size(), content.data()));
  return content;
}

absl::StatusOr<uint64_t> DigestFile(const FileReader& file) {
  constexpr int64_t kChunk = int64_t{4} << 20;
  std::vector<char> buffer(std::min(kChunk, std::max<int64_t>(file.size(), 1)));
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                 XXH3_freeState);
  if (state == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot check ", file.path(), ": out of memory"));
  }
  XXH3_64bits_reset(state.get());
  for (int64_t offset = 0; offset < file.size(); offset += kChunk) {
    const int64_t bytes = std::min(kChunk, file.size() - offset);
    STRETTO_RETURN_IF_ERROR(file.Read(offset, bytes, buffer.data()));
    XXH3_64bits_update(state.get(), buffer.data(), bytes);
  }
  return XXH3_64bits_digest(state.get());
}

uint64_t Digest(const std::string& text) { return XXH3_64bits(text.data(), text.size()); }

std::string ToHex(uint64_t digest) { return absl::StrFormat("%016x", digest); }

bool FromHex(const std::string& text, uint64_t* digest) {
  if (text.size() != 16) return false;
  uint64_t value = 0;
  for (const char c : text) {
    int digit;
    if (c >= '0' && c <= '9') {
      digit = c - '0';
    } else if (c >= 'a' && c <= 'f') {
      digit = c - 'a' + 10;
    } else {
      return false;
    }
    value = value << 4 | static_cast<uint64_t>(digit);
  }
  *digest = value;
  return true;
}

absl::Status MakeDirectories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return IoError(error.value(), "create the directory", path);
  return absl::OkStatus();
}

absl::Status SyncDirectory(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return IoError(errno, "open the directory", path);
  const int result = fsync(descriptor);
  const int error = errno;
  close(descriptor);
  // Some network file systems cannot sync a directory and say EINVAL.
  if (result != 0 && error != EINVAL) return IoError(error, "sync the directory", path);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path) {
  std::error_code error;
  std::vector<std::string> names;
  // Incremented by hand: the operator of a range loop throws.
  std::filesystem::directory_iterator it(path, error);
  while (!error && it != std::filesystem::directory_iterator()) {
    names.push_back(it->path().filename().string());
    it.increment(error);
  }
  if (error) return IoError(error.value(), "list the directory", path);
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace stretto::snapshot_internal
