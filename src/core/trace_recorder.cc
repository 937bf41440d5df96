#include "stretto/core/trace_recorder.h"

#include <algorithm>
#include <cstring>

#include "src/core/time_marks.h"

namespace stretto {
namespace {

// `inner`, and `outer` where it says nothing.
TraceTags Within(const TraceTags& outer, TraceTags inner) {
  for (int64_t TraceTags::*tag :
       {&TraceTags::stage, &TraceTags::item, &TraceTags::micro_batch, &TraceTags::order,
        &TraceTags::bucket, &TraceTags::peer, &TraceTags::bytes}) {
    if (inner.*tag < 0) inner.*tag = outer.*tag;
  }
  return inner;
}

void CopyText(char* to, size_t room, const char* from) {
  const size_t length = std::min(std::strlen(from), room - 1);
  std::memcpy(to, from, length);
  to[length] = '\0';
}

size_t MarkOf(size_t action, int end) { return 2 * action + static_cast<size_t>(end); }

}  // namespace

TraceRecorder::TraceRecorder(Stream& stream, int capacity)
    : marks_(std::make_unique<TimeMarks>(stream, 2 * static_cast<size_t>(capacity) + 1)) {
  records_.reserve(static_cast<size_t>(capacity));
}
TraceRecorder::~TraceRecorder() = default;

int TraceRecorder::Open(const char* row, const char* category, const char* label,
                        const TraceTags& tags) {
  if (step_ < 0) return -1;
  if (records_.size() == records_.capacity()) {
    ++lost_;
    return -1;
  }
  Record& record = records_.emplace_back();
  record.category = category;
  CopyText(record.row, kRow, row);
  CopyText(record.label, kLabel, label);
  record.tags = Within(scope_, tags);
  record.step = step_;
  return static_cast<int>(records_.size()) - 1;
}

void TraceRecorder::Begin(int action) {
  if (action >= 0) records_[static_cast<size_t>(action)].times[0] = SteadyNanoseconds();
}

void TraceRecorder::End(int action) {
  if (action >= 0) records_[static_cast<size_t>(action)].times[1] = SteadyNanoseconds();
}

void TraceRecorder::SetBytes(int action, int64_t bytes) {
  if (action >= 0) records_[static_cast<size_t>(action)].tags.bytes = bytes;
}

void TraceRecorder::Mark(int action, int end, Stream& stream) {
  if (action < 0) return;
  const auto index = static_cast<size_t>(action);
  marks_->Mark(stream, MarkOf(index, end));
  records_[index].marked[end] = true;
}

int64_t TraceRecorder::Tie(Stream& stream) { return marks_->Tie(stream, 2 * records_.capacity()); }

int64_t TraceRecorder::TimeOf(size_t action, int end) const {
  const Record& record = records_[action];
  return record.marked[end] ? marks_->HostTime(MarkOf(action, end)) : record.times[end];
}

std::vector<TraceSlice> TraceRecorder::Slices(int64_t now_ns) {
  std::vector<TraceSlice> slices;
  slices.reserve(records_.size());
  for (size_t i = 0; i < records_.size(); ++i) {
    const Record& record = records_[i];
    const int64_t begin = TimeOf(i, 0), end = TimeOf(i, 1);
    if (begin <= 0) {
      ++lost_;
      continue;
    }
    TraceSlice& slice = slices.emplace_back();
    slice.row = record.row;
    slice.category = record.category;
    slice.label = record.label;
    slice.tags = record.tags;
    slice.step = record.step;
    slice.begin_ns = begin;
    slice.finished = end > 0;
    slice.end_ns = std::max(begin, slice.finished ? end : now_ns);
  }
  return slices;
}

TraceScope::TraceScope(TraceRecorder* recorder, const TraceTags& tags) : recorder_(recorder) {
  if (recorder == nullptr) return;
  before_ = recorder->scope_;
  recorder->scope_ = Within(before_, tags);
}

TraceSpan::TraceSpan(TraceRecorder* recorder, const char* row, const char* category, Stream* stream)
    : recorder_(recorder), stream_(stream) {
  if (recorder == nullptr) return;
  action_ = recorder->Open(row, category, "");
  stream != nullptr ? recorder->Begin(action_, *stream) : recorder->Begin(action_);
}

TraceSpan::~TraceSpan() {
  if (action_ < 0) return;
  stream_ != nullptr ? recorder_->End(action_, *stream_) : recorder_->End(action_);
}

}  // namespace stretto
