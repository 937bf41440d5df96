#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/observe/file.h"
#include "stretto/observe/metrics.h"

namespace stretto {
namespace {

constexpr double kWidth = 960, kHeight = 540;
constexpr double kLeft = 76, kRight = 28, kTop = 60, kBottom = 62;
constexpr double kPlotWidth = kWidth - kLeft - kRight;
constexpr double kPlotHeight = kHeight - kTop - kBottom;
constexpr size_t kSmoothFrom = 120;  // points; below, the raw curve is readable

constexpr char kTrainColour[] = "#2563eb";
constexpr char kValidationColour[] = "#ea580c";
constexpr char kReferenceColour[] = "#4b5563";

struct Point {
  double x = 0, y = 0;  // data units; y may be NaN: a gap
};

std::string Escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        // XML 1.0 allows no other control characters, not even escaped.
        out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return out;
}

// The step of about `count` ticks over `range`: 1, 2 or 5 times a power of ten.
double TickStep(double range, int count) {
  const double raw = range / count;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  const double lead = raw / power;
  return power * (lead <= 1.5 ? 1 : lead <= 3 ? 2 : lead <= 7 ? 5 : 10);
}

std::string StepLabel(double step) {
  const double size = std::fabs(step);
  if (size < 0.5) return "0";  // and not "-0"
  if (size >= 1e6) return absl::StrFormat("%gM", step / 1e6);
  if (size >= 1e4) return absl::StrFormat("%gk", step / 1e3);
  return absl::StrFormat("%g", step);
}

struct Axes {
  double x0 = 0, x1 = 1, y0 = 0, y1 = 1;
  double X(double x) const { return kLeft + (x - x0) / (x1 - x0) * kPlotWidth; }
  double Y(double y) const { return kTop + (y1 - y) / (y1 - y0) * kPlotHeight; }
};

// Medians over a window of about 2 % of the steps, which a lone spike does not move. It shrinks
// symmetrically towards the steep start and looks back only at the flat end. About two points for
// each pixel column; gaps stay gaps.
std::vector<Point> Smooth(const std::vector<Point>& raw) {
  const size_t n = raw.size();
  const size_t half = std::max<size_t>(1, n / 100);
  const size_t stride = std::max<size_t>(1, n / static_cast<size_t>(2 * kPlotWidth));
  std::vector<Point> out;
  std::vector<double> window;
  for (size_t i = 0; i < n; i = i + 1 < n ? std::min(i + stride, n - 1) : n) {
    const size_t begin = i - std::min(half, i);
    const size_t end = std::min(i + std::min(half, i), n - 1) + 1;
    window.clear();
    for (size_t k = begin; k < end; ++k) {
      if (std::isfinite(raw[k].y)) window.push_back(raw[k].y);
    }
    Point p = raw[i];
    if (std::isfinite(p.y)) {
      const auto middle = window.begin() + static_cast<std::ptrdiff_t>(window.size() / 2);
      std::nth_element(window.begin(), middle, window.end());
      p.y = *middle;
    }
    out.push_back(p);
  }
  return out;
}

// At most two points for each pixel column, its lowest and highest, so that long runs stay small
// files that look the same.
std::vector<Point> Thin(const std::vector<Point>& points, const Axes& axes) {
  if (points.size() <= 2 * static_cast<size_t>(kPlotWidth)) return points;
  std::vector<Point> out;
  size_t begin = 0;
  while (begin < points.size()) {
    const auto column = static_cast<int64_t>(axes.X(points[begin].x));
    size_t low = begin, high = begin, end = begin;
    for (; end < points.size() && static_cast<int64_t>(axes.X(points[end].x)) == column; ++end) {
      if (!std::isfinite(points[end].y)) continue;
      if (!(points[end].y >= points[low].y)) low = end;
      if (!(points[end].y <= points[high].y)) high = end;
    }
    out.push_back(points[std::min(low, high)]);
    if (low != high) out.push_back(points[std::max(low, high)]);
    begin = end;
  }
  return out;
}

// Path data with a new sub-path after each gap; a point between two gaps becomes a dot (round
// caps).
std::string PathData(const std::vector<Point>& points, const Axes& axes) {
  std::string d;
  bool drawing = false;
  for (size_t i = 0; i < points.size(); ++i) {
    if (!std::isfinite(points[i].y)) {
      drawing = false;
      continue;
    }
    // Far outside the plot the clip path hides it anyway.
    const double y = std::clamp(axes.Y(points[i].y), -kHeight, 2 * kHeight);
    absl::StrAppendFormat(&d, "%c%.1f %.1f", drawing ? 'L' : 'M', axes.X(points[i].x), y);
    const bool alone = !drawing && (i + 1 == points.size() || !std::isfinite(points[i + 1].y));
    if (alone) d += "h0";
    drawing = true;
  }
  return d;
}

void DrawFrame(const Axes& axes, const std::string& title, std::string* svg) {
  absl::StrAppendFormat(
      svg,
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
      "height=\"%.0f\" font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, "
      "sans-serif\">\n<title>%s</title>\n"
      "<defs><clipPath id=\"plot\"><rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>"
      "</clipPath></defs>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
      kWidth, kHeight, kWidth, kHeight, Escape(title), kLeft, kTop, kPlotWidth, kPlotHeight);
  absl::StrAppendFormat(
      svg,
      "<text x=\"%.1f\" y=\"34\" font-size=\"18\" font-weight=\"600\" fill=\"#111827\">%s</text>\n",
      kLeft, Escape(title));

  const double y_step = TickStep(axes.y1 - axes.y0, 6);
  const int decimals = std::max(0, static_cast<int>(std::ceil(-std::log10(y_step) - 1e-9)));
  *svg += "<g font-size=\"12\" fill=\"#4b5563\">\n";
  for (double k = std::ceil(axes.y0 / y_step - 1e-9); k * y_step <= axes.y1 + 1e-9 * y_step; ++k) {
    const double y = axes.Y(k * y_step);
    absl::StrAppendFormat(
        svg,
        "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#e5e7eb\"/>"
        "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%.*f</text>\n",
        kLeft, kLeft + kPlotWidth, y, y, kLeft - 10, y + 4, decimals, k * y_step);
  }
  const double x_step = std::max(1.0, TickStep(axes.x1 - axes.x0, 8));
  const double bottom = kTop + kPlotHeight;
  for (double k = std::ceil(axes.x0 / x_step - 1e-9); k * x_step <= axes.x1 + 1e-9 * x_step; ++k) {
    const double x = axes.X(k * x_step);
    absl::StrAppendFormat(
        svg,
        "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#9ca3af\"/>"
        "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n",
        x, x, bottom, bottom + 5, x, bottom + 20, StepLabel(k * x_step));
  }
  absl::StrAppendFormat(
      svg,
      "</g>\n<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#9ca3af\"/>\n"
      "<text x=\"%.1f\" y=\"%.1f\" font-size=\"13\" fill=\"#374151\" text-anchor=\"middle\">"
      "step</text>\n"
      "<text transform=\"translate(22 %.1f) rotate(-90)\" font-size=\"13\" fill=\"#374151\" "
      "text-anchor=\"middle\">loss (nats per token)</text>\n",
      kLeft, kLeft + kPlotWidth, bottom, bottom, kLeft + kPlotWidth / 2, bottom + 44,
      kTop + kPlotHeight / 2);
}

void DrawPath(const std::string& data, const char* colour, double width, double opacity,
              std::string* svg) {
  absl::StrAppendFormat(
      svg,
      "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"%.1f\" "
      "stroke-opacity=\"%.2f\" stroke-linejoin=\"round\" stroke-linecap=\"round\" "
      "clip-path=\"url(#plot)\"/>\n",
      data, colour, width, opacity);
}

struct LegendEntry {
  std::string label;
  const char* colour;
  bool dashed = false, marker = false;
};

// Characters, not bytes: for an estimate of the width of UTF-8 text.
size_t Letters(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

void DrawLegend(const std::vector<LegendEntry>& entries, std::string* svg) {
  size_t longest = 0;
  for (const LegendEntry& e : entries) longest = std::max(longest, Letters(e.label));
  const double width = 58 + 6.9 * static_cast<double>(longest);
  const double height = 14 + 20 * static_cast<double>(entries.size());
  // A loss falls, so its top right corner is the empty one.
  const double x = kLeft + kPlotWidth - width - 10, y = kTop + 8;
  absl::StrAppendFormat(svg,
                        "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" rx=\"5\" "
                        "fill=\"#ffffff\" fill-opacity=\"0.9\" stroke=\"#e5e7eb\"/>\n",
                        x, y, width, height);
  for (size_t i = 0; i < entries.size(); ++i) {
    const LegendEntry& e = entries[i];
    const double middle = y + 17 + 20 * static_cast<double>(i);
    absl::StrAppendFormat(svg,
                          "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" "
                          "stroke-width=\"2\"%s/>",
                          x + 12, x + 38, middle, middle, e.colour,
                          e.dashed ? " stroke-dasharray=\"6 4\"" : "");
    if (e.marker) {
      absl::StrAppendFormat(svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>", x + 25,
                            middle, e.colour);
    }
    absl::StrAppendFormat(
        svg, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"13\" fill=\"#111827\">%s</text>\n", x + 46,
        middle + 4.5, Escape(e.label));
  }
}

// Steps from the first to the last (from 0 when the run began there); losses over the validation
// points, the reference, and the training curve: all of a short one, its bulk and both ends of a
// long one, so that a lone spike leaves the picture instead of flattening the rest.
Axes ChooseAxes(const std::vector<Point>& raw, bool bulk, const std::vector<Point>& validation,
                const std::optional<LossReference>& reference) {
  const double inf = std::numeric_limits<double>::infinity();
  double y0 = inf, y1 = -inf;
  auto cover = [&](double y) {
    if (!std::isfinite(y)) return;
    y0 = std::min(y0, y);
    y1 = std::max(y1, y);
  };
  std::vector<double> losses;
  for (const Point& p : raw) {
    if (std::isfinite(p.y)) losses.push_back(p.y);
  }
  if (!losses.empty()) {
    cover(losses.front());
    cover(losses.back());
    std::sort(losses.begin(), losses.end());
    const size_t cut = bulk ? losses.size() / 100 : 0;
    cover(losses[cut]);
    cover(losses[losses.size() - 1 - cut]);
  }
  for (const Point& p : validation) cover(p.y);
  if (reference) cover(reference->loss);

  double x0 = raw.front().x, x1 = raw.back().x;
  if (x0 > 0 && x0 <= 0.1 * x1) x0 = 0;
  if (x1 <= x0) x1 = x0 + 1;
  const double margin = y1 > y0 ? 0.06 * (y1 - y0) : std::max(0.05 * std::fabs(y0), 0.1);
  return {x0, x1, y0 >= 0 ? std::max(0.0, y0 - margin) : y0 - margin, y1 + margin};
}

}  // namespace

absl::Status WriteLossCurve(const std::string& path, const std::vector<LossPoint>& points,
                            const std::string& title,
                            const std::optional<LossReference>& reference) {
  std::vector<Point> raw, validation;
  double last_train = std::numeric_limits<double>::quiet_NaN();
  for (const LossPoint& p : points) {
    const auto step = static_cast<double>(p.step);
    raw.push_back({step, p.train});
    if (std::isfinite(p.train)) last_train = p.train;
    if (p.validation && std::isfinite(*p.validation)) validation.push_back({step, *p.validation});
  }
  const bool has_train = std::isfinite(last_train);
  if (!has_train && validation.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, " was not drawn: none of the ",
                                                   points.size(), " steps has a finite loss."));
  }
  const bool smoothed = raw.size() >= kSmoothFrom;
  const std::vector<Point> smooth = smoothed ? Smooth(raw) : raw;
  const Axes axes = ChooseAxes(raw, smoothed, validation, reference);

  std::string svg;
  DrawFrame(axes, title, &svg);
  std::vector<LegendEntry> legend;
  if (reference && std::isfinite(reference->loss)) {
    const double y = axes.Y(reference->loss);
    absl::StrAppendFormat(&svg,
                          "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" "
                          "stroke-width=\"1.5\" stroke-dasharray=\"6 4\"/>\n",
                          kLeft, kLeft + kPlotWidth, y, y, kReferenceColour);
  }
  if (smoothed) DrawPath(PathData(Thin(raw, axes), axes), kTrainColour, 1.0, 0.28, &svg);
  DrawPath(PathData(smooth, axes), kTrainColour, 2.0, 1.0, &svg);
  if (has_train) {
    const double end = smoothed && std::isfinite(smooth.back().y) ? smooth.back().y : last_train;
    legend.push_back({absl::StrFormat("training (%.4f at the end)", end), kTrainColour});
  }
  if (!validation.empty()) {
    DrawPath(PathData(validation, axes), kValidationColour, 2.0, 1.0, &svg);
    // Too many markers would hide the line.
    if (validation.size() <= 60) {
      for (const Point& p : validation) {
        absl::StrAppendFormat(&svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n",
                              axes.X(p.x), axes.Y(p.y), kValidationColour);
      }
    }
    legend.push_back({absl::StrFormat("validation (%.4f at the end)", validation.back().y),
                      kValidationColour, false, validation.size() <= 60});
  }
  if (reference && std::isfinite(reference->loss)) {
    legend.push_back({absl::StrFormat("%s (%.4f)", reference->label, reference->loss),
                      kReferenceColour, true, false});
  }
  DrawLegend(legend, &svg);
  svg += "</svg>\n";

  STRETTO_RETURN_IF_ERROR(
      observe_internal::MakeDirectories(std::filesystem::path(path).parent_path().string()));
  return observe_internal::ReplaceFile(path, svg);
}

}  // namespace stretto
