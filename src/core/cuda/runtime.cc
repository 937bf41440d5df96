#include "src/core/cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/core/cuda/errors.h"

namespace stretto {
namespace {

// Kernels are compiled for this compute capability (and as PTX for later ones).
constexpr int kOldestMajor = 9;

std::string Text(cudaError_t error) {
  return absl::StrCat(cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
}

absl::Status Failed(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: ", call, " failed: ", Text(error)));
}

// Work that ran before has broken the process's hold on the GPU.
absl::Status Lost(cudaError_t error, int index) {
  return absl::InternalError(absl::StrCat(
      "GPU ", index, " failed: ", Text(error),
      "; the work before this point is lost: start again from the last checkpoint "
      "(CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer find a faulty kernel, nvidia-smi -q and dmesg "
      "a faulty GPU)"));
}

// An error of earlier work is not one of the call that met it.
absl::Status Called(const char* call, cudaError_t error, int index) {
  return ContextLost(error) ? Lost(error, index) : Failed(call, error);
}

constexpr char kMakeRoom[] =
    "; end the other programs on it (nvidia-smi lists them), or give another one with "
    "CUDA_VISIBLE_DEVICES";

absl::Status Exhausted(cudaError_t error, int index) {
  if (ContextLost(error)) return Lost(error, index);
  size_t available = 0, total = 0;
  cudaGetLastError();  // an allocation that failed is no error of a kernel
  std::string room;
  if (cudaMemGetInfo(&available, &total) == cudaSuccess) {
    room = absl::StrCat("; ", available >> 20, " of ", total >> 20, " MiB of GPU ", index,
                        " are free");
  }
  return absl::ResourceExhaustedError(absl::StrCat(Text(error), room));
}

// What a kernel has written, as the CPU's kernels word it.
absl::Status FaultStatus(const DeviceFault& fault) {
  const auto outside = [&](const char* op, const char* what) {
    return absl::OutOfRangeError(absl::StrCat(
        op, ": ", what, " ", fault.value, " in row ", fault.row, " is outside the table of ",
        fault.rows, " rows; check the data against the model's configuration"));
  };
  switch (fault.code) {
    case DeviceFault::kNone:
      return absl::OkStatus();
    case DeviceFault::kEmbeddingId:
      return outside("Embedding", "id");
    case DeviceFault::kEmbeddingPosition:
      return outside("Embedding", "position");
    case DeviceFault::kEmbeddingGradient:
      return outside("EmbeddingBackward", "id");
    case DeviceFault::kLossTarget:
      return absl::OutOfRangeError(absl::StrCat(
          "Loss: ", fault.value == INT64_MIN ? "the target" : absl::StrCat("target ", fault.value),
          " of row ", fault.row,
          " is in no chunk of the vocabulary, or its logit is -inf; check the data against the "
          "vocabulary, or give the token weight 0"));
    case DeviceFault::kRotaryPosition:
      return absl::OutOfRangeError(absl::StrCat(
          "Rope: position ", fault.value, " of row ", fault.row, " is outside the tables of ",
          fault.rows, " positions; raise max_positions, or shorten the sequences"));
    case DeviceFault::kSequenceStart:
      return absl::InvalidArgumentError("Attention: cu_q and cu_k must not start below 0");
    case DeviceFault::kSequenceOrder:
      return absl::InvalidArgumentError(absl::StrCat(
          "Attention: cu_q and cu_k must not decrease; sequence ", fault.row, " does"));
    case DeviceFault::kSequenceLengths:
      return absl::InvalidArgumentError(
          absl::StrCat("Attention: causal attention needs as many queries as keys; sequence ",
                       fault.row, " has ", fault.value, " and ", fault.rows));
    case DeviceFault::kSequenceRoom:
      return absl::InvalidArgumentError(absl::StrCat("Attention: sequence ", fault.row, " has ",
                                                     fault.value, " queries and ", fault.rows,
                                                     " keys, not as many as there is room for"));
    case DeviceFault::kSequenceEnd:
      return absl::InvalidArgumentError(absl::StrCat("Attention: the sequences end at query ",
                                                     fault.value, " and key ", fault.rows,
                                                     ", beyond the rows of q or k"));
    default:
      return absl::InternalError(absl::StrCat("a kernel reported fault ", fault.code));
  }
}

class CudaGraph final : public DeviceGraph {
 public:
  explicit CudaGraph(cudaGraphExec_t graph) : graph_(graph) {}
  ~CudaGraph() override { cudaGraphExecDestroy(graph_); }
  cudaGraphExec_t get() const { return graph_; }

 private:
  cudaGraphExec_t graph_;
};

class CudaQueue final : public DeviceQueue {
 public:
  static absl::StatusOr<std::unique_ptr<DeviceQueue>> Create(int index,
                                                             const StreamOptions& options) {
    auto queue = std::unique_ptr<CudaQueue>(new CudaQueue(index));
    STRETTO_RETURN_IF_ERROR(Failed("cudaSetDevice", cudaSetDevice(index)));
    int least = 0, greatest = 0;  // priorities; the greatest is the lowest number
    STRETTO_RETURN_IF_ERROR(Failed("cudaDeviceGetStreamPriorityRange",
                                   cudaDeviceGetStreamPriorityRange(&least, &greatest)));
    STRETTO_RETURN_IF_ERROR(Failed(
        "cudaStreamCreate", cudaStreamCreateWithPriority(&queue->stream_, cudaStreamNonBlocking,
                                                         options.first_served ? greatest : least)));
    for (cudaEvent_t& event : queue->events_) {
      STRETTO_RETURN_IF_ERROR(
          Failed("cudaEventCreate", cudaEventCreateWithFlags(&event, cudaEventDisableTiming)));
    }
    void* memory = nullptr;
    cudaError_t error = cudaHostAlloc(&memory, sizeof(DeviceFault), cudaHostAllocMapped);
    if (error != cudaSuccess) return NoRoom(error, index, sizeof(DeviceFault));
    queue->fault_ = new (memory) DeviceFault;
    error = cudaMalloc(&memory, sizeof(int32_t));
    if (error == cudaSuccess) error = cudaMemset(memory, 0, sizeof(int32_t));
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return NoRoom(error, index, sizeof(int32_t));
    queue->fault_->claim = static_cast<int32_t*>(memory);
    if (options.workspace_bytes > 0) {
      error = cudaMalloc(&memory, static_cast<size_t>(options.workspace_bytes));
      if (error != cudaSuccess) return NoRoom(error, index, options.workspace_bytes);
      queue->workspace_ = {static_cast<std::byte*>(memory), options.workspace_bytes};
    }
    return queue;
  }

  ~CudaQueue() override {
    cudaSetDevice(index_);
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    for (cudaEvent_t event : events_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    if (workspace_.data != nullptr) cudaFree(workspace_.data);
    if (fault_ != nullptr) {
      if (fault_->claim != nullptr) cudaFree(fault_->claim);
      cudaFreeHost(fault_);
    }
  }

  void* native() const override { return stream_; }
  Stream::Workspace workspace() const override { return workspace_; }
  DeviceFault* fault() const override { return fault_; }

  uint64_t Record() override {
    const uint64_t point = points_.load(std::memory_order_relaxed) + 1;
    cudaEventRecord(events_[point % kEvents], stream_);
    points_.store(point, std::memory_order_release);
    return point;
  }

  // An event serves many points. When it has been recorded again since, it stands for a later
  // point, and what was asked for has happened no later.
  bool Done(uint64_t point) const override {
    if (point == 0 || finished_.load(std::memory_order_acquire) >= point) return true;
    if (cudaEventQuery(events_[point % kEvents]) == cudaErrorNotReady) return false;
    uint64_t seen = finished_.load(std::memory_order_relaxed);
    while (seen < point && !finished_.compare_exchange_weak(seen, point)) {
    }
    return true;
  }

  absl::Status WaitFor(const DeviceQueue& other, uint64_t point) override {
    const auto& queue = static_cast<const CudaQueue&>(other);
    return Called("cudaStreamWaitEvent",
                  cudaStreamWaitEvent(stream_, queue.events_[point % kEvents], 0), index_);
  }

  absl::Status Synchronize() override {
    const cudaError_t error = cudaStreamSynchronize(stream_);
    STRETTO_RETURN_IF_ERROR(Reported());
    return error == cudaSuccess ? absl::OkStatus() : Lost(error, index_);
  }

  absl::Status Reported() const override {
    const auto* fault = static_cast<const volatile DeviceFault*>(fault_);
    if (fault->code == DeviceFault::kNone) return absl::OkStatus();
    DeviceFault copy;
    copy.code = fault->code;
    copy.value = fault->value;
    copy.row = fault->row;
    copy.rows = fault->rows;
    return FaultStatus(copy);
  }

  absl::Status Copy(void* to, const void* from, int64_t bytes) override {
    return Called("cudaMemcpyAsync",
                  cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_),
                  index_);
  }

  // Only this queue is captured: other threads, and other queues of this one, go on as they were.
  absl::Status BeginCapture() override {
    return Called("cudaStreamBeginCapture",
                  cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), index_);
  }

  absl::StatusOr<std::unique_ptr<DeviceGraph>> EndCapture() override {
    cudaGraph_t captured = nullptr;
    STRETTO_RETURN_IF_ERROR(
        Called("cudaStreamEndCapture", cudaStreamEndCapture(stream_, &captured), index_));
    cudaGraphExec_t graph = nullptr;
    const cudaError_t error = cudaGraphInstantiate(&graph, captured, 0);
    cudaGraphDestroy(captured);
    STRETTO_RETURN_IF_ERROR(Called("cudaGraphInstantiate", error, index_));
    return std::make_unique<CudaGraph>(graph);
  }

  absl::Status Launch(const DeviceGraph& graph) override {
    return Called("cudaGraphLaunch",
                  cudaGraphLaunch(static_cast<const CudaGraph&>(graph).get(), stream_), index_);
  }

 private:
  static constexpr int kEvents = 256;
  explicit CudaQueue(int index) : index_(index) {}

  static absl::Status NoRoom(cudaError_t error, int index, int64_t bytes) {
    if (ContextLost(error)) return Lost(error, index);
    const absl::Status exhausted = Exhausted(error, index);
    return absl::Status(exhausted.code(),
                        absl::StrCat("a stream on GPU ", index, " needs ", bytes,
                                     " bytes of scratch memory, which could not be allocated: ",
                                     std::string(exhausted.message()), kMakeRoom));
  }

  int index_;
  cudaStream_t stream_ = nullptr;
  std::array<cudaEvent_t, kEvents> events_ = {};
  std::atomic<uint64_t> points_{0};
  mutable std::atomic<uint64_t> finished_{0};
  Stream::Workspace workspace_;
  DeviceFault* fault_ = nullptr;
};

class CudaMarks final : public DeviceMarks {
 public:
  explicit CudaMarks(int index) : index_(index) {}
  ~CudaMarks() override {
    cudaSetDevice(index_);
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  absl::Status MakeRoom(size_t count) {
    STRETTO_RETURN_IF_ERROR(Called("cudaSetDevice", cudaSetDevice(index_), index_));
    while (events_.size() < count) {
      cudaEvent_t event = nullptr;
      STRETTO_RETURN_IF_ERROR(Called("cudaEventCreate", cudaEventCreate(&event), index_));
      events_.push_back(event);
    }
    return absl::OkStatus();
  }

  absl::Status Mark(DeviceQueue& queue, size_t mark) override {
    if (mark >= events_.size()) STRETTO_RETURN_IF_ERROR(MakeRoom(mark + 1));
    return Called("cudaEventRecord",
                  cudaEventRecord(events_[mark], static_cast<cudaStream_t>(queue.native())),
                  index_);
  }

  double SecondsBetween(size_t from, size_t to) const override {
    float ms = 0;
    const cudaError_t error = cudaEventElapsedTime(&ms, events_[from], events_[to]);
    if (error == cudaSuccess) return 1e-3 * static_cast<double>(ms);
    cudaGetLastError();  // a time that is not known is no error of a kernel
    return -1;
  }

 private:
  int index_;
  std::vector<cudaEvent_t> events_;
};

class Runtime final : public DeviceRuntime {
 public:
  DeviceKind kind() const override { return DeviceKind::kCuda; }

  absl::StatusOr<DeviceInfo> Describe(int index) const override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
      int driver = 0, runtime = 0;
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      if (driver == 0) {
        return absl::UnavailableError(
            "there is no NVIDIA driver on this machine; install one, or use runtime.device=cpu");
      }
      return absl::UnavailableError(
          absl::StrCat("the NVIDIA driver supports CUDA ", driver / 1000, ".", driver % 1000 / 10,
                       " but this program needs ", runtime / 1000, ".", runtime % 1000 / 10,
                       "; install a newer driver, or use runtime.device=cpu"));
    }
    if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
      return absl::UnavailableError(
          "no GPU is visible to this process; check CUDA_VISIBLE_DEVICES and nvidia-smi, or use "
          "runtime.device=cpu");
    }
    if (ContextLost(error)) return Lost(error, index);
    if (error != cudaSuccess) {
      return absl::UnavailableError(absl::StrCat("the GPUs cannot be used: ", Text(error),
                                                 "; check nvidia-smi, or use runtime.device=cpu"));
    }
    if (index < 0 || index >= count) {
      return absl::UnavailableError(absl::StrCat(
          "GPU ", index, " was asked for, but this process sees ", count,
          count == 1 ? " GPU" : " GPUs",
          "; start at most one rank for each GPU of a machine, or use runtime.device=cpu"));
    }
    cudaDeviceProp properties;
    cudaError_t reached = cudaGetDeviceProperties(&properties, index);
    STRETTO_RETURN_IF_ERROR(Called("cudaGetDeviceProperties", reached, index));
    DeviceInfo info;
    info.name = properties.name;
    char pci[32] = {};
    STRETTO_RETURN_IF_ERROR(
        Failed("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(pci, sizeof(pci), index)));
    info.pci = pci;
    info.devices = count;
    info.total_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    info.major = properties.major;
    info.minor = properties.minor;
    info.multiprocessors = properties.multiProcessorCount;
    if (info.major < kOldestMajor) {
      return absl::UnavailableError(absl::StrCat(
          "GPU ", index, " (", info.name, ") has compute capability ", info.major, ".", info.minor,
          ", but the kernels of this build need ", kOldestMajor,
          ".0; configure with -DCMAKE_CUDA_ARCHITECTURES for it, or use runtime.device=cpu"));
    }
    // The first call that needs a context of this process, which takes some hundred MiB.
    size_t available = 0, total = 0;
    reached = cudaSetDevice(index);
    if (reached == cudaSuccess) reached = cudaMemGetInfo(&available, &total);
    // A full GPU says either; the second also where another process has it for itself alone.
    if (reached == cudaErrorMemoryAllocation || reached == cudaErrorDevicesUnavailable) {
      cudaGetLastError();  // no error of a kernel
      return absl::ResourceExhaustedError(
          absl::StrCat("GPU ", index, " (", info.name,
                       ") has no room for this process: ", Text(reached), kMakeRoom));
    }
    STRETTO_RETURN_IF_ERROR(Called("cudaMemGetInfo", reached, index));
    info.free_bytes = static_cast<int64_t>(available);
    return info;
  }

  absl::StatusOr<std::byte*> Allocate(int index, int64_t bytes) const override {
    STRETTO_RETURN_IF_ERROR(Describe(index).status());
    void* memory = nullptr;
    cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
    if (error != cudaSuccess) return Exhausted(error, index);
    // Done before any stream can touch it: streams here do not wait for the default stream.
    error = cudaMemset(memory, 0, static_cast<size_t>(bytes));
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
      cudaFree(memory);
      return Called("cudaMemset", error, index);
    }
    return static_cast<std::byte*>(memory);
  }

  void Free(int index, std::byte* memory) const override {
    cudaSetDevice(index);
    cudaFree(memory);
  }

  absl::StatusOr<std::byte*> AllocateHost(int index, int64_t bytes) const override {
    STRETTO_RETURN_IF_ERROR(Describe(index).status());
    void* memory = nullptr;
    // Under unified addressing, which all GPUs of these kernels have, the device's address is the
    // host's.
    cudaError_t error = cudaHostAlloc(&memory, static_cast<size_t>(bytes),
                                      cudaHostAllocPortable | cudaHostAllocMapped);
    if (error != cudaSuccess) {
      cudaGetLastError();  // an allocation that failed is no error of a kernel
      return ContextLost(error) ? Lost(error, index) : absl::ResourceExhaustedError(Text(error));
    }
    // By the device: faster than by one thread of the host.
    error = cudaMemset(memory, 0, static_cast<size_t>(bytes));
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
      cudaFreeHost(memory);
      return Called("cudaMemset", error, index);
    }
    return static_cast<std::byte*>(memory);
  }

  void FreeHost(std::byte* memory) const override { cudaFreeHost(memory); }

  absl::Status RegisterHost(int index, std::byte* memory, int64_t bytes) const override {
    STRETTO_RETURN_IF_ERROR(Use(index));
    const cudaError_t error = cudaHostRegister(memory, static_cast<size_t>(bytes),
                                               cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess && !ContextLost(error)) cudaGetLastError();  // no error of a kernel
    return Called("cudaHostRegister", error, index);
  }

  void UnregisterHost(std::byte* memory) const override {
    if (cudaHostUnregister(memory) != cudaSuccess) cudaGetLastError();
  }

  absl::Status Use(int index) const override {
    return Called("cudaSetDevice", cudaSetDevice(index), index);
  }

  absl::StatusOr<std::unique_ptr<DeviceQueue>> CreateQueue(
      int index, const StreamOptions& options) const override {
    STRETTO_RETURN_IF_ERROR(Describe(index).status());
    return CudaQueue::Create(index, options);
  }

  absl::StatusOr<std::unique_ptr<DeviceMarks>> CreateMarks(int index, size_t count) const override {
    auto marks = std::make_unique<CudaMarks>(index);
    STRETTO_RETURN_IF_ERROR(marks->MakeRoom(count));
    return marks;
  }

  absl::Status CopyRows(int index, void* to, int64_t to_pitch, const void* from, int64_t from_pitch,
                        int64_t row_bytes, int64_t rows) const override {
    STRETTO_RETURN_IF_ERROR(Called("cudaSetDevice", cudaSetDevice(index), index));
    const cudaError_t error =
        rows == 1 ? cudaMemcpy(to, from, static_cast<size_t>(row_bytes), cudaMemcpyDefault)
                  : cudaMemcpy2D(to, static_cast<size_t>(to_pitch), from,
                                 static_cast<size_t>(from_pitch), static_cast<size_t>(row_bytes),
                                 static_cast<size_t>(rows), cudaMemcpyDefault);
    STRETTO_RETURN_IF_ERROR(Called(rows == 1 ? "cudaMemcpy" : "cudaMemcpy2D", error, index));
    // From pageable memory these return once the bytes are staged, maybe before they have arrived,
    // and inside a device at once; streams here do not wait for the default stream.
    return Called("cudaStreamSynchronize", cudaStreamSynchronize(cudaStreamLegacy), index);
  }
};

}  // namespace

const DeviceRuntime* CudaRuntime() {
  static const Runtime runtime;
  return &runtime;
}

}  // namespace stretto
