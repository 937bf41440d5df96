#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kernels/cuda/gated_hopper.cuh"
#include "kernels/cuda/gated_hopper.h"
#include "kernels/cuda/launch.h"

namespace stretto::cuda {
namespace {

constexpr int kCluster = 2;
constexpr int kStages = 4;
constexpr int kBuffers = 2;

// The stride of a single row need not be one that maps take.
hopper::MappedMatrix Mapped(const Tensor& t) {
  const int64_t stride = t.dims[0] > 1 ? t.row_stride : hopper::Parts(t.dims[1], 8) * 8;
  return {t.data, t.dims[0], t.dims[1], stride};
}

bool Serves(const Tensor& act, const Tensor& gate_up, const Tensor& x, const Tensor& w) {
  const char* const variable = std::getenv("STRETTO_GATED");
  const std::string_view choice = variable == nullptr ? "" : variable;
  if (choice == "separate") return false;
  if (act.dtype != DType::kBF16 || act.elements() == 0 || x.dims[1] == 0) return false;
  if (act.dims[1] % 8 != 0) return false;
  for (const Tensor& t : {act, gate_up, x, w}) {
    if (!RowsAligned(t) || t.dims[0] > INT32_MAX / 2 || t.dims[1] > INT32_MAX / 2) return false;
  }
  const int64_t tiles = hopper::Parts(act.dims[0], hopper::kGatedRows) *
                        hopper::Parts(act.dims[1], hopper::kGatedColumns);
  if (tiles > INT32_MAX / 2 || (choice != "own" && tiles < Multiprocessors())) return false;
  return hopper::IsHopper() && hopper::EncodeTiled() != nullptr;
}

}  // namespace

bool GatedLinear(Stream& s, Tensor act, Tensor gate_up, Tensor x, Tensor w) {
  if (!Serves(act, gate_up, x, w)) return false;
  const hopper::GatedCall call = {act.dims[0], act.dims[1],     x.dims[1],  Mapped(x),
                                  Mapped(w),   Mapped(gate_up), Mapped(act)};
  if (!hopper::LaunchGated<kCluster, kStages, kBuffers, true, true>(Native(s), call, Multiprocessors())) {
    return false;
  }
  Launched(s, "LinearSwiglu");
  return true;
}

}  // namespace stretto::cuda
