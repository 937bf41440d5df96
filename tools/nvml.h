// The few functions of NVIDIA's management library that are needed, opened at run time: the
// driver brings the library, so the machine that builds need not have it. Declarations after
// NVML's reference manual, https://docs.nvidia.com/deploy/nvml-api/.
#ifndef STRETTO_TOOLS_NVML_H_
#define STRETTO_TOOLS_NVML_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace stretto {

class Nvml {
 public:
  struct Process {
    unsigned pid = 0;
    int64_t bytes = 0;  // of GPU memory; -1 when the driver does not tell
  };

  Nvml();
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }

  // "580.65.06"; empty when it does not say.
  std::string DriverVersion() const;
  // All of a GPU, by its PCI address ("0000:1b:00.0"). Empty where the driver does not answer.
  std::optional<bool> Ecc(const std::string& pci) const;
  // Errors that ECC could not correct, since the driver was loaded.
  std::optional<int64_t> UncorrectedErrors(const std::string& pci) const;
  std::optional<std::vector<Process>> Processes(const std::string& pci) const;
  std::optional<bool> Mig(const std::string& pci) const;
  // Why its clocks are held down at the moment, as the flags of nvmlClocksEventReasons.
  std::optional<uint64_t> ClockReasons(const std::string& pci) const;

 private:
  void* Address(const char* symbol) const;
  void* DeviceAt(const std::string& pci) const;

  void* library_ = nullptr;
  std::string error_;
};

}  // namespace stretto

#endif  // STRETTO_TOOLS_NVML_H_
