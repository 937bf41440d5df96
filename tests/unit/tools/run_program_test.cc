// stretto-run as users start it, with programs that know nothing of it.
#include "support/run_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

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
