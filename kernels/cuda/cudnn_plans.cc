#include "kernels/cuda/cudnn_plans.h"

#include <dlfcn.h>

#include <bit>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/dynamic_library.h"
#include "kernels/cuda/launch.h"

// Nothing of the frontend is linked against: it finds cuDNN through cudnn_dlhandle. Its namespace
// gets a name of our own, since a program may use another version of these headers.
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#define cudnn_frontend stretto_cudnn_frontend
#include <cudnn_frontend.h>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}  // namespace cudnn_frontend

namespace stretto::cuda {

namespace fe = cudnn_frontend;

struct CudnnPlan::Graph : fe::graph::Graph {};

namespace {

// The first version that writes statistics with the strides we ask for.
constexpr int64_t kOldest = 91200;

// Opens a library that is already loaded, installed, or in the toolkit's folder.
void* OpenLibrary(const std::string& name) {
  if (void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
#ifdef STRETTO_CUDA_LIBRARY_DIR
  return dlopen(absl::StrCat(STRETTO_CUDA_LIBRARY_DIR, "/", name).c_str(), RTLD_NOW | RTLD_LOCAL);
#else
  return nullptr;
#endif
}

CudnnLibrary OpenCudnn() {
  const auto unusable = [](const std::string& why) {
    return CudnnLibrary{0, absl::StrCat("own kernels: ", why)};
  };
  void* handle = OpenLibrary("libcudnn.so.9");
  if (handle == nullptr) return unusable("libcudnn.so.9 was not found");
  void* symbol = dlsym(handle, "cudnnGetVersion");
  if (symbol == nullptr) return unusable("libcudnn.so.9 has no cudnnGetVersion");
  const auto version = static_cast<int64_t>(reinterpret_cast<size_t (*)()>(symbol)());
  const std::string name = absl::StrCat("cuDNN ", VersionText(version));
  if (version / 10000 != 9 || version < kOldest) {
    return unusable(absl::StrCat(name, " is not 9.12 or a later 9"));
  }
  // The frontend opens the CUDA runtime by this name; it is then found wherever it was loaded from.
  const std::string runtime = absl::StrCat("libcudart.so.", CUDART_VERSION / 1000);
  if (OpenLibrary(runtime) == nullptr) return unusable(absl::StrCat(runtime, " was not found"));
  fe::cudnn_dlhandle = handle;
  return {version, name, FileOf(symbol)};
}

// Handles are bound to the device that was current when they were made, and may be used by one
// thread at a time. They are never destroyed (the driver may be gone by then), but a thread leaves
// its own to the next one.
class Handles {
 public:
  ~Handles() {
    const std::lock_guard lock(Mutex());
    for (const auto& [device, handle] : mine_) Free().emplace_back(device, handle);
  }
  // Null when cuDNN refuses.
  cudnnHandle_t For(int device) {
    for (const auto& [index, handle] : mine_) {
      if (index == device) return handle;
    }
    cudnnHandle_t handle = nullptr;
    {
      const std::lock_guard lock(Mutex());
      auto& free = Free();
      for (size_t i = 0; i < free.size(); ++i) {
        if (free[i].first != device) continue;
        handle = free[i].second;
        free.erase(free.begin() + static_cast<std::ptrdiff_t>(i));
        break;
      }
    }
    if (handle == nullptr && fe::detail::create_handle(&handle) != CUDNN_STATUS_SUCCESS) {
      return nullptr;
    }
    mine_.emplace_back(device, handle);
    return handle;
  }

 private:
  using List = std::vector<std::pair<int, cudnnHandle_t> >;
  static std::mutex& Mutex() {
    static auto& mutex = *new std::mutex;
    return mutex;
  }
  static List& Free() {
    static auto& list = *new List;
    return list;
  }
  List mine_;
};

class GraphBuilder {
 public:
  explicit GraphBuilder(const AttentionKey& key)
      : key_(key), graph_(std::make_unique<CudnnPlan::Graph>()) {
    graph_->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (key.ragged != 0) {
      lengths_q_ = Index(kLengthsQ, key.batch);
      lengths_k_ = Index(kLengthsK, key.batch);
      for (int64_t i = 0; i < RaggedIndex::kOperands; ++i) {
        offsets_[i] = Index(kOffsetsQ + i, key.batch + 1);
      }
    }
  }

  fe::error_t Build(cudnnHandle_t handle, CudnnPlan* plan) {
    key_.backward != 0 ? Backward() : Forward();
    fe::error_t error = graph_->validate();
    if (error.is_good()) error = graph_->build_operation_graph(handle);
    if (error.is_good()) error = graph_->create_execution_plans({fe::HeurMode_t::A});
    if (error.is_good()) {
      graph_->deselect_workspace_greater_than(key_.workspace);
      error = graph_->check_support();
    }
    if (error.is_good()) error = graph_->build_plans();
    if (error.is_good()) error = graph_->get_workspace_size(plan->workspace);
    if (error.is_bad()) return error;
    plan->operands = graph_->get_variant_pack_uids_sorted();
    for (const int64_t uid : plan->operands) {
      if (uid <= 0 || uid >= kOperands) {
        return {fe::error_code_t::INVALID_VARIANT_PACK, "the plan has operands of its own"};
      }
    }
    plan->graph = std::move(graph_);
    return error;
  }

 private:
  using Shared = std::shared_ptr<fe::graph::Tensor_attributes>;

  // i32 [n], dense.
  Shared Index(int64_t uid, int64_t n) {
    return graph_->tensor(fe::graph::Tensor_attributes()
                              .set_uid(uid)
                              .set_dim({n, 1, 1, 1})
                              .set_stride({1, 1, 1, 1})
                              .set_data_type(fe::DataType_t::INT32));
  }
  // Sets up rows of heads as [batch, heads, length, dim]; `offsets` is the operand's place in a
  // RaggedIndex.
  void Describe(fe::graph::Tensor_attributes& t, int64_t uid, int64_t heads, int64_t row,
                int offsets) const {
    const int64_t length = RaggedIndex::IsKeys(offsets) ? key_.key_length : key_.length;
    t.set_uid(uid)
        .set_dim({key_.batch, heads, length, key_.dim})
        .set_stride({length * row, key_.dim, row, 1})
        .set_data_type(fe::DataType_t::BFLOAT16);
    if (key_.ragged != 0) t.set_ragged_offset(offsets_[offsets]);
  }
  // Statistics lie as ours do, [tokens, heads]; a dense backward pass wants [batch, heads, length].
  void DescribeStats(fe::graph::Tensor_attributes& t) const {
    const bool head_major = key_.backward != 0 && key_.ragged == 0;
    t.set_uid(kStats).set_dim({key_.batch, key_.heads, key_.length, 1});
    t.set_data_type(fe::DataType_t::FLOAT);
    if (head_major) {
      t.set_stride({key_.heads * key_.length, key_.length, 1, 1});
    } else {
      t.set_stride({key_.length * key_.lse_row, 1, key_.lse_row, 1});
    }
    if (key_.ragged != 0) t.set_ragged_offset(offsets_[4]);
  }
  Shared Input(int64_t uid, int64_t heads, int64_t row, int offsets) {
    fe::graph::Tensor_attributes t;
    Describe(t, uid, heads, row, offsets);
    return graph_->tensor(t);
  }

  void Forward() {
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
    options.set_causal_mask(key_.causal != 0)
        .set_attn_scale(static_cast<float>(std::bit_cast<double>(key_.scale)));
    if (key_.ragged != 0) {
      options.set_padding_mask(true).set_seq_len_q(lengths_q_).set_seq_len_kv(lengths_k_);
    }
    const auto [o, stats] =
        graph_->sdpa(Input(kQ, key_.heads, key_.q_row, 0), Input(kK, key_.kv_heads, key_.k_row, 1),
                     Input(kV, key_.kv_heads, key_.v_row, 2), options);
    Describe(o->set_output(true), kO, key_.heads, key_.o_row, 3);
    DescribeStats(stats->set_output(true));
  }

  void Backward() {
    auto options = fe::graph::SDPA_backward_attributes().set_name("attention_backward");
    options.set_causal_mask(key_.causal != 0)
        .set_attn_scale(static_cast<float>(std::bit_cast<double>(key_.scale)))
        .set_deterministic_algorithm(true);
    if (key_.ragged != 0) {
      options.set_padding_mask(true).set_seq_len_q(lengths_q_).set_seq_len_kv(lengths_k_);
      // Not of keys: with shared heads their gradients would get rows as wide as a packed matrix.
      options.set_max_total_seq_len_q(key_.tokens);
    }
    fe::graph::Tensor_attributes stats;
    DescribeStats(stats);
    const auto [dq, dk, dv] = graph_->sdpa_backward(
        Input(kQ, key_.heads, key_.q_row, 0), Input(kK, key_.kv_heads, key_.k_row, 1),
        Input(kV, key_.kv_heads, key_.v_row, 2), Input(kO, key_.heads, key_.o_row, 3),
        Input(kDO, key_.heads, key_.o_row, 3), graph_->tensor(stats), options);
    // Offsets of what a gradient is the gradient of serve it, too, where rows lie as far apart.
    Describe(dq->set_output(true), kDQ, key_.heads, key_.dq_row, key_.dq_row == key_.q_row ? 0 : 5);
    Describe(dk->set_output(true), kDK, key_.kv_heads, key_.dk_row,
             key_.dk_row == key_.k_row ? 1 : 6);
    Describe(dv->set_output(true), kDV, key_.kv_heads, key_.dv_row,
             key_.dv_row == key_.v_row ? 2 : 7);
  }

  AttentionKey key_;
  std::unique_ptr<CudnnPlan::Graph> graph_;
  Shared lengths_q_, lengths_k_, offsets_[RaggedIndex::kOperands];
};

}  // namespace

const CudnnLibrary& Cudnn() {
  static const CudnnLibrary& library = *new CudnnLibrary(OpenCudnn());
  return library;
}

cudnnContext* CudnnHandle(Stream& s, int device) {
  static thread_local Handles handles;
  const cudnnHandle_t handle = handles.For(device);
  const bool set =
      handle != nullptr && fe::detail::set_stream(handle, Native(s)) == CUDNN_STATUS_SUCCESS;
  return set ? handle : nullptr;
}

const CudnnPlan& FindCudnnPlan(const AttentionKey& key, cudnnHandle_t handle) {
  static auto& mutex = *new std::mutex;
  static auto& plans = *new std::map<AttentionKey, CudnnPlan>;
  const std::lock_guard lock(mutex);
  auto [it, absent] = plans.try_emplace(key);
  CudnnPlan& plan = it->second;
  if (absent) {
    std::string why;
    try {
      fe::error_t error = GraphBuilder(key).Build(handle, &plan);
      if (error.is_bad()) why = error.get_message();
      if (error.is_good() && plan.workspace > key.workspace) {
        why = absl::StrCat("it needs ", plan.workspace, " bytes of workspace of ", key.workspace);
      }
    } catch (const std::exception& e) {
      why = e.what();
    } catch (...) {
      why = "an unknown exception";
    }
    if (!why.empty()) {
      plan.graph.reset();
      plan.refused = absl::UnimplementedError(why);
    }
  }
  return plan;
}

absl::Status ExecuteCudnn(const CudnnPlan& plan, cudnnHandle_t handle,
                          const CudnnPointers& pointers, void* workspace) {
  std::array<void*, kOperands> ordered;
  int n = 0;
  for (const int64_t uid : plan.operands) ordered[n++] = pointers[uid];
  fe::error_t error = plan.graph->execute(handle, ordered.data(), n, workspace);
  return error.is_good() ? absl::OkStatus() : absl::UnimplementedError(error.get_message());
}

}  // namespace stretto::cuda
