// What attention's two directions share: tile sizes, the sequences of a packed batch, the tasks of
// a thread, and tiles in arithmetic precision.
#ifndef STRETTO_KERNELS_CPU_ATTENTION_H_
#define STRETTO_KERNELS_CPU_ATTENTION_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/support.h"
#include "stretto/ops/kernels.h"

namespace stretto::cpu {

// A tile of scores is kQueryTile x kKeyTile: 32 KiB of f32, which stays in the first or second
// level cache while its two products and the exponentials run.
inline constexpr int64_t kQueryTile = 64;
inline constexpr int64_t kKeyTile = 128;

// Fails the stream and returns false when `cu` and `len` do not name rows among `rows`.
bool CheckRows(Stream& stream, const char* op, const Tensor& cu, const Tensor& len, int64_t rows);
// The same when cu_q and cu_k (and lengths) do not describe the rows of q and k.
bool CheckSequences(Stream& stream, const char* op, const AttentionShape& shape, int64_t q_rows,
                    int64_t k_rows);

// Rows of a sequence, which begin at cu[index].
inline int64_t Length(const Tensor& cu, const Tensor& len, int64_t index) {
  if (len.present()) return len.as<int32_t>()[index];
  return int64_t{cu.as<int32_t>()[index + 1]} - cu.as<int32_t>()[index];
}

// One packed sequence: query rows [q, q + q_len), key rows [k, k + k_len).
struct Sequence {
  int64_t q, q_len, k, k_len;

  Sequence(const AttentionShape& shape, int64_t index) {
    const int32_t* cu_q = shape.cu_q.as<int32_t>();
    const int32_t* cu_k = shape.cu_k.as<int32_t>();
    q = cu_q[index];
    q_len = Length(shape.cu_q, shape.len_q, index);
    k = cu_k[index];
    k_len = Length(shape.cu_k, shape.len_k, index);
  }
};

// Deals tasks to threads back and forth (0 1 2, 2 1 0, ...): neighbours of growing cost even out,
// and the deal depends on nothing but the shape.
class Deal {
 public:
  Deal(int64_t thread, int64_t threads) : thread_(thread), threads_(threads) {}
  bool Mine() {
    const int64_t place = next_ % threads_;
    const bool back = next_ / threads_ % 2 == 1;
    ++next_;
    return (back ? threads_ - 1 - place : place) == thread_;
  }

 private:
  int64_t thread_;
  int64_t threads_;
  int64_t next_ = 0;
};

// Rows of one head in arithmetic precision.
template <class A>
struct HeadTile {
  const A* data;
  int64_t ld;
};

// Rows [row, row + count) of head `head`: in place for f32 and f64, widened into `buffer`
// (count * head_dim elements) for bf16.
template <class T>
HeadTile<Acc<T>> WidenHead(const Tensor& t, int64_t row, int64_t count, int64_t head,
                           Acc<T>* buffer) {
  const int64_t dim = t.dims[2];
  const T* from = t.as<T>(row) + head * dim;
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (int64_t i = 0; i < count; ++i) {
      VecLoop<float>(dim, [&](int64_t j, auto k) {
        Store(buffer + i * dim + j, Load(from + i * t.row_stride + j, k), k);
      });
    }
    return {buffer, dim};
  } else {
    return {from, t.row_stride};
  }
}

// How many keys of the tile starting at key k0 query `query` (numbers inside the sequence) sees.
inline int64_t VisibleKeys(bool causal, int64_t query, int64_t k0, int64_t count) {
  return causal ? std::clamp<int64_t>(query + 1 - k0, 0, count) : count;
}

void AttentionForward(Stream& s, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                      const AttentionShape& shape);
void AttentionBackward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o,
                       Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                       const AttentionShape& shape);
void AttentionMerge(Stream& s, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
                    Tensor len);

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_ATTENTION_H_
