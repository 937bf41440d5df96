// Token files: llm.c's `.bin` shards, read and written one at a time.
//
// A file is 256 little-endian int32 (magic, version, token count, zeros) and then the ids: u16
// under magic 20240520 version 1, or u32 under magic 20240801 version 7. The size must match the
// count exactly. The count is an int32, so a file holds fewer than 2^31 tokens, in up to 8 GiB.
#ifndef STRETTO_DATA_TOKEN_FILE_H_
#define STRETTO_DATA_TOKEN_FILE_H_

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// A token file open for reading. Read may be called from several threads at once.
class TokenFile {
 public:
  // Checks kind, header and size. With `keep_open` false the descriptor is closed again and every
  // Read opens the file anew; for sets of more shards than a process may hold open. NOT_FOUND when
  // nothing is there, INVALID_ARGUMENT when it is no sound token file; both name the path.
  static absl::StatusOr<TokenFile> Open(const std::string& path, bool keep_open = true);
  TokenFile(TokenFile&& other) noexcept;
  TokenFile& operator=(TokenFile&& other) noexcept;
  ~TokenFile();

  const std::string& path() const { return path_; }
  int64_t tokens() const { return tokens_; }
  int token_bytes() const { return token_bytes_; }  // 2 or 4

  // Copies tokens [first, first + count) to `ids`. `vocabulary` > 0: INVALID_ARGUMENT names the
  // file and the position of the first id that is not below it. Allocates nothing unless it fails;
  // reads with pread, so a file that is cut short later is DATA_LOSS and no signal.
  absl::Status Read(int64_t first, int64_t count, int64_t vocabulary, int32_t* ids) const;

 private:
  TokenFile() = default;
  std::string path_;
  int fd_ = -1;
  int64_t tokens_ = 0;
  int token_bytes_ = 0;
};

// Writes a token file piece by piece. The file appears under its name in Finish; before that it is
// `path` + ".partial", which the destructor removes.
class TokenFileWriter {
 public:
  // u16 ids when `vocabulary` is at most 65,536, else u32.
  static absl::StatusOr<std::unique_ptr<TokenFileWriter>> Create(const std::string& path,
                                                                 int64_t vocabulary);
  ~TokenFileWriter();
  TokenFileWriter(const TokenFileWriter&) = delete;
  TokenFileWriter& operator=(const TokenFileWriter&) = delete;

  absl::Status Append(const int32_t* ids, int64_t count);
  absl::Status Append(const std::vector<int32_t>& ids) {
    return Append(ids.data(), static_cast<int64_t>(ids.size()));
  }
  int64_t tokens() const { return tokens_; }
  // Writes the header, flushes to disk and renames. Nothing may be appended afterwards. A file
  // without tokens is refused, since no reader accepts one.
  absl::Status Finish();

 private:
  TokenFileWriter() = default;
  std::string path_;
  std::string partial_;
  std::FILE* file_ = nullptr;
  int64_t vocabulary_ = 0;
  int token_bytes_ = 0;
  int64_t tokens_ = 0;
};

// A whole token file at once.
absl::Status WriteTokenFile(const std::string& path, const std::vector<int32_t>& ids,
                            int64_t vocabulary);

// The files that `pattern` means: itself when such a file exists, else the matches of the glob,
// sorted by bytes (not by locale). NOT_FOUND names the pattern.
absl::StatusOr<std::vector<std::string>> ExpandFiles(const std::string& pattern);

}  // namespace stretto

#endif  // STRETTO_DATA_TOKEN_FILE_H_
