// What a kernel reports when its data is wrong: written by the device, read by the host.
#ifndef STRETTO_SRC_CORE_DEVICE_FAULT_H_
#define STRETTO_SRC_CORE_DEVICE_FAULT_H_

#include <cstdint>

namespace stretto {

// One for each device stream, in host memory that the device can write. The first fault wins: a
// kernel takes the claim, which lies in the device's memory, and fills in the rest, `code` last.
struct DeviceFault {
  enum Code : int32_t {
    kNone = 0,
    kEmbeddingId = 1,        // value, row, rows of the table
    kEmbeddingPosition = 2,  // value, row, rows of the table
    kEmbeddingGradient = 3,  // value, row, rows of the table
    kLossTarget = 4,         // target (INT64_MIN: not given), row
    kRotaryPosition = 5,     // value, row, rows of the tables
    kSequenceStart = 6,      // cu_q or cu_k starts below 0
    kSequenceOrder = 7,      // row: the sequence whose boundaries decrease
    kSequenceLengths = 8,    // value queries and rows keys of sequence row, which must agree
    kSequenceEnd = 9,    // value: query, rows: key at which the sequences end, beyond the operands
    kSequenceRoom = 10,  // value queries and rows keys of sequence row, more than there is room for
  };
  int32_t code = kNone;
  int32_t reserved = 0;
  int64_t value = 0;
  int64_t row = 0;
  int64_t rows = 0;
  int32_t* claim = nullptr;  // in device memory; 0: free
};

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_DEVICE_FAULT_H_
