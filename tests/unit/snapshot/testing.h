// What the tests of the snapshot layer share.
#ifndef STRETTO_TESTS_UNIT_SNAPSHOT_TESTING_H_
#define STRETTO_TESTS_UNIT_SNAPSHOT_TESTING_H_

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "stretto/core/log.h"
#include "stretto/core/status.h"

namespace stretto {

// A directory of its own, removed at the end.
class TempDirectory {
 public:
  TempDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "stretto-test-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }
  // Names in the directory (or one below it), sorted.
  std::vector<std::string> Names(const std::string& below = "") const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_ + "/" + below)) {
      names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  std::string path_;
};

inline std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

inline void WriteText(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  ASSERT_TRUE(out.flush().good()) << path;
}

// Inverts one bit of one byte.
inline void FlipByte(const std::string& path, int64_t offset) {
  std::string text = ReadText(path);
  ASSERT_LT(offset, static_cast<int64_t>(text.size()));
  text[offset] ^= 0x10;
  WriteText(path, text);
}

inline std::string Message(const absl::Status& status) { return std::string(status.message()); }

// Writes beyond `bytes` in any file fail with EFBIG while this lives: a stand-in for a full disk
// that needs no mount.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    old_handler_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_);
    rlimit limit = old_;
    limit.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, old_handler_);
  }

 private:
  rlimit old_;
  void (*old_handler_)(int);
};

// Collects log lines while it lives.
class LogCapture {
 public:
  LogCapture() {
    SetLogSink([this](LogLevel, const std::string& line) {
      std::lock_guard<std::mutex> lock(mutex_);
      text_ += line + "\n";
    });
  }
  ~LogCapture() { SetLogSink({}); }
  std::string text() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return text_;
  }

 private:
  mutable std::mutex mutex_;
  std::string text_;
};

}  // namespace stretto

#endif  // STRETTO_TESTS_UNIT_SNAPSHOT_TESTING_H_
