#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/observe/file.h"
#include "stretto/observe/metrics.h"

namespace stretto {
namespace {

constexpr char kReset[] = "\033[0m";
constexpr char kDim[] = "\033[2m";
constexpr char kRed[] = "\033[31m";
constexpr char kGreen[] = "\033[32m";
constexpr char kCyan[] = "\033[36m";

bool Decide(ConsoleOptions::When when, bool automatic) {
  if (when == ConsoleOptions::When::kAuto) return automatic;
  return when == ConsoleOptions::When::kAlways;
}

// 5 columns: "  812", "83.1k", " 1.2M".
std::string Rate(double value) {
  if (!std::isfinite(value) || value < 0) return "    -";
  if (value < 999.5) return absl::StrFormat("%5.0f", value);
  const char* unit = "kMGT";
  value /= 1000;
  while (value >= 999.5 && unit[1] != '\0') {
    value /= 1000;
    ++unit;
  }
  if (value < 99.95) return absl::StrFormat("%4.1f%c", value, *unit);
  return absl::StrFormat("%4.0f%c", value, *unit);
}

// 8 columns: "  1.23ms", " 123.4ms", "  12.34s".
std::string Duration(double ms) {
  if (!std::isfinite(ms)) return "       -";
  if (ms < 9.995) return absl::StrFormat("%6.2fms", ms);
  if (ms < 9999.5) return absl::StrFormat("%6.1fms", ms);
  return absl::StrFormat("%7.2fs", ms / 1000);
}

// 8 columns: " 1.23GiB".
std::string Memory(int64_t bytes) {
  double value = static_cast<double>(bytes) / (1 << 20);
  if (value < 999.5) return absl::StrFormat("%5.0fMiB", value);
  value /= 1024;
  if (value < 99.95) return absl::StrFormat("%5.2fGiB", value);
  return absl::StrFormat("%5.0fGiB", value);
}

// "1:05", "2:03:04", "3d 04h".
std::string Clock(double seconds) {
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 3600) return absl::StrFormat("%d:%02d", s / 60, s % 60);
  if (s < 86400) return absl::StrFormat("%d:%02d:%02d", s / 3600, s / 60 % 60, s % 60);
  return absl::StrFormat("%dd %02dh", s / 86400, s / 3600 % 24);
}

class Painter {
 public:
  explicit Painter(bool on) : on_(on) {}
  std::string operator()(const char* colour, const std::string& text) const {
    return on_ ? absl::StrCat(colour, text, kReset) : text;
  }

 private:
  bool on_;
};

std::string FormatLine(const StepStats& s, int64_t total, const Painter& paint) {
  const std::string bar = paint(kDim, " | ");
  std::string line = "step ";
  if (total > 0) {
    const auto width = static_cast<int>(std::to_string(total).size());
    absl::StrAppendFormat(&line, "%*d/%d", width, s.step, total);
  } else {
    absl::StrAppendFormat(&line, "%6d", s.step);
  }
  const bool sane = std::isfinite(s.loss) && !s.skipped;
  absl::StrAppend(&line, bar, "loss ",
                  paint(sane ? kGreen : kRed, absl::StrFormat("%8.4f", s.loss)));
  absl::StrAppend(&line, bar, absl::StrFormat("norm %7.3f", s.grad_norm));
  absl::StrAppend(&line, bar, absl::StrFormat("lr %.2e", s.lr));
  absl::StrAppend(&line, bar, Duration(s.step_ms));
  absl::StrAppend(&line, bar, Rate(s.tokens_per_second), " tok/s");
  if (s.mfu_causal > 0) {
    absl::StrAppend(&line, bar, absl::StrFormat("mfu %4.1f%%", 100 * s.mfu_causal));
    if (s.mfu_palm > 0)
      absl::StrAppend(&line, absl::StrFormat(" (palm %4.1f%%)", 100 * s.mfu_palm));
  }
  if (s.memory_bytes > 0) absl::StrAppend(&line, bar, Memory(s.memory_bytes));
  if (s.comm_exposed_ms > 0 && s.step_ms > 0) {
    absl::StrAppend(&line, bar,
                    absl::StrFormat("comm %4.1f%%", 100 * s.comm_exposed_ms / s.step_ms));
    const std::pair<const char*, double> axes[] = {{"data", s.exposed_data_ms},
                                                   {"tensor", s.exposed_tensor_ms},
                                                   {"context", s.exposed_context_ms},
                                                   {"pipeline", s.exposed_pipeline_ms},
                                                   {"world", s.exposed_world_ms}};
    const char* before = " (";
    for (const auto& [axis, ms] : axes) {
      if (ms <= 0) continue;
      absl::StrAppend(&line, before, absl::StrFormat("%s %.1f", axis, 100 * ms / s.step_ms));
      before = ", ";
    }
    if (*before == ',') absl::StrAppend(&line, ")");
  }
  if (s.eval_loss) {
    absl::StrAppend(&line, bar, paint(kCyan, absl::StrFormat("eval %.4f", *s.eval_loss)));
  }
  if (s.skipped) {
    absl::StrAppend(&line, bar,
                    paint(kRed, absl::StrFormat("skipped (%d so far)", s.skipped_total)));
  }
  return line;
}

}  // namespace

std::string StepStatsLine(const StepStats& stats, int64_t total_steps) {
  return FormatLine(stats, total_steps, Painter(false));
}

ConsoleSink::ConsoleSink(std::FILE* file, ConsoleOptions options) : file_(file), options_(options) {
  // mpirun gives ranks a terminal of its own whatever its output is; TERM=dumb says not to draw.
  const char* term = std::getenv("TERM");
  const bool dumb = term != nullptr && std::strcmp(term, "dumb") == 0;
  const bool terminal = isatty(fileno(file)) == 1 && !dumb;
  const char* no_colour = std::getenv("NO_COLOR");
  live_ = Decide(options.live, terminal);
  colour_ = Decide(options.colour, terminal && (no_colour == nullptr || *no_colour == '\0'));
  options_.log_every = std::max<int64_t>(1, options_.log_every);
}

ConsoleSink::~ConsoleSink() { (void)Finish(); }

void ConsoleSink::ClearProgress(std::string* out) {
  if (progress_shown_) out->append("\r\033[K");
  progress_shown_ = false;
}

void ConsoleSink::DrawProgress(const StepStats& s, std::string* out) {
  if (s.step >= options_.total_steps) return;
  constexpr int kCells = 24;
  const double done =
      std::clamp(static_cast<double>(s.step) / static_cast<double>(options_.total_steps), 0.0, 1.0);
  const auto filled = static_cast<int>(done * kCells);
  std::string cells;
  for (int i = 0; i < kCells; ++i) cells += i < filled ? "█" : "░";
  const double left = static_cast<double>(options_.total_steps - s.step) * smooth_step_ms_ / 1000;
  const Painter paint(colour_);
  absl::StrAppend(out, paint(kCyan, cells),
                  absl::StrFormat(" %3.0f%%  step %d/%d  loss %.4f  ", std::floor(100 * done),
                                  s.step, options_.total_steps, s.loss),
                  paint(kDim, absl::StrCat(Clock(left), " left")));
  progress_shown_ = true;
}

absl::Status ConsoleSink::Write(const StepStats& s) {
  if (std::isfinite(s.step_ms)) {
    smooth_step_ms_ = smooth_step_ms_ == 0 ? s.step_ms : 0.9 * smooth_step_ms_ + 0.1 * s.step_ms;
  }
  std::string out;
  ClearProgress(&out);
  const bool line = s.step % options_.log_every == 0 || s.step == 1 ||
                    s.step == options_.total_steps || s.skipped || s.eval_loss.has_value() ||
                    !std::isfinite(s.loss);
  if (line) absl::StrAppend(&out, FormatLine(s, options_.total_steps, Painter(colour_)), "\n");
  if (live_ && options_.total_steps > 0) DrawProgress(s, &out);
  if (out.empty()) return absl::OkStatus();
  if (std::fwrite(out.data(), 1, out.size(), file_) != out.size() || std::fflush(file_) != 0) {
    return observe_internal::FileError("written", "The console", errno);
  }
  return absl::OkStatus();
}

absl::Status ConsoleSink::Finish() {
  std::string out;
  ClearProgress(&out);
  if (out.empty()) return absl::OkStatus();
  if (std::fwrite(out.data(), 1, out.size(), file_) != out.size() || std::fflush(file_) != 0) {
    return observe_internal::FileError("written", "The console", errno);
  }
  return absl::OkStatus();
}

}  // namespace stretto
