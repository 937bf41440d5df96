#include "stretto/plan/fit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr int kMost = 3;
using Row = std::array<double, kMost>;

// The least squares solution for the columns in `set`, by the normal equations of columns that are
// scaled to the same length; false when they are not independent.
bool Solve(const std::vector<Row>& rows, const std::vector<double>& wanted, unsigned set,
           Row* solution) {
  std::vector<int> columns;
  for (int c = 0; c < kMost; ++c) {
    if ((set >> c & 1u) != 0) columns.push_back(c);
  }
  const size_t n = columns.size();
  std::vector<double> scale(n, 0);
  for (size_t i = 0; i < n; ++i) {
    for (const Row& row : rows) scale[i] += row[columns[i]] * row[columns[i]];
    if (!(scale[i] > 0)) return false;
    scale[i] = 1 / std::sqrt(scale[i]);
  }
  std::vector<std::vector<double>> a(n, std::vector<double>(n + 1, 0));
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t i = 0; i < n; ++i) {
      const double x = rows[r][columns[i]] * scale[i];
      for (size_t k = 0; k < n; ++k) a[i][k] += x * rows[r][columns[k]] * scale[k];
      a[i][n] += x * wanted[r];
    }
  }
  for (size_t i = 0; i < n; ++i) {  // elimination with pivots
    size_t pivot = i;
    for (size_t k = i + 1; k < n; ++k) {
      if (std::abs(a[k][i]) > std::abs(a[pivot][i])) pivot = k;
    }
    std::swap(a[i], a[pivot]);
    if (std::abs(a[i][i]) < 1e-9) return false;
    for (size_t k = 0; k < n; ++k) {
      if (k == i) continue;
      const double factor = a[k][i] / a[i][i];
      for (size_t c = i; c <= n; ++c) a[k][c] -= factor * a[i][c];
    }
  }
  solution->fill(0);
  for (size_t i = 0; i < n; ++i) (*solution)[columns[i]] = a[i][n] / a[i][i] * scale[i];
  return true;
}

// With so few columns every set of those that are not 0 can be tried. Every row is divided by what
// it ought to give, so that errors are relative. Of solutions that are as good as each other the
// one with the fewest columns is taken.
absl::StatusOr<Row> LeastSquares(std::vector<Row> rows, const std::vector<double>& seconds) {
  if (rows.empty()) return absl::InvalidArgumentError("there are no measurements to fit");
  for (size_t r = 0; r < rows.size(); ++r) {
    const double s = seconds[r];
    bool sound = std::isfinite(s) && s >= 0;
    for (const double x : rows[r]) sound = sound && std::isfinite(x) && x >= 0;
    if (!sound) {
      return absl::InvalidArgumentError(
          absl::StrCat("measurement ", r, " of ", s, " seconds is negative or not finite"));
    }
    // Below the clock's grain only the difference counts.
    constexpr double kGrain = 1e-9;
    for (double& x : rows[r]) x /= std::max(s, kGrain);
  }
  std::vector<double> wanted;
  for (const double s : seconds) wanted.push_back(s > 0 ? 1 : 0);
  Row best = {};
  double least = std::numeric_limits<double>::infinity();
  std::vector<unsigned> sets;
  for (unsigned set = 0; set < 1u << kMost; ++set) sets.push_back(set);
  std::stable_sort(sets.begin(), sets.end(), [](unsigned a, unsigned b) {
    return __builtin_popcount(a) < __builtin_popcount(b);
  });
  for (const unsigned set : sets) {
    Row solution = {};
    if (!Solve(rows, wanted, set, &solution)) continue;
    if (std::any_of(solution.begin(), solution.end(), [](double x) { return x < 0; })) continue;
    double error = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      double d = wanted[r];
      for (int c = 0; c < kMost; ++c) d -= rows[r][c] * solution[c];
      error += d * d;
    }
    if (error < least - 1e-18) {
      least = error;
      best = solution;
    }
  }
  return best;
}

}  // namespace

absl::StatusOr<StageCost> FitStage(const std::vector<StageSample>& samples) {
  std::vector<Row> rows;
  std::vector<double> seconds;
  for (const StageSample& s : samples) {
    rows.push_back({1, s.tokens, s.pairs});
    seconds.push_back(s.seconds);
  }
  STRETTO_ASSIGN_OR_RETURN(const Row x, LeastSquares(std::move(rows), seconds));
  return StageCost{.fixed = x[0], .per_token = x[1], .per_pair = x[2]};
}

absl::StatusOr<OperationCost> FitOperation(const std::vector<OperationSample>& samples) {
  std::vector<Row> rows;
  std::vector<double> seconds;
  for (const OperationSample& s : samples) {
    rows.push_back({static_cast<double>(s.ranks - 1), s.bytes_sent, 0});
    seconds.push_back(s.seconds);
  }
  STRETTO_ASSIGN_OR_RETURN(const Row x, LeastSquares(std::move(rows), seconds));
  return OperationCost{.latency = x[0], .bytes_per_second = x[1] > 0 ? 1 / x[1] : 0};
}

}  // namespace stretto
