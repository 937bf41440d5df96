// GPT-2, Llama 3, Qwen2 and Qwen3 dense, built from one set of layers.
#ifndef STRETTO_MODEL_MODEL_H_
#define STRETTO_MODEL_MODEL_H_

#include <cstdint>
#include <string>

#include "stretto/core/rng.h"
#include "stretto/core/status.h"
#include "stretto/core/tensor.h"
#include "stretto/model/config.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"

namespace stretto {

// A part of a model: transformer blocks [first_block, end_block), with the embedding when it begins
// at block 0 and with the last norm and the head when it ends with the last block.
struct ModelPart {
  int64_t first_block = 0;
  int64_t end_block = -1;  // -1: to the end
};

struct ModelOptions {
  DType dtype = DType::kF32;
  int64_t loss_chunk = 0;  // vocabulary columns of logits that exist at once; 0: all
  Strategies strategies = LocalStrategies();
  const KernelTable* kernels = nullptr;  // of the backend that will run it; see Builder
  ModelPart part;                        // the whole model, unless told otherwise
};

struct Model {
  ModelConfig config;
  Graph graph;
  SlotId final_hidden;  // [tokens, hidden], normalised; what the head reads. In the last part
  ParamId head;         // [vocabulary, hidden]; in the last part
  // The table that embedding and head share, in each part that has one of them. The first part's is
  // the one that counts, that of another last part is a copy of the same name.
  ParamId tied;
};

// `config` must be resolved (ModelConfig::Resolve). INVALID_ARGUMENT for a part without blocks, or
// outside of the model.
absl::StatusOr<Model> BuildModel(const ModelConfig& config, const ModelOptions& options = {});

// Writes rows [first_row, first_row + rows.rows()) of this rank's part of a parameter's initial
// value to `rows` (contiguous, on the host). Values depend on (seed, name, element of the whole)
// only, never on the layout.
void InitialValues(const ParameterSpec& spec, uint64_t seed, int64_t first_row, Tensor rows);

}  // namespace stretto

#endif  // STRETTO_MODEL_MODEL_H_
