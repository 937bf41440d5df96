#include "stretto/plan/cost.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kVersion = 1;

// The numbers of a cost model and their names in the file, in one place for both directions.
template <class Model, class F>
void ForNumbers(Model& c, const F& f) {
  f("woven", c.woven);
  f("boundary_bytes_per_token", c.boundary_bytes_per_token);
  f("link_latency", c.link_latency);
  f("link_bytes_per_second", c.link_bytes_per_second);
}
template <class Model, class F>
void ForStages(Model& c, const F& f) {
  f("forward", c.forward);
  f("backward_input", c.backward_input);
  f("backward_weight", c.backward_weight);
}
template <class Cost, class F>
void ForParts(Cost& c, const F& f) {
  f("fixed", c.fixed);
  f("per_token", c.per_token);
  f("per_pair", c.per_pair);
}

double Seconds(const std::vector<StageCost>& costs, int stage, const PlanItem& item) {
  if (costs.empty()) return 0;
  const StageCost& c = costs.size() == 1 ? costs[0] : costs.at(static_cast<size_t>(stage));
  double pairs = 0;
  for (int64_t length : item.lengths) {
    pairs += 0.5 * static_cast<double>(length) * static_cast<double>(length + 1);
  }
  const auto share = static_cast<double>(item.pipelines.size());
  return c.fixed + (static_cast<double>(item.tokens) * c.per_token + pairs * c.per_pair) / share;
}

class Reader {
 public:
  explicit Reader(std::string source) : source_(std::move(source)) {}
  const absl::Status& status() const { return status_; }
  void Fail(const std::string& what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(source_, ": ", what));
  }
  double Number(const Json& object, const std::string& name) {
    const auto found = object.find(name);
    if (found == object.end()) {
      Fail(absl::StrCat("\"", name, "\" is missing"));
    } else if (!found->is_number() || !(found->get<double>() >= 0)) {
      Fail(absl::StrCat("\"", name, "\" must be a number of at least 0"));
    } else {
      return found->get<double>();
    }
    return 0;
  }
  void KnowsOnly(const Json& object, const std::vector<std::string>& names) {
    for (const auto& [key, value] : object.items()) {
      bool known = false;
      for (const std::string& name : names) known = known || name == key;
      if (!known) Fail(absl::StrCat("there is no field \"", key, "\""));
    }
  }

 private:
  std::string source_;
  absl::Status status_;
};

}  // namespace

double CostModel::Seconds(const Program& program, const ProgramAction& action) const {
  const PlanItem& item = program.items[static_cast<size_t>(action.item)];
  switch (action.work) {
    case StageWork::kForward:
      return stretto::Seconds(forward, action.stage, item);
    case StageWork::kBackward:
      return stretto::Seconds(backward_input, action.stage, item) +
             stretto::Seconds(backward_weight, action.stage, item);
    case StageWork::kBackwardInput:
      return stretto::Seconds(backward_input, action.stage, item);
    case StageWork::kBackwardWeight:
      return stretto::Seconds(backward_weight, action.stage, item);
  }
  return 0;
}

double CostModel::BoundarySeconds(const PlanItem& item) const {
  const double bytes = boundary_bytes_per_token * static_cast<double>(item.tokens) /
                       static_cast<double>(item.pipelines.size());
  return link_latency + (link_bytes_per_second > 0 ? bytes / link_bytes_per_second : 0);
}

CostModel UniformCost(double forward, double backward_input, double backward_weight) {
  CostModel cost;
  cost.forward = {{.fixed = forward}};
  cost.backward_input = {{.fixed = backward_input}};
  cost.backward_weight = {{.fixed = backward_weight}};
  return cost;
}

std::string ToJson(const CostModel& cost) {
  Json json = {{"version", kVersion}, {"device", cost.device}};
  ForStages(cost, [&](const char* name, const std::vector<StageCost>& stages) {
    Json list = Json::array();
    for (const StageCost& stage : stages) {
      Json parts = Json::object();
      ForParts(stage, [&](const char* part, double value) { parts[part] = value; });
      list.push_back(std::move(parts));
    }
    json[name] = std::move(list);
  });
  ForNumbers(cost, [&](const char* name, double value) { json[name] = value; });
  return json.dump(2) + "\n";
}

absl::StatusOr<CostModel> ParseCostModel(const std::string& text, const std::string& source) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, " is no cost model: it must be a valid JSON object, with numbers that fit"));
  }
  Reader reader(source);
  CostModel cost;
  std::vector<std::string> names = {"version", "device"};
  if (reader.Number(json, "version") != kVersion) {
    reader.Fail(absl::StrCat("\"version\" must be ", kVersion, "; fit the costs again"));
  }
  if (const auto device = json.find("device"); device != json.end() && device->is_string()) {
    cost.device = device->get<std::string>();
  } else {
    reader.Fail("\"device\" must be a text");
  }
  ForStages(cost, [&](const char* name, std::vector<StageCost>& stages) {
    names.push_back(name);
    const auto list = json.find(name);
    if (list == json.end() || !list->is_array() || list->empty()) {
      reader.Fail(
          absl::StrCat("\"", name, "\" must be a list with an entry for each stage, or one"));
      return;
    }
    for (const Json& entry : *list) {
      StageCost& stage = stages.emplace_back();
      if (!entry.is_object()) {
        reader.Fail(absl::StrCat("an entry of \"", name, "\" is no object"));
        continue;
      }
      std::vector<std::string> parts;
      ForParts(stage, [&](const char* part, double& value) {
        parts.push_back(part);
        value = reader.Number(entry, part);
      });
      reader.KnowsOnly(entry, parts);
    }
  });
  ForNumbers(cost, [&](const char* name, double& value) {
    names.push_back(name);
    value = reader.Number(json, name);
  });
  reader.KnowsOnly(json, names);
  if (!reader.status().ok()) return reader.status();
  return cost;
}

}  // namespace stretto
