#include "kernels/cpu/table.h"

#include "kernels/cpu/families.h"

namespace stretto {
namespace {

bool Supports(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kBF16;
}

KernelTable MakeTable() {
  KernelTable table;
  table.name = "cpu";
  table.device = DeviceKind::kCpu;
  table.supports = &Supports;
  table.linear = cpu::Linear();
  table.float8 = cpu::Float8Products();
  table.norm = cpu::Norm();
  table.activation = cpu::Activation();
  table.rotary = cpu::Rotary();
  table.attention = cpu::Attention();
  table.embedding = cpu::Embedding();
  table.loss = cpu::Loss();
  table.optimizer = cpu::Optimizer();
  table.elementwise = cpu::Elementwise();
  return table;
}

}  // namespace

const KernelTable* CpuKernels() {
  static const KernelTable table = MakeTable();
  return &table;
}

}  // namespace stretto
