#include "stretto/core/tensor.h"

#include <type_traits>
#include <vector>

#include "gtest/gtest.h"

namespace stretto {
namespace {

static_assert(std::is_trivially_copyable_v<Tensor>);

TEST(TensorTest, ViewsAddressTheSameMemory) {
  std::vector<float> memory(5 * 9);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
  const Tensor qkv = Tensor::Of(memory.data(), DType::kF32, {5, 9});
  EXPECT_TRUE(qkv.contiguous());
  EXPECT_EQ(qkv.bytes(), 5 * 9 * 4);
  const Tensor k = qkv.Columns(3, 3);
  EXPECT_FALSE(k.contiguous());
  EXPECT_EQ(k.as<float>(2)[1], 2 * 9 + 3 + 1);
  const Tensor rows = k.Rows(3, 2);
  EXPECT_EQ(rows.rows(), 2);
  EXPECT_EQ(rows.as<float>()[0], 3 * 9 + 3);
  EXPECT_TRUE(k.Rows(1, 1).contiguous());
  const Tensor heads = k.Heads(3);
  EXPECT_EQ(heads.rank, 3);
  EXPECT_EQ(heads.dims[2], 1);
  EXPECT_EQ(heads.row_stride, 9);
  const Tensor flat = qkv.Flat();
  EXPECT_EQ(flat.elements(), 45);
  EXPECT_EQ(flat.as<float>(44)[0], 44);
}

TEST(TensorTest, DescribesItself) {
  std::vector<BFloat16> memory(4 * 12);
  const Tensor t = Tensor::Of(memory.data(), DType::kBF16, {4, 12});
  EXPECT_EQ(Describe(t), "bf16[4, 12] on cpu");
  EXPECT_EQ(Describe(t.Columns(0, 5)), "bf16[4, 5] stride 12 on cpu");
  EXPECT_EQ(Describe(Tensor()), "absent");
  EXPECT_EQ(Describe(Tensor::Of(memory.data(), DType::kI64, {}, Device::Cuda(3))),
            "i64[] on cuda:3");
}

TEST(TensorTest, SameShapeLooksAtDimensionsOnly) {
  std::vector<float> memory(64);
  const Tensor a = Tensor::Of(memory.data(), DType::kF32, {4, 6});
  const Tensor wide = Tensor::Of(memory.data(), DType::kF32, {4, 8});
  EXPECT_TRUE(SameShape(a, wide.Columns(1, 6)));
  EXPECT_TRUE(SameShape(a, Tensor::Of(memory.data(), DType::kBF16, {4, 6})));
  EXPECT_FALSE(SameShape(a, wide));
  EXPECT_FALSE(SameShape(a, a.Heads(1)));
  // Dimensions beyond the rank do not count.
  Tensor b = a;
  b.dims[2] = 7;
  EXPECT_TRUE(SameShape(a, b));
}

}  // namespace
}  // namespace stretto
