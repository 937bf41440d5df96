#include "stretto/data/length_distribution.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr double kKi = 1024;
constexpr int64_t kMostLength = int64_t{1} << 31;

// The integral of length^-exponent over [from, to).
double PowerIntegral(double from, double to, double exponent) {
  const double e = 1 - exponent;
  if (std::abs(e) < 1e-9) return std::log(to / from);
  return (std::pow(to, e) - std::pow(from, e)) / e;
}

double MeanOf(double from, double to, double exponent) {
  return PowerIntegral(from, to, exponent - 1) / PowerIntegral(from, to, exponent);
}

// The mean falls as the exponent grows.
double ExponentFor(double from, double to, double mean) {
  double low = -60, high = 60;
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (low + high);
    (MeanOf(from, to, middle) > mean ? low : high) = middle;
  }
  return 0.5 * (low + high);
}

// Of a density of length^-2: all parts of it that are equally wide in the logarithm hold as many
// tokens.
double EvenMean(double from, double to) { return MeanOf(from, to, 2); }

using Range = LengthDistribution::Range;

std::vector<Range> GitHub() {
  // Each doubling keeps the part of the tokens that it does from 128 Ki to 256 Ki.
  constexpr double kBeyond128 = 0.162, kBeyond256 = 0.098, kKept = kBeyond256 / kBeyond128;
  std::vector<Range> ranges = {
      {16, 4 * kKi, 0.35, 0}, {4 * kKi, 32 * kKi, 0.30, 0}, {32 * kKi, 128 * kKi, 0.188, 0}};
  double beyond = kBeyond128;
  for (double from = 128 * kKi; from < 2048 * kKi; from *= 2) {
    ranges.push_back({from, 2 * from, beyond * (1 - kKept), 0});
    beyond *= kKept;
  }
  for (Range& r : ranges) r.mean = EvenMean(r.from, r.to);
  ranges.front().mean = 1000;
  ranges.push_back({2048 * kKi, 2048 * kKi + 1, beyond, 2048 * kKi});
  return ranges;
}

std::vector<Range> Byted() {
  // 0.05 % of the documents have 2 Mi tokens each and 12.1 % of all: so this is the mean length.
  constexpr double kMean = 0.0005 * 2048 * kKi / 0.121;
  // Tokens and documents between the published marks; a range's mean follows from both.
  const auto range = [](double from, double to, double tokens, double documents) {
    return Range{from * kKi, to * kKi, tokens, tokens / documents * kMean};
  };
  constexpr double kFrom128 = 0.443, kFrom256 = 0.37, kFrom2048 = 0.121;
  // Assumed: how the 0.95 % of 128 Ki to 2 Mi are divided at 256 Ki, and what the shortest hold.
  constexpr double kDocuments256 = 0.0062, kTokens4 = 0.11;
  return {range(16 / kKi, 4, kTokens4, 0.80), range(4, 128, 1 - kFrom128 - kTokens4, 0.19),
          range(128, 256, kFrom128 - kFrom256, 0.0095 - kDocuments256),
          range(256, 2048, kFrom256 - kFrom2048, kDocuments256),
          Range{2048 * kKi, 2048 * kKi + 1, kFrom2048, 2048 * kKi}};
}

}  // namespace

absl::StatusOr<LengthDistribution> LengthDistribution::Named(const std::string& name) {
  if (name == "github") return FromRanges(GitHub());
  if (name == "byted") return FromRanges(Byted());
  return absl::InvalidArgumentError(
      absl::StrCat("there is no distribution of lengths '", name, "'; choose github or byted"));
}

absl::StatusOr<LengthDistribution> LengthDistribution::LogNormal(double median, double sigma) {
  if (!(median >= 1 && median <= 1e9 && sigma >= 0 && sigma <= 10)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a log-normal distribution of lengths has a median from 1 to 1e9 and a sigma "
                     "from 0 to 10, not ",
                     median, " and ", sigma));
  }
  LengthDistribution d;
  d.log_median_ = std::log(median);
  d.sigma_ = sigma;
  return d;
}

absl::StatusOr<LengthDistribution> LengthDistribution::Of(std::vector<int64_t> lengths) {
  if (lengths.empty()) return absl::InvalidArgumentError("there are no lengths to draw from");
  for (const int64_t length : lengths) {
    if (length < 1 || length > kMostLength) {
      return absl::InvalidArgumentError(
          absl::StrCat("a length of ", length, " is not from 1 to ", kMostLength));
    }
  }
  LengthDistribution d;
  d.lengths_ = std::move(lengths);
  return d;
}

absl::StatusOr<LengthDistribution> LengthDistribution::FromRanges(
    const std::vector<Range>& ranges) {
  LengthDistribution d;
  double documents = 0, tokens = 0, end = 1;
  for (const Range& r : ranges) {
    if (!(r.from >= end && r.from < r.to && r.to <= 4e9 && r.tokens > 0 && r.mean >= r.from &&
          r.mean < r.to)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the range of lengths from ", r.from, " to ", r.to, " with ", r.tokens,
                       " of all tokens and a mean of ", r.mean, " cannot be"));
    }
    end = r.to;
    tokens += r.tokens;
    documents += r.tokens / r.mean;
    d.parts_.push_back({documents, r.from, r.to, ExponentFor(r.from, r.to, r.mean)});
  }
  if (!(std::abs(tokens - 1) < 1e-6)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the ranges of lengths have ", tokens, " of all tokens, not 1"));
  }
  for (Part& part : d.parts_) part.below /= documents;
  return d;
}

int64_t LengthDistribution::Draw(const Rng& rng, uint64_t index) const {
  if (!lengths_.empty()) return lengths_[static_cast<size_t>(rng.Below(index, lengths_.size()))];
  double length;
  if (sigma_ >= 0) {
    length = std::exp(log_median_ + sigma_ * rng.Normal(index));
  } else {
    const double u = rng.Uniform(2 * index), v = rng.Uniform(2 * index + 1);
    auto part = parts_.begin();
    while (part + 1 != parts_.end() && u >= part->below) ++part;
    const double e = 1 - part->exponent;
    if (std::abs(e) < 1e-9) {
      length = part->from * std::pow(part->to / part->from, v);
    } else {
      const double a = std::pow(part->from, e), b = std::pow(part->to, e);
      length = std::pow(a + v * (b - a), 1 / e);
    }
    length = std::clamp(length, part->from, part->to);  // whatever rounding did
  }
  return static_cast<int64_t>(std::clamp(length, 1.0, static_cast<double>(kMostLength)));
}

std::vector<int64_t> LengthDistribution::Batch(uint64_t seed, uint64_t step, int64_t tokens,
                                               int64_t longest) const {
  const Rng rng(seed, "data/lengths", step);
  std::vector<int64_t> lengths;
  for (uint64_t i = 0; tokens > 0; ++i) {
    lengths.push_back(std::min({Draw(rng, i), std::max<int64_t>(longest, 1), tokens}));
    tokens -= lengths.back();
  }
  return lengths;
}

absl::StatusOr<std::vector<int64_t>> ParseLengths(const std::string& text,
                                                  const std::string& source) {
  std::vector<int64_t> lengths;
  size_t line = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string word = text.substr(at, end - at);
    at = end + 1;
    ++line;
    while (!word.empty() && (word.back() == '\r' || word.back() == ' ')) word.pop_back();
    if (word.empty()) continue;
    int64_t length = 0;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), length);
    if (error != std::errc() || stop != word.data() + word.size() || length < 1 ||
        length > kMostLength) {
      constexpr size_t kShown = 40;
      return absl::InvalidArgumentError(
          absl::StrCat(source, ", line ", line, ": '", word.substr(0, kShown),
                       "' is no length; each line has one whole number from 1 to ", kMostLength));
    }
    lengths.push_back(length);
  }
  if (lengths.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, " has no lengths; write one number of tokens to a line"));
  }
  return lengths;
}

}  // namespace stretto
