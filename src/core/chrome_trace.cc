#include "stretto/core/chrome_trace.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto {
namespace {

// The slices of one row on as many threads as overlap at most: each on the first that is free.
class Row {
 public:
  explicit Row(std::string name) : name_(std::move(name)) {}
  const std::string& name() const { return name_; }
  void Add(const TraceSlice* slice) { slices_.push_back(slice); }

  std::vector<std::vector<const TraceSlice*>> Threads() {
    std::stable_sort(slices_.begin(), slices_.end(), [](const TraceSlice* a, const TraceSlice* b) {
      return a->begin_ns < b->begin_ns;
    });
    std::vector<std::vector<const TraceSlice*>> threads;
    for (const TraceSlice* slice : slices_) {
      const auto free = std::find_if(threads.begin(), threads.end(), [&](const auto& thread) {
        return thread.back()->end_ns <= slice->begin_ns;
      });
      (free == threads.end() ? threads.emplace_back() : *free).push_back(slice);
    }
    return threads;
  }

 private:
  std::string name_;
  std::vector<const TraceSlice*> slices_;
};

std::string NameOf(const TraceSlice& s) {
  if (!s.label.empty()) return s.label;
  const int64_t number = s.tags.micro_batch >= 0 ? s.tags.micro_batch : s.tags.item;
  return number >= 0 ? absl::StrCat(s.category, " ", number) : s.category;
}

void AppendSlice(int rank, int thread, const TraceSlice& s, std::string* out) {
  // Microseconds; begin and end are rounded alike, so that neighbours do not overlap.
  const int64_t ns = std::max<int64_t>(0, s.end_ns - s.begin_ns);
  absl::StrAppendFormat(
      out, ",\n{\"ph\":\"X\",\"name\":%s,\"cat\":%s,\"pid\":%d,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f",
      JsonString(NameOf(s)), JsonString(s.category), rank, thread,
      1e-3 * static_cast<double>(s.begin_ns), 1e-3 * static_cast<double>(ns));
  const TraceTags& t = s.tags;
  const std::pair<const char*, int64_t> numbers[] = {
      {"step", s.step},   {"stage", t.stage},   {"item", t.item}, {"micro_batch", t.micro_batch},
      {"order", t.order}, {"bucket", t.bucket}, {"peer", t.peer}, {"bytes", t.bytes}};
  absl::StrAppend(out, ",\"args\":{");
  const char* separator = "";
  for (const auto& [name, value] : numbers) {
    if (value < 0) continue;
    absl::StrAppend(out, separator, "\"", name, "\":", value);
    separator = ",";
  }
  if (!s.finished) absl::StrAppend(out, separator, "\"unfinished\":true");
  absl::StrAppend(out, "}}");
}

void AppendMetadata(int rank, int thread, const char* kind, const std::string& value,
                    std::string* out) {
  absl::StrAppendFormat(out, "%s{\"ph\":\"M\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"args\":{%s}}",
                        out->empty() ? "" : ",\n", kind, rank, thread, value);
}

}  // namespace

std::string JsonString(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (byte < 0x20) {
      absl::StrAppendFormat(&out, "\\u%04x", byte);
    } else {
      out += byte < 0x7f ? c : '?';
    }
  }
  return out + "\"";
}

std::string ChromeTraceProcess(int rank, const std::string& name, const std::string& note,
                               const std::vector<TraceSlice>& slices) {
  std::string out;
  AppendMetadata(rank, 0, "process_name", absl::StrCat("\"name\":", JsonString(name)), &out);
  AppendMetadata(rank, 0, "process_sort_index", absl::StrCat("\"sort_index\":", rank), &out);
  if (!note.empty()) {
    AppendMetadata(rank, 0, "process_labels", absl::StrCat("\"labels\":", JsonString(note)), &out);
  }
  std::vector<Row> rows;
  for (const TraceSlice& slice : slices) {
    auto row =
        std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.name() == slice.row; });
    if (row == rows.end()) row = rows.insert(rows.end(), Row(slice.row));
    row->Add(&slice);
  }
  int thread = 0;
  for (Row& row : rows) {
    int of_row = 0;
    for (const std::vector<const TraceSlice*>& lane : row.Threads()) {
      const std::string number = ++of_row > 1 ? absl::StrCat(" (", of_row, ")") : "";
      AppendMetadata(rank, thread, "thread_name",
                     absl::StrCat("\"name\":", JsonString(row.name() + number)), &out);
      AppendMetadata(rank, thread, "thread_sort_index", absl::StrCat("\"sort_index\":", thread),
                     &out);
      for (const TraceSlice* slice : lane) AppendSlice(rank, thread, *slice, &out);
      ++thread;
    }
  }
  return out;
}

std::string ChromeTraceEnd(const std::vector<std::pair<std::string, std::string>>& other) {
  std::string out = "\n],\"otherData\":{";
  const char* separator = "";
  for (const auto& [name, value] : other) {
    absl::StrAppend(&out, separator, JsonString(name), ":", value);
    separator = ",";
  }
  return out + "}}\n";
}

}  // namespace stretto
