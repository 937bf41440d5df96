#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "src/train/trainer_impl.h"

namespace stretto {

std::string ToJson(const TrainerState& state) {
  nlohmann::json j;
  j["step"] = state.step;
  j["applied"] = state.applied;
  j["skipped"] = state.skipped;
  nlohmann::json config = nlohmann::json::parse(state.config, nullptr, false);
  if (!config.is_discarded()) j["config"] = std::move(config);
  if (!state.output.empty()) j["output"] = state.output;
  if (!state.choices.empty()) j["choices"] = state.choices;
  if (!state.tokens.empty()) j["tokens"] = state.tokens;
  if (!state.documents.empty()) j["documents"] = state.documents;
  if (!state.costs.empty()) {
    // As it is written to files: members in the same order.
    j["costs"] = {{"file", state.costs_file}, {"model", state.costs}};
  }
  if (state.record) {
    // What is not finite becomes null.
    j["record"] = {{"loss", state.record->loss},
                   {"grad_norm", state.record->grad_norm},
                   {"lr", state.record->lr},
                   {"tokens", state.record->tokens},
                   {"skipped", state.record->skipped}};
  }
  return j.dump();
}

namespace {

std::optional<StepStats> ParseRecord(const nlohmann::json& j, const TrainerState& state) {
  const auto number = [&j](const char* key) {
    const auto it = j.find(key);
    return it != j.end() && it->is_number() ? it->get<double>()
                                            : std::numeric_limits<double>::quiet_NaN();
  };
  const auto tokens = j.find("tokens"), skipped = j.find("skipped");
  if (tokens == j.end() || !tokens->is_number_integer() || skipped == j.end() ||
      !skipped->is_boolean()) {
    return std::nullopt;
  }
  StepStats stats;
  stats.step = state.step;
  stats.loss = number("loss");
  stats.grad_norm = number("grad_norm");
  stats.lr = number("lr");
  stats.tokens = tokens->get<int64_t>();
  stats.skipped = skipped->get<bool>();
  stats.skipped_total = state.skipped;
  for (double* const unknown :
       {&stats.tokens_per_second, &stats.step_ms, &stats.data_ms, &stats.forward_ms,
        &stats.backward_ms, &stats.update_ms, &stats.exposed_data_ms, &stats.exposed_tensor_ms,
        &stats.exposed_context_ms, &stats.exposed_pipeline_ms, &stats.exposed_world_ms,
        &stats.comm_exposed_ms, &stats.exposed_snapshot_ms}) {
    *unknown = std::numeric_limits<double>::quiet_NaN();
  }
  return stats;
}

}  // namespace

absl::StatusOr<TrainerState> ParseTrainerState(const std::string& json, const std::string& source) {
  const nlohmann::json j = nlohmann::json::parse(json, nullptr, false);
  TrainerState state;
  const auto read = [&](const char* key, auto* out) -> absl::Status {
    const auto it = j.find(key);
    if (it == j.end() || !it->is_number_integer()) {
      return absl::DataLossError(
          absl::StrCat(source, ": its trainer state has no whole number '", key,
                       "'; the checkpoint was not written by a trainer of this version"));
    }
    *out = it->get<std::remove_pointer_t<decltype(out)>>();
    return absl::OkStatus();
  };
  if (!j.is_object()) {
    return absl::DataLossError(absl::StrCat(source, ": its trainer state is no JSON object"));
  }
  STRETTO_RETURN_IF_ERROR(read("step", &state.step));
  STRETTO_RETURN_IF_ERROR(read("applied", &state.applied));
  STRETTO_RETURN_IF_ERROR(read("skipped", &state.skipped));
  const auto config = j.find("config");
  if (config == j.end() || !config->is_object()) {
    return absl::DataLossError(absl::StrCat(
        source,
        ": its trainer state does not hold the run's configuration; the checkpoint was "
        "not written by a trainer of this version"));
  }
  state.config = config->dump();
  if (const auto choices = j.find("choices"); choices != j.end() && choices->is_string()) {
    state.choices = choices->get<std::string>();
  }
  const auto text = [](const nlohmann::json& object, const char* key) {
    const auto found = object.find(key);
    return found != object.end() && found->is_string() ? found->get<std::string>() : "";
  };
  state.tokens = text(j, "tokens");
  state.documents = text(j, "documents");
  if (const auto costs = j.find("costs"); costs != j.end() && costs->is_object()) {
    state.costs = text(*costs, "model");
    state.costs_file = text(*costs, "file");
  }
  if (const auto output = j.find("output"); output != j.end() && output->is_string()) {
    state.output = output->get<std::string>();
  }
  if (const auto record = j.find("record"); record != j.end() && record->is_object()) {
    state.record = ParseRecord(*record, state);
  }
  return state;
}

namespace {

// The settings of a run whose checkpoint is `source`, and of this run.
class Settings {
 public:
  Settings(const std::string& saved, const std::string& current, std::string source)
      : before_(nlohmann::json::parse(saved, nullptr, false)),
        now_(nlohmann::json::parse(current, nullptr, false, true)),
        source_(std::move(source)) {}

  // Whether `path`, e.g. "/model/hidden", is the same in both, or absent in one.
  absl::Status Same(const std::string& path) const {
    const nlohmann::json::json_pointer pointer(path);
    if (!before_.contains(pointer) || !now_.contains(pointer)) return absl::OkStatus();
    const nlohmann::json &a = before_.at(pointer), &b = now_.at(pointer);
    if (a == b) return absl::OkStatus();
    std::string name = path.substr(1);
    std::replace(name.begin(), name.end(), '/', '.');
    return absl::FailedPreconditionError(
        absl::StrCat(source_, " was written with ", name, " = ", a.dump(), ", not ", b.dump(),
                     "; set it back, or choose another output for a new run"));
  }

 private:
  nlohmann::json before_, now_;
  std::string source_;
};

absl::Status SameModel(const Settings& settings) {
  for (const char* field :
       {"family", "vocabulary", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn",
        "tie_embeddings", "norm_eps", "rope_theta", "rope_scaling_factor", "rope_low_freq_factor",
        "rope_high_freq_factor", "rope_original_positions"}) {
    STRETTO_RETURN_IF_ERROR(settings.Same(std::string("/model/") + field));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SameModel(const std::string& saved, const std::string& current,
                       const std::string& source) {
  return SameModel(Settings(saved, current, source));
}

absl::Status SameRun(const std::string& saved, const std::string& current,
                     const std::string& source) {
  const Settings settings(saved, current, source);
  STRETTO_RETURN_IF_ERROR(SameModel(settings));
  for (const char* path :
       {"/seed", "/batch/global", "/batch/tokens", "/data/sequence_length", "/data/documents",
        "/data/document_attention", "/data/shuffle", "/runtime/dtype", "/runtime/fp8",
        "/optimizer/moments", "/optimizer/masters"}) {
    STRETTO_RETURN_IF_ERROR(settings.Same(path));
  }
  return absl::OkStatus();
}

}  // namespace stretto
