#include "stretto/core/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "src/core/config_text.h"
#include "src/core/duplicate_names.h"
#include "src/core/format.h"
#include "stretto/core/read_file.h"
#include "stretto/core/status.h"

namespace stretto {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 100;
constexpr int64_t kMaxFileBytes = int64_t{64} << 20;

std::string Dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// "the string \"12\"", shortened: what was found, for messages.
std::string Found(const Json& value) {
  std::string text = Dump(value);
  constexpr size_t kMost = 60;
  if (text.size() > kMost) text = text.substr(0, kMost) + "...";
  switch (value.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::boolean:
      return "the boolean " + text;
    case Json::value_t::string:
      return "the string " + text;
    case Json::value_t::array:
      return "the list " + text;
    case Json::value_t::object:
      return "the section " + text;
    default:
      return "the number " + text;
  }
}

std::string DidYouMean(const std::string& name) {
  return name.empty() ? "" : absl::StrCat("; did you mean \"", name, "\"?");
}

// True when brackets outside strings and comments nest deeper than kMaxDepth. Values are written
// and copied recursively, so this bounds the stack.
bool TooDeep(const std::string& text) {
  int depth = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') {
      for (++i; i < text.size() && text[i] != '"'; ++i) {
        if (text[i] == '\\') ++i;
      }
    } else if (c == '/' && i + 1 < text.size() && text[i + 1] == '/') {
      while (i < text.size() && text[i] != '\n' && text[i] != '\r') ++i;
    } else if (c == '/' && i + 1 < text.size() && text[i + 1] == '*') {
      const size_t end = text.find("*/", i + 2);
      if (end == std::string::npos) return false;  // the parser says what is wrong
      i = end + 1;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// Parses `text`; on failure returns the reason in `error`.
bool Parse(const std::string& text, bool comments, std::vector<std::string>* duplicates, Json* out,
           std::string* error) {
  if (TooDeep(text)) {
    *error = absl::StrCat("nests deeper than ", kMaxDepth, " levels");
    return false;
  }
  if (text.find('\0') != std::string::npos) {
    *error = "contains a NUL byte";  // the library would take it for the end
    return false;
  }
  try {
    // Shared, since the parser copies the callback.
    auto names = std::make_shared<DuplicateNames<Json>>(duplicates);
    *out = Json::parse(
        text,
        [names](int depth, Json::parse_event_t event, Json& parsed) {
          return (*names)(depth, event, parsed);
        },
        /*allow_exceptions=*/true, comments);
    return true;
  } catch (const std::exception& e) {
    *error = WithoutJsonTag(e.what());
    return false;
  }
}

// One --set.
struct Setting {
  std::string path;
  std::string text;
  bool used = false;
};

// Fills a config struct from JSON and settings, collecting errors.
class Reader : public ConfigVisitor {
 public:
  Reader(const Json* root, std::vector<Setting>* settings, std::vector<std::string>* errors)
      : settings_(settings), errors_(errors) {
    Level level;
    level.json = root;
    levels_.push_back(std::move(level));
  }

  void Field(const char* name, int64_t* value, const char* doc, Range range) override {
    Each(name, false, [&](const Json& json, const std::string& path) {
      int64_t v = 0;
      if (ToInteger(json, path, &v) && InRange(path, v, range)) *value = v;
    });
  }
  void Field(const char* name, double* value, const char* doc, Range range) override {
    Each(name, false, [&](const Json& json, const std::string& path) {
      if (!json.is_number()) return Expected(path, "a number", json);
      const double v = json.get<double>();
      if (!std::isfinite(v)) return Expected(path, "a finite number", json);
      if (InRange(path, v, range)) *value = v;
    });
  }
  void Field(const char* name, bool* value, const char* doc) override {
    Each(name, false, [&](const Json& json, const std::string& path) {
      if (!json.is_boolean()) return Expected(path, "true or false", json);
      *value = json.get<bool>();
    });
  }
  void Field(const char* name, std::string* value, const char* doc) override {
    Each(name, true, [&](const Json& json, const std::string& path) {
      if (!json.is_string()) return Expected(path, "a string", json);
      *value = json.get<std::string>();
    });
  }
  void Field(const char* name, std::vector<int64_t>* value, const char* doc) override {
    Each(name, false, [&](const Json& json, const std::string& path) {
      if (!json.is_array()) return Expected(path, "a list of integers", json);
      std::vector<int64_t> list;
      for (size_t i = 0; i < json.size(); ++i) {
        int64_t v = 0;
        if (ToInteger(json[i], absl::StrCat(path, "[", i, "]"), &v)) list.push_back(v);
      }
      *value = std::move(list);
    });
  }
  void Field(const char* name, std::vector<std::string>* value, const char* doc) override {
    Each(name, false, [&](const Json& json, const std::string& path) {
      if (!json.is_array()) return Expected(path, "a list of strings", json);
      std::vector<std::string> list;
      for (size_t i = 0; i < json.size(); ++i) {
        if (!json[i].is_string()) {
          Expected(absl::StrCat(path, "[", i, "]"), "a string", json[i]);
        } else {
          list.push_back(json[i].get<std::string>());
        }
      }
      *value = std::move(list);
    });
  }
  void Choice(const char* name, std::string* value, std::vector<std::string> choices,
              const char* doc) override {
    Each(name, true, [&](const Json& json, const std::string& path) {
      const std::string expected =
          absl::StrCat("one of \"", absl::StrJoin(choices, "\", \""), "\"");
      if (!json.is_string()) return Expected(path, expected, json);
      std::string v = json.get<std::string>();
      if (std::find(choices.begin(), choices.end(), v) == choices.end()) {
        errors_->push_back(absl::StrCat(path, ": expected ", expected, ", got ", Found(json),
                                        DidYouMean(NearestName(v, choices))));
        return;
      }
      *value = std::move(v);
    });
  }

  // Reports what no field has asked for; after the visit.
  void Finish() {
    CheckUnknown(levels_.back());
    for (const Unknown& u : unknown_) {
      errors_->push_back(
          absl::StrCat(u.path, ": is not a known name", DidYouMean(Suggest(u.path, u.nearest))));
    }
    for (const Setting& s : *settings_) {
      if (s.used) continue;
      if (std::find(sections_.begin(), sections_.end(), s.path) != sections_.end()) {
        errors_->push_back(absl::StrCat("--set ", s.path,
                                        ": is a section; set one of its fields, e.g. --set ",
                                        s.path, ".NAME=VALUE"));
      } else {
        errors_->push_back(absl::StrCat("--set ", s.path, ": is not a known name",
                                        DidYouMean(Suggest(s.path, NearestName(s.path, fields_)))));
      }
    }
  }

 protected:
  void BeginSection(const char* name, const char* doc) override {
    Level level;
    level.path = JoinPath(levels_.back().path, name);
    if (const Json* json = Take(name); json != nullptr) {
      if (json->is_object()) {
        level.json = json;
      } else {
        Expected(level.path, "a section (an object)", *json);
      }
    }
    sections_.push_back(level.path);
    levels_.push_back(std::move(level));
  }
  void EndSection() override {
    CheckUnknown(levels_.back());
    levels_.pop_back();
  }

 private:
  struct Level {
    std::string path;
    const Json* json = nullptr;  // null when the text does not have this section
    std::vector<std::string> names;
  };
  struct Unknown {
    std::string path;
    std::string nearest;  // path of the nearest name in the same section, or ""
  };

  // The value called `name` in the present section, or null.
  const Json* Take(const std::string& name) {
    Level& level = levels_.back();
    level.names.push_back(name);
    if (level.json == nullptr) return nullptr;
    const auto it = level.json->find(name);
    return it == level.json->end() ? nullptr : &*it;
  }

  // Calls read(json, where) for the value in the text and for the one of the last setting, if any.
  template <class Read>
  void Each(const std::string& name, bool text_field, const Read& read) {
    const std::string path = JoinPath(levels_.back().path, name);
    fields_.push_back(path);
    if (const Json* json = Take(name); json != nullptr) read(*json, path);
    const Setting* last = nullptr;
    for (Setting& s : *settings_) {
      if (s.path != path) continue;
      s.used = true;
      last = &s;
    }
    if (last == nullptr) return;
    const std::string where = "--set " + path;
    Json json;
    std::string error;
    std::vector<std::string> duplicates;
    const bool parsed = Parse(last->text, /*comments=*/false, &duplicates, &json, &error);
    if (text_field) {
      read(parsed && json.is_string() ? json : Json(last->text), where);
    } else {
      read(parsed ? json : Json(last->text), where);
    }
  }

  void Expected(const std::string& path, const std::string& what, const Json& got) {
    errors_->push_back(absl::StrCat(path, ": expected ", what, ", got ", Found(got)));
  }

  bool ToInteger(const Json& json, const std::string& path, int64_t* out) {
    if (json.is_number_integer()) {
      if (json.is_number_unsigned() &&
          json.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        Expected(path, "an integer of 64 bits", json);
        return false;
      }
      *out = json.get<int64_t>();
      return true;
    }
    if (json.is_number_float()) {
      const double v = json.get<double>();
      if (v == std::floor(v)) {
        if (v >= -0x1p63 && v < 0x1p63) {
          *out = static_cast<int64_t>(v);
          return true;
        }
        Expected(path, "an integer of 64 bits", json);
        return false;
      }
    }
    Expected(path, "an integer", json);
    return false;
  }

  template <class T>
  bool InRange(const std::string& path, T value, Range range) {
    const double v = static_cast<double>(value);
    if (v >= range.min && v <= range.max) return true;
    errors_->push_back(
        absl::StrCat(path, ": ", JsonText(value), " is out of range; give ", RangeText(range)));
    return false;
  }

  void CheckUnknown(const Level& level) {
    if (level.json == nullptr) return;
    for (const auto& [key, value] : level.json->items()) {
      if (std::find(level.names.begin(), level.names.end(), key) != level.names.end()) continue;
      const std::string near = NearestName(key, level.names);
      unknown_.push_back(
          {JoinPath(level.path, key), near.empty() ? "" : JoinPath(level.path, near)});
    }
  }

  // The nearest name of the same section, or else a field of that name in another one.
  std::string Suggest(const std::string& path, const std::string& nearest) const {
    if (!nearest.empty()) return nearest;
    const std::string leaf = path.substr(path.rfind('.') + 1);
    for (const std::string& field : fields_) {
      if (field.substr(field.rfind('.') + 1) == leaf) return field;
    }
    return "";
  }

  std::vector<Setting>* settings_;
  std::vector<std::string>* errors_;
  std::vector<Level> levels_;
  std::vector<Unknown> unknown_;
  std::vector<std::string> fields_;    // full paths
  std::vector<std::string> sections_;  // full paths
};

}  // namespace

absl::Status ParseConfig(const std::string& json, const std::string& source,
                         const std::vector<std::string>& sets, ConfigRef config) {
  std::vector<std::string> errors;
  Json root;
  std::string error;
  if (!Parse(json, /*comments=*/true, &errors, &root, &error)) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": is not valid JSON: ", error));
  }
  if (!root.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected an object { ... }, got ", Found(root)));
  }
  std::vector<Setting> settings;
  for (const std::string& set : sets) {
    const size_t equals = set.find('=');
    if (equals == std::string::npos || equals == 0) {
      errors.push_back(absl::StrCat("--set ", set, ": expected PATH=VALUE"));
      continue;
    }
    settings.push_back({set.substr(0, equals), set.substr(equals + 1)});
  }
  Reader reader(&root, &settings, &errors);
  config.Visit(reader);
  reader.Finish();
  if (errors.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      source, ": ", errors.size(),
      errors.size() == 1 ? " error in the configuration:\n  " : " errors in the configuration:\n  ",
      absl::StrJoin(errors, "\n  ")));
}

absl::Status LoadConfig(const std::string& path, const std::vector<std::string>& sets,
                        ConfigRef config) {
  STRETTO_ASSIGN_OR_RETURN(const std::string text,
                           ReadRegularFile("the configuration", path, kMaxFileBytes));
  return ParseConfig(text, path, sets, config);
}

std::string NearestName(const std::string& name, const std::vector<std::string>& candidates) {
  std::string nearest;
  // One more than the largest distance that counts as near.
  size_t best = 2 + name.size() / 3;
  for (const std::string& candidate : candidates) {
    const size_t longer = std::max(candidate.size(), name.size());
    if (longer - std::min(candidate.size(), name.size()) >= best) continue;
    // Levenshtein distance, one row of the table at a time.
    std::vector<size_t> row(candidate.size() + 1);
    for (size_t j = 0; j < row.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= name.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i;
      for (size_t j = 1; j < row.size(); ++j) {
        const size_t above = row[j];
        row[j] = std::min(
            {above + 1, row[j - 1] + 1, diagonal + (name[i - 1] == candidate[j - 1] ? 0 : 1)});
        diagonal = above;
      }
    }
    if (row.back() < best) {
      best = row.back();
      nearest = candidate;
    }
  }
  return nearest;
}

}  // namespace stretto
