#include "stretto/plan/cost.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/duplicate_names.h"
#include "stretto/core/read_file.h"

namespace stretto {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kVersion = 1;
// Missing where it is 0, so that the text of a file, or of costs in a checkpoint, that is older
// than it stays the same.
constexpr char kRing[] = "ring_per_token";

// The numbers of a cost model and their names in the file, in one place for both directions.
template <class Model, class F>
void ForNumbers(Model& c, const F& f) {
  f("woven", c.woven);
  f("boundary_bytes_per_token", c.boundary_bytes_per_token);
  f("link_latency", c.link_latency);
  f("link_bytes_per_second", c.link_bytes_per_second);
}
template <class Layer, class F>
void ForHalves(Layer& c, const F& f) {
  f("forward", c.forward);
  f("backward_input", c.backward_input);
  f("backward_weight", c.backward_weight);
}
template <class Link, class F>
void ForOperations(Link& c, const F& f) {
  f("all_gather", c.all_gather);
  f("reduce_scatter", c.reduce_scatter);
  f("all_reduce", c.all_reduce);
  f("point_to_point", c.point_to_point);
}
template <class Operation, class F>
void ForOperation(Operation& c, const F& f) {
  f("latency", c.latency);
  f("bytes_per_second", c.bytes_per_second);
}
template <class Device, class F>
void ForDevice(Device& c, const F& f) {
  f("hidden", c.hidden);
  f("update_per_element", c.update_per_element);
  f("step_fixed", c.step_fixed);
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
  return c.Seconds(static_cast<double>(item.tokens) / share, pairs / share);
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
      return 0;
    }
    // Within these bounds sums and products of many stay finite.
    const bool rate = name.ends_with("bytes_per_second");
    const double number = found->is_number() ? found->get<double>() : -1;
    if (number == 0 || (number >= (rate ? 1 : 0) && (rate || number <= 1e9))) return number;
    Fail(absl::StrCat("\"", name, "\" must be ",
                      rate ? "0 (no limit) or a number of at least 1" : "a number from 0 to 1e9"));
    return 0;
  }
  std::string Text(const Json& object, const std::string& name) {
    const auto found = object.find(name);
    if (found != object.end() && found->is_string()) return found->get<std::string>();
    Fail(absl::StrCat("\"", name, "\" must be a text"));
    return "";
  }
  // An object that has these numbers and nothing else. `for_numbers(f)` calls f(name, value&).
  template <class ForNumbers>
  void Numbers(const Json& object, const std::string& what, const ForNumbers& for_numbers) {
    if (!object.is_object()) return Fail(absl::StrCat("an entry of \"", what, "\" is no object"));
    std::vector<std::string> names;
    for_numbers([&](const char* name, double& value) {
      names.push_back(name);
      value = Number(object, name);
    });
    KnowsOnly(object, names);
  }
  // A member that is an object; an empty one after an error.
  const Json& Object(const Json& object, const std::string& name) {
    static const Json empty = Json::object();
    const auto found = object.find(name);
    if (found != object.end() && found->is_object()) return *found;
    Fail(absl::StrCat("\"", name, "\" must be an object"));
    return empty;
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

Json ToJson(const LinkCost& link) {
  Json json = Json::object();
  ForOperations(link, [&](const char* name, const OperationCost& operation) {
    ForOperation(operation, [&](const char* number, double value) { json[name][number] = value; });
  });
  return json;
}

LinkCost ReadLink(Reader& reader, const Json& json) {
  LinkCost link;
  std::vector<std::string> names;
  ForOperations(link, [&](const char* name, OperationCost& operation) {
    names.push_back(name);
    reader.Numbers(reader.Object(json, name), name,
                   [&](const auto& f) { ForOperation(operation, f); });
  });
  reader.KnowsOnly(json, names);
  return link;
}

Json ToJson(const StageCost& stage) {
  Json parts = Json::object();
  ForParts(stage, [&](const char* part, double value) { parts[part] = value; });
  return parts;
}

Json ToJson(const DeviceCost& device) {
  Json json = {{"assumed", device.assumed},
               {"model", device.model},
               {"measured", device.measured},
               {"ranks", device.ranks}};
  ForDevice(device, [&](const char* name, double value) { json[name] = value; });
  if (device.ring_per_token > 0) json[kRing] = device.ring_per_token;
  json["layers"] = Json::object();
  for (const LayerCost& layer : device.layers) {
    ForHalves(layer, [&](const char* name, const StageCost& half) {
      json["layers"][layer.name][name] = ToJson(half);
    });
  }
  json["machine"] = ToJson(device.machine);
  if (device.network) json["network"] = ToJson(*device.network);
  return json;
}

DeviceCost ReadDevice(Reader& reader, const Json& json) {
  DeviceCost device;
  std::vector<std::string> names = {"assumed", "model", "measured", "ranks", "layers", "machine"};
  if (const auto assumed = json.find("assumed"); assumed != json.end() && assumed->is_boolean()) {
    device.assumed = assumed->get<bool>();
  } else {
    reader.Fail("\"assumed\" must be true or false");
  }
  device.model = reader.Text(json, "model");
  device.measured = reader.Text(json, "measured");
  device.ranks = static_cast<int64_t>(std::min(reader.Number(json, "ranks"), 1e9));
  ForDevice(device, [&](const char* name, double& value) {
    names.push_back(name);
    value = reader.Number(json, name);
  });
  names.emplace_back(kRing);
  if (json.contains(kRing)) device.ring_per_token = reader.Number(json, kRing);
  if (device.ring_per_token > DeviceCost::kMostRingPerToken) {
    reader.Fail(absl::StrCat("\"", kRing, "\" must be at most ", DeviceCost::kMostRingPerToken,
                             " seconds; fit the costs again"));
  }
  if (device.hidden > 1) reader.Fail("\"hidden\" must be at most 1");
  for (const auto& [name, halves] : reader.Object(json, "layers").items()) {
    LayerCost& layer = device.layers.emplace_back();
    layer.name = name;
    std::vector<std::string> known;
    ForHalves(layer, [&, &halves = halves](const char* half, StageCost& cost) {
      known.push_back(half);
      reader.Numbers(reader.Object(halves, half), half, [&](const auto& f) { ForParts(cost, f); });
    });
    reader.KnowsOnly(halves, known);
  }
  if (device.layers.empty()) reader.Fail("\"layers\" must have an entry");
  device.machine = ReadLink(reader, reader.Object(json, "machine"));
  if (json.contains("network")) {
    names.emplace_back("network");
    device.network = ReadLink(reader, reader.Object(json, "network"));
  }
  reader.KnowsOnly(json, names);
  return device;
}

}  // namespace

double OperationCost::Seconds(int ranks, int64_t bytes_sent) const {
  if (ranks < 2) return 0;
  const double moving =
      bytes_per_second > 0 ? static_cast<double>(bytes_sent) / bytes_per_second : 0;
  return latency * (ranks - 1) + moving;
}

const LayerCost* DeviceCost::Find(const std::string& name) const {
  for (const LayerCost& layer : layers) {
    if (layer.name == name) return &layer;
  }
  return nullptr;
}

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

void ScaleLayers(double scale, CostModel* cost) {
  const auto times = [&](StageCost& half) {
    half = {half.fixed * scale, half.per_token * scale, half.per_pair * scale};
  };
  for (auto* stages : {&cost->forward, &cost->backward_input, &cost->backward_weight}) {
    for (StageCost& stage : *stages) times(stage);
  }
  if (!cost->parts) return;
  for (LayerCost& layer : cost->parts->layers) {
    for (StageCost* half : {&layer.forward, &layer.backward_input, &layer.backward_weight}) {
      times(*half);
    }
  }
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
  ForHalves(cost, [&](const char* name, const std::vector<StageCost>& stages) {
    Json list = Json::array();
    for (const StageCost& stage : stages) list.push_back(ToJson(stage));
    json[name] = std::move(list);
  });
  ForNumbers(cost, [&](const char* name, double value) { json[name] = value; });
  if (cost.parts) json["parts"] = ToJson(*cost.parts);
  return json.dump(2) + "\n";
}

absl::StatusOr<CostModel> ParseCostModel(const std::string& text, const std::string& source) {
  if (text.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the cost model '", source, "' is empty; make one with stretto-bench fit"));
  }
  std::vector<std::string> twice;
  DuplicateNames<Json> names_of(&twice);
  const Json json = Json::parse(text, std::ref(names_of), /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, " is no cost model: it must be a valid JSON object, with numbers that fit"));
  }
  Reader reader(source);
  if (!twice.empty()) reader.Fail(twice.front());
  CostModel cost;
  std::vector<std::string> names = {"version", "device"};
  if (reader.Number(json, "version") != kVersion) {
    reader.Fail(absl::StrCat("\"version\" must be ", kVersion, "; fit the costs again"));
  }
  cost.device = reader.Text(json, "device");
  ForHalves(cost, [&](const char* name, std::vector<StageCost>& stages) {
    names.push_back(name);
    const auto list = json.find(name);
    if (list == json.end() || !list->is_array() || list->empty()) {
      reader.Fail(
          absl::StrCat("\"", name, "\" must be a list with an entry for each stage, or one"));
      return;
    }
    for (const Json& entry : *list) {
      StageCost& stage = stages.emplace_back();
      reader.Numbers(entry, name, [&](const auto& f) { ForParts(stage, f); });
    }
  });
  ForNumbers(cost, [&](const char* name, double& value) {
    names.push_back(name);
    value = reader.Number(json, name);
  });
  if (json.contains("parts")) {
    names.emplace_back("parts");
    cost.parts = ReadDevice(reader, reader.Object(json, "parts"));
  }
  reader.KnowsOnly(json, names);
  if (!reader.status().ok()) return reader.status();
  return cost;
}

absl::StatusOr<CostModel> ReadCostModel(const std::string& path) {
  STRETTO_ASSIGN_OR_RETURN(const std::string text, ReadRegularFile("the cost model", path));
  return ParseCostModel(text, path);
}

}  // namespace stretto
