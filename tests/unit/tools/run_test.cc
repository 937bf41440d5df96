// What stretto-run decides and reports, without a job.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/recorder.h"
#include "tools/run/fate.h"
#include "tools/run/flight.h"
#include "tools/run/incident.h"
#include "tools/run/policy.h"
#include "tools/run/words.h"

namespace stretto::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using State = RankFate::State;

constexpr int kSaved = 75;

Failure Killed(int rank, std::optional<int64_t> step) {
  return {.what = absl::StrCat("rank ", rank, " killed"), .step = step, .lost = {rank}};
}
Failure Exited(int code, std::optional<int64_t> step) {
  return {.what = absl::StrCat("code ", code), .exit_code = code, .step = step};
}

TEST(RestartPolicy, BudgetCountsInAWindow) {
  RestartPolicy policy({.restarts = 2, .window = 100, .same = 0});
  EXPECT_TRUE(policy.OnFailure(Killed(0, 10), {}, 0).restart);
  EXPECT_TRUE(policy.OnFailure(Killed(0, 20), {}, 50).restart);
  const Decision used_up = policy.OnFailure(Killed(0, 30), {}, 99);
  EXPECT_FALSE(used_up.restart);
  EXPECT_EQ(used_up.reason, "all 2 restarts within 100 s are used");
  // The first restart has left the window, the second has not.
  EXPECT_TRUE(policy.OnFailure(Killed(0, 40), {}, 100).restart);
  EXPECT_FALSE(policy.OnFailure(Killed(0, 50), {}, 101).restart);
  EXPECT_EQ(policy.restarts(), 3);
}

TEST(RestartPolicy, WithoutAWindowTheBudgetIsTheRuns) {
  RestartPolicy policy({.restarts = 1, .window = 0, .same = 0});
  EXPECT_TRUE(policy.OnFailure(Killed(0, 1), {}, 0).restart);
  const Decision used_up = policy.OnFailure(Killed(0, 2), {}, 1e9);
  EXPECT_FALSE(used_up.restart);
  EXPECT_EQ(used_up.reason, "all 1 restarts of the run are used");
  RestartPolicy none({.restarts = 0});
  EXPECT_FALSE(none.OnFailure(Killed(0, 1), {}, 0).restart);
}

TEST(RestartPolicy, DelayDoublesUntilThereIsProgress) {
  RestartPolicy policy({.restarts = 100, .delay = 1, .delay_cap = 5, .same = 0});
  std::vector<double> delays;
  for (int i = 0; i < 5; ++i) delays.push_back(policy.OnFailure(Killed(0, 10), {}, i).delay);
  EXPECT_THAT(delays, ElementsAre(1, 2, 4, 5, 5));
  EXPECT_EQ(policy.OnFailure(Killed(0, 11), {}, 6).delay, 1);
  EXPECT_EQ(policy.OnFailure(Killed(0, std::nullopt), {}, 7).delay, 2);  // did not even come so far
}

TEST(RestartPolicy, GivesUpOnTheSameFailureWithoutProgress) {
  RestartPolicy policy({.restarts = 100, .same = 3});
  EXPECT_TRUE(policy.OnFailure(Exited(1, 10), {}, 0).restart);
  EXPECT_TRUE(policy.OnFailure(Exited(1, 10), {}, 1).restart);
  EXPECT_TRUE(policy.OnFailure(Killed(1, 10), {}, 2).restart);  // another one in between
  EXPECT_TRUE(policy.OnFailure(Exited(1, 10), {}, 3).restart);
  EXPECT_TRUE(policy.OnFailure(Exited(1, 20), {}, 4).restart);  // progress
  EXPECT_TRUE(policy.OnFailure(Exited(1, 20), {}, 5).restart);
  const Decision last = policy.OnFailure(Exited(1, 20), {}, 6);
  EXPECT_FALSE(last.restart);
  EXPECT_EQ(last.reason, "the same failure came 3 times after step 20");
}

TEST(RestartPolicy, SomeExitCodesDoNotHeal) {
  RestartPolicy policy({});
  const Decision decision = policy.OnFailure(Exited(2, {}), {}, 0);
  EXPECT_FALSE(decision.restart);
  EXPECT_EQ(decision.reason, "exit code 2 does not heal by itself (wrong usage or configuration)");
  EXPECT_TRUE(RestartPolicy({.fatal_codes = {3}}).OnFailure(Exited(2, {}), {}, 0).restart);
}

Failure Refused(const std::string& said) {
  return {.what = "launcher", .started = false, .said = said};
}

TEST(RestartPolicy, ALauncherThatNeverStartedARankAndRepeatsItselfIsNotTriedAThirdTime) {
  RestartPolicy policy({.restarts = 100});
  EXPECT_TRUE(policy.OnFailure(Refused("no slots"), {}, 0).restart);
  const Decision last = policy.OnFailure(Refused("no slots"), {}, 1);
  EXPECT_FALSE(last.restart);
  EXPECT_EQ(last.reason, "the launcher started no rank in 2 tries and said the same each time");
  // Other words may be of something that heals; three failures of a kind are enough all the same.
  RestartPolicy other({.restarts = 100});
  EXPECT_TRUE(other.OnFailure(Refused("no route"), {}, 0).restart);
  EXPECT_TRUE(other.OnFailure(Refused("no slots"), {}, 1).restart);
  EXPECT_EQ(other.OnFailure(Refused("no route"), {}, 2).reason,
            "the same failure came 3 times before any step");
  // One that gives no reason may have been ended.
  RestartPolicy silent({.restarts = 100});
  EXPECT_TRUE(silent.OnFailure(Refused(""), {}, 0).restart);
  EXPECT_TRUE(silent.OnFailure(Refused(""), {}, 1).restart);
  EXPECT_FALSE(silent.OnFailure(Refused(""), {}, 2).restart);
}

TEST(RestartPolicy, ALauncherThatHasStartedRanksGetsAllTries) {
  RestartPolicy policy({.restarts = 100});
  EXPECT_TRUE(policy.OnFailure(Killed(1, 10), {}, 0).restart);
  EXPECT_TRUE(policy.OnFailure(Refused("no route"), {}, 1).restart);
  EXPECT_TRUE(policy.OnFailure(Refused("no route"), {}, 2).restart);
  EXPECT_FALSE(policy.OnFailure(Refused("no route"), {}, 3).restart);
}

TEST(RestartPolicy, OptionsHoldForALauncherThatStartsNothing) {
  RestartPolicy patient({.restarts = 5, .same = 0});
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(patient.OnFailure(Refused("x"), {}, i).restart) << i;
  EXPECT_EQ(patient.OnFailure(Refused("x"), {}, 5).reason, "all 5 restarts within 3600 s are used");
  EXPECT_FALSE(RestartPolicy({.same = 1}).OnFailure(Refused("x"), {}, 0).restart);
  EXPECT_EQ(RestartPolicy({.restarts = 0}).OnFailure(Refused("x"), {}, 0).reason,
            "--restarts is 0");
}

TEST(RestartPolicy, ShrinksWhenTheSameRankIsLostAgain) {
  RestartPolicy policy({.restarts = 100, .same = 0, .ranks = 4, .min_ranks = 2});
  EXPECT_EQ(policy.OnFailure(Killed(3, 10), {}, 0).ranks, 4);
  EXPECT_EQ(policy.OnFailure(Killed(2, 10), {}, 1).ranks, 4);  // another rank
  const Decision fewer = policy.OnFailure(Killed(2, 10), {}, 2);
  EXPECT_EQ(fewer.ranks, 3);
  EXPECT_EQ(fewer.reason, "the same rank was lost 2 times without progress: on with 3 of 4 ranks");
  // It begins to count anew; progress ends a row, too.
  EXPECT_EQ(policy.OnFailure(Killed(2, 11), {}, 3).ranks, 3);
  EXPECT_EQ(policy.OnFailure(Killed(2, 12), {}, 4).ranks, 3);
  EXPECT_EQ(policy.OnFailure(Killed(2, 12), {}, 5).ranks, 2);
  policy.OnFailure(Killed(0, 12), {}, 6);
  const Decision least = policy.OnFailure(Killed(0, 12), {}, 7);
  EXPECT_EQ(least.ranks, 2);
  EXPECT_EQ(least.reason, "not with fewer ranks: 1 rank would be left, and --min-ranks is 2");
}

TEST(RestartPolicy, StaysWithoutMinRanks) {
  RestartPolicy policy({.restarts = 100, .same = 0, .ranks = 2, .min_ranks = 2});
  for (int i = 0; i < 5; ++i) EXPECT_EQ(policy.OnFailure(Killed(1, 1), {}, i).ranks, 2);
}

TEST(FewerRanks, OnlyTheDataAxisShrinks) {
  std::string reason;
  const JobFacts pipelines = {.dp = 3, .pp = 2, .tp = 1};
  EXPECT_EQ(FewerRanks(6, 1, 1, pipelines, &reason), 4);
  EXPECT_EQ(FewerRanks(6, 3, 1, pipelines, &reason), 2);
  EXPECT_EQ(FewerRanks(2, 1, 1, JobFacts{.dp = 1, .pp = 2, .tp = 1}, &reason), 0);
  EXPECT_EQ(reason,
            "only the data axis may shrink, and a copy of the model takes 2 ranks (parallel.pp=2): "
            "1 rank is left, and none of them could be used");
  EXPECT_EQ(FewerRanks(8, 1, 7, JobFacts{.dp = 2, .pp = 2, .tp = 2}, &reason), 0);
  EXPECT_THAT(reason, HasSubstr("(parallel.pp=2 x tp=2): 7 ranks are left, and 4 of them"));
  EXPECT_EQ(FewerRanks(8, 1, 1, JobFacts{.dp = 4, .pp = 1, .tp = 1, .cp = 2}, &reason), 6);
  EXPECT_EQ(FewerRanks(8, 1, 8, JobFacts{.dp = 2, .pp = 2, .tp = 1, .cp = 2}, &reason), 0);
  EXPECT_EQ(FewerRanks(2, 1, 1, JobFacts{.dp = 2, .pp = 1, .tp = 1, .dp_fixed = true}, &reason), 0);
  EXPECT_THAT(reason, HasSubstr("the configuration sets parallel.dp=2"));
  EXPECT_EQ(FewerRanks(5, 2, 1, std::nullopt, &reason), 3);  // another program: it will say
}

RankFate Fate(int rank, State state, double since, int code_or_signal, int asked = 0,
              double asked_at = 0) {
  RankFate fate = {.rank = rank, .state = state, .since = since, .asked = asked};
  (state == State::kExited ? fate.code : fate.signal) = code_or_signal;
  fate.asked_at = asked_at;
  return fate;
}

TEST(Fate, EventsComeBackAsTheyWere) {
  std::string text = ToLine({.kind = RankEvent::Kind::kStarted, .time = 1, .pid = 7, .host = "a"});
  EXPECT_EQ(ParseEvents(3, text).state, State::kRunning);
  text += ToLine({.kind = RankEvent::Kind::kStopped, .time = 2, .signal = SIGSTOP});
  EXPECT_EQ(Describe(ParseEvents(3, text)), "stopped by SIGSTOP");
  text += ToLine({.kind = RankEvent::Kind::kContinued, .time = 3});
  EXPECT_EQ(ParseEvents(3, text).state, State::kRunning);
  text += ToLine({.kind = RankEvent::Kind::kAsked, .time = 4, .signal = SIGTERM});
  text += ToLine({.kind = RankEvent::Kind::kEnded, .time = 5, .code = 1, .said = "no \xff\n"});
  const RankFate fate = ParseEvents(3, text);
  EXPECT_EQ(Describe(fate), "ended with code 1");
  EXPECT_EQ(fate.pid, 7);
  EXPECT_EQ(fate.host, "a");
  EXPECT_EQ(fate.asked, SIGTERM);
  EXPECT_EQ(fate.asked_at, 4);
  EXPECT_EQ(fate.since, 5);
  // A line that was cut off, and what is no event at all.
  EXPECT_EQ(ParseEvents(3, text.substr(0, text.size() - 9)).state, State::kRunning);
  EXPECT_EQ(ParseEvents(3, "{\"event\": 1}\n[]\nx\n").state, State::kUnknown);
}

TEST(Fate, TheFirstTroubleIsTheCause) {
  // Rank 0 gave up because of rank 1.
  const Cause killed =
      FindCause({Fate(0, State::kExited, 11, 1), Fate(1, State::kKilled, 10, SIGKILL)}, kSaved);
  EXPECT_EQ(Describe(killed), "rank 1 was killed by SIGKILL");
  EXPECT_EQ(killed.time, 10);
  // So did it here, a while after the other one was stopped.
  EXPECT_EQ(Describe(FindCause(
                {Fate(0, State::kExited, 20, 1), Fate(1, State::kStopped, 10, SIGSTOP)}, kSaved)),
            "rank 1 was stopped by SIGSTOP");
  // Without the order of time rank 0 would be blamed.
  EXPECT_EQ(Describe(FindCause(
                {Fate(0, State::kExited, 9, 1), Fate(1, State::kKilled, 10, SIGKILL)}, kSaved)),
            "rank 0 ended with code 1");
}

TEST(Fate, WhoWasAskedIsNotTheCause) {
  EXPECT_EQ(FindCause({Fate(0, State::kKilled, 10, SIGTERM, SIGTERM, 9),
                       Fate(1, State::kExited, 10, 1, SIGTERM, 9)},
                      kSaved)
                .kind,
            Cause::Kind::kUnknown);
  EXPECT_EQ(
      FindCause({Fate(0, State::kExited, 10, 0), Fate(1, State::kExited, 10, kSaved)}, kSaved).kind,
      Cause::Kind::kUnknown);
  // Stopped before it was asked.
  EXPECT_EQ(FindCause({Fate(0, State::kStopped, 8, SIGSTOP, SIGTERM, 9)}, kSaved).kind,
            Cause::Kind::kStopped);
}

TEST(Fate, RanksThatAgreeOnAnErrorEndTogether) {
  EXPECT_EQ(Describe(FindCause({Fate(0, State::kExited, 10.05, 2, SIGTERM, 10.01),
                                Fate(1, State::kExited, 10, 2), Fate(2, State::kExited, 12, 2)},
                               kSaved)),
            "ranks 0 and 1 ended with code 2");
  EXPECT_EQ(RankNames({0, 1, 2}), "ranks 0 to 2");
  EXPECT_EQ(RankNames({0, 1, 3}), "ranks 0, 1 and 3");
  EXPECT_EQ(RankNames({}), "an unknown rank");
}

TEST(Cause, IsASentenceWithAndWithoutAStep) {
  const auto all = [](const Cause& cause) {
    return std::vector<std::string>{Describe(cause), Describe(cause, When(7)),
                                    Describe(cause, When(std::nullopt))};
  };
  using Kind = Cause::Kind;
  EXPECT_THAT(all({}), ElementsAre("the job failed for an unknown reason",
                                   "the job failed after step 7 for an unknown reason",
                                   "the job failed before any step for an unknown reason"));
  EXPECT_THAT(
      all({.kind = Kind::kKilled, .ranks = {1}, .signal = SIGKILL}),
      ElementsAre("rank 1 was killed by SIGKILL", "rank 1 was killed by SIGKILL after step 7",
                  "rank 1 was killed by SIGKILL before any step"));
  EXPECT_THAT(
      all({.kind = Kind::kExited, .ranks = {0, 2}, .code = 3}),
      ElementsAre("ranks 0 and 2 ended with code 3", "ranks 0 and 2 ended with code 3 after step 7",
                  "ranks 0 and 2 ended with code 3 before any step"));
  EXPECT_THAT(all({.kind = Kind::kStopped, .ranks = {0, 1, 2}, .signal = SIGSTOP}),
              ElementsAre("ranks 0 to 2 were stopped by SIGSTOP",
                          "ranks 0 to 2 were stopped by SIGSTOP after step 7",
                          "ranks 0 to 2 were stopped by SIGSTOP before any step"));
  EXPECT_THAT(all({.kind = Kind::kHung, .ranks = {1}}),
              ElementsAre("the job hung: the others waited for rank 1",
                          "the job hung after step 7: the others waited for rank 1",
                          "the job hung before any step: the others waited for rank 1"));
  EXPECT_THAT(all({.kind = Kind::kHung}),
              ElementsAre("the job hung, and it is unknown which rank held it up",
                          "the job hung after step 7, and it is unknown which rank held it up",
                          "the job hung before any step, and it is unknown which rank held it up"));
  EXPECT_THAT(all({.kind = Kind::kLauncher, .signal = SIGKILL, .started = true}),
              ElementsAre("the launcher was killed by SIGKILL while ranks still ran",
                          "the launcher was killed by SIGKILL after step 7, while ranks still ran",
                          "the launcher was killed by SIGKILL before any step, while ranks still "
                          "ran"));
  EXPECT_THAT(all({.kind = Kind::kLauncher, .code = 1, .started = true}),
              ElementsAre("the launcher ended with code 1 while ranks still ran",
                          "the launcher ended with code 1 after step 7, while ranks still ran",
                          "the launcher ended with code 1 before any step, while ranks still ran"));
  EXPECT_EQ(Describe({.kind = Kind::kLauncher, .code = 1}, When(std::nullopt)),
            "the launcher ended with code 1 before it had started any rank");
  EXPECT_EQ(Describe({.kind = Kind::kLauncher, .signal = SIGKILL}),
            "the launcher was killed by SIGKILL before it had started any rank");
}

FlightNote Note(int rank, std::map<std::string, int64_t> entered) {
  return {.rank = rank, .entered = std::move(entered)};
}

TEST(Flight, ReadsWhatTheRecorderWrites) {
  FlightRecorder recorder(8);
  recorder.NameGroup(1, "dp");
  FlightRecord record = {.sequence = 41, .group = 1, .op = CommOp::kReduceScatter};
  std::strncpy(record.label, "grad bucket 2", sizeof(record.label) - 1);
  const int64_t first = recorder.Begin(record);
  recorder.Started(first);
  recorder.Finished(first);
  record.sequence = 42;
  recorder.Begin(record);
  recorder.Begin({.sequence = 99, .group = 1, .op = CommOp::kSend, .peer = 3});
  const auto note = ParseFlight(recorder.ToJson(5, 8));
  ASSERT_TRUE(note.has_value());
  EXPECT_EQ(note->rank, 5);
  EXPECT_EQ(note->in_flight, "reduce_scatter(dp) seq 42 [grad bucket 2]");
  EXPECT_EQ(note->last_finished, "reduce_scatter(dp) seq 41 [grad bucket 2]");
  EXPECT_EQ(note->entered.at("dp"), 42);  // messages between two have numbers of their own
  for (const char* text : {"", "[]", "{}", "{\"rank\": 1}", "{\"rank\": 1, \"records\": [1]}"}) {
    EXPECT_FALSE(ParseFlight(text).has_value()) << text;
  }
}

TEST(Flight, BehindIsWhoEnteredFewer) {
  EXPECT_THAT(
      Behind({Note(0, {{"all", 7}}), Note(1, {{"all", 6}}), Note(2, {{"all", 7}})}, 3, "all"),
      ElementsAre(1));
  EXPECT_THAT(Behind({Note(0, {{"all", 7}}), Note(1, {})}, 2, "all"), ElementsAre(1));
  // Nobody, or not all are known.
  EXPECT_THAT(Behind({Note(0, {{"all", 7}}), Note(1, {{"all", 7}})}, 2, "all"), IsEmpty());
  EXPECT_THAT(Behind({Note(0, {{"all", 7}}), Note(1, {{"all", 6}})}, 3, "all"), IsEmpty());
}

TEST(Words, HaveNothingThatATerminalActsOn) {
  EXPECT_EQ(CleanText("a\x1b[31;1mb\x1b[0m\x07 c\x1b]0;title\x07"
                      "d\x1b"
                      "7e\tf\r\n50 %\r51 %\n"),
            "ab cde f\n50 %\n51 %\n");
  EXPECT_EQ(CleanText("\xc3\xa9 \xc2\x9b"
                      "31m \x9b \xff."),
            "\xc3\xa9 31m \xef\xbf\xbd \xef\xbf\xbd.");
  EXPECT_EQ(CleanText(std::string("a\0b", 3) + "\x1b[31"), "ab");
}

TEST(Words, TheLastLinesAreWholeAndBounded) {
  EXPECT_THAT(LastLines("\n\n---\nno slots  \n\nask for fewer\n\n"),
              ElementsAre("---", "no slots", "", "ask for fewer"));
  EXPECT_THAT(LastLines(""), IsEmpty());
  std::string many;
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&many, "line ", i, "\n");
  EXPECT_EQ(LastLines(many).size(), kWordLines);
  EXPECT_EQ(LastLines(many).front(), "line 960");
  EXPECT_EQ(LastLines(many).back(), "line 999");
  const std::string wide = std::string(3000, 'a') + "\n" + std::string(3000, 'b') + "\nc\n";
  EXPECT_THAT(LastLines(wide), ElementsAre(std::string(3000, 'b'), "c"));
  const std::vector<std::string> endless = LastLines(std::string(9999, 'x'));
  EXPECT_THAT(endless, ElementsAre(std::string(kWordBytes, 'x')));
}

TEST(Words, WhatIsQuotedIsTheFirstParagraph) {
  EXPECT_EQ(Telling({"-----", "There are not enough slots to satisfy the 40",
                     "slots requested:", "", "  /bin/true"}),
            "There are not enough slots to satisfy the 40 slots requested");
  EXPECT_EQ(Telling({"---", ""}), "");
  EXPECT_EQ(Telling({std::string(500, 'x')}), std::string(200, 'x') + "...");
  EXPECT_EQ(WithoutNumbers({"[node7:123] port 80"}), "[node#:#] port #\n");
}

Incident Example() {
  Incident incident;
  incident.number = 3;
  incident.ranks = 2;
  incident.fates = {Fate(0, State::kExited, 101, 1), Fate(1, State::kKilled, 100.5, SIGKILL)};
  incident.fates[0].said = "first\nrank 1 died\n";
  incident.cause = FindCause(incident.fates, kSaved);
  incident.noticed = 100.75;
  incident.flights[0] = {.rank = 0, .in_flight = "all_reduce(all) seq 7", .last_finished = "x"};
  incident.last_step = 17;
  incident.restarting = true;
  incident.decision = "restart 1";
  return incident;
}

TEST(Incident, WhatIsNotKnownSaysSo) {
  const Incident incident = Example();
  const nlohmann::json j = nlohmann::json::parse(ToJson(incident));
  EXPECT_EQ(j["kind"], "killed");
  EXPECT_EQ(j["first"], nlohmann::json::array({1}));
  EXPECT_EQ(j["signal"], "SIGKILL");
  EXPECT_TRUE(j["code"].is_null());
  EXPECT_EQ(j["last_step"], 17);
  EXPECT_EQ(j["restored_step"], "unknown");
  EXPECT_EQ(j["steps_lost"], "unknown");
  for (const auto& [name, value] : j["seconds"].items()) EXPECT_EQ(value, "unknown") << name;
  EXPECT_EQ(j["ranks"][0]["operation"], "all_reduce(all) seq 7");
  EXPECT_EQ(j["ranks"][0]["said"], "rank 1 died");
  EXPECT_EQ(j["ranks"][1]["operation"], "unknown");
  EXPECT_EQ(j["ranks"][1]["host"], "unknown");
  Incident no_record = incident;
  no_record.fates[0].state = State::kRunning;
  const nlohmann::json other = nlohmann::json::parse(ToJson(no_record));
  EXPECT_EQ(other["ranks"][0]["fate"], "unknown");
  EXPECT_EQ(other["ranks"][0]["time"], "unknown");
  EXPECT_EQ(ToText(incident).find("incident 3 at 1970-01-01T00:01:40.500Z: rank 1 was killed by"),
            0u);
  EXPECT_THAT(ToText(incident), HasSubstr("went on from          unknown, an unknown number of"));
}

TEST(Incident, AddsUpWhatWasLost) {
  Incident incident = Example();
  incident.restored_step = 15;
  EXPECT_EQ(incident.StepsLost(), 2);
  EXPECT_EQ(incident.SecondsLost(), std::nullopt);
  EXPECT_EQ(History({incident}),
            "1 incident: rank 1 was killed by SIGKILL; 2 steps and at least 0.0 s lost");
  incident.detect = incident.end = incident.back_off = 0.25;
  incident.start = incident.load = incident.first_step = 1;
  EXPECT_EQ(incident.SecondsLost(), 3.75);
  Incident other = incident;
  other.cause = {.kind = Cause::Kind::kHung};
  other.restored_step = 0;
  EXPECT_EQ(History({incident, other, incident}),
            "3 incidents: rank 1 was killed by SIGKILL (2 times), the job hung, and it is unknown "
            "which rank held it up; 21 steps and 11.2 s lost");
  other.restarting = false;
  EXPECT_EQ(nlohmann::json::parse(ToJson(other))["steps_lost"], nullptr);
  EXPECT_EQ(History({}), "no incident");
}

TEST(Incident, WithoutRanksTheLauncherHasTheWord) {
  Incident incident;
  incident.ranks = 2;
  incident.fates = {Fate(0, State::kUnknown, 0, 0), Fate(1, State::kUnknown, 0, 0)};
  incident.cause = {.kind = Cause::Kind::kLauncher, .code = 1};
  incident.launcher = {"no slots", "", "ask for fewer"};
  EXPECT_EQ(nlohmann::json::parse(ToJson(incident))["launcher_said"],
            nlohmann::json(incident.launcher));
  EXPECT_THAT(ToText(incident), HasSubstr("  the launcher's last lines:\n    no slots\n\n    ask"));
  EXPECT_THAT(ToText(incident), Not(HasSubstr("rank 0")));
  EXPECT_EQ(nlohmann::json::parse(ToJson(Example()))["launcher_said"], nlohmann::json::array());
  EXPECT_THAT(ToText(Example()), Not(HasSubstr("launcher")));
}

}  // namespace
}  // namespace stretto::testing
