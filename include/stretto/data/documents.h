// Token files as documents of unequal length, and which of them a step takes.
#ifndef STRETTO_DATA_DOCUMENTS_H_
#define STRETTO_DATA_DOCUMENTS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "stretto/core/cut.h"
#include "stretto/core/rng.h"
#include "stretto/core/status.h"
#include "stretto/data/dataset.h"

namespace stretto {

// Documents of token shards in llm.c's format. DatasetOptions as for TokenDataset, except that
// sequence_length is the most tokens of a document: longer ones are cut into pieces, which are
// documents of their own. A separator plays both of its parts: the last target of the document
// before it, and the first input of the one behind it. Documents without a token between two
// separators are left out. Without a separator (end_of_text -1) each file is one document; with
// mask_across_documents false all tokens are, so that pieces are the samples of a TokenDataset.
// Inputs and targets are those that TokenDataset pairs with weight 1.
class DocumentDataset {
 public:
  // Reads all tokens once, to find the separators, where there may be some. Keeps 12 bytes for each
  // document. Errors as TokenDataset::Open.
  static absl::StatusOr<std::unique_ptr<DocumentDataset>> Open(const std::string& pattern,
                                                               const DatasetOptions& options);
  ~DocumentDataset();

  int64_t documents() const;
  int64_t tokens() const;                  // of all documents
  int64_t length(int64_t document) const;  // tokens
  // Of the lengths of all documents.
  uint64_t Fingerprint() const;
  // Of the number of all tokens and a sample of them; see internal::Shards. Reads 64 stretches.
  absl::StatusOr<uint64_t> TokenFingerprint() const;
  // Whether documents are told apart by a separator and there is none among the tokens.
  bool unseparated() const;
  const DatasetOptions& options() const;
  // Inputs and targets of tokens `range` of a document, range.count each. INVALID_ARGUMENT names
  // file and position of an id outside the vocabulary. Safe from several threads.
  absl::Status Read(int64_t document, Range range, int32_t* ids, int32_t* targets) const;

 private:
  DocumentDataset();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Which documents a step takes: a pure function of the lengths, the seed and the step, whatever the
// layout. Documents are numbered over the whole run in the order in which they come: number n is
// document perm(n mod documents) of epoch n div documents. A step takes the next ones as long as
// they have at most `step_tokens` tokens together, and one at least.
class DocumentOrder {
 public:
  // The dataset outlives it.
  DocumentOrder(const DocumentDataset& dataset, uint64_t seed, bool shuffle, int64_t step_tokens);
  // Of step `step`, from 0 on, in order. Steps before it are gone through once, which takes a look
  // at each of their documents. One caller at a time.
  absl::Status Step(int64_t step, std::vector<int64_t>* documents);

 private:
  int64_t At(int64_t number);
  // The number of the first document that is not in the step which begins with `number`.
  int64_t EndOf(int64_t number);

  const DocumentDataset& dataset_;
  const uint64_t seed_;
  const bool shuffle_;
  const int64_t step_tokens_;
  std::optional<Permutation> permutation_;
  int64_t epoch_ = -1;            // of `permutation_`
  int64_t step_ = 0, first_ = 0;  // where the last question began
};

}  // namespace stretto

#endif  // STRETTO_DATA_DOCUMENTS_H_
