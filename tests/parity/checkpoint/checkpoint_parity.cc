// The C++ side of read_with_torch.py:
//   checkpoint_parity write <dir>              <dir>/checkpoint by three ranks,
//   <dir>/sample.safetensors checkpoint_parity copy <in> <out>          reads a safetensors file
//   and writes it again checkpoint_parity copy-hf <in> <out> <max> the same with a Hugging Face
//   directory checkpoint_parity check <dir>              for each file in <dir>: its name, a tab,
//   "ok" or why not
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "stretto/snapshot/checkpoint.h"
#include "stretto/snapshot/huggingface.h"
#include "stretto/snapshot/safetensors.h"
#include "unit/snapshot/model_state.h"

namespace stretto {
namespace {

absl::Status WriteSamples(const std::string& directory) {
  STRETTO_RETURN_IF_ERROR(World::RunThreads(3, [&](World& world) -> absl::Status {
    ModelState state(OddModel(), world.rank(), world.size());
    state.Fill(7);
    CheckpointWriter writer(world, {.directory = directory + "/checkpoint"});
    STRETTO_RETURN_IF_ERROR(writer.Save(7, state.registry(), R"({"tokens": 123})"));
    return writer.Finish();
  }));
  ModelState whole(OddModel(), 0, 1);
  whole.Fill(7);
  std::vector<SafetensorsItem> items;
  for (const StateEntry& entry : whole.registry().entries()) {
    items.push_back({entry.name, entry.dtype, entry.global_shape, entry.local.data});
  }
  return WriteSafetensors(directory + "/sample.safetensors", items, {{"format", "pt"}});
}

absl::Status Copy(const std::string& in, const std::string& out) {
  STRETTO_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(in));
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<SafetensorsItem> items;
  for (const SafetensorsEntry& entry : file.entries()) {
    STRETTO_ASSIGN_OR_RETURN(const DType dtype, FromSafetensorsType(entry.dtype));
    memory.push_back(std::make_unique<char[]>(entry.end - entry.begin + 1));
    STRETTO_RETURN_IF_ERROR(file.Read(entry, 0, entry.end - entry.begin, memory.back().get()));
    // In the opposite order: the writer must restore it.
    items.insert(items.begin(), {entry.name, dtype, entry.shape, memory.back().get()});
  }
  return WriteSafetensors(out, items, file.metadata());
}

absl::Status CopyHf(const std::string& in, const std::string& out, int64_t max_bytes) {
  STRETTO_ASSIGN_OR_RETURN(const HfWeights weights, HfWeights::Open(in));
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<SafetensorsItem> items;
  for (const std::string& name : weights.names()) {
    const SafetensorsEntry& entry = *weights.Find(name);
    STRETTO_ASSIGN_OR_RETURN(const DType dtype, FromSafetensorsType(entry.dtype));
    memory.push_back(std::make_unique<char[]>(entry.end - entry.begin + 1));
    STRETTO_RETURN_IF_ERROR(weights.Read(name, dtype, memory.back().get()));
    items.push_back({name, dtype, entry.shape, memory.back().get()});
  }
  return WriteHfWeights(out, items, max_bytes);
}

absl::Status Check(const std::string& directory) {
  for (const auto& file : std::filesystem::directory_iterator(directory)) {
    const absl::Status status = SafetensorsFile::Open(file.path().string()).status();
    std::string verdict = status.ok() ? "ok" : std::string(status.message());
    for (char& c : verdict) {
      if (c == '\n' || c == '\t') c = ' ';
    }
    std::printf("%s\t%s\n", file.path().filename().c_str(), verdict.c_str());
  }
  return absl::OkStatus();
}

absl::Status Main(const std::vector<std::string>& args) {
  if (args.size() == 2 && args[0] == "write") return WriteSamples(args[1]);
  if (args.size() == 3 && args[0] == "copy") return Copy(args[1], args[2]);
  if (args.size() == 4 && args[0] == "copy-hf") {
    return CopyHf(args[1], args[2], std::atoll(args[3].c_str()));
  }
  if (args.size() == 2 && args[0] == "check") return Check(args[1]);
  return absl::InvalidArgumentError("see the top of checkpoint_parity.cc for its arguments");
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  const absl::Status status = stretto::Main(std::vector<std::string>(argv + 1, argv + argc));
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
