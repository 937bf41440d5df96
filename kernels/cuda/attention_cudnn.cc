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
LibraryInfo DescribeCudnn() {
  return {.name = "cuDNN",
          .problem =
              "attention runs on own kernels, several times slower: this program was built "
              "without cuDNN; configure with -DSTRETTO_CUDNN=ON to see what is missing",
          .required = false};
}

}  // namespace stretto::cuda

#else

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <exception>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention_cut.h"
#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/cudnn_plans.h"
#include "kernels/cuda/dynamic_library.h"
#include "kernels/cuda/launch.h"
#include "stretto/core/log.h"

namespace stretto::cuda {
namespace {

// Up to here an unmasked backward pass of lengths that are no multiple of 128 copies from host
// memory on every call.
constexpr int64_t kLastPadding = 91500;
// Before this one the packed backward pass on Hopper reads scratch memory that it has not written.
constexpr int64_t kCleanScratch = 91800;

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

// Says once of each pass why own kernels run it, which nothing but its time would show.
void TellRefusal(bool backward, const absl::Status& refused) {
  static std::atomic<bool> told[2];
  if (told[backward ? 1 : 0].exchange(true)) return;
  LogWarning(absl::StrCat("attention's ", backward ? "backward" : "forward",
                          " pass runs on own kernels, maybe several times slower, where ",
                          Cudnn().note, " refuses it: ", std::string(refused.message())));
}

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
    if (Ran(s, call)) return;
    PlainAttention()->Forward(s, o, lse, q, k, v, shape);
  }
  void Backward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o, Tensor o,
                Tensor lse, Tensor q, Tensor k, Tensor v,
                const AttentionShape& shape) const override {
    const Call call = {q, k, v, o, lse, d_o, dq, dk, dv, shape};
    if (HopperAttentionBackward(s, dq, dk, dv, d_o, o, lse, q, k, v, shape,
                                /*library_refused=*/false) ||
        Ran(s, call)) {
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
  static bool Ran(Stream& s, const Call& call) {
    if (!Takes(call)) return false;
    const absl::Status ran = Run(s, call);
    if (!ran.ok()) TellRefusal(call.backward(), ran);
    return ran.ok();
  }
  // UNIMPLEMENTED when cuDNN refuses.
  static absl::Status Run(Stream& s, const Call& call) {
    try {
      int device = 0;
      if (cudaGetDevice(&device) != cudaSuccess) return absl::UnimplementedError("no device");
      cudnnContext* const handle = CudnnHandle(s, device);
      if (handle == nullptr) {
        return absl::UnimplementedError("no handle could be made for the device");
      }
      return RunOn(s, call, handle, device);
    } catch (const std::exception& e) {
      return absl::UnimplementedError(e.what());
    } catch (...) {
      return absl::UnimplementedError("an unknown exception");
    }
  }

  static absl::Status RunOn(Stream& s, const Call& c, cudnnContext* handle, int device) {
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

    const int64_t reach =
        std::max(c.q.rows() * std::max({key.q_row, key.o_row, key.dq_row}),
                 c.k.rows() * std::max({key.k_row, key.v_row, key.dk_row, key.dv_row}));
    if (!dense && reach > INT32_MAX) {
      return absl::UnimplementedError(absl::StrCat("packed sequences of ", c.q.rows(),
                                                   " queries and ", c.k.rows(), " keys reach ",
                                                   reach, " elements, more than 32 bits count"));
    }
    if (!c.backward()) return RunCut(s, c, key, {key.batch, key.kv_heads}, handle);

    // Fewer, larger executions first. Below the first that should fit, a few tries make up for what
    // the estimate does not know.
    int tries = 4;
    absl::Status ran;  // the last try
    const auto attempt = [&](Cut cut) {
      AttentionKey part = key;
      part.batch = cut.batch;
      part.heads = key.heads / key.kv_heads * cut.kv_heads;
      part.kv_heads = cut.kv_heads;
      if (BackwardBytes(part) > s.workspace().bytes || tries-- <= 0) return false;
      ran = RunCut(s, c, part, cut, handle);
      return ran.ok();
    };
    for (const int64_t batch : Divisors(key.batch)) {
      if (attempt({batch, key.kv_heads})) return ran;
    }
    for (const int64_t kv_heads : Divisors(key.kv_heads)) {
      if (kv_heads < key.kv_heads && attempt({1, kv_heads})) return ran;
    }
    if (tries < 4) return ran;
    return absl::UnimplementedError(
        absl::StrCat("sequences of ", key.length, " tokens need ", BackwardBytes(key.Single()),
                     " bytes of workspace, the stream has ", s.workspace().bytes));
  }

  // Runs the call in parts of `cut`; `key` describes one part but for the workspace.
  static absl::Status RunCut(Stream& s, const Call& c, AttentionKey key, Cut cut,
                             cudnnContext* handle) {
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
    if (key.workspace < 0) {
      return absl::UnimplementedError(
          absl::StrCat("boundaries alone need ", scratch, " bytes of workspace"));
    }
    const CudnnPlan& plan = FindCudnnPlan(key, handle);
    STRETTO_RETURN_IF_ERROR(plan.refused);
    std::byte* const rest = workspace.data + scratch;

    if (key.ragged != 0) FillRaggedIndex(s, index, c.shape);
    const int64_t kv_heads = c.k.dims[1];
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t head = 0; head < kv_heads; head += cut.kv_heads) {
        CudnnPointers p = At(c, key.ragged != 0 ? 0 : g * cut.batch * key.length, head);
        if (key.ragged != 0) {
          p[kLengthsQ] = index.Lengths(g, /*keys=*/false);
          p[kLengthsK] = index.Lengths(g, /*keys=*/true);
          for (int i = 0; i < RaggedIndex::kOperands; ++i) p[kOffsetsQ + i] = index.Offsets(g, i);
          if (c.backward() && Cudnn().version < kCleanScratch) {
            cudaMemsetAsync(rest, 0, static_cast<size_t>(plan.workspace), Native(s));
          }
        } else if (c.backward()) {
          auto* stats = reinterpret_cast<float*>(workspace.data);
          HeadMajorLse(s, stats, c.lse.Rows(g * cut.batch * key.length, cut.batch * key.length),
                       cut.batch, key.length, head * (c.q.dims[1] / kv_heads), key.heads);
          p[kStats] = stats;
        }
        STRETTO_RETURN_IF_ERROR(ExecuteCudnn(plan, handle, p, rest));
      }
    }
    // Not left to the library, which does not promise it.
    if (!c.self()) {
      const Tensor none;
      ClearLonely(s, c.q, c.k, c.backward() ? none : c.o, c.backward() ? none : c.lse, c.dq, c.dk,
                  c.dv, c.shape);
    }
    return absl::OkStatus();
  }

  // The operands from row `row` and key-value head `kv_head` on.
  static CudnnPointers At(const Call& c, int64_t row, int64_t kv_head) {
    const int64_t head = kv_head * (c.q.dims[1] / c.k.dims[1]);
    const auto at = [row](const Tensor& t, int64_t h) -> void* {
      if (!t.present()) return nullptr;
      const int64_t width = t.rank == 3 ? t.dims[2] : 1;
      return t.data + (row * t.row_stride + h * width) * SizeOf(t.dtype);
    };
    CudnnPointers p = {};
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
  const CudnnLibrary& library = Cudnn();
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

}  // namespace stretto::cuda

#endif  // STRETTO_WITH_CUDNN
