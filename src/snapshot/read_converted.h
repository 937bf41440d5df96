// Reading part of a tensor from a safetensors file as another type.
#ifndef STRETTO_SRC_SNAPSHOT_READ_CONVERTED_H_
#define STRETTO_SRC_SNAPSHOT_READ_CONVERTED_H_

#include <cstdint>

#include "stretto/snapshot/safetensors.h"

namespace stretto::snapshot_internal {

// Elements [first, first + count) of `entry` as `dtype`, through a buffer of bounded size.
// INVALID_ARGUMENT when the stored type does not convert.
absl::Status ReadConverted(const SafetensorsFile& file, const SafetensorsEntry& entry,
                           int64_t first, int64_t count, DType dtype, void* out);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_READ_CONVERTED_H_
