// stretto-bench fit CONFIG: what the layers of a configuration and the links between these ranks
// cost, as a cost model's file.
//
// Layers run through the executor on each rank by itself, all ranks at the same time, since they
// may share a processor's caches and memory; on a GPU events time them. Several sizes and numbers
// of documents tell tokens from pairs and from what a call costs. What only whole steps show comes
// behind (fit_steps.h).
#include "stretto/plan/fit.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "benchmarks/fit_steps.h"
#include "benchmarks/micro_batch.h"
#include "benchmarks/operations.h"
#include "stretto/comm/transport.h"
#include "stretto/core/phase_timer.h"
#include "stretto/data/tokenizer.h"
#include "stretto/train/prediction.h"
#include "tools/arguments.h"
#include "tools/files.h"

namespace stretto::bench {
namespace {

constexpr int kHalves = 3;  // forward, backward input, backward weight
int HalfOf(ActionKind kind) {
  if (kind == ActionKind::kBackwardInput) return 1;
  return kind == ActionKind::kBackwardWeight ? 2 : 0;
}

// Times the layers of each kind by half, on the stream's own clock.
class LayerTimes final : public ActionHooks {
 public:
  LayerTimes(const Graph& graph, Stream& stream) {
    for (const std::string& name : graph.layer_names) {
      const std::string kind = LayerKind(name);
      auto at = std::find(kinds_.begin(), kinds_.end(), kind);
      kind_of_layer_.push_back(static_cast<int>(at - kinds_.begin()));
      if (at == kinds_.end()) kinds_.push_back(kind);
    }
    counts_.assign(kinds_.size(), 0);
    for (const int kind : kind_of_layer_) ++counts_[static_cast<size_t>(kind)];
    timer_ = std::make_unique<PhaseTimer>(stream, phases() + 1);
  }
  void Start() { timer_->Restart(phases()); }
  void Before(size_t /*index*/, const Action& action) override {
    // Recomputation stands between others and is counted by itself, with nothing.
    timer_->Begin(action.kind == ActionKind::kRecompute
                      ? phases()
                      : kHalves * kind_of_layer_[static_cast<size_t>(action.layer)] +
                            HalfOf(action.kind));
  }
  void Stop() { timer_->End(); }
  // Of one layer, when the stream has been synchronized; negative where a device did not tell.
  double Seconds(int kind, int half) {
    return timer_->Seconds()[static_cast<size_t>(kHalves * kind + half)] /
           counts_[static_cast<size_t>(kind)];
  }
  // Of all layers.
  double Total() {
    const std::vector<double>& seconds = timer_->Seconds();
    return std::accumulate(seconds.begin(), seconds.end(), 0.0);
  }
  const std::vector<std::string>& kinds() const { return kinds_; }

 private:
  int phases() const { return kHalves * static_cast<int>(kinds_.size()); }
  std::vector<std::string> kinds_;
  std::vector<int> kind_of_layer_, counts_;
  std::unique_ptr<PhaseTimer> timer_;
};

// Lets communication advance between layers, as a run does.
class Progress final : public ActionHooks {
 public:
  explicit Progress(Communicator& comm) : comm_(comm) {}
  void BetweenActions() override { comm_.Progress(); }

 private:
  Communicator& comm_;
};

// Hands over `calls` operations in even distances between so many actions.
class Spread final : public ActionHooks {
 public:
  Spread(Communicator& comm, int calls, int actions, std::function<void()> submit)
      : progress_(comm), calls_(calls), actions_(actions), submit_(std::move(submit)) {}
  void Before(size_t index, const Action& /*action*/) override {
    const auto due =
        static_cast<int>((index + 1) * static_cast<size_t>(calls_) / static_cast<size_t>(actions_));
    for (; done_ < due; ++done_) submit_();
  }
  void BetweenActions() override { progress_.BetweenActions(); }

 private:
  Progress progress_;
  const int calls_, actions_;
  int done_ = 0;
  std::function<void()> submit_;
};

// Documents of a micro-batch and tokens of each on which layers are timed.
std::set<std::pair<int64_t, int64_t>> LayerSizes(const TrainConfig& config) {
  const int64_t most = config.batch.micro, length = config.data.sequence_length;
  std::set<std::pair<int64_t, int64_t>> sizes;
  // A single sample: what it is to tell is how documents of unequal length differ.
  if (most == 1) {
    for (const int64_t documents : {1, 2, 8, 32}) {
      for (const int64_t parts : {1, 2, 4}) {
        if (length / (documents * parts) > 0)
          sizes.emplace(documents, length / (documents * parts));
      }
    }
    return sizes;
  }
  for (const int64_t documents : {most, (most + 1) / 2, (most + 3) / 4}) {
    for (const int64_t tokens : {length, (length + 1) / 2}) sizes.emplace(documents, tokens);
  }
  return sizes;
}

// INVALID_ARGUMENT when one size is all there is: nothing would tell what a token costs from what a
// call does.
absl::Status SeveralSizes(const TrainConfig& config, bool documents) {
  if (LayerSizes(config).size() > 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "micro-batches of ", config.batch.micro, " x ", config.data.sequence_length,
      " tokens have one size only, which does not tell what a token costs from what a call does; "
      "raise ",
      documents ? "data.sequence_length and batch.capacity to 2 at least"
                : "batch.micro or data.sequence_length"));
}

// Of documents that are made up.
absl::Status HasSeparator(const TrainConfig& config) {
  STRETTO_ASSIGN_OR_RETURN(const auto tokenizer, OpenTokenizer(config.data.tokenizer));
  const int64_t separator = tokenizer->end_of_text();
  if (separator < config.model.vocabulary) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("documents of data.tokenizer (", config.data.tokenizer, ") end with token ",
                   separator, ", and model.vocabulary is ", config.model.vocabulary,
                   "; raise it, or give --steps 0 to measure no documents"));
}

class Fitter {
 public:
  Fitter(const TrainConfig& config, Communicator& comm, Stream& stream, MicroBatch& batch,
         int repetitions)
      : config_(config),
        comm_(comm),
        stream_(stream),
        gpu_(stream.device().kind != DeviceKind::kCpu),
        batch_(batch),
        repetitions_(repetitions) {}

  absl::Status Layers(CostModel* cost) {
    LayerTimes times(batch_.graph(), stream_);
    // [kind * kHalves + half]
    std::vector<std::vector<StageSample>> samples(kHalves * times.kinds().size());
    STRETTO_RETURN_IF_ERROR(Heat());
    for (const auto& [documents, tokens] : LayerSizes(config_)) {
      STRETTO_RETURN_IF_ERROR(batch_.Fill(documents, tokens));
      // Of one round all layers: the best of each would be better than any round is.
      std::vector<std::vector<double>> rounds;
      for (int round = 0; round <= repetitions_; ++round) {
        STRETTO_RETURN_IF_ERROR(LargestOfAll(comm_, 0).status());
        times.Start();
        batch_.Step(&times);
        times.Stop();
        STRETTO_RETURN_IF_ERROR(stream_.Synchronize());
        std::vector<double> seconds;
        for (size_t i = 0; i < samples.size(); ++i) {
          seconds.push_back(
              times.Seconds(static_cast<int>(i) / kHalves, static_cast<int>(i) % kHalves));
        }
        // Last what all of it takes, to sort by.
        seconds.push_back(times.Total());
        if (round > 0) rounds.push_back(std::move(seconds));  // the first one warms up
      }
      std::sort(rounds.begin(), rounds.end(),
                [](const auto& x, const auto& y) { return x.back() < y.back(); });
      const std::vector<double>& chosen = rounds[(rounds.size() - 1) / (gpu_ ? 2 : 10)];
      const auto n = static_cast<double>(documents), t = static_cast<double>(tokens);
      for (size_t i = 0; i < samples.size(); ++i) {
        STRETTO_ASSIGN_OR_RETURN(const double mean, MeanOfAll(chosen[i]));
        if (mean < 0) {
          return absl::UnavailableError(
              "the device did not tell the times of its layers; run the fit again");
        }
        samples[i].push_back({.tokens = n * t, .pairs = n * t * (t + 1) / 2, .seconds = mean});
      }
    }
    for (size_t kind = 0; kind < times.kinds().size(); ++kind) {
      LayerCost layer = {.name = times.kinds()[kind]};
      StageCost* const halves[kHalves] = {&layer.forward, &layer.backward_input,
                                          &layer.backward_weight};
      for (size_t half = 0; half < kHalves; ++half) {
        STRETTO_ASSIGN_OR_RETURN(*halves[half], FitStage(samples[kHalves * kind + half]));
      }
      cost->parts->layers.push_back(layer);
    }
    AddBlockCosts(batch_.graph(), cost);
    return batch_.Fill(config_.batch.micro, config_.data.sequence_length);
  }

  absl::Status Update(DeviceCost* parts) {
    STRETTO_ASSIGN_OR_RETURN(const double seconds, Together([&] {
                               batch_.Update();
                               return absl::OkStatus();
                             }));
    parts->update_per_element = seconds / static_cast<double>(batch_.graph().ParameterElements());
    return absl::OkStatus();
  }

  absl::Status Links(LinkCost* link) {
    const int n = comm_.all().size();
    // Up to a size that shows the bandwidth, also for small buckets.
    constexpr int64_t kLeast = 1 << 12, kEnough = 1 << 20;
    const int64_t most = std::clamp<int64_t>(config_.parallel.bucket_bytes, kEnough, 64 << 20);
    const int64_t elements = (most / 4 + n - 1) / n * n;
    STRETTO_ASSIGN_OR_RETURN(x_, Arena::Create(stream_.device(), "bench", elements * 4));
    STRETTO_ASSIGN_OR_RETURN(y_, Arena::Create(stream_.device(), "bench", elements * 4));
    const auto tensor = [&](const Arena& arena) {
      return Tensor::Of(arena.data(), DType::kF32, {elements}, stream_.device());
    };
    operations_ = Operations(comm_, tensor(x_), tensor(y_));
    const std::map<std::string, OperationCost*> wanted = {{"all_gather", &link->all_gather},
                                                          {"reduce_scatter", &link->reduce_scatter},
                                                          {"all_reduce", &link->all_reduce},
                                                          {"send_receive", &link->point_to_point}};
    for (const Operation& operation : operations_) {
      const auto found = wanted.find(operation.name);
      if (found == wanted.end()) continue;
      std::vector<OperationSample> samples;
      for (int64_t e = std::max<int64_t>(n, kLeast / 4 / n * n); e <= elements; e *= 4) {
        STRETTO_ASSIGN_OR_RETURN(
            const OperationSeconds seconds,
            SecondsOf(comm_, gpu_ ? &stream_ : nullptr, operation, e, repetitions_));
        // What a rank sends; point to point has one peer. A small all-reduce sends everything to
        // everybody, and a plan counts it so.
        const bool all_reduce = operation.name == "all_reduce";
        samples.push_back(
            {.ranks = operation.name == "send_receive" ? 2 : n,
             .bytes_sent = static_cast<double>(4 * e) * (all_reduce ? n - 1 : operation.bus_factor),
             .seconds = seconds.all});
      }
      STRETTO_ASSIGN_OR_RETURN(*found->second, FitOperation(samples));
    }
    return absl::OkStatus();
  }

  // The hidden share of a reduce-scatter that takes about half as long as the micro-batch beside
  // it: (T_compute + T_communication - T_both) / min(T_compute, T_communication).
  absl::Status Hidden(const LinkCost& link, double* hidden) {
    const int n = comm_.all().size();
    const auto step = [&](ActionHooks&& hooks) -> absl::Status {
      batch_.Step(&hooks);
      return absl::OkStatus();
    };
    STRETTO_ASSIGN_OR_RETURN(const double compute, Together([&] { return step(Progress(comm_)); }));
    const auto scatter =
        std::find_if(operations_.begin(), operations_.end(),
                     [](const Operation& o) { return o.name == "reduce_scatter"; });
    const int64_t elements = x_.bytes() / 4;
    const double one =
        link.reduce_scatter.Seconds(n, static_cast<int64_t>(4 * elements * scatter->bus_factor));
    const int calls = std::max(1, static_cast<int>(0.5 * compute / std::max(one, 1e-9)));
    STRETTO_ASSIGN_OR_RETURN(const double alone, Together([&] {
                               Ticket ticket = 0;
                               for (int i = 0; i < calls; ++i) ticket = scatter->submit(elements);
                               return comm_.Wait(stream_, ticket);
                             }));
    // Spread over the layers, as a run's buckets are: what waits to be handed over is bounded.
    const int actions = static_cast<int>(batch_.actions().actions.size());
    STRETTO_ASSIGN_OR_RETURN(const double both, Together([&]() -> absl::Status {
                               Ticket ticket = 0;
                               STRETTO_RETURN_IF_ERROR(step(Spread(comm_, calls, actions, [&] {
                                 ticket = scatter->submit(elements);
                               })));
                               return comm_.Wait(stream_, ticket);
                             }));
    *hidden = std::clamp((compute + alone - both) / std::min(compute, alone), 0.0, 1.0);
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<double> MeanOfAll(double value) {
    STRETTO_RETURN_IF_ERROR(comm_.Wait(comm_.AllReduce(
        comm_.all(), Tensor::Of(&value, DType::kF64, {1}), ReduceOp::kSum, "mean")));
    return value / comm_.all().size();
  }
  // A GPU that was idle runs at a clock that its power limit does not let it keep: measures what it
  // does in the middle of a run.
  absl::Status Heat() {
    constexpr double kSeconds = 2;
    if (!gpu_) return absl::OkStatus();
    const double start = Now();
    while (Now() - start < kSeconds) {
      batch_.Step();
      STRETTO_RETURN_IF_ERROR(stream_.Synchronize());
    }
    return absl::OkStatus();
  }
  // Seconds of `work` on the slowest rank, when all begin together: on a GPU the median; on
  // processors, which others disturb, the lower decile.
  template <class Work>
  absl::StatusOr<double> Together(const Work& work) {
    std::vector<double> seconds;
    for (int round = 0; round <= repetitions_; ++round) {
      STRETTO_RETURN_IF_ERROR(LargestOfAll(comm_, 0).status());
      const double start = Now();
      STRETTO_RETURN_IF_ERROR(work());
      STRETTO_RETURN_IF_ERROR(stream_.Synchronize());
      STRETTO_ASSIGN_OR_RETURN(const double slowest, LargestOfAll(comm_, Now() - start));
      if (round > 0) seconds.push_back(slowest);
    }
    return gpu_ ? Median(std::move(seconds)) : LowerDecile(std::move(seconds));
  }

  const TrainConfig& config_;
  Communicator& comm_;
  Stream& stream_;
  const bool gpu_;
  MicroBatch& batch_;
  const int repetitions_;
  Arena x_, y_;
  std::vector<Operation> operations_;
};

absl::StatusOr<CostModel> FitParts(World& world, TrainConfig config, int repetitions) {
  // Several blocks, so that caches are as in a model; all of a large one would only take time.
  constexpr int64_t kBlocks = 4;
  const bool documents = config.data.documents;
  config = OfDataParallelism(std::move(config));
  config.runtime.recompute = "none";
  config.batch.micro = std::min(config.batch.micro, config.batch.global);
  absl::Status resolved = config.Resolve(1);
  if (resolved.ok()) resolved = SeveralSizes(config, documents);
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the configuration", resolved));
  const absl::StatusOr<Device> chosen =
      ChooseDevice(config.runtime.device, world.info().local_rank);
  STRETTO_RETURN_IF_ERROR(world.Agree("choosing the device", chosen.status()));
  config.runtime.device = chosen->kind == DeviceKind::kCpu ? "cpu" : "cuda";
  if (config.runtime.threads == 0) {
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    config.runtime.threads = std::max(1, cores / std::max(1, world.info().local_size));
  }
  config.model.layers = std::min(config.model.layers, kBlocks);
  // The stream outlives the communicator, which waits on it.
  STRETTO_ASSIGN_OR_RETURN(
      const auto stream,
      Stream::Create(*chosen, {.threads = static_cast<int>(config.runtime.threads),
                               .workspace_bytes = DeviceWorkspaceBytes(chosen->kind)}));
  Communicator comm(world);
  STRETTO_RETURN_IF_ERROR(comm.UseDevice(*chosen));
  std::string links(chosen->kind == DeviceKind::kCpu ? world.transport().name() : "nccl");
  if (chosen->kind != DeviceKind::kCpu && config.parallel.copy_engines != "off") {
    STRETTO_ASSIGN_OR_RETURN(const std::string why, comm.UseCopyEngines(comm.all()));
    if (why.empty() && world.size() > 1) links = "copy engines and nccl";  // as in a run
  }
  STRETTO_ASSIGN_OR_RETURN(const Group alone, comm.MakeGroup("alone", {world.rank()}));
  auto batch = MicroBatch::Create(config, comm, alone, *stream);
  STRETTO_RETURN_IF_ERROR(world.Agree("building the model", batch.status()));
  STRETTO_RETURN_IF_ERROR(world.Agree("warming up", (*batch)->WarmUp()));

  CostModel cost = {.device = DeviceName(*chosen)};
  DeviceCost& parts = cost.parts.emplace();
  parts.model = ModelKey(config);
  parts.ranks = world.size();
  const bool one_machine = world.info().local_size == world.size();
  parts.measured = absl::StrCat(
      world.size(), world.size() == 1 ? " rank" : " ranks", one_machine ? "" : " on machines of ",
      one_machine ? "" : absl::StrCat(world.info().local_size), " over ", links, ", ",
      config.runtime.threads, config.runtime.threads == 1 ? " thread" : " threads",
      " each, stretto " STRETTO_VERSION);
  Fitter fitter(config, comm, *stream, **batch, repetitions);
  Tell(world, absl::StrCat("measuring layers on ", LayerSizes(config).size(),
                           " sizes of micro-batch, ", repetitions + 1, " times each"));
  STRETTO_RETURN_IF_ERROR(fitter.Layers(&cost));
  STRETTO_RETURN_IF_ERROR(fitter.Update(&parts));
  if (world.size() > 1) {
    // Between ranks of several machines the network is what is measured; inside a machine links are
    // no slower.
    Tell(world, absl::StrCat("measuring links between ", world.size(), " ranks over ", links));
    STRETTO_RETURN_IF_ERROR(fitter.Links(&parts.machine));
    if (!one_machine) parts.network = parts.machine;
    Tell(world, "measuring how much of a collective a micro-batch hides");
    STRETTO_RETURN_IF_ERROR(fitter.Hidden(parts.machine, &parts.hidden));
  }
  SetBoundary(config, &cost);
  return cost;
}

}  // namespace

absl::StatusOr<CostModel> FitCosts(World& world, TrainConfig config, int repetitions,
                                   int64_t steps) {
  STRETTO_RETURN_IF_ERROR(
      SameEverywhere(world, config, absl::StrCat("repetitions ", repetitions, " steps ", steps)));
  const bool rings = config.data.documents && world.size() > 1 && steps != 0;
  if (rings) {
    // Before anything takes its time.
    STRETTO_RETURN_IF_ERROR(world.Agree("opening the tokenizer", HasSeparator(config)));
  }
  STRETTO_ASSIGN_OR_RETURN(CostModel cost, FitParts(world, config, repetitions));
  double scale = 0;
  STRETTO_RETURN_IF_ERROR(ScaleByStep(world, config, steps, &cost, &scale));
  if (rings) STRETTO_RETURN_IF_ERROR(FitRing(world, config, steps, &cost));
  absl::StrAppend(&cost.parts->measured,
                  scale > 0 ? absl::StrFormat(", layers x %.3f as in whole steps", scale)
                            : ", layers as in a few blocks");
  return cost;
}

namespace {

// The old file stays when the new one cannot be written whole.
absl::Status Replace(const std::string& path, const std::string& text) {
  const std::string draft = Draft(path);
  absl::Status written = WriteTextFile(draft, text);
  if (draft == path) return written;
  if (written.ok() && std::rename(draft.c_str(), path.c_str()) != 0) {
    written =
        absl::UnavailableError(absl::StrCat(path, " could not be written: ", std::strerror(errno)));
  }
  if (!written.ok()) std::remove(draft.c_str());
  return written;
}

}  // namespace

int Fit(int argc, const char* const* argv) {
  std::vector<std::string> sets;
  std::string output = "costs.json";
  int64_t repetitions = 21, steps = kDefaultSteps;
  std::string whole = "auto";
  Arguments arguments("stretto-bench fit",
                      "Measures what a configuration's layers and these ranks' links cost and "
                      "writes a cost model\nfor stretto-plan --suggest and stretto-schedule "
                      "--costs; also under mpirun.",
                      "CONFIG.json");
  arguments.Add("set", "section.name=value", "overrides the file; may be repeated", &sets);
  arguments.Add("output", "FILE", "where the cost model goes", &output);
  arguments.Add("repetitions", "N", "of each measurement", &repetitions);
  arguments.Add("steps", "N",
                "whole steps by which layers are scaled, and of documents that ranks share; auto: "
                "4, and none to scale layers on CPUs",
                &whole);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && (repetitions < 1 || repetitions > 1000)) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--repetitions must be 1 to 1000, not ", repetitions));
  }
  if (parsed.ok() && whole != "auto" &&
      (!absl::SimpleAtoi(whole, &steps) || steps < 0 || steps > 1000)) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--steps must be auto or 0 to 1000, not '", whole, "'"));
  }
  if (parsed.ok() && output.empty()) {
    parsed = absl::InvalidArgumentError("--output is empty; name the file for the cost model");
  }
  absl::StatusOr<TrainConfig> config;
  if (parsed.ok()) {
    config = LoadOne("fit", arguments.rest(), sets);
    parsed = config.status();
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  return RunInWorld([&](World& world) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(CheckOutput(world, output));
    STRETTO_ASSIGN_OR_RETURN(const CostModel cost,
                             FitCosts(world, *config, static_cast<int>(repetitions), steps));
    absl::Status written;
    if (world.rank() == 0) {
      written = Replace(output, ToJson(cost));
      if (written.ok()) {
        const DeviceCost& parts = *cost.parts;
        absl::PrintF("%s, %s\n%s\n", cost.device, parts.measured, parts.model);
        const auto show = [](const char* name, const OperationCost& o) {
          absl::PrintF("%-16s %9.2f us a peer, %9.3f GB/s\n", name, 1e6 * o.latency,
                       1e-9 * o.bytes_per_second);
        };
        if (parts.ranks > 1) {
          show("all_gather", parts.machine.all_gather);
          show("reduce_scatter", parts.machine.reduce_scatter);
          show("all_reduce", parts.machine.all_reduce);
          show("point_to_point", parts.machine.point_to_point);
          absl::PrintF("hidden under computation: %.2f of a collective\n", parts.hidden);
          if (parts.ring_per_token > 0) {
            absl::PrintF("a ring's sums: %.2f ns a token, layer and step\n",
                         1e9 * parts.ring_per_token);
          }
        }
        absl::PrintF("written to %s\n", output);
      }
    }
    return world.Agree("writing the cost model", written);
  });
}

}  // namespace stretto::bench
