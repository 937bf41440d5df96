// Shared libraries that are opened at first use: programs start on machines that lack them.
#ifndef STRETTO_KERNELS_CUDA_DYNAMIC_LIBRARY_H_
#define STRETTO_KERNELS_CUDA_DYNAMIC_LIBRARY_H_

#include <cstdint>
#include <string>

namespace stretto::cuda {

// Stays open for as long as the process runs, also when this object goes.
class DynamicLibrary {
 public:
  // Opens `name` ("libcublasLt.so.13") where the dynamic linker looks, else in the folder of the
  // toolkit that the program was built with.
  explicit DynamicLibrary(const std::string& name);

  bool ok() const { return error_.empty(); }
  // Why it could not be opened, or the first symbol that it lacks; empty while all is well.
  const std::string& error() const { return error_; }

  // Points `function` at `symbol`; leaves null, with an error, when there is none.
  template <class F>
  void Resolve(const char* symbol, F*& function) {
    function = reinterpret_cast<F*>(Address(symbol));
  }

 private:
  void* Address(const char* symbol);

  std::string name_;
  void* handle_ = nullptr;
  std::string error_;
};

// The file that holds `symbol`; empty when the dynamic linker does not know.
std::string FileOf(const void* symbol);
// "13.0.2" for 130002, as NVIDIA's libraries count.
std::string VersionText(int64_t version);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_DYNAMIC_LIBRARY_H_
