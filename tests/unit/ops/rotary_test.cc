#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

class RotaryTest : public OpsTest {};
STRETTO_ALL_SETTINGS(RotaryTest);

struct Tables {
  Values cos, sin;
  Tables(int64_t positions, int64_t half) {
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = p * std::pow(10000.0, -static_cast<double>(i) / half);
        cos.push_back(std::cos(angle));
        sin.push_back(std::sin(angle));
      }
    }
  }
};

TEST_P(RotaryTest, MatchesReferenceAndTurnsBack) {
  for (int64_t dim : {2, 6, 64}) {
    const int64_t tokens = 33, heads = 5, n = tokens * heads * dim;
    const Tables tables(50, dim / 2);
    Buffer cos(run.wide(), {50, dim / 2}, tables.cos), sin(run.wide(), {50, dim / 2}, tables.sin);
    std::vector<int32_t> positions(tokens);
    for (int64_t t = 0; t < tokens; ++t) positions[t] = (t * 7) % 50;
    Buffer index = Indices(positions);
    Buffer x = run.Make({tokens, heads, dim}, Random(n, 1), 2 * heads * dim);
    const Values before = x.Read();
    Buffer y = run.Make({tokens, heads, dim});
    ops::Rope(c, y, x, index, cos, sin, false);
    ops::Rope(c, x, x, index, cos, sin, false);
    run.ExpectOk();
    EXPECT_TRUE(Near(y.Read(),
                     reference::Rope(before, positions, cos.Read(), sin.Read(), heads, dim, false),
                     run.tolerance()));
    EXPECT_EQ(x.Read(), y.Read()) << "in place";
    ops::Rope(c, x, x, index, cos, sin, true);
    run.ExpectOk();
    EXPECT_TRUE(Near(x.Read(), before, 2 * run.tolerance()));
  }
}

TEST_P(RotaryTest, PositionOutsideTheTableIsNamed) {
  const Tables tables(4, 1);
  Buffer cos(run.wide(), {4, 1}, tables.cos), sin(run.wide(), {4, 1}, tables.sin);
  Buffer x = run.Make({3, 1, 2}, Random(6, 1)), index = Indices({0, 4, 1});
  ops::Rope(c, x, x, index, cos, sin, false);
  const absl::Status status = run.Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_NE(std::string(status.message()).find("position 4 of row 1"), std::string::npos)
      << status.message();
}

}  // namespace
}  // namespace stretto::test
