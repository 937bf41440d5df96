#include "src/snapshot/json.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "src/core/format.h"

namespace stretto::snapshot_internal {
namespace {

constexpr int kMaxDepth = 128;

// The deepest nesting of brackets outside strings. Right for valid JSON; others the parser refuses.
int Depth(const std::string& text) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(const std::string& text, const std::string& source) {
  if (Depth(text) > kMaxDepth) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": JSON is nested deeper than ", kMaxDepth, " levels"));
  }
  // The parser takes a NUL byte for the end of its input and would ignore what follows.
  if (text.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": JSON contains a NUL byte"));
  }
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": not valid JSON: ", WithoutJsonTag(e.what())));
  }
}

absl::StatusOr<std::string> DumpJson(const nlohmann::json& value, int indent) {
  try {
    return value.dump(indent);
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot write JSON: ", WithoutJsonTag(e.what())));
  }
}

const nlohmann::json* Member(const nlohmann::json& object, const char* key,
                             nlohmann::json::value_t type) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  if (it == object.end() || it->type() != type) return nullptr;
  return &*it;
}

bool ReadCount(const nlohmann::json& value, int64_t* out) {
  if (!value.is_number_unsigned()) {
    // A value built by the program may hold a signed integer; the parser makes counts unsigned.
    if (!value.is_number_integer() || value.get<int64_t>() < 0) return false;
    *out = value.get<int64_t>();
    return true;
  }
  const uint64_t count = value.get<uint64_t>();
  if (count > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return false;
  *out = static_cast<int64_t>(count);
  return true;
}

}  // namespace stretto::snapshot_internal
