#include "tools/run/policy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tools/run/fate.h"

namespace stretto {
namespace {

constexpr int64_t kRefusals = 2;

}  // namespace

int FewerRanks(int ranks, int lost, int min_ranks, const std::optional<JobFacts>& facts,
               std::string* reason) {
  // Ranks of a copy of the model, times those that share its documents.
  const int64_t replica = facts ? facts->cp * facts->pp * facts->tp : 1;
  const auto axes = [&] {
    std::string text;
    for (const auto& [name, size] :
         {std::pair("pp", facts->pp), std::pair("tp", facts->tp), std::pair("cp", facts->cp)}) {
      if (size == 1) continue;
      absl::StrAppend(&text, text.empty() ? "parallel." : " x ", name, "=", size);
    }
    return text;
  };
  if (facts && facts->dp_fixed) {
    *reason =
        absl::StrCat("the configuration sets parallel.dp=", facts->dp,
                     ", so that no other number of ranks fits; set it to 0 to go on with fewer");
    return 0;
  }
  const auto fewer = static_cast<int>((ranks - lost) / replica * replica);
  if (fewer >= std::max(min_ranks, 1)) return fewer;
  if (replica > 1 && ranks - lost >= min_ranks) {
    *reason = absl::StrCat("only the data axis may shrink, and a copy of the model takes ", replica,
                           " ranks (", axes(), "): ", ranks - lost,
                           ranks - lost == 1 ? " rank is" : " ranks are", " left, and ",
                           fewer == 0 ? "none" : absl::StrCat(fewer), " of them could be used");
  } else {
    *reason = absl::StrCat(fewer, fewer == 1 ? " rank" : " ranks",
                           " would be left, and --min-ranks is ", min_ranks);
  }
  return 0;
}

RestartPolicy::RestartPolicy(RestartOptions options)
    : options_(std::move(options)), ranks_(options_.ranks) {}

Decision RestartPolicy::OnFailure(const Failure& failure, const std::optional<JobFacts>& facts,
                                  double now) {
  const bool progress = failure.step && (!furthest_ || *failure.step > *furthest_);
  if (progress) {
    furthest_ = failure.step;
    without_progress_ = same_ = same_lost_ = 0;
  }
  ++without_progress_;
  const bool alike = failure.what == last_what_ && failure.step == last_step_;
  same_ = alike && !progress ? same_ + 1 : 1;
  const bool same_ranks = !failure.lost.empty() && failure.lost == last_lost_;
  same_lost_ = failure.lost.empty() ? 0 : same_ranks ? same_lost_ + 1 : 1;
  // A command that has started ranks before is right, so what fails now may heal. One that never
  // did, for a reason that it gives twice, is most likely wrong.
  ever_started_ = ever_started_ || failure.started;
  const bool again = failure.what == last_what_ && failure.said == last_said_;
  refused_ = ever_started_ || failure.said.empty() ? 0 : again ? refused_ + 1 : 1;
  last_said_ = failure.said;
  last_what_ = failure.what;
  last_step_ = failure.step;
  last_lost_ = failure.lost;

  const auto& fatal = options_.fatal_codes;
  if (failure.exit_code != 0 &&
      std::find(fatal.begin(), fatal.end(), failure.exit_code) != fatal.end()) {
    return {.reason = absl::StrCat("exit code ", failure.exit_code, " does not heal by itself",
                                   failure.exit_code == 2    ? " (wrong usage or configuration)"
                                   : failure.exit_code > 125 ? " (the program cannot be started)"
                                                             : "")};
  }
  Decision decision = {.restart = true, .ranks = ranks_};
  const bool elastic = options_.min_ranks < options_.ranks;
  if (elastic && same_lost_ >= options_.shrink_after && same_lost_ > 0) {
    std::string reason;
    const int lost = static_cast<int>(failure.lost.size());
    const int fewer = FewerRanks(ranks_, lost, options_.min_ranks, facts, &reason);
    if (fewer > 0) {
      decision.reason =
          absl::StrCat("the same ", lost == 1 ? "rank was" : "ranks were", " lost ", same_lost_,
                       " times without progress: on with ", fewer, " of ", ranks_, " ranks");
      decision.ranks = ranks_ = fewer;
      same_ = same_lost_ = 0;
      last_lost_.clear();
    } else {
      decision.reason = "not with fewer ranks: " + reason;
    }
  }
  if (options_.same > 0 && refused_ >= std::min(options_.same, kRefusals)) {
    return {.reason = refused_ == 1 ? "the launcher started no rank, and --same is 1"
                                    : absl::StrCat("the launcher started no rank in ", refused_,
                                                   " tries and said the same each time")};
  }
  if (options_.same > 0 && same_ >= options_.same) {
    return {.reason = absl::StrCat("the same failure came ", same_, " times ", When(failure.step),
                                   decision.reason.empty() ? "" : "; ", decision.reason)};
  }
  if (options_.window > 0) {
    while (!recent_.empty() && recent_.front() <= now - options_.window) recent_.pop_front();
  }
  if (static_cast<int64_t>(recent_.size()) >= options_.restarts) {
    return {.reason = options_.restarts == 0
                          ? std::string("--restarts is 0")
                          : absl::StrFormat("all %d restarts %s are used", options_.restarts,
                                            options_.window > 0
                                                ? absl::StrCat("within ", options_.window, " s")
                                                : std::string("of the run"))};
  }
  recent_.push_back(now);
  ++restarts_;
  const auto doublings = static_cast<double>(std::min<int64_t>(without_progress_ - 1, 60));
  decision.delay = std::min(options_.delay * std::exp2(doublings), options_.delay_cap);
  return decision;
}

}  // namespace stretto
