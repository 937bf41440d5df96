// What stretto-doctor finds, and who looks for it.
#ifndef STRETTO_TOOLS_DOCTOR_H_
#define STRETTO_TOOLS_DOCTOR_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"

namespace stretto {

// A note may be ignored; a problem keeps runs from starting, or makes them far slower or wrong.
enum class Finding { kOk, kNote, kProblem };

// One line. `text` says what is, and for notes and problems what to do about it.
struct Check {
  Finding finding;
  std::string what;  // "memory", "gpu 0"
  std::string text;
  nlohmann::ordered_json values;  // figures of the line, for programs
};

class Report {
 public:
  void Ok(const std::string& what, const std::string& text, nlohmann::ordered_json values = {}) {
    checks_.push_back({Finding::kOk, what, text, std::move(values)});
  }
  void Note(const std::string& what, const std::string& text, nlohmann::ordered_json values = {}) {
    checks_.push_back({Finding::kNote, what, text, std::move(values)});
  }
  void Problem(const std::string& what, const std::string& text,
               nlohmann::ordered_json values = {}) {
    checks_.push_back({Finding::kProblem, what, text, std::move(values)});
  }
  const std::vector<Check>& checks() const { return checks_; }

 private:
  std::vector<Check> checks_;
};

// "7.5 GiB".
inline std::string SizeText(int64_t bytes) {
  const auto size = static_cast<double>(bytes);
  return bytes < (int64_t{1} << 30) ? absl::StrFormat("%.0f MiB", size / 0x1p20)
                                    : absl::StrFormat("%.1f GiB", size / 0x1p30);
}

// Processors, memory, MPI, limits, OpenBLAS.
void CheckHost(Report& report);
// Driver, GPUs, libraries; with `measure`, how fast they are. In builds with CUDA only.
void CheckGpus(Report& report, bool measure);

}  // namespace stretto

#endif  // STRETTO_TOOLS_DOCTOR_H_
