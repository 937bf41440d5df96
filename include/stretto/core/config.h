// Configuration structs that describe themselves once: the same description parses JSON, checks it,
// prints the resolved values and generates the reference in docs/config.md.
#ifndef STRETTO_CORE_CONFIG_H_
#define STRETTO_CORE_CONFIG_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// What a config struct calls for each of its fields. A config struct is any type with
//   void Visit(ConfigVisitor& v) { v.Field("layers", &layers, "transformer blocks", {.min = 1});
//   ... }
// or nested sections:  v.Section("model", &model, "the network");
class ConfigVisitor {
 public:
  struct Range {
    double min = -std::numeric_limits<double>::infinity();
    double max = std::numeric_limits<double>::infinity();
  };
  virtual ~ConfigVisitor() = default;

  // `doc` is one phrase with the unit. Values outside `range` are refused.
  virtual void Field(const char* name, int64_t* value, const char* doc, Range range) = 0;
  virtual void Field(const char* name, double* value, const char* doc, Range range) = 0;
  virtual void Field(const char* name, bool* value, const char* doc) = 0;
  virtual void Field(const char* name, std::string* value, const char* doc) = 0;
  virtual void Field(const char* name, std::vector<int64_t>* value, const char* doc) = 0;
  virtual void Field(const char* name, std::vector<std::string>* value, const char* doc) = 0;
  // A string that must be one of `choices`.
  virtual void Choice(const char* name, std::string* value, std::vector<std::string> choices,
                      const char* doc) = 0;
  void Field(const char* name, int64_t* value, const char* doc) {
    Field(name, value, doc, Range());
  }
  void Field(const char* name, double* value, const char* doc) { Field(name, value, doc, Range()); }

  template <class T>
  void Section(const char* name, T* section, const char* doc) {
    BeginSection(name, doc);
    section->Visit(*this);
    EndSection();
  }

 protected:
  virtual void BeginSection(const char* name, const char* doc) = 0;
  virtual void EndSection() = 0;
};

// Any config struct, seen through its Visit.
class ConfigRef {
 public:
  template <class T>
  explicit ConfigRef(T* config)
      : object_(config), visit_([](void* c, ConfigVisitor& v) { static_cast<T*>(c)->Visit(v); }) {}
  void Visit(ConfigVisitor& v) const { visit_(object_, v); }

 private:
  void* object_;
  void (*visit_)(void*, ConfigVisitor&);
};

// Parses JSON with // and /* */ comments into `config`, then applies `sets` ("a.b=value"; the value
// is JSON, or a bare string for string fields). Fields not named keep their defaults. All errors
// are reported at once, one a line, each with the path of the field, what is wrong and, for an
// unknown name, the nearest known one. `source` names the text in messages. On error `config` is
// unspecified.
absl::Status ParseConfig(const std::string& json, const std::string& source,
                         const std::vector<std::string>& sets, ConfigRef config);
// The same, from a file. NOT_FOUND names the path.
absl::Status LoadConfig(const std::string& path, const std::vector<std::string>& sets,
                        ConfigRef config);

// The resolved configuration as indented JSON; parses back to the same values.
std::string PrintConfig(ConfigRef config);
// A Markdown reference: one table a section with name, type, default, range and meaning.
std::string DescribeConfig(ConfigRef config);

// The candidate closest to `name` by edit distance, or "" when none is near (distance <= 1 +
// size/3).
std::string NearestName(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace stretto

#endif  // STRETTO_CORE_CONFIG_H_
