// An n-gram language model: the loss that a trained network has to beat.
#ifndef STRETTO_DATA_NGRAM_H_
#define STRETTO_DATA_NGRAM_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// Interpolated Witten-Bell smoothing (Witten and Bell, "The zero-frequency problem", IEEE Trans.
// Information Theory 37(4), 1991; in the interpolated form of Chen and Goodman, "An empirical study
// of smoothing techniques for language modeling", 1998, section 2.5). With c(h, w) the count of
// token w after the context h of the last n - 1 tokens, c(h) its sum over w, u(h) the number of
// different w seen after h, and h' the context without its oldest token:
//
//   P(w | h) = (c(h, w) + u(h) P(w | h')) / (c(h) + u(h)),      P(w | h) = P(w | h') if c(h) = 0,
//
// down to the uniform 1 / V below the unigrams. Every probability is positive and each context's
// probabilities sum to 1.
class NgramModel {
 public:
  // Counts every n-gram of `ids` up to order `order` (1 to 3: trigrams see two tokens of context).
  // INVALID_ARGUMENT for no ids, an id outside [0, vocabulary) or a vocabulary above 2^21.
  static absl::StatusOr<std::unique_ptr<NgramModel>> Train(const std::vector<int32_t>& ids,
                                                           int64_t vocabulary, int order = 3);
  ~NgramModel();
  // P(token | context), oldest token first; only the last order - 1 tokens of the context count.
  // All ids must lie in the vocabulary.
  double Probability(const std::vector<int32_t>& context, int32_t token) const;
  // Mean of -ln P over all tokens of `ids`, each after those before it; the first ones have less
  // context. In nats per token.
  absl::StatusOr<double> Loss(const std::vector<int32_t>& ids) const;
  int order() const;

 private:
  NgramModel();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stretto

#endif  // STRETTO_DATA_NGRAM_H_
