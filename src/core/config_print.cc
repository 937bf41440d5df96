// Printing and describing: the two uses of a config struct's description that only write.
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "src/core/config_text.h"
#include "stretto/core/config.h"

namespace stretto {
namespace {

// A bound: an integer is written as one.
std::string BoundText(double value) {
  if (value == std::floor(value) && std::fabs(value) < 1e15) return absl::StrFormat("%.0f", value);
  return JsonText(value);
}

class Printer : public ConfigVisitor {
 public:
  void Field(const char* name, int64_t* value, const char* doc, Range range) override {
    Line(name, JsonText(*value));
  }
  void Field(const char* name, double* value, const char* doc, Range range) override {
    Line(name, JsonText(*value));
  }
  void Field(const char* name, bool* value, const char* doc) override {
    Line(name, JsonText(*value));
  }
  void Field(const char* name, std::string* value, const char* doc) override {
    Line(name, JsonText(*value));
  }
  void Field(const char* name, std::vector<int64_t>* value, const char* doc) override {
    Line(name, JsonText(*value));
  }
  void Field(const char* name, std::vector<std::string>* value, const char* doc) override {
    Line(name, JsonText(*value));
  }
  void Choice(const char* name, std::string* value, std::vector<std::string> choices,
              const char* doc) override {
    Line(name, JsonText(*value));
  }

  std::string Finish() { return absl::StrCat("{", out_, first_ ? "" : "\n", "}\n"); }

 protected:
  void BeginSection(const char* name, const char* doc) override {
    Line(name, "{");
    ++depth_;
    first_ = true;
  }
  void EndSection() override {
    --depth_;
    if (!first_) absl::StrAppend(&out_, "\n", Indent());
    out_ += "}";
    first_ = false;
  }

 private:
  std::string Indent() const { return std::string(2 * depth_, ' '); }
  void Line(const char* name, const std::string& value) {
    absl::StrAppend(&out_, first_ ? "" : ",", "\n", Indent(), JsonText(std::string(name)), ": ",
                    value);
    first_ = false;
  }

  std::string out_;
  int depth_ = 1;
  bool first_ = true;  // the present object is still empty
};

class Describer : public ConfigVisitor {
 public:
  Describer() {
    tables_.emplace_back();
    open_.push_back(0);
  }

  void Field(const char* name, int64_t* value, const char* doc, Range range) override {
    Row(name, "integer", JsonText(*value), RangeText(range), doc);
  }
  void Field(const char* name, double* value, const char* doc, Range range) override {
    Row(name, "number", JsonText(*value), RangeText(range), doc);
  }
  void Field(const char* name, bool* value, const char* doc) override {
    Row(name, "boolean", JsonText(*value), "", doc);
  }
  void Field(const char* name, std::string* value, const char* doc) override {
    Row(name, "string", JsonText(*value), "", doc);
  }
  void Field(const char* name, std::vector<int64_t>* value, const char* doc) override {
    Row(name, "list of integers", JsonText(*value), "", doc);
  }
  void Field(const char* name, std::vector<std::string>* value, const char* doc) override {
    Row(name, "list of strings", JsonText(*value), "", doc);
  }
  void Choice(const char* name, std::string* value, std::vector<std::string> choices,
              const char* doc) override {
    std::vector<std::string> quoted;
    for (const std::string& choice : choices) quoted.push_back(absl::StrCat("`", choice, "`"));
    Row(name, "choice", JsonText(*value), absl::StrJoin(quoted, ", "), doc);
  }

  std::string Finish() const {
    std::string out;
    for (const Table& table : tables_) {
      if (table.path.empty() && table.rows.empty()) continue;
      if (!out.empty()) out += "\n";
      if (!table.path.empty()) {
        absl::StrAppend(&out, "## `", table.path, "`\n\n", table.doc,
                        table.doc.empty() ? "" : "\n\n");
      }
      if (table.rows.empty()) continue;
      absl::StrAppend(&out, "| name | type | default | range | meaning |\n",
                      "|---|---|---|---|---|\n", table.rows);
    }
    return out;
  }

 protected:
  void BeginSection(const char* name, const char* doc) override {
    Table table;
    table.path = JoinPath(tables_[open_.back()].path, name);
    table.doc = doc;
    open_.push_back(tables_.size());
    tables_.push_back(std::move(table));
  }
  void EndSection() override { open_.pop_back(); }

 private:
  struct Table {
    std::string path;
    std::string doc;
    std::string rows;
  };

  // A '|' would end the cell.
  static std::string Cell(const std::string& text) {
    std::string out;
    for (char c : text) {
      if (c == '|') out += '\\';
      out += c == '\n' ? ' ' : c;
    }
    return out;
  }

  void Row(const std::string& name, const std::string& type, const std::string& value,
           const std::string& range, const std::string& doc) {
    absl::StrAppend(&tables_[open_.back()].rows, "| `", Cell(name), "` | ", type, " | `",
                    Cell(value), "` | ", Cell(range), " | ", Cell(doc), " |\n");
  }

  std::vector<Table> tables_;
  std::vector<size_t> open_;  // places in tables_
};

}  // namespace

std::string JoinPath(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

std::string RangeText(ConfigVisitor::Range range) {
  const bool below = std::isfinite(range.min);
  const bool above = std::isfinite(range.max);
  if (below && above) return absl::StrCat(BoundText(range.min), " to ", BoundText(range.max));
  if (below) return absl::StrCat("at least ", BoundText(range.min));
  if (above) return absl::StrCat("at most ", BoundText(range.max));
  return "";
}

std::string JsonText(bool value) { return value ? "true" : "false"; }

std::string JsonText(int64_t value) { return absl::StrCat(value); }

std::string JsonText(double value) { return nlohmann::json(value).dump(); }

std::string JsonText(const std::string& value) {
  return nlohmann::json(value).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string JsonText(const std::vector<int64_t>& value) {
  return absl::StrCat("[", absl::StrJoin(value, ", "), "]");
}

std::string JsonText(const std::vector<std::string>& value) {
  std::vector<std::string> items;
  for (const std::string& item : value) items.push_back(JsonText(item));
  return absl::StrCat("[", absl::StrJoin(items, ", "), "]");
}

std::string PrintConfig(ConfigRef config) {
  Printer printer;
  config.Visit(printer);
  return printer.Finish();
}

std::string DescribeConfig(ConfigRef config) {
  Describer describer;
  config.Visit(describer);
  return describer.Finish();
}

}  // namespace stretto
