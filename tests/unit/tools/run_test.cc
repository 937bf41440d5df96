// What stretto-run decides and reports, without a job.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/recorder.h"
#include "support/run_program.h"
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

class RunProgram : public Programs {
 protected:
  // In place of mpirun; `refuse` is what it does first.
  void WriteLauncher(const std::string& refuse) const {
    WriteText("mpirun.sh",
              "#!/bin/sh\nn=$(cat tries 2> /dev/null || echo 0)\necho $((n + 1)) > tries\n" +
                  refuse +
                  "\nshift 2\nRANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 "
                  "MASTER_ADDR=127.0.0.1 MASTER_PORT=1 exec \"$@\"\n");
    std::filesystem::permissions(Path("mpirun.sh"), std::filesystem::perms::owner_all);
  }
  nlohmann::json Report(int number) const {
    return nlohmann::json::parse(
        ReadText(absl::StrCat("incidents/incident-000", number, "/report.json")), nullptr, false);
  }
};

TEST_F(RunProgram, WrongUsageIsOneSentence) {
  for (const char* options :
       {"--ranks 2", "--ranks 0 -- true", "--ranks x -- true", "--ranks 2 --min-ranks 3 -- true",
        "--launcher srun -- true", "--fatal-codes 2,x -- true", "--keepers 2 -- true",
        "--parity 1 -- true", "--keepers 0 --data 2 -- true",
        "--ranks 4 --min-ranks 2 --keepers 3 -- true", "--parity -2 -- true", "--data 0 -- true",
        "--delay 9 --delay-cap 1 -- true", "--stall -1 -- true", "--unknown -- true",
        "--mpirun ' ' -- true", "--restarts -1 -- true", "--ranks 1000000 -- true",
        "--ranks 1000000 --launcher env -- true"}) {
    const Result r = Run(std::string(STRETTO_RUN) + " " + options + " 2>&1");
    EXPECT_EQ(r.code, 2) << options;
    EXPECT_TRUE(IsOneSentence(r.output)) << options << ": " << r.output;
    EXPECT_THAT(r.output, ::testing::StartsWith("stretto-run")) << options;
  }
}

TEST_F(RunProgram, KeepersNameTheOptionThatIsWrong) {
  for (const char* options : {"--threads -5", "--threads 0", "--node -1", "--nodes 0", "--keep -1",
                              "--memory -7", "--parity 70000", "--silence 0"}) {
    const std::string name = std::string(options).substr(0, std::string(options).find(' '));
    const Result r = Run(absl::StrCat(STRETTO_KEEPER " ", options, " 2>&1"));
    EXPECT_EQ(r.code, 2) << options;
    EXPECT_TRUE(IsOneSentence(r.output)) << options << ": " << r.output;
    EXPECT_THAT(r.output, HasSubstr(name + " must be")) << options;
  }
}

TEST_F(RunProgram, AKeeperIsAskedAtItsSocketWithOrWithoutAFolder) {
  const Result r =
      Run("export STRETTO_JOB_TOKEN=secret; { " STRETTO_KEEPER
          " --job ask --socket here.sock > ready & } && until [ -s ready ]; do sleep 0.01; done; "
          "for at in here.sock ./here.sock $PWD/here.sock; do " STRETTO_KEEPER
          " --ask $at 2>&1 | head -1; done; kill $!; wait");
  EXPECT_EQ(r.output, "job ask\njob ask\njob ask\n");
  const Result none = Run(STRETTO_KEEPER " --ask absent.sock 2>&1");
  EXPECT_EQ(none.code, 1);
  EXPECT_THAT(none.output, HasSubstr("no keeper at absent.sock: No such file"));
}

TEST_F(RunProgram, SaysHowAKeeperEndedThatIsNotReady) {
  const auto run = [this](const std::string& keeper, const std::string& wrap = "") {
    WriteText("keeper.sh", "#!/bin/sh\n" + keeper + "\n");
    std::filesystem::permissions(Path("keeper.sh"), std::filesystem::perms::owner_all);
    return Run(wrap + STRETTO_RUN " --launcher env --keepers 1 --keeper ./keeper.sh -- true 2>&1");
  };
  Result r = run("exit 2");
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.output, HasSubstr("(./keeper.sh) ended with code 2 before it was ready"));
  EXPECT_EQ(run("exit 1").code, 1);
  r = Run(STRETTO_RUN " --launcher env --keepers 1 --keeper ./missing -- true 2>&1");
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.output, HasSubstr("(./missing) ended with code 127"));
  r = run("kill -9 $$");
  EXPECT_EQ(r.code, 1);
  EXPECT_THAT(r.output, HasSubstr("was killed by SIGKILL before it was ready"));
  r = run("echo hello; sleep 100");
  EXPECT_THAT(r.output, HasSubstr("writes something else"));
  // One that is stopped cleans up like any other.
  r =
      run("trap 'touch cleaned; exit' TERM; echo ready ${8##*:}; kill -STOP $$; "
          "while sleep 0.01; do :; done");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_TRUE(std::filesystem::exists(Path("cleaned")));
  // Asked to stop while a keeper takes its time.
  r = run("sleep 100", "timeout --signal=TERM 1 ");
  EXPECT_EQ(r.code, 124) << r.output;  // timeout's own
  EXPECT_THAT(r.output, HasSubstr("asked to stop while no rank ran"));
}

TEST_F(RunProgram, ParityIsTheKeepersDefaultOnlyWhereNoneIsAskedFor) {
  WriteText("ask.sh", "[ $RANK -gt 0 ] || " STRETTO_KEEPER " --ask $STRETTO_KEEPER | grep code");
  const auto code = [this](const std::string& options) {
    return Run(absl::StrCat(STRETTO_RUN " --launcher env --ranks 4 --keepers 4 ", options,
                            " -- sh ask.sh 2>&1"));
  };
  EXPECT_THAT(code("").output, HasSubstr("code 3 + 1\n"));
  EXPECT_THAT(code("--parity -1").output, HasSubstr("code 3 + 1\n"));
  EXPECT_THAT(code("--parity 0").output, HasSubstr("code 1 + 0\n"));
  EXPECT_THAT(code("--data 2 --parity 2").output, HasSubstr("code 2 + 2\n"));
}

// A keeper that starts again may take half a minute and never be ready, ten times.
TEST_F(RunProgram, RanksAreWatchedWhileAKeeperStartsAgain) {
  WriteText("keeper.sh",
            "#!/bin/sh\n[ -e once ] && { echo $$ > again; exec sleep 300; }\n"
            "touch once; echo ready ${8##*:}; until [ -e die ]; do sleep 0.01; done; exit 1\n");
  std::filesystem::permissions(Path("keeper.sh"), std::filesystem::perms::owner_all);
  const Result r = Run(STRETTO_RUN
                       " --launcher env --keepers 1 --keeper ./keeper.sh --restarts 0 -- "
                       "sh -c 'touch die; until [ -s again ]; do sleep 0.01; done; exit 3' 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_THAT(r.output, HasSubstr("keeper 0 has ended; it starts again"));
  EXPECT_THAT(r.output, HasSubstr("rank 0 ended with code 3"));
  EXPECT_THAT(r.output, Not(HasSubstr("did not become ready")));
  EXPECT_NE(Run("kill -0 $(cat again) 2>&1").code, 0);
}

// Programs that know nothing of it.
TEST_F(RunProgram, AnyProgramIsRestarted) {
  const Result r =
      Run(STRETTO_RUN
          " --launcher env --ranks 2 --delay 0.01 --prefix -- sh -c 'echo $RANK is here; "
          "[ $RANK$STRETTO_RESTARTS = 10 ] && exit 3; exit 0' 2>&1");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("[1] 1 is here\n"));
  EXPECT_THAT(r.output,
              HasSubstr("rank 1 ended with code 3 before any step; restart 1 with 2 ranks"));
  const nlohmann::json j =
      nlohmann::json::parse(ReadText("incidents/incident-0001/report.json"), nullptr, false);
  ASSERT_TRUE(j.is_object());
  EXPECT_EQ(j["code"], 3);
  EXPECT_EQ(j["last_step"], "unknown");
}

TEST_F(RunProgram, NothingStaysBehindARank) {
  const Result r = Run(STRETTO_RUN
                       " --launcher env --ranks 1 --restarts 0 -- "
                       "sh -c 'setsid sleep 300 & echo $! > child; exit 4' 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_THAT(r.output, HasSubstr("no restart: --restarts is 0"));
  EXPECT_NE(Run("kill -0 $(cat child) 2>&1").code, 0);
}

// A program that marks its start and then does nothing. With `flight` it answers SIGUSR2 as
// trainers do, and rank 0 is one collective ahead.
std::string Hanging(bool flight) {
  std::string program =
      "printf '%-63s\\n' 'met 1700000000000000 0' > $STRETTO_PROGRESS/rank-$RANK.progress\n";
  if (flight) {
    program +=
        "f=$PWD/flight-rank$RANK.json; rm -f $f\n"
        "echo '{\"output\":\"o\",\"flight_directory\":\"'$PWD'\",\"dp\":2,\"pp\":1,\"tp\":1,"
        "\"cp\":1,\"dp_fixed\":false}' > $STRETTO_PROGRESS/job.json\n"
        "trap 'echo \"{\\\"rank\\\":$RANK,\\\"records\\\":[{\\\"op\\\":\\\"all_reduce\\\","
        "\\\"group_name\\\":\\\"all\\\",\\\"sequence\\\":$((7 - RANK)),"
        "\\\"state\\\":\\\"started\\\"}]}\" > $f' USR2\n";
  }
  return program + "while true; do sleep 0.05; done\n";
}

// What ranks had started, in sessions of their own, goes with a stretto-run that cannot do it
// itself.
TEST_F(RunProgram, NothingStaysBehindStrettoRun) {
  const Result r = Run("{ " STRETTO_RUN
                       " --launcher env -- sh -c 'setsid sleep 300 & echo $! > child; wait' & "
                       "until [ -s child ]; do sleep 0.01; done; kill -9 $!; wait $!; "
                       "i=0; while kill -0 $(cat child) && [ $i -lt 500 ]; do sleep 0.01; "
                       "i=$((i + 1)); done; [ $i -lt 500 ]; } 2> /dev/null");
  EXPECT_EQ(r.code, 0);
}

// Of a script that becomes stretto-run.
TEST_F(RunProgram, ChildrenFromBeforeStayWhereItCannotBegin) {
  const Result r = Run("(touch file; sleep 300 > /dev/null & echo $! > child; exec " STRETTO_RUN
                       " --launcher env --directory file/x -- true 2>&1); echo $?; "
                       "kill $(cat child) && echo alive");
  EXPECT_THAT(r.output, ::testing::EndsWith("; see --directory\n1\nalive\n"));
}

TEST_F(RunProgram, AHangIsNoticed) {
  WriteText("hang.sh", Hanging(false));
  const Result r = Run(STRETTO_RUN
                       " --launcher env --ranks 2 --restarts 0 --stall-start 0.3 --grace 0.1 "
                       "-- sh hang.sh 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  const nlohmann::json j =
      nlohmann::json::parse(ReadText("incidents/incident-0001/report.json"), nullptr, false);
  ASSERT_TRUE(j.is_object()) << r.output;
  EXPECT_EQ(j["kind"], "hung");
  EXPECT_EQ(j["first"], "unknown");
  EXPECT_EQ(j["ranks"][0]["operation"], "unknown");
}

TEST_F(RunProgram, FlightRecordsSayWhoHeldItUp) {
  WriteText("hang.sh", Hanging(true));
  const Result r = Run(STRETTO_RUN
                       " --launcher env --ranks 2 --restarts 0 --stall-start 0.3 --grace 0.1 "
                       "-- sh hang.sh 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  const nlohmann::json j =
      nlohmann::json::parse(ReadText("incidents/incident-0001/report.json"), nullptr, false);
  ASSERT_TRUE(j.is_object()) << r.output;
  EXPECT_EQ(j["first"], nlohmann::json::array({1})) << j;
  EXPECT_EQ(j["ranks"][1]["operation"], "all_reduce(all) seq 6");
  EXPECT_THAT(ReadText("incidents/incident-0001/flight-rank0.json"), HasSubstr("\"sequence\":7"));
}

TEST_F(RunProgram, IsStoppedWhileItWaits) {
  const Result r = Run("{ " STRETTO_RUN
                       " --launcher env --delay 60 -- sh -c 'exit 3' > log 2>&1 & "
                       "until grep -qs 'restart 1' log; do sleep 0.01; done; kill -TERM $!; "
                       "wait $!; echo $?; cat log; }");
  EXPECT_EQ(r.output.substr(0, 3), "75\n") << r.output;
  EXPECT_THAT(r.output, HasSubstr("asked to stop while no rank ran"));
}

TEST_F(RunProgram, EachStartHasADirectoryOfItsOwn) {
  const Result r = Run(STRETTO_RUN
                       " --launcher env --delay 0 --restarts 2 -- "
                       "sh -c 'echo $STRETTO_PROGRESS >> where; exit 3' > log 2>&1; "
                       "sort -u where | wc -l; ls incidents");
  EXPECT_EQ(r.output, "3\nincident-0001\nincident-0002\nincident-0003\n") << ReadText("log");
}

// What guards have read, a launcher that was busy passes on later.
TEST_F(RunProgram, ARankIsAskedOnce) {
  WriteText("mpirun.sh",
            "#!/bin/sh\nshift 2\nRANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 "
            "MASTER_ADDR=127.0.0.1 MASTER_PORT=1 \"$@\" &\n"
            "trap 'sleep 2; kill -USR1 $!; echo passed on >&2' USR1\nwait $!\nwait $!\n");
  std::filesystem::permissions(Path("mpirun.sh"), std::filesystem::perms::owner_all);
  WriteText("save.sh",
            "trap 'echo asked >> asked' USR1\n: > ready\nuntil [ -s asked ]; do sleep 0.05; done\n"
            "for i in $(seq 50); do sleep 0.05; done\nexit 75\n");
  const Result r = Run("{ " STRETTO_RUN
                       " --mpirun ./mpirun.sh -- sh save.sh > log 2>&1 & "
                       "until [ -e ready ]; do sleep 0.01; done; kill -TERM $!; wait $!; echo $?; "
                       "cat asked log; }");
  EXPECT_EQ(r.output.substr(0, 9), "75\nasked\n") << r.output;
  EXPECT_THAT(r.output, Not(HasSubstr("\nasked\nasked\n")));
  EXPECT_THAT(r.output, HasSubstr("passed on\n"));
}

TEST_F(RunProgram, CtrlCEndsItAtOnce) {
  WriteText("stubborn.sh", "trap : TERM INT\necho $$ > child\nwhile true; do sleep 0.05; done\n");
  const Result r = Run("{ " STRETTO_RUN
                       " --launcher env --grace 60 -- sh stubborn.sh > log 2>&1 & "
                       "until [ -s child ]; do sleep 0.01; done; kill -INT $!; wait $!; echo $?; "
                       "kill -0 $(cat child) 2> /dev/null || echo gone; cat log; }");
  EXPECT_EQ(r.output.substr(0, 9), "130\ngone\n") << r.output;
}

TEST_F(RunProgram, ALauncherThatStartsNothingIsTheCause) {
  const Result r = Run(STRETTO_RUN " --mpirun true --delay 0 --restarts 0 -- true 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_THAT(r.output,
              HasSubstr("the launcher ended with code 0 before it had started any rank, and "
                        "said nothing; no restart: --restarts is 0"));
}

TEST_F(RunProgram, TheLaunchersWordsAreReportedAndARefusalIsTriedTwice) {
  WriteLauncher("printf '\\033[31m----\\nno slots for %s\\033[0m\\n----\\n' $$ >&2; exit 1");
  const Result r = Run(STRETTO_RUN " --mpirun ./mpirun.sh --delay 0.01 -- true 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_EQ(ReadText("tries"), "2\n") << r.output;
  EXPECT_THAT(r.output, HasSubstr("\033[31m----\nno slots for "));  // untouched on its way
  EXPECT_THAT(r.output,
              HasSubstr("stretto-run: the launcher ended with code 1 before it had started "
                        "any rank (\"no slots for "));
  EXPECT_THAT(r.output,
              HasSubstr("gave up: the launcher started no rank in 2 tries and said the same "
                        "each time; 2 incidents: "));
  const nlohmann::json j = Report(2);
  ASSERT_TRUE(j.is_object());
  EXPECT_EQ(j["kind"], "launcher");
  ASSERT_EQ(j["launcher_said"].size(), 3U) << j;
  EXPECT_EQ(j["launcher_said"][0], "----");
  EXPECT_THAT(j["launcher_said"][1].get<std::string>(), ::testing::StartsWith("no slots for "));
  EXPECT_THAT(ReadText("incidents/incident-0001/report.txt"),
              HasSubstr("  the launcher's last lines:\n    ----\n    no slots for "));
}

TEST_F(RunProgram, ALauncherThatHealsStartsTheJob) {
  WriteLauncher("[ $n = 0 ] && { echo 'no route to host' >&2; exit 255; }");
  const Result r = Run(STRETTO_RUN " --mpirun ./mpirun.sh --delay 0.01 -- sh -c 'echo done' 2>&1");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("any rank (\"no route to host\"); restart 1 with 1 rank"));
  EXPECT_THAT(r.output, HasSubstr("done\n"));
}

TEST_F(RunProgram, AfterRanksHaveRunALauncherGetsAllTries) {
  WriteLauncher("[ $n = 0 ] || { echo 'no route to host' >&2; exit 255; }");
  const Result r =
      Run(STRETTO_RUN " --mpirun ./mpirun.sh --delay 0.01 --restarts 9 -- sh -c 'exit 3' 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_EQ(ReadText("tries"), "4\n") << r.output;
}

TEST_F(RunProgram, ARequestThatCannotBeWrittenIsSaidOnce) {
  WriteText("deaf.sh",
            "#!/bin/bash\ntrap '' USR1\nshift 2\nRANK=0 WORLD_SIZE=1 LOCAL_RANK=0 "
            "LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 \"$@\" &\nwait\n");
  std::filesystem::permissions(Path("deaf.sh"), std::filesystem::perms::owner_all);
  const Result r = Run("{ " STRETTO_RUN
                       " --mpirun ./deaf.sh --save 3 --grace 0.1 -- sh -c 'echo $$ > child; exec "
                       "sleep 99' > log 2>&1 & until [ -s child ]; do sleep 0.01; done; "
                       "(cd incidents/live-*; rm request; mkdir request); "
                       "kill -TERM $!; wait $!; echo $?; cat log; }");
  EXPECT_EQ(r.output.substr(0, 3), "76\n") << r.output;
  const std::string said = "/request: Is a directory; see --directory; ranks save only if";
  const size_t found = r.output.find(said);
  ASSERT_NE(found, std::string::npos) << r.output;
  EXPECT_EQ(r.output.find(said, found + 1), std::string::npos) << r.output;
}

TEST_F(RunProgram, RanksSaveThoughNobodyReadsWhatIsSaid) {
  WriteText("save.sh",
            "trap 'exit 75' USR1\necho $$ > child\n"
            "while true; do seq 100 >&2; sleep 0.01; done\n");
  WriteText("fail.sh", "echo $$ > child\nseq 1000 >&2\nexit 3\n");
  for (const auto& [program, code] : {std::pair("save.sh", "75\n"), std::pair("fail.sh", "1\n")}) {
    // The pipe is full before anything is said.
    const Result r = Run(absl::StrCat(
        "rm -rf child stuck; mkfifo stuck; sleep 99 < stuck > /dev/null & reader=$!; "
        "exec 3> stuck; timeout 0.5 cat /dev/zero >&3; timeout -s KILL 30 " STRETTO_RUN
        " --launcher env --restarts 0 --grace 0.1 -- sh ",
        program, " 2>&3 & until [ -s child ]; do sleep 0.01; done; sleep 0.5; ",
        code[0] == '7' ? "pkill -TERM -P $!; " : "", "wait $!; echo $?; kill $reader"));
    EXPECT_EQ(r.output, code) << program;
  }
  EXPECT_EQ(Report(1)["code"], 3);
}

TEST_F(RunProgram, WhereStandardStreamsAreClosedNothingTakesTheirNumbers) {
  // Of a rank, which would print into the first file that it opens.
  WriteText(
      "streams.sh",
      "links=$(for n in 0 1 2; do readlink /proc/$$/fd/$n; done)\necho \"$links\" > streams\n");
  const Result r = Run(STRETTO_RUN " --launcher env -- sh streams.sh <&- >&- 2>&-; echo $?");
  EXPECT_EQ(r.output, "0\n");
  EXPECT_THAT(ReadText("streams"), ::testing::MatchesRegex("/dev/null\n/dev/null\npipe:.*\n"));
}

TEST_F(RunProgram, ALauncherThatHangsBeforeItStartsARankIsNoticed) {
  WriteLauncher("trap '' TERM; echo 'waiting for node7' >&2; exec sleep 99");
  const Result r = Run(STRETTO_RUN
                       " --mpirun ./mpirun.sh --stall-start 0.3 --delay 0.01 --grace 0.1 "
                       "-- true 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_EQ(ReadText("tries"), "2\n") << r.output;
  EXPECT_THAT(r.output, HasSubstr("the launcher has started no rank for 0.3 s (--stall-start)\n"));
  EXPECT_THAT(r.output, HasSubstr("the launcher hung before it had started any rank "
                                  "(\"waiting for node7\"); restart 1"));
  EXPECT_EQ(Report(1)["kind"], "launcher");
  EXPECT_EQ(Report(1)["code"], nullptr);
}

// Of what it had there nothing is known any more, but how the launcher ended.
TEST_F(RunProgram, ItsDirectoryMayBeRemoved) {
  const auto run = [&](const std::string& program, const std::string& options) {
    return Run(absl::StrCat("rm -f ready; " STRETTO_RUN " --launcher env ", options,
                            " -- sh -c '[ $STRETTO_RESTARTS = 1 ] || echo > ready; while [ -e "
                            "ready ]; do sleep 0.01; done; ",
                            program,
                            "' > log 2>&1 & until [ -s ready ]; do sleep 0.01; done; "
                            "rm -rf incidents; rm ready; wait $!; echo $?; cat log"));
  };
  const std::string removed = " was removed while the job ran, so that only the launcher's end";
  Result r = run("exit 0", "");
  EXPECT_EQ(r.output.substr(0, 2), "0\n") << r.output;
  EXPECT_THAT(r.output, HasSubstr(removed));
  r = run("exit 75", "");
  EXPECT_EQ(r.output.substr(0, 3), "75\n") << r.output;
  r = run("[ $STRETTO_RESTARTS = 1 ] || exit 3", "--delay 0.01");
  EXPECT_EQ(r.output.substr(0, 2), "0\n") << r.output;
  EXPECT_THAT(r.output, HasSubstr("the job failed for an unknown reason; restart 1"));
  EXPECT_TRUE(Report(1).is_object());
}

TEST_F(RunProgram, WhereNoReportCanBeWrittenItSaysWhy) {
  const Result r = Run(STRETTO_RUN
                       " --launcher env --restarts 0 -- "
                       "sh -c 'rm -r incidents; touch incidents; exit 3' 2>&1");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_THAT(r.output, HasSubstr("no restart: --restarts is 0; no report ("));
  EXPECT_THAT(r.output, HasSubstr("/incidents/incident-0001: Not a directory)\n"));
  EXPECT_THAT(r.output, Not(HasSubstr("report.txt")));
}

TEST_F(RunProgram, AMessageBeginsALine) {
  WriteLauncher("printf 'no slots' >&2; exit 1");
  const Result r = Run(STRETTO_RUN " --mpirun ./mpirun.sh --restarts 0 -- true 2>&1");
  EXPECT_THAT(r.output, ::testing::StartsWith("no slots\nstretto-run: the launcher ended"));
}

TEST_F(RunProgram, WhatRanksWriteComesThroughWhole) {
  WriteText("write.sh", "seq 200000 >&2\n");
  const Result r =
      Run(STRETTO_RUN " --launcher env -- sh write.sh 2>&1 | grep -v stretto-run | md5sum");
  EXPECT_EQ(r.output, Run("seq 200000 | md5sum").output);
}

TEST_F(RunProgram, AProgramThatIsNotThereIsNotTriedAgain) {
  const Result r = Run(STRETTO_RUN " --launcher env -- ./missing 2>&1");
  EXPECT_EQ(r.code, 127) << r.output;
  EXPECT_THAT(r.output, HasSubstr("cannot start ./missing: No such file or directory"));
  EXPECT_THAT(r.output, HasSubstr("exit code 127 does not heal"));
}

}  // namespace
}  // namespace stretto::testing
