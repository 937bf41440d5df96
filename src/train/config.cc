#include "stretto/train/config.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "stretto/model/graph.h"
#include "stretto/plan/schedule.h"

namespace stretto {
namespace {

constexpr double kMaxTimeoutSeconds = 1e8;  // three years; fits all clocks in nanoseconds
constexpr int64_t kMaxThreads = 4096;

}  // namespace

void TrainConfig::Data::Visit(ConfigVisitor& v) {
  v.Field("train", &train, "token files to train on: a path or a glob, read in sorted order");
  v.Field("validation", &validation, "token files to evaluate on; empty: no evaluation");
  v.Field(
      "tokenizer", &tokenizer,
      "\"bytes\", a .tiktoken file, or a directory with vocab.json and merges.txt; it names the "
      "end-of-text id and turns prompts into tokens");
  v.Field("sequence_length", &sequence_length,
          "tokens of a sample; with `documents` of a document at most, longer ones are cut",
          {.min = 1});
  v.Field("shuffle", &shuffle,
          "visit the samples of each epoch in a random order given by the seed");
  v.Field("document_attention", &document_attention,
          "documents inside a sample do not see each other, and positions restart with each");
  v.Field("documents", &documents,
          "train on documents as they are, of unequal length, instead of samples of equal length; "
          "batch.tokens says how many a step takes");
  v.Field("prefetch", &prefetch, "read the next batch in a background thread");
}

void TrainConfig::Batch::Visit(ConfigVisitor& v) {
  v.Field("global", &global, "samples per optimizer step, over all ranks", {.min = 1});
  v.Field("micro", &micro, "samples per micro-batch at most; sets the activation memory",
          {.min = 1});
  v.Field("tokens", &tokens,
          "with data.documents in place of `global`: tokens per optimizer step at most, over all "
          "ranks; 0: `global` documents of data.sequence_length",
          {.min = 0});
  v.Field("capacity", &capacity,
          "with data.documents in place of `micro`: tokens of a micro-batch on a rank at most; 0: "
          "data.sequence_length",
          {.min = 0});
}

void TrainConfig::Optimizer::Visit(ConfigVisitor& v) {
  v.Choice("name", &name, {"adamw"}, "update rule");
  v.Field("lr", &lr, "peak learning rate", {.min = 0});
  v.Field("beta1", &beta1, "decay of the mean of gradients, below 1", {.min = 0, .max = 1});
  v.Field("beta2", &beta2, "decay of the mean of squared gradients, below 1", {.min = 0, .max = 1});
  v.Field("eps", &eps, "added to the root of the second moment, above 0", {.min = 0});
  v.Field("weight_decay", &weight_decay,
          "decoupled weight decay, on matrices only (not on norms and biases)", {.min = 0});
  v.Choice(
      "moments", &moments, {"f32", "bf16"},
      "type in which the moments are kept (f64 parameters: f64); bf16: half the memory, rounded "
      "stochastically");
  v.Field("masters", &masters,
          "keep an f32 copy of bf16 parameters and update that; false: update the parameters "
          "themselves, rounded stochastically. Without effect for other types");
  v.Field("offload", &offload,
          "keep moments and masters in host memory, which the GPU reads and writes across the bus "
          "in the update; without effect on the CPU");
  v.Field("clip_norm", &clip_norm,
          "longest global gradient that is applied unscaled; 0: no clipping", {.min = 0});
  v.Choice("schedule", &schedule, {"cosine", "linear", "wsd", "constant"},
           "learning rate after the warm-up; wsd: constant, then a short decay at the end");
  v.Field("warmup", &warmup, "steps over which the learning rate rises linearly to its peak",
          {.min = 0});
  v.Field("final_fraction", &final_fraction,
          "learning rate at the end of cosine, linear and wsd, as a fraction of the peak",
          {.min = 0, .max = 1});
  v.Field("decay_fraction", &decay_fraction, "fraction of all steps in which wsd decays",
          {.min = 0, .max = 1});
}

void TrainConfig::Parallel::Visit(ConfigVisitor& v) {
  v.Field("dp", &dp, "data-parallel ranks; 0: all ranks, divided by cp, pp and tp", {.min = 0});
  v.Field("cp", &cp,
          "ranks that share each document, with data.documents and mesh static (context "
          "parallelism); they and dp are one axis of dp x cp ranks",
          {.min = 1});
  v.Choice(
      "mesh", &mesh, {"static", "dynamic", "unbalanced"},
      "how ranks share the documents of a step: static: always cp of them; dynamic: planned "
      "for every step, as many ranks for a document as it needs, so that all ranks have as "
      "much to do; unbalanced: the same in the order in which documents come, to compare with");
  v.Field("pp", &pp, "ranks of a pipeline, each with a part of the model's blocks", {.min = 1});
  v.Field("tp", &tp,
          "ranks of a tensor axis, which share each layer: heads, inner features, the vocabulary, "
          "and the tokens in between; on one machine",
          {.min = 1});
  v.Field("tp_chunks", &tp_chunks,
          "pieces that a micro-batch's tokens are cut into on a tensor axis: one travels while "
          "products run on another; 1: products wait for the whole exchange",
          {.min = 1, .max = TokenCut::kMostPieces});
  v.Field("tp_overlap", &tp_overlap,
          "on a tensor axis, compute weights' gradients while inputs' gradients travel");
  v.Choice("schedule", &schedule, {"gpipe", "1f1b", "interleaved", "zb-h1", "v-shaped"},
           "order of forward and backward in a pipeline; docs/parallelism.md has pictures");
  v.Field("chunks", &chunks,
          "stages on each rank of a pipeline; 0: as the schedule wants, 2 for interleaved",
          {.min = 0, .max = 1 << 16});
  v.Field(
      "zero", &zero,
      "what each data-parallel rank keeps a shard of only: 1: the optimizer's state; 2: gradients, "
      "too, reduced in every micro-batch; 3: parameters, too, gathered before they are needed",
      {.min = 1, .max = 3});
  v.Field("overlap", &overlap, "reduce gradients while the backward pass still runs");
  v.Field("prefetch", &prefetch, "gather parameters ahead of the layers that need them");
  v.Choice(
      "copy_engines", &copy_engines, {"auto", "on", "off"},
      "GPUs of one machine exchange parameters, gradients and, on a tensor axis, activations "
      "through their copy engines, so that products beside an exchange keep all multiprocessors; "
      "auto: where all of dp or of tp can; on: warns where they cannot; off: by NCCL's kernels");
  v.Field("bucket_bytes", &bucket_bytes,
          "gradient bytes that are reduced, and with zero 3 gathered, together, about", {.min = 1});
  v.Field("cost_model", &cost_model,
          "file of `stretto-bench fit` for this model, from which a dynamic mesh knows what "
          "documents cost; it is kept with checkpoints, and a run that goes on takes that unless "
          "this names another file; empty: from the model's FLOPs");
  v.Field("cost_model_any_device", &cost_model_any_device,
          "plan with a cost model also when it was measured on another device");
}

void TrainConfig::Runtime::Visit(ConfigVisitor& v) {
  v.Choice("device", &device, {"auto", "cpu", "cuda"},
           "where to compute; auto: a GPU if one is found");
  v.Choice(
      "dtype", &dtype, {"f64", "f32", "bf16"},
      "type of parameters and activations in forward and backward; f64 exists on the CPU only");
  v.Choice(
      "fp8", &fp8, {"none", "e4m3", "hybrid"},
      "linear layers of transformer blocks multiply in FP8, for dtype bf16: e4m3: all operands "
      "E4M3; hybrid: gradients E5M2");
  v.Field("threads", &threads,
          "CPU threads of this process; 0: the cores of the machine shared out among its ranks",
          {.min = 0});
  v.Choice("stream", &stream, {"inline", "fifo"},
           "inline: CPU work runs in the calling thread; fifo: in a thread of its own, in order");
  v.Choice("recompute", &recompute, {"none", "norms", "block"},
           "activations computed again in backward instead of kept: none, those of norms and other "
           "cheap layers, or all inside a block");
  v.Field("loss_chunk", &loss_chunk,
          "vocabulary entries whose logits exist at the same time; 0: all of them", {.min = 0});
  v.Field("graphs", &graphs,
          "on a GPU, launch the work of a micro-batch as one CUDA graph when a batch of the same "
          "shape comes back");
  v.Field("timeout_seconds", &timeout_seconds,
          "seconds after which a communication that does not complete is an error", {.min = 0});
  v.Field("host_memory_bytes", &host_memory_bytes,
          "budget of this process for buffers in host memory, in bytes; -1: no limit", {.min = -1});
  v.Field("device_memory_bytes", &device_memory_bytes,
          "budget of this process for buffers in GPU memory, in bytes; -1: no limit", {.min = -1});
  v.Field("peak_tflops", &peak_tflops,
          "peak of one rank in TFLOP/s, the base of MFU; 0: measured at start where possible, else "
          "MFU is left out",
          {.min = 0});
}

void TrainConfig::Evaluate::Visit(ConfigVisitor& v) {
  v.Field("every", &every, "steps between evaluations; 0: only at the end", {.min = 0});
  v.Field("samples", &samples,
          "validation samples used at most, over all ranks; always the first ones", {.min = 1});
}

void TrainConfig::Sample::Visit(ConfigVisitor& v) {
  v.Field("prompt", &prompt,
          "text to continue at the end of the run; empty: start from end-of-text");
  v.Field("tokens", &tokens, "tokens to generate at the end of the run; 0: none", {.min = 0});
  v.Field("temperature", &temperature, "divides the logits; 0: always the likeliest token",
          {.min = 0});
  v.Field("top_k", &top_k, "draw from this many likeliest tokens; 0: from all", {.min = 0});
}

void TrainConfig::Checkpoint::Visit(ConfigVisitor& v) {
  v.Field("every", &every,
          "steps between checkpoints; 0: only at the end and when a signal asks to stop",
          {.min = 0});
  v.Field("keep", &keep, "newest checkpoints that are kept; 0: all", {.min = 0});
  v.Field("async", &async, "write from a background thread while training goes on");
  v.Choice("resume", &resume, {"auto", "never", "must"},
           "auto: go on from the newest checkpoint in `output` if there is one; never: start anew, "
           "refused when `output` holds checkpoints; must: fail when there is none");
  v.Field("initial", &initial,
          "checkpoint (a step directory, or a directory of them) whose weights the run starts from "
          "when it does not resume; empty: random weights");
}

void TrainConfig::Snapshot::Visit(ConfigVisitor& v) {
  v.Field(
      "every", &every,
      "steps between snapshots in the memory of a keeper, where there is one; 0: none, and none "
      "is restored",
      {.min = 0});
  v.Field(
      "part_bytes", &part_bytes,
      "bytes of state that the optimizer updates at once while a snapshot is being copied; each "
      "such part waits for its own copy",
      {.min = 1});
  v.Field(
      "keeper", &keeper,
      "this node's stretto-keeper: the path of its socket or host:port; empty: what STRETTO_KEEPER "
      "says, if anything");
}

void TrainConfig::Spikes::Visit(ConfigVisitor& v) {
  v.Choice("nonfinite", &nonfinite, {"skip", "stop"},
           "what all ranks do with a step whose loss or gradient is not finite");
  v.Field("max_loss", &max_loss,
          "skip steps whose mean loss exceeds this, in nats per token; 0: off", {.min = 0});
  v.Field("max_skipped", &max_skipped, "stop after this many skipped steps in a row", {.min = 1});
}

void TrainConfig::Metrics::Visit(ConfigVisitor& v) {
  v.Field("json", &json, "write metrics.jsonl, one line a step");
  v.Field("tensorboard", &tensorboard, "write a TensorBoard event file");
  v.Field("curve", &curve, "write loss.svg at the end");
  v.Field("log_every", &log_every, "steps between lines on standard output", {.min = 1});
  v.Field("flight_directory", &flight_directory,
          "where ranks dump their flight recorder on a hang or an error; empty: `output`/flight");
  v.Field("trace_steps", &trace_steps,
          "steps whose actions are traced with their times, all ranks into one file for Perfetto; "
          "0: none",
          {.min = 0});
  v.Field("trace_from", &trace_from, "first of these steps; the first step of a run is 1",
          {.min = 1});
  v.Field("trace_file", &trace_file, "where the trace goes; empty: `output`/trace.json");
}

void TrainConfig::Visit(ConfigVisitor& v) {
  v.Field("seed", &seed, "key of all random numbers: initial weights, data order, sampling",
          {.min = 0});
  v.Field("steps", &steps, "optimizer steps of the whole run, including those before a restart",
          {.min = 1});
  v.Field("output", &output,
          "directory for metrics, checkpoints and the loss curve; made when absent");
  v.Section("model", &model, "the network");
  v.Section("data", &data, "what it learns from");
  v.Section("batch", &batch, "how much of it a step takes");
  v.Section("optimizer", &optimizer, "update rule and learning rate");
  v.Section("parallel", &parallel, "how the ranks share the work");
  v.Section("runtime", &runtime, "device, precision and memory");
  v.Section("evaluate", &evaluate, "validation loss");
  v.Section("sample", &sample, "text generated at the end");
  v.Section("checkpoint", &checkpoint, "saving and resuming");
  v.Section("snapshot", &snapshot, "copies in memory that outlive the ranks (docs/snapshots.md)");
  v.Section("spikes", &spikes, "steps that went wrong");
  v.Section("metrics", &metrics, "what is written down");
}

void TrainConfig::ResolveDocuments(std::vector<std::string>* errors) {
  const auto fail = [&](auto... parts) { errors->push_back(absl::StrCat(parts...)); };
  const bool fixed = parallel.mesh == "static";
  if (batch.capacity == 0) batch.capacity = data.sequence_length;
  // A step's batches are held in memory; this also keeps products far from overflow.
  constexpr int64_t kMostTokens = int64_t{1} << 40;
  const int64_t ranks = parallel.data_ranks();
  const bool many = batch.tokens == 0 && batch.global > kMostTokens / data.sequence_length;
  // Not by the number of ranks: a run may go on with fewer.
  if (batch.tokens == 0 && !many) batch.tokens = batch.global * data.sequence_length;
  if (batch.capacity > kMostTokens || batch.tokens > kMostTokens || many) {
    fail("batch.capacity is ", batch.capacity, " and batch.tokens ",
         many ? absl::StrCat(batch.global, " (batch.global) x ", data.sequence_length)
              : absl::StrCat(batch.tokens),
         "; at most 2^40 tokens are supported: lower them.");
    return;
  }
  batch.micro = 1;  // of an evaluation
  if (batch.tokens < data.sequence_length) {
    fail("batch.tokens is ", batch.tokens, ", less than the longest document's ",
         data.sequence_length, " (data.sequence_length); raise one or lower the other.");
  }
  const int64_t share = fixed ? parallel.cp : ranks;
  if (data.sequence_length > batch.capacity * share) {
    fail("data.sequence_length is ", data.sequence_length, ", but ", share,
         share == 1 ? " rank holds " : " ranks together hold ", batch.capacity * share,
         " tokens of a document (batch.capacity ", batch.capacity, fixed ? ", parallel.cp " : "",
         fixed ? absl::StrCat(parallel.cp) : "", "); raise batch.capacity",
         fixed ? ", parallel.cp" : "", " or shorten the documents.");
  }
  if (!fixed && parallel.cp > 1) {
    fail("parallel.cp is ", parallel.cp, " and parallel.mesh ", parallel.mesh,
         ", which gives each document as many ranks as it needs; set parallel.cp to 1.");
  }
  if (parallel.zero > 1) {
    fail("parallel.zero is ", parallel.zero,
         " and data.documents on; ranks that have unequal numbers of micro-batches keep whole "
         "gradients and parameters: set parallel.zero to 1.");
  }
  if (parallel.pp > 2 && parallel.schedule == "interleaved") {
    fail("parallel.schedule is interleaved with parallel.pp ", parallel.pp,
         " and data.documents on; of more than 2 ranks it needs room for messages that depends on "
         "the documents: choose 1f1b, zb-h1 or v-shaped.");
  }
  if (parallel.pp > 1 && parallel.schedule == "interleaved" && parallel.chunks > 2) {
    fail("parallel.chunks is ", parallel.chunks,
         " and data.documents on; the interleaved schedule "
         "then has at most 2: set it to 2.");
  }
  if (parallel.pp > 1 && parallel.schedule == "gpipe") {
    fail(
        "parallel.schedule is gpipe and data.documents on; its memory grows with the documents of "
        "a step: choose 1f1b, interleaved, zb-h1 or v-shaped.");
  }
}

absl::Status TrainConfig::Resolve(int ranks) {
  std::vector<std::string> errors;
  auto fail = [&](auto... parts) { errors.push_back(absl::StrCat(parts...)); };

  if (ranks < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("A run needs at least 1 rank, not ", ranks, "."));
  }
  // A program may have set fields without ParseConfig: check ranges and choices here too. What
  // follows relies on them.
  TrainConfig scratch;
  STRETTO_RETURN_IF_ERROR(
      ParseConfig(PrintConfig(ConfigRef(this)), "the configuration", {}, ConfigRef(&scratch)));

  if (absl::Status s = model.Resolve(); !s.ok()) errors.emplace_back(s.message());

  // Ranks of a copy of the model, times those that share a document.
  int64_t replica = 1;
  std::vector<std::string> names;
  std::vector<int64_t> sizes;
  for (const auto& [name, size] :
       {std::pair("parallel.cp", parallel.cp), std::pair("parallel.pp", parallel.pp),
        std::pair("parallel.tp", parallel.tp)}) {
    replica = size <= ranks && replica <= ranks ? replica * size : int64_t{ranks} + 1;
    if (size == 1) continue;
    names.emplace_back(name);
    sizes.push_back(size);
  }
  const auto run = absl::StrCat(ranks, ranks == 1 ? " rank runs" : " ranks run");
  if (parallel.dp == 0 && ranks % replica == 0) parallel.dp = ranks / replica;
  if (parallel.dp == 0) {
    fail(absl::StrJoin(names, " times "), " is ", absl::StrJoin(sizes, " x "), " but ", run,
         "; their number must be a multiple of it.");
  } else if (parallel.dp > ranks || replica > ranks || parallel.dp * replica != ranks) {
    std::string axes = absl::StrCat("parallel.dp is ", parallel.dp);
    for (size_t i = 0; i < names.size(); ++i) {
      absl::StrAppend(&axes, i + 1 < names.size() ? ", " : " and ", names[i], " ", sizes[i]);
    }
    fail(axes, " but ", run, "; set parallel.dp to 0 to use all ranks.");
  } else if (data.documents) {
    ResolveDocuments(&errors);
  } else if (batch.global < parallel.dp) {
    fail("batch.global is ", batch.global, ", so some of the ", parallel.dp,
         " data-parallel ranks would have nothing to do; raise it or start fewer ranks.");
  } else {
    // Frames are planned for a full micro-batch: larger than a rank's share is memory for nothing.
    batch.micro = std::min(batch.micro, (batch.global + parallel.dp - 1) / parallel.dp);
  }
  if (!data.documents) {
    const auto needs = [&](const char* field, const auto& value) {
      fail(field, " is ", value,
           " but data.documents is off, and only documents of unequal length are planned; set "
           "data.documents=true, or ",
           field, " back.");
    };
    if (parallel.cp > 1) needs("parallel.cp", parallel.cp);
    if (parallel.mesh != "static") needs("parallel.mesh", parallel.mesh);
    if (batch.tokens > 0) needs("batch.tokens", batch.tokens);
    if (batch.capacity > 0) needs("batch.capacity", batch.capacity);
  }

  if (data.sequence_length > model.max_positions) {
    fail("data.sequence_length is ", data.sequence_length, " but the model has ",
         model.max_positions, " positions; raise model.max_positions or shorten the samples.");
  }
  // Products beyond these bounds would overflow in the memory plan. A batch of the data loader
  // counts its tokens in 32 bits.
  const double step_tokens =
      data.documents ? static_cast<double>(batch.capacity)
                     : static_cast<double>(batch.micro) * static_cast<double>(data.sequence_length);
  const std::string tokens =
      data.documents ? absl::StrCat("batch.capacity (", batch.capacity, ")")
                     : absl::StrCat("batch.micro (", batch.micro, ") times data.sequence_length (",
                                    data.sequence_length, ")");
  if (step_tokens > std::numeric_limits<int32_t>::max()) {
    fail(tokens, " is more than 2^31 - 1 tokens; lower ", data.documents ? "it." : "one of them.");
  }
  const int64_t widest = std::max({model.vocabulary, model.ffn, model.hidden});
  if (step_tokens * static_cast<double>(widest) > 0x1p50) {
    fail(tokens, " times the widest layer (", widest, ") is more than 2^50; lower one of them.");
  }
  if (data.tokenizer.empty()) {
    fail("data.tokenizer is empty; use \"bytes\" or name a .tiktoken file or a directory.");
  }
  if (sample.tokens > 0 && data.tokenizer == "bytes" && model.vocabulary < 257) {
    fail("model.vocabulary is ", model.vocabulary,
         " but the byte tokenizer that sample.prompt needs has 257 ids; raise it or set "
         "sample.tokens to 0.");
  }
  if (evaluate.every > 0 && data.validation.empty()) {
    fail("evaluate.every is ", evaluate.every,
         " but data.validation is empty; name token files to evaluate on or set it to 0.");
  }

  if (optimizer.beta1 >= 1) fail("optimizer.beta1 is ", optimizer.beta1, "; it must be below 1.");
  if (optimizer.beta2 >= 1) fail("optimizer.beta2 is ", optimizer.beta2, "; it must be below 1.");
  if (optimizer.eps <= 0) fail("optimizer.eps is ", optimizer.eps, "; it must be above 0.");
  if (optimizer.moments == "bf16" && runtime.dtype == "f64") {
    fail("optimizer.moments bf16 needs runtime.dtype f32 or bf16, not f64; set it to f32.");
  }

  if (const auto kind = ParseScheduleKind(parallel.schedule); kind.ok()) {
    const bool fixed = *kind != ScheduleKind::kInterleaved;
    const int64_t wanted = *kind == ScheduleKind::kVShaped ? 2 : fixed ? 1 : 0;
    if (parallel.chunks == 0) parallel.chunks = fixed ? wanted : 2;
    if (parallel.pp == 1) {
      parallel.chunks = 1;  // without a pipeline there is one stage
    } else if (fixed && parallel.chunks != wanted) {
      fail("parallel.chunks is ", parallel.chunks, " but the ", parallel.schedule, " schedule has ",
           wanted, " on each rank; set it to 0.");
    }
    if (parallel.pp * parallel.chunks > model.layers) {
      fail("parallel.pp (", parallel.pp, ") times parallel.chunks (", parallel.chunks,
           ") is more than model.layers (", model.layers,
           "): each stage needs a block; lower one of them.");
    }
  }
  if (parallel.pp > 1) {
    // A program has an entry for each of them on each stage.
    constexpr int64_t kMost = 65536;
    const int64_t share = batch.global / std::max<int64_t>(1, parallel.dp);
    if (!data.documents && share / batch.micro > kMost) {
      fail("batch.global (", batch.global, ") makes about ", share / batch.micro,
           " micro-batches of batch.micro (", batch.micro, ") for each pipeline; at most ", kMost,
           " are supported: raise batch.micro or parallel.dp, or lower batch.global.");
    }
    if (runtime.fp8 != "none") {
      fail("runtime.fp8 is ", runtime.fp8, " and parallel.pp ", parallel.pp,
           "; layers in FP8 run without a pipeline only: set one of them back.");
    }
    if (sample.tokens > 0) {
      fail("sample.tokens is ", sample.tokens, " and parallel.pp ", parallel.pp,
           "; text is sampled from a whole model only: set sample.tokens=0, and sample later from "
           "the checkpoint with parallel.pp=1.");
    }
  }
  if (parallel.tp > 1) {
    // Each rank of the axis has one of these at least.
    const auto enough = [&](const char* what, int64_t count) {
      if (count >= parallel.tp) return;
      fail("parallel.tp is ", parallel.tp, " but model.", what, " ", count,
           ", and each rank of a tensor axis needs one at least; lower parallel.tp.");
    };
    // Ranks may share a key head, but no query head.
    const int64_t key_heads = model.kv_heads > 0 ? model.kv_heads : model.heads;
    const int64_t share = model.heads / key_heads;
    if ((parallel.tp + key_heads - 1) / key_heads > std::max<int64_t>(1, share)) {
      if (share <= 1) {
        enough("kv_heads", key_heads);
      } else {
        fail("parallel.tp is ", parallel.tp, " but model.kv_heads ", key_heads, " with ", share,
             " query heads each, and each rank of a tensor axis needs one of these at least; lower "
             "parallel.tp.");
      }
    }
    enough("vocabulary", model.vocabulary);
    if (model.ffn > 0) enough("ffn", model.ffn);
    if (!model.rotary()) enough("max_positions", model.max_positions);
    if (runtime.fp8 != "none") {
      fail("runtime.fp8 is ", runtime.fp8, " and parallel.tp ", parallel.tp,
           "; layers in FP8 run without a tensor axis only: set one of them back.");
    }
    if (runtime.graphs) {
      fail("runtime.graphs is on and parallel.tp ", parallel.tp,
           "; layers that talk to other ranks are not captured: set one of them back.");
    }
    if (sample.tokens > 0) {
      fail("sample.tokens is ", sample.tokens, " and parallel.tp ", parallel.tp,
           "; text is sampled from a whole model only: set sample.tokens=0, and sample later from "
           "the checkpoint with parallel.tp=1.");
    }
  }
  if (runtime.dtype == "f64" && runtime.device == "cuda") {
    fail("runtime.dtype f64 exists on the CPU only; set runtime.device to cpu or choose bf16.");
  }
  if (runtime.fp8 != "none" && runtime.dtype != "bf16") {
    fail("runtime.fp8 is ", runtime.fp8, " but runtime.dtype is ", runtime.dtype,
         "; FP8 layers need a model in bf16.");
  }
  if (runtime.timeout_seconds <= 0 || runtime.timeout_seconds > kMaxTimeoutSeconds) {
    fail("runtime.timeout_seconds is ", runtime.timeout_seconds,
         "; it must be above 0 and at most ", kMaxTimeoutSeconds, ".");
  }
  if (runtime.threads > kMaxThreads) {
    fail("runtime.threads is ", runtime.threads, "; give at most ", kMaxThreads,
         ", or 0 for the cores of the machine.");
  }
  if (runtime.host_memory_bytes == 0) {
    fail("runtime.host_memory_bytes is 0; give a number of bytes, or -1 for no limit.");
  }
  if (runtime.device_memory_bytes == 0) {
    fail("runtime.device_memory_bytes is 0; give a number of bytes, or -1 for no limit.");
  }
  if (output.empty()) fail("output is empty; name a directory.");
  if (metrics.flight_directory.empty() && !output.empty()) {
    metrics.flight_directory = absl::StrCat(output, "/flight");
  }
  if (metrics.trace_file.empty() && !output.empty()) {
    metrics.trace_file = absl::StrCat(output, "/trace.json");
  }
  if (metrics.trace_steps > 0 && metrics.trace_from > steps) {
    fail("metrics.trace_from is ", metrics.trace_from, " but the run has only ", steps,
         " steps; lower it, or set metrics.trace_steps=0.");
  }

  if (errors.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(errors, "\n"));
}

absl::Status TrainConfig::RequireData() const {
  if (!data.train.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "data.train is empty; name the token files to train on (stretto-tokenize makes them from "
      "text).");
}

}  // namespace stretto
