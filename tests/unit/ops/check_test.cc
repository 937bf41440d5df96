// A mismatch fails the stream with a sentence that names the operation and its operands, and leaves
// the outputs alone.
#include <gmock/gmock.h>

#include "support/ops_fixture.h"

namespace stretto::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(CheckTest, ShapesAreNamed) {
  Runner run({DType::kF32});
  Buffer x = run.Make({4, 3}), w = run.Make({5, 2}), y = run.Make({4, 5});
  const auto before = y.bytes();
  ops::Linear(run.context(), y, x, w, {});
  const absl::Status status = run.Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("Linear: w must be [out, in]"), HasSubstr("x f32[4, 3]"),
                    HasSubstr("w f32[5, 2]"), HasSubstr("bias absent")));
  EXPECT_EQ(y.bytes(), before);
}

TEST(CheckTest, OnlyTheFirstErrorIsKept) {
  Runner run({DType::kF32});
  Buffer a = run.Make({2, 3}), b = run.Make({3, 2});
  ops::Gelu(run.context(), a, b);
  ops::Add(run.context(), a, b);
  EXPECT_THAT(std::string(run.Wait().message()), HasSubstr("Gelu"));
}

TEST(CheckTest, TypesAreChecked) {
  {
    Runner run({DType::kF32});
    Buffer x(DType::kF16, {2, 2}), y(DType::kF16, {2, 2});
    ops::Gelu(run.context(), y, x);
    EXPECT_THAT(std::string(run.Wait().message()), HasSubstr("no kernels for this type"));
  }
  {
    Runner run({DType::kBF16});
    Buffer dw(DType::kBF16, {2, 2}), dy(DType::kBF16, {3, 2}), x(DType::kBF16, {3, 2});
    ops::LinearBackwardWeight(run.context(), dw, {}, dy, x, false);
    EXPECT_THAT(std::string(run.Wait().message()), HasSubstr("gradient type"));
  }
}

TEST(CheckTest, DevicesAreChecked) {
  Runner run({DType::kF32});
  Buffer x = run.Make({2, 2}), y = run.Make({2, 2});
  Tensor elsewhere = x;
  elsewhere.device = Device::Cuda(0);
  ops::Gelu(run.context(), y, elsewhere);
  EXPECT_THAT(std::string(run.Wait().message()), AllOf(HasSubstr("device"), HasSubstr("cuda:0")));
}

TEST(CheckTest, HeadsMustDivide) {
  Runner run({DType::kF32});
  Buffer q = run.Make({2, 3, 4}), k = run.Make({2, 2, 4}), o = run.Make({2, 3, 4});
  Buffer lse = run.Make({2, 3}), cu = Indices({0, 2});
  ops::Attention(run.context(), o, lse, q, k, k, {cu, cu, 2, 2, true, 1.0});
  EXPECT_THAT(std::string(run.Wait().message()),
              AllOf(HasSubstr("Attention"), HasSubstr("must divide"), HasSubstr("k f32[2, 2, 4]")));
}

TEST(CheckTest, NormOperandsComeInPairs) {
  Runner run({DType::kF32});
  Buffer x = run.Make({2, 4}), y = run.Make({2, 4}), w = run.Make({4}), rstd = run.Make({2});
  ops::Norm(run.context(), y, {}, {}, rstd, x, {}, w, w, 1e-5);
  EXPECT_THAT(std::string(run.Wait().message()), HasSubstr("mean and bias"));
}

TEST(CheckTest, PartialsOfNormsHaveTheStatisticsType) {
  Runner run({DType::kBF16});
  Buffer x = run.Make({2, 4}), y = run.Make({2, 4}), w = run.Make({4}), rstd = run.Wide({2});
  ops::NormBackwardInput(run.context(), y, x, x, {}, rstd, w, false, /*partials=*/w);
  EXPECT_THAT(std::string(run.Wait().message()), HasSubstr("PartialBytes"));
}

TEST(CheckTest, MissingBackendsAreNamed) {
  const auto table = KernelsFor(Device::Cuda(0));
  if (table.ok()) GTEST_SKIP() << "this build has kernels for every kind of device";
  EXPECT_EQ(table.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(table.status().message()), AllOf(HasSubstr("cuda:0"), HasSubstr("cpu")));
}

TEST(CheckTest, EmptyOperandsAreLegal) {
  Runner run({DType::kF32, 2});
  Tensor none = Tensor::Of(nullptr, DType::kF32, {0, 4});
  Buffer w = run.Make({5, 4}, Random(20, 1));
  ops::Linear(run.context(), Tensor::Of(nullptr, DType::kF32, {0, 5}), none, w, {});
  ops::Gelu(run.context(), none, none);
  ops::Zero(run.context(), none);
  run.ExpectOk();
}

}  // namespace
}  // namespace stretto::test
