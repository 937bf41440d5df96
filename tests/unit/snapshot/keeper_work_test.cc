// The memory of a keeper, and what it computes from other nodes' slots, with peers that this test
// plays.
#include "src/snapshot/keeper_work.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/comm/socket.h"
#include "src/snapshot/keeper_wire.h"
#include "stretto/core/budget.h"

namespace stretto::snapshot_internal {
namespace {

// Before a keeper gives an answer up by itself, which it does after 30 s.
net::Deadline Soon() { return net::After(std::chrono::seconds(20)); }

absl::StatusOr<std::string> ReceiveFrame(const net::Fd& fd) {
  uint32_t length = 0;
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd, &length, sizeof(length), Soon()));
  std::string body(length, '\0');
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd, body.data(), length, Soon()));
  return body;
}

KeeperWork::Task TaskOfTwoNodes() {
  KeeperWork::Task task;
  task.round = 1;
  task.id = {1, 1};
  RankPart part;
  part.world_size = 2;
  part.payload_bytes = int64_t{4} << 20;
  task.manifests.resize(2);
  for (int n = 0; n < 2; ++n) {
    part.rank = n;
    task.manifests[static_cast<size_t>(n)].ranks = {part};
  }
  return task;
}

// Else another round, or the end of the keeper, would wait for a peer that hangs.
TEST(KeeperWork, StopsWhileAPeerIsSilent) {
  int port = 0;
  const net::Fd listener = *net::Listen("127.0.0.1", 0, &port);
  const std::string job = absl::StrCat("work-", getpid());
  Budget budget(-1, -1, -1);
  KeeperSlots slots(job, 0, &budget, 1);
  std::atomic<int> told = 0;
  {
    KeeperWork work(
        {.node = 0,
         .peers = {"127.0.0.1:1", absl::StrCat("127.0.0.1:", port)},
         .token = "secret",
         .job = job,
         .threads = 1},
        *ParityLayout::Create(2, 1, 1), *ErasureCode::Create(1, 1), &slots,
        [](const KeeperWork::Task&) {},
        [&](const KeeperWork::Task&, const absl::Status&) { ++told; });
    ASSERT_TRUE(work.Start().ok());
    work.Run(TaskOfTwoNodes());
    net::Fd peer;
    while (!peer.valid()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      peer = net::Accept(listener);
    }
    ASSERT_TRUE(ReceiveFrame(peer).ok());  // its hello
    wire::Writer ok;
    ok.Int(KeeperKind::kOk);
    ASSERT_TRUE(SendFrame(peer, ok, Soon()).ok());
    ASSERT_TRUE(ReceiveFrame(peer).ok());
    ASSERT_TRUE(ReceiveFrame(peer).ok());  // a piece ahead, and it waits for the first
    work.Stop();
    absl::StatusOr<std::string> more;
    do {
      more = ReceiveFrame(peer);
    } while (more.ok());
    EXPECT_TRUE(absl::IsUnavailable(more.status())) << more.status();  // closed
  }
  EXPECT_EQ(told, 0);  // it is no trouble that somebody should look at
}

// The first snapshot of a slot would wait for the system to clear pages.
TEST(KeeperSlots, ParityHasItsPagesBeforeItIsMade) {
  Budget budget(-1, -1, -1);
  KeeperSlots slots(absl::StrCat("slots-", getpid()), 0, &budget, 2);
  constexpr int64_t kBytes = int64_t{3} << 20;
  while (!slots.Prepare(0, {{0, 4096}}, kBytes)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const absl::StatusOr<std::byte*> parity = slots.MakeParity(0, 1, kBytes);
  ASSERT_TRUE(parity.ok()) << parity.status();
  std::vector<unsigned char> present(kBytes / 4096);
  ASSERT_EQ(mincore(*parity, kBytes, present.data()), 0);
  EXPECT_EQ(std::count(present.begin(), present.end(), 1), kBytes / 4096);
}

TEST(NodeManifest, OfSizesWhoseSumOverflowsIsMalformed) {
  NodeManifest manifest;
  RankPart part;
  part.payload_bytes = int64_t{1} << 49;
  manifest.ranks = {part};
  EXPECT_TRUE(DecodeManifest(Encode(manifest)).ok());
  manifest.ranks.assign(3, part);
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(Encode(manifest)).status()));
  part.payload_bytes = -1;
  part.contents_bytes = -1;
  manifest.ranks = {part};
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(Encode(manifest)).status()));
}

}  // namespace
}  // namespace stretto::snapshot_internal
