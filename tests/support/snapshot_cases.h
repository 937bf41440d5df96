// The order of a snapshot's copies and the next update, on any device.
#ifndef STRETTO_TESTS_SUPPORT_SNAPSHOT_CASES_H_
#define STRETTO_TESTS_SUPPORT_SNAPSHOT_CASES_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/snapshot/slot_copies.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/stream.h"

namespace stretto::testing {

using snapshot_internal::SlotCopies;
using snapshot_internal::SlotCopyOptions;

// A state of several boxes in the device's memory, of which each part of an update writes some, one
// is written after all parts, and one is another rank's; and a slot for it.
struct CopiedState {
  static constexpr int kParts = 3;
  Device device;
  std::unique_ptr<Stream> stream;  // of the steps
  Arena memory, host;
  StateRegistry registry;
  SlotContents contents;
  std::shared_ptr<SlotMemory> slot;
  std::unique_ptr<SlotCopies> copies;

  CopiedState(Device on, StreamMode mode, const SlotCopyOptions& options = {}) : device(on) {
    stream = *Stream::Create(device, {.mode = mode});
    memory = *Arena::Create(device, "state", int64_t{1} << 20);
    host = *Arena::CreateHost(device, "values", int64_t{1} << 20);
    int64_t next = 0;
    const auto add = [&](const std::string& name, int part, int64_t elements, bool owned = true) {
      const Tensor local = Tensor::Of(memory.data() + next, DType::kF32, {elements}, device);
      next += (local.bytes() + 63) / 64 * 64;
      EXPECT_TRUE(registry
                      .Add({.name = name,
                            .global_shape = {elements},
                            .local = local,
                            .owned = owned,
                            .update_part = part})
                      .ok());
    };
    // Not in the order of parts, as parameters are registered before the optimizer's state.
    for (int part : {2, 0, 1}) add(absl::StrCat("p", part), part, 5000 + 1001 * part);
    add("scales", -1, 77);
    add("alike", 0, 999, /*owned=*/false);
    for (int part : {0, 1, 2}) add(absl::StrCat("m", part), part, 20000 + 7 * part);
    contents = PlanContents(registry);
    slot = *SlotMemory::Create(absl::StrCat("/stretto-copies-test-", getpid()),
                               PayloadCapacity(contents));
    SlotCopyOptions with = options;
    with.device = device;
    with.chunk_bytes = 4096;  // several pieces and turns of the ring
    copies = *SlotCopies::Create(registry, contents, with);
  }
  ~CopiedState() {
    if (slot != nullptr) slot->Unlink();
  }

  static float Value(int64_t step, size_t entry, int64_t element) {
    return static_cast<float>(step * 100000 + static_cast<int64_t>(entry) * 1000 + element % 997);
  }
  // Enqueues what the update of this part writes in `step`; -1: what follows all parts.
  void Write(int64_t step, int part) {
    std::byte* values = host.data();
    for (size_t i = 0; i < registry.entries().size(); ++i) {
      const StateEntry& entry = registry.entries()[i];
      if (entry.update_part == part) {
        // Each step has its own values, which nobody overwrites while they are being copied.
        std::vector<float> v(static_cast<size_t>(entry.local.elements()));
        for (size_t k = 0; k < v.size(); ++k) v[k] = Value(step, i, static_cast<int64_t>(k));
        std::memcpy(values, v.data(), static_cast<size_t>(entry.local.bytes()));
        CopyBytes(*stream, entry.local.data, values, entry.local.bytes());
      }
      values += entry.local.bytes();
    }
    EXPECT_TRUE(stream->Synchronize().ok());
  }
  void WriteAll(int64_t step) {
    for (int part = -1; part < kParts; ++part) Write(step, part);
  }
  // Captures in a thread, as a Snapshotter does.
  std::thread Capture(absl::Status* status) {
    return std::thread([this, status] { *status = copies->Capture(slot, &contents); });
  }
  // Elements of the slot that are not those of `step`.
  int64_t Torn(int64_t step) const {
    int64_t torn = 0;
    for (size_t i = 0; i < contents.entries.size(); ++i) {
      const SlotEntry& entry = contents.entries[i];
      const auto* v = reinterpret_cast<const float*>(slot->payload() + entry.offset);
      for (int64_t k = 0; k < entry.bytes / 4; ++k) torn += v[k] == Value(step, i, k) ? 0 : 1;
    }
    return torn;
  }
};

// The copies of part 1 are held back. The update of part 0 goes on, that of part 1 does not, and
// the snapshot is that of one step. With `wait` false the
// later parts do not wait, and it is torn.
inline void CheckPartsWaitForTheirOwnCopies(Device device, StreamMode mode, bool direct,
                                            bool wait) {
  std::atomic<bool> held{true}, reached{false}, second{false};
  SlotCopyOptions options;
  options.direct = direct;
  options.before_part = [&](int part) {
    if (part != 1) return;
    reached = true;
    while (held) std::this_thread::yield();
  };
  CopiedState state(device, mode, options);
  if (direct) {
    ASSERT_TRUE(state.copies->Register(state.slot).ok());
  }
  state.WriteAll(1);
  state.copies->Begin(state.stream->Record());
  absl::Status status;
  std::thread capture = state.Capture(&status);
  const auto before = [&](int part) {
    if (wait || part == 0) state.copies->WaitForPart(*state.stream, part);
  };
  before(0);
  state.Write(2, 0);  // returns although the copies of part 1 have not begun
  while (!reached) std::this_thread::yield();
  std::thread update([&] {
    EXPECT_TRUE(UseDevice(device).ok());
    for (int part : {1, 2, -1}) {
      before(part);
      second = true;
      state.Write(2, part);
    }
  });
  if (wait) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(second) << "part 1 was written before its copies had begun";
  } else {
    update.join();
  }
  held = false;
  if (wait) update.join();
  capture.join();
  state.copies->End();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(state.slot->VerifyData(state.contents).ok());
  if (wait) {
    EXPECT_EQ(state.Torn(1), 0);
  } else {
    EXPECT_GT(state.Torn(1), 0);
    EXPECT_GT(state.Torn(2), 0);
  }
}

// Captured, changed and restored: the bits are there again, also of a second capture; and a byte
// that changed in the slot is found.
inline void CheckThereAndBack(Device device, StreamMode mode, bool direct, int threads = 3) {
  SlotCopyOptions options;
  options.direct = direct;
  options.threads = threads;
  CopiedState state(device, mode, options);
  if (direct) {
    ASSERT_TRUE(state.copies->Register(state.slot).ok());
    EXPECT_FALSE(state.copies->WantsRegistration(state.slot));
  }
  for (int64_t step : {1, 2}) {
    state.WriteAll(step);
    state.copies->Begin(state.stream->Record());
    const absl::Status captured = state.copies->Capture(state.slot, &state.contents);
    ASSERT_TRUE(captured.ok()) << captured;
    state.copies->End();
    EXPECT_EQ(state.Torn(step), 0);
    state.WriteAll(step + 10);
    ASSERT_TRUE(state.slot->VerifyData(state.contents, 2).ok());
    const absl::Status restored = state.copies->Restore(*state.slot, state.contents);
    ASSERT_TRUE(restored.ok()) << restored;
    for (size_t i = 0; i < state.registry.entries().size(); ++i) {
      const StateEntry& entry = state.registry.entries()[i];
      std::vector<float> now(static_cast<size_t>(entry.local.elements()));
      ASSERT_TRUE(CopyToHost(now.data(), entry.local).ok());
      const int64_t expected = entry.owned ? step : step + 10;
      for (size_t k = 0; k < now.size(); ++k) {
        ASSERT_EQ(now[k], CopiedState::Value(expected, i, static_cast<int64_t>(k)))
            << entry.name << " " << k;
      }
    }
  }
  state.slot->payload()[state.contents.entries[1].offset] ^= std::byte{1};
  const absl::Status damaged = state.slot->VerifyData(state.contents, 2);
  EXPECT_NE(std::string(damaged.message()).find("the bytes of p0 are not"), std::string::npos)
      << damaged;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_SNAPSHOT_CASES_H_
