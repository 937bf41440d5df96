// Turns Hugging Face model directories into checkpoints that a run starts from, and checkpoints
// into directories that transformers loads.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "stretto/comm/world.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/read_file.h"
#include "stretto/core/state.h"
#include "stretto/model/huggingface.h"
#include "stretto/model/model.h"
#include "stretto/snapshot/checkpoint.h"
#include "stretto/snapshot/huggingface.h"
#include "stretto/snapshot/safetensors.h"
#include "tools/arguments.h"

namespace stretto {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// Parameters in host memory, as a registry sees them.
struct Weights {
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<Tensor> tensors;  // by parameter

  Tensor Add(const ParameterInfo& parameter, DType dtype) {
    memory.emplace_back(new std::byte[static_cast<size_t>(parameter.elements() * SizeOf(dtype))]);
    tensors.push_back(
        parameter.spec.shape.size() > 1
            ? Tensor::Of(memory.back().get(), dtype, {parameter.rows(), parameter.columns()})
            : Tensor::Of(memory.back().get(), dtype, {parameter.rows()}));
    return tensors.back();
  }
};

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) {
    return absl::UnavailableError(
        absl::StrCat("cannot write ", path, "; check that the directory is writable and not full"));
  }
  return absl::OkStatus();
}

// out[c][r] = in[r][c] for elements of `size` bytes, in square tiles.
void Transpose(std::byte* out, const std::byte* in, int64_t rows, int64_t columns, int64_t size) {
  constexpr int64_t kTile = 32;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
      for (int64_t r = r0; r < std::min(rows, r0 + kTile); ++r) {
        for (int64_t c = c0; c < std::min(columns, c0 + kTile); ++c) {
          std::copy_n(in + (r * columns + c) * size, size, out + (c * rows + r) * size);
        }
      }
    }
  }
}

// The shape of a piece as transformers stores it.
std::vector<int64_t> PieceShape(const ParameterInfo& parameter, const HfPiece& piece) {
  if (parameter.spec.shape.size() == 1) return {piece.rows};
  if (piece.transpose) return {parameter.columns(), piece.rows};
  return {piece.rows, parameter.columns()};
}

// --- from-hf ---

// Pieces of one parameter with the names they have in this directory.
absl::StatusOr<std::vector<HfPiece>> FindPieces(const HfWeights& files, const ModelConfig& config,
                                                const ParameterInfo& parameter) {
  std::vector<HfPiece> pieces = HfPieces(config, parameter.spec.name);
  for (HfPiece& piece : pieces) {
    const SafetensorsEntry* entry = files.Find(piece.hf_name);
    if (entry == nullptr) {
      entry = files.Find(HfBareName(piece.hf_name));
      if (entry == nullptr) {
        return absl::NotFoundError(absl::StrCat("no tensor \"", piece.hf_name, "\" in ",
                                                files.directory(),
                                                ", which its config.json asks for"));
      }
      piece.hf_name = entry->name;
    }
    const std::vector<int64_t> shape = PieceShape(parameter, piece);
    if (entry->shape != shape) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor \"", piece.hf_name, "\" in ", files.directory(), " has shape ",
          ShapeText(entry->shape), ", but its config.json makes it ", ShapeText(shape)));
    }
  }
  return pieces;
}

// The type that keeps all of the pieces' bits: bf16, f32 or f64.
absl::StatusOr<DType> StoredType(const HfWeights& files, const std::vector<HfPiece>& pieces) {
  DType widest = DType::kBF16;
  for (const HfPiece& piece : pieces) {
    const std::string& type = files.Find(piece.hf_name)->dtype;
    if (type == "BF16") continue;
    if (type != "F16" && type != "F32" && type != "F64") {
      return absl::UnimplementedError(absl::StrCat("tensor \"", piece.hf_name, "\" in ",
                                                   files.directory(), " has type ", type,
                                                   "; F64, F32, BF16 and F16 are supported"));
    }
    if (type == "F64") widest = DType::kF64;
    if (widest != DType::kF64) widest = DType::kF32;
  }
  return widest;
}

absl::Status ReadParameter(const HfWeights& files, const ParameterInfo& parameter,
                           const std::vector<HfPiece>& pieces, Tensor out) {
  std::vector<std::byte> turned;
  for (const HfPiece& piece : pieces) {
    const Tensor rows = out.Rows(piece.first_row, piece.rows);
    if (!piece.transpose) {
      STRETTO_RETURN_IF_ERROR(files.Read(piece.hf_name, out.dtype, rows.data));
      continue;
    }
    turned.resize(static_cast<size_t>(rows.bytes()));
    STRETTO_RETURN_IF_ERROR(files.Read(piece.hf_name, out.dtype, turned.data()));
    Transpose(rows.data, turned.data(), parameter.columns(), piece.rows, SizeOf(out.dtype));
  }
  return absl::OkStatus();
}

// A tensor without a place means that this is another model than its config.json says.
absl::Status RefuseUnused(const HfWeights& files, const ModelConfig& config,
                          const std::vector<std::string>& used) {
  for (const std::string& name : files.names()) {
    if (std::find(used.begin(), used.end(), name) != used.end()) continue;
    if (HfIgnores(config, name)) continue;
    return absl::UnimplementedError(absl::StrCat("tensor \"", name, "\" in ", files.directory(),
                                                 " has no place in a ", config.family,
                                                 " model; convert a plain causal language model"));
  }
  return absl::OkStatus();
}

// What a checkpoint remembers of where it came from, in the trainer's terms where they apply.
std::string TrainerStateFor(HfConfig config) {
  json state = {{"step", 0}, {"applied", 0}, {"skipped", 0}};
  state["config"]["model"] = json::parse(PrintConfig(ConfigRef(&config.model)));
  state["huggingface"] = {{"bos_token_id", config.bos_token}, {"eos_token_id", config.eos_tokens}};
  return state.dump();
}

absl::Status FromHf(const std::string& hf_directory, const std::string& output) {
  const std::string config_path = hf_directory + "/config.json";
  STRETTO_ASSIGN_OR_RETURN(const std::string text,
                           ReadRegularFile("the model's description", config_path));
  STRETTO_ASSIGN_OR_RETURN(HfConfig config, ModelConfigFromHf(text, config_path));
  STRETTO_ASSIGN_OR_RETURN(const Model model, BuildModel(config.model));
  STRETTO_ASSIGN_OR_RETURN(const HfWeights files, HfWeights::Open(hf_directory));

  const std::vector<ParameterInfo>& parameters = model.graph.parameters;
  std::vector<std::vector<HfPiece>> pieces;
  std::vector<std::string> used;
  for (const ParameterInfo& parameter : parameters) {
    STRETTO_ASSIGN_OR_RETURN(pieces.emplace_back(), FindPieces(files, config.model, parameter));
    for (const HfPiece& piece : pieces.back()) used.push_back(piece.hf_name);
  }
  STRETTO_RETURN_IF_ERROR(RefuseUnused(files, config.model, used));

  Weights weights;
  StateRegistry registry;
  for (size_t p = 0; p < parameters.size(); ++p) {
    STRETTO_ASSIGN_OR_RETURN(const DType dtype, StoredType(files, pieces[p]));
    const Tensor value = weights.Add(parameters[p], dtype);
    STRETTO_RETURN_IF_ERROR(ReadParameter(files, parameters[p], pieces[p], value));
    STRETTO_RETURN_IF_ERROR(registry.Add({.name = parameters[p].spec.name,
                                          .dtype = dtype,
                                          .global_shape = parameters[p].spec.shape,
                                          .local = value}));
  }
  STRETTO_RETURN_IF_ERROR(World::RunThreads(1, [&](World& world) -> absl::Status {
    CheckpointWriter writer(world, {.directory = output, .keep = 0, .async = false});
    STRETTO_RETURN_IF_ERROR(writer.Save(0, registry, TrainerStateFor(config)));
    return writer.Finish();
  }));
  nlohmann::ordered_json start;
  start["model"] = nlohmann::ordered_json::parse(PrintConfig(ConfigRef(&config.model)));
  start["checkpoint"]["initial"] = fs::absolute(output).lexically_normal().string();
  STRETTO_RETURN_IF_ERROR(WriteText(output + "/model.json", start.dump(2) + "\n"));
  std::printf("%s: %zu parameters with %lld elements in %s; start from %s/model.json\n",
              config.model.family.c_str(), parameters.size(),
              static_cast<long long>(model.graph.ParameterElements()), output.c_str(),
              output.c_str());
  return absl::OkStatus();
}

// --- to-hf ---

// What the checkpoint's trainer state says of the model.
struct Source {
  CheckpointInfo checkpoint;
  HfConfig config;
  bool masters = false;  // f32 copies of bf16 parameters are stored, too
};

absl::StatusOr<Source> ReadSource(const std::string& path) {
  Source source;
  std::error_code ignored;
  if (fs::exists(path + "/stretto.json", ignored)) {
    STRETTO_ASSIGN_OR_RETURN(source.checkpoint, ReadCheckpointInfo(path));
  } else {
    STRETTO_ASSIGN_OR_RETURN(source.checkpoint, FindNewestCheckpoint(path));
  }
  const json state = json::parse(source.checkpoint.trainer_state, nullptr, false);
  const auto member = [](const json& object, const char* key) -> const json& {
    static const json kNothing;
    const auto it = object.find(key);
    return object.is_object() && it != object.end() ? *it : kNothing;
  };
  const json &config = member(state, "config"), &model = member(config, "model");
  if (!model.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat("checkpoint ", source.checkpoint.path,
                                                   " does not say what model it holds (no "
                                                   "config.model in its trainer state)"));
  }
  STRETTO_RETURN_IF_ERROR(
      ParseConfig(model.dump(), source.checkpoint.path, {}, ConfigRef(&source.config.model)));
  STRETTO_RETURN_IF_ERROR(source.config.model.Resolve());

  const json& runtime_type = member(member(config, "runtime"), "dtype");
  if (runtime_type.is_string()) {
    source.config.dtype = runtime_type == "bf16" ? DType::kBF16 : DType::kF32;
    source.masters =
        runtime_type == "bf16" && member(member(config, "optimizer"), "masters") != false;
  }
  const json& hf = member(state, "huggingface");
  const json &bos = member(hf, "bos_token_id"), &eos = member(hf, "eos_token_id");
  if (bos.is_number_integer()) source.config.bos_token = bos.get<int64_t>();
  if (eos.is_array()) {
    for (const json& id : eos) {
      if (id.is_number_integer()) source.config.eos_tokens.push_back(id.get<int64_t>());
    }
  } else if (member(member(config, "data"), "tokenizer") == "bytes") {
    source.config.eos_tokens = {256};
  }
  return source;
}

// bf16 when all parameters are stored so.
absl::StatusOr<DType> StoredType(const CheckpointInfo& info) {
  DType widest = DType::kBF16;
  std::error_code error;
  for (const auto& file : fs::directory_iterator(info.path, error)) {
    if (file.path().extension() != ".safetensors") continue;
    STRETTO_ASSIGN_OR_RETURN(const SafetensorsFile shard,
                             SafetensorsFile::Open(file.path().string()));
    for (const SafetensorsEntry& entry : shard.entries()) {
      if (entry.name.rfind("optim.", 0) != 0 && entry.dtype != "BF16") widest = DType::kF32;
    }
  }
  return widest;
}

absl::Status ToHf(const std::string& checkpoint, const std::string& output,
                  const std::string& dtype_name, int64_t eos) {
  STRETTO_ASSIGN_OR_RETURN(Source source, ReadSource(checkpoint));
  HfConfig& config = source.config;
  if (eos >= 0) config.eos_tokens = {eos};
  for (const int64_t token : config.eos_tokens) {
    if (token >= config.model.vocabulary) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", token, " cannot end a text: the vocabulary of ",
                       source.checkpoint.path, " has ", config.model.vocabulary, " tokens"));
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const Model model, BuildModel(config.model));
  const std::vector<ParameterInfo>& parameters = model.graph.parameters;
  if (dtype_name == "stored") {
    if (!config.dtype) {
      STRETTO_ASSIGN_OR_RETURN(config.dtype, StoredType(source.checkpoint));
    }
  } else {
    config.dtype = dtype_name == "bf16" ? DType::kBF16 : DType::kF32;
  }
  STRETTO_ASSIGN_OR_RETURN(const std::string config_json, HfConfigJson(config));

  // Masters are what bf16 parameters were rounded from.
  const bool masters = source.masters && config.dtype == DType::kF32;
  Weights weights;
  StateRegistry registry;
  for (const ParameterInfo& parameter : parameters) {
    const Tensor value = weights.Add(parameter, *config.dtype);
    STRETTO_RETURN_IF_ERROR(
        registry.Add({.name = absl::StrCat(masters ? "optim.master." : "", parameter.spec.name),
                      .dtype = value.dtype,
                      .global_shape = parameter.spec.shape,
                      .local = value}));
  }
  STRETTO_RETURN_IF_ERROR(LoadCheckpoint(source.checkpoint, registry, {.allow_unused = masters}));

  std::vector<SafetensorsItem> items;
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Tensor& value = weights.tensors[p];
    for (const HfPiece& piece : HfPieces(config.model, parameters[p].spec.name)) {
      const Tensor rows = value.Rows(piece.first_row, piece.rows);
      const void* data = rows.data;
      if (piece.transpose) {
        weights.memory.emplace_back(new std::byte[static_cast<size_t>(rows.bytes())]);
        Transpose(weights.memory.back().get(), rows.data, piece.rows, parameters[p].columns(),
                  SizeOf(rows.dtype));
        data = weights.memory.back().get();
      }
      items.push_back({piece.hf_name, rows.dtype, PieceShape(parameters[p], piece), data});
    }
  }
  STRETTO_RETURN_IF_ERROR(WriteHfWeights(output, items));
  STRETTO_RETURN_IF_ERROR(WriteText(output + "/config.json", config_json));
  STRETTO_RETURN_IF_ERROR(
      WriteText(output + "/generation_config.json", HfGenerationConfigJson(config)));
  std::printf("%s of step %lld as %zu %s tensors in %s\n", config.model.family.c_str(),
              static_cast<long long>(source.checkpoint.step), items.size(), Name(*config.dtype),
              output.c_str());
  return absl::OkStatus();
}

absl::Status Main(int argc, char** argv) {
  std::string dtype = "stored";
  int64_t eos = -1;
  Arguments arguments(
      "stretto-convert",
      "from-hf writes OUT_DIR/step-00000000, a checkpoint of the weights alone, and\n"
      "OUT_DIR/model.json, a configuration to start a run from. to-hf writes the weights of a\n"
      "checkpoint, or of the newest in a directory of them, for transformers; tokenizer files are\n"
      "left to you.",
      "from-hf HF_DIR OUT_DIR | to-hf CHECKPOINT_DIR HF_DIR");
  arguments.AddChoice("dtype", {"stored", "f32", "bf16"}, "to-hf: type of the weights", &dtype);
  arguments.Add("eos", "ID", "to-hf: token that ends a text; -1: as the checkpoint says", &eos);
  STRETTO_RETURN_IF_ERROR(arguments.Parse(argc, argv));
  if (arguments.help()) return PrintText(arguments.Help());
  const std::vector<std::string>& rest = arguments.rest();
  if (rest.size() == 3 && rest[0] == "from-hf") return FromHf(rest[1], rest[2]);
  if (rest.size() == 3 && rest[0] == "to-hf") return ToHf(rest[1], rest[2], dtype, eos);
  return absl::InvalidArgumentError(
      "stretto-convert needs from-hf HF_DIR OUT_DIR or to-hf CHECKPOINT_DIR HF_DIR; see --help");
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) { return stretto::EndProgram(stretto::Main(argc, argv)); }
