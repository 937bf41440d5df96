// Element-wise reductions in a fixed order.
#ifndef STRETTO_SRC_COMM_REDUCE_H_
#define STRETTO_SRC_COMM_REDUCE_H_

#include <cstddef>
#include <cstdint>

#include "stretto/comm/communicator.h"
#include "stretto/core/dtype.h"

namespace stretto {

// Whether values of this type can be added, or compared, by Reduce.
bool CanReduce(DType dtype);

// output[i] = sources[0][i] op sources[1][i] op ... op sources[n - 1][i], from left to right: in
// f64 for f64, in f32 for f32 and bf16 (rounded once at the end), wrapping for integers. The
// maximum or minimum of anything and NaN is NaN. `output` may be one of the sources.
void Reduce(DType dtype, ReduceOp op, std::byte* output, const std::byte* const* sources, int n,
            int64_t elements);

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_REDUCE_H_
