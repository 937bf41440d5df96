// stretto-bench compare: what changed between two runs.
#include <cmath>
#include <cstdio>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "stretto/core/read_file.h"
#include "tools/arguments.h"

namespace stretto::bench {
namespace {

absl::StatusOr<Results> Read(const std::string& path) {
  STRETTO_ASSIGN_OR_RETURN(const std::string file, ReadRegularFile("the result", path));
  const Json json = Json::parse(file, nullptr, false);
  const absl::Status wrong = absl::InvalidArgumentError(
      absl::StrCat(path, " is no result of stretto-bench; give files that --json wrote"));
  if (!json.is_object() || json.value("program", Json()) != "stretto-bench") return wrong;
  const auto text = [&](const char* key) {
    return json.contains(key) && json[key].is_string() ? json[key].get<std::string>() : "";
  };
  Results results = {.command = text("command"), .device = text("device")};
  if (!json.contains("results") || !json["results"].is_array()) return wrong;
  for (const Json& result : json["results"]) {
    if (!result.is_object() || !result.contains("name") || !result["name"].is_string() ||
        !result.contains("seconds") || !result["seconds"].is_number()) {
      return wrong;
    }
    results.results.push_back(result);
  }
  return results;
}

}  // namespace

int Compare(int argc, const char* const* argv) {
  double tolerance = 5;
  Arguments arguments("stretto-bench compare",
                      "Prints the times of B over those of A and marks changes beyond the "
                      "tolerance.\nExit code 1: something is slower by more than that.",
                      "A.json B.json");
  arguments.Add("tolerance", "PERCENT", "changes up to this are noise", &tolerance);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && arguments.rest().size() != 2) {
    parsed = absl::InvalidArgumentError("stretto-bench compare needs two files; see --help");
  }
  if (parsed.ok() && tolerance < 0) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--tolerance must be 0 or more percent, not ", tolerance));
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  const auto a = Read(arguments.rest()[0]);
  if (!a.ok()) return Fail(a.status(), kUsage);
  const auto b = Read(arguments.rest()[1]);
  if (!b.ok()) return Fail(b.status(), kUsage);
  if (a->command != b->command) {
    return Fail(
        absl::InvalidArgumentError(absl::StrCat("one file is of 'stretto-bench ", a->command,
                                                "' and the other of 'stretto-bench ", b->command,
                                                "'; compare files of the same command")),
        kUsage);
  }
  if (a->device != b->device) {
    std::printf("not the same device: %s and %s\n", a->device.c_str(), b->device.c_str());
  }
  std::map<std::string, double> seconds;
  for (const Json& result : b->results) {
    seconds[result["name"].get<std::string>()] = result["seconds"].get<double>();
  }
  std::printf("%-44s %12s %12s %8s\n", "", "A ms", "B ms", "B / A");
  int slower = 0, faster = 0, alone = 0;
  for (const Json& result : a->results) {
    const std::string name = result["name"].get<std::string>();
    const double before = result["seconds"].get<double>();
    const auto found = seconds.find(name);
    if (found == seconds.end()) {
      std::printf("%-44s %12.4f %12s\n", name.c_str(), 1e3 * before, "-");
      ++alone;
      continue;
    }
    const double after = found->second;
    const double ratio = before > 0 ? after / before : (after > 0 ? HUGE_VAL : 1);
    // Symmetric: twice as fast and half as fast are the same change.
    const double limit = 1 + tolerance / 100;
    const char* mark = "";
    if (ratio > limit) mark = "  slower", ++slower;
    if (ratio * limit < 1) mark = "  faster", ++faster;
    std::printf("%-44s %12.4f %12.4f %8.3f%s\n", name.c_str(), 1e3 * before, 1e3 * after, ratio,
                mark);
    seconds.erase(found);
  }
  for (const auto& [name, after] : seconds) {
    std::printf("%-44s %12s %12.4f\n", name.c_str(), "-", 1e3 * after);
    ++alone;
  }
  std::printf("%d slower, %d faster by more than %g %%; %d in one file only\n", slower, faster,
              tolerance, alone);
  return EndProgram(slower > 0 ? kFailed : kDone);
}

}  // namespace stretto::bench
