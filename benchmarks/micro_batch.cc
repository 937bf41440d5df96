#include "benchmarks/micro_batch.h"

#include "stretto/core/rng.h"
#include "stretto/ops/ops.h"

namespace stretto::bench {

absl::StatusOr<std::unique_ptr<MicroBatch>> MicroBatch::Create(const TrainConfig& config,
                                                               Communicator& comm,
                                                               const Group& alone, Stream& stream) {
  auto b = std::unique_ptr<MicroBatch>(new MicroBatch(config, stream));
  const Device device = stream.device();
  STRETTO_ASSIGN_OR_RETURN(b->plan_, PlanRun(config, 1, 0));
  STRETTO_ASSIGN_OR_RETURN(b->kernels_, KernelsFor(device));
  STRETTO_ASSIGN_OR_RETURN(b->dp_, DataParallel::Create(comm, alone, b->graph(), stream,
                                                        *b->kernels_, 1, b->budget_, {}));
  b->run_.emplace(ops::Context{&stream, b->kernels_});
  STRETTO_ASSIGN_OR_RETURN(b->float8_, Float8State::Create(b->graph(), device, b->budget_));
  b->run_->SetFloat8(b->float8_.get());
  STRETTO_ASSIGN_OR_RETURN(b->adam_, AdamW::Create(b->graph(), *b->dp_, b->run_->ops(), b->budget_,
                                                   OptimizerOptions(config)));
  const FrameLayout& layout = b->plan_.stages.front().train_frame;
  STRETTO_ASSIGN_OR_RETURN(b->memory_, Arena::Create(device, "frame", layout.bytes()));
  STRETTO_ASSIGN_OR_RETURN(b->scalar_memory_, Arena::Create(device, "scalars", 1024));
  b->scalars_ = Tensor::Of(b->scalar_memory_.data(), DType::kF64, {StepScalars::kCount}, device);
  STRETTO_ASSIGN_OR_RETURN(b->feeder_,
                           TokenFeeder::Create(stream, b->plan_.micro_batch_tokens, b->budget_));
  b->dp_->Attach(&*b->run_, b->scalars_.Rows(0, 2));
  b->frame_.emplace(&b->graph(), &b->actions(), &layout, b->memory_.data(), device);
  STRETTO_RETURN_IF_ERROR(b->Fill(config.batch.micro, config.data.sequence_length));
  b->run_->BeginStep();
  return b;
}

absl::Status MicroBatch::Fill(int64_t documents, int64_t length) {
  const Rng rng(1, "profile/tokens");
  const auto below = static_cast<uint64_t>(config_.model.vocabulary);
  batch_.Clear();
  for (int64_t t = 0; t < documents * length; ++t) {
    const auto draw = [&](int64_t i) {
      return static_cast<int32_t>(rng.Below(static_cast<uint64_t>(i), below));
    };
    batch_.ids.push_back(draw(2 * t));
    batch_.targets.push_back(draw(2 * t + 1));
    batch_.weights.push_back(1);
    batch_.positions.push_back(static_cast<int32_t>(t % length));
    if ((t + 1) % length == 0) batch_.cu_seqlens.push_back(static_cast<int32_t>(t + 1));
  }
  batch_.max_length = length;
  STRETTO_ASSIGN_OR_RETURN(frame_->tokens, feeder_->Feed(batch_));
  return absl::OkStatus();
}

absl::Status MicroBatch::WarmUp() {
  if (kernels_->set_measuring != nullptr) kernels_->set_measuring(true);
  for (int i = 0; i < 2; ++i) Step();  // gradients are written first and added to afterwards
  if (kernels_->set_measuring != nullptr) kernels_->set_measuring(false);
  float8_->EndStep(run_->ops());
  float8_->SetJustInTime(false);
  return stream_.Synchronize();
}

void MicroBatch::Update() {
  adam_->AddSumSquares(scalars_);
  ops::PrepareStep(run_->ops(), scalars_, 1.0, 0);
  adam_->Step(scalars_, 0.0, 1);
}

}  // namespace stretto::bench
