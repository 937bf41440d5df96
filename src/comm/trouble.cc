#include "src/comm/trouble.h"

#include <algorithm>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace stretto {

std::vector<std::pair<int, std::string>> ByRank(Store& store, const std::string& prefix) {
  std::vector<std::pair<int, std::string>> result;
  auto listed = store.List(prefix);
  if (!listed.ok()) return result;
  for (auto& [key, value] : *listed) {
    int rank = 0;
    if (absl::SimpleAtoi(key.substr(prefix.size()).c_str(), &rank)) {
      result.emplace_back(rank, std::move(value));
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

std::string RanksText(const std::vector<int>& ranks) {
  constexpr std::size_t kNamed = 8;
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size() && i < kNamed; ++i) {
    absl::StrAppend(&text, i == 0 ? "" : ", ", ranks[i]);
  }
  if (ranks.size() > kNamed) absl::StrAppend(&text, " and ", ranks.size() - kNamed, " more");
  return text;
}

Trouble AskForTrouble(Store& store) {
  // A rank that gives up says so before its connection ends: in this order no such rank is taken
  // for one that died.
  const auto dead = ByRank(store, "dead/"), left = ByRank(store, "left/");
  Trouble trouble;
  std::set<int> told;
  trouble.failed = ByRank(store, "failed/");
  for (const auto& [rank, unused] : trouble.failed) told.insert(rank);
  for (auto& [rank, message] : ByRank(store, "gave up/")) {
    if (told.insert(rank).second) trouble.gave_up.emplace_back(rank, std::move(message));
  }
  for (const auto& [rank, unused] : dead) {
    if (told.insert(rank).second) trouble.dead.push_back(rank);
  }
  for (const auto& [rank, unused] : left) {
    if (told.insert(rank).second) trouble.left.push_back(rank);
  }
  return trouble;
}

void TellTrouble(Store& store, int rank, const std::string& message, bool own) {
  if (store.Set(absl::StrCat(own ? "failed/" : "gave up/", rank), message).ok()) {
    store.Add("trouble", 1).status().IgnoreError();
  }
}

}  // namespace stretto
