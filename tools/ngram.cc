// Prints the held-out loss of an n-gram model: what a trained network has to beat.
#include "stretto/data/ngram.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/core/exit_code.h"
#include "stretto/data/token_file.h"
#include "tools/arguments.h"

namespace stretto {
namespace {

constexpr int64_t kByteVocabulary = 257;  // of the tokenizer "bytes"

absl::Status ReadTokens(const std::string& pattern, int64_t vocabulary, std::vector<int32_t>* ids) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> paths, ExpandFiles(pattern));
  for (const std::string& path : paths) {
    STRETTO_ASSIGN_OR_RETURN(const TokenFile file, TokenFile::Open(path));
    const size_t base = ids->size();
    ids->resize(base + static_cast<size_t>(file.tokens()));
    STRETTO_RETURN_IF_ERROR(file.Read(0, file.tokens(), vocabulary, ids->data() + base));
  }
  return absl::OkStatus();
}

absl::Status Main(int argc, char** argv) {
  std::string train, validation;
  int64_t order = 3, vocabulary = kByteVocabulary;
  Arguments arguments("stretto-ngram",
                      "Counts n-grams (interpolated Witten-Bell) on one token file and prints the "
                      "loss on another.",
                      "");
  arguments.Add("train", "PATTERN", "token files to count", &train);
  arguments.Add("validation", "PATTERN", "token files to predict", &validation);
  arguments.Add("order", "N", "tokens of an n-gram, 1 to 3", &order);
  arguments.Add("vocabulary", "V", "of the tokenizer", &vocabulary);
  STRETTO_RETURN_IF_ERROR(arguments.Parse(argc, argv));
  if (arguments.help()) return PrintText(arguments.Help());
  if (train.empty() || validation.empty()) {
    return absl::InvalidArgumentError(
        "stretto-ngram needs --train and --validation token files; see --help");
  }
  if (order < 1 || order > 3) {
    return absl::InvalidArgumentError(absl::StrCat("--order must be 1, 2 or 3, not ", order));
  }
  std::vector<int32_t> ids;
  STRETTO_RETURN_IF_ERROR(ReadTokens(train, vocabulary, &ids));
  STRETTO_ASSIGN_OR_RETURN(const auto model,
                           NgramModel::Train(ids, vocabulary, static_cast<int>(order)));
  ids.clear();
  STRETTO_RETURN_IF_ERROR(ReadTokens(validation, vocabulary, &ids));
  STRETTO_ASSIGN_OR_RETURN(const double loss, model->Loss(ids));
  std::printf("ngram-%d held-out loss: %.4f nats/%s\n", static_cast<int>(order), loss,
              vocabulary <= kByteVocabulary ? "byte" : "token");
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) { return stretto::EndProgram(stretto::Main(argc, argv)); }
