// Gradients of a norm's weight and bias: sums over all rows, in two steps. The rows are cut into
// chunks that are summed on their own, then the chunks' sums are added in order. Which rows make a
// chunk follows from the shape alone, so that every device comes to the same bits.
#ifndef STRETTO_KERNELS_CUDA_NORM_SUMS_H_
#define STRETTO_KERNELS_CUDA_NORM_SUMS_H_

#include <cstdint>

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

// Of a norm's operands.
struct Extent {
  int64_t rows;
  int64_t dim;  // elements of a row

  explicit Extent(const Tensor& t) : rows(t.rows()), dim(t.row_elements()) {}
  bool empty() const { return rows == 0 || dim == 0; }
};

struct NormChunks {
  int64_t rows = 0;   // of a chunk; the last one may have fewer
  int64_t count = 0;  // chunks
  int64_t most = 0;   // that any number of rows is cut into
};

// The chunks that suit NormChunkSums, which reads `width` elements at once.
NormChunks ChunksForSums(int64_t rows, int64_t dim, int width);

// Elements of these operands that NormChunkSums reads at once.
int SumWidth(const Tensor& dy, const Tensor& h);

// partial [chunks, kinds, dim]: the chunks' sums for the weight (kinds 1), or for weight and bias.
void NormChunkSums(Stream& s, float* partial, const NormChunks& chunks, int kinds, Tensor dy,
                   Tensor h, Tensor mean, Tensor rstd);

// dweight (acc)= , dbias (acc)= the sums of partial [chunks, kinds, dim] over the chunks; dbias may
// be absent.
void AddNormChunks(Stream& s, Tensor dweight, Tensor dbias, const float* partial, int64_t chunks,
                   int kinds, bool acc);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_NORM_SUMS_H_
