#include "stretto/core/tensor.h"

int main() {
  float data[6] = {};
  const stretto::Tensor t = stretto::Tensor::Of(data, stretto::DType::kF32, {2, 3});
  return stretto::Describe(t).empty() ? 1 : 0;
}
