// Counts calls of operator new in this test program.
#ifndef STRETTO_TESTS_UNIT_CORE_ALLOCATION_COUNT_H_
#define STRETTO_TESTS_UNIT_CORE_ALLOCATION_COUNT_H_

#include <cstdint>

namespace stretto {

// Allocations of all threads so far.
int64_t AllocationCount();

}  // namespace stretto

#endif  // STRETTO_TESTS_UNIT_CORE_ALLOCATION_COUNT_H_
