#include "kernels/cuda/matmul.h"

#include <cuda_runtime_api.h>

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/dynamic_library.h"
#include "kernels/cuda/launch.h"

namespace stretto::cuda {
namespace {

// What NVIDIA recommends for this generation of GPUs.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;
constexpr int kCandidates = 16;
constexpr int64_t kAlignment = 256;

// The entry points; the header's inline functions call the _internal ones too.
struct Api {
  decltype(cublasLtGetVersion)* version = nullptr;
  decltype(cublasLtGetStatusString)* status_string = nullptr;
  decltype(cublasLtCreate)* create = nullptr;
  decltype(cublasLtMatmulDescInit_internal)* operation_init = nullptr;
  decltype(cublasLtMatmulDescSetAttribute)* operation_set = nullptr;
  decltype(cublasLtMatrixLayoutInit_internal)* layout_init = nullptr;
  decltype(cublasLtMatmulPreferenceInit_internal)* preference_init = nullptr;
  decltype(cublasLtMatmulPreferenceSetAttribute)* preference_set = nullptr;
  decltype(cublasLtMatmulAlgoGetHeuristic)* heuristic = nullptr;
  decltype(cublasLtMatmulAlgoCheck)* check = nullptr;
  decltype(cublasLtMatmul)* matmul = nullptr;
};

struct Library {
  Api api;
  int64_t version = 0;
  std::string error;  // a sentence; empty while the library is usable

  static const Library& Get() {
    static const Library& library = *new Library;  // streams may outlive static objects
    return library;
  }

 private:
  Library() {
    const std::string name = absl::StrCat("libcublasLt.so.", CUBLAS_VER_MAJOR);
    DynamicLibrary library(name);
    library.Resolve("cublasLtGetVersion", api.version);
    library.Resolve("cublasLtGetStatusString", api.status_string);
    library.Resolve("cublasLtCreate", api.create);
    library.Resolve("cublasLtMatmulDescInit_internal", api.operation_init);
    library.Resolve("cublasLtMatmulDescSetAttribute", api.operation_set);
    library.Resolve("cublasLtMatrixLayoutInit_internal", api.layout_init);
    library.Resolve("cublasLtMatmulPreferenceInit_internal", api.preference_init);
    library.Resolve("cublasLtMatmulPreferenceSetAttribute", api.preference_set);
    library.Resolve("cublasLtMatmulAlgoGetHeuristic", api.heuristic);
    library.Resolve("cublasLtMatmulAlgoCheck", api.check);
    library.Resolve("cublasLtMatmul", api.matmul);
    if (!library.ok()) {
      error = absl::StrCat("matrix products on a GPU need cuBLASLt ", CUBLAS_VER_MAJOR, ", but ",
                           name, " could not be loaded (", library.error(), "); install CUDA ",
                           CUBLAS_VER_MAJOR, "'s cuBLAS or add its folder to LD_LIBRARY_PATH");
      return;
    }
    version = static_cast<int64_t>(api.version());  // made like CUBLAS_VERSION
    if (version / 10000 != CUBLAS_VER_MAJOR) {
      error =
          absl::StrCat("matrix products on a GPU need cuBLASLt ", CUBLAS_VER_MAJOR, ", but ", name,
                       " is version ", version, "; install CUDA ", CUBLAS_VER_MAJOR, "'s cuBLAS");
    }
  }
};

// Algorithms that are fast on one GPU are fast on every GPU of the same model.
int64_t ModelOf(int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return 0;
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (char c : absl::StrCat(properties.name, " ", properties.multiProcessorCount)) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  return std::bit_cast<int64_t>(hash);
}

int64_t BytesOf(cudaDataType_t type) {
  if (type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2) return 1;
  return type == CUDA_R_16BF ? 2 : 4;
}

int64_t AlignmentOf(uint64_t value) {
  return value == 0 ? kAlignment
                    : std::min(kAlignment, int64_t{1} << std::min(std::countr_zero(value), 62));
}

// Milliseconds that run() takes on the stream: the median of three runs behind a warm-up. Infinite
// when it fails.
float MedianTime(cudaStream_t stream, absl::FunctionRef<bool()> run) {
  std::array<cudaEvent_t, 4> events = {};
  bool ok = true;
  for (cudaEvent_t& event : events) ok = ok && cudaEventCreate(&event) == cudaSuccess;
  ok = ok && run();
  // Enqueued in one go: the warm-up hides the time that launching takes.
  for (size_t i = 0; i < events.size(); ++i) {
    if (i > 0) ok = ok && run();
    ok = ok && cudaEventRecord(events[i], stream) == cudaSuccess;
  }
  ok = ok && cudaEventSynchronize(events.back()) == cudaSuccess;
  std::array<float, 3> times = {};
  for (size_t i = 0; i < times.size(); ++i) {
    ok = ok && cudaEventElapsedTime(&times[i], events[i], events[i + 1]) == cudaSuccess;
  }
  for (cudaEvent_t event : events) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (!ok) {
    cudaGetLastError();  // a candidate that is refused is no error of the next kernel
    return std::numeric_limits<float>::infinity();
  }
  std::sort(times.begin(), times.end());
  return times[1];
}

}  // namespace

LibraryInfo DescribeCublasLt() {
  const Library& library = Library::Get();
  return {.name = "cuBLASLt",
          .version = library.version > 0 ? VersionText(library.version) : "",
          .path = FileOf(reinterpret_cast<const void*>(library.api.version)),
          .problem = library.error};
}

// One for each device that has been used, for the whole life of the process.
struct CublasLt {
  const Library* loaded = nullptr;
  cublasLtHandle_t handle = nullptr;
  int64_t gpu = 0;
  std::string error;  // a sentence

  static const CublasLt& On(int device) {
    static std::mutex mutex;
    static auto& all = *new std::map<int, CublasLt>;  // streams may outlive static objects
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [found, fresh] = all.try_emplace(device);
    CublasLt& lt = found->second;
    if (!fresh) return lt;
    const Library& library = Library::Get();
    lt.loaded = &library;
    lt.error = library.error;
    if (!lt.error.empty()) return lt;
    int current = device;  // a handle belongs to the device that is current when it is made
    cudaGetDevice(&current);
    cudaSetDevice(device);
    const cublasStatus_t status = library.api.create(&lt.handle);
    lt.gpu = ModelOf(device);
    cudaSetDevice(current);
    if (status != CUBLAS_STATUS_SUCCESS) {
      lt.error = absl::StrCat("cuBLASLt could not be set up on GPU ", device, ": ",
                              library.api.status_string(status), "; check its free memory");
    }
    return lt;
  }
};

// They live on the stack and cost no allocation.
struct Descriptors {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, d;
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;

  Descriptors(const CublasLt& lt, const Product& p) : api(lt.loaded->api) {
    Keep(api.operation_init(&operation, sizeof(operation), CUBLAS_COMPUTE_32F, CUDA_R_32F));
    Set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{p.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N});
    Set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t{p.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N});
    Set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(p.epilogue));
    if (p.bias != nullptr) Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    if (p.aux.data != nullptr) {
      Set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(p.aux.data));
      Set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.aux.ld);
    }
    if (p.factor_a != nullptr) Set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, p.factor_a);
    if (p.factor_b != nullptr) Set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, p.factor_b);
    if (p.fast_accumulation) Set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
    Layout(&a, p.type, p.trans_a ? p.k : p.m, p.trans_a ? p.m : p.k, p.a.ld);
    Layout(&b, p.TypeOfB(), p.trans_b ? p.n : p.k, p.trans_b ? p.k : p.n, p.b.ld);
    Layout(&d, p.output_type, p.m, p.n, p.d.ld);
  }

  bool ok() const { return status == CUBLAS_STATUS_SUCCESS; }

 private:
  void Keep(cublasStatus_t s) {
    if (ok()) status = s;
  }
  template <class T>
  void Set(cublasLtMatmulDescAttributes_t attribute, T value) {
    Keep(api.operation_set(&operation, attribute, &value, sizeof(value)));
  }
  void Layout(cublasLtMatrixLayoutOpaque_t* layout, cudaDataType_t type, int64_t rows,
              int64_t columns, int64_t ld) {
    Keep(api.layout_init(layout, sizeof(*layout), type, static_cast<uint64_t>(rows),
                         static_cast<uint64_t>(columns), ld));
  }

  const Api& api;
};

int64_t AlignmentOf(const void* pointer) {
  return AlignmentOf(reinterpret_cast<uint64_t>(pointer));
}

Matmul::Matmul(Stream& s, const char* op)
    : stream_(s),
      op_(op),
      lt_(CublasLt::On(s.device().index)),
      // The other half is left to what runs beside a product in the same operation.
      workspace_bytes_(
          std::min(kWorkspaceBytes, s.workspace().bytes / 2 / kAlignment * kAlignment)) {
  if (!ok()) stream_.Fail(absl::FailedPreconditionError(absl::StrCat(op_, ": ", lt_.error)));
}

bool Matmul::ok() const { return lt_.error.empty(); }

void Matmul::Run(const Product& p, bool rehearsal) {
  Descriptors descriptors(lt_, p);
  const ProductKey key = KeyOf(p);
  std::optional<ProductPlan> plan = Known(key, descriptors);
  if (!plan.has_value()) {
    plan = Choose(p, descriptors);
    if (!plan.has_value()) return Fail(p, "it has no algorithm for the case");
    plan->tuned = Tuning();
    StorePlan(key, *plan);
  }
  const cublasStatus_t status = Enqueue(p, descriptors, *plan, rehearsal);
  if (status != CUBLAS_STATUS_SUCCESS) Fail(p, lt_.loaded->api.status_string(status));
}

void Matmul::RunEpilogue(const Product& p, bool prefer_epilogue, Work separate, Work finish) {
  const bool tuning = Tuning();
  const ProductKey key = KeyOf(p);
  if (!tuning && !prefer_epilogue) {
    const std::optional<ProductPlan> plan = FindPlan(key);
    if (!plan.has_value() || plan->separate) return separate(false);
  }
  Descriptors descriptors(lt_, p);
  std::optional<ProductPlan> plan = Known(key, descriptors);
  if (!plan.has_value()) {
    plan = Choose(p, descriptors);
    if (!plan.has_value()) {
      plan.emplace();
      plan->separate = true;
    } else if (tuning) {
      const float together = MedianTime(Native(stream_), [&] {
        const bool ok = Enqueue(p, descriptors, *plan, true) == CUBLAS_STATUS_SUCCESS;
        finish(true);
        return ok;
      });
      const float apart = MedianTime(Native(stream_), [&] {
        separate(true);
        return true;
      });
      plan->separate = apart < together;
    } else {
      plan->separate = !prefer_epilogue;
    }
    plan->tuned = tuning;
    StorePlan(key, *plan);
  }
  if (!plan->separate) {
    if (Enqueue(p, descriptors, *plan, false) == CUBLAS_STATUS_SUCCESS) return finish(false);
    cudaGetLastError();
    plan->separate = true;  // promised by the heuristic, refused in the end
    StorePlan(key, *plan);
  }
  separate(false);
}

ProductKey Matmul::KeyOf(const Product& p) const {
  ProductKey key;
  key.version = lt_.loaded->version;
  key.gpu = lt_.gpu;
  key.m = p.m;
  key.n = p.n;
  key.k = p.k;
  key.type = p.type;
  key.type_b = p.TypeOfB();
  key.fast_accumulation = p.fast_accumulation;
  key.output_type = p.output_type;
  key.trans_a = p.trans_a;
  key.trans_b = p.trans_b;
  key.ld_a = p.a.ld;
  key.ld_b = p.b.ld;
  key.ld_d = p.d.ld;
  key.ld_aux = p.aux.ld;
  const void* const pointers[] = {p.a.data, p.b.data, p.d.data, p.bias, p.aux.data};
  for (const void* pointer : pointers) {
    key.alignments = key.alignments * 1000 + AlignmentOf(pointer);
  }
  key.acc = p.acc;
  key.epilogue = p.epilogue;
  key.workspace = workspace_bytes_;
  return key;
}

// The plan to use, if there is one that serves the present mode.
std::optional<ProductPlan> Matmul::Known(const ProductKey& key, Descriptors& descriptors) {
  std::optional<ProductPlan> plan = FindPlan(key);
  if (!plan.has_value() || (Tuning() && !plan->tuned)) return std::nullopt;
  if (plan->separate || plan->checked) return plan;
  // Imported: what is in a text must not reach cublasLtMatmul unseen.
  cublasLtMatmulAlgo_t algorithm;
  std::memcpy(&algorithm, plan->algorithm.data(), sizeof(algorithm));
  cublasLtMatmulHeuristicResult_t result;
  if (!descriptors.ok() ||
      lt_.loaded->api.check(lt_.handle, &descriptors.operation, &descriptors.a, &descriptors.b,
                            &descriptors.d, &descriptors.d, &algorithm,
                            &result) != CUBLAS_STATUS_SUCCESS ||
      static_cast<int64_t>(result.workspaceSize) > workspace_bytes_) {
    return std::nullopt;
  }
  plan->checked = true;
  StorePlan(key, *plan);
  return plan;
}

// The heuristic's first algorithm, or in tuning mode the fastest of its list.
std::optional<ProductPlan> Matmul::Choose(const Product& p, Descriptors& descriptors) {
  if (!descriptors.ok()) return std::nullopt;
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results;
  const bool tune = Tuning();
  const int count = Ask(p, descriptors, tune ? kCandidates : 1, results.data());
  std::optional<ProductPlan> best;
  float best_time = std::numeric_limits<float>::infinity();
  for (int i = 0; i < count; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    ProductPlan plan;
    static_assert(sizeof(plan.algorithm) == sizeof(results[i].algo));
    std::memcpy(plan.algorithm.data(), &results[i].algo, sizeof(results[i].algo));
    plan.checked = true;
    float time = best_time;
    if (tune && count > 1) {
      time = MedianTime(Native(stream_), [&] {
        return Enqueue(p, descriptors, plan, true) == CUBLAS_STATUS_SUCCESS;
      });
    }
    if (!best.has_value() || time < best_time) {
      best = plan;
      best_time = time;
    }
  }
  return best;
}

int Matmul::Ask(const Product& p, Descriptors& descriptors, int wanted,
                cublasLtMatmulHeuristicResult_t* results) {
  const Api& api = lt_.loaded->api;
  cublasLtMatmulPreferenceOpaque_t preference;
  bool ok = api.preference_init(&preference, sizeof(preference)) == CUBLAS_STATUS_SUCCESS;
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    ok = ok &&
         api.preference_set(&preference, attribute, &value, sizeof(value)) == CUBLAS_STATUS_SUCCESS;
  };
  // Of every column, so odd strides count as much as odd addresses.
  const auto alignment = [](const Matrix& matrix, cudaDataType_t type) {
    const int64_t stride = matrix.ld * BytesOf(type);
    return static_cast<uint32_t>(
        std::min(AlignmentOf(matrix.data), AlignmentOf(static_cast<uint64_t>(stride))));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes_));
  // Not INPLACE and OUTPUT_TYPE, which would round partial sums to bf16.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.a, p.type));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.b, p.TypeOfB()));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.d, p.output_type));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.d, p.output_type));
  int count = 0;
  if (!ok || api.heuristic(lt_.handle, &descriptors.operation, &descriptors.a, &descriptors.b,
                           &descriptors.d, &descriptors.d, &preference, wanted, results,
                           &count) != CUBLAS_STATUS_SUCCESS) {
    return 0;
  }
  return count;
}

cublasStatus_t Matmul::Enqueue(const Product& p, Descriptors& descriptors, const ProductPlan& plan,
                               bool rehearsal) {
  if (!descriptors.ok()) return descriptors.status;
  // Multiplied by so little, a product is lost beside what it is added to. Not 0 or a denormal,
  // which would let a kernel skip the work.
  const float alpha = rehearsal && p.acc ? std::numeric_limits<float>::min() : 1.0f;
  const float beta = p.acc ? 1.0f : 0.0f;
  cublasLtMatmulAlgo_t algorithm;
  std::memcpy(&algorithm, plan.algorithm.data(), sizeof(algorithm));
  return lt_.loaded->api.matmul(
      lt_.handle, &descriptors.operation, &alpha, p.a.data, &descriptors.a, p.b.data,
      &descriptors.b, &beta, p.d.data, &descriptors.d, p.d.data, &descriptors.d, &algorithm,
      stream_.workspace().data, static_cast<size_t>(workspace_bytes_), Native(stream_));
}

void Matmul::Fail(const Product& p, const char* why) {
  const cudaError_t state = cudaStreamQuery(Native(stream_));
  cudaGetLastError();  // said here, not by the next kernel
  if (FailedBefore(stream_, state)) return;
  stream_.Fail(absl::InternalError(absl::StrCat(
      op_, ": cuBLASLt ", lt_.loaded->version, " failed on the product of ", p.m, " x ", p.k,
      " and ", p.k, " x ", p.n, " elements on ", Name(stream_.device()), ": ", why)));
}

}  // namespace stretto::cuda
