// Token files as a fixed set of samples.
#ifndef STRETTO_DATA_DATASET_H_
#define STRETTO_DATA_DATASET_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/data/batch.h"
#include "stretto/data/token_file.h"

namespace stretto {

struct DatasetOptions {
  int64_t sequence_length = 1024;  // T: tokens of a sample
  int64_t vocabulary = 0;    // ids must be below; checked when a sample is read; 0: not checked
  int64_t end_of_text = -1;  // document separator; -1: the files hold one document each
  bool mask_across_documents = true;  // false: one sequence a sample, whatever it contains
};

// Samples over token shards in llm.c's format (docs/formats.md): sample i is tokens
// [i * T, (i + 1) * T] of the shards laid end to end, T inputs and the same shifted by one as
// targets. Tokens after the last whole sample are not used.
//
// Inside a sample documents become sequences of their own: positions restart and attention does not
// cross. A separator plays both of its parts:
//   - as a target it is the last one of the document before it, so the model learns to end;
//   - as an input it is the first token, at position 0, of the document after it, whose first token
//     it predicts from nothing else, so no loss crosses documents and none is lost.
// An empty document (two separators in a row) is a sequence of one token with weight 0. Every other
// weight is 1. A sample may start in the middle of a document: positions are 0 at its start too.
//   tokens    a b E c d E e      (T = 6, E the separator)
//   ids       a b|E c d|E        targets b E|c d E|e        positions 0 1|0 1 2|0
// Without a separator (end_of_text -1) the end of a file ends a document: the file's last token
// predicts nothing (weight 0), and the next file's first token starts a sequence. With one, a
// file's end means nothing, since writers of shards cut documents anywhere.
class TokenDataset {
 public:
  // `pattern` is a file or a glob, sorted. Every defect (bad magic, wrong size, no match, too few
  // tokens for one sample, u16 and u32 shards mixed) names the file.
  static absl::StatusOr<std::unique_ptr<TokenDataset>> Open(const std::string& pattern,
                                                            const DatasetOptions& options);
  ~TokenDataset();
  int64_t samples() const;
  int64_t tokens() const;
  // Of the number of all tokens and a sample of them; see internal::Shards. Reads 64 stretches.
  absl::StatusOr<uint64_t> TokenFingerprint() const;
  const DatasetOptions& options() const;
  // Appends sample `index` to `batch`, which is unchanged on error. INVALID_ARGUMENT names file and
  // position of an id outside the vocabulary. Safe from several threads on different batches;
  // allocates only what the batch lacks in capacity.
  absl::Status Append(int64_t index, PackedBatch* batch) const;

 private:
  TokenDataset();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stretto

#endif  // STRETTO_DATA_DATASET_H_
