// What the control plane knows of ranks that cannot take part any more.
#ifndef STRETTO_SRC_COMM_TROUBLE_H_
#define STRETTO_SRC_COMM_TROUBLE_H_

#include <string>
#include <utility>
#include <vector>

#include "stretto/comm/store.h"

namespace stretto {

// Ranks ascend in each list; a rank is in one of them, the first that fits in this order.
struct Trouble {
  std::vector<std::pair<int, std::string>> failed;   // found out by themselves, with their messages
  std::vector<std::pair<int, std::string>> gave_up;  // because of others: never the cause
  std::vector<int> dead;                             // gone without a word
  std::vector<int> left;                             // said goodbye

  bool any() const { return !dead.empty() || !left.empty() || !failed.empty() || !gave_up.empty(); }
  bool operator==(const Trouble&) const = default;
};

Trouble AskForTrouble(Store& store);
// Tells the other ranks that `rank` cannot go on: by a failure of its `own`, or because of others.
// Best effort: if the control plane is gone, they notice that themselves.
void TellTrouble(Store& store, int rank, const std::string& message, bool own);

// The values under `prefix`<rank>, by rank; none when the control plane does not answer.
std::vector<std::pair<int, std::string>> ByRank(Store& store, const std::string& prefix);
// "rank 3", "ranks 1, 2 and 5 more".
std::string RanksText(const std::vector<int>& ranks);

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_TROUBLE_H_
