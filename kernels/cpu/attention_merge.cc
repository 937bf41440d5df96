// Attention to one set of keys and to another as attention to both.
#include <cmath>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention.h"

namespace stretto::cpu {

bool CheckRows(Stream& stream, const char* op, const Tensor& cu, const Tensor& len, int64_t rows) {
  const int32_t* begin = cu.as<int32_t>();
  const int64_t sequences = cu.rows() - 1;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = Length(cu, len, i);
    if (begin[0] < 0 || length < 0 || length > int64_t{begin[i + 1]} - begin[i]) {
      stream.Fail(absl::InvalidArgumentError(
          absl::StrCat(op, ": sequence ", i, " has ", length, " rows from row ", begin[i],
                       " on, and the next begins at row ", begin[i + 1])));
      return false;
    }
  }
  if (begin[sequences] <= rows) return true;
  stream.Fail(absl::InvalidArgumentError(absl::StrCat(
      op, ": the sequences end at row ", begin[sequences], ", but there are ", rows, " rows")));
  return false;
}

namespace {

template <class O, class T>
void MergeRow(const Tensor& o, const Tensor& lse, const Tensor& part, const Tensor& part_lse,
              int64_t row) {
  using A = Acc<T>;
  const int64_t heads = part.dims[1], dim = part.dims[2];
  for (int64_t head = 0; head < heads; ++head) {
    A& have = lse.as<A>(row)[head];
    const A more = part_lse.as<A>(row)[head];
    if (more == -std::numeric_limits<A>::infinity()) continue;  // its keys add nothing
    const A largest = std::max(have, more);
    const A mine = std::exp(have - largest), other = std::exp(more - largest);
    const A inverse = 1 / (mine + other);
    const A keep = mine * inverse, take = other * inverse;
    O* to = o.as<O>(row) + head * dim;
    const T* from = part.as<T>(row) + head * dim;
    VecLoop<A>(dim, [&](int64_t j, auto k) {
      Store(to + j, Load(to + j, k) * keep + Load(from + j, k) * take, k);
    });
    have = largest + std::log(mine + other);
  }
}

template <class O, class T>
void MergeRows(Stream& stream, const Tensor& o, const Tensor& lse, const Tensor& part,
               const Tensor& part_lse, const Tensor& cu, const Tensor& len) {
  for (int64_t i = 0; i + 1 < cu.rows(); ++i) {
    const int64_t begin = cu.as<int32_t>()[i];
    stream.pool().ParallelFor(
        Length(cu, len, i), 1,
        [&](int64_t first, int64_t end, int) {
          for (int64_t row = first; row < end; ++row) {
            MergeRow<O, T>(o, lse, part, part_lse, begin + row);
          }
        },
        std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, part.row_elements())));
  }
}

}  // namespace

void AttentionMerge(Stream& s, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
                    Tensor len) {
  Stream* stream = &s;
  s.Enqueue([=] {
    if (!CheckRows(*stream, "AttentionMerge", cu, len, part.rows())) return;
    ForModelType(part.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (o.dtype == part.dtype) {
        MergeRows<T, T>(*stream, o, lse, part, part_lse, cu, len);
      } else {
        MergeRows<Acc<T>, T>(*stream, o, lse, part, part_lse, cu, len);
      }
    });
  });
}

}  // namespace stretto::cpu
