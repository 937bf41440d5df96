#include <algorithm>
#include <cmath>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// Element i of the first half of a head and element i of the second turn together (rotate-half).
template <class V>
struct Pair {
  V first, second;

  Pair Turned(V cos, V sin) const {
    return {first * cos - second * sin, second * cos + first * sin};
  }
};
template <class T, class N>
Pair<Vec<Acc<T>>> LoadPair(const T* p, int64_t half, int64_t i, N n) {
  return {Load(p + i, n), Load(p + half + i, n)};
}
template <class T, class N>
void StorePair(T* p, int64_t half, int64_t i, Pair<Vec<Acc<T>>> pair, N n) {
  Store(p + i, pair.first, n);
  Store(p + half + i, pair.second, n);
}

// The row of the tables that turns a token.
template <class A>
struct Turn {
  const A* cos;
  const A* sin;
  A sign;  // of the sine; -1 turns back
  int64_t half;

  template <class V, class N>
  Pair<V> operator()(Pair<V> pair, int64_t i, N n) const {
    return pair.Turned(Load(cos + i, n), Load(sin + i, n) * sign);
  }
};

template <class T, class A>
void TurnHead(T* y, const T* x, const Turn<A>& turn) {
  VecLoop<A>(turn.half, [&](int64_t i, auto n) {
    StorePair(y, turn.half, i, turn(LoadPair(x, turn.half, i, n), i, n), n);
  });
}

template <class T, class A>
void NormAndTurnHead(T* y, A* rstd, const T* x, const T* weight, A eps, const Turn<A>& turn) {
  const int64_t half = turn.half;
  Vec<A> squares = {};
  VecLoop<A>(2 * half, [&](int64_t i, auto n) {
    const Vec<A> v = Load(x + i, n);
    squares += v * v;
  });
  const A r = 1 / std::sqrt(Sum<A>(squares) / static_cast<A>(2 * half) + eps);
  *rstd = r;
  VecLoop<A>(half, [&](int64_t i, auto n) {
    const auto v = LoadPair(x, half, i, n), w = LoadPair(weight, half, i, n);
    StorePair(y, half, i, turn(Pair<Vec<A>>{v.first * r * w.first, v.second * r * w.second}, i, n),
              n);
  });
}

// With d = dy turned back, g = d * weight and u = x * rstd: dx = rstd * (g - u * mean(g * u)). Adds
// d * u to `sums` [head_dim]; `products` [head_dim] is scratch.
template <class T, class A>
void NormAndTurnHeadBackward(T* dx, double* sums, A* products, const T* dy, const T* x, A r,
                             const T* weight, const Turn<A>& back) {
  const int64_t half = back.half;
  Vec<A> sum = {};
  VecLoop<A>(half, [&](int64_t i, auto n) {
    const auto d = back(LoadPair(dy, half, i, n), i, n);
    const auto v = LoadPair(x, half, i, n), w = LoadPair(weight, half, i, n);
    sum += d.first * w.first * (v.first * r) + d.second * w.second * (v.second * r);
  });
  const A mean = Sum<A>(sum) / static_cast<A>(2 * half);
  VecLoop<A>(half, [&](int64_t i, auto n) {
    const auto d = back(LoadPair(dy, half, i, n), i, n);
    const auto v = LoadPair(x, half, i, n), w = LoadPair(weight, half, i, n);
    const Pair<Vec<A>> u = {v.first * r, v.second * r};
    StorePair(dx, half, i,
              Pair<Vec<A>>{(d.first * w.first - u.first * mean) * r,
                           (d.second * w.second - u.second * mean) * r},
              n);
    StorePair(products, half, i, Pair<Vec<A>>{d.first * u.first, d.second * u.second}, n);
  });
  for (int64_t i = 0; i < 2 * half; ++i) sums[i] += products[i];
}

// Calls body(token, turn) for tokens [begin, end). A position outside the tables fails the stream.
template <class A, class Body>
void ForTokens(Stream* stream, const RotaryArgs& args, A sign, int64_t begin, int64_t end,
               const Body& body) {
  for (int64_t t = begin; t < end; ++t) {
    const int32_t position = args.positions.as<int32_t>()[t];
    if (position < 0 || position >= args.cos.rows()) {
      stream->Fail(absl::OutOfRangeError(absl::StrCat(
          "Rope: position ", position, " of row ", t, " is outside the tables of ", args.cos.rows(),
          " positions; raise max_positions, or shorten the sequences")));
      continue;
    }
    body(t, Turn<A>{args.cos.as<A>(position), args.sin.as<A>(position), sign, args.cos.dims[1]});
  }
}

class CpuRotary final : public RotaryKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor rstd, Tensor x, const RotaryArgs& args) const override {
    if (!args.q_weight.present()) return Apply(s, y, x, args, 1);
    Stream* stream = &s;
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t heads = x.dims[1], dim = x.dims[2];
        const auto tokens = [&](int64_t begin, int64_t end, int) {
          ForTokens<A>(stream, args, 1, begin, end, [&](int64_t t, const Turn<A>& turn) {
            for (int64_t h = 0; h < heads; ++h) {
              const Tensor& weight = h < args.query_heads ? args.q_weight : args.k_weight;
              NormAndTurnHead(y.as<T>(t) + h * dim, rstd.as<A>(t) + h, x.as<T>(t) + h * dim,
                              weight.as<T>(), static_cast<A>(args.eps), turn);
            }
          });
        };
        stream->pool().ParallelFor(x.rows(), 1, tokens, SerialTokens(x));
      });
    });
  }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor x, Tensor rstd, Tensor partials,
                     const RotaryArgs& args) const override {
    if (!args.q_weight.present()) return Apply(s, dx, dy, args, -1);
    Stream* stream = &s;
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t heads = x.dims[1], dim = x.dims[2], rows = x.rows();
        // Row p of the partials is made of the p-th part of the tokens, whoever works on it.
        const auto parts = [&](int64_t first, int64_t last, int) {
          double* sums = Scratch<double>(kScratchA, 2 * dim);
          A* products = Scratch<A>(kScratchB, dim);
          for (int64_t p = first; p < last; ++p) {
            std::fill_n(sums, 2 * dim, 0.0);
            ForTokens<A>(stream, args, -1, p * rows / kPartials, (p + 1) * rows / kPartials,
                         [&](int64_t t, const Turn<A>& back) {
                           for (int64_t h = 0; h < heads; ++h) {
                             const bool query = h < args.query_heads;
                             const Tensor& weight = query ? args.q_weight : args.k_weight;
                             NormAndTurnHeadBackward(dx.as<T>(t) + h * dim,
                                                     query ? sums : sums + dim, products,
                                                     dy.as<T>(t) + h * dim, x.as<T>(t) + h * dim,
                                                     rstd.as<A>(t)[h], weight.as<T>(), back);
                           }
                         });
            std::transform(sums, sums + 2 * dim, partials.as<A>(p),
                           [](double sum) { return static_cast<A>(sum); });
          }
        };
        const bool serial = rows * heads * dim <= kSerialElements;
        stream->pool().ParallelFor(kPartials, 1, parts, serial ? kPartials : 0);
      });
    });
  }

  void BackwardWeight(Stream& s, Tensor dq_weight, Tensor dk_weight, Tensor partials,
                      bool acc) const override {
    s.Enqueue([=] {
      ForModelType(partials.dtype, [&](auto type) {
        using A = Acc<typename decltype(type)::type>;
        const int64_t dim = partials.dims[2];
        double* sums = Scratch<double>(kScratchA, 2 * dim);
        std::fill_n(sums, 2 * dim, 0.0);
        for (int64_t p = 0; p < kPartials; ++p) {
          const A* row = partials.as<A>(p);
          for (int64_t i = 0; i < 2 * dim; ++i) sums[i] += row[i];
        }
        const auto put = [&](const Tensor& out, const double* from) {
          A* to = out.as<A>();
          for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<A>((acc ? to[i] : 0) + from[i]);
        };
        put(dq_weight, sums);
        put(dk_weight, sums + dim);
      });
    });
  }

 private:
  static int64_t SerialTokens(const Tensor& x) {
    return kSerialElements / std::max<int64_t>(1, x.row_elements());
  }

  static void Apply(Stream& s, Tensor y, Tensor x, const RotaryArgs& args, int sign) {
    Stream* stream = &s;
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t heads = x.dims[1], dim = x.dims[2];
        const auto tokens = [&](int64_t begin, int64_t end, int) {
          ForTokens<A>(stream, args, static_cast<A>(sign), begin, end,
                       [&](int64_t t, const Turn<A>& turn) {
                         for (int64_t h = 0; h < heads; ++h) {
                           TurnHead(y.as<T>(t) + h * dim, x.as<T>(t) + h * dim, turn);
                         }
                       });
        };
        stream->pool().ParallelFor(x.rows(), 1, tokens, SerialTokens(x));
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
