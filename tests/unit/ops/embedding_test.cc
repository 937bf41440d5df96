#include "support/ops_fixture.h"

namespace stretto::test {
namespace {

class EmbeddingTest : public OpsTest {};
STRETTO_ALL_SETTINGS(EmbeddingTest);

TEST_P(EmbeddingTest, ForwardAddsRows) {
  const int64_t n = 21;
  Buffer table = run.Make({7, n}, Random(7 * n, 1), 2),
         places = run.Make({4, n}, Random(4 * n, 2), 1);
  Buffer ids = Indices({6, 0, 6, 3, 1}), positions = Indices({0, 1, 2, 3, 0});
  const std::vector<int> id = {6, 0, 6, 3, 1}, position = {0, 1, 2, 3, 0};
  for (bool with_positions : {false, true}) {
    Buffer y = run.Make({5, n}, 3);
    ops::Embedding(c, y, ids, table, with_positions ? positions.view() : Tensor{},
                   with_positions ? places.view() : Tensor{});
    run.ExpectOk();
    Values expected;
    for (int t = 0; t < 5; ++t) {
      for (int64_t j = 0; j < n; ++j) {
        expected.push_back(table.Read()[id[t] * n + j] +
                           (with_positions ? places.Read()[position[t] * n + j] : 0));
      }
    }
    EXPECT_TRUE(Near(y.Read(), expected, run.tolerance()));
  }
}

TEST_P(EmbeddingTest, BackwardSumsRepeatedIds) {
  const int64_t n = 53, tokens = 400;
  std::vector<int32_t> id(tokens);
  for (int64_t t = 0; t < tokens; ++t) id[t] = (t * t) % 11;
  Buffer ids = Indices(id);
  Buffer dy = run.Make({tokens, n}, Random(tokens * n, 1), 3);
  for (bool acc : {false, true}) {
    Buffer dtable = run.Wide({12, n}, 1);
    dtable.Write(Random(12 * n, 2));
    Values expected = acc ? dtable.Read() : Values(12 * n, 0.0);
    const Values g = dy.Read();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < n; ++j) expected[id[t] * n + j] += g[t * n + j];
    }
    ops::EmbeddingBackward(c, dtable, dy, ids, acc);
    run.ExpectOk();
    EXPECT_TRUE(Near(dtable.Read(), expected, run.wide_tolerance()));
  }
}

TEST_P(EmbeddingTest, IdsOfAPartOfTheTable) {
  Buffer ids = Indices({0, 3, 4, 6, 7, 9}), local = Indices({0, 0, 0, 0, 0, 0});
  ops::LocalIds(c, local, ids, 4, 3, 10, "id");
  run.ExpectOk();
  EXPECT_EQ(local.Read(), (Values{3, 3, 0, 2, 3, 3}));
  for (int bad : {-1, 10}) {
    Runner fresh(GetParam());
    Buffer wrong = Indices({2, bad, 4, 4, 4, 4});
    ops::LocalIds(fresh.context(), local, wrong, 4, 3, 10, "position");
    const absl::Status status = fresh.Wait();
    EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
    EXPECT_NE(std::string(status.message()).find("position " + std::to_string(bad) + " in row 1"),
              std::string::npos)
        << status.message();
    // What follows stays inside of the table, with its row of zeros.
    for (const double v : local.Read()) EXPECT_TRUE(v >= 0 && v <= 3) << v;
  }
}

TEST_P(EmbeddingTest, IdOutsideTheTableIsNamed) {
  Buffer table = run.Make({7, 3}, Random(21, 1)), y = run.Make({3, 3});
  for (int bad : {-1, 7}) {
    Runner fresh(GetParam());
    Buffer ids = Indices({2, 1, bad});
    ops::Embedding(fresh.context(), y, ids, table, {}, {});
    const absl::Status status = fresh.Wait();
    EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
    EXPECT_NE(std::string(status.message()).find("id " + std::to_string(bad) + " in row 2"),
              std::string::npos)
        << status.message();
  }
}

}  // namespace
}  // namespace stretto::test
