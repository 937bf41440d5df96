#include "kernels/cuda/tuning.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace stretto::cuda {
namespace {

constexpr std::size_t kFields = sizeof(ProductKey) / sizeof(int64_t);
using Fields = std::array<int64_t, kFields>;

// "matmul", the key, 0 or 1 for `separate`, the algorithm as 128 hexadecimal digits.
constexpr char kWord[] = "matmul";
constexpr std::size_t kWords = 1 + kFields + 2;
constexpr std::size_t kNewFields = 2;  // at the key's end, see ProductKey
constexpr std::size_t kDigits = 16;    // of one word of the algorithm

// Far more products than a model has; generation with ever longer inputs could go on for ever.
constexpr std::size_t kCapacity = std::size_t{1} << 14;

struct Hash {
  std::size_t operator()(const ProductKey& key) const {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a field at a time
    for (int64_t field : std::bit_cast<Fields>(key)) {
      hash = (hash ^ static_cast<uint64_t>(field)) * 0x100000001b3u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Table {
  std::mutex mutex;
  std::unordered_map<ProductKey, ProductPlan, Hash> plans;
};

Table& Shared() {
  static Table table;
  return table;
}

std::atomic<bool> tuning{false};

bool Parse(const std::string& line, ProductKey* key, ProductPlan* plan) {
  std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
  if (words.empty() || words[0] != kWord) return false;
  const bool old = words.size() == kWords - kNewFields;
  if (old) words.insert(words.end() - 2, kNewFields, "0");
  if (words.size() != kWords) return false;
  Fields fields;
  for (std::size_t i = 0; i < kFields; ++i) {
    if (!absl::SimpleAtoi(words[1 + i], &fields[i])) return false;
  }
  *key = std::bit_cast<ProductKey>(fields);
  if (old) key->type_b = key->type;
  const std::string& separate = words[1 + kFields];
  const std::string& algorithm = words[2 + kFields];
  if (separate != "0" && separate != "1") return false;
  if (algorithm.size() != kDigits * plan->algorithm.size()) return false;
  for (std::size_t i = 0; i < plan->algorithm.size(); ++i) {
    uint64_t value = 0;
    for (char c : algorithm.substr(i * kDigits, kDigits)) {
      const bool digit = c >= '0' && c <= '9';
      if (!digit && (c < 'a' || c > 'f')) return false;
      value = value << 4 | static_cast<uint64_t>(digit ? c - '0' : c - 'a' + 10);
    }
    plan->algorithm[i] = value;
  }
  plan->separate = separate == "1";
  plan->tuned = true;
  plan->checked = false;
  return true;
}

}  // namespace

void SetTuning(bool on) { tuning.store(on, std::memory_order_relaxed); }

bool Tuning() { return tuning.load(std::memory_order_relaxed); }

std::optional<ProductPlan> FindPlan(const ProductKey& key) {
  Table& table = Shared();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.plans.find(key);
  if (found == table.plans.end()) return std::nullopt;
  return found->second;
}

void StorePlan(const ProductKey& key, const ProductPlan& plan) {
  Table& table = Shared();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.plans.find(key);
  if (found != table.plans.end()) {
    found->second = plan;
  } else if (table.plans.size() < kCapacity) {
    table.plans.emplace(key, plan);
  }
}

std::string ExportTuning() {
  std::vector<std::string> lines;
  {
    Table& table = Shared();
    const std::lock_guard<std::mutex> lock(table.mutex);
    for (const auto& [key, plan] : table.plans) {
      if (!plan.tuned) continue;
      std::string line = kWord;
      for (int64_t field : std::bit_cast<Fields>(key)) absl::StrAppend(&line, " ", field);
      absl::StrAppend(&line, plan.separate ? " 1 " : " 0 ");
      for (uint64_t word : plan.algorithm) absl::StrAppendFormat(&line, "%016x", word);
      lines.push_back(std::move(line));
    }
  }
  std::sort(lines.begin(), lines.end());
  std::string text;
  for (const std::string& line : lines) absl::StrAppend(&text, line, "\n");
  return text;
}

absl::Status ImportTuning(const std::string& text) {
  int number = 0;
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(text, '\n'))) {
    ++number;
    if (line.empty()) continue;
    ProductKey key;
    ProductPlan plan;
    if (!Parse(line, &key, &plan)) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, " of the table of tuned matrix products is no entry: \"",
                       line.substr(0, 60), "\"; export the table again"));
    }
    StorePlan(key, plan);
  }
  return absl::OkStatus();
}

}  // namespace stretto::cuda
