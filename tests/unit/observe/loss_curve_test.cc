#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "stretto/observe/metrics.h"
#include "unit/observe/files.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<LossPoint> Curve(int64_t n) {
  std::vector<LossPoint> points;
  for (int64_t i = 1; i <= n; ++i) {
    const double x = static_cast<double>(i) / static_cast<double>(n);
    LossPoint p{i, 2 + 4 * std::exp(-6 * x) + 0.1 * std::sin(static_cast<double>(i * i)), {}};
    if (i % std::max<int64_t>(1, n / 10) == 0) p.validation = 2.1 + 4 * std::exp(-6 * x);
    points.push_back(p);
  }
  return points;
}

// All coordinates of path data, M and L alike.
std::vector<std::pair<double, double>> Coordinates(const std::string& d) {
  std::vector<std::pair<double, double>> out;
  const char* at = d.c_str();
  while (*at != '\0') {
    if (*at != 'M' && *at != 'L') {
      ++at;
      continue;
    }
    char* end = nullptr;
    const double x = std::strtod(at + 1, &end);
    const double y = std::strtod(end, &end);
    out.emplace_back(x, y);
    at = end;
  }
  return out;
}

std::vector<std::string> Paths(const std::string& svg) {
  std::vector<std::string> out;
  const std::string open = "<path d=\"";
  for (size_t at = svg.find(open); at != std::string::npos; at = svg.find(open, at + 1)) {
    const size_t begin = at + open.size();
    out.push_back(svg.substr(begin, svg.find('"', begin) - begin));
  }
  return out;
}

std::string Draw(const std::vector<LossPoint>& points,
                 const std::optional<LossReference>& reference = std::nullopt,
                 const std::string& title = "t") {
  const TempDir dir;
  const absl::Status status = WriteLossCurve(dir / "sub/loss.svg", points, title, reference);
  EXPECT_TRUE(status.ok()) << status;
  return status.ok() ? ReadAll(dir / "sub/loss.svg") : "";
}

TEST(LossCurve, ShortRunDrawsEveryPoint) {
  const std::string svg = Draw(Curve(50), LossReference{"trigram", 2.5}, "GPT, 50 steps");
  const auto paths = Paths(svg);
  ASSERT_EQ(paths.size(), 2u);  // training and validation
  const auto train = Coordinates(paths[0]);
  ASSERT_EQ(train.size(), 50u);
  EXPECT_EQ(Coordinates(paths[1]).size(), 10u);
  EXPECT_TRUE(std::is_sorted(train.begin(), train.end(),
                             [](const auto& a, const auto& b) { return a.first < b.first; }));
  EXPECT_LT(train.front().second, train.back().second);  // y grows downwards: the loss falls
  EXPECT_THAT(svg, HasSubstr("GPT, 50 steps"));
  EXPECT_THAT(svg, HasSubstr("trigram (2.5000)"));
  EXPECT_THAT(svg, HasSubstr("validation ("));
  EXPECT_THAT(svg, HasSubstr("loss (nats per token)"));
}

TEST(LossCurve, LongRunStaysSmall) {
  const std::string svg = Draw(Curve(200000));
  EXPECT_EQ(Paths(svg).size(), 3u);  // raw, its median, validation
  EXPECT_LT(svg.size(), 100000u);
  for (const auto& path : Paths(svg)) EXPECT_GE(Coordinates(path).size(), 10u);
}

TEST(LossCurve, GapsWhereNotFinite) {
  auto points = Curve(9);
  for (LossPoint& p : points) p.validation.reset();
  points[3].train = kNaN;
  points[5].train = std::numeric_limits<double>::infinity();
  const std::string svg = Draw(points);
  ASSERT_EQ(Paths(svg).size(), 1u);
  const std::string path = Paths(svg)[0];
  EXPECT_EQ(std::count(path.begin(), path.end(), 'M'), 3);
  EXPECT_THAT(path, HasSubstr("h0"));  // point 5 stands alone
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, Not(HasSubstr("inf")));
}

TEST(LossCurve, OddInputs) {
  EXPECT_THAT(Draw({{1, 2.0, {}}}), HasSubstr("2.0000"));
  EXPECT_THAT(Draw({{1, 2.0, {}}, {2, 2.0, {}}}), Not(HasSubstr("nan")));
  EXPECT_THAT(Draw({{5, kNaN, 3.0}}), HasSubstr("validation"));
  EXPECT_THAT(Draw({{0, 0.0, {}}}), Not(HasSubstr("nan")));
  EXPECT_THAT(Draw({{1, 1e-9, {}}, {2, 3e-9, {}}}), Not(HasSubstr("inf")));
  auto all_nan_late = Curve(1000);
  for (size_t i = 300; i < 1000; ++i) all_nan_late[i].train = kNaN;
  EXPECT_THAT(Draw(all_nan_late), Not(HasSubstr("nan")));
}

TEST(LossCurve, ALoneSpikeDoesNotFlattenTheRest) {
  auto points = Curve(1000);
  points[500].train = 1e6;
  const auto raw = Coordinates(Paths(Draw(points))[0]);
  double low = 1e9, high = -1e9;
  for (size_t i = 0; i < raw.size(); ++i) {
    if (i < 480 || i > 520)
      low = std::min(low, raw[i].second), high = std::max(high, raw[i].second);
  }
  EXPECT_GT(high - low, 200);  // of 418 units of plot height
}

TEST(LossCurve, TextIsEscaped) {
  const std::string svg = Draw(Curve(5), LossReference{"<b> & \"c\"", 3}, "a<b\x01&c");
  EXPECT_THAT(svg, HasSubstr("a&lt;b &amp;c"));
  EXPECT_THAT(svg, HasSubstr("&lt;b&gt; &amp; &quot;c&quot;"));
}

TEST(LossCurve, NothingToDraw) {
  const TempDir dir;
  EXPECT_EQ(WriteLossCurve(dir / "l.svg", {}, "t").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteLossCurve(dir / "l.svg", {{1, kNaN, {}}}, "t").code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace stretto
