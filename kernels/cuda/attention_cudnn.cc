// Attention through cuDNN, in bf16. Causal self-attention of sequences of one length is a dense
// batch, everything else goes packed (ragged) with boundaries and lengths in device memory; both
// read and write the packed rows in place. Whatever cuDNN refuses goes to our own kernels.
//
// The statistics of both are the same numbers in the same place, so a forward pass of one may be
// followed by a backward pass of the other.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/families.h"

#ifndef STRETTO_WITH_CUDNN

namespace stretto::cuda {

const AttentionKernels* Attention() { return PlainAttention(); }
const char* AttentionBackendNote() { return "own kernels: built without cuDNN"; }
LibraryInfo DescribeCudnn() {
  return {.name = "cuDNN",
          .problem =
              "attention runs on own kernels, several times slower: this program was built "
              "without cuDNN; configure with -DSTRETTO_CUDNN=ON to see what is missing",
          .required = false};
}

}  // namespace stretto::cuda

#else

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention_cut.h"
#include "kernels/cuda/attention_hopper.h"
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
namespace {

namespace fe = cudnn_frontend;

// The first version that writes statistics with the strides we ask for.
constexpr int64_t kOldest = 91200;
// Up to here an unmasked backward pass of lengths that are no multiple of 128 copies from host
// memory on every call.
constexpr int64_t kLastPadding = 91500;
// Before this one the packed backward pass on Hopper reads scratch memory that it has not written.
constexpr int64_t kCleanScratch = 91800;

// --------------------------------------------------------------------------- the library

struct Library {
  int64_t version = 0;  // 0: not to be used
  std::string note;
  std::string path;
};

// Opens a library that is already loaded, installed, or in the toolkit's folder.
void* OpenLibrary(const std::string& name) {
  if (void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
#ifdef STRETTO_CUDA_LIBRARY_DIR
  return dlopen(absl::StrCat(STRETTO_CUDA_LIBRARY_DIR, "/", name).c_str(), RTLD_NOW | RTLD_LOCAL);
#else
  return nullptr;
#endif
}

Library OpenCudnn() {
  const auto unusable = [](const std::string& why) {
    return Library{0, absl::StrCat("own kernels: ", why)};
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

const Library& Cudnn() {
  static const Library& library = *new Library(OpenCudnn());
  return library;
}

// What AttentionBackendNote() says since the first refusal.
std::atomic<const char*> refusal{nullptr};

void Refused(bool backward, const std::string& why) {
  if (refusal.load() != nullptr) return;
  auto* text =
      new std::string(absl::StrCat(Cudnn().note, "; own kernels for what it refuses, first a ",
                                   backward ? "backward" : "forward", " pass: ", why));
  const char* none = nullptr;
  if (!refusal.compare_exchange_strong(none, text->c_str())) delete text;
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

// --------------------------------------------------------------------------- plans

// Names of a plan's operands, which are also their places in Pointers.
enum Operand : int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kDO,
  kDQ,
  kDK,
  kDV,
  kLengthsQ,
  kLengthsK,
  kOffsetsQ,
  kOffsetsK,
  kOffsetsV,
  kOffsetsO,
  kOffsetsStats,
  kOffsetsDQ,
  kOffsetsDK,
  kOffsetsDV,
  kOperands
};
using Pointers = std::array<void*, kOperands>;

struct Plan {
  std::unique_ptr<fe::graph::Graph> graph;  // null: cuDNN refuses
  std::vector<int64_t> operands;            // in the order of execution
  int64_t workspace = 0;
};

class GraphBuilder {
 public:
  explicit GraphBuilder(const AttentionKey& key)
      : key_(key), graph_(std::make_unique<fe::graph::Graph>()) {
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

  fe::error_t Build(cudnnHandle_t handle, Plan* plan) {
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
  std::unique_ptr<fe::graph::Graph> graph_;
  Shared lengths_q_, lengths_k_, offsets_[RaggedIndex::kOperands];
};

// The plan for a key, built when it is first asked for; plans stay. Null when cuDNN refuses, and
// so does every later call.
const Plan* FindPlan(const AttentionKey& key, cudnnHandle_t handle) {
  static auto& mutex = *new std::mutex;
  static auto& plans = *new std::map<AttentionKey, Plan>;
  const std::lock_guard lock(mutex);
  auto [it, absent] = plans.try_emplace(key);
  Plan& plan = it->second;
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
      Refused(key.backward != 0, why);
    }
  }
  return plan.graph == nullptr ? nullptr : &plan;
}

bool Execute(const Plan& plan, cudnnHandle_t handle, const Pointers& pointers, void* workspace,
             bool backward) {
  std::array<void*, kOperands> ordered;
  int n = 0;
  for (const int64_t uid : plan.operands) ordered[n++] = pointers[uid];
  fe::error_t error = plan.graph->execute(handle, ordered.data(), n, workspace);
  if (error.is_bad()) Refused(backward, error.get_message());
  return error.is_good();
}

// --------------------------------------------------------------------------- calls

// One pass over all tokens. Absent tensors: forward.
struct Call {
  Tensor q, k, v, o, lse, d_o, dq, dk, dv;
  const AttentionShape& shape;
  bool backward() const { return dq.present(); }
  // Every query of a sequence has keys, and the other way round.
  bool self() const {
    return shape.cu_q.data == shape.cu_k.data && shape.len_q.data == shape.len_k.data;
  }
  int64_t sequences() const { return shape.cu_q.rows() - 1; }
};

bool SameRows(const Tensor& a, const Tensor& b) { return a.row_stride == b.row_stride; }

// Whether the call is of a kind that cuDNN has.
bool Takes(const Call& c) {
  if (Cudnn().version == 0 || c.q.dtype != DType::kBF16) return false;
  const int64_t dim = c.q.dims[2];
  if (dim % 8 != 0 || dim > 256 || c.q.rows() == 0 || c.k.rows() == 0) return false;
  if (c.sequences() == 0 || c.sequences() > 65535) return false;
  if (c.self() && c.q.rows() != c.k.rows()) return false;
  for (const Tensor* t : {&c.q, &c.k, &c.v, &c.o, &c.d_o, &c.dq, &c.dk, &c.dv}) {
    if (!RowsAligned(*t)) return false;
  }
  if (!c.lse.contiguous()) return false;
  return !c.backward() || SameRows(c.d_o, c.o);  // they share their offsets
}

class CudnnAttention final : public AttentionKernels {
 public:
  void Forward(Stream& s, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
               const AttentionShape& shape) const override {
    const Call call = {q, k, v, o, lse, {}, {}, {}, {}, shape};
    if (!Run(s, call)) PlainAttention()->Forward(s, o, lse, q, k, v, shape);
  }
  void Backward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o, Tensor o,
                Tensor lse, Tensor q, Tensor k, Tensor v,
                const AttentionShape& shape) const override {
    const Call call = {q, k, v, o, lse, d_o, dq, dk, dv, shape};
    if (HopperAttentionBackward(s, dq, dk, dv, d_o, o, lse, q, k, v, shape,
                                /*library_refused=*/false) ||
        Run(s, call)) {
      return;
    }
    PlainAttention()->Backward(s, dq, dk, dv, delta, d_o, o, lse, q, k, v, shape);
  }
  void Merge(Stream& s, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
             Tensor len) const override {
    PlainAttention()->Merge(s, o, lse, part, part_lse, cu, len);
  }

 private:
  // False when our own kernels have to do it; what was written until then is overwritten.
  static bool Run(Stream& s, const Call& call) {
    try {
      if (!Takes(call)) return false;
      static thread_local Handles handles;
      int device = 0;
      if (cudaGetDevice(&device) != cudaSuccess) return false;
      const cudnnHandle_t handle = handles.For(device);
      if (handle == nullptr || fe::detail::set_stream(handle, Native(s)) != CUDNN_STATUS_SUCCESS) {
        Refused(call.backward(), "no handle could be made for the device");
        return false;
      }
      return RunOn(s, call, handle, device);
    } catch (const std::exception& e) {
      Refused(call.backward(), e.what());
    } catch (...) {
      Refused(call.backward(), "an unknown exception");
    }
    return false;
  }

  static bool RunOn(Stream& s, const Call& c, cudnnHandle_t handle, int device) {
    const int64_t version = Cudnn().version;
    const int64_t uniform = c.shape.uniform;
    // A sequence alone comes in any length, and the dense way builds a plan for each of them.
    const bool few = c.sequences() > 1 || uniform == LengthBucket(uniform);
    const bool dense = uniform > 1 && few && c.shape.causal && c.self() &&
                       c.sequences() * uniform == c.q.rows() &&
                       (!c.backward() || uniform % 128 == 0 || version > kLastPadding);
    AttentionKey key = {};
    key.device = device;
    key.backward = c.backward();
    key.ragged = !dense;
    key.causal = c.shape.causal;
    key.batch = dense ? c.sequences() : Bucket(c.sequences());
    key.length = dense ? uniform : LengthBucket(std::max<int64_t>(c.shape.max_q, 1));
    key.key_length = c.self() ? key.length : LengthBucket(std::max<int64_t>(c.shape.max_k, 1));
    key.heads = c.q.dims[1];
    key.kv_heads = c.k.dims[1];
    key.dim = c.q.dims[2];
    key.q_row = c.q.row_stride;
    key.k_row = c.k.row_stride;
    key.v_row = c.v.row_stride;
    key.o_row = c.o.row_stride;
    key.lse_row = c.lse.dims[1];
    if (c.backward()) {
      key.dq_row = c.dq.row_stride;
      key.dk_row = c.dk.row_stride;
      key.dv_row = c.dv.row_stride;
    }
    key.tokens = dense ? 0 : RoundUp(c.q.rows(), 1024);
    key.scale = std::bit_cast<uint64_t>(c.shape.scale);

    if (!dense) {  // offsets are 32 bits
      for (const int64_t row : {key.q_row, key.o_row, key.dq_row}) {
        if (c.q.rows() * row > INT32_MAX) return false;
      }
      for (const int64_t row : {key.k_row, key.v_row, key.dk_row, key.dv_row}) {
        if (c.k.rows() * row > INT32_MAX) return false;
      }
    }
    if (!c.backward()) return RunCut(s, c, key, {key.batch, key.kv_heads}, handle);

    // Fewer, larger executions first. Below the first that should fit, a few tries make up for what
    // the estimate does not know.
    int tries = 4;
    const auto attempt = [&](Cut cut) {
      AttentionKey part = key;
      part.batch = cut.batch;
      part.heads = key.heads / key.kv_heads * cut.kv_heads;
      part.kv_heads = cut.kv_heads;
      if (BackwardBytes(part) > s.workspace().bytes || tries-- <= 0) return false;
      return RunCut(s, c, part, cut, handle);
    };
    for (const int64_t batch : Divisors(key.batch)) {
      if (attempt({batch, key.kv_heads})) return true;
    }
    for (const int64_t kv_heads : Divisors(key.kv_heads)) {
      if (kv_heads < key.kv_heads && attempt({1, kv_heads})) return true;
    }
    if (tries == 4) {
      Refused(true, absl::StrCat("sequences of ", key.length, " tokens need ",
                                 BackwardBytes(key.Single()),
                                 " bytes of workspace, the stream has ", s.workspace().bytes));
    }
    return false;
  }

  // Runs the call in parts of `cut`; `key` describes one part but for the workspace.
  static bool RunCut(Stream& s, const Call& c, AttentionKey key, Cut cut, cudnnHandle_t handle) {
    // Our scratch comes first in the workspace: boundaries, or statistics of one part.
    const Stream::Workspace workspace = s.workspace();
    RaggedIndex index;
    int64_t scratch = 0;
    const int64_t groups = (c.sequences() + cut.batch - 1) / cut.batch;
    if (key.ragged != 0) {
      // Room for as many groups as any number of sequences of this bucket has: the workspace that
      // is left is part of what a plan is built for.
      index = {reinterpret_cast<int32_t*>(workspace.data),
               Bucket(c.sequences()) / cut.batch,
               cut.batch,
               {key.q_row, key.k_row, key.v_row, key.o_row, key.lse_row, key.dq_row, key.dk_row,
                key.dv_row}};
      scratch = index.bytes();
    } else if (c.backward()) {
      scratch = RoundUp(key.batch * key.heads * key.length * int64_t{sizeof(float)}, 256);
    }
    key.workspace = workspace.bytes - scratch;
    if (key.workspace < 0) return false;
    const Plan* plan = FindPlan(key, handle);
    if (plan == nullptr) return false;
    std::byte* const rest = workspace.data + scratch;

    if (key.ragged != 0) FillRaggedIndex(s, index, c.shape);
    const int64_t kv_heads = c.k.dims[1];
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t head = 0; head < kv_heads; head += cut.kv_heads) {
        Pointers p = At(c, key.ragged != 0 ? 0 : g * cut.batch * key.length, head);
        if (key.ragged != 0) {
          p[kLengthsQ] = index.Lengths(g, /*keys=*/false);
          p[kLengthsK] = index.Lengths(g, /*keys=*/true);
          for (int i = 0; i < RaggedIndex::kOperands; ++i) p[kOffsetsQ + i] = index.Offsets(g, i);
          if (c.backward() && Cudnn().version < kCleanScratch) {
            cudaMemsetAsync(rest, 0, static_cast<size_t>(plan->workspace), Native(s));
          }
        } else if (c.backward()) {
          auto* stats = reinterpret_cast<float*>(workspace.data);
          HeadMajorLse(s, stats, c.lse.Rows(g * cut.batch * key.length, cut.batch * key.length),
                       cut.batch, key.length, head * (c.q.dims[1] / kv_heads), key.heads);
          p[kStats] = stats;
        }
        if (!Execute(*plan, handle, p, rest, c.backward())) return false;
      }
    }
    // Not left to the library, which does not promise it.
    if (!c.self()) {
      const Tensor none;
      ClearLonely(s, c.q, c.k, c.backward() ? none : c.o, c.backward() ? none : c.lse, c.dq, c.dk,
                  c.dv, c.shape);
    }
    return true;
  }

  // The operands from row `row` and key-value head `kv_head` on.
  static Pointers At(const Call& c, int64_t row, int64_t kv_head) {
    const int64_t head = kv_head * (c.q.dims[1] / c.k.dims[1]);
    const auto at = [row](const Tensor& t, int64_t h) -> void* {
      if (!t.present()) return nullptr;
      const int64_t width = t.rank == 3 ? t.dims[2] : 1;
      return t.data + (row * t.row_stride + h * width) * SizeOf(t.dtype);
    };
    Pointers p = {};
    p[kQ] = at(c.q, head);
    p[kK] = at(c.k, kv_head);
    p[kV] = at(c.v, kv_head);
    p[kO] = at(c.o, head);
    p[kStats] = at(c.lse, head);
    p[kDO] = at(c.d_o, head);
    p[kDQ] = at(c.dq, head);
    p[kDK] = at(c.dk, kv_head);
    p[kDV] = at(c.dv, kv_head);
    return p;
  }
};

}  // namespace

const AttentionKernels* Attention() {
  static const CudnnAttention kernels;
  return &kernels;
}

LibraryInfo DescribeCudnn() {
  const Library& library = Cudnn();
  LibraryInfo info = {.name = "cuDNN", .path = library.path, .required = false};
  if (library.version != 0) {
    info.version = VersionText(library.version);
  } else {
    info.problem = absl::StrCat("attention runs on ", library.note,
                                "; install cuDNN 9.12 or a later 9 and put its folder into "
                                "LD_LIBRARY_PATH, else attention is several times slower");
  }
  return info;
}

const char* AttentionBackendNote() {
  if (const char* text = refusal.load()) return text;
  return Cudnn().note.c_str();
}

}  // namespace stretto::cuda

#endif  // STRETTO_WITH_CUDNN
