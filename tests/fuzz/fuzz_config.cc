// Any bytes as a configuration and as a --set option: parsed and printed back to the same values,
// or refused.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "stretto/core/config.h"

namespace {

// One field of each kind, and a section.
struct Everything {
  int64_t whole = 3;
  double real = 0.5;
  bool flag = true;
  std::string text = "a";
  std::string choice = "x";
  std::vector<int64_t> numbers;
  std::vector<std::string> words;
  struct Inner {
    int64_t depth = 1;
    void Visit(stretto::ConfigVisitor& v) {
      v.Field("depth", &depth, "how deep", {.min = 0, .max = 9});
    }
  } inner;
  void Visit(stretto::ConfigVisitor& v) {
    v.Field("whole", &whole, "a whole number");
    v.Field("real", &real, "a number");
    v.Field("flag", &flag, "true or false");
    v.Field("text", &text, "a text");
    v.Choice("choice", &choice, {"x", "y"}, "one of two");
    v.Field("numbers", &numbers, "whole numbers");
    v.Field("words", &words, "texts");
    v.Section("inner", &inner, "a section");
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string all(reinterpret_cast<const char*>(data), size);
  // The last line is an override, when it looks like one.
  const size_t line = all.rfind('\n');
  std::vector<std::string> sets;
  if (line != std::string::npos && all.find('=', line) != std::string::npos) {
    sets.push_back(all.substr(line + 1));
  }
  Everything parsed;
  const absl::Status status = stretto::ParseConfig(all.substr(0, sets.empty() ? size : line),
                                                   "fuzz", sets, stretto::ConfigRef(&parsed));
  if (!status.ok()) {
    if (status.message().empty()) std::abort();
    return 0;
  }
  const std::string printed = stretto::PrintConfig(stretto::ConfigRef(&parsed));
  Everything again;
  if (!stretto::ParseConfig(printed, "printed", {}, stretto::ConfigRef(&again)).ok()) std::abort();
  if (stretto::PrintConfig(stretto::ConfigRef(&again)) != printed) std::abort();
  return 0;
}
