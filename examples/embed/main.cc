// A layer, a model, a training loop and a metrics sink of one's own: mpirun -np 2 embed ASCIIFILE
#include <fstream>

#include "stretto/core/exit_code.h"
#include "stretto/observe/metrics.h"
#include "stretto/optim/optimizer.h"
using namespace stretto;

struct ResidualGelu : Layer {  // y = x + gelu(x), which the library does not have
  ResidualGelu(SlotId input, SlotId* output) : x(input), out(output) {}
  const char* kind() const override { return "residual_gelu"; }
  absl::Status Declare(Builder& b) override {
    b.Reads(x, kInForward | kInBackwardInput);
    *out = y = b.Output("y", b.Width(x), {.grad_uses = kInBackwardInput, .cheap = true});
    return absl::OkStatus();
  }
  void Forward(Run& run, Frame& f) const override {
    ops::Gelu(run.ops(), f.Value(y), f.Value(x));
    ops::Add(run.ops(), f.Value(y), f.Value(x));
  }
  void BackwardInput(Run& run, Frame& f) const override {
    ops::GeluBackward(run.ops(), f.Grad(x), f.Grad(y), f.Value(x), f.AccumulateGrad(x));
    ops::Add(run.ops(), f.Grad(x), f.Grad(y));
  }
  void BackwardWeight(Run&, Frame&) const override {}  // it has no parameters
  SlotId x, y, *out;
};

struct Printer : MetricsSink {
  absl::Status Finish() override { return absl::OkStatus(); }
  absl::Status Write(const StepStats& s) override {
    std::printf("step %3d  loss %.4f\n", static_cast<int>(s.step), s.loss);
    return absl::OkStatus();
  }
};

absl::Status Train(std::vector<int32_t> text, int64_t tokens, MetricsSink&& sink) {
  if (text.size() < 9999) return absl::InvalidArgumentError("name a text of at least 10 kB");
  STRETTO_ASSIGN_OR_RETURN(const auto world, World::Create());
  Communicator comm(*world);
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(Device::Cpu()));
  STRETTO_ASSIGN_OR_RETURN(const auto kernels, KernelsFor(Device::Cpu()));
  Builder b(DType::kF32);
  SlotId y, x = b.Linear("up", Role::kColumn, b.Embedding("embed", 256, 64, 0, 0.1), 64, 256);
  STRETTO_RETURN_IF_ERROR(b.Add("act", std::make_unique<ResidualGelu>(x, &y)));
  b.LossHead("head", b.Norm("norm", y), 256, 0, ParamId(), 0.02);
  STRETTO_ASSIGN_OR_RETURN(const Graph graph, b.Finish());
  const ActionList actions = TrainingActions(graph, Recompute::kNone);
  STRETTO_ASSIGN_OR_RETURN(const FrameLayout layout, PlanFrame(graph, actions, tokens));
  STRETTO_ASSIGN_OR_RETURN(const Arena arena, Arena::Create(Device::Cpu(), "a", layout.bytes()));
  Frame frame(&graph, &actions, &layout, arena.data());
  Run run({stream.get(), kernels});
  Budget budget(-1, -1, -1);  // no limits
  STRETTO_ASSIGN_OR_RETURN(
      auto dp, DataParallel::Create(comm, comm.all(), graph, *stream, *kernels, 1, budget, {}));
  STRETTO_ASSIGN_OR_RETURN(const auto adam, AdamW::Create(graph, *dp, run.ops(), budget, {}));
  double sums[StepScalars::kCount];
  const Tensor scalars = Tensor::Of(sums, DType::kF64, {StepScalars::kCount});
  dp->Attach(&run, scalars.Rows(0, 2));
  for (int64_t step = 1; step <= 100; ++step) {
    int32_t* at = &text[(step * world->size() + world->rank()) * tokens % (text.size() - tokens)];
    frame.tokens = {tokens, Tensor::Of(at, DType::kI32, {tokens}),
                    Tensor::Of(at + 1, DType::kI32, {tokens})};
    ops::Zero(run.ops(), scalars);
    dp->BeginStep(run);
    Execute(graph, actions, run, frame, &dp->hooks(true));  // this rank's only micro-batch
    STRETTO_RETURN_IF_ERROR(dp->FinishGradients(run));
    adam->AddSumSquares(scalars);
    const Ticket all = comm.AllReduce(comm.all(), scalars.Rows(0, StepScalars::kReduced),
                                      ReduceOp::kSum, "scalars", stream->Record());
    STRETTO_RETURN_IF_ERROR(comm.Wait(*stream, all));
    ops::PrepareStep(run.ops(), scalars, 1.0, 0);  // divide by all tokens, clip at norm 1
    adam->Step(scalars, 1e-2, step);
    STRETTO_RETURN_IF_ERROR(dp->GatherParameters());
    const double loss = sums[StepScalars::kLossSum] / sums[StepScalars::kTokens];
    if (world->rank() == 0) STRETTO_RETURN_IF_ERROR(sink.Write({.step = step, .loss = loss}));
  }
  return dp->WaitParameters();
}

int main(int argc, char** argv) {
  std::ifstream file(argc > 1 ? argv[1] : "");
  return EndProgram(Train({std::istreambuf_iterator<char>(file), {}}, 256, Printer()));
}
