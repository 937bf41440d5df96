// Prints the reference of the training configuration as Markdown: stretto-config > docs/config.md.
#include <string>

#include "stretto/core/config.h"
#include "stretto/core/exit_code.h"
#include "stretto/train/config.h"

namespace {

constexpr char kHeading[] =
    "# Configuration\n"
    "\n"
    "A run is configured by a JSON file, in which `//` and `/* */` comments are allowed, and by "
    "any\n"
    "number of `--set section.field=value` on the command line, which win over the file. A field "
    "that\n"
    "neither names keeps its default. This page is generated from the source by `stretto-config`.\n"
    "\n";

}  // namespace

int main() {
  stretto::TrainConfig config;
  const std::string text = kHeading + stretto::DescribeConfig(stretto::ConfigRef(&config));
  return stretto::EndProgram(stretto::PrintText(text));
}
