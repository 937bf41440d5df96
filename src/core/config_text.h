// Words that reading, printing and describing a configuration share.
#ifndef STRETTO_SRC_CORE_CONFIG_TEXT_H_
#define STRETTO_SRC_CORE_CONFIG_TEXT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/config.h"

namespace stretto {

// "model" and "layers" to "model.layers".
std::string JoinPath(const std::string& path, const std::string& name);

// "at least 1", "0 to 1", "" for no bounds.
std::string RangeText(ConfigVisitor::Range range);

// A value as JSON. A double gets the shortest text that reads back as the same value, with a
// decimal point or an exponent; bytes of a string that are not UTF-8 are replaced by U+FFFD.
std::string JsonText(const char* value) = delete;  // would be taken for a bool
std::string JsonText(bool value);
std::string JsonText(int64_t value);
std::string JsonText(double value);
std::string JsonText(const std::string& value);
std::string JsonText(const std::vector<int64_t>& value);
std::string JsonText(const std::vector<std::string>& value);

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_CONFIG_TEXT_H_
