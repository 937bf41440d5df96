#include "src/comm/cuda/nccl_library.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "src/comm/cuda/nccl.h"

namespace stretto {
namespace {

constexpr char kName[] = "libnccl.so.2";
constexpr int kOldest = NCCL_VERSION(2, 28, 0);

std::string VersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

// Fills in `library`; empty, or what is wrong.
std::string Load(NcclLibrary* library) {
  void* handle = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    handle =
        dlopen(absl::StrCat(STRETTO_CUDA_LIBRARY_DIR, "/", kName).c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (handle == nullptr) {
    const char* why = dlerror();
    return absl::StrCat(kName, " cannot be opened (", why == nullptr ? "unknown error" : why, ")");
  }
  std::string missing;
  const auto resolve = [&](const char* symbol, auto& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, symbol));
    if (function == nullptr && missing.empty()) missing = symbol;
  };
  resolve("ncclGetVersion", library->GetVersion);
  int version = 0;
  if (library->GetVersion != nullptr && library->GetVersion(&version) == ncclSuccess &&
      version < kOldest) {
    return absl::StrCat(kName, " is NCCL ", VersionText(version), ", but ", VersionText(kOldest),
                        " or later is needed");
  }
  resolve("ncclGetUniqueId", library->GetUniqueId);
  resolve("ncclGetErrorString", library->GetErrorString);
  resolve("ncclGetLastError", library->GetLastError);
  resolve("ncclCommInitRankConfig", library->CommInitRankConfig);
  resolve("ncclCommSplit", library->CommSplit);
  resolve("ncclCommGetAsyncError", library->CommGetAsyncError);
  resolve("ncclCommFinalize", library->CommFinalize);
  resolve("ncclCommDestroy", library->CommDestroy);
  resolve("ncclCommAbort", library->CommAbort);
  resolve("ncclGroupStart", library->GroupStart);
  resolve("ncclGroupEnd", library->GroupEnd);
  resolve("ncclAllReduce", library->AllReduce);
  resolve("ncclReduceScatter", library->ReduceScatter);
  resolve("ncclAllGather", library->AllGather);
  resolve("ncclBroadcast", library->Broadcast);
  resolve("ncclSend", library->Send);
  resolve("ncclRecv", library->Recv);
  return missing.empty() ? "" : absl::StrCat(kName, " lacks ", missing);
}

}  // namespace

absl::StatusOr<const NcclLibrary*> NcclLibrary::Open() {
  struct Opened {
    NcclLibrary functions = {};
    std::string wrong = Load(&functions);
  };
  static const Opened opened;
  if (opened.wrong.empty()) return &opened.functions;
  return absl::UnavailableError(
      absl::StrCat(opened.wrong, "; install NCCL ", VersionText(kOldest),
                   " or later and put its folder into LD_LIBRARY_PATH, or use runtime.device=cpu"));
}

std::vector<LibraryInfo> DescribeNccl() {
  LibraryInfo info = {.name = "NCCL", .required = false};
  const auto library = NcclLibrary::Open();
  if (!library.ok()) {
    info.problem = std::string(library.status().message());
    return {info};
  }
  int version = 0;
  if ((*library)->GetVersion(&version) == ncclSuccess) info.version = VersionText(version);
  Dl_info file = {};
  if (dladdr(reinterpret_cast<const void*>((*library)->GetVersion), &file) != 0 &&
      file.dli_fname != nullptr) {
    info.path = file.dli_fname;
  }
  return {info};
}

}  // namespace stretto
