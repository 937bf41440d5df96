#include "stretto/comm/store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <thread>

#include "src/comm/socket.h"
#include "src/comm/wire.h"
#include "stretto/core/rng.h"

namespace stretto {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

TEST(Socket, KnowsWhenItHasMetItself) {
  const net::Fd alone(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const general = reinterpret_cast<sockaddr*>(&address);
  ASSERT_EQ(bind(alone.get(), general, size), 0);
  ASSERT_EQ(getsockname(alone.get(), general, &size), 0);
  EXPECT_FALSE(net::IsToItself(alone));
  ASSERT_EQ(connect(alone.get(), general, size), 0);  // nobody listens there
  EXPECT_TRUE(net::IsToItself(alone));
  int port = 0;
  const net::Fd listener = *net::Listen("127.0.0.1", 0, &port);
  EXPECT_FALSE(net::IsToItself(*net::Connect("127.0.0.1", port, net::After(milliseconds(5000)))));
}

class StoreTest : public ::testing::Test {
 protected:
  StoreTest() {
    options_.job_token = "secret";
    options_.connect_timeout = std::chrono::seconds(5);
    auto server = StoreServer::Start(options_);
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    options_.port = server_->port();
  }
  std::unique_ptr<Store> Client(int rank) {
    auto store = Store::Connect(options_, rank);
    EXPECT_TRUE(store.ok()) << store.status();
    return std::move(*store);
  }
  net::Fd Raw() {
    auto fd = net::Connect("127.0.0.1", options_.port, net::After(milliseconds(5000)));
    EXPECT_TRUE(fd.ok());
    return std::move(*fd);
  }
  // True when the server hangs up without having answered.
  static bool HungUp(const net::Fd& fd) {
    char byte;
    return absl::IsUnavailable(net::ReceiveAll(fd, &byte, 1, net::After(milliseconds(3000))));
  }
  static std::string Hello(const std::string& token, int rank) {
    wire::Writer w;
    w.Int(wire::Request::kHello).Int(uint64_t{1}).Int(wire::kHelloMagic).Int(int32_t{rank});
    return w.Text(token).Frame();
  }

  StoreOptions options_;
  std::unique_ptr<StoreServer> server_;
};

TEST_F(StoreTest, SetsAndGets) {
  const auto a = Client(0);
  const auto b = Client(1);
  const std::string binary("x\0y\n", 4);
  EXPECT_TRUE(a->Set("k", binary).ok());
  EXPECT_EQ(*b->TryGet("k"), binary);
  EXPECT_TRUE(absl::IsNotFound(b->TryGet("nothing").status()));
  EXPECT_EQ(*a->Add("n", 5), 5);
  EXPECT_EQ(*b->Add("n", -7), -2);
  EXPECT_EQ(*b->TryGet("n"), "-2");
  EXPECT_TRUE(absl::IsFailedPrecondition(a->Add("k", 1).status()));
  EXPECT_EQ(*a->Add("n", 1), -1);  // the connection survived
  EXPECT_TRUE(a->Set("p/2", "two").ok());
  EXPECT_TRUE(a->Set("p/1", "").ok());
  EXPECT_TRUE(a->Set("q", "").ok());
  EXPECT_THAT(*b->List("p/"), ElementsAre(Pair("p/1", ""), Pair("p/2", "two")));
  EXPECT_TRUE(b->Erase("p/").ok());
  EXPECT_TRUE(a->List("p/")->empty());
  EXPECT_EQ(a->List("")->size(), 3u);
  const std::string big(5 << 20, 'b');
  EXPECT_TRUE(a->Set("big", big).ok());
  EXPECT_EQ(*b->TryGet("big"), big);
}

TEST_F(StoreTest, WaitsForKeys) {
  const auto a = Client(0);
  auto b = Client(1);
  std::thread setter([&] {
    std::this_thread::sleep_for(milliseconds(50));
    EXPECT_TRUE(b->Set("late", "v").ok());
    EXPECT_TRUE(b->Set("all/0", "").ok());
    EXPECT_TRUE(b->Set("all/0", "").ok());  // the same key does not count twice
    EXPECT_TRUE(b->Set("all/1", "").ok());
  });
  // Two threads on one connection: one waits, the other is served meanwhile.
  std::thread other([&] {
    for (int i = 0; i < 100; ++i) EXPECT_TRUE(a->Add("count", 1).ok());
  });
  EXPECT_EQ(*a->Get("late", milliseconds(5000)), "v");
  EXPECT_EQ(a->ListWhen("all/", 2, milliseconds(5000))->size(), 2u);
  setter.join();
  other.join();
  const auto never = a->Get("never", milliseconds(30));
  EXPECT_TRUE(absl::IsDeadlineExceeded(never.status()));
  EXPECT_THAT(std::string(never.status().message()), HasSubstr("'never'"));
  EXPECT_TRUE(absl::IsDeadlineExceeded(a->ListWhen("all/", 3, milliseconds(30)).status()));
  // Nobody waits out the time for a rank that is gone.
  std::thread leaves([&] {
    std::this_thread::sleep_for(milliseconds(50));
    b.reset();
  });
  const auto listed = a->ListWhen("all/", 3, std::chrono::minutes(10));
  leaves.join();
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_EQ(listed->size(), 2u);
  EXPECT_EQ(*a->Add("count", 0), 100);
}

TEST_F(StoreTest, TurnsAnotherJobAway) {
  StoreOptions other = options_;
  other.job_token = "Secret";
  const auto refused = Store::Connect(other, 4);
  EXPECT_TRUE(absl::IsPermissionDenied(refused.status())) << refused.status();
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("rank 4"));
  const auto store = Client(0);
  EXPECT_TRUE(absl::IsNotFound(store->TryGet("dead/4").status()));
}

TEST_F(StoreTest, TurnsASecondProcessOfTheSameRankAway) {
  const auto first = Client(1);
  const auto refused = Store::Connect(options_, 1);
  EXPECT_TRUE(absl::IsPermissionDenied(refused.status())) << refused.status();
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("connected already"));
  EXPECT_TRUE(absl::IsNotFound(first->TryGet("dead/1").status()));
}

TEST_F(StoreTest, GarbageDoesNotHarmIt) {
  const auto store = Client(0);
  const std::string http = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
  net::Fd fd = Raw();
  EXPECT_TRUE(net::SendAll(fd, http.data(), http.size(), net::After(milliseconds(1000))).ok());
  EXPECT_TRUE(HungUp(fd));
  // A request before the greeting, and an empty frame.
  wire::Writer early;
  early.Int(wire::Request::kSet).Int(uint64_t{1});
  early.Text("k").Text("v");
  for (const std::string& bytes : {early.Frame(), std::string(4, '\0')}) {
    fd = Raw();
    EXPECT_TRUE(net::SendAll(fd, bytes.data(), bytes.size(), net::After(milliseconds(1000))).ok());
    EXPECT_TRUE(HungUp(fd));
  }
  EXPECT_TRUE(absl::IsNotFound(store->TryGet("k").status()));
  // Random frames after a correct greeting.
  const Rng rng(1, "garbage");
  for (uint64_t round = 0; round < 200; ++round) {
    fd = Raw();
    std::string bytes = Hello("secret", -1);
    const uint32_t length = static_cast<uint32_t>(rng.Below(round * 1000, 64));
    bytes.append(reinterpret_cast<const char*>(&length), 4);
    for (uint32_t i = 0; i < length; ++i) {
      bytes +=
          static_cast<char>(i == 0 ? rng.Below(round * 1000 + 1, 12) : rng.Bits(round * 1000 + i));
    }
    net::SendAll(fd, bytes.data(), bytes.size(), net::After(milliseconds(1000))).IgnoreError();
  }
  // A length that nobody should allocate.
  fd = Raw();
  const std::string huge = Hello("secret", -1) + std::string("\xff\xff\xff\x7f", 4);
  EXPECT_TRUE(net::SendAll(fd, huge.data(), huge.size(), net::After(milliseconds(1000))).ok());
  EXPECT_TRUE(store->Set("still", "here").ok());
  EXPECT_EQ(*store->TryGet("still"), "here");
}

TEST_F(StoreTest, ShowsDeathAndDeparture) {
  const auto watcher = Client(0);
  {
    net::Fd fd = Raw();
    const std::string hello = Hello("secret", 7);
    EXPECT_TRUE(net::SendAll(fd, hello.data(), hello.size(), net::After(milliseconds(1000))).ok());
    char answer[4];
    EXPECT_TRUE(net::ReceiveAll(fd, answer, 4, net::After(milliseconds(1000))).ok());
  }  // closed without a goodbye
  EXPECT_TRUE(watcher->Get("dead/7", milliseconds(3000)).ok());
  Client(3).reset();
  EXPECT_TRUE(watcher->Get("left/3", milliseconds(3000)).ok());
  EXPECT_TRUE(absl::IsNotFound(watcher->TryGet("dead/3").status()));
  EXPECT_EQ(*watcher->TryGet("trouble"), "2");
  EXPECT_FALSE(server_->WaitUntilIdle(milliseconds(10)));
}

TEST_F(StoreTest, AServerThatIsGoneIsAnError) {
  const auto store = Client(1);
  server_.reset();
  const absl::Status lost = store->Set("k", "v");
  EXPECT_TRUE(absl::IsUnavailable(lost)) << lost;
  EXPECT_THAT(std::string(lost.message()), HasSubstr("rank 0"));
  EXPECT_FALSE(store->Get("k", milliseconds(10000)).ok());
}

TEST_F(StoreTest, ConnectGivesUpWithASentence) {
  StoreOptions nobody = options_;
  server_.reset();
  nobody.connect_timeout = milliseconds(200);
  const auto store = Store::Connect(nobody, 2);
  EXPECT_TRUE(absl::IsDeadlineExceeded(store.status())) << store.status();
  EXPECT_THAT(std::string(store.status().message()), HasSubstr("rank 2 cannot reach"));
}

}  // namespace
}  // namespace stretto
