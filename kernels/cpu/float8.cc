#include "stretto/core/float8.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/families.h"
#include "kernels/cpu/product.h"

namespace stretto::cpu {
namespace {

template <class F>
void ForFloat8(DType dtype, const F& f) {
  if (dtype == DType::kE4M3) return f(Type<E4M3>{});
  if (dtype == DType::kE5M2) return f(Type<E5M2>{});
}

// Magnitudes are compared as integers, which order them as numbers and put NaN on top; so the order
// in which they come does not matter.
uint32_t Magnitude(BFloat16 x) { return static_cast<uint32_t>(x.bits & 0x7fffu) << 16; }

void FoldMax(const Tensor& amax, uint32_t bits) {
  const std::atomic_ref<uint32_t> shared(*reinterpret_cast<uint32_t*>(amax.data));
  uint32_t seen = shared.load(std::memory_order_relaxed);
  while (seen < bits && !shared.compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
  }
}

// Rows that are quantised and transposed together: whole groups of the transpose's 16 bytes.
constexpr int64_t kRows = 64;
static_assert(kRows % Float8Kernels::kAlignment == 0);

template <class T>
void QuantizeRows(const Tensor& q, const Tensor& qt, const Tensor& x, float scale, int64_t begin,
                  int64_t end, uint32_t* largest) {
  const int64_t columns = x.dims[1], rows = std::min(end, x.dims[0]);
  T* const codes = Scratch<T>(kScratchA, kRows * columns);
  uint32_t most = 0;
  for (int64_t r = begin; r < end; ++r) {
    T* const to = codes + (r - begin) * columns;
    if (r >= rows) {
      std::fill_n(to, columns, T());
      continue;
    }
    const BFloat16* const from = x.as<BFloat16>(r);
    for (int64_t j = 0; j < columns; ++j) {
      most = std::max(most, Magnitude(from[j]));
      to[j] = T(Widen(from[j]) * scale);
    }
    if (q.present()) std::copy_n(to, columns, q.as<T>(r));
  }
  if (qt.present()) {
    for (int64_t j = 0; j < columns; ++j) {
      T* const to = qt.as<T>(j);
      for (int64_t r = begin; r < end; ++r) to[r] = codes[(r - begin) * columns + j];
    }
  }
  *largest = most;
}

class CpuFloat8 final : public Float8Kernels {
 public:
  void AbsMax(Stream& s, Tensor amax, Tensor x) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForSpans(*pool, x.rows(), x.dims[1], [&](int64_t row, int64_t first, int64_t count) {
        const BFloat16* const from = x.as<BFloat16>(row) + first;
        uint32_t most = 0;
        for (int64_t j = 0; j < count; ++j) most = std::max(most, Magnitude(from[j]));
        FoldMax(amax, most);
      });
    });
  }

  void Quantize(Stream& s, Tensor q, Tensor qt, Tensor x, Tensor scale,
                Tensor amax) const override {
    if (!q.present() && !qt.present()) {
      if (amax.present()) AbsMax(s, amax, x);
      return;
    }
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      const int64_t rows = qt.present() ? qt.dims[1] : x.dims[0];
      ForFloat8(q.present() ? q.dtype : qt.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        pool->ParallelFor((rows + kRows - 1) / kRows, 1,
                          [&](int64_t begin, int64_t end, int) {
                            for (int64_t i = begin; i < end; ++i) {
                              uint32_t most = 0;
                              QuantizeRows<T>(q, qt, x, *scale.as<float>(), i * kRows,
                                              std::min(rows, (i + 1) * kRows), &most);
                              if (amax.present()) FoldMax(amax, most);
                            }
                          },
                          rows * x.dims[1] <= kSerialElements ? rows : 0);
      });
    });
  }

  void Product(Stream& s, Tensor d, Tensor a, Tensor b, Tensor inverse_a, Tensor inverse_b,
               Tensor bias, bool acc, bool /*fast*/) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      const float alpha = *inverse_a.as<float>() * *inverse_b.as<float>();
      ForFloat8(a.dtype, [&](auto type_a) {
        ForFloat8(b.dtype, [&](auto type_b) {
          using TA = typename decltype(type_a)::type;
          using TB = typename decltype(type_b)::type;
          const auto product = [&](auto* to) {
            ParallelProduct(*pool, Plain<TA>(a), Transposed<TB>(b), d.dims[0], d.dims[1], a.dims[1],
                            to, d.row_stride, acc, bias.present() ? bias.as<BFloat16>() : nullptr,
                            true, alpha);
          };
          if (d.dtype == DType::kBF16) {
            product(d.as<BFloat16>());
          } else {
            product(d.as<float>());
          }
        });
      });
    });
  }

  void UpdateScales(Stream& s, Tensor scale, Tensor inverse, Tensor history, Tensor amax,
                    Tensor limit) const override {
    s.Enqueue([=] {
      for (int64_t i = 0; i < amax.dims[0]; ++i) {
        float* const newest = amax.as<float>() + i;
        float largest = std::isfinite(*newest) ? *newest : 0.0f;
        if (history.present()) {
          float* const h = history.as<float>(i);
          const int64_t steps = history.dims[1];
          if (std::isfinite(*newest)) {
            std::copy_backward(h, h + steps - 1, h + steps);
            h[0] = *newest;
          }
          *newest = 0;
          largest = *std::max_element(h, h + steps);
        }
        if (largest > 0) {
          const float factor = PowerOfTwoBelow(limit.as<float>()[i] / largest);
          scale.as<float>()[i] = factor;
          *inverse.as<float>(i) = 1 / factor;
        }
      }
    });
  }

 private:
  // Within bounds that keep the inverse and products of two inverses from leaving f32's range.
  static float PowerOfTwoBelow(float x) {
    const float bounded = std::clamp(x, 0x1p-60f, 0x1p60f);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(bounded) & 0x7f800000u);
  }
};

}  // namespace

const Float8Kernels* Float8Products() {
  static const CpuFloat8 kernels;
  return &kernels;
}

}  // namespace stretto::cpu
