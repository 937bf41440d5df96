#include "src/snapshot/keeper_impl.h"

namespace stretto {
void Keeper::Impl::Spill(const SnapshotId&) {}
void Keeper::Impl::SpillMine(const SnapshotId&) {}
void Keeper::Impl::Spilled(int, wire::Reader&) {}
}  // namespace stretto
