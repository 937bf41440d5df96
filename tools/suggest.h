// stretto-plan --suggest: which layouts fit, and how long a step of each should take.
#ifndef STRETTO_TOOLS_SUGGEST_H_
#define STRETTO_TOOLS_SUGGEST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "tools/arguments.h"

namespace stretto {

// "80GiB", "1.5 TB", "4096": bytes. GiB and the like are powers of 1024, GB of 1000. Errors name
// the option.
absl::StatusOr<int64_t> ParseBytes(const std::string& option, const std::string& text);

struct SuggestArguments {
  int64_t gpus = 0, machine = 8, top = 10;
  std::string memory, fit;

  void AddTo(Arguments& arguments);
  // INVALID_ARGUMENT when one was given without --suggest, or with it one of the others.
  static absl::Status Check(const Arguments& arguments, bool suggest);
};

// Prints the table; returns the exit code, 1 when nothing fits. `sets` are overrides of the
// configuration in file `config`, and stay as they are.
absl::StatusOr<int> PrintSuggestions(const std::string& config,
                                     const std::vector<std::string>& sets,
                                     const SuggestArguments& arguments);

}  // namespace stretto

#endif  // STRETTO_TOOLS_SUGGEST_H_
