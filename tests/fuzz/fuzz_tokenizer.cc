// Any bytes as a tokenizer's files and as text: what is encoded decodes to itself.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/data/bpe.h"

namespace {

using stretto::Tokenizer;

void RoundTrip(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int32_t> ids;
  if (!tokenizer.Encode(text, &ids).ok()) std::abort();
  auto back = tokenizer.Decode(ids);
  if (!back.ok() || *back != text) std::abort();
}

std::string Base64(const std::string& bytes) {
  const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t word = 0;
    for (size_t j = i; j < i + 3; ++j) {
      word = word << 8 | (j < bytes.size() ? static_cast<uint8_t>(bytes[j]) : 0);
    }
    for (size_t k = 0; k < 4; ++k) {
      text += i + k > bytes.size() ? '=' : digits[word >> (18 - 6 * k) & 63];
    }
  }
  return text;
}

// The single bytes, and whatever the fuzzer adds.
const std::string& Bytes() {
  static const std::string kText = [] {
    std::string text;
    for (int b = 0; b < 256; ++b) {
      text += Base64(std::string(1, static_cast<char>(b))) + " " + std::to_string(b) + "\n";
    }
    return text;
  }();
  return kText;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 4) {
    case 0: {  // a whole .tiktoken file
      auto tokenizer = stretto::ParseTiktoken(text, "fuzz");
      if (tokenizer.ok()) RoundTrip(**tokenizer, text);
      break;
    }
    case 1: {  // the end of a .tiktoken file, and as text
      auto tokenizer = stretto::ParseTiktoken(Bytes() + text, "fuzz");
      if (tokenizer.ok()) RoundTrip(**tokenizer, text);
      break;
    }
    case 2: {  // vocab.json and merges.txt, with a zero byte between
      const size_t cut = text.find('\0');
      auto tokenizer = stretto::ParseGpt2Bpe(
          text.substr(0, cut),
          cut == std::string::npos ? "" : std::string_view(text).substr(cut + 1), "vocab",
          "merges");
      if (tokenizer.ok()) RoundTrip(**tokenizer, text);
      break;
    }
    default: {  // text, over tokens made of its own pieces
      std::string file = Bytes();
      int rank = 256;
      for (size_t n = 2; n <= 6 && n <= text.size(); ++n) {
        const std::string token = text.substr(text.size() - n);
        file += Base64(token) + " " + std::to_string(rank++) + "\n";
      }
      auto tokenizer = stretto::ParseTiktoken(file, "fuzz");
      if (!tokenizer.ok()) std::abort();
      RoundTrip(**tokenizer, text);
    }
  }
  return 0;
}
