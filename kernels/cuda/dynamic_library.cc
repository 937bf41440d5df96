#include "kernels/cuda/dynamic_library.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"

namespace stretto::cuda {
namespace {

std::string LastError() {
  const char* text = dlerror();
  return text == nullptr ? "unknown error of the dynamic linker" : text;
}

}  // namespace

DynamicLibrary::DynamicLibrary(const std::string& name) : name_(name) {
  handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ != nullptr) return;
  error_ = LastError();
  handle_ =
      dlopen(absl::StrCat(STRETTO_CUDA_LIBRARY_DIR, "/", name).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ != nullptr) {
    error_.clear();
    return;
  }
  // Two plain "no such file" messages would say the same thing twice.
  const std::string second = LastError();
  if (second.find("No such file") == std::string::npos) error_ = second;
}

void* DynamicLibrary::Address(const char* symbol) {
  if (handle_ == nullptr) return nullptr;
  void* address = dlsym(handle_, symbol);
  if (address == nullptr && error_.empty()) error_ = absl::StrCat(name_, " lacks ", symbol);
  return address;
}

std::string FileOf(const void* symbol) {
  Dl_info info = {};
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return "";
  return info.dli_fname;
}

std::string VersionText(int64_t version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace stretto::cuda
