// Trainer::Create: token files, and who reads what of them.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

// Refuses ranks that find something else in data.train than rank 0.
absl::Status SameEverywhere(World& world, const std::string& what, const std::string& mine) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all, world.AllGather(what, mine));
  for (int r = 1; r < world.size(); ++r) {
    if (all[static_cast<size_t>(r)] == all[0]) continue;
    return absl::FailedPreconditionError(absl::StrCat("rank ", r, " finds ", what,
                                                      " than rank 0 in data.train; "
                                                      "give all machines the same token files"));
  }
  return absl::OkStatus();
}

std::string HexOf(uint64_t hash) { return absl::StrCat(absl::Hex(hash, absl::kZeroPad16)); }

}  // namespace

absl::Status Trainer::Impl::SetUpData() {
  STRETTO_RETURN_IF_ERROR(config.RequireData());
  STRETTO_ASSIGN_OR_RETURN(tokenizer, OpenTokenizer(config.data.tokenizer));
  if (tokenizer->vocabulary() > config.model.vocabulary) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model.vocabulary is ", config.model.vocabulary, " but tokenizer '", config.data.tokenizer,
        "' has ", tokenizer->vocabulary(), " tokens; raise model.vocabulary to at least that"));
  }
  DatasetOptions options = {.sequence_length = config.data.sequence_length,
                            .vocabulary = config.model.vocabulary,
                            .end_of_text = tokenizer->end_of_text(),
                            .mask_across_documents = config.data.document_attention};
  if (config.data.documents) {
    STRETTO_ASSIGN_OR_RETURN(documents, DocumentDataset::Open(config.data.train, options));
    // Evaluation goes over samples, each on a rank of its own.
    options.sequence_length = std::min(config.data.sequence_length, config.batch.capacity);
  } else {
    STRETTO_ASSIGN_OR_RETURN(train_data, TokenDataset::Open(config.data.train, options));
  }
  if (!config.data.validation.empty()) {
    STRETTO_ASSIGN_OR_RETURN(validation_data, TokenDataset::Open(config.data.validation, options));
  }
  STRETTO_ASSIGN_OR_RETURN(const uint64_t tokens, documents != nullptr
                                                      ? documents->TokenFingerprint()
                                                      : train_data->TokenFingerprint());
  state.tokens = HexOf(tokens);
  if (config.data.documents) {
    state.documents = HexOf(documents->Fingerprint());
    if (documents->unseparated() && world.rank() == 0) {
      LogWarning(absl::StrCat(
          "no end of text (token ", options.end_of_text, " of tokenizer '", config.data.tokenizer,
          "') is in '", config.data.train, "': its ", documents->tokens(),
          " tokens count as one document, in pieces of ", config.data.sequence_length,
          "; make the files with separators between documents (stretto-tokenize), or name the "
          "tokenizer that made them"));
    }
    return absl::OkStatus();
  }
  STRETTO_ASSIGN_OR_RETURN(loader,
                           Loader::Create(*train_data, {.seed = static_cast<uint64_t>(config.seed),
                                                        .shuffle = config.data.shuffle,
                                                        .global_batch = config.batch.global,
                                                        .micro_batch = config.batch.micro,
                                                        .rank = dp_group.index,
                                                        .ranks = dp_group.size(),
                                                        .prefetch = config.data.prefetch}));
  return absl::OkStatus();
}

absl::Status Trainer::Impl::CompareData() {
  if (documents != nullptr) {  // else each would plan differently
    STRETTO_RETURN_IF_ERROR(SameEverywhere(world, "documents of other lengths", state.documents));
  }
  return SameEverywhere(world, "other tokens", state.tokens);
}

absl::Status Trainer::Impl::SameRunAs(const TrainerState& saved, const std::string& source) const {
  STRETTO_RETURN_IF_ERROR(SameRun(saved.config, state.config, source));
  const auto differ = [](const std::string& before, const std::string& now) {
    return !before.empty() && !now.empty() && before != now;
  };
  const bool lengths = differ(saved.documents, state.documents);
  if (lengths || (config.data.documents && differ(saved.tokens, state.tokens))) {
    return absl::FailedPreconditionError(absl::StrCat(
        source, " was written in a run on documents of other ", lengths ? "lengths" : "tokens",
        " than those of data.train, '", config.data.train,
        "', so that its steps would not go on with what they had not seen; name "
        "the same token files, or choose another output for a new run"));
  }
  if (differ(saved.tokens, state.tokens) && world.rank() == 0) {
    LogWarning(absl::StrCat(source,
                            " was written in a run on other tokens than those of "
                            "data.train, '",
                            config.data.train, "': step ", saved.step + 1,
                            " takes the samples that it would take in a run on these"));
  }
  return absl::OkStatus();
}

}  // namespace stretto
