#include "stretto/core/stream.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "stretto/core/tensor.h"
#include "unit/core/allocation_count.h"

namespace stretto {
namespace {

std::unique_ptr<Stream> MakeStream(StreamMode mode, int threads = 1, int capacity = 1024) {
  StreamOptions options;
  options.mode = mode;
  options.threads = threads;
  options.queue_capacity = capacity;
  absl::StatusOr<std::unique_ptr<Stream>> stream = Stream::Create(Device::Cpu(), options);
  EXPECT_TRUE(stream.ok()) << stream.status();
  return std::move(stream).value();
}

std::unique_ptr<Stream> Fifo(int threads = 1, int capacity = 1024) {
  return MakeStream(StreamMode::kFifo, threads, capacity);
}

// A gate that holds a stream until the test opens it.
struct Gate {
  std::atomic<bool> open{false};
  void Hold(Stream& stream) {
    stream.Enqueue([this] {
      while (!open.load()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    });
  }
};

TEST(StreamTest, InlineRunsBeforeEnqueueReturns) {
  std::unique_ptr<Stream> stream = MakeStream(StreamMode::kInline);
  const std::thread::id host = std::this_thread::get_id();
  bool ran = false;
  stream->Enqueue([&ran, host] { ran = std::this_thread::get_id() == host; });
  EXPECT_TRUE(ran);
  EXPECT_TRUE(stream->Record().Done());
  EXPECT_TRUE(stream->Synchronize().ok());
  EXPECT_TRUE(Event().Done());
}

TEST(StreamTest, FifoRunsInOrderOnItsOwnThread) {
  for (int capacity : {1, 2, 7, 1024}) {
    std::unique_ptr<Stream> stream = Fifo(1, capacity);
    std::vector<int> order;
    std::thread::id worker;
    for (int i = 0; i < 500; ++i) {
      stream->Enqueue([&order, &worker, i] {
        order.push_back(i);
        worker = std::this_thread::get_id();
      });
    }
    ASSERT_TRUE(stream->Synchronize().ok());
    ASSERT_EQ(order.size(), 500u);
    for (int i = 0; i < 500; ++i) ASSERT_EQ(order[i], i);
    EXPECT_NE(worker, std::this_thread::get_id());
  }
}

TEST(StreamTest, CallablesOfTheLargestSizeArriveWhole) {
  std::unique_ptr<Stream> stream = Fifo();
  constexpr int kWords = (Stream::kSlotBytes - sizeof(void*)) / 4;
  std::array<uint32_t, kWords> words;
  for (int i = 0; i < kWords; ++i) words[i] = i * 2654435761u;
  bool same = false;
  bool* const out = &same;
  stream->Enqueue([words, out] {
    bool good = true;
    for (int i = 0; i < kWords; ++i) good = good && words[i] == i * 2654435761u;
    *out = good;
  });
  words.fill(0);
  ASSERT_TRUE(stream->Synchronize().ok());
  EXPECT_TRUE(same);
}

TEST(StreamTest, EnqueueWaitsWhileTheQueueIsFull) {
  std::unique_ptr<Stream> stream = Fifo(1, 2);
  Gate gate;
  gate.Hold(*stream);
  std::atomic<int> enqueued{0};
  // The host side of the stream moves to this thread until the join.
  std::thread host([&] {
    for (int i = 0; i < 5; ++i) {
      stream->Enqueue([] {});
      enqueued.fetch_add(1);
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT_EQ(enqueued.load(), 1);  // beside the gate, which holds the other slot
  gate.open.store(true);
  host.join();
  EXPECT_EQ(enqueued.load(), 5);
  EXPECT_TRUE(stream->Synchronize().ok());
}

TEST(StreamTest, EventsHappenWhenTheWorkBeforeThemHas) {
  std::unique_ptr<Stream> stream = Fifo();
  EXPECT_TRUE(stream->Record().Done());  // nothing before it
  Gate first;
  first.Hold(*stream);
  const Event one = stream->Record();
  Gate second;
  second.Hold(*stream);
  const Event two = stream->Record();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_FALSE(one.Done());
  first.open.store(true);
  while (!one.Done()) std::this_thread::yield();
  EXPECT_FALSE(two.Done());
  second.open.store(true);
  ASSERT_TRUE(stream->Synchronize().ok());
  EXPECT_TRUE(two.Done());
}

// Without the Wait, the consumer would read before the gate opens: see the control below.
TEST(StreamTest, WaitOrdersTwoFifoStreams) {
  std::unique_ptr<Stream> producer = Fifo();
  std::unique_ptr<Stream> consumer = Fifo();
  for (bool wait : {true, false}) {
    Gate gate;
    int value = 0;             // ordered by the event when `wait`
    std::atomic<int> flag{0};  // what the control reads instead
    int seen = -1;
    gate.Hold(*producer);
    producer->Enqueue([&value, &flag] {
      value = 41;
      flag.store(41);
    });
    const Event produced = producer->Record();
    if (wait) consumer->Wait(produced);
    consumer->Enqueue([&value, &flag, &seen, wait] { seen = wait ? value : flag.load(); });
    const Event consumed = consumer->Record();
    if (wait) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      EXPECT_FALSE(consumed.Done());
      EXPECT_FALSE(produced.Done());
      gate.open.store(true);
    } else {
      ASSERT_TRUE(consumer->Synchronize().ok());
      gate.open.store(true);
    }
    ASSERT_TRUE(consumer->Synchronize().ok());
    ASSERT_TRUE(producer->Synchronize().ok());
    EXPECT_EQ(seen, wait ? 41 : 0);
  }
}

TEST(StreamTest, AnInlineStreamBlocksTheHostForAFifoEvent) {
  std::unique_ptr<Stream> fifo = Fifo();
  std::unique_ptr<Stream> in_line = MakeStream(StreamMode::kInline);
  int value = 0;
  fifo->Enqueue([&value] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    value = 5;
  });
  in_line->Wait(fifo->Record());
  int seen = 0;
  in_line->Enqueue([&] { seen = value; });
  EXPECT_EQ(seen, 5);
}

TEST(StreamTest, WaitingForItselfOrForThePastIsFree) {
  std::unique_ptr<Stream> stream = Fifo(1, 1);
  std::unique_ptr<Stream> in_line = MakeStream(StreamMode::kInline);
  stream->Enqueue([] {});
  stream->Wait(stream->Record());
  stream->Wait(in_line->Record());
  stream->Wait(Event());
  EXPECT_TRUE(stream->Synchronize().ok());
}

// Two streams hand a plain buffer back and forth: with a missing order this is a race that TSan
// reports, and the final sum is wrong.
TEST(StreamTest, PingPongBetweenStreams) {
  std::unique_ptr<Stream> a = Fifo(2, 3);
  std::unique_ptr<Stream> b = Fifo(2, 5);
  uint64_t cells[64] = {};
  uint64_t* const data = cells;
  Event from_b;
  constexpr int kRounds = 400;
  for (int round = 0; round < kRounds; ++round) {
    for (Stream* stream : {a.get(), b.get()}) {
      if (stream == a.get()) a->Wait(from_b);
      stream->Enqueue([stream, data] {
        stream->pool().ParallelFor(64, 1, [data](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; ++i) data[i] = 3 * data[i] + 1;
        });
      });
      if (stream == a.get()) {
        b->Wait(a->Record());
      } else {
        from_b = b->Record();
      }
    }
  }
  ASSERT_TRUE(b->Synchronize().ok());
  uint64_t expected = 0;
  for (int i = 0; i < 2 * kRounds; ++i) expected = 3 * expected + 1;
  for (uint64_t c : cells) ASSERT_EQ(c, expected);
}

TEST(StreamTest, TheFirstErrorStaysAndWorkGoesOn) {
  for (StreamMode mode : {StreamMode::kInline, StreamMode::kFifo}) {
    std::unique_ptr<Stream> stream = MakeStream(mode);
    Stream* const s = stream.get();
    bool later = false;
    s->Fail(absl::OkStatus());
    EXPECT_TRUE(s->status().ok());
    s->Enqueue([s] { s->Fail(absl::InvalidArgumentError("first")); });
    s->Enqueue([s] { s->Fail(absl::InternalError("second")); });
    s->Enqueue([&later] { later = true; });
    EXPECT_EQ(s->Synchronize(), absl::InvalidArgumentError("first"));
    EXPECT_TRUE(later);
    EXPECT_EQ(s->Synchronize(), absl::InvalidArgumentError("first"));
    EXPECT_EQ(s->status(), absl::InvalidArgumentError("first"));
  }
}

TEST(StreamTest, FailIsSafeFromAnyThread) {
  std::unique_ptr<Stream> stream = Fifo(4);
  Stream* const s = stream.get();
  s->Enqueue([s] {
    s->pool().Run(16, [s](int64_t t) { s->Fail(absl::InternalError(std::to_string(t))); });
  });
  while (s->status().ok()) std::this_thread::yield();
  const absl::Status first = s->status();
  EXPECT_EQ(s->Synchronize(), first);
}

TEST(StreamTest, TheDestructorFinishesTheWork) {
  std::vector<int> order;
  {
    std::unique_ptr<Stream> stream = Fifo(1, 4);
    for (int i = 0; i < 20; ++i) {
      stream->Enqueue([&order, i] {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        order.push_back(i);
      });
    }
  }
  EXPECT_EQ(order.size(), 20u);
}

TEST(StreamTest, NothingIsAllocatedPerEntry) {
  std::unique_ptr<Stream> a = Fifo(2);
  std::unique_ptr<Stream> b = Fifo();
  float value[4] = {};
  const Tensor t = Tensor::Of(value, DType::kF32, {4});
  const auto work = [&] {
    for (int i = 0; i < 100; ++i) {
      a->Enqueue([t] { t.as<float>()[0] += 1; });
      b->Wait(a->Record());
      b->Enqueue([t] { t.as<float>()[1] += 1; });
    }
    return a->Synchronize().ok() && b->Synchronize().ok();
  };
  ASSERT_TRUE(work());
  const int64_t before = AllocationCount();
  ASSERT_TRUE(work());
  EXPECT_EQ(AllocationCount(), before);
  EXPECT_EQ(value[0], 200);
  EXPECT_EQ(value[1], 200);
}

TEST(StreamTest, RefusesBadOptions) {
  StreamOptions options;
  options.threads = 0;
  EXPECT_EQ(Stream::Create(Device::Cpu(), options).status().code(),
            absl::StatusCode::kInvalidArgument);
  options.threads = 1;
  options.queue_capacity = 0;
  EXPECT_EQ(Stream::Create(Device::Cpu(), options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace stretto
