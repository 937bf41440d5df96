#include "kernels/cuda/table.h"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/tuning.h"

namespace stretto {
namespace {

// f64 exists on the CPU only.
bool SupportsModelType(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

std::vector<LibraryInfo> DescribeLibraries() {
  return {cuda::DescribeCublasLt(), cuda::DescribeCudnn()};
}

}  // namespace

const KernelTable* CudaKernels() {
  static const KernelTable table = {
      .name = "cuda",
      .device = DeviceKind::kCuda,
      .supports = &SupportsModelType,
      .linear = cuda::Linear(),
      .float8 = cuda::Float8Products(),
      .norm = cuda::Norm(),
      .activation = cuda::Activation(),
      .rotary = cuda::Rotary(),
      .attention = cuda::Attention(),
      .embedding = cuda::Embedding(),
      .loss = cuda::Loss(),
      .optimizer = cuda::Optimizer(),
      .elementwise = cuda::Elementwise(),
      .set_measuring = &cuda::SetTuning,
      .export_choices = &cuda::ExportTuning,
      .import_choices = &cuda::ImportTuning,
      .describe_libraries = &DescribeLibraries,
  };
  return &table;
}

}  // namespace stretto
