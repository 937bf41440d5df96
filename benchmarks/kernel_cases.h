// What stretto-bench kernels times: calls of operations, with their operands.
#ifndef STRETTO_BENCHMARKS_KERNEL_CASES_H_
#define STRETTO_BENCHMARKS_KERNEL_CASES_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "stretto/core/device.h"
#include "stretto/core/dtype.h"
#include "stretto/core/tensor.h"
#include "stretto/ops/ops.h"

namespace stretto::bench {

// Of a model.
struct KernelShapes {
  int64_t tokens = 0, hidden = 768, heads = 12, kv_heads = 0, ffn = 0, vocabulary = 50304;
  int64_t length = 0, parameters = int64_t{1} << 24;
  DType dtype = DType::kF32;

  DType wide() const { return AccumulateType(dtype); }
  int64_t head_dim() const { return hidden / heads; }
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim(); }
};

// From -0.5 to 0.5.
inline double SmallValue(int64_t i) {
  return static_cast<double>((i * 7919) % 1000) / 1000.0 - 0.5;
}

struct KernelOperand {
  DType dtype;
  std::vector<int64_t> dims;
  std::function<double(int64_t)> value = SmallValue;

  Tensor At(std::byte* data, Device device) const {
    Tensor t = Tensor::Of(data, dtype, {}, device);
    for (const int64_t d : dims) t.dims[static_cast<size_t>(t.rank++)] = d;
    t.row_stride = t.row_elements();
    return t;
  }
  int64_t bytes() const {
    constexpr int64_t kAlignment = 256;
    const int64_t n = At(nullptr, Device::Cpu()).bytes();
    return (n + kAlignment - 1) / kAlignment * kAlignment;
  }
};

using Tensors = std::vector<Tensor>;

struct KernelCase {
  std::string name;
  double bytes = 0;  // that have to move; one of the two is 0
  double flops = 0;
  std::vector<KernelOperand> operands;
  std::function<void(ops::Context, const Tensors&)> run = {};
  // Instead of `run`, for what works on a table of these items.
  std::function<std::vector<OptimizerItem>(const Tensors&)> items = {};
  std::function<void(ops::Context, const Tensors&, const OptimizerTable&)> run_table = {};
};

// A call of each kernel of the model, forward and backward; of FP8 where the backend has them.
std::vector<KernelCase> KernelCases(const KernelShapes& shapes, const KernelTable& kernels);
// What everything else stands beside.
KernelCase CopyCase(Device device);
KernelCase ProductCase(Device device, DType dtype);

}  // namespace stretto::bench

#endif  // STRETTO_BENCHMARKS_KERNEL_CASES_H_
