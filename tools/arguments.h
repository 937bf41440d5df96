// Command lines of the tools: `--name value` or `--name=value`, flags without value, and the rest.
#ifndef STRETTO_TOOLS_ARGUMENTS_H_
#define STRETTO_TOOLS_ARGUMENTS_H_

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/core/config.h"
#include "stretto/core/status.h"

namespace stretto {

// Bind each option to a variable that holds its default, then Parse:
//
//   Arguments arguments("stretto-x", "does x to FILE", "FILE...");
//   arguments.Add("steps", "N", "how many steps", &steps);
//   absl::Status status = arguments.Parse(argc, argv);
class Arguments {
 public:
  // `rest` shows the arguments that belong to no option in the help; "" allows none.
  Arguments(std::string program, std::string summary, std::string rest)
      : program_(std::move(program)), summary_(std::move(summary)), rest_help_(std::move(rest)) {}

  // `name` without dashes; `value` is how the help writes the option's value. A "FILE" has a name.
  void Add(const std::string& name, const std::string& value, const std::string& help,
           std::string* out) {
    const bool file = value == "FILE";
    AddOption(name, value, help, *out, file ? "the name of a file" : "a text",
              [out, file](const std::string& text) {
                *out = text;
                return !file || !text.empty();
              });
  }
  void Add(const std::string& name, const std::string& value, const std::string& help,
           int64_t* out) {
    AddOption(name, value, help, absl::StrCat(*out), "a whole number",
              [out](const std::string& text) { return ParseNumber(text, out); });
  }
  void Add(const std::string& name, const std::string& value, const std::string& help,
           double* out) {
    AddOption(name, value, help, absl::StrCat(*out), "a number", [out](const std::string& text) {
      return ParseNumber(text, out) && std::isfinite(*out);
    });
  }
  // May be given several times.
  void Add(const std::string& name, const std::string& value, const std::string& help,
           std::vector<std::string>* out) {
    AddOption(name, value, help, "", "a text", [out](const std::string& text) {
      out->push_back(text);
      return true;
    });
  }
  // One of a few words.
  void AddChoice(const std::string& name, const std::vector<std::string>& choices,
                 const std::string& help, std::string* out) {
    std::string all;
    for (const std::string& choice : choices) all += (all.empty() ? "" : "|") + choice;
    AddOption(name, all, help, *out, "one of " + all, [out, choices](const std::string& text) {
      for (const std::string& choice : choices) {
        if (text == choice) {
          *out = text;
          return true;
        }
      }
      return false;
    });
  }
  // A flag without a value.
  void AddFlag(const std::string& name, const std::string& help, bool* out) {
    AddOption(name, "", help, "", "", [out](const std::string&) { return *out = true; });
  }

  // One sentence about the first thing wrong. `--` ends the options; --help stops at once.
  absl::Status Parse(int argc, const char* const* argv) {
    bool options = true;
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      if (!options || word.size() < 2 || word[0] != '-') {
        if (rest_help_.empty()) return Error(absl::StrCat("does not expect '", word, "'"));
        rest_.push_back(word);
        continue;
      }
      if (word == "--") {
        options = false;
        continue;
      }
      if (word == "--help" || word == "-h") {
        help_ = true;
        return absl::OkStatus();
      }
      const size_t equals = word.find('=');
      const std::string name = word.substr(0, equals);
      const Option* option = Find(name);
      if (option == nullptr) return Error(Unknown(name));
      std::string value;
      if (option->value.empty()) {
        if (equals != std::string::npos) return Error(absl::StrCat(name, " takes no value"));
      } else if (equals != std::string::npos) {
        value = word.substr(equals + 1);
      } else if (i + 1 < argc) {
        value = argv[++i];
      } else {
        return Error(absl::StrCat(name, " needs a value, ", option->kind));
      }
      if (!option->set(value)) {
        return Error(absl::StrCat(name, " must be ", option->kind, ", not '", value, "'"));
      }
      given_.push_back(option->name);
    }
    return absl::OkStatus();
  }

  bool help() const { return help_; }
  // The first of these options (without dashes) that the command line has; "": none.
  std::string FirstGiven(const std::vector<std::string>& names) const {
    for (const std::string& name : names) {
      if (std::find(given_.begin(), given_.end(), name) != given_.end()) return name;
    }
    return "";
  }
  const std::vector<std::string>& rest() const { return rest_; }

  std::string Help() const {
    std::string text = absl::StrCat("usage: ", program_, " [options] ", rest_help_, "\n", summary_,
                                    "\n\noptions:\n");
    for (const Option& option : options_) {
      std::string left = absl::StrCat("  --", option.name);
      if (!option.value.empty()) absl::StrAppend(&left, " ", option.value);
      left.resize(std::max<size_t>(left.size() + 2, 32), ' ');
      absl::StrAppend(&text, left, option.help);
      if (!option.initial.empty()) absl::StrAppend(&text, " (default ", option.initial, ")");
      text += "\n";
    }
    return text + "  --help                        this text\n";
  }

 private:
  struct Option {
    std::string name, value, help, initial, kind;
    std::function<bool(const std::string&)> set;
  };

  template <class T>
  static bool ParseNumber(const std::string& text, T* out) {
    const char* end = text.data() + text.size();
    const auto [at, error] = std::from_chars(text.data(), end, *out);
    return error == std::errc() && at == end;
  }

  void AddOption(const std::string& name, const std::string& value, const std::string& help,
                 const std::string& initial, const std::string& kind,
                 std::function<bool(const std::string&)> set) {
    options_.push_back({name, value, help, initial, kind, std::move(set)});
  }
  const Option* Find(const std::string& name) const {
    for (const Option& option : options_) {
      if (name == "--" + option.name) return &option;
    }
    return nullptr;
  }
  std::string Unknown(const std::string& name) const {
    std::vector<std::string> names = {"--help"};
    for (const Option& option : options_) names.push_back("--" + option.name);
    const std::string nearest = NearestName(name, names);
    return absl::StrCat("does not know ", name,
                        nearest.empty() ? "; see --help" : "; did you mean " + nearest + "?");
  }
  absl::Status Error(const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat(program_, " ", what));
  }

  std::string program_, summary_, rest_help_;
  std::vector<Option> options_;
  std::vector<std::string> rest_, given_;
  bool help_ = false;
};

}  // namespace stretto

#endif  // STRETTO_TOOLS_ARGUMENTS_H_
