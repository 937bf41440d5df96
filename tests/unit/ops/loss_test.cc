#include <algorithm>

#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

class LossTest : public OpsTest {};
STRETTO_ALL_SETTINGS(LossTest);

constexpr int64_t kTokens = 13;

// A batch of tokens whose loss and gradient are computed, in parts or as one operation.
struct Problem {
  int64_t vocab;
  Values logits;
  std::vector<int32_t> target;
  Buffer state, losses, total, targets, weights;
  Values gradient;

  Problem(const Runner& run, int64_t vocab_, double scale)
      : vocab(vocab_),
        state(run.wide(), {kTokens, 3}, 1),
        losses(run.wide(), {kTokens}),
        total(DType::kF64, {2}, Values{10, 20}),
        targets(DType::kI32, {kTokens}),
        weights(DType::kF32, {kTokens}, Random(kTokens, 9)) {
    logits = run.Make({kTokens, vocab}, Random(kTokens * vocab, 1, scale)).Read();
    for (int64_t t = 0; t < kTokens; ++t) target.push_back((t * 37) % vocab);
    targets.Write(Values(target.begin(), target.end()));
    Values w = weights.Read();
    w[4] = 0;
    weights.Write(w);
  }

  Values Chunk(int64_t first, int64_t n) const {
    Values v;
    for (int64_t t = 0; t < kTokens; ++t) {
      v.insert(v.end(), logits.begin() + t * vocab + first, logits.begin() + t * vocab + first + n);
    }
    return v;
  }
  // In chunks of at most `chunk` columns, then the backward pass.
  void Run(const Runner& run, int64_t chunk, bool weighted, bool acc) {
    const Tensor w = weighted ? weights.view() : Tensor{};
    for (int64_t first = 0; first < vocab; first += chunk) {
      const int64_t n = std::min(chunk, vocab - first);
      Buffer part = run.Make({kTokens, n}, Chunk(first, n), 5);
      ops::LossFold(run.context(), state, part, targets, first, first == 0);
      EXPECT_TRUE(run.Wait().ok());
    }
    ops::LossFinish(run.context(), losses, total, state, w, acc, targets);
    gradient.assign(kTokens * vocab, 0.0);
    for (int64_t first = 0; first < vocab; first += chunk) {
      const int64_t n = std::min(chunk, vocab - first);
      Buffer part = run.Make({kTokens, n}, Chunk(first, n), 5);
      ops::LossBackward(run.context(), part, state, targets, w, first);
      run.Wait().IgnoreError();
      const Values g = part.Read();
      for (int64_t i = 0; i < kTokens * n; ++i) gradient[i / n * vocab + first + i % n] = g[i];
    }
  }
  void RunFused(const Runner& run, bool weighted, bool acc, int64_t padding = 5) {
    Buffer all = run.Make({kTokens, vocab}, logits, padding);
    ops::LossFused(run.context(), all, losses, total, targets, weighted ? weights.view() : Tensor{},
                   acc);
    run.Wait().IgnoreError();
    gradient = all.Read();
  }
};

TEST_P(LossTest, MatchesReference) {
  for (double scale : {1.0, 1e4}) {
    for (int64_t vocab : {5, 5003}) {
      for (int64_t chunk : {vocab, int64_t{997}}) {
        for (bool weighted : {false, true}) {
          Problem p(run, vocab, scale);
          p.Run(run, chunk, weighted, weighted);
          run.ExpectOk();
          const Values weights = p.weights.Read();
          Values expected(kTokens), gradient(kTokens * vocab);
          double sum = weighted ? 10 : 0, count = weighted ? 20 : 0;
          for (int64_t t = 0; t < kTokens; ++t) {
            const double w = weighted ? weights[t] : 1;
            const double* row = &p.logits[t * vocab];
            expected[t] = w * reference::CrossEntropy(row, vocab, p.target[t]);
            sum += expected[t];
            count += w;
            const double max = *std::max_element(row, row + vocab);
            double total = 0;
            for (int64_t j = 0; j < vocab; ++j) total += std::exp(row[j] - max);
            for (int64_t j = 0; j < vocab; ++j) {
              gradient[t * vocab + j] = w * (std::exp(row[j] - max) / total - (j == p.target[t]));
            }
          }
          EXPECT_TRUE(Near(p.losses.Read(), expected, run.wide_tolerance()));
          EXPECT_TRUE(Near(p.total.Read(), {sum, count}, run.wide_tolerance()));
          EXPECT_TRUE(Near(p.gradient, gradient, run.tolerance())) << vocab << " " << chunk;
        }
      }
    }
  }
}

TEST_P(LossTest, FusedEqualsItsParts) {
  struct Case {
    int64_t vocab;
    double scale;
    int64_t padding;  // rows of 5003 + 5 elements start at multiples of 16 bytes
  };
  // The last is a row that does not fit a GPU's shared memory in any type.
  for (const Case& x : {Case{5, 1, 3}, Case{5003, 1, 5}, Case{5003, 1e4, 0}, Case{5003, 1, 6},
                        Case{120001, 1, 0}}) {
    for (bool weighted : {false, true}) {
      if (weighted && x.vocab > 100000) continue;  // takes its time
      Problem parts(run, x.vocab, x.scale), fused(run, x.vocab, x.scale);
      parts.Run(run, x.vocab, weighted, weighted);
      fused.RunFused(run, weighted, weighted, x.padding);
      run.ExpectOk();
      EXPECT_TRUE(Near(fused.losses.Read(), parts.losses.Read(), run.wide_tolerance()));
      EXPECT_TRUE(Near(fused.total.Read(), parts.total.Read(), run.wide_tolerance()));
      EXPECT_TRUE(Near(fused.gradient, parts.gradient, run.tolerance())) << x.vocab;
    }
  }
}

// More rows than blocks of a GPU run at a time, which take one after the other.
TEST_P(LossTest, FusedOfManyRows) {
  struct Case {
    int64_t rows, vocab, padding;
  };
  // Rows beside each other begin at different places within 16 bytes; the last do not fit a GPU's
  // shared memory in any type.
  for (const Case& x : {Case{20000, 37, 0}, Case{3000, 257, 2}, Case{300, 120001, 0}}) {
    if (x.rows * x.vocab > 10'000'000 && Buffer::where.kind == DeviceKind::kCpu) continue;
    const auto row = [&](int64_t t) { return t % 7; };  // of which there are that many
    Values logits, pattern = Random(7 * x.vocab, 1, 3.0);
    Values weights, targets;
    for (int64_t t = 0; t < x.rows; ++t) {
      const auto from = pattern.begin() + row(t) * x.vocab;
      logits.insert(logits.end(), from, from + x.vocab);
      weights.push_back(t % 5 == 3 || t % 11 > 8 ? 0 : 1 + t % 3);
      targets.push_back(static_cast<double>(row(t) * 5 % x.vocab));
    }
    Buffer all = run.Make({x.rows, x.vocab}, logits, x.padding);
    const Values stored = all.Read();
    Buffer losses(run.wide(), {x.rows}), total(DType::kF64, {2}, Values{0, 0});
    Buffer w(DType::kF32, {x.rows}), to(DType::kI32, {x.rows});
    w.Write(weights);
    to.Write(targets);
    ops::LossFused(c, all, losses, total, to, w, false);
    run.ExpectOk();
    const Values gradient = all.Read(), found = losses.Read();
    double sum = 0, count = 0;
    Values expected(7);  // of weight 1
    for (int64_t r = 0; r < 7; ++r) {
      expected[r] = reference::CrossEntropy(&stored[r * x.vocab], x.vocab, r * 5 % x.vocab);
    }
    Values losses_expected, gradient_expected;
    for (int64_t t = 0; t < x.rows; ++t) {
      losses_expected.push_back(weights[t] * expected[row(t)]);
      sum += losses_expected.back();
      count += weights[t];
    }
    EXPECT_TRUE(Near(found, losses_expected, run.wide_tolerance())) << x.rows << " " << x.vocab;
    EXPECT_TRUE(Near(total.Read(), {sum, count}, run.wide_tolerance()));
    std::vector<Values> softmax(7);
    for (int64_t r = 0; r < 7; ++r) {
      const double* const first = &stored[r * x.vocab];
      const double max = *std::max_element(first, first + x.vocab);
      double all_of = 0;
      for (int64_t j = 0; j < x.vocab; ++j) all_of += std::exp(first[j] - max);
      for (int64_t j = 0; j < x.vocab; ++j) {
        softmax[r].push_back(std::exp(first[j] - max) / all_of - (j == r * 5 % x.vocab));
      }
    }
    for (int64_t t = 0; t < x.rows; ++t) {
      for (const double g : softmax[row(t)]) gradient_expected.push_back(weights[t] * g);
    }
    EXPECT_TRUE(Near(gradient, gradient_expected, run.tolerance())) << x.rows << " " << x.vocab;
  }
}

TEST_P(LossTest, FusedOfNoTokensKeepsOrClearsTheTotal) {
  for (bool acc : {true, false}) {
    Buffer logits = run.Make({0, 7}), losses = run.Wide({0}), targets = Indices({});
    Buffer total(DType::kF64, {2}, Values{10, 20});
    ops::LossFused(c, logits, losses, total, targets, {}, acc);
    run.ExpectOk();
    EXPECT_EQ(total.Read(), acc ? (Values{10, 20}) : (Values{0, 0}));
  }
}

TEST_P(LossTest, TokensOfWeightZeroContributeNothing) {
  for (bool fused : {false, true}) {
    Problem p(run, 31, 1.0);
    Values targets = p.targets.Read();
    targets[4] = -100;
    p.targets.Write(targets);
    p.logits[4 * 31 + 2] = NAN;
    fused ? p.RunFused(run, true, false) : p.Run(run, 31, true, false);
    run.ExpectOk();
    EXPECT_EQ(p.losses.Read()[4], 0);
    EXPECT_FALSE(std::isnan(p.total.Read()[0]));
    for (int64_t j = 0; j < 31; ++j) EXPECT_EQ(p.gradient[4 * 31 + j], 0);
  }
}

TEST_P(LossTest, TargetOutsideTheVocabularyIsNamed) {
  for (bool fused : {false, true}) {
    for (int bad : {-1, 31}) {
      Runner fresh(GetParam());
      Problem p(fresh, 31, 1.0);
      Values targets = p.targets.Read();
      targets[7] = bad;
      p.targets.Write(targets);
      fused ? p.RunFused(fresh, true, false) : p.Run(fresh, 10, true, false);
      const absl::Status status = fresh.Wait();
      EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
      EXPECT_NE(std::string(status.message()).find("target " + std::to_string(bad) + " of row 7"),
                std::string::npos)
          << status.message();
    }
  }
}

// Three ranks fold a part of the vocabulary each; one of them has masked columns alone.
TEST_P(LossTest, MergedPartsEqualTheWhole) {
  constexpr int64_t kVocabulary = 97, kCuts[] = {0, 41, 60, kVocabulary};
  Problem p(run, kVocabulary, 20.0);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t j = kCuts[1]; j < kCuts[2]; ++j) {
      if (p.target[static_cast<size_t>(t)] != j) p.logits[t * kVocabulary + j] = -INFINITY;
    }
  }
  p.Run(run, kVocabulary, true, false);
  const Values whole = p.state.Read(), losses = p.losses.Read();
  Buffer parts = run.Wide({3 * kTokens, 3});
  Values folded;
  for (int rank = 0; rank < 3; ++rank) {
    Buffer mine = run.Wide({kTokens, 3});
    const int64_t n = kCuts[rank + 1] - kCuts[rank];
    Buffer logits = run.Make({kTokens, n}, p.Chunk(kCuts[rank], n), 5);
    ops::LossFold(c, mine, logits, p.targets, kCuts[rank], true);
    run.ExpectOk();
    const Values of_rank = mine.Read();
    folded.insert(folded.end(), of_rank.begin(), of_rank.end());
  }
  parts.Write(folded);
  ops::LossMerge(c, p.state, parts);
  ops::LossFinish(c, p.losses, p.total, p.state, p.weights, false, p.targets);
  run.ExpectOk();
  EXPECT_TRUE(Near(p.losses.Read(), losses, run.wide_tolerance()));
  const Values merged = p.state.Read();
  for (int64_t t = 0; t < kTokens; ++t) {
    EXPECT_EQ(merged[3 * t], whole[3 * t]);          // the maximum
    EXPECT_EQ(merged[3 * t + 2], whole[3 * t + 2]);  // the target's logit
  }
}

TEST_P(LossTest, NanLogitsGiveNanLoss) {
  for (bool fused : {false, true}) {
    Problem p(run, 31, 1.0);
    p.logits[2 * 31 + 5] = NAN;
    fused ? p.RunFused(run, false, false) : p.Run(run, 31, false, false);
    run.ExpectOk();
    EXPECT_TRUE(std::isnan(p.losses.Read()[2]));
    EXPECT_TRUE(std::isnan(p.total.Read()[0]));
    EXPECT_FALSE(std::isnan(p.losses.Read()[3]));
  }
}

TEST_P(LossTest, MaskedColumnsOfMinusInfinityCountNothing) {
  for (bool fused : {false, true}) {
    Problem p(run, 31, 1.0);
    for (int64_t t = 0; t < kTokens; ++t) p.target[t] = 20;
    p.targets.Write(Values(kTokens, 20));
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t j = 0; j < 12; ++j) p.logits[t * 31 + j] = -INFINITY;
    }
    // In parts the whole first chunk is masked.
    fused ? p.RunFused(run, false, false) : p.Run(run, 10, false, false);
    run.ExpectOk();
    for (int64_t t = 0; t < kTokens; ++t) {
      EXPECT_NEAR(p.losses.Read()[t], reference::CrossEntropy(&p.logits[t * 31 + 12], 19, 8),
                  5 * run.wide_tolerance());
      EXPECT_EQ(p.gradient[t * 31 + 3], 0);
    }
  }
}

}  // namespace
}  // namespace stretto::test
