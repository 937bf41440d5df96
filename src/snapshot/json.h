// JSON without exceptions.
#ifndef STRETTO_SRC_SNAPSHOT_JSON_H_
#define STRETTO_SRC_SNAPSHOT_JSON_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "stretto/core/status.h"

namespace stretto::snapshot_internal {

// INVALID_ARGUMENT names `source` and the place. Nesting beyond 128 levels is refused, since
// writing such a value again would recurse as deeply.
absl::StatusOr<nlohmann::json> ParseJson(const std::string& text, const std::string& source);

// INVALID_ARGUMENT for a string that is not UTF-8. `indent` < 0: one line.
absl::StatusOr<std::string> DumpJson(const nlohmann::json& value, int indent = -1);

// A member of an object, of the type asked for: null when it is absent or of another type.
const nlohmann::json* Member(const nlohmann::json& object, const char* key,
                             nlohmann::json::value_t type);
// A non-negative integer member that fits int64_t.
bool ReadCount(const nlohmann::json& value, int64_t* out);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_JSON_H_
