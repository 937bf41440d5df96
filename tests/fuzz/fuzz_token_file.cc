// Any bytes as a token file: opened, read whole and in samples, or refused.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "stretto/data/dataset.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A file in memory, reached by its path. The first byte chooses the options.
  if (size == 0) return 0;
  const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  if (fd < 0 || write(fd, data + 1, size - 1) != static_cast<ssize_t>(size - 1)) std::abort();
  const std::string path = "/proc/self/fd/" + std::to_string(fd);

  auto file = stretto::TokenFile::Open(path, data[0] % 2 == 0);
  if (file.ok()) {
    std::vector<int32_t> ids(static_cast<size_t>(file->tokens()));
    if (file->Read(0, file->tokens(), data[0], ids.data()).ok() && data[0] > 0) {
      for (const int32_t id : ids) {
        if (id < 0 || id >= data[0]) std::abort();
      }
    }
  }
  stretto::DatasetOptions options;
  options.sequence_length = 1 + data[0] % 13;
  options.vocabulary = data[0] % 5 == 0 ? 0 : 70000;
  options.end_of_text = static_cast<int64_t>(data[0] % 7) - 1;
  auto dataset = stretto::TokenDataset::Open(path, options);
  if (dataset.ok()) {
    stretto::PackedBatch batch;
    for (int64_t i = 0; i < (*dataset)->samples(); ++i) {
      const int64_t before = batch.tokens();
      if (!(*dataset)->Append(i, &batch).ok()) {
        if (batch.tokens() != before) std::abort();
        continue;
      }
      if (batch.cu_seqlens.back() != batch.tokens() ||
          batch.tokens() != before + options.sequence_length) {
        std::abort();
      }
    }
  }
  close(fd);
  return 0;
}
