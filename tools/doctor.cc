// Looks at the machine as a run would, and says in sentences what is wrong and what to do.
#include "tools/doctor.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "tools/arguments.h"

namespace stretto {
namespace {

constexpr int kWell = 0, kProblems = 1;

const char* Word(Finding finding) {
  switch (finding) {
    case Finding::kOk:
      return "ok";
    case Finding::kNote:
      return "note";
    case Finding::kProblem:
      return "problem";
  }
  return "";
}

int Count(const Report& report, Finding finding) {
  int count = 0;
  for (const Check& check : report.checks()) count += check.finding == finding;
  return count;
}

std::string Counted(int count, const char* noun) {
  return absl::StrCat(count == 0 ? "no" : absl::StrCat(count), " ", noun, count == 1 ? "" : "s");
}

std::string Text(const Report& report) {
  std::string text;
  for (const Check& check : report.checks()) {
    absl::StrAppendFormat(&text, "%-8s %-14s %s\n", Word(check.finding), check.what, check.text);
  }
  return absl::StrCat(text, "\n", Counted(Count(report, Finding::kProblem), "problem"), ", ",
                      Counted(Count(report, Finding::kNote), "note"), "\n");
}

std::string Json(const Report& report) {
  nlohmann::ordered_json json;
  json["problems"] = Count(report, Finding::kProblem);
  json["notes"] = Count(report, Finding::kNote);
  json["checks"] = nlohmann::ordered_json::array();
  for (const Check& check : report.checks()) {
    nlohmann::ordered_json line = {
        {"finding", Word(check.finding)}, {"what", check.what}, {"text", check.text}};
    if (!check.values.is_null()) line["values"] = check.values;
    json["checks"].push_back(std::move(line));
  }
  // Names of processes and files may hold any bytes.
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

absl::StatusOr<int> Main(int argc, char** argv) {
  bool json = false, quick = false;
  Arguments arguments("stretto-doctor",
                      "Checks the machine and prints one line a check: ok, note (may be ignored) "
                      "or problem.\nExit code 1: there is a problem.",
                      "");
  arguments.AddFlag("json", "print JSON", &json);
  arguments.AddFlag("quick", "do not measure the GPUs", &quick);
  STRETTO_RETURN_IF_ERROR(arguments.Parse(argc, argv));
  if (arguments.help()) {
    STRETTO_RETURN_IF_ERROR(PrintText(arguments.Help()));
    return kWell;
  }
  SetLogLevel(LogLevel::kError);
  Report report;
  CheckHost(report);
#ifdef STRETTO_WITH_CUDA
  CheckGpus(report, !quick);
#else
  report.Note("gpu",
              "this program was built without CUDA: runs use the CPU; to use NVIDIA GPUs, install "
              "the CUDA 13 toolkit and configure with -DSTRETTO_CUDA=ON");
#endif
  STRETTO_RETURN_IF_ERROR(PrintText(json ? Json(report) : Text(report)));
  return Count(report, Finding::kProblem) > 0 ? kProblems : kWell;
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) { return stretto::EndProgram(stretto::Main(argc, argv)); }
