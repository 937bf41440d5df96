#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <thread>

#include "src/comm/socket.h"
#include "src/comm/transport_tcp.h"
#include "src/comm/transport_threads.h"
#include "stretto/comm/store.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using Body = std::function<void(Transport&)>;

void OnThreads(int ranks, const Body& body) {
  const auto hub = std::make_shared<ThreadsHub>(ranks);
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      ThreadsTransport transport(hub, r);
      body(transport);
    });
  }
  for (std::thread& t : threads) t.join();
}

void OverTcp(int ranks, const Body& body) {
  auto server = StoreServer::Start(StoreOptions());
  ASSERT_TRUE(server.ok()) << server.status();
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      StoreOptions options;
      options.port = (*server)->port();
      auto store = Store::Connect(options, r);
      ASSERT_TRUE(store.ok()) << store.status();
      auto transport = TcpTransport::Connect(**store, r, ranks, "127.0.0.1", "127.0.0.1", "t",
                                             net::After(std::chrono::seconds(20)));
      ASSERT_TRUE(transport.ok()) << transport.status();
      body(**transport);
    });
  }
  for (std::thread& t : threads) t.join();
}

class TransportTest : public ::testing::TestWithParam<void (*)(int, const Body&)> {
 protected:
  static absl::Status Finish(Transport& t, Transport::Request r) {
    const auto deadline = net::After(std::chrono::seconds(20));
    while (net::Clock::now() < deadline) {
      STRETTO_ASSIGN_OR_RETURN(const bool done, t.Test(r));
      if (done) return absl::OkStatus();
      std::this_thread::yield();
    }
    return absl::DeadlineExceededError("the message never finished");
  }
  static std::vector<char> Pattern(int64_t bytes, int seed) {
    std::vector<char> v(static_cast<std::size_t>(bytes));
    for (std::size_t i = 0; i < v.size(); ++i) {
      v[i] = static_cast<char>(i * 131 + i / 251 + static_cast<std::size_t>(seed));
    }
    return v;
  }
};

TEST_P(TransportTest, BothSidesSendLargeMessagesAtOnce) {
  GetParam()(3, [](Transport& t) {
    constexpr int64_t kBytes = (12 << 20) + 5;
    const std::vector<char> mine = Pattern(kBytes, t.rank());
    std::vector<std::vector<char>> got(3, std::vector<char>(kBytes));
    std::vector<Transport::Request> requests;
    // All sends before any receive: nobody reads for the sake of it yet.
    for (int p = 0; p < 3; ++p) requests.push_back(*t.Send(mine.data(), kBytes, p, 5));
    for (int p = 0; p < 3; ++p) {
      requests.push_back(*t.Receive(got[static_cast<std::size_t>(p)].data(), kBytes, p, 5));
    }
    for (const auto r : requests) {
      const absl::Status s = Finish(t, r);
      ASSERT_TRUE(s.ok()) << s;
    }
    for (int p = 0; p < 3; ++p) EXPECT_TRUE(got[static_cast<std::size_t>(p)] == Pattern(kBytes, p));
    EXPECT_EQ(t.bytes_sent(), 3 * kBytes);
  });
}

TEST_P(TransportTest, MatchesByTagAndThenInOrder) {
  GetParam()(2, [](Transport& t) {
    const std::vector<int64_t> sizes = {0, 3, 70000, 64 << 10, (64 << 10) + 1, 1 << 20};
    std::vector<std::vector<char>> data;
    std::vector<Transport::Request> requests;
    const int other = 1 - t.rank();
    for (int tag = 0; tag < 3; ++tag) {
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        data.push_back(Pattern(sizes[i], tag * 100 + static_cast<int>(i)));
      }
    }
    std::vector<std::vector<char>> got(data.size());
    // The receiver asks for the tags in another order than the sender sends them.
    for (int tag = 0; tag < 3; ++tag) {
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        const std::size_t k = static_cast<std::size_t>(tag) * sizes.size() + i;
        requests.push_back(*t.Send(data[k].data(), sizes[i], other, tag));
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    for (int tag = 2; tag >= 0; --tag) {
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        const std::size_t k = static_cast<std::size_t>(tag) * sizes.size() + i;
        got[k].resize(data[k].size());
        const auto r = t.Receive(got[k].data(), sizes[i], other, tag);
        ASSERT_TRUE(r.ok());
        const absl::Status s = Finish(t, *r);
        ASSERT_TRUE(s.ok()) << s;
      }
    }
    for (const auto r : requests) ASSERT_TRUE(Finish(t, r).ok());
    for (std::size_t k = 0; k < data.size(); ++k) EXPECT_TRUE(got[k] == data[k]) << k;
  });
}

// Headers of the next messages arrive in one read with the end of a long one.
TEST_P(TransportTest, ManyLongMessagesInARow) {
  GetParam()(2, [](Transport& t) {
    constexpr int kMessages = 24;
    constexpr int64_t kBytes = 4 << 20;
    const std::vector<char> mine = Pattern(kBytes, t.rank());
    std::vector<std::vector<char>> got(4, std::vector<char>(kBytes));
    std::vector<Transport::Request> sends, receives;
    const int other = 1 - t.rank();
    for (int i = 0; i < kMessages; ++i) {
      sends.push_back(*t.Send(mine.data(), kBytes, other, 1));
      receives.push_back(*t.Receive(got[static_cast<std::size_t>(i % 4)].data(), kBytes, other, 1));
      if (i < 3) continue;
      ASSERT_TRUE(Finish(t, sends[static_cast<std::size_t>(i - 3)]).ok());
      ASSERT_TRUE(Finish(t, receives[static_cast<std::size_t>(i - 3)]).ok());
    }
    for (int i = kMessages - 3; i < kMessages; ++i) {
      ASSERT_TRUE(Finish(t, sends[static_cast<std::size_t>(i)]).ok());
      ASSERT_TRUE(Finish(t, receives[static_cast<std::size_t>(i)]).ok());
    }
    for (const auto& g : got) EXPECT_TRUE(g == Pattern(kBytes, other));
  });
}

TEST_P(TransportTest, AnotherSizeIsAnError) {
  GetParam()(2, [](Transport& t) {
    std::vector<char> data(100);
    if (t.rank() == 0) {
      const auto r = t.Send(data.data(), 50, 1, 9);
      ASSERT_TRUE(r.ok());
      Finish(t, *r).IgnoreError();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    } else {
      const auto r = t.Receive(data.data(), 60, 0, 9);
      ASSERT_TRUE(r.ok());
      const absl::Status s = Finish(t, *r);
      EXPECT_THAT(std::string(s.message()), HasSubstr("rank 0 sent 50 bytes"));
      EXPECT_THAT(std::string(s.message()), HasSubstr("tag 9"));
    }
  });
}

TEST_P(TransportTest, APeerThatLeavesIsAnError) {
  GetParam()(2, [](Transport& t) {
    std::vector<char> data(100);
    if (t.rank() == 0) return;
    const auto r = t.Receive(data.data(), 60, 0, 9);
    const absl::Status s = r.ok() ? Finish(t, *r) : r.status();
    EXPECT_TRUE(absl::IsUnavailable(s)) << s;
    EXPECT_THAT(std::string(s.message()), HasSubstr("rank 0"));
  });
}

TEST_P(TransportTest, WhatAPeerSentBeforeItLeftStillArrives) {
  GetParam()(2, [](Transport& t) {
    std::vector<char> data = Pattern(100, 3);
    if (t.rank() == 0) {
      const auto r = t.Send(data.data(), 100, 1, 1);
      ASSERT_TRUE(r.ok() && Finish(t, *r).ok());
      return;
    }
    // Something else makes progress meanwhile, and sees the message and the end of the connection.
    char never = 0;
    const auto other = t.Receive(&never, 1, 0, 2);
    ASSERT_TRUE(other.ok());
    const auto until = net::After(std::chrono::milliseconds(200));
    while (net::Clock::now() < until && t.Test(*other).ok()) std::this_thread::yield();
    std::vector<char> got(100);
    const auto r = t.Receive(got.data(), 100, 0, 1);
    ASSERT_TRUE(r.ok()) << r.status();
    const absl::Status s = Finish(t, *r);
    EXPECT_TRUE(s.ok()) << s;
    EXPECT_EQ(got, data);
    EXPECT_FALSE(Finish(t, *other).ok());
  });
}

TEST_P(TransportTest, NobodyTouchesAnAbandonedBuffer) {
  GetParam()(2, [](Transport& t) {
    std::vector<char> data(1 << 20, 'x');
    if (t.rank() == 0) {
      ASSERT_TRUE(t.Receive(data.data(), 1 << 20, 1, 1).ok());
      t.Abandon();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      EXPECT_EQ(data[0], 'x');
      EXPECT_FALSE(t.Send(data.data(), 1, 1, 1).ok());
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      std::fill(data.begin(), data.end(), 'y');
      const auto r = t.Send(data.data(), 1 << 20, 0, 1);
      EXPECT_FALSE(r.ok() && Finish(t, *r).ok());
    }
  });
}

TEST_P(TransportTest, RequestsAreReused) {
  GetParam()(2, [](Transport& t) {
    int32_t highest = 0;
    for (int i = 0; i < 500; ++i) {
      int value = i, got = -1;
      const auto s = t.Send(&value, sizeof(value), 1 - t.rank(), i % 7);
      const auto r = t.Receive(&got, sizeof(got), 1 - t.rank(), i % 7);
      ASSERT_TRUE(s.ok() && r.ok());
      highest = std::max({highest, *s, *r});
      ASSERT_TRUE(Finish(t, *s).ok());
      ASSERT_TRUE(Finish(t, *r).ok());
      ASSERT_EQ(got, i);
    }
    EXPECT_LT(highest, 4);
  });
}

INSTANTIATE_TEST_SUITE_P(Backends, TransportTest, ::testing::Values(&OnThreads, &OverTcp),
                         [](const auto& info) { return info.index == 0 ? "Threads" : "Tcp"; });

TEST(TcpTransport, StrangersAreDropped) {
  auto server = StoreServer::Start(StoreOptions());
  ASSERT_TRUE(server.ok());
  StoreOptions options;
  options.port = (*server)->port();
  auto store0 = Store::Connect(options, 0);
  auto store1 = Store::Connect(options, 1);
  std::thread rank0([&] {
    const auto t = TcpTransport::Connect(**store0, 0, 2, "127.0.0.1", "127.0.0.1", "t",
                                         net::After(std::chrono::seconds(20)));
    EXPECT_TRUE(t.ok()) << t.status();
  });
  const auto address = (*store1)->Get("tcp/0", std::chrono::seconds(5));
  ASSERT_TRUE(address.ok());
  auto stranger =
      net::Connect("127.0.0.1", std::stoi(*address), net::After(std::chrono::seconds(5)));
  ASSERT_TRUE(stranger.ok());
  const std::string noise(200, '?');
  net::SendAll(*stranger, noise.data(), noise.size(), net::After(std::chrono::seconds(1)))
      .IgnoreError();
  const auto t = TcpTransport::Connect(**store1, 1, 2, "127.0.0.1", "127.0.0.1", "t",
                                       net::After(std::chrono::seconds(20)));
  EXPECT_TRUE(t.ok()) << t.status();
  rank0.join();
}

TEST(TcpTransport, SaysWhoDidNotConnect) {
  auto server = StoreServer::Start(StoreOptions());
  StoreOptions options;
  options.port = (*server)->port();
  auto store = Store::Connect(options, 0);
  const auto t = TcpTransport::Connect(**store, 0, 2, "127.0.0.1", "127.0.0.1", "t",
                                       net::After(std::chrono::milliseconds(100)));
  EXPECT_THAT(std::string(t.status().message()), HasSubstr("rank(s) 1"));
}

}  // namespace
}  // namespace stretto
