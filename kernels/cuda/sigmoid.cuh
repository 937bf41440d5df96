// The logistic function, and the derivative of SwiGLU, as all kernels compute them, so that a fused
// one gives what a separate one does.
#ifndef STRETTO_KERNELS_CUDA_SIGMOID_CUH_
#define STRETTO_KERNELS_CUDA_SIGMOID_CUH_

#include <type_traits>

namespace stretto::cuda {

// 1 / (1 + exp(-z)). For bf16 results the hardware's approximations do: they are good to 1e-5. When
// the exponential overflows the quotient is 0, as it should be; where it would be subnormal it is
// 0, which the sum does not see. NaN stays NaN.
template <class T>
__device__ float Sigmoid(float z) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-z));
  } else {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504088896341f));
    return __fdividef(1.0f, 1.0f + power);
  }
}

struct GateUp {
  float gate, up;
};

// `old` + the gradients of gate and up, where `d` is that of silu(gate) * up.
template <class T>
__device__ inline GateUp SwigluGradient(float d, GateUp x, GateUp old = {0.0f, 0.0f}) {
  const float s = Sigmoid<T>(x.gate);
  const float d_gate = d * x.up * s * (x.gate * (1.0f - s) + 1.0f);
  return {d_gate + old.gate, d * x.gate * s + old.up};
}

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_SIGMOID_CUH_
