// Copies between state and slots on the CPU: with streams that run work at once and with a thread
// of their own, into the slot and through the ring.
#include "src/snapshot/slot_copies.h"

#include <gtest/gtest.h>

#include "tests/support/snapshot_cases.h"

namespace stretto {
namespace {

class SlotCopies : public ::testing::TestWithParam<std::tuple<StreamMode, bool>> {
 protected:
  StreamMode mode() const { return std::get<0>(GetParam()); }
  bool direct() const { return std::get<1>(GetParam()); }
};

TEST_P(SlotCopies, PartsOfAnUpdateWaitForTheirOwnCopies) {
  testing::CheckPartsWaitForTheirOwnCopies(Device::Cpu(), mode(), direct(), /*wait=*/true);
}

TEST_P(SlotCopies, WithoutTheWaitASnapshotIsTorn) {
  testing::CheckPartsWaitForTheirOwnCopies(Device::Cpu(), mode(), direct(), /*wait=*/false);
}

TEST_P(SlotCopies, GoThereAndBack) { testing::CheckThereAndBack(Device::Cpu(), mode(), direct()); }

// Where the system gives no threads, who fills the ring empties it.
TEST_P(SlotCopies, GoThereAndBackWithoutOtherThreads) {
  testing::CheckThereAndBack(Device::Cpu(), mode(), direct(), /*threads=*/0);
}

INSTANTIATE_TEST_SUITE_P(Cpu, SlotCopies,
                         ::testing::Combine(::testing::Values(StreamMode::kInline,
                                                              StreamMode::kFifo),
                                            ::testing::Bool()));

// What is enqueued on the steps' stream and not done yet belongs to the snapshot.
TEST(SlotCopiesOrder, CopiesWaitForTheEventThatEndsTheUpdate) {
  testing::CopiedState state(Device::Cpu(), StreamMode::kFifo);
  state.WriteAll(1);
  static std::atomic<bool> held;
  held = true;
  state.stream->Enqueue([] {
    while (held) std::this_thread::yield();
  });
  // The last writing of step 2, behind what holds the stream up.
  const StateEntry& entry = state.registry.entries()[0];
  std::vector<float> values(static_cast<size_t>(entry.local.elements()));
  for (size_t k = 0; k < values.size(); ++k) {
    values[k] = testing::CopiedState::Value(1, 0, static_cast<int64_t>(k)) + 0.5f;
  }
  CopyBytes(*state.stream, entry.local.data, values.data(), entry.local.bytes());
  state.copies->Begin(state.stream->Record());
  absl::Status status;
  std::thread capture = state.Capture(&status);
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  held = false;
  capture.join();
  state.copies->End();
  ASSERT_TRUE(status.ok()) << status;
  const auto* copied =
      reinterpret_cast<const float*>(state.slot->payload() + state.contents.entries[0].offset);
  for (size_t k = 0; k < values.size(); ++k) ASSERT_EQ(copied[k], values[k]);
}

// Where nothing comes of a capture nobody waits for ever.
TEST(SlotCopiesOrder, NobodyWaitsForACaptureThatIsGivenUp) {
  testing::CopiedState state(Device::Cpu(), StreamMode::kInline);
  state.copies->Begin({});
  std::thread update([&] { state.copies->WaitForPart(*state.stream, -1); });
  state.copies->End();
  update.join();
  EXPECT_FALSE(state.copies->under_way());
}

}  // namespace
}  // namespace stretto
