// Moving bytes between host and device.
#ifndef STRETTO_CORE_COPY_H_
#define STRETTO_CORE_COPY_H_

#include <cstdint>
#include <functional>

#include "stretto/core/status.h"
#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto {

// Enqueues a copy of `bytes` bytes. Each side is in host memory or on the stream's device. Host
// memory stays untouched until the copy is done; from Arena::CreateHost it is copied without
// holding the host up.
void CopyBytes(Stream& stream, void* to, const void* from, int64_t bytes);

// `to` receives the elements of `from` without gaps. Blocks; work on `from` must have finished.
absl::Status CopyToHost(void* to, const Tensor& from);
// The reverse.
absl::Status CopyFromHost(const Tensor& to, const void* from);

// Writes all rows of `to` from the host: calls fill(first row, rows) for some rows at a time, in
// order, with `rows` in host memory: those of `to` itself where the host can reach them, else a
// buffer of bounded size that is then copied. Blocks. The first error ends it.
absl::Status FillFromHost(
    const Tensor& to, const std::function<absl::Status(int64_t first, const Tensor& rows)>& fill);

}  // namespace stretto

#endif  // STRETTO_CORE_COPY_H_
