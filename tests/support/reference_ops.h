// The operations written down naively in double precision: one loop nest each, no blocking, no
// sharing with the kernels that they check. Matrices are dense and row-major.
#ifndef STRETTO_TESTS_SUPPORT_REFERENCE_OPS_H_
#define STRETTO_TESTS_SUPPORT_REFERENCE_OPS_H_

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace stretto::reference {

using Values = std::vector<double>;

// y [m, n] = a [m, k] b [k, n], either read transposed.
inline Values MatMul(const Values& a, bool trans_a, const Values& b, bool trans_b, int64_t m,
                     int64_t n, int64_t k) {
  Values y(m * n, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < k; ++p) {
        y[i * n + j] += a[trans_a ? p * m + i : i * k + p] * b[trans_b ? j * k + p : p * n + j];
      }
    }
  }
  return y;
}

struct NormResult {
  Values y, mean, rstd;
};
// `center` false: RMSNorm, and `bias` is not read.
inline NormResult Norm(const Values& x, const Values& weight, const Values& bias, int64_t rows,
                       int64_t n, bool center, double eps) {
  NormResult r{Values(rows * n), Values(rows, 0.0), Values(rows)};
  for (int64_t i = 0; i < rows; ++i) {
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < n; ++j) mean += x[i * n + j] / n;
    if (!center) mean = 0;
    for (int64_t j = 0; j < n; ++j) variance += (x[i * n + j] - mean) * (x[i * n + j] - mean) / n;
    r.mean[i] = mean;
    r.rstd[i] = 1 / std::sqrt(variance + eps);
    for (int64_t j = 0; j < n; ++j) {
      r.y[i * n + j] = (x[i * n + j] - mean) * r.rstd[i] * weight[j] + (center ? bias[j] : 0);
    }
  }
  return r;
}

inline double Gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

inline double Silu(double x) { return x / (1 + std::exp(-x)); }

// Rotates [tokens, heads, dim] by angle[position][i]; rotate-half order.
inline Values Rope(const Values& x, const std::vector<int32_t>& positions, const Values& cos,
                   const Values& sin, int64_t heads, int64_t dim, bool inverse) {
  Values y(x.size());
  const int64_t half = dim / 2;
  for (size_t t = 0; t < positions.size(); ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t base = (t * heads + h) * dim;
      for (int64_t i = 0; i < half; ++i) {
        const double c = cos[positions[t] * half + i];
        const double s = (inverse ? -1 : 1) * sin[positions[t] * half + i];
        y[base + i] = x[base + i] * c - x[base + half + i] * s;
        y[base + half + i] = x[base + half + i] * c + x[base + i] * s;
      }
    }
  }
  return y;
}

struct AttentionSizes {
  int64_t heads, kv_heads, dim;
  std::vector<int32_t> cu_q, cu_k;
  bool causal;
  double scale;
  bool neat = false;  // rows begin at multiples of 16 bytes, as a GPU's fast kernels want them
  std::vector<int32_t> len_q, len_k;  // empty: up to where the next sequence begins

  int64_t Queries(size_t s) const { return len_q.empty() ? cu_q[s + 1] - cu_q[s] : len_q[s]; }
  int64_t Keys(size_t s) const { return len_k.empty() ? cu_k[s + 1] - cu_k[s] : len_k[s]; }
};
struct AttentionResult {
  Values o, lse;
};
// Writes down the whole row of probabilities of each query.
inline AttentionResult Attention(const Values& q, const Values& k, const Values& v,
                                 const AttentionSizes& a) {
  const int64_t tokens = static_cast<int64_t>(q.size()) / (a.heads * a.dim);
  AttentionResult r{Values(q.size(), 0.0), Values(tokens * a.heads, 0.0)};
  for (size_t s = 0; s + 1 < a.cu_q.size(); ++s) {
    for (int64_t i = a.cu_q[s]; i < a.cu_q[s] + a.Queries(s); ++i) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t kv = h / (a.heads / a.kv_heads);
        const int64_t seen = a.causal ? i - a.cu_q[s] + 1 : a.Keys(s);
        Values score(seen);
        double max = -std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < seen; ++j) {
          for (int64_t d = 0; d < a.dim; ++d) {
            score[j] += a.scale * q[(i * a.heads + h) * a.dim + d] *
                        k[((a.cu_k[s] + j) * a.kv_heads + kv) * a.dim + d];
          }
          max = std::max(max, score[j]);
        }
        double sum = 0;
        for (double x : score) sum += std::exp(x - max);
        r.lse[i * a.heads + h] = max + std::log(sum);
        for (int64_t j = 0; j < seen; ++j) {
          for (int64_t d = 0; d < a.dim; ++d) {
            r.o[(i * a.heads + h) * a.dim + d] +=
                std::exp(score[j] - max) / sum * v[((a.cu_k[s] + j) * a.kv_heads + kv) * a.dim + d];
          }
        }
      }
    }
  }
  return r;
}

// -log softmax(logits)[target] of one row.
inline double CrossEntropy(const double* logits, int64_t columns, int64_t target) {
  double max = logits[0];
  for (int64_t j = 0; j < columns; ++j) max = std::max(max, logits[j]);
  double sum = 0;
  for (int64_t j = 0; j < columns; ++j) sum += std::exp(logits[j] - max);
  return max + std::log(sum) - logits[target];
}

// d f / d x by central differences, for f that reads x.
template <class F>
Values NumericGradient(Values& x, const F& f, double step = 1e-5) {
  Values gradient(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double kept = x[i];
    x[i] = kept + step;
    const double up = f();
    x[i] = kept - step;
    const double down = f();
    x[i] = kept;
    gradient[i] = (up - down) / (2 * step);
  }
  return gradient;
}

inline double Dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace stretto::reference

#endif  // STRETTO_TESTS_SUPPORT_REFERENCE_OPS_H_
