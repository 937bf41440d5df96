#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// Element i of the first half and element i of the second half turn together (rotate-half).
template <class T, class A>
void RotateHead(T* y, const T* x, const A* cos, const A* sin, A sign, int64_t half) {
  VecLoop<A>(half, [&](int64_t i, auto k) {
    const Vec<A> c = Load(cos + i, k);
    const Vec<A> s = Load(sin + i, k) * sign;
    const Vec<A> a = Load(x + i, k);
    const Vec<A> b = Load(x + half + i, k);
    Store(y + i, a * c - b * s, k);
    Store(y + half + i, b * c + a * s, k);
  });
}

class CpuRotary final : public RotaryKernels {
 public:
  void Apply(Stream& s, Tensor y, Tensor x, Tensor positions, Tensor cos, Tensor sin,
             bool inverse) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t heads = x.dims[1];
        const int64_t dim = x.dims[2];
        const A sign = inverse ? A{-1} : A{1};
        stream->pool().ParallelFor(
            x.rows(), 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t t = begin; t < end; ++t) {
                const int32_t position = positions.as<int32_t>()[t];
                if (position < 0 || position >= cos.rows()) {
                  stream->Fail(absl::OutOfRangeError(absl::StrCat(
                      "Rope: position ", position, " of row ", t, " is outside the tables of ",
                      cos.rows(), " positions; use longer tables or shorter sequences")));
                  continue;
                }
                for (int64_t h = 0; h < heads; ++h) {
                  RotateHead<T, A>(y.as<T>(t) + h * dim, x.as<T>(t) + h * dim, cos.as<A>(position),
                                   sin.as<A>(position), sign, dim / 2);
                }
              }
            },
            kSerialElements / std::max<int64_t>(1, heads * dim));
      });
    });
  }
};

}  // namespace

const RotaryKernels* Rotary() {
  static const CpuRotary kernels;
  return &kernels;
}

}  // namespace stretto::cpu
