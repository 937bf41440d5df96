// Speed of the erasure code of snapshots on one core: one table, GB/s of data encoded.
//
//   stretto-erasure-bench [block bytes = 4194304] [seconds a row = 0.3]
//
// "encode" makes all parity blocks of a stripe at once, as a keeper does; "add" takes one data
// block after the other; "rebuild" makes m lost data blocks from k others. Beside each stands its
// ratio to a plain memcpy of the same data in the same run, the machine's floor.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "absl/strings/str_format.h"
#include "stretto/core/exit_code.h"
#include "stretto/snapshot/erasure.h"

namespace {

using Block = std::vector<std::byte>;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes per second of `work`, which goes through `bytes`; the best of many.
double Rate(double bytes, double seconds, const std::function<void()>& work) {
  double best = 0;
  for (const double end = Now() + seconds; Now() < end;) {
    const double start = Now();
    work();
    best = std::max(best, bytes / (Now() - start));
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t bytes = argc > 1 ? std::atoll(argv[1]) : int64_t{4} << 20;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.3;
  if (bytes < 1 || bytes > int64_t{1} << 32 || !(seconds > 0)) {
    absl::FPrintF(stderr, "usage: stretto-erasure-bench [block bytes] [seconds a row]\n");
    return 1;
  }
  absl::PrintF("blocks of %d bytes, one core\n%-8s %8s %8s %8s %8s   (ratios to memcpy)\n", bytes,
               "k + m", "memcpy", "encode", "add", "rebuild");
  struct {
    int k, m;
  } const codes[] = {{1, 1}, {2, 1}, {3, 1}, {7, 1}, {4, 2}, {6, 2}};
  for (const auto& [k, m] : codes) {
    const auto code = stretto::ErasureCode::Create(k, m);
    std::vector<Block> data(k, Block(bytes, std::byte{7})), parity(m, Block(bytes)), copy = data;
    std::vector<const std::byte*> in;
    std::vector<std::byte*> out;
    for (const Block& block : data) in.push_back(block.data());
    for (Block& block : parity) out.push_back(block.data());
    std::vector<int> sources, lost;
    for (int i = 0; i < k; ++i) sources.push_back(i + std::min(m, k));
    for (int i = 0; i < std::min(m, k); ++i) lost.push_back(i);
    const auto rebuild = code->Rebuild(sources, lost);
    const double total = static_cast<double>(k) * static_cast<double>(bytes);
    const double plain = Rate(total, seconds, [&] {
      for (int i = 0; i < k; ++i) std::memcpy(copy[i].data(), data[i].data(), data[i].size());
    });
    const double encode =
        Rate(total, seconds, [&] { code->encode().Apply(in.data(), out.data(), bytes); });
    const double add = Rate(total, seconds, [&] {
      for (int i = 0; i < k; ++i) code->encode().Accumulate(i, in[i], out.data(), bytes);
    });
    const double back = Rate(total, seconds, [&] { rebuild->Apply(in.data(), out.data(), bytes); });
    absl::PrintF("%d + %d    %8.2f %8.2f %8.2f %8.2f   %.2f %.2f %.2f\n", k, m, plain / 1e9,
                 encode / 1e9, add / 1e9, back / 1e9, encode / plain, add / plain, back / plain);
  }
  return stretto::EndProgram(absl::OkStatus());
}
