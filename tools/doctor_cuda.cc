// The GPU side of stretto-doctor.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "src/comm/device_collectives.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/ops/ops.h"
#include "tools/doctor.h"
#include "tools/nvml.h"

namespace stretto {
namespace {

std::string CudaVersion(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// The name that a process has in the system; empty when it is not ours to see.
std::string ProgramName(unsigned pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/comm"));
  std::string name;
  std::getline(file, name);
  return name;
}

struct Gpu {
  int index = 0;
  std::string what;  // "gpu 0"
  std::string pci;
  DeviceInfo info;
  std::string users;  // other processes on it, for people
};

// False: there is no GPU to look at, which the report says.
bool CheckDriver(Report& report, const Nvml& nvml) {
  int supported = 0, needed = 0;
  cudaDriverGetVersion(&supported);
  cudaRuntimeGetVersion(&needed);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (supported == 0) {
    report.Note("gpu", "there is no NVIDIA driver on this machine: runs use the CPU");
    return false;
  }
  const nlohmann::ordered_json values = {{"driver", nvml.DriverVersion()},
                                         {"cuda", CudaVersion(supported)},
                                         {"needed", CudaVersion(needed)}};
  std::string text =
      nvml.DriverVersion().empty() ? "the NVIDIA driver" : "NVIDIA driver " + nvml.DriverVersion();
  absl::StrAppend(&text, " supports CUDA ", CudaVersion(supported));
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    report.Note(
        "gpu",
        absl::StrCat(text, ", but no GPU is visible: runs use the CPU (",
                     visible == nullptr ? std::string("check nvidia-smi")
                                        : absl::StrCat("CUDA_VISIBLE_DEVICES is '", visible, "'"),
                     ")"),
        values);
    return false;
  }
  if (error != cudaSuccess) {
    const std::string why(DescribeDevice(Device::Cuda(0)).status().message());
    report.Problem("driver", why, values);
    return false;
  }
  if (supported < needed) {
    report.Note("driver",
                absl::StrCat(text, "; this program was built with CUDA ", CudaVersion(needed),
                             ", which works within one major version; a newer driver is safer"),
                values);
  } else {
    report.Ok("driver", absl::StrCat(text, "; this program needs ", CudaVersion(needed)), values);
  }
  if (!nvml.ok()) {
    report.Note("driver", absl::StrCat(nvml.error(), ": ECC and other processes are not checked"));
  }
  return true;
}

// Whether this build's kernels run on a GPU of compute capability major.minor.
bool CheckArchitecture(Report& report, const Gpu& gpu, int major, int minor,
                       const std::string& name) {
  bool machine_code = false, ptx = false;
  for (const absl::string_view part : absl::StrSplit(STRETTO_CUDA_ARCHITECTURES, ',')) {
    const std::string text(part);  // "90", "90a", "90-real", or a word such as "native"
    const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
    int number = 0;
    if (!absl::SimpleAtoi(text.substr(0, digits), &number)) {
      machine_code = true;  // left to what the device says when it is described
      continue;
    }
    const bool only_real = text.find("real") != std::string::npos || text.substr(digits, 1) == "a";
    const bool only_virtual = text.find("virtual") != std::string::npos;
    const bool later = major * 10 + minor >= number;
    machine_code = machine_code || (!only_virtual && number / 10 == major && later);
    ptx = ptx || (!only_real && later);
  }
  const std::string has = absl::StrFormat("%s has compute capability %d.%d", name, major, minor);
  const std::string built = absl::StrCat("this build has kernels for ", STRETTO_CUDA_ARCHITECTURES);
  const nlohmann::ordered_json values = {{"capability", absl::StrCat(major, ".", minor)},
                                         {"built_for", STRETTO_CUDA_ARCHITECTURES}};
  if (machine_code) {
    report.Ok(gpu.what, absl::StrCat(has, "; ", built), values);
  } else if (ptx) {
    report.Note(gpu.what,
                absl::StrCat(has, "; ", built,
                             ", which the driver compiles anew when a program "
                             "starts; configure with -DCMAKE_CUDA_ARCHITECTURES=",
                             major, minor),
                values);
  } else {
    report.Problem(gpu.what,
                   absl::StrCat(has, ", but ", built,
                                "; configure with "
                                "-DCMAKE_CUDA_ARCHITECTURES=",
                                major, minor, ", or use another GPU (CUDA_VISIBLE_DEVICES)"),
                   values);
  }
  return machine_code || ptx;
}

// Who uses the memory, as far as the driver tells: "; processes: 4711 python 30.0 GiB".
std::string Users(const Nvml& nvml, const Gpu& gpu) {
  std::string users;
  const auto processes = nvml.Processes(gpu.pci);
  if (!processes.has_value()) return "";
  for (const Nvml::Process& process : *processes) {
    absl::StrAppend(&users, users.empty() ? "" : ", ", process.pid);
    const std::string name = ProgramName(process.pid);
    if (!name.empty()) absl::StrAppend(&users, " ", name);
    if (process.bytes >= 0) absl::StrAppend(&users, " ", SizeText(process.bytes));
  }
  return users.empty() ? "" : "; processes: " + users;
}

void CheckMemoryOf(Report& report, const Gpu& gpu) {
  // The driver keeps some for itself, and this program's own context takes some.
  constexpr int64_t kOwn = int64_t{2} << 30;
  const int64_t total = gpu.info.total_bytes, available = gpu.info.free_bytes;
  const std::string text =
      absl::StrCat(SizeText(available), " free of ", SizeText(total), gpu.users);
  const nlohmann::ordered_json values = {{"total_bytes", total}, {"free_bytes", available}};
  if (available < total / 2) {
    report.Problem(gpu.what,
                   absl::StrCat(text,
                                "; end what uses the rest, or choose another GPU with "
                                "CUDA_VISIBLE_DEVICES"),
                   values);
  } else if (total - available > kOwn) {
    report.Note(gpu.what,
                absl::StrCat(text,
                             "; what others use is missing for a run, and their work slows "
                             "it down"),
                values);
  } else {
    report.Ok(gpu.what, text, values);
  }
}

void CheckHealth(Report& report, const Nvml& nvml, const Gpu& gpu) {
  if (!nvml.ok()) return;
  const auto errors = nvml.UncorrectedErrors(gpu.pci);
  const auto ecc = nvml.Ecc(gpu.pci);
  if (errors.value_or(0) > 0) {
    report.Problem(gpu.what,
                   absl::StrCat(*errors,
                                " memory errors that ECC could not correct since the "
                                "driver was loaded; reset the GPU, and replace it when they come "
                                "back (nvidia-smi -q -d ECC)"),
                   {{"uncorrected_errors", *errors}});
  } else if (ecc.has_value() && !*ecc) {
    report.Note(gpu.what,
                "ECC is off: errors of the memory go unnoticed; nvidia-smi -e 1 and a restart turn "
                "it on");
  } else if (ecc.has_value()) {
    report.Ok(gpu.what, "ECC is on, no uncorrected errors since the driver was loaded");
  }
  if (nvml.Mig(gpu.pci).value_or(false)) {
    report.Note(gpu.what,
                "MIG is on: this is a part of a GPU, which NCCL does not connect to other parts");
  }
}

std::vector<Gpu> CheckEachGpu(Report& report, const Nvml& nvml) {
  int count = 0;
  cudaGetDeviceCount(&count);
  std::vector<Gpu> usable;
  for (int i = 0; i < count; ++i) {
    Gpu gpu = {.index = i, .what = absl::StrCat("gpu ", i)};
    char pci[32] = {};
    cudaDeviceProp properties;
    if (cudaDeviceGetPCIBusId(pci, sizeof(pci), i) != cudaSuccess ||
        cudaGetDeviceProperties(&properties, i) != cudaSuccess) {
      report.Problem(gpu.what, "its properties cannot be read; check nvidia-smi and dmesg");
      continue;
    }
    gpu.pci = pci;
    if (!CheckArchitecture(report, gpu, properties.major, properties.minor, properties.name)) {
      continue;
    }
    gpu.users = Users(nvml, gpu);  // before this process uses it, too
    auto info = DescribeDevice(Device::Cuda(i));
    if (!info.ok()) {
      report.Problem(gpu.what, std::string(info.status().message()));
      continue;
    }
    gpu.info = *info;
    CheckMemoryOf(report, gpu);
    CheckHealth(report, nvml, gpu);
    usable.push_back(std::move(gpu));
  }
  return usable;
}

void CheckPeers(Report& report, const std::vector<Gpu>& gpus) {
  if (gpus.size() < 2) return;
  std::string without;
  for (const Gpu& a : gpus) {
    for (const Gpu& b : gpus) {
      int can = 0;
      if (a.index == b.index) continue;
      if (cudaDeviceCanAccessPeer(&can, a.index, b.index) == cudaSuccess && can != 0) continue;
      absl::StrAppend(&without, without.empty() ? "" : ", ", a.index, " to ", b.index);
    }
  }
  if (without.empty()) {
    report.Ok("peer access", absl::StrCat("between all ", gpus.size(), " GPUs"));
  } else {
    report.Note("peer access",
                absl::StrCat("missing from GPU ", without,
                             ": what they exchange goes through host "
                             "memory; check nvidia-smi topo -p2p r, and that the machine's IOMMU "
                             "lets them"));
  }
}

void CheckLibraries(Report& report, size_t gpus) {
  std::vector<LibraryInfo> libraries;
  const auto kernels = KernelsFor(Device::Cuda(0));
  if (kernels.ok() && (*kernels)->describe_libraries != nullptr) {
    libraries = (*kernels)->describe_libraries();
  }
  for (const LibraryInfo& library : DescribeCollectives(DeviceKind::kCuda)) {
    libraries.push_back(library);
    libraries.back().required = gpus > 1;
  }
  for (const LibraryInfo& library : libraries) {
    const nlohmann::ordered_json values = {{"version", library.version}, {"path", library.path}};
    if (library.problem.empty()) {
      report.Ok(library.name, absl::StrCat(library.version, " from ", library.path), values);
    } else if (library.required) {
      report.Problem(library.name, library.problem, values);
    } else {
      report.Note(library.name, library.problem, values);
    }
  }
}

// ------------------------------------------------------------------------------------ measuring

// Least seconds of one of `inner` calls of `work`; negative when the stream failed.
double Time(Stream& stream, int inner, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  double best = -1;
  for (int i = 0; i < 4; ++i) {
    const auto begin = Clock::now();
    for (int k = 0; k < inner; ++k) work();
    if (!stream.Synchronize().ok()) return -1;
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count() / inner;
    if (i > 0 && (best < 0 || seconds < best)) best = seconds;  // the first one warms up
  }
  return best;
}

// Bytes per second that the memory is built for; 0 when the driver does not say.
double MemoryRate(int index) {
  int kilohertz = 0, bits = 0;
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, index) != cudaSuccess) {
    return 0;
  }
  return 2.0 * kilohertz * 1e3 * bits / 8;  // two transfers a cycle
}

// Multiplications and additions of bf16 per second at the highest clock; 0 when not known.
double ProductRate(const Gpu& gpu) {
  int kilohertz = 0;
  if (gpu.info.major != 9 ||
      cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, gpu.index) != cudaSuccess) {
    return 0;
  }
  constexpr double kPerCycle = 4096;  // of one of Hopper's multiprocessors
  return kPerCycle * gpu.info.multiprocessors * kilohertz * 1e3;
}

// Text for the reasons in nvmlClocksEventReasons that make a GPU slower than it should be.
std::string Throttled(const Nvml& nvml, const Gpu& gpu) {
  constexpr uint64_t kHardware = 0x8, kSoftwareHeat = 0x20, kHeat = 0x40, kPowerBrake = 0x80;
  const uint64_t reasons = nvml.ClockReasons(gpu.pci).value_or(0);
  if ((reasons & (kSoftwareHeat | kHeat)) != 0) return "its clocks are lowered because it is hot";
  if ((reasons & kPowerBrake) != 0) return "its clocks are lowered by the power supply";
  if ((reasons & kHardware) != 0) return "its clocks are lowered by the hardware";
  return "";
}

absl::Status MeasureGpu(Report& report, const Nvml& nvml, const Gpu& gpu) {
  constexpr int64_t kSide = 8192;
  constexpr int64_t kBytes = int64_t{512} << 20;
  constexpr int64_t kHostBytes = int64_t{128} << 20;
  constexpr double kPoorShare = 0.6;
  constexpr double kPoorLink = 10e9;  // half of what PCIe 4.0 x16 does
  const Device device = Device::Cuda(gpu.index);
  STRETTO_ASSIGN_OR_RETURN(const Arena memory, Arena::Create(device, "doctor", 2 * kBytes));
  STRETTO_ASSIGN_OR_RETURN(const Arena host, Arena::CreateHost(device, "doctor", kHostBytes));
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(device, {}));
  std::byte* const from = memory.data();
  std::byte* const to = memory.data() + kBytes;

  const double copy = Time(*stream, 8, [&] { CopyBytes(*stream, to, from, kBytes); });
  const double up = Time(*stream, 2, [&] { CopyBytes(*stream, to, host.data(), kHostBytes); });
  const double down = Time(*stream, 2, [&] { CopyBytes(*stream, host.data(), from, kHostBytes); });
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  const double copy_rate = 2 * static_cast<double>(kBytes) / copy;  // read and written
  const double up_rate = static_cast<double>(kHostBytes) / up;
  const double down_rate = static_cast<double>(kHostBytes) / down;
  const double best_copy = MemoryRate(gpu.index);
  std::string text = absl::StrFormat("copies %.0f GB/s within its memory", copy_rate / 1e9);
  if (best_copy > 0) absl::StrAppendFormat(&text, " (%.0f by its clock)", best_copy / 1e9);
  const nlohmann::ordered_json copy_values = {{"copy_bytes_per_second", copy_rate},
                                              {"clock_bytes_per_second", best_copy}};
  if (copy_rate < kPoorShare * best_copy) {
    report.Note(gpu.what,
                absl::StrCat(text,
                             ", which is little; see what else runs on it and its clocks "
                             "(nvidia-smi -q -d CLOCK,PERFORMANCE)"),
                copy_values);
  } else {
    report.Ok(gpu.what, text, copy_values);
  }
  text = absl::StrFormat("host to device %.1f GB/s, device to host %.1f GB/s, page-locked",
                         up_rate / 1e9, down_rate / 1e9);
  const nlohmann::ordered_json link_values = {{"to_device_bytes_per_second", up_rate},
                                              {"to_host_bytes_per_second", down_rate}};
  if (std::min(up_rate, down_rate) < kPoorLink) {
    report.Note(gpu.what,
                absl::StrCat(text,
                             ", which is little; the GPU may sit in a slot with few lanes, or "
                             "the process on the other socket (nvidia-smi topo -m)"),
                link_values);
  } else {
    report.Ok(gpu.what, text, link_values);
  }

  STRETTO_ASSIGN_OR_RETURN(const KernelTable* const kernels, KernelsFor(device));
  const ops::Context context = {stream.get(), kernels};
  const auto square = [&](int i) {
    return Tensor::Of(memory.data() + i * 2 * kSide * kSide, DType::kBF16, {kSide, kSide}, device);
  };
  const double product =
      Time(*stream, 5, [&] { ops::Linear(context, square(2), square(0), square(1), {}); });
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  const std::string throttled = Throttled(nvml, gpu);
  const double rate = 2.0 * kSide * kSide * kSide / product;
  const double best = ProductRate(gpu);
  text =
      absl::StrFormat("bf16 product of %d x %d matrices %.0f TFLOP/s", kSide, kSide, rate / 1e12);
  if (best > 0) absl::StrAppendFormat(&text, " (%.0f by its highest clock)", best / 1e12);
  const nlohmann::ordered_json values = {{"product_flops", rate}, {"clock_flops", best}};
  if (!throttled.empty()) {
    report.Note(gpu.what, absl::StrCat(text, "; ", throttled, ": check its cooling and power"),
                values);
  } else if (rate < 0.5 * best) {
    report.Note(gpu.what,
                absl::StrCat(text,
                             ", which is little; see what else runs on it and its clocks "
                             "(nvidia-smi -q -d CLOCK,PERFORMANCE)"),
                values);
  } else {
    report.Ok(gpu.what, text, values);
  }
  return absl::OkStatus();
}

// From a GPU to the next one.
absl::Status MeasurePeer(Report& report, const Gpu& a, const Gpu& b) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  const Device from_device = Device::Cuda(a.index), to_device = Device::Cuda(b.index);
  STRETTO_ASSIGN_OR_RETURN(const Arena from, Arena::Create(from_device, "doctor", kBytes));
  STRETTO_ASSIGN_OR_RETURN(const Arena to, Arena::Create(to_device, "doctor", kBytes));
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(from_device, {}));
  cudaSetDevice(a.index);
  const bool direct = cudaDeviceEnablePeerAccess(b.index, 0) == cudaSuccess;
  cudaGetLastError();  // a refusal is no error of the copies below
  const double seconds =
      Time(*stream, 4, [&] { CopyBytes(*stream, to.data(), from.data(), kBytes); });
  if (direct) cudaDeviceDisablePeerAccess(b.index);
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  const double rate = static_cast<double>(kBytes) / seconds;
  report.Ok(
      absl::StrCat("gpu ", a.index, " to ", b.index),
      absl::StrFormat("copies %.0f GB/s%s", rate / 1e9, direct ? "" : ", through host memory"),
      {{"copy_bytes_per_second", rate}, {"direct", direct}});
  return absl::OkStatus();
}

}  // namespace

void CheckGpus(Report& report, bool measure) {
  const Nvml nvml;
  if (!CheckDriver(report, nvml)) return;
  const std::vector<Gpu> gpus = CheckEachGpu(report, nvml);
  CheckPeers(report, gpus);
  CheckLibraries(report, gpus.size());
  if (!measure) return;
  const auto failed = [&](const std::string& what, const absl::Status& status) {
    if (status.ok()) return;
    report.Problem(what, absl::StrCat("could not be measured: ", std::string(status.message())));
  };
  for (const Gpu& gpu : gpus) failed(gpu.what, MeasureGpu(report, nvml, gpu));
  for (size_t i = 0; gpus.size() > 1 && i < gpus.size(); ++i) {
    const Gpu& next = gpus[(i + 1) % gpus.size()];
    failed(absl::StrCat("gpu ", gpus[i].index, " to ", next.index),
           MeasurePeer(report, gpus[i], next));
  }
}

}  // namespace stretto
