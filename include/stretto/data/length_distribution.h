// How long documents are: published mixtures and files of lengths, to draw batches from without any
// text.
#ifndef STRETTO_DATA_LENGTH_DISTRIBUTION_H_
#define STRETTO_DATA_LENGTH_DISTRIBUTION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/rng.h"
#include "stretto/core/status.h"

namespace stretto {

class LengthDistribution {
 public:
  // Lengths of [from, to) make up part `tokens` of all tokens and are `mean` tokens long on
  // average. Within it their density falls as a power of the length that gives this mean.
  struct Range {
    double from = 1, to = 2;
    double tokens = 0, mean = 1;
  };

  // "github": 16.2 % of the tokens are in documents of more than 128 Ki tokens, 9.8 % of more than
  // 256 Ki. "byted": 80 % of the documents have at most 4 Ki tokens; 1 % have at least 128 Ki and
  // hold 44.3 % of the tokens; 37 % are in documents of more than 256 Ki; 0.05 % of the documents
  // have at least 2 Mi (all of them 2 Mi here) and hold 12.1 % (ByteScale, arXiv 2502.21231,
  // section 7.1). The rest is assumed: beyond 256 Ki GitHub's tails go on as from 128 Ki to 256 Ki,
  // and shares of shorter documents are plausible ones. INVALID_ARGUMENT names the choices.
  static absl::StatusOr<LengthDistribution> Named(const std::string& name);
  // exp of a normal number: half are below `median`, `sigma` is the deviation of the logarithm.
  // INVALID_ARGUMENT unless median is 1 to 1e9 and sigma 0 to 10.
  static absl::StatusOr<LengthDistribution> LogNormal(double median, double sigma);
  // One of these lengths, all with the same probability. INVALID_ARGUMENT when there are none.
  static absl::StatusOr<LengthDistribution> Of(std::vector<int64_t> lengths);
  // Positive tokens add up to 1, ranges ascend, a mean lies inside its range. INVALID_ARGUMENT.
  static absl::StatusOr<LengthDistribution> FromRanges(const std::vector<Range>& ranges);

  // The length of document `index`, at least 1.
  int64_t Draw(const Rng& rng, uint64_t index) const;

  // Documents of one step until `tokens` are there: the last one is cut to that. Of documents
  // longer than `longest` only the beginning counts. A pure function of its arguments.
  std::vector<int64_t> Batch(uint64_t seed, uint64_t step, int64_t tokens, int64_t longest) const;

 private:
  struct Part {
    double below = 0;  // probability of a document of this part or an earlier one
    double from = 1, to = 1;
    double exponent = 0;  // density ~ length^-exponent
  };
  std::vector<Part> parts_;
  double log_median_ = 0, sigma_ = -1;  // sigma < 0: none
  std::vector<int64_t> lengths_;
};

// Lengths, one to a line; empty lines count for nothing. INVALID_ARGUMENT names `source` and the
// line that is no whole number from 1 to 2^31, or says that there is none.
absl::StatusOr<std::vector<int64_t>> ParseLengths(const std::string& text,
                                                  const std::string& source);

}  // namespace stretto

#endif  // STRETTO_DATA_LENGTH_DISTRIBUTION_H_
