// NCCL, opened at first use: programs start on machines that lack it.
#ifndef STRETTO_SRC_COMM_CUDA_NCCL_LIBRARY_H_
#define STRETTO_SRC_COMM_CUDA_NCCL_LIBRARY_H_

#include <nccl.h>

#include <string>

#include "stretto/core/status.h"

namespace stretto {

// The functions that nccl.cc uses, by their names without the prefix.
struct NcclLibrary {
  decltype(&ncclGetVersion) GetVersion;
  decltype(&ncclGetUniqueId) GetUniqueId;
  decltype(&ncclGetErrorString) GetErrorString;
  decltype(&ncclGetLastError) GetLastError;
  decltype(&ncclCommInitRankConfig) CommInitRankConfig;
  decltype(&ncclCommSplit) CommSplit;
  decltype(&ncclCommGetAsyncError) CommGetAsyncError;
  decltype(&ncclCommFinalize) CommFinalize;
  decltype(&ncclCommDestroy) CommDestroy;
  decltype(&ncclCommAbort) CommAbort;
  decltype(&ncclGroupStart) GroupStart;
  decltype(&ncclGroupEnd) GroupEnd;
  decltype(&ncclAllReduce) AllReduce;
  decltype(&ncclReduceScatter) ReduceScatter;
  decltype(&ncclAllGather) AllGather;
  decltype(&ncclBroadcast) Broadcast;
  decltype(&ncclSend) Send;
  decltype(&ncclRecv) Recv;

  // UNAVAILABLE, in one sentence, when there is none or it is too old. Stays open for as long as
  // the process runs.
  static absl::StatusOr<const NcclLibrary*> Open();
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_CUDA_NCCL_LIBRARY_H_
