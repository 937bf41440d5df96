#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "stretto/observe/metrics.h"
#include "unit/observe/files.h"

namespace stretto {
namespace {

// CRC-32C bit by bit, reflected polynomial 0x82f63b78: independent of the library under test.
uint32_t Crc32c(const std::string& data) {
  uint32_t crc = 0xffffffffu;
  for (const char c : data) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

uint32_t Masked(uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xa282ead8u; }

template <class T>
T Load(const std::string& data, size_t at) {
  T value;
  std::memcpy(&value, data.data() + at, sizeof(T));
  return value;
}

// Splits a TFRecord file; false when a length or a CRC does not fit.
bool ParseFrames(const std::string& file, std::vector<std::string>* records) {
  size_t at = 0;
  while (at < file.size()) {
    if (file.size() - at < 12) return false;
    const auto length = Load<uint64_t>(file, at);
    if (Load<uint32_t>(file, at + 8) != Masked(Crc32c(file.substr(at, 8)))) return false;
    if (file.size() - at < 16 + length) return false;
    const std::string data = file.substr(at + 12, length);
    if (Load<uint32_t>(file, at + 12 + length) != Masked(Crc32c(data))) return false;
    records->push_back(data);
    at += 16 + length;
  }
  return true;
}

// A protocol buffer as field number -> raw values (varints and fixed ones as 8 bytes).
std::multimap<uint32_t, std::string> ParseMessage(const std::string& data) {
  std::multimap<uint32_t, std::string> fields;
  size_t at = 0;
  auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0; at < data.size(); shift += 7) {
      const auto byte = static_cast<unsigned char>(data[at++]);
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) break;
    }
    return value;
  };
  while (at < data.size()) {
    const uint64_t tag = varint();
    std::string value;
    size_t size = 0;
    switch (tag & 7) {
      case 0: {
        const uint64_t v = varint();
        value.assign(reinterpret_cast<const char*>(&v), 8);
        break;
      }
      case 1:
        size = 8;
        break;
      case 2:
        size = varint();
        break;
      case 5:
        size = 4;
        break;
      default:
        ADD_FAILURE() << "wire type " << (tag & 7);
        return fields;
    }
    if (size > 0) value = data.substr(at, size);
    at += size;
    fields.emplace(static_cast<uint32_t>(tag >> 3), value);
  }
  EXPECT_EQ(at, data.size());
  return fields;
}

std::map<std::string, float> Scalars(const std::multimap<uint32_t, std::string>& event) {
  std::map<std::string, float> scalars;
  const auto summary = event.find(5);
  if (summary == event.end()) return scalars;
  for (const auto& [field, bytes] : ParseMessage(summary->second)) {
    EXPECT_EQ(field, 1u);
    const auto value = ParseMessage(bytes);
    scalars[value.find(1)->second] = Load<float>(value.find(2)->second, 0);
  }
  return scalars;
}

TEST(Crc, KnownAnswer) { EXPECT_EQ(Crc32c("123456789"), 0xe3069283u); }

TEST(TensorBoardSink, WritesFramesThatParse) {
  const TempDir dir;
  auto sink = TensorBoardSink::Open(dir / "tb", 1);
  ASSERT_TRUE(sink.ok()) << sink.status();
  EXPECT_THAT((*sink)->path(), testing::HasSubstr("/events.out.tfevents."));
  StepStats s;
  s.exposed_data_ms = 1.5;
  s.exposed_tensor_ms = 0.75;
  s.exposed_context_ms = 0.375;
  s.exposed_pipeline_ms = 0.5;
  s.exposed_world_ms = 0.25;
  s.exposed_snapshot_ms = 0.125;
  for (const int64_t step : {1, 127, 128, 300000}) {
    s.step = step;
    s.loss = 0.5 + static_cast<double>(step);
    s.mfu_causal = step == 128 ? 0.25 : 0;
    s.memory_bytes = step == 128 ? int64_t{3} << 30 : 0;
    if (step == 128) s.eval_loss = 3.5;
    ASSERT_TRUE((*sink)->Write(s).ok());
    s.eval_loss.reset();
  }
  ASSERT_TRUE((*sink)->Finish().ok());
  EXPECT_EQ((*sink)->Write(s).code(), absl::StatusCode::kFailedPrecondition);

  const std::string file = ReadAll((*sink)->path());
  std::vector<std::string> records;
  ASSERT_TRUE(ParseFrames(file, &records));
  ASSERT_EQ(records.size(), 6u);  // version, session, 4 steps
  const auto version = ParseMessage(records[0]);
  EXPECT_EQ(version.find(3)->second, "brain.Event:2");
  EXPECT_GT(Load<double>(version.find(1)->second, 0), 1.7e9);  // wall time: after 2023

  const auto event = ParseMessage(records[4]);
  EXPECT_EQ(Load<int64_t>(event.find(2)->second, 0), 128);
  const auto scalars = Scalars(event);
  EXPECT_EQ(scalars.at("train/loss"), 128.5f);
  EXPECT_EQ(scalars.at("eval/loss"), 3.5f);
  EXPECT_EQ(scalars.at("perf/mfu_causal"), 0.25f);
  EXPECT_EQ(scalars.at("perf/memory_gib"), 3.0f);
  EXPECT_EQ(scalars.at("perf/exposed_data_ms"), 1.5f);
  EXPECT_EQ(scalars.at("perf/exposed_tensor_ms"), 0.75f);
  EXPECT_EQ(scalars.at("perf/exposed_context_ms"), 0.375f);
  EXPECT_EQ(scalars.at("perf/exposed_pipeline_ms"), 0.5f);
  EXPECT_EQ(scalars.at("perf/exposed_world_ms"), 0.25f);
  EXPECT_EQ(scalars.at("perf/exposed_snapshot_ms"), 0.125f);
  const auto other = Scalars(ParseMessage(records[5]));
  EXPECT_EQ(other.at("train/loss"), 300000.5f);
  EXPECT_EQ(other.count("eval/loss"), 0u);
  EXPECT_EQ(other.count("perf/mfu_causal"), 0u);  // unknown is not zero
  EXPECT_EQ(other.count("perf/memory_gib"), 0u);
  EXPECT_EQ(Load<int64_t>(ParseMessage(records[5]).find(2)->second, 0), 300000);

  // The checker itself: a flipped bit anywhere must be noticed.
  for (const size_t at : {size_t{0}, size_t{9}, size_t{20}, file.size() / 2, file.size() - 1}) {
    std::string bad = file;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    std::vector<std::string> ignored;
    EXPECT_FALSE(ParseFrames(bad, &ignored)) << at;
  }
}

TEST(TensorBoardSink, ResumeStartsASession) {
  const TempDir dir;
  auto first = TensorBoardSink::Open(dir.path(), 1);
  auto second = TensorBoardSink::Open(dir.path(), 42);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE((*first)->path(), (*second)->path());
  std::vector<std::string> records;
  ASSERT_TRUE(ParseFrames(ReadAll((*second)->path()), &records));
  ASSERT_EQ(records.size(), 2u);
  const auto event = ParseMessage(records[1]);
  EXPECT_EQ(Load<int64_t>(event.find(2)->second, 0), 42);
  EXPECT_EQ(Load<int64_t>(ParseMessage(event.find(7)->second).find(1)->second, 0), 1);  // START
}

}  // namespace
}  // namespace stretto
