// Text for reports of the core layer.
#ifndef STRETTO_SRC_CORE_FORMAT_H_
#define STRETTO_SRC_CORE_FORMAT_H_

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

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_FORMAT_H_
