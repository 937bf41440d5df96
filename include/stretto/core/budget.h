// One budget for each of host memory, device memory and SMs (contract 12): nobody sizes itself from
// "what is free".
#ifndef STRETTO_CORE_BUDGET_H_
#define STRETTO_CORE_BUDGET_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "stretto/core/device.h"
#include "stretto/core/status.h"

namespace stretto {

enum class Resource : uint8_t { kHostMemory, kDeviceMemory, kSms };

// The account that memory on a device is drawn from.
constexpr Resource MemoryOf(Device device) {
  return device.kind == DeviceKind::kCpu ? Resource::kHostMemory : Resource::kDeviceMemory;
}

// Grants shares of fixed capacities. Thread-safe.
class Budget {
 public:
  // Bytes, bytes and a count; a capacity of -1 is unlimited (uses are still recorded).
  Budget(int64_t host_bytes, int64_t device_bytes, int64_t sms);

  // RESOURCE_EXHAUSTED with a table of the present owners when `amount` does not fit.
  absl::Status Reserve(Resource resource, const std::string& owner, int64_t amount);
  void Release(Resource resource, const std::string& owner);
  int64_t Used(Resource resource) const;
  int64_t Capacity(Resource resource) const;
  // One line an owner.
  std::string Report() const;

 private:
  struct Account {
    int64_t capacity = -1;
    std::map<std::string, int64_t> owners;
  };
  static int64_t Sum(const Account& account);
  mutable std::mutex mutex_;
  Account accounts_[3];
};

}  // namespace stretto

#endif  // STRETTO_CORE_BUDGET_H_
