// Instructions of compute capability 9.0a that C++ has no words for: matrix products of a warpgroup
// (128 threads) from shared memory, bulk copies into shared memory, and the barriers they complete
// on. Names follow the PTX manual ("Asynchronous Warpgroup Level Matrix", "Tensor Copy",
// "mbarrier").
//
// A tile is kRows rows of 64 bf16 numbers, 128 bytes a row, in the 128-byte swizzle that tensor
// maps write and products read; it starts at a multiple of 1024 bytes.
#ifndef STRETTO_KERNELS_CUDA_HOPPER_CUH_
#define STRETTO_KERNELS_CUDA_HOPPER_CUH_

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace stretto::cuda::hopper {

inline constexpr int kWarpgroup = 128;
inline constexpr int kTileWidth = 64;  // columns of a tile
inline constexpr int kRowBytes = 128;

inline constexpr int kAlignment = 1024;  // of tiles

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A thread block's memory of type M.
template <class M>
constexpr int MemoryBytes() {
  return sizeof(M) + kAlignment;
}
template <class M>
__device__ M& SharedMemory() {
  extern __shared__ uint8_t bytes[];
  const uint32_t address = SharedAddress(bytes);
  return *reinterpret_cast<M*>(bytes + (kAlignment - address % kAlignment) % kAlignment);
}

// Counts through a ring of `kSize` places.
template <int kSize>
struct Ring {
  int place = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    if (++place == kSize) {
      place = 0;
      parity ^= 1;
    }
  }
  __device__ int Before() const { return (place + kSize - 1) % kSize; }
};

// --- Barriers. Each lies in shared memory; `parity` is that of the phase waited for. ---

using Barrier = uint64_t;

__device__ inline void Init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ inline void FenceInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// --- Thread blocks of a cluster, which see each other's shared memory. ---

__device__ inline uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Waits for all threads of the cluster; what they wrote before is seen after.
__device__ inline void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Arrives at the barrier that has the place of `barrier` in the cluster's block `rank`. What orders
// copies and products does; ordinary writes are not seen over there.
__device__ inline void ArriveAt(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(rank)
      : "memory");
}

__device__ inline void Arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
// Arrives once for a warp, when all its lanes are here. Products end for a warpgroup as a whole,
// but its warps read shared memory each at its own pace.
__device__ inline void ArriveWarp(Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) Arrive(barrier);
}
// Arrives, and has the phase wait for `bytes` more bytes.
__device__ inline void ArriveExpecting(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void Wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni over;\n"
      "bra.uni again;\n"
      "over:\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// --- Copies into shared memory that complete on a barrier. ---

// The box of the map whose first element is (column, row).
__device__ inline void LoadBox(void* to, const CUtensorMap& map, Barrier* barrier, int column,
                               int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(SharedAddress(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(SharedAddress(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same into the blocks of the cluster whose bits `blocks` has: to the place of `to` in each,
// and counted at the barrier there that has the place of `barrier`.
__device__ inline void LoadBoxInto(uint16_t blocks, void* to, const CUtensorMap& map,
                                   Barrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(SharedAddress(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(SharedAddress(barrier)), "r"(column), "r"(row),
      "h"(blocks)
      : "memory");
}
// `bytes` bytes from `from`; all three multiples of 16.
__device__ inline void LoadBytes(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// --- Copies out of shared memory. Each thread waits for its own; a group is what lies between two
// commits. ---

// Before a copy reads what this thread has written.
__device__ inline void FenceCopies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// What tells the L2 cache that lines will not be wanted soon.
__device__ inline uint64_t PassingPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Into the box of the map whose first element is (column, row); what lies outside is left out.
__device__ inline void StoreBox(const CUtensorMap& map, int column, int row, const void* from,
                                uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3}], [%1], %4;" ::"l"(reinterpret_cast<uint64_t>(&map)),
      "r"(SharedAddress(from)), "r"(column), "r"(row), "l"(policy)
      : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the newest kPending groups have read shared memory.
template <int kPending>
__device__ void WaitCopiesRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all groups are done.
__device__ inline void WaitCopies() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --- Registers of a warpgroup. ---

template <int kRegisters>
__device__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Products. They run in the order of their issue; a group is what lies between two commits. ---

// Before the first product, and whenever registers that products read or write were touched.
__device__ inline void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest kPending groups are done.
template <int kPending>
__device__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of an accumulator across.
template <int N>
__device__ void Pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// What products know of a tile in shared memory: its address, 1024 bytes between groups of eight
// rows, 128-byte swizzle. Valid for either direction of the summed dimension; `apart`: where it is
// summed down its rows, the bytes between tiles whose columns follow each other.
__device__ inline uint64_t Descriptor(uint32_t address, int apart = 16) {
  return (static_cast<uint64_t>(address & 0x3ffff) >> 4) |
         (static_cast<uint64_t>(apart >> 4) << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}
// The same of a tile that is half as wide: rows of 64 bytes in the 64-byte swizzle, summed along
// them.
__device__ inline uint64_t NarrowDescriptor(uint32_t address) {
  return (static_cast<uint64_t>(address & 0x3ffff) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{512 >> 4} << 32) | (uint64_t{2} << 62);
}
// Bytes from one step of 16 summed elements to the next: along a row, and down the rows.
inline constexpr int kStepAlong = 32;
inline constexpr int kStepDown = 16 * kRowBytes;

// d [64 x 128] = (add ? d : 0) + a [64 x 16] b [128 x 16]^T, both tiles summed along their rows.
//
// Thread t of the warpgroup has, of an accumulator with N columns, for j in [0, N / 8) and e in
// [0, 2): d[4 j + e] = (row, 8 j + c + e) and d[4 j + 2 + e] = (row + 8, 8 j + c + e) with
// row = 16 (t / 32) + t % 32 / 4 and c = 2 (t % 4).
__device__ inline void Multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d [64 x 256] = (add ? d : 0) + a [64 x 16] b [256 x 16]^T, likewise; b's rows follow each other
// over tiles that do. kDown: b is [16 x 256] and summed down its rows, in tiles side by side.
template <bool kDown = false>
__device__ inline void Multiply(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "%128, %129, p, 1, 1, 0, %131;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
        "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
        "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
        "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
        "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
        "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
        "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kDown)));
}

// d [64 x 64] = (add ? d : 0) + a [64 x 16] b [64 x 16]^T, likewise.
__device__ inline void Multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d [64 x 64] = (add ? d : 0) + a [64 x 16] times 16 summed elements of tile b, whose 64 columns of
// the result are its rows (kDown false: summed along them) or its columns (kDown: summed down
// them).
//
// a, from registers: a[0] = (row, k), a[1] = (row + 8, k), a[2] = (row, k + 8), a[3] =
// (row + 8, k + 8), each with its right neighbour in the upper half, k = 2 (t % 4): 8 values of an
// accumulator as they lie.
template <bool kDown>
__device__ void Multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(static_cast<int>(kDown)));
}

// The left operand of 16 rows (a warp's) and the columns 16 k.. of a tile: `rows` is the address of
// the first of the rows, of which eight lie in 1024 bytes. It has not been read when this returns:
// an arrival at a barrier does not wait for loads that are on their way, so that the place may be
// given away only when a product has used what was loaded.
__device__ inline void LoadOperand(uint32_t (&a)[4], uint32_t rows, int k) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t row = lane % 16, chunk = 2 * k + lane / 16;  // of 16 bytes
  const uint32_t address = rows + row * kRowBytes + ((chunk ^ row % 8) << 4);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

// The reverse for what a warp stores: 16 rows and the columns 16 k.. of a tile, laid out in `a` as
// 8 values of an accumulator.
__device__ inline void StoreOperand(uint32_t rows, int k, const uint32_t (&a)[4]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t row = lane % 16, chunk = 2 * k + lane / 16;  // of 16 bytes
  const uint32_t address = rows + row * kRowBytes + ((chunk ^ row % 8) << 4);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}

// --- Numbers. ---

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers rounded to bf16, `low` in the lower half.
__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace stretto::cuda::hopper

#endif  // STRETTO_KERNELS_CUDA_HOPPER_CUH_
