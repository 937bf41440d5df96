// Conversion of elements between types while they are read.
#ifndef STRETTO_SRC_SNAPSHOT_CONVERT_H_
#define STRETTO_SRC_SNAPSHOT_CONVERT_H_

#include <cstdint>

#include "stretto/core/dtype.h"

namespace stretto::snapshot_internal {

// Equal types, or any two of f64, f32, bf16 and f16.
bool CanConvert(DType from, DType to);

// `count` elements; CanConvert(from, to). Rounds to nearest, ties to even. f64 goes to a 16-bit
// type by way of f32, as PyTorch does. The buffers need no alignment and do not overlap.
void ConvertElements(DType from, const void* in, DType to, void* out, int64_t count);

// IEEE binary16 and f32.
float HalfToFloat(uint16_t half);
uint16_t FloatToHalf(float value);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_CONVERT_H_
