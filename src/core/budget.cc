#include "stretto/core/budget.h"

#include <limits>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/core/format.h"

namespace stretto {
namespace {

constexpr const char* kNames[] = {"host memory", "device memory", "SMs"};

std::string Amount(int resource, int64_t amount) {
  return static_cast<Resource>(resource) == Resource::kSms ? absl::StrCat(amount)
                                                           : HumanBytes(amount);
}

std::string CapacityText(int resource, int64_t capacity) {
  return capacity < 0 ? "no limit" : Amount(resource, capacity);
}

}  // namespace

Budget::Budget(int64_t host_bytes, int64_t device_bytes, int64_t sms) {
  accounts_[0].capacity = host_bytes;
  accounts_[1].capacity = device_bytes;
  accounts_[2].capacity = sms;
}

int64_t Budget::Sum(const Account& account) {
  int64_t sum = 0;
  for (const auto& [owner, amount] : account.owners) sum += amount;
  return sum;
}

absl::Status Budget::Reserve(Resource resource, const std::string& owner, int64_t amount) {
  const int index = static_cast<int>(resource);
  if (amount < 0) {
    return absl::InvalidArgumentError(absl::StrCat("\"", owner, "\" asked for ", amount, " of ",
                                                   kNames[index], "; ask for zero or more"));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  Account& account = accounts_[index];
  const int64_t used = Sum(account);
  const int64_t limit =
      account.capacity < 0 ? std::numeric_limits<int64_t>::max() : account.capacity;
  if (amount > limit - used) {
    std::string message =
        absl::StrCat("\"", owner, "\" asked for ", Amount(index, amount), " of ", kNames[index],
                     ", but ", Amount(index, used), " of ", CapacityText(index, account.capacity),
                     " is taken; raise the budget or shrink one of its owners:");
    for (const auto& [name, held] : account.owners) {
      absl::StrAppend(&message, absl::StrFormat("\n  %-24s %12s", name, Amount(index, held)));
    }
    if (account.owners.empty()) absl::StrAppend(&message, "\n  (no owners)");
    return absl::ResourceExhaustedError(message);
  }
  account.owners[owner] += amount;
  return absl::OkStatus();
}

void Budget::Release(Resource resource, const std::string& owner) {
  std::lock_guard<std::mutex> lock(mutex_);
  accounts_[static_cast<int>(resource)].owners.erase(owner);
}

int64_t Budget::Used(Resource resource) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return Sum(accounts_[static_cast<int>(resource)]);
}

int64_t Budget::Capacity(Resource resource) const {
  return accounts_[static_cast<int>(resource)].capacity;
}

std::string Budget::Report() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string out;
  for (int i = 0; i < 3; ++i) {
    const Account& account = accounts_[i];
    absl::StrAppend(&out, kNames[i], ": ", Amount(i, Sum(account)), " of ",
                    CapacityText(i, account.capacity), "\n");
    for (const auto& [owner, amount] : account.owners) {
      absl::StrAppend(&out, absl::StrFormat("  %-24s %12s\n", owner, Amount(i, amount)));
    }
  }
  return out;
}

}  // namespace stretto
