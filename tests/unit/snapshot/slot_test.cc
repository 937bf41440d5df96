#include "stretto/snapshot/slot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "src/snapshot/slot_copies.h"
#include "unit/snapshot/testing.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

class Slots : public ::testing::Test {
 protected:
  void SetUp() override {
    name_ = absl::StrCat("/stretto-slot-test-", getpid());
    for (size_t i = 0; i < weights_.size(); ++i) weights_[i] = static_cast<float>(i) * 0.5f;
    for (size_t i = 0; i < moments_.size(); ++i) moments_[i] = static_cast<float>(i) - 3;
    ASSERT_TRUE(registry_
                    .Add({.name = "w",
                          .global_shape = {10, 3},
                          .first_row = 2,
                          .local = Tensor::Of(weights_.data(), DType::kF32, {5, 3})})
                    .ok());
    ASSERT_TRUE(registry_
                    .Add({.name = "copy",
                          .global_shape = {10, 3},
                          .local = Tensor::Of(weights_.data(), DType::kF32, {5, 3}),
                          .owned = false})
                    .ok());
    ASSERT_TRUE(registry_
                    .Add({.name = "optim.m",
                          .global_shape = {7},
                          .local = Tensor::Of(moments_.data(), DType::kF32, {7})})
                    .ok());
    contents_ = PlanContents(registry_);
    contents_.trainer_state = "{\"step\":3}";
    slot_ = *SlotMemory::Create(name_, PayloadCapacity(contents_));
  }
  void TearDown() override { slot_->Unlink(); }

  // As a trainer and a keeper fill it.
  void Fill(SlotState state = SlotState::kCommitted) {
    SlotHeader header;
    header.job = HashOf("job");
    header.layout = LayoutHash(contents_, 1, 4);
    header.rank = 1;
    header.world_size = 4;
    header.id = {2, 30};
    const auto copies = *snapshot_internal::SlotCopies::Create(registry_, contents_, {});
    copies->Begin({});
    ASSERT_TRUE(copies->Capture(slot_, &contents_).ok());
    copies->End();
    ASSERT_TRUE(FinishSlot(contents_, *slot_, &header).ok());
    header.state = state;
    slot_->WriteHeader(header);
  }
  SlotIdentity Mine() const { return {"job", LayoutHash(contents_, 1, 4), 1}; }
  std::string Refusal(const SlotIdentity& expected) {
    const auto contents = slot_->ReadContents(expected);
    if (!contents.ok()) return Message(contents.status());
    return Message(slot_->VerifyData(*contents));
  }

  std::string name_;
  std::array<float, 15> weights_;
  std::array<float, 7> moments_;
  StateRegistry registry_;
  SlotContents contents_;
  std::shared_ptr<SlotMemory> slot_;
};

TEST_F(Slots, HoldWhatIsOwnedAndOutliveAMapping) {
  ASSERT_TRUE(slot_->Prefault(2).ok());
  Fill();
  slot_ = *SlotMemory::Open(name_);
  SlotHeader header;
  const auto contents = slot_->ReadContents(Mine(), &header);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(header.id, (SnapshotId{2, 30}));
  EXPECT_EQ(contents->trainer_state, "{\"step\":3}");
  ASSERT_EQ(contents->entries.size(), 3u);
  EXPECT_EQ(contents->entries[0].name, "w");
  EXPECT_EQ(contents->entries[0].first_row, 2);
  EXPECT_EQ(contents->entries[0].bytes, 60);
  EXPECT_EQ(contents->entries[1].bytes, 0);  // another rank has it
  EXPECT_EQ(contents->entries[2].offset, 64);
  EXPECT_TRUE(slot_->VerifyData(*contents).ok());
  EXPECT_EQ(std::memcmp(slot_->payload(), weights_.data(), 60), 0);
  EXPECT_EQ(std::memcmp(slot_->payload() + 64, moments_.data(), 28), 0);
  EXPECT_LT(header.payload_bytes, 1000);
}

TEST_F(Slots, AreForTheirUserAlone) {
  struct stat info = {};
  ASSERT_EQ(stat(("/dev/shm" + name_).c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(Slots, RefuseByName) {
  Fill();
  EXPECT_EQ(Refusal(Mine()), "");
  SlotIdentity other = Mine();
  other.job = "another";
  EXPECT_THAT(Refusal(other), HasSubstr("belongs to another job than \"another\""));
  other = Mine();
  other.layout = LayoutHash(contents_, 1, 5);
  EXPECT_THAT(Refusal(other), HasSubstr("another layout"));
  EXPECT_THAT(Refusal(other), HasSubstr("rank 1 of 4"));
  Fill(SlotState::kWriting);
  EXPECT_THAT(Refusal(Mine()), HasSubstr("WRITING"));
}

TEST_F(Slots, NoticeAnyFlippedByte) {
  Fill();
  const int64_t used = 128 + static_cast<int64_t>(EncodeContents(contents_).size());
  std::byte* base = slot_->payload() - 4096;
  // The header, the tensors (not the padding between them) and the contents.
  for (int64_t at = 0; at < 4096 + used; ++at) {
    if ((at >= 96 && at < 4096) || (at >= 4096 + 60 && at < 4096 + 64) ||
        (at >= 4096 + 92 && at < 4096 + 128)) {
      continue;
    }
    base[at] ^= std::byte{0x04};
    EXPECT_NE(Refusal(Mine()), "") << "byte " << at;
    EXPECT_EQ(absl::IsDataLoss(slot_->ReadHeader().status()), at < 96) << "byte " << at;
    base[at] ^= std::byte{0x04};
  }
  base[4096 + 65] ^= std::byte{1};
  EXPECT_THAT(Refusal(Mine()), HasSubstr("optim.m"));
  base[4096 + 65] ^= std::byte{1};
  EXPECT_EQ(Refusal(Mine()), "");
}

TEST_F(Slots, RefuseWhatDoesNotFit) {
  const auto huge = SlotMemory::Create(name_ + "-huge", int64_t{1} << 50);
  ASSERT_FALSE(huge.ok());
  EXPECT_THAT(Message(huge.status()), HasSubstr("/dev/shm has"));
  EXPECT_TRUE(absl::IsNotFound(SlotMemory::Open(name_ + "-none").status()));
  contents_.trainer_state.assign(1 << 20, ' ');
  SlotHeader header;
  EXPECT_THAT(Message(FinishSlot(contents_, *slot_, &header)), HasSubstr("outgrown"));
}

TEST(SlotContents, AreReadBackOrRefused) {
  SlotContents contents;
  contents.data_bytes = 64;
  contents.trainer_state = "{}";
  contents.entries.push_back({"a", DType::kBF16, {4, 2}, {1, 2}, 3, 0, 0, 4, 99});
  const std::string text = EncodeContents(contents);
  const auto read = DecodeContents(text, "x");
  ASSERT_TRUE(read.ok());
  EXPECT_EQ(read->entries[0].first_row, 3);
  EXPECT_EQ(read->entries[0].checksum, 99u);
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_FALSE(DecodeContents(text.substr(0, length), "x").ok()) << length;
  }
  contents.entries[0].offset = 61;  // ends outside the data
  EXPECT_FALSE(DecodeContents(EncodeContents(contents), "x").ok());
}

TEST(SlotContents, ALayoutIsBoxesAndRanks) {
  SlotContents contents;
  contents.data_bytes = 64;
  contents.entries.push_back({"a", DType::kBF16, {4, 2}, {1, 2}, 3, 0, 0, 4, 99});
  const uint64_t hash = LayoutHash(contents, 0, 2);
  contents.trainer_state = "{}";
  contents.entries[0].checksum = 1;
  EXPECT_EQ(LayoutHash(contents, 0, 2), hash);
  EXPECT_NE(LayoutHash(contents, 1, 2), hash);
  contents.entries[0].first_row = 2;
  EXPECT_NE(LayoutHash(contents, 0, 2), hash);
}

// Without a guard each of these accesses is a SIGBUS.
TEST_F(Slots, ThatAreCutShortReadAsZeroesAndAreDamaged) {
  ASSERT_TRUE(slot_->Prefault(1).ok());
  Fill();
  EXPECT_TRUE(slot_->Whole().ok());
  const auto contents = slot_->ReadContents(Mine());
  ASSERT_TRUE(contents.ok()) << contents.status();
  ASSERT_EQ(truncate(("/dev/shm" + name_).c_str(), 0), 0);
  EXPECT_THAT(Refusal(Mine()), HasSubstr("is no slot"));
  EXPECT_THAT(Message(slot_->VerifyData(*contents)), HasSubstr("was cut short by somebody else"));
  std::memset(slot_->payload(), 1, static_cast<size_t>(slot_->capacity()));
  EXPECT_EQ(slot_->payload()[slot_->capacity() - 1], std::byte{1});
  // Also where the file is as long again.
  ASSERT_EQ(truncate(("/dev/shm" + name_).c_str(), 4096 + slot_->capacity()), 0);
  EXPECT_TRUE(absl::IsDataLoss(slot_->Whole()));
}

// As on a full file system, where the first touch of a page finds none.
TEST_F(Slots, WithoutPagesSaySo) {
  ASSERT_EQ(truncate(("/dev/shm" + name_).c_str(), 0), 0);
  const absl::Status status = slot_->Prefault(1);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(Message(status), HasSubstr("No space left on device; enlarge /dev/shm"));
}

using SlotsDeathTest = Slots;
TEST_F(SlotsDeathTest, OtherBusErrorsEndTheProcess) {
  // Sanitizers have a handler of their own, which exits.
  const auto failed = [](int status) { return !WIFEXITED(status) || WEXITSTATUS(status) != 0; };
  EXPECT_EXIT(raise(SIGBUS), failed, "");
}

}  // namespace
}  // namespace stretto
