// stretto-bench kernels: every kernel family on the shapes of one model, beside the copy rate and
// the matrix product of the same device in the same run.
//
// Bytes are those that a kernel has to move, each operand once; operations are multiplications and
// additions of the products (attention with a mask: below the diagonal). Operands rotate through
// copies of themselves that are larger than any cache, so that none of them is warm.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "benchmarks/bench.h"
#include "benchmarks/kernel_cases.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/float8.h"
#include "stretto/ops/ops.h"
#include "stretto/train/memory.h"
#include "tools/arguments.h"

namespace stretto::bench {
namespace {

constexpr int64_t kColdBytes = int64_t{256} << 20;  // more than the L2 of an H200, or most L3s

class Bench {
 public:
  Bench(Device device, int repetitions) : device_(device), repetitions_(repetitions) {}

  absl::Status Start(int threads) {
    STRETTO_ASSIGN_OR_RETURN(
        stream_, Stream::Create(device_, {.threads = threads,
                                          .workspace_bytes = DeviceWorkspaceBytes(device_.kind)}));
    STRETTO_ASSIGN_OR_RETURN(kernels_, KernelsFor(device_));
    return absl::OkStatus();
  }
  const KernelTable& kernels() const { return *kernels_; }

  // Median seconds of one call.
  absl::StatusOr<double> Time(const KernelCase& c) {
    int64_t set_bytes = 0;
    for (const KernelOperand& operand : c.operands) set_bytes += operand.bytes();
    const int64_t sets = std::clamp<int64_t>((kColdBytes + set_bytes - 1) / set_bytes, 1, 64);
    STRETTO_ASSIGN_OR_RETURN(const Arena arena, Arena::Create(device_, c.name, sets * set_bytes));
    std::vector<Tensors> tensors(static_cast<size_t>(sets));
    std::byte* at = arena.data();
    for (Tensors& set : tensors) {
      for (const KernelOperand& operand : c.operands) {
        set.push_back(operand.At(at, device_));
        STRETTO_RETURN_IF_ERROR(Fill(operand, set.back()));
        at += operand.bytes();
      }
    }
    std::vector<OptimizerTable> tables(tensors.size());
    for (size_t i = 0; c.items != nullptr && i < tensors.size(); ++i) {
      STRETTO_ASSIGN_OR_RETURN(tables[i], OptimizerTable::Create(device_, c.items(tensors[i])));
    }
    const ops::Context context = {stream_.get(), kernels_};
    const auto run = [&](size_t i) {
      if (c.items != nullptr) return c.run_table(context, tensors[i], tables[i]);
      c.run(context, tensors[i]);
    };
    if (kernels_->set_measuring != nullptr) kernels_->set_measuring(true);
    run(0);
    if (kernels_->set_measuring != nullptr) kernels_->set_measuring(false);
    STRETTO_RETURN_IF_ERROR(stream_->Synchronize());
    // So many calls that starting and waiting for them is less than a hundredth.
    constexpr double kLong = 4e-3;
    size_t next = 0;
    const auto round = [&](int calls) -> absl::StatusOr<double> {
      const double begin = Now();
      for (int i = 0; i < calls; ++i) run(next++ % tensors.size());
      STRETTO_RETURN_IF_ERROR(stream_->Synchronize());
      return (Now() - begin) / calls;
    };
    STRETTO_RETURN_IF_ERROR(round(2).status());
    STRETTO_ASSIGN_OR_RETURN(const double first, round(2));
    const int calls = static_cast<int>(std::clamp(kLong / first, 1.0, 200.0));
    std::vector<double> seconds;
    for (int i = 0; i < repetitions_; ++i) {
      STRETTO_ASSIGN_OR_RETURN(seconds.emplace_back(), round(calls));
    }
    return Median(std::move(seconds));
  }

 private:
  // The first values come from the host; a large tensor repeats them.
  absl::Status Fill(const KernelOperand& operand, const Tensor& t) {
    constexpr int64_t kPattern = int64_t{1} << 16;
    const int64_t n = std::min(t.elements(), kPattern), size = SizeOf(t.dtype);
    std::vector<std::byte> host(static_cast<size_t>(n * size));
    const Tensor values = Tensor::Of(host.data(), t.dtype, {n});
    for (int64_t i = 0; i < n; ++i) {
      const double x = operand.value(i);
      if (t.dtype == DType::kF32) values.as<float>()[i] = static_cast<float>(x);
      if (t.dtype == DType::kF64) values.as<double>()[i] = x;
      if (t.dtype == DType::kBF16) values.as<BFloat16>()[i] = BFloat16(static_cast<float>(x));
      if (t.dtype == DType::kE4M3) values.as<E4M3>()[i] = E4M3(static_cast<float>(100 * x));
      if (t.dtype == DType::kE5M2) values.as<E5M2>()[i] = E5M2(static_cast<float>(100 * x));
      if (t.dtype == DType::kI32) values.as<int32_t>()[i] = static_cast<int32_t>(x);
    }
    CopyBytes(*stream_, t.data, host.data(), n * size);
    for (int64_t filled = n * size; filled < t.bytes(); filled *= 2) {
      CopyBytes(*stream_, t.data + filled, t.data, std::min(filled, t.bytes() - filled));
    }
    return stream_->Synchronize();
  }

  Device device_;
  int repetitions_;
  std::unique_ptr<Stream> stream_;
  const KernelTable* kernels_ = nullptr;
};

struct Options {
  std::string device = "auto", dtype, only, json;
  int64_t threads = 0, repetitions = 9;
  KernelShapes shapes;
};

absl::Status Check(const Options& o) {
  const KernelShapes& s = o.shapes;
  for (const int64_t n : {s.tokens, s.hidden, s.heads, s.kv_heads, s.ffn, s.vocabulary, s.length,
                          s.parameters, o.threads, o.repetitions}) {
    if (n < 1 || n > (int64_t{1} << 32)) {
      return absl::InvalidArgumentError(
          "stretto-bench kernels needs sizes of 1 or more; see --help");
    }
  }
  if (s.hidden % s.heads != 0 || s.heads % s.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--hidden ", s.hidden, " must be a multiple of --heads ", s.heads,
                     ", and those a multiple of --kv-heads ", s.kv_heads));
  }
  return absl::OkStatus();
}

absl::Status Run(const Options& o, Device device) {
  Bench bench(device, static_cast<int>(o.repetitions));
  STRETTO_RETURN_IF_ERROR(bench.Start(static_cast<int>(o.threads)));
  if (!bench.kernels().supports(o.shapes.dtype)) {
    return absl::UnimplementedError(absl::StrCat("the ", bench.kernels().name,
                                                 " backend has no kernels for ", o.dtype,
                                                 "; choose another --dtype or --device"));
  }
  Results results = {.command = "kernels", .device = DeviceName(device)};
  double copy_rate = 0, product_rate = 0;
  const auto measure = [&](const KernelCase& c) -> absl::Status {
    const auto seconds = bench.Time(c);
    if (absl::IsResourceExhausted(seconds.status())) {
      std::printf("%-44s skipped: %s\n", c.name.c_str(),
                  std::string(seconds.status().message()).c_str());
      return absl::OkStatus();
    }
    STRETTO_RETURN_IF_ERROR(seconds.status());
    const bool product = c.flops > 0;
    const double rate = (product ? c.flops : c.bytes) / *seconds;
    double& reference = product ? product_rate : copy_rate;
    if (reference == 0) reference = rate;  // the first of its kind
    std::printf("%-44s %10.4f %10.1f %s %8.3f\n", c.name.c_str(), 1e3 * *seconds, rate / 1e9,
                product ? "GFLOP/s" : "GB/s   ", rate / reference);
    std::fflush(stdout);
    Json json = {{"name", c.name}, {"seconds", *seconds}};
    json[product ? "flops_per_second" : "bytes_per_second"] = rate;
    json["share"] = rate / reference;
    results.results.push_back(std::move(json));
    return absl::OkStatus();
  };
  std::printf("%s, %s, %lld tokens\n%-44s %10s %18s %8s\n", results.device.c_str(),
              Name(o.shapes.dtype), static_cast<long long>(o.shapes.tokens), "kernel", "ms", "rate",
              "share");
  STRETTO_RETURN_IF_ERROR(measure(CopyCase(device)));
  STRETTO_RETURN_IF_ERROR(measure(ProductCase(device, o.shapes.dtype)));
  size_t chosen = 0;
  for (const KernelCase& c : KernelCases(o.shapes, bench.kernels())) {
    if (c.name.find(o.only) == std::string::npos) continue;
    ++chosen;
    STRETTO_RETURN_IF_ERROR(measure(c));
  }
  if (chosen == 0) {
    return absl::NotFoundError(
        absl::StrCat("no kernel has '", o.only, "' in its name; leave --only out to see them all"));
  }
  std::printf("share: of the rate of copy or product above\n");
  return results.Write(o.json);
}

}  // namespace

int Kernels(int argc, const char* const* argv) {
  Options o;
  KernelShapes& s = o.shapes;
  Arguments arguments("stretto-bench kernels",
                      "Times each kernel on the shapes of a model, GPT-2 124M by default. 0: what "
                      "fits the device.",
                      "");
  arguments.AddChoice("device", {"auto", "cuda", "cpu"}, "where", &o.device);
  arguments.AddChoice("dtype", {"f32", "bf16", "f64"}, "bf16 on a GPU, else f32, when left out",
                      &o.dtype);
  arguments.Add("tokens", "N", "of a micro-batch; 65536 on a GPU, 256 on a CPU", &s.tokens);
  arguments.Add("length", "N", "of a sequence; at most 1024", &s.length);
  arguments.Add("hidden", "N", "width", &s.hidden);
  arguments.Add("heads", "N", "of queries", &s.heads);
  arguments.Add("kv-heads", "N", "of keys; as many as of queries", &s.kv_heads);
  arguments.Add("ffn", "N", "width between up and down; four times hidden", &s.ffn);
  arguments.Add("vocabulary", "N", "columns of the logits", &s.vocabulary);
  arguments.Add("parameters", "N", "of the optimizer's tensors", &s.parameters);
  arguments.Add("threads", "N", "on a CPU; all processors", &o.threads);
  arguments.Add("repetitions", "N", "the median counts", &o.repetitions);
  arguments.Add("only", "TEXT", "kernels with this in their name", &o.only);
  arguments.Add("json", "FILE", "also write the results there", &o.json);
  if (const absl::Status parsed = arguments.Parse(argc, argv); !parsed.ok()) {
    return Fail(parsed, kUsage);
  }
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  const auto device = ChooseDevice(o.device, 0);
  if (!device.ok()) return Fail(device.status(), kFailed);
  const bool cpu = device->kind == DeviceKind::kCpu;
  if (o.dtype.empty()) o.dtype = cpu ? "f32" : "bf16";
  s.dtype = *ParseDType(o.dtype);
  if (s.tokens == 0) s.tokens = cpu ? 256 : 65536;
  if (s.length == 0) s.length = std::min<int64_t>(s.tokens, 1024);
  if (s.kv_heads == 0) s.kv_heads = s.heads;
  if (s.ffn == 0) s.ffn = 4 * s.hidden;
  if (o.threads == 0) o.threads = std::max(1u, std::thread::hardware_concurrency());
  if (const absl::Status checked = Check(o); !checked.ok()) return Fail(checked, kUsage);
  const absl::Status status = Run(o, *device);
  return status.ok() ? EndProgram(status) : Fail(status, kFailed);
}

}  // namespace stretto::bench
