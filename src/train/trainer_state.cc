#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "src/train/trainer_impl.h"

namespace stretto {

std::string ToJson(const TrainerState& state) {
  nlohmann::json j;
  j["step"] = state.step;
  j["applied"] = state.applied;
  j["skipped"] = state.skipped;
  j["seed"] = state.seed;
  j["global_batch"] = state.global_batch;
  j["sequence_length"] = state.sequence_length;
  nlohmann::json config = nlohmann::json::parse(state.config, nullptr, false);
  if (!config.is_discarded()) j["config"] = std::move(config);
  if (!state.choices.empty()) j["choices"] = state.choices;
  return j.dump();
}

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
  STRETTO_RETURN_IF_ERROR(read("seed", &state.seed));
  STRETTO_RETURN_IF_ERROR(read("global_batch", &state.global_batch));
  STRETTO_RETURN_IF_ERROR(read("sequence_length", &state.sequence_length));
  if (const auto config = j.find("config"); config != j.end()) state.config = config->dump();
  if (const auto choices = j.find("choices"); choices != j.end() && choices->is_string()) {
    state.choices = choices->get<std::string>();
  }
  return state;
}

absl::Status SameRun(const std::string& saved, const std::string& current, bool order,
                     const std::string& source) {
  const nlohmann::json before = nlohmann::json::parse(saved, nullptr, false);
  const nlohmann::json now = nlohmann::json::parse(current, nullptr, false, true);
  const auto differs = [&](const char* section, const char* field) -> absl::Status {
    if (!before.is_object() || !now.is_object()) return absl::OkStatus();
    const auto old_section = before.find(section), new_section = now.find(section);
    if (old_section == before.end() || new_section == now.end()) return absl::OkStatus();
    if (!old_section->is_object() || !new_section->is_object()) return absl::OkStatus();
    const auto a = old_section->find(field), b = new_section->find(field);
    if (a == old_section->end() || b == new_section->end() || *a == *b) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat(source, " was written with ", section, ".", field, " = ", a->dump(), ", not ",
                     b->dump(), "; set it back, or choose another output for a new run"));
  };
  for (const char* field :
       {"family", "vocabulary", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn",
        "tie_embeddings", "norm_eps", "rope_theta", "rope_scaling_factor", "rope_low_freq_factor",
        "rope_high_freq_factor", "rope_original_positions"}) {
    STRETTO_RETURN_IF_ERROR(differs("model", field));
  }
  if (!order) return absl::OkStatus();
  STRETTO_RETURN_IF_ERROR(differs("runtime", "dtype"));
  for (const char* field : {"sequence_length", "shuffle"}) {
    STRETTO_RETURN_IF_ERROR(differs("data", field));
  }
  return differs("batch", "global");
}

}  // namespace stretto
