#include "stretto/data/token_file.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are little-endian");

constexpr int kHeaderInts = 256;
constexpr int64_t kHeaderBytes = kHeaderInts * 4;
constexpr int32_t kMagic16 = 20240520, kVersion16 = 1;
constexpr int32_t kMagic32 = 20240801, kVersion32 = 7;
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxVocabulary16 = 65536;
constexpr int kChunkBytes = 16384;  // on the stack of Read, which must not allocate

std::string Quote(const std::string& path) { return absl::StrCat("'", path, "'"); }

absl::Status SystemError(int error, const std::string& what, const std::string& path) {
  const std::string message =
      absl::StrCat("cannot ", what, " ", Quote(path), ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(message);
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(absl::StrCat(message, "; raise the limit (ulimit -n)"));
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::UnavailableError(message);
  }
}

absl::StatusOr<int> OpenForReading(const std::string& path) {
  int fd;
  do {
    fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) return SystemError(errno, "open the token file", path);
  return fd;
}

// Reads exactly `size` bytes unless the file ends before; returns the number read or -1.
int64_t ReadAt(int fd, char* data, int64_t size, int64_t offset) {
  int64_t done = 0;
  while (done < size) {
    const ssize_t n = pread(fd, data + done, static_cast<size_t>(size - done), offset + done);
    if (n < 0) {
      if (errno == EINTR) continue;
      return -1;
    }
    if (n == 0) break;
    done += n;
  }
  return done;
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

absl::Status CheckHeader(const std::string& path, const int32_t* header, int64_t file_size,
                         int64_t* tokens, int* token_bytes) {
  int32_t version;
  if (header[0] == kMagic16) {
    version = kVersion16;
    *token_bytes = 2;
  } else if (header[0] == kMagic32) {
    version = kVersion32;
    *token_bytes = 4;
  } else {
    return absl::InvalidArgumentError(absl::StrCat(
        Quote(path), " is no token file: it starts with ", header[0], " and not with ", kMagic16,
        " (16-bit ids) or ", kMagic32, " (32-bit ids); make one with stretto-tokenize"));
  }
  if (header[1] != version) {
    return absl::InvalidArgumentError(
        absl::StrCat("token file ", Quote(path), " has version ", header[1], ", but its magic ",
                     header[0], " goes with version ", version, "; write it again"));
  }
  if (header[2] <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("token file ", Quote(path), " says it holds ",
                                                   header[2],
                                                   " tokens; leave it out or write it again"));
  }
  *tokens = header[2];
  const int64_t expected = kHeaderBytes + *tokens * *token_bytes;
  if (file_size != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("token file ", Quote(path), " is ", file_size, " bytes long but its header's ",
                     *tokens, " tokens of ", *token_bytes, " bytes need ", expected,
                     file_size < expected ? "; it was cut short, copy it again"
                                          : "; it is not what was written, copy it again"));
  }
  return absl::OkStatus();
}

}  // namespace

TokenFile::TokenFile(TokenFile&& other) noexcept { *this = std::move(other); }

TokenFile& TokenFile::operator=(TokenFile&& other) noexcept {
  path_.swap(other.path_);
  std::swap(fd_, other.fd_);
  std::swap(tokens_, other.tokens_);
  std::swap(token_bytes_, other.token_bytes_);
  return *this;
}

TokenFile::~TokenFile() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<TokenFile> TokenFile::Open(const std::string& path, bool keep_open) {
  // Before open, which would wait for a writer if this were a pipe.
  struct stat status;
  if (stat(path.c_str(), &status) != 0) return SystemError(errno, "find the token file", path);
  if (S_ISDIR(status.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(
        Quote(path), " is a directory; name a token file or a glob such as '", path, "/*.bin'"));
  }
  if (!S_ISREG(status.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(
        Quote(path), " is no regular file; token files are read at any place, copy it to disk"));
  }
  TokenFile file;
  file.path_ = path;
  STRETTO_ASSIGN_OR_RETURN(file.fd_, OpenForReading(path));
  if (fstat(file.fd_, &status) != 0) return SystemError(errno, "examine the token file", path);
  if (status.st_size < kHeaderBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(Quote(path), " is ", static_cast<int64_t>(status.st_size),
                     " bytes long, shorter than a token file's header of ", kHeaderBytes,
                     " bytes; make one with stretto-tokenize"));
  }
  int32_t header[3];
  char bytes[sizeof(header)];
  if (ReadAt(file.fd_, bytes, sizeof(bytes), 0) != static_cast<int64_t>(sizeof(bytes))) {
    return SystemError(errno, "read the header of the token file", path);
  }
  std::memcpy(header, bytes, sizeof(header));
  STRETTO_RETURN_IF_ERROR(
      CheckHeader(path, header, status.st_size, &file.tokens_, &file.token_bytes_));
  if (!keep_open) {
    close(file.fd_);
    file.fd_ = -1;
  }
  return file;
}

absl::Status TokenFile::Read(int64_t first, int64_t count, int64_t vocabulary, int32_t* ids) const {
  if (first < 0 || count < 0 || first > tokens_ || count > tokens_ - first) {
    return absl::OutOfRangeError(absl::StrCat("tokens ", first, " to ", first, " + ", count,
                                              " were asked of ", Quote(path_), ", which holds ",
                                              tokens_));
  }
  Descriptor own{-1};
  int fd = fd_;
  if (fd < 0) {
    STRETTO_ASSIGN_OR_RETURN(own.fd, OpenForReading(path_));
    fd = own.fd;
  }
  // Ids are int32 in memory whatever the file allows.
  const uint32_t limit = vocabulary > 0 && vocabulary < (int64_t{1} << 31)
                             ? static_cast<uint32_t>(vocabulary)
                             : uint32_t{1} << 31;
  char chunk[kChunkBytes];
  const int64_t chunk_tokens = kChunkBytes / token_bytes_;
  for (int64_t done = 0; done < count;) {
    const int64_t n = std::min(chunk_tokens, count - done);
    const int64_t got =
        ReadAt(fd, chunk, n * token_bytes_, kHeaderBytes + (first + done) * token_bytes_);
    if (got < 0) return SystemError(errno, "read the token file", path_);
    if (got != n * token_bytes_) {
      return absl::DataLossError(absl::StrCat(
          "token file ", Quote(path_), " became shorter after it was opened: nothing at token ",
          first + done + got / token_bytes_, "; restore it and start again"));
    }
    for (int64_t i = 0; i < n; ++i) {
      uint32_t id;
      if (token_bytes_ == 2) {
        uint16_t narrow;
        std::memcpy(&narrow, chunk + 2 * i, 2);
        id = narrow;
      } else {
        std::memcpy(&id, chunk + 4 * i, 4);
      }
      if (id >= limit) {
        return absl::InvalidArgumentError(
            absl::StrCat("token file ", Quote(path_), " holds id ", id, " at position ",
                         first + done + i, ", outside the vocabulary of ", limit,
                         "; use the tokenizer and vocabulary that the file was made with"));
      }
      ids[done + i] = static_cast<int32_t>(id);
    }
    done += n;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TokenFileWriter>> TokenFileWriter::Create(const std::string& path,
                                                                         int64_t vocabulary) {
  if (vocabulary < 1 || vocabulary > (int64_t{1} << 31)) {
    return absl::InvalidArgumentError(absl::StrCat("a token file cannot hold a vocabulary of ",
                                                   vocabulary, "; it must be in [1, 2^31]"));
  }
  std::unique_ptr<TokenFileWriter> writer(new TokenFileWriter);
  writer->path_ = path;
  writer->partial_ = absl::StrCat(path, ".partial");
  writer->vocabulary_ = vocabulary;
  writer->token_bytes_ = vocabulary <= kMaxVocabulary16 ? 2 : 4;
  writer->file_ = std::fopen(writer->partial_.c_str(), "wbe");
  if (writer->file_ == nullptr) return SystemError(errno, "create", writer->partial_);
  const char header[kHeaderBytes] = {};
  if (std::fwrite(header, 1, sizeof(header), writer->file_) != sizeof(header)) {
    return SystemError(errno, "write", writer->partial_);
  }
  return writer;
}

TokenFileWriter::~TokenFileWriter() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  std::remove(partial_.c_str());
}

absl::Status TokenFileWriter::Append(const int32_t* ids, int64_t count) {
  if (file_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("token file ", Quote(path_), " is finished; nothing can be appended to it"));
  }
  if (count > kMaxTokens - tokens_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "token file ", Quote(path_), " would hold more than ", kMaxTokens,
        " tokens, the most that the format allows; write several shards and name them by a glob"));
  }
  char chunk[kChunkBytes];
  const int64_t chunk_tokens = kChunkBytes / token_bytes_;
  for (int64_t done = 0; done < count;) {
    const int64_t n = std::min(chunk_tokens, count - done);
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = ids[done + i];
      if (id < 0 || id >= vocabulary_) {
        return absl::InvalidArgumentError(
            absl::StrCat("id ", id, " at position ", tokens_ + i, " of token file ", Quote(path_),
                         " is outside the vocabulary of ", vocabulary_));
      }
      if (token_bytes_ == 2) {
        const uint16_t narrow = static_cast<uint16_t>(id);
        std::memcpy(chunk + 2 * i, &narrow, 2);
      } else {
        std::memcpy(chunk + 4 * i, &id, 4);
      }
    }
    const size_t bytes = static_cast<size_t>(n * token_bytes_);
    if (std::fwrite(chunk, 1, bytes, file_) != bytes) return SystemError(errno, "write", partial_);
    done += n;
    tokens_ += n;
  }
  return absl::OkStatus();
}

absl::Status TokenFileWriter::Finish() {
  if (file_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("token file ", Quote(path_), " is finished already"));
  }
  if (tokens_ == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("token file ", Quote(path_), " would hold no tokens; give it some text"));
  }
  const int32_t header[3] = {token_bytes_ == 2 ? kMagic16 : kMagic32,
                             token_bytes_ == 2 ? kVersion16 : kVersion32,
                             static_cast<int32_t>(tokens_)};
  if (std::fseek(file_, 0, SEEK_SET) != 0 ||
      std::fwrite(header, 1, sizeof(header), file_) != sizeof(header) || std::fflush(file_) != 0 ||
      fsync(fileno(file_)) != 0) {
    return SystemError(errno, "write", partial_);
  }
  const int closed = std::fclose(file_);
  const int error = errno;
  file_ = nullptr;
  if (closed != 0 || std::rename(partial_.c_str(), path_.c_str()) != 0) {
    const absl::Status status = SystemError(closed != 0 ? error : errno, "write", path_);
    std::remove(partial_.c_str());
    return status;
  }
  return absl::OkStatus();
}

absl::Status WriteTokenFile(const std::string& path, const std::vector<int32_t>& ids,
                            int64_t vocabulary) {
  STRETTO_ASSIGN_OR_RETURN(auto writer, TokenFileWriter::Create(path, vocabulary));
  STRETTO_RETURN_IF_ERROR(writer->Append(ids));
  return writer->Finish();
}

absl::StatusOr<std::vector<std::string>> ExpandFiles(const std::string& pattern) {
  struct stat status;
  // A file whose name happens to hold '[' or '*' means itself.
  if (stat(pattern.c_str(), &status) == 0) return std::vector<std::string>{pattern};
  glob_t found{};
  const int rc = glob(pattern.c_str(), GLOB_NOSORT, nullptr, &found);
  std::vector<std::string> paths;
  if (rc == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  globfree(&found);
  if (paths.empty()) {
    return absl::NotFoundError(
        absl::StrCat("no file matches ", Quote(pattern),
                     "; check the path (relative to the working directory)"));
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

}  // namespace stretto
