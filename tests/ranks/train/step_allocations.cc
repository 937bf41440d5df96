// After the third step nothing is allocated: malloc, mmap and their relatives are interposed and
// counted for the thread that drives the step. Counted apart: other threads (the control plane, the
// prefetching reader), and MPI, which grows its pools for early messages whenever it likes.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <utility>

#include "tests/support/rank_main.h"

namespace {

thread_local bool driving = false;
std::atomic<int64_t> driver_allocations{0}, mpi_allocations{0}, other_allocations{0};
std::atomic<bool> counting{false};

// Whether the code at `address` belongs to Open MPI: its libraries or its loaded components.
bool InMpi(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return false;
  for (const char* name : {"libmpi", "libopen-", "mca_", "libpmix"}) {
    if (std::strstr(info.dli_fname, name) != nullptr) return true;
  }
  return false;
}

void Count(const void* caller) {
  if (!counting.load(std::memory_order_relaxed)) return;
  (!driving        ? other_allocations
   : InMpi(caller) ? mpi_allocations
                   : driver_allocations)
      .fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t n) {
  Count(__builtin_return_address(0));
  return __libc_malloc(n);
}
void* calloc(size_t n, size_t size) {
  Count(__builtin_return_address(0));
  return __libc_calloc(n, size);
}
void* realloc(void* p, size_t n) {
  Count(__builtin_return_address(0));
  return __libc_realloc(p, n);
}
void* aligned_alloc(size_t alignment, size_t n) {
  Count(__builtin_return_address(0));
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** out, size_t alignment, size_t n) {
  Count(__builtin_return_address(0));
  *out = __libc_memalign(alignment, n);
  return *out == nullptr;
}
void* mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  using Mmap = void* (*)(void*, size_t, int, int, int, off_t);
  static const Mmap real = reinterpret_cast<Mmap>(dlsym(RTLD_NEXT, "mmap"));
  Count(__builtin_return_address(0));
  return real(address, length, protection, flags, fd, offset);
}
}

namespace stretto {
namespace {

absl::Status Steps(World& world, const std::string& dtype, const std::string& fp8,
                   const std::string& recompute, int tp, int64_t zero, bool traced = false,
                   int64_t tp_chunks = 1) {
  testing::ScratchDirectory scratch;
  STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, "llama"));
  config.steps = 12;
  config.model.kv_heads = 2;
  config.parallel.tp = tp;
  config.parallel.tp_chunks = tp_chunks;
  config.runtime.dtype = dtype;
  config.runtime.fp8 = fp8;
  if (fp8 != "none") {  // widths that FP8 layers take
    config.model.hidden = 32;
    config.model.head_dim = 16;
    config.model.ffn = 48;
  }
  config.runtime.recompute = recompute;
  config.parallel.zero = zero;
  config.metrics.trace_from = 1;
  config.metrics.trace_steps = traced ? 2 * config.steps : 0;  // written at the end
  STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
  while (trainer->step() < config.steps) {
    if (trainer->step() == 3) {
      driver_allocations = mpi_allocations = other_allocations = 0;
      driving = counting = true;
    }
    const absl::StatusOr<StepStats> stats = trainer->Step();
    if (trainer->step() == config.steps) counting = driving = false;
    if (!stats.ok()) return stats.status();
  }
  std::printf(
      "rank %d, %s, fp8 %s, recompute %s, tp %d, zero %ld%s: %ld allocations by the step, %ld by "
      "MPI, "
      "%ld by other threads, steps 4 to %ld\n",
      world.rank(), dtype.c_str(), fp8.c_str(), recompute.c_str(), tp, static_cast<long>(zero),
      traced ? ", traced" : "", static_cast<long>(driver_allocations.load()),
      static_cast<long>(mpi_allocations.load()), static_cast<long>(other_allocations.load()),
      static_cast<long>(config.steps));
  if (driver_allocations != 0) {
    return absl::InternalError(
        absl::StrCat("steps allocated ", driver_allocations.load(), " times"));
  }
  return trainer->Finish();
}

// The counter sees what it should: otherwise zero would mean nothing.
absl::Status CounterWorks() {
  driving = counting = true;
  driver_allocations = 0;
  void* volatile p = malloc(100);
  void* volatile m = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  counting = driving = false;
  munmap(m, 4096);
  free(p);
  if (driver_allocations != 2) {
    return absl::InternalError(
        absl::StrCat("the counter saw ", driver_allocations.load(), " of 2 allocations"));
  }
  return absl::OkStatus();
}

absl::Status RunAll(World& world) {
  STRETTO_RETURN_IF_ERROR(CounterWorks());
  const std::pair<const char*, const char*> types[] = {
      {"f32", "none"}, {"bf16", "none"}, {"bf16", "hybrid"}};
  for (const auto& [dtype, fp8] : types) {
    for (const char* recompute : {"none", "block"}) {
      STRETTO_RETURN_IF_ERROR(world.Agree("steps", Steps(world, dtype, fp8, recompute, 1, 1)));
    }
  }
  // The ranks as a tensor axis.
  for (const char* recompute : {"none", "block"}) {
    if (world.size() > 2) break;
    for (const int64_t chunks : {1, 3}) {
      STRETTO_RETURN_IF_ERROR(world.Agree(
          "steps", Steps(world, "f32", "none", recompute, world.size(), 1, chunks > 1, chunks)));
    }
  }
  for (const int64_t zero : {2, 3}) {
    STRETTO_RETURN_IF_ERROR(world.Agree("steps", Steps(world, "bf16", "none", "block", 1, zero)));
  }
  for (const int64_t zero : {1, 3}) {
    STRETTO_RETURN_IF_ERROR(
        world.Agree("steps", Steps(world, "f32", "none", "none", 1, zero, /*traced=*/true)));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main() { return stretto::testing::RankMain(stretto::RunAll); }
