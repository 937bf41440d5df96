#include "src/comm/device_operations.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace stretto {
namespace {

// A device whose operations end when they are told to.
class Held final : public DeviceCollectives {
 public:
  Held() : stream_(*Stream::Create(Device::Cpu(), {.mode = StreamMode::kFifo})) {}
  ~Held() override { Release(1 << 20); }

  void EnterThread() override {}
  Stream& stream() override { return *stream_; }
  absl::Status AddGroup(const Group&) override { return absl::OkStatus(); }
  absl::StatusOr<std::string> UseCopyEngines(const Group&) override { return "not here"; }
  absl::StatusOr<std::string> Share(const Group&, std::span<std::byte>, uint64_t) override {
    return "not here";
  }
  int64_t Prepare(Operation*) override { return launches; }
  absl::StatusOr<Stream*> Issue(std::span<Operation* const> batch) override {
    batches.push_back(static_cast<int>(batch.size()));
    const int number = ++issued_;
    const std::atomic<int>* released = &released_;
    stream_->Enqueue([released, number] {
      while (*released < number) std::this_thread::yield();
    });
    return end != nullptr ? end : stream_.get();
  }
  absl::Status Check() override { return absl::OkStatus(); }
  void Abort() override {}

  // The first `count` batches.
  void Release(int count) { released_ = count; }

  std::vector<int> batches;
  int64_t launches = 1;   // of each operation
  Stream* end = nullptr;  // where operations end; null: on stream()

 private:
  int issued_ = 0;
  std::atomic<int> released_ = 0;  // outlives the stream
  std::unique_ptr<Stream> stream_;
};

class DeviceOperationsTest : public ::testing::Test {
 protected:
  DeviceOperationsTest() {
    group_.ranks = {0, 1};
    auto held = std::make_unique<Held>();
    held_ = held.get();
    operations_ =
        std::make_unique<DeviceOperations>(std::move(held), recorder_, [](const Operation&) {});
  }

  Operation* Add(CommOp op, int items = 1) {
    Operation* o = all_.emplace_back(std::make_unique<Operation>()).get();
    o->op = op;
    o->group = &group_;
    o->record = recorder_.Begin({});
    o->items.resize(static_cast<std::size_t>(items));
    operations_->Add(o);
    return o;
  }
  bool Advance(bool all = false) {
    const absl::StatusOr<bool> moved = operations_->Advance(all);
    EXPECT_TRUE(moved.ok()) << moved.status();
    return moved.ok() && *moved;
  }
  // Waits for the end of an operation, as far as it was handed over.
  void End(const Operation& o) {
    ASSERT_EQ(o.device, Operation::OnDevice::kQueued);
    while (!o.done.Done()) std::this_thread::yield();
    operations_->Finished(o);
  }
  std::size_t handed_over() const { return held_->batches.size(); }

  FlightRecorder recorder_;
  Group group_;
  std::vector<std::unique_ptr<Operation>> all_;
  Held* held_ = nullptr;
  std::unique_ptr<DeviceOperations> operations_;
};

TEST_F(DeviceOperationsTest, AQueueThatIsFullTakesNoMoreUntilOneHasEnded) {
  constexpr auto kMost =
      static_cast<std::size_t>(DeviceOperations::kMostLaunches / (DeviceOperations::kAround + 1));
  for (std::size_t i = 0; i < 3 * kMost; ++i) Add(CommOp::kAllReduce);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), kMost);
  EXPECT_TRUE(operations_->busy());
  EXPECT_FALSE(Advance());
  EXPECT_EQ(all_[kMost]->device, Operation::OnDevice::kWaiting);
  held_->Release(10);
  for (std::size_t i = 0; i < 10; ++i) End(*all_[i]);
  EXPECT_FALSE(all_[10]->done.Done());
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), kMost + 10);
  held_->Release(1 << 20);
  for (std::size_t i = 10; i < all_.size(); ++i) {
    Advance();
    End(*all_[i]);
  }
  EXPECT_FALSE(operations_->busy());
}

TEST_F(DeviceOperationsTest, AnOperationIsDoneWhereItEnds) {
  std::atomic<bool> go = false;
  const auto aside = *Stream::Create(Device::Cpu(), {.mode = StreamMode::kFifo});
  held_->end = aside.get();
  aside->Enqueue([&go] {
    while (!go) std::this_thread::yield();
  });
  const Operation& late = *Add(CommOp::kAllGather);
  EXPECT_TRUE(Advance());
  held_->end = nullptr;
  const Operation& next = *Add(CommOp::kAllReduce);
  EXPECT_TRUE(Advance());
  held_->Release(2);
  End(next);  // an operation behind it may be done before
  EXPECT_FALSE(late.done.Done());
  go = true;
  End(late);
}

// How many proceed together does not depend on whether there was room, and what has been asked to
// leave needs nobody's call to do so.
TEST_F(DeviceOperationsTest, MessagesThatWaitForRoomGoAsTheyWouldHaveGone) {
  held_->launches = DeviceOperations::kMostLaunches;  // one at a time
  Add(CommOp::kAllReduce);
  EXPECT_TRUE(Advance());
  held_->launches = 1;
  Add(CommOp::kReceive);
  Add(CommOp::kSend);
  EXPECT_FALSE(Advance(true));  // no room
  EXPECT_TRUE(operations_->busy());
  Add(CommOp::kReceive);
  held_->Release(1);
  End(*all_[0]);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(held_->batches, (std::vector<int>{1, 2}));
  EXPECT_EQ(all_[3]->device, Operation::OnDevice::kWaiting);  // more may follow
  EXPECT_FALSE(operations_->busy());
  EXPECT_TRUE(Advance(true));
  EXPECT_EQ(held_->batches, (std::vector<int>{1, 2, 1}));
  held_->Release(1 << 20);
  for (std::size_t i = 1; i < all_.size(); ++i) End(*all_[i]);
}

TEST_F(DeviceOperationsTest, SoItDoesOfOperationsOfManyLaunches) {
  held_->launches = DeviceOperations::kMostLaunches / 3;
  for (int i = 0; i < 4; ++i) Add(CommOp::kAllGather);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), 2u);
  held_->Release(1 << 20);
  End(*all_[0]);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), 3u);
  for (int i = 1; i < 4; ++i) {
    Advance();
    End(*all_[static_cast<std::size_t>(i)]);
  }
}

TEST_F(DeviceOperationsTest, SoDoItemsOfWhichOneOperationHasMany) {
  constexpr int kHalf = DeviceOperations::kMostItems / 2;
  for (int i = 0; i < 3; ++i) Add(CommOp::kReduceScatter, kHalf);
  Add(CommOp::kAllGather, 3 * kHalf);  // more than may be there at a time: goes alone
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), 2u);
  held_->Release(1 << 20);
  End(*all_[0]);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), 3u);
  End(*all_[1]);
  EXPECT_FALSE(Advance());
  End(*all_[2]);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(handed_over(), 4u);
}

TEST_F(DeviceOperationsTest, MessagesProceedTogether) {
  Add(CommOp::kSend);
  Add(CommOp::kReceive);
  EXPECT_FALSE(operations_->busy());
  EXPECT_FALSE(Advance());  // more of them may follow
  Add(CommOp::kSend);
  Add(CommOp::kAllReduce);
  Add(CommOp::kReceive);
  EXPECT_TRUE(Advance());
  EXPECT_EQ(held_->batches, (std::vector<int>{3, 1}));
  EXPECT_TRUE(Advance(true));
  EXPECT_EQ(held_->batches, (std::vector<int>{3, 1, 1}));
}

}  // namespace
}  // namespace stretto
