// Parts of parameters: where their rows lie in the whole, what they begin as, and what they are in
// the state registry.
#include <algorithm>
#include <utility>

#include "stretto/core/rng.h"
#include "stretto/model/graph.h"
#include "stretto/model/model.h"

namespace stretto {
namespace {

// Initial values of `count` elements from element `first` of the whole parameter on.
template <class T>
void Fill(const ParameterSpec& spec, const Rng& rng, int64_t first, int64_t count, T* out) {
  constexpr int64_t kAtOnce = 256;
  double values[kAtOnce] = {};
  if (spec.init == Init::kOnes) std::fill_n(values, kAtOnce, 1.0);
  for (int64_t i = 0; i < count; i += kAtOnce) {
    const int64_t n = std::min(kAtOnce, count - i);
    if (spec.init == Init::kNormal) {
      rng.Normals(static_cast<uint64_t>(first + i), n, values);
      for (int64_t k = 0; k < n; ++k) values[k] *= spec.std;
    }
    for (int64_t k = 0; k < n; ++k) {
      if constexpr (std::is_same_v<T, double>) {
        out[i + k] = values[k];
      } else {
        out[i + k] = T(static_cast<float>(values[k]));
      }
    }
  }
}

int64_t WholeColumns(const ParameterSpec& spec) {
  const std::vector<int64_t>& shape = spec.whole_shape();
  return shape.size() > 1 ? shape[1] : 1;
}

}  // namespace

std::vector<ParameterBox> BoxesOf(const ParameterSpec& spec, int64_t first, int64_t count) {
  if (count == 0) return {};
  if (spec.part.rows.empty()) return {{{first, count}, first}};
  std::vector<ParameterBox> boxes;
  int64_t begin = 0;  // of the range, in the part
  for (const Range& range : spec.part.rows) {
    const int64_t from = std::max(first, begin);
    const int64_t to = std::min(first + count, begin + range.count);
    if (from < to) boxes.push_back({{from, to - from}, range.first + from - begin});
    begin += range.count;
  }
  return boxes;
}

absl::Status RegisterRows(StateRegistry* registry, const std::string& prefix,
                          const ParameterInfo& info, int64_t first_row, const Tensor& local) {
  const ParameterSpec& spec = info.spec;
  StateEntry entry = {.name = prefix + spec.name,
                      .dtype = local.dtype,
                      .global_shape = spec.whole_shape(),
                      .first_column = spec.part.first_column,
                      .owned = info.owned};
  const std::vector<ParameterBox> boxes = BoxesOf(spec, first_row, local.rows());
  for (const ParameterBox& box : boxes) {
    entry.first_row = box.whole;
    entry.local = local.Rows(box.rows.first - first_row, box.rows.count);
    STRETTO_RETURN_IF_ERROR(registry->Add(entry));
  }
  if (!boxes.empty()) return absl::OkStatus();
  entry.first_row = spec.part.rows.empty() ? first_row : 0;
  entry.local = local;
  return registry->Add(entry);
}

void InitialValues(const ParameterSpec& spec, uint64_t seed, int64_t first_row, Tensor rows) {
  const Rng rng(seed, "init/" + spec.name);
  const int64_t columns = rows.row_elements(), whole_columns = WholeColumns(spec);
  for (const ParameterBox& box : BoxesOf(spec, first_row, rows.rows())) {
    // Rows of the whole parameter follow each other in the numbering, those of a part may not.
    const int64_t at_once = columns == whole_columns ? box.rows.count : 1;
    for (int64_t r = 0; r < box.rows.count; r += at_once) {
      const int64_t first = (box.whole + r) * whole_columns + spec.part.first_column;
      const int64_t row = box.rows.first - first_row + r;
      if (rows.dtype == DType::kF64) {
        Fill(spec, rng, first, at_once * columns, rows.as<double>(row));
      } else if (rows.dtype == DType::kF32) {
        Fill(spec, rng, first, at_once * columns, rows.as<float>(row));
      } else if (rows.dtype == DType::kBF16) {
        Fill(spec, rng, first, at_once * columns, rows.as<BFloat16>(row));
      }
    }
  }
}

}  // namespace stretto
