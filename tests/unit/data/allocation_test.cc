// The loader's steady state allocates nothing, on either of its threads.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "stretto/data/loader.h"
#include "unit/data/scratch.h"

namespace {
std::atomic<int64_t> allocations{0};
}  // namespace

void* operator new(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace stretto {
namespace {

class AllocationTest : public Scratch {};

TEST_F(AllocationTest, SteadyStateAllocatesNothing) {
  for (int shard = 0; shard < 3; ++shard) {
    std::vector<uint16_t> ids(4001);
    // Ever more separators, so that the number of sequences keeps growing.
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = i % (100 / (shard * 33 + 1)) == 0 ? 99 : 5;
    WriteTokens16("s_" + std::to_string(shard) + ".bin", ids);
  }
  DatasetOptions dataset_options;
  dataset_options.sequence_length = 61;
  dataset_options.vocabulary = 100;
  dataset_options.end_of_text = 99;
  auto dataset = TokenDataset::Open(Path("s_*.bin"), dataset_options);
  ASSERT_TRUE(dataset.ok());
  for (const bool prefetch : {true, false}) {
    LoaderOptions options;
    options.global_batch = 13;
    options.micro_batch = 4;
    options.prefetch = prefetch;
    auto loader = Loader::Create(**dataset, options);
    ASSERT_TRUE(loader.ok());
    ASSERT_TRUE((*loader)->Step(0).ok());
    int64_t tokens = 0;
    const int64_t before = allocations.load();
    bool ok = true;
    for (int64_t step = 1; step < 200; ++step) {
      auto batches = (*loader)->Step(step);
      ok = ok && batches.ok();
      for (const PackedBatch& batch : **batches) tokens += batch.tokens();
    }
    const int64_t made = allocations.load() - before;
    EXPECT_TRUE(ok);
    EXPECT_EQ(tokens, 199 * 13 * 61);
    EXPECT_EQ(made, 0) << "prefetch " << prefetch;
  }
  // The counter counts.
  const int64_t before = allocations.load();
  std::vector<int>* volatile probe = new std::vector<int>(10);
  delete probe;
  EXPECT_EQ(allocations.load() - before, 2);
}

}  // namespace
}  // namespace stretto
