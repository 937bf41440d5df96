#include "stretto/data/ngram.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <unordered_map>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr int kMaxOrder = 3;
constexpr int kIdBits = 21;  // three ids fill one key

struct Context {
  int64_t count = 0;       // c(h)
  int64_t successors = 0;  // u(h)
};

struct Hash {
  size_t operator()(uint64_t key) const {
    key ^= key >> 31;
    key *= 0x9e3779b97f4a7c15u;
    return key ^ (key >> 29);
  }
};

// The `n` ids that end before `end`, oldest first.
uint64_t Key(const int32_t* end, int n) {
  uint64_t key = 0;
  for (int i = n; i > 0; --i) key = key << kIdBits | static_cast<uint32_t>(end[-i]);
  return key;
}

}  // namespace

struct NgramModel::Impl {
  int order = 0;
  int64_t vocabulary = 0;
  // Index n: contexts of n tokens, and the n-grams of n + 1 tokens that start with them.
  std::array<std::unordered_map<uint64_t, Context, Hash>, kMaxOrder> contexts;
  std::array<std::unordered_map<uint64_t, int64_t, Hash>, kMaxOrder> grams;

  // P(*token | the `available` ids before it).
  double Probability(const int32_t* token, int64_t available) const {
    double p = 1.0 / static_cast<double>(vocabulary);
    const int longest = static_cast<int>(std::min<int64_t>(order - 1, available));
    for (int n = 0; n <= longest; ++n) {
      const auto context = contexts[n].find(Key(token, n));
      if (context == contexts[n].end()) break;  // a longer one was not seen either
      const auto gram = grams[n].find(Key(token + 1, n + 1));
      const double count = gram == grams[n].end() ? 0.0 : static_cast<double>(gram->second);
      const double successors = static_cast<double>(context->second.successors);
      p = (count + successors * p) / (static_cast<double>(context->second.count) + successors);
    }
    return p;
  }

  absl::Status Check(const std::vector<int32_t>& ids) const {
    if (ids.empty()) return absl::InvalidArgumentError("an n-gram model was given no tokens");
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= vocabulary) {
        return absl::InvalidArgumentError(absl::StrCat("id ", ids[i], " at position ", i,
                                                       " is outside the n-gram vocabulary of ",
                                                       vocabulary, "; give the tokenizer's own"));
      }
    }
    return absl::OkStatus();
  }
};

NgramModel::NgramModel() : impl_(std::make_unique<Impl>()) {}
NgramModel::~NgramModel() = default;
int NgramModel::order() const { return impl_->order; }

absl::StatusOr<std::unique_ptr<NgramModel>> NgramModel::Train(const std::vector<int32_t>& ids,
                                                              int64_t vocabulary, int order) {
  if (order < 1 || order > kMaxOrder) {
    return absl::InvalidArgumentError(
        absl::StrCat("an n-gram model of order ", order, " was asked for; it must be 1, 2 or 3"));
  }
  if (vocabulary < 1 || vocabulary > (int64_t{1} << kIdBits)) {
    return absl::InvalidArgumentError(absl::StrCat("an n-gram model cannot have a vocabulary of ",
                                                   vocabulary, "; it must be in [1, 2^21]"));
  }
  std::unique_ptr<NgramModel> model(new NgramModel);
  Impl& impl = *model->impl_;
  impl.order = order;
  impl.vocabulary = vocabulary;
  STRETTO_RETURN_IF_ERROR(impl.Check(ids));
  for (int64_t i = 0; i < static_cast<int64_t>(ids.size()); ++i) {
    const int32_t* token = ids.data() + i;
    for (int n = 0; n < order && n <= i; ++n) {
      Context& context = impl.contexts[n][Key(token, n)];
      if (impl.grams[n][Key(token + 1, n + 1)]++ == 0) ++context.successors;
      ++context.count;
    }
  }
  return model;
}

double NgramModel::Probability(const std::vector<int32_t>& context, int32_t token) const {
  const int64_t n = std::min<int64_t>(impl_->order - 1, static_cast<int64_t>(context.size()));
  int32_t window[kMaxOrder];
  std::copy(context.end() - n, context.end(), window);
  window[n] = token;
  return impl_->Probability(window + n, n);
}

absl::StatusOr<double> NgramModel::Loss(const std::vector<int32_t>& ids) const {
  STRETTO_RETURN_IF_ERROR(impl_->Check(ids));
  double sum = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(ids.size()); ++i) {
    sum -= std::log(impl_->Probability(ids.data() + i, i));
  }
  return sum / static_cast<double>(ids.size());
}

}  // namespace stretto
