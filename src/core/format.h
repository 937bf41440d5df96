// Text for reports and messages.
#ifndef STRETTO_SRC_CORE_FORMAT_H_
#define STRETTO_SRC_CORE_FORMAT_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/str_format.h"

namespace stretto {

// Bytes in binary units with three digits or so: "512 B", "1.50 KiB", "79.3 GiB".
inline std::string HumanBytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes > -1024 && bytes < 1024) return absl::StrFormat("%d B", bytes);
  double value = static_cast<double>(bytes);
  int unit = 0;
  while ((value >= 1024 || value <= -1024) && unit < 6) {
    value /= 1024;
    ++unit;
  }
  const double size = value < 0 ? -value : value;
  return absl::StrFormat("%.*f %s", size < 10 ? 2 : (size < 100 ? 1 : 0), value, kUnits[unit]);
}

// nlohmann's messages start with "[json.exception.parse_error.101] ".
inline std::string WithoutJsonTag(const std::string& what) {
  const size_t end = what.find("] ");
  return what.rfind("[json.exception.", 0) == 0 && end != std::string::npos ? what.substr(end + 2)
                                                                            : what;
}

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_FORMAT_H_
