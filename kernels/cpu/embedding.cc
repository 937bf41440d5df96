#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// True when every index names a row of a table of `rows` rows; otherwise fails the stream.
bool InRange(Stream& stream, const char* op, const char* what, const Tensor& indices,
             int64_t rows) {
  const int32_t* index = indices.as<int32_t>();
  for (int64_t t = 0; t < indices.rows(); ++t) {
    if (index[t] < 0 || index[t] >= rows) {
      stream.Fail(absl::OutOfRangeError(
          absl::StrCat(op, ": ", what, " ", index[t], " in row ", t, " is outside the table of ",
                       rows, " rows; check the data against the model's configuration")));
      return false;
    }
  }
  return true;
}

class CpuEmbedding final : public EmbeddingKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor ids, Tensor table, Tensor positions,
               Tensor positions_table) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      if (!InRange(*stream, "Embedding", "id", ids, table.rows())) return;
      const bool with_positions = positions_table.present();
      if (with_positions &&
          !InRange(*stream, "Embedding", "position", positions, positions_table.rows())) {
        return;
      }
      ForModelType(y.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        ForSpans(stream->pool(), y.rows(), y.dims[1], [&](int64_t t, int64_t first, int64_t n) {
          T* to = y.as<T>(t) + first;
          const T* from = table.as<T>(ids.as<int32_t>()[t]) + first;
          if (!with_positions) {
            std::copy_n(from, n, to);
            return;
          }
          const T* add = positions_table.as<T>(positions.as<int32_t>()[t]) + first;
          VecLoop<A>(n, [&](int64_t i, auto k) {
            Store(to + i, Load(from + i, k) + Load(add + i, k), k);
          });
        });
      });
    });
  }

  void LocalIds(Stream& s, Tensor local, Tensor ids, int64_t first, int64_t rows, int64_t all,
                const char* what) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      if (!InRange(*stream, "Embedding", what, ids, all)) {
        std::fill_n(local.as<int32_t>(), local.rows(), static_cast<int32_t>(rows));
        return;
      }
      for (int64_t t = 0; t < ids.rows(); ++t) {
        const int64_t row = ids.as<int32_t>()[t] - first;
        local.as<int32_t>()[t] = static_cast<int32_t>(row >= 0 && row < rows ? row : rows);
      }
    });
  }

  void Backward(Stream& s, Tensor dtable, Tensor dy, Tensor ids, bool acc) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      if (!InRange(*stream, "EmbeddingBackward", "id", ids, dtable.rows())) return;
      ForModelType(dy.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        ThreadPool& pool = stream->pool();
        if (!acc) {
          ForSpans(pool, dtable.rows(), dtable.dims[1], [&](int64_t r, int64_t first, int64_t n) {
            std::fill_n(dtable.as<A>(r) + first, n, A{0});
          });
        }
        // Threads own columns, so that every row is summed in token order by one thread.
        pool.ParallelFor(
            dy.dims[1], 16,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t t = 0; t < dy.rows(); ++t) {
                const T* from = dy.as<T>(t) + begin;
                A* to = dtable.as<A>(ids.as<int32_t>()[t]) + begin;
                VecLoop<A>(end - begin, [&](int64_t i, auto k) {
                  Store(to + i, Load(to + i, k) + Load(from + i, k), k);
                });
              }
            },
            dy.elements() <= kSerialElements ? dy.dims[1] : 0);
      });
    });
  }
};

}  // namespace

const EmbeddingKernels* Embedding() {
  static const CpuEmbedding kernels;
  return &kernels;
}

}  // namespace stretto::cpu
