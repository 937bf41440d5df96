// Where step records go: a JSON-lines file, the console, TensorBoard, and a picture of the loss.
#ifndef STRETTO_OBSERVE_METRICS_H_
#define STRETTO_OBSERVE_METRICS_H_

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/observe/step_stats.h"

namespace stretto {

// One rank (by custom rank 0) writes to a sink, steps in ascending order. Errors name the file; a
// sink that failed stays usable, so that a full disk need not end a run.
class MetricsSink {
 public:
  virtual ~MetricsSink() = default;
  virtual absl::Status Write(const StepStats& stats) = 0;
  // Whether the records that an earlier run has left end just before this step.
  virtual bool Lacks(int64_t /*step*/) const { return false; }
  // Nothing more will come. Idempotent; destructors call it and drop its error.
  virtual absl::Status Finish() = 0;
};

// One JSON object a line, each with one write call, so that a killed run loses no finished step.
// Keys are the names in StepStats and `time` (Unix seconds); eval_loss only when evaluated. Values
// that are not finite, and an unknown MFU, are null.
class JsonLinesSink : public MetricsSink {
 public:
  // Appends to `path`. `first_step` is the first step that this run will write: lines of that step
  // and later ones, and a line cut off by a kill, are removed first, so each step appears once.
  // Pass 1 to start the file anew.
  static absl::StatusOr<std::unique_ptr<JsonLinesSink>> Open(const std::string& path,
                                                             int64_t first_step);
  ~JsonLinesSink() override;
  absl::Status Write(const StepStats& stats) override;
  bool Lacks(int64_t step) const override { return newest_ == step - 1; }
  absl::Status Finish() override;

 private:
  JsonLinesSink(std::string path, int fd, int64_t newest)
      : path_(std::move(path)), fd_(fd), newest_(newest) {}
  std::string path_;
  int fd_;
  int64_t newest_;  // step that the file has; 0: none
};

// The object that JsonLinesSink writes, without the line end. `unix_seconds` becomes `time`.
std::string StepStatsJson(const StepStats& stats, double unix_seconds);

struct ConsoleOptions {
  int64_t total_steps = 0;  // 0: unknown; no progress bar then
  int64_t log_every =
      1;  // steps between lines; skipped, evaluated and non-finite steps always get one
  enum class When : uint8_t { kAuto, kNever, kAlways };
  When live = When::kAuto;    // a progress line that is redrawn; auto: when the file is a terminal
  When colour = When::kAuto;  // auto: on a terminal, unless NO_COLOR is set
};

// One aligned line a step with human units.
class ConsoleSink : public MetricsSink {
 public:
  // `file` is not owned and must outlive the sink.
  explicit ConsoleSink(std::FILE* file, ConsoleOptions options = {});
  ~ConsoleSink() override;
  absl::Status Write(const StepStats& stats) override;
  // Removes the progress line.
  absl::Status Finish() override;

 private:
  void ClearProgress(std::string* out);
  void DrawProgress(const StepStats& stats, std::string* out);

  std::FILE* file_;
  ConsoleOptions options_;
  bool live_, colour_;
  bool progress_shown_ = false;
  double smooth_step_ms_ = 0;
};

// The line that ConsoleSink prints, without colour and line end.
std::string StepStatsLine(const StepStats& stats, int64_t total_steps);

// A TensorBoard event file (TFRecord frames of hand-encoded protocol buffers) in `directory`, which
// is created when absent. Tags: train/loss, train/grad_norm, train/lr, eval/loss, perf/...
class TensorBoardSink : public MetricsSink {
 public:
  // `first_step` as in JsonLinesSink::Open: the file tells TensorBoard to forget points of that
  // step and later ones that an earlier run left in the same directory.
  static absl::StatusOr<std::unique_ptr<TensorBoardSink>> Open(const std::string& directory,
                                                               int64_t first_step);
  ~TensorBoardSink() override;
  absl::Status Write(const StepStats& stats) override;
  absl::Status Finish() override;
  const std::string& path() const { return path_; }

 private:
  TensorBoardSink(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  std::string path_;
  int fd_;
};

struct LossPoint {
  int64_t step = 0;
  double train = 0;                  // nats per token; gaps where not finite
  std::optional<double> validation;  // nats per token
};
// A horizontal line to compare with, e.g. an n-gram model's loss.
struct LossReference {
  std::string label;
  double loss = 0;  // nats per token
};

// An SVG that stands alone: axes, ticks, legend; no scripts, no external fonts. Points in ascending
// steps; with many, a moving median is drawn over the faint raw curve. INVALID_ARGUMENT when no
// point has a finite loss.
absl::Status WriteLossCurve(const std::string& path, const std::vector<LossPoint>& points,
                            const std::string& title,
                            const std::optional<LossReference>& reference = std::nullopt);

// The points that a metrics.jsonl file holds, in its order; for the curve of a run that was
// resumed. Steps that were skipped have no finite training loss here.
absl::StatusOr<std::vector<LossPoint>> ReadLossPoints(const std::string& metrics_jsonl);

}  // namespace stretto

#endif  // STRETTO_OBSERVE_METRICS_H_
