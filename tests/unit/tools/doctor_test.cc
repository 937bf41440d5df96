// stretto-doctor on whatever machine the tests run on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "support/run_program.h"

namespace stretto::testing {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class Doctor : public Programs {
 protected:
  // `environment` stands in front of the program: "PATH=...".
  nlohmann::json Json(const std::string& environment, int* code) const {
    const Result r = Run(absl::StrCat("env ", environment, " " STRETTO_DOCTOR " --json --quick"));
    *code = r.code;
    return nlohmann::json::parse(r.output, nullptr, false);
  }
  static nlohmann::json Find(const nlohmann::json& report, const std::string& what) {
    for (const auto& check : report["checks"]) {
      if (check["what"] == what) return check;
    }
    return nullptr;
  }
  static int Count(const nlohmann::json& report, const std::string& finding) {
    int count = 0;
    for (const auto& check : report["checks"]) count += check["finding"] == finding;
    return count;
  }
};

TEST_F(Doctor, JsonCountsWhatItLists) {
  int code = -1;
  const nlohmann::json report = Json("", &code);
  ASSERT_FALSE(report.is_discarded());
  EXPECT_EQ(report["problems"], Count(report, "problem"));
  EXPECT_EQ(report["notes"], Count(report, "note"));
  EXPECT_EQ(code, report["problems"] > 0 ? 1 : 0);
  for (const char* what :
       {"processors", "vector units", "memory", "mpi", "shared memory", "limits", "openblas"}) {
    const nlohmann::json check = Find(report, what);
    ASSERT_FALSE(check.is_null()) << what;
    EXPECT_FALSE(check["text"].get<std::string>().empty()) << what;
  }
  EXPECT_GT(Find(report, "memory")["values"]["available_bytes"], 0);
  EXPECT_GE(Find(report, "vector units")["values"]["level"], 1);
}

TEST_F(Doctor, TextIsOneLineACheck) {
  int code = -1;
  const nlohmann::json report = Json("", &code);
  ASSERT_FALSE(report.is_discarded());
  const Result r = Run(STRETTO_DOCTOR " --quick");
  std::istringstream lines(r.output);
  size_t checks = 0;
  std::string line;
  for (; std::getline(lines, line) && !line.empty(); ++checks) {
    EXPECT_THAT(line, AnyOf(StartsWith("ok "), StartsWith("note "), StartsWith("problem ")));
  }
  EXPECT_EQ(checks, report["checks"].size());
  ASSERT_TRUE(std::getline(lines, line));
  EXPECT_THAT(line, HasSubstr("problem"));
}

// A GPU that nobody may see is no problem.
TEST_F(Doctor, MachineWithoutGpuIsWell) {
  int code = -1;
  const nlohmann::json report = Json("CUDA_VISIBLE_DEVICES=", &code);
  ASSERT_FALSE(report.is_discarded());
  const nlohmann::json gpu = Find(report, "gpu");
  ASSERT_FALSE(gpu.is_null());
  EXPECT_EQ(gpu["finding"], "note");
  EXPECT_THAT(gpu["text"].get<std::string>(), HasSubstr("CPU"));
  EXPECT_TRUE(Find(report, "cuBLASLt").is_null());
}

TEST_F(Doctor, MpirunOfAnotherMpiIsAProblem) {
  int code = -1;
  nlohmann::json report = Json("", &code);
  ASSERT_FALSE(report.is_discarded());
  if (!Find(report, "mpi").contains("values")) GTEST_SKIP() << "built without MPI";
  WriteText("mpirun", "#!/bin/sh\necho 'mpirun (Open MPI) 1.2.3'\n");
  ASSERT_EQ(Run("chmod +x mpirun").code, 0);
  report = Json(absl::StrCat("PATH='", folder_, "':/usr/bin:/bin"), &code);
  ASSERT_FALSE(report.is_discarded());
  EXPECT_EQ(Find(report, "mpi")["finding"], "problem");
  EXPECT_THAT(Find(report, "mpi")["text"].get<std::string>(), HasSubstr("1.2.3"));
  EXPECT_EQ(code, 1);
  WriteText("mpirun", "#!/bin/sh\nexit 1\n");
  report = Json(absl::StrCat("PATH='", folder_, "':/usr/bin:/bin"), &code);
  EXPECT_EQ(Find(report, "mpi")["finding"], "note");
  EXPECT_THAT(Find(report, "mpi")["text"].get<std::string>(), HasSubstr("no mpirun"));
}

TEST_F(Doctor, LimitsAreNamed) {
  const Result r = Run("ulimit -n 64 && " STRETTO_DOCTOR " --quick");
  EXPECT_THAT(r.output, HasSubstr("64 files only"));
}

TEST_F(Doctor, WrongArgumentsAreOneSentence) {
  for (const char* arguments : {"--jsom", "extra", "--json=yes"}) {
    const Result r = Run(absl::StrCat(STRETTO_DOCTOR " ", arguments, " 2>&1"));
    EXPECT_EQ(r.code, 2) << arguments;
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
  }
  EXPECT_THAT(Run(STRETTO_DOCTOR " --jsom 2>&1").output, HasSubstr("did you mean --json"));
}

}  // namespace
}  // namespace stretto::testing
