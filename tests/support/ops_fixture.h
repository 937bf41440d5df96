// Tensors for tests of operations: filled from doubles, padded between rows, and read back.
#ifndef STRETTO_TESTS_SUPPORT_OPS_FIXTURE_H_
#define STRETTO_TESTS_SUPPORT_OPS_FIXTURE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/float8.h"
#include "stretto/ops/ops.h"

namespace stretto::test {

using Values = std::vector<double>;

// Numbers of about the size of activations, the same on every run.
inline Values Random(int64_t n, unsigned seed, double scale = 1.0) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal(0, scale);
  Values v(n);
  for (double& x : v) x = normal(bits);
  return v;
}

inline Values Plus(Values a, const Values& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

// Owns a tensor whose rows lie `padding` elements apart. The padding holds a pattern that Read()
// checks: a kernel that writes outside its rows is caught. It lies on the device of the test that
// runs, with a copy on the host.
class Buffer {
 public:
  // Where buffers are made; set by Runner.
  static inline Device where;

  Buffer(DType dtype, std::vector<int64_t> dims, int64_t padding = 0) {
    view_.dtype = dtype;
    for (int64_t d : dims) view_.dims[view_.rank++] = d;
    view_.row_stride = view_.row_elements() + padding;
    bytes_.assign((view_.rows() * view_.row_stride + 1) * SizeOf(dtype), std::byte{0x5a});
    view_.data = bytes_.data();
    if (where.kind == DeviceKind::kCpu) return;
    arena_ = Arena::Create(where, "test", static_cast<int64_t>(bytes_.size())).value();
    view_.device = where;
    view_.data = arena_.data();
    Send();
  }
  Buffer(DType dtype, std::vector<int64_t> dims, const Values& values, int64_t padding = 0)
      : Buffer(dtype, std::move(dims), padding) {
    Write(values);
  }
  Buffer(Buffer&& other) = default;

  Tensor view() const { return view_; }
  operator Tensor() const { return view_; }  // NOLINT: a Buffer stands for its tensor

  void Write(const Values& values) {
    ASSERT_EQ(static_cast<int64_t>(values.size()), view_.elements());
    const int64_t n = view_.row_elements();
    for (size_t i = 0; i < values.size(); ++i) Put(i / n * view_.row_stride + i % n, values[i]);
    Send();
  }
  Values Read() const {
    Fetch();
    const int64_t n = view_.row_elements();
    Values values(view_.elements());
    for (size_t i = 0; i < values.size(); ++i) values[i] = Get(i / n * view_.row_stride + i % n);
    for (int64_t r = 0; r < view_.rows(); ++r) {
      for (int64_t b = n * SizeOf(view_.dtype); b < view_.row_stride * SizeOf(view_.dtype); ++b) {
        EXPECT_EQ(bytes_[r * view_.row_stride * SizeOf(view_.dtype) + b], std::byte{0x5a})
            << "padding behind row " << r << " was written";
      }
    }
    return values;
  }
  const std::vector<std::byte>& bytes() const {
    Fetch();
    return bytes_;
  }

 private:
  Tensor AllBytes() const {
    return Tensor::Of(view_.data, DType::kU8, {static_cast<int64_t>(bytes_.size())}, view_.device);
  }
  void Send() const {
    if (view_.device.kind == DeviceKind::kCpu) return;
    ASSERT_TRUE(CopyFromHost(AllBytes(), bytes_.data()).ok());
  }
  void Fetch() const {
    if (view_.device.kind == DeviceKind::kCpu) return;
    ASSERT_TRUE(CopyToHost(bytes_.data(), AllBytes()).ok());
  }
  void Put(int64_t i, double x) {
    if (view_.dtype == DType::kF64) reinterpret_cast<double*>(bytes_.data())[i] = x;
    if (view_.dtype == DType::kF32) reinterpret_cast<float*>(bytes_.data())[i] = x;
    if (view_.dtype == DType::kI32) reinterpret_cast<int32_t*>(bytes_.data())[i] = x;
    if (view_.dtype == DType::kBF16) {
      reinterpret_cast<BFloat16*>(bytes_.data())[i] = BFloat16(static_cast<float>(x));
    }
    if (view_.dtype == DType::kE4M3) {
      reinterpret_cast<E4M3*>(bytes_.data())[i] = E4M3(static_cast<float>(x));
    }
    if (view_.dtype == DType::kE5M2) {
      reinterpret_cast<E5M2*>(bytes_.data())[i] = E5M2(static_cast<float>(x));
    }
  }
  double Get(int64_t i) const {
    switch (view_.dtype) {
      case DType::kF64:
        return reinterpret_cast<const double*>(bytes_.data())[i];
      case DType::kF32:
        return reinterpret_cast<const float*>(bytes_.data())[i];
      case DType::kBF16:
        return static_cast<float>(reinterpret_cast<const BFloat16*>(bytes_.data())[i]);
      case DType::kE4M3:
        return static_cast<float>(reinterpret_cast<const E4M3*>(bytes_.data())[i]);
      case DType::kE5M2:
        return static_cast<float>(reinterpret_cast<const E5M2*>(bytes_.data())[i]);
      default:
        return reinterpret_cast<const int32_t*>(bytes_.data())[i];
    }
  }

  Tensor view_;
  mutable std::vector<std::byte> bytes_;
  Arena arena_;  // not on the CPU
};

inline Buffer Indices(const std::vector<int32_t>& values) {
  return Buffer(DType::kI32, {static_cast<int64_t>(values.size())},
                Values(values.begin(), values.end()));
}

// What the tolerance of a type is for sums of a few hundred terms.
inline double Tolerance(DType dtype) {
  return dtype == DType::kF64 ? 1e-12 : dtype == DType::kF32 ? 4e-6 : 8e-3;
}

// max |a - b| <= tolerance * max(largest |b|, floor).
inline ::testing::AssertionResult Near(const Values& actual, const Values& expected,
                                       double tolerance, double floor = 1e-2) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure() << actual.size() << " values for " << expected.size();
  }
  double largest = floor;
  for (double b : expected) largest = std::max(largest, std::fabs(b));
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!(std::fabs(actual[i] - expected[i]) <= tolerance * largest)) {
      return ::testing::AssertionFailure()
             << "element " << i << " is " << actual[i] << ", expected " << expected[i]
             << "; allowed " << tolerance << " * " << largest;
    }
  }
  return ::testing::AssertionSuccess();
}

struct Setting {
  DType dtype = DType::kF32;
  int threads = 1;
  StreamMode mode = StreamMode::kInline;
  Device device;
};

inline std::string SettingName(const ::testing::TestParamInfo<Setting>& info) {
  if (info.param.device.kind == DeviceKind::kCuda) {
    return std::string(Name(info.param.dtype)) + "Cuda";
  }
  return std::string(Name(info.param.dtype)) + "Threads" + std::to_string(info.param.threads) +
         (info.param.mode == StreamMode::kFifo ? "Fifo" : "Inline");
}

// In messages; the bytes of a setting say nothing, and differ from run to run where it has padding.
inline void PrintTo(const Setting& setting, std::ostream* out) {
  *out << Name(setting.dtype) << " on " << Name(setting.device) << ", " << setting.threads
       << " threads";
}

inline std::vector<Setting> AllSettings() {
  std::vector<Setting> all;
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    all.push_back({dtype, 1, StreamMode::kInline});
    all.push_back({dtype, 2, StreamMode::kFifo});
    all.push_back({dtype, 3, StreamMode::kInline});
  }
  if (KernelsFor(Device::Cuda(0)).ok()) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      all.push_back({dtype, 1, StreamMode::kDevice, Device::Cuda(0)});
    }
  }
  return all;
}

// A stream with the kernels of its device.
class Runner {
 public:
  explicit Runner(Setting setting = {DType::kF64}) : setting_(setting), outer_(Buffer::where) {
    StreamOptions options;
    options.mode = setting.mode;
    options.threads = setting.threads;
    Buffer::where = Device::Cpu();
    if (!DescribeDevice(setting.device).ok()) return;  // the test is skipped
    Buffer::where = setting.device;
    stream_ = Stream::Create(setting.device, options).value();
    context_ = {stream_.get(), KernelsFor(setting.device).value()};
  }
  ~Runner() { Buffer::where = outer_; }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ops::Context context() const { return context_; }
  DType dtype() const { return setting_.dtype; }
  // The same on one thread.
  Setting serial() const { return {setting_.dtype, 1, StreamMode::kInline, setting_.device}; }
  bool on_cpu() const { return setting_.device.kind == DeviceKind::kCpu; }
  DType wide() const { return AccumulateType(setting_.dtype); }
  double tolerance() const { return Tolerance(setting_.dtype); }
  // For results that are kept in the accumulate type: bf16 operands do not blur them.
  double wide_tolerance() const { return Tolerance(wide()); }
  absl::Status Wait() const { return stream_->Synchronize(); }
  void ExpectOk() const {
    const absl::Status status = Wait();
    EXPECT_TRUE(status.ok()) << status.message();
  }
  Buffer Make(std::vector<int64_t> dims, const Values& values, int64_t padding = 0) const {
    const Here here(setting_.device);
    return Buffer(dtype(), std::move(dims), values, padding);
  }
  Buffer Make(std::vector<int64_t> dims, int64_t padding = 0) const {
    const Here here(setting_.device);
    return Buffer(dtype(), std::move(dims), padding);
  }
  // Of a type that is not the setting's.
  Buffer Of(DType type, std::vector<int64_t> dims, int64_t padding = 0) const {
    const Here here(setting_.device);
    return Buffer(type, std::move(dims), padding);
  }
  Buffer Of(DType type, std::vector<int64_t> dims, const Values& values,
            int64_t padding = 0) const {
    const Here here(setting_.device);
    return Buffer(type, std::move(dims), values, padding);
  }
  Buffer Wide(std::vector<int64_t> dims, int64_t padding = 0) const {
    const Here here(setting_.device);
    return Buffer(wide(), std::move(dims), padding);
  }

 private:
  // Buffers made in its scope lie on `device`.
  struct Here {
    explicit Here(Device device) : outer(Buffer::where) { Buffer::where = device; }
    ~Here() { Buffer::where = outer; }
    Device outer;
  };

  Setting setting_;
  Device outer_;  // of the runner around this one
  std::unique_ptr<Stream> stream_;
  ops::Context context_;
};

// Runs a test body with every type, thread count and kind of stream.
class OpsTest : public ::testing::TestWithParam<Setting> {
 protected:
  OpsTest() : run(GetParam()), c(run.context()) {}
  void SetUp() override {
    const absl::Status usable = DescribeDevice(GetParam().device).status();
    if (!usable.ok()) GTEST_SKIP() << usable.message();
  }
  Runner run;
  ops::Context c;
};

// Those of AllSettings that `has` is true of.
template <class Has>
std::vector<Setting> SettingsThat(Has has) {
  std::vector<Setting> some;
  for (const Setting& s : AllSettings()) {
    if (has(s)) some.push_back(s);
  }
  return some;
}

#define STRETTO_ALL_SETTINGS(suite)                                                      \
  INSTANTIATE_TEST_SUITE_P(, suite, ::testing::ValuesIn(::stretto::test::AllSettings()), \
                           ::stretto::test::SettingName)

}  // namespace stretto::test

#endif  // STRETTO_TESTS_SUPPORT_OPS_FIXTURE_H_
