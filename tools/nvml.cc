#include "tools/nvml.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

using Device = struct NvmlDevice*;

constexpr int kSuccess = 0, kInsufficientSize = 7;
constexpr int kUncorrected = 1, kSinceLoading = 0;

// nvmlProcessInfo_t of nvmlDeviceGetComputeRunningProcesses_v3.
struct ProcessInfo {
  unsigned pid;
  unsigned long long used_memory;  // all ones: not available
  unsigned gpu_instance, compute_instance;
};

template <class... Arguments>
int Call(void* function, Arguments... arguments) {
  constexpr int kMissing = -1;
  if (function == nullptr) return kMissing;
  return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
}

}  // namespace

Nvml::Nvml() {
  library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) {
    const char* why = dlerror();
    error_ = absl::StrCat("libnvidia-ml.so.1 cannot be opened (",
                          why == nullptr ? "unknown error" : why, ")");
  } else if (const int code = Call(Address("nvmlInit_v2")); code != kSuccess) {
    error_ = absl::StrCat("libnvidia-ml.so.1 does not start (nvmlInit: error ", code, ")");
  }
}

Nvml::~Nvml() {
  if (ok()) Call(Address("nvmlShutdown"));
}

void* Nvml::Address(const char* symbol) const {
  return library_ == nullptr ? nullptr : dlsym(library_, symbol);
}

void* Nvml::DeviceAt(const std::string& pci) const {
  Device device = nullptr;
  if (!ok() ||
      Call(Address("nvmlDeviceGetHandleByPciBusId_v2"), pci.c_str(), &device) != kSuccess) {
    return nullptr;
  }
  return device;
}

std::string Nvml::DriverVersion() const {
  char text[96] = {};
  if (!ok() || Call(Address("nvmlSystemGetDriverVersion"), static_cast<char*>(text),
                    static_cast<unsigned>(sizeof(text))) != kSuccess) {
    return "";
  }
  return text;
}

std::optional<bool> Nvml::Ecc(const std::string& pci) const {
  void* device = DeviceAt(pci);
  unsigned now = 0, pending = 0;
  if (device == nullptr ||
      Call(Address("nvmlDeviceGetEccMode"), device, &now, &pending) != kSuccess) {
    return std::nullopt;
  }
  return now != 0;
}

std::optional<int64_t> Nvml::UncorrectedErrors(const std::string& pci) const {
  void* device = DeviceAt(pci);
  unsigned long long count = 0;
  if (device == nullptr || Call(Address("nvmlDeviceGetTotalEccErrors"), device, kUncorrected,
                                kSinceLoading, &count) != kSuccess) {
    return std::nullopt;
  }
  return static_cast<int64_t>(count);
}

std::optional<std::vector<Nvml::Process>> Nvml::Processes(const std::string& pci) const {
  void* device = DeviceAt(pci);
  if (device == nullptr) return std::nullopt;
  std::vector<ProcessInfo> found(64);
  auto count = static_cast<unsigned>(found.size());
  const auto ask = [&] {
    return Call(Address("nvmlDeviceGetComputeRunningProcesses_v3"), device, &count, found.data());
  };
  int code = ask();
  if (code == kInsufficientSize) {
    count += 64;
    found.resize(count);
    code = ask();
  }
  if (code != kSuccess) return std::nullopt;
  std::vector<Process> processes;
  for (unsigned i = 0; i < count; ++i) {
    const bool known = found[i].used_memory != ~0ull;
    processes.push_back({found[i].pid, known ? static_cast<int64_t>(found[i].used_memory) : -1});
  }
  return processes;
}

std::optional<bool> Nvml::Mig(const std::string& pci) const {
  void* device = DeviceAt(pci);
  unsigned now = 0, pending = 0;
  if (device == nullptr ||
      Call(Address("nvmlDeviceGetMigMode"), device, &now, &pending) != kSuccess) {
    return std::nullopt;
  }
  return now != 0;
}

std::optional<uint64_t> Nvml::ClockReasons(const std::string& pci) const {
  void* device = DeviceAt(pci);
  unsigned long long reasons = 0;
  if (device == nullptr ||
      Call(Address("nvmlDeviceGetCurrentClocksThrottleReasons"), device, &reasons) != kSuccess) {
    return std::nullopt;
  }
  return reasons;
}

}  // namespace stretto
