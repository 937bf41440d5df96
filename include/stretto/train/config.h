// Everything a training run is told, in one struct that describes itself (docs/config.md is
// generated from it).
#ifndef STRETTO_TRAIN_CONFIG_H_
#define STRETTO_TRAIN_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/config.h"
#include "stretto/core/status.h"
#include "stretto/model/config.h"

namespace stretto {

// Load one with LoadConfig(path, sets, ConfigRef(&config)), then call Resolve. Units and meaning of
// each field are in its Visit and in docs/config.md.
struct TrainConfig {
  int64_t seed = 1;
  int64_t steps = 100;
  std::string output = "runs/default";

  ModelConfig model;

  struct Data {
    std::string train;
    std::string validation;
    std::string tokenizer = "bytes";
    int64_t sequence_length = 256;
    bool shuffle = true;
    bool document_attention = true;
    bool documents = false;
    bool prefetch = true;
    void Visit(ConfigVisitor& v);
  } data;

  struct Batch {
    int64_t global = 8;
    int64_t micro = 4;
    int64_t tokens = 0;
    int64_t capacity = 0;
    void Visit(ConfigVisitor& v);
  } batch;

  struct Optimizer {
    std::string name = "adamw";
    double lr = 1e-3;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double weight_decay = 0.1;
    std::string moments = "f32";
    bool masters = true;
    bool offload = false;
    double clip_norm = 1.0;
    std::string schedule = "cosine";
    int64_t warmup = 0;
    double final_fraction = 0.1;
    double decay_fraction = 0.2;
    void Visit(ConfigVisitor& v);
  } optimizer;

  struct Parallel {
    int64_t dp = 0;
    int64_t cp = 1;
    std::string mesh = "static";
    int64_t pp = 1;
    int64_t tp = 1;
    int64_t tp_chunks = 1;
    bool tp_overlap = true;
    std::string schedule = "1f1b";
    int64_t chunks = 0;
    int64_t zero = 1;
    bool overlap = true;
    bool prefetch = true;
    std::string copy_engines = "auto";
    int64_t bucket_bytes = int64_t{25} << 20;
    std::string cost_model;
    bool cost_model_any_device = false;
    void Visit(ConfigVisitor& v);
    // Ranks that have a copy of the model's stage: one axis, which dp and cp share.
    int64_t data_ranks() const { return dp * cp; }
  } parallel;

  struct Runtime {
    std::string device = "auto";
    std::string dtype = "f32";
    std::string fp8 = "none";
    int64_t threads = 0;
    std::string stream = "inline";
    std::string recompute = "none";
    int64_t loss_chunk = 0;
    bool graphs = false;
    double timeout_seconds = 600;
    int64_t host_memory_bytes = -1;
    int64_t device_memory_bytes = -1;
    double peak_tflops = 0;
    void Visit(ConfigVisitor& v);
  } runtime;

  struct Evaluate {
    int64_t every = 0;
    int64_t samples = 64;
    void Visit(ConfigVisitor& v);
  } evaluate;

  struct Sample {
    std::string prompt;
    int64_t tokens = 0;
    double temperature = 0.8;
    int64_t top_k = 40;
    void Visit(ConfigVisitor& v);
  } sample;

  struct Checkpoint {
    int64_t every = 0;
    int64_t keep = 2;
    bool async = true;
    std::string resume = "auto";
    std::string initial;
    void Visit(ConfigVisitor& v);
  } checkpoint;

  struct Snapshot {
    int64_t every = 1;
    int64_t part_bytes = int64_t{64} << 20;
    std::string keeper;
    void Visit(ConfigVisitor& v);
  } snapshot;

  struct Spikes {
    std::string nonfinite = "skip";
    double max_loss = 0;
    int64_t max_skipped = 20;
    void Visit(ConfigVisitor& v);
  } spikes;

  struct Metrics {
    bool json = true;
    bool tensorboard = false;
    bool curve = true;
    int64_t log_every = 1;
    std::string flight_directory;
    int64_t trace_steps = 0;
    int64_t trace_from = 4;
    std::string trace_file;
    void Visit(ConfigVisitor& v);
  } metrics;

  void Visit(ConfigVisitor& v);

  // Fills what is left to defaults for a world of `ranks` (parallel.dp, metrics.flight_directory,
  // the model's own) and lowers batch.micro to what a rank can have. Then checks what single ranges
  // cannot: INVALID_ARGUMENT with all errors, one a line, each naming its field. Calling it again
  // changes nothing.
  absl::Status Resolve(int ranks);
  // Tokens of a micro-batch on one rank, at most. Resolved.
  int64_t micro_batch_tokens() const {
    return data.documents ? batch.capacity : batch.micro * data.sequence_length;
  }
  // INVALID_ARGUMENT when there is nothing to train on. Apart from Resolve, because a memory plan
  // or a benchmark needs no data.
  absl::Status RequireData() const;

 private:
  // The part of Resolve for data.documents.
  void ResolveDocuments(std::vector<std::string>* errors);
};

}  // namespace stretto

#endif  // STRETTO_TRAIN_CONFIG_H_
