#include "stretto/data/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/data/bpe.h"
#include "src/data/split.h"
#include "stretto/core/read_file.h"

namespace stretto {
namespace {

constexpr char kFile[] = "the tokenizer file";
constexpr int64_t kMaxTextBytes = std::numeric_limits<int32_t>::max();
constexpr char kEndOfText[] = "<|endoftext|>";

absl::Status OutsideVocabulary(int32_t id, size_t place, int64_t vocabulary) {
  return absl::InvalidArgumentError(
      absl::StrCat("id ", id, " at position ", place, " is outside the tokenizer's vocabulary of ",
                   vocabulary, "; decode with the tokenizer that encoded"));
}

class ByteTokenizer final : public Tokenizer {
 public:
  const char* name() const override { return "bytes"; }
  int64_t vocabulary() const override { return 257; }
  int64_t end_of_text() const override { return 256; }
  absl::Status Encode(const std::string& text, std::vector<int32_t>* ids) const override {
    ids->reserve(ids->size() + text.size());
    for (const char c : text) ids->push_back(static_cast<unsigned char>(c));
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Decode(const std::vector<int32_t>& ids) const override {
    std::string text;
    text.reserve(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] > 256) return OutsideVocabulary(ids[i], i, vocabulary());
      if (ids[i] < 256) text.push_back(static_cast<char>(ids[i]));
    }
    return text;
  }
};

class Gpt2Tokenizer final : public Tokenizer {
 public:
  Gpt2Tokenizer(BpeTable table, std::unique_ptr<Gpt2Splitter> splitter, int32_t end_of_text)
      : table_(std::move(table)), splitter_(std::move(splitter)), end_of_text_(end_of_text) {}

  const char* name() const override { return "gpt2"; }
  int64_t vocabulary() const override {
    return std::max<int64_t>(table_.size(), int64_t{end_of_text_} + 1);
  }
  int64_t end_of_text() const override { return end_of_text_; }

  absl::Status Encode(const std::string& text, std::vector<int32_t>* ids) const override {
    if (static_cast<int64_t>(text.size()) > kMaxTextBytes) {
      return absl::InvalidArgumentError(absl::StrCat("a text of ", text.size(),
                                                     " bytes is too long to encode at once; cut it "
                                                     "into documents below 2 GiB"));
    }
    BpeTable::Scratch scratch;
    Gpt2Splitter::Pieces pieces(*splitter_, text);
    for (std::string_view piece; pieces.Next(&piece);) table_.Encode(piece, &scratch, ids);
    return pieces.status();
  }

  absl::StatusOr<std::string> Decode(const std::vector<int32_t>& ids) const override {
    std::string text;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= vocabulary()) return OutsideVocabulary(ids[i], i, vocabulary());
      if (ids[i] != end_of_text_) text += table_.token(ids[i]);
    }
    return text;
  }

 private:
  BpeTable table_;
  std::unique_ptr<Gpt2Splitter> splitter_;
  int32_t end_of_text_;
};

// Takes the next line off `text`, without its end (LF or CR LF).
std::string_view TakeLine(std::string_view* text) {
  const size_t end = text->find('\n');
  std::string_view line = text->substr(0, end);
  text->remove_prefix(end == std::string_view::npos ? text->size() : end + 1);
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

// RFC 4648 section 4, padding required.
bool DecodeBase64(std::string_view text, std::string* bytes) {
  static const std::array<int8_t, 256> kValues = [] {
    std::array<int8_t, 256> values;
    values.fill(-1);
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 64; ++i) values[static_cast<unsigned char>(digits[i])] = i;
    return values;
  }();
  bytes->clear();
  if (text.empty() || text.size() % 4 != 0) return false;
  size_t padding = 0;
  while (padding < 2 && text[text.size() - 1 - padding] == '=') ++padding;
  for (size_t i = 0; i < text.size(); i += 4) {
    uint32_t word = 0;
    for (size_t j = i; j < i + 4; ++j) {
      const bool pad = j >= text.size() - padding;
      const int value = pad ? 0 : kValues[static_cast<unsigned char>(text[j])];
      if (value < 0) return false;
      word = word << 6 | static_cast<uint32_t>(value);
    }
    for (int shift = 16; shift >= 0; shift -= 8) bytes->push_back(static_cast<char>(word >> shift));
  }
  bytes->resize(bytes->size() - padding);
  return true;
}

absl::Status BadLine(const std::string& source, int64_t line, const std::string& what) {
  return absl::InvalidArgumentError(
      absl::StrCat("line ", line, " of '", source, "' ", what, "; get the file again"));
}

// GPT-2 writes each byte as one printable character: the printable ones of Latin-1 as themselves,
// the others as U+0100 and up in order. Gives the byte of each such code point, -1 of others.
const std::array<int16_t, 0x144>& BytesOfCharacters() {
  static const std::array<int16_t, 0x144> kBytes = [] {
    std::array<int16_t, 0x144> bytes;
    bytes.fill(-1);
    int next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      bytes[printable ? b : next++] = static_cast<int16_t>(b);
    }
    return bytes;
  }();
  return kBytes;
}

bool DecodeCharacters(std::string_view text, std::string* bytes) {
  bytes->clear();
  for (size_t i = 0; i < text.size();) {
    // All characters of the table take one or two bytes of UTF-8.
    uint32_t point = static_cast<unsigned char>(text[i++]);
    if (point >= 0x80) {
      if (point < 0xc2 || point > 0xdf || i == text.size()) return false;
      const uint32_t next = static_cast<unsigned char>(text[i++]);
      if ((next & 0xc0) != 0x80) return false;
      point = (point & 0x1f) << 6 | (next & 0x3f);
    }
    if (point >= BytesOfCharacters().size() || BytesOfCharacters()[point] < 0) return false;
    bytes->push_back(static_cast<char>(BytesOfCharacters()[point]));
  }
  return true;
}

}  // namespace

std::unique_ptr<Tokenizer> MakeByteTokenizer() { return std::make_unique<ByteTokenizer>(); }

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTiktoken(std::string_view text,
                                                         const std::string& source) {
  constexpr size_t kMaxLine = BpeTable::kMaxTokenBytes * 4 / 3 + 32;
  std::vector<std::pair<int64_t, std::string>> entries;
  std::string bytes;
  int64_t number = 0;
  while (!text.empty()) {
    const std::string_view line = TakeLine(&text);
    ++number;
    if (line.empty()) continue;
    if (line.size() > kMaxLine) {
      return BadLine(
          source, number,
          absl::StrCat("is ", line.size(), " bytes long, too long for a token of at most ",
                       BpeTable::kMaxTokenBytes, " bytes and its rank"));
    }
    const size_t space = line.find(' ');
    if (space == std::string_view::npos || !DecodeBase64(line.substr(0, space), &bytes)) {
      return BadLine(source, number, "is not a base64 token, a space and a rank");
    }
    const std::string_view digits = line.substr(space + 1);
    int64_t rank = -1;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (error != std::errc() || end != digits.data() + digits.size() || rank < 0) {
      return BadLine(source, number, "has no rank, a whole number from 0, after its token");
    }
    entries.emplace_back(rank, std::move(bytes));
  }
  if (entries.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", source, "' holds no tokens; get the file again"));
  }
  const int64_t count = static_cast<int64_t>(entries.size());
  std::vector<std::string> tokens(entries.size());
  for (auto& [rank, token] : entries) {
    if (rank >= count) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", source, "' holds ", count, " tokens but gives the rank ", rank,
                       ", so ranks below are missing; get the file again"));
    }
    if (!tokens[rank].empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", source, "' gives the rank ", rank, " twice; get the file again"));
    }
    tokens[rank] = std::move(token);
  }
  STRETTO_ASSIGN_OR_RETURN(BpeTable table, BpeTable::FromRanks(std::move(tokens), source));
  STRETTO_ASSIGN_OR_RETURN(auto splitter, Gpt2Splitter::Create());
  const int32_t end_of_text = table.size();
  return std::make_unique<Gpt2Tokenizer>(std::move(table), std::move(splitter), end_of_text);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseGpt2Bpe(const std::string& vocab_json,
                                                        std::string_view merges_txt,
                                                        const std::string& vocab_source,
                                                        const std::string& merges_source) {
  const nlohmann::json vocab =
      nlohmann::json::parse(vocab_json, nullptr, /*allow_exceptions=*/false);
  if (!vocab.is_object() || vocab.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", vocab_source, "' is not a JSON object from tokens to ids; get the file again"));
  }
  const int64_t count = static_cast<int64_t>(vocab.size());
  std::vector<std::string> tokens(vocab.size());
  int32_t end_of_text = static_cast<int32_t>(count);
  for (const auto& [key, value] : vocab.items()) {
    if (!value.is_number_integer() || value < 0 || value >= count) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", vocab_source, "' gives the token '", key, "' the id ", value.dump(),
                       "; ids must be the whole numbers from 0 to ", count - 1));
    }
    const int32_t id = value.get<int32_t>();
    if (!tokens[id].empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", vocab_source, "' gives the id ", id, " twice; get the file again"));
    }
    if (key.empty() || !DecodeCharacters(key, &tokens[id])) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", vocab_source, "' names the token '", key, "' (id ", id,
                       "), which is not in GPT-2's alphabet of bytes; only byte-level tokenizers "
                       "can be read"));
    }
    if (key == kEndOfText) end_of_text = id;
  }

  // Ids by bytes: FromMerges makes its own index, but the merges are wanted before.
  std::map<std::string_view, int32_t> ids;
  for (int64_t id = 0; id < count; ++id) ids.emplace(tokens[id], static_cast<int32_t>(id));
  std::vector<BpeTable::Merge> merges;
  std::string left, right;
  int64_t number = 0;
  while (!merges_txt.empty()) {
    const std::string_view line = TakeLine(&merges_txt);
    ++number;
    if (line.empty() || (number == 1 && line.substr(0, 9) == "#version:")) continue;
    const size_t space = line.find(' ');
    if (line.size() > 8 * BpeTable::kMaxTokenBytes || space == std::string_view::npos ||
        !DecodeCharacters(line.substr(0, space), &left) ||
        !DecodeCharacters(line.substr(space + 1), &right)) {
      return BadLine(merges_source, number,
                     "is not two tokens in GPT-2's alphabet with a space between");
    }
    const auto l = ids.find(left), r = ids.find(right), both = ids.find(left + right);
    if (l == ids.end() || r == ids.end() || both == ids.end()) {
      return BadLine(merges_source, number,
                     absl::StrCat("merges tokens that '", vocab_source, "' lacks"));
    }
    merges.push_back({l->second, r->second, both->second});
  }
  STRETTO_ASSIGN_OR_RETURN(
      BpeTable table, BpeTable::FromMerges(std::move(tokens), merges,
                                           absl::StrCat(vocab_source, "' with '", merges_source)));
  STRETTO_ASSIGN_OR_RETURN(auto splitter, Gpt2Splitter::Create());
  return std::make_unique<Gpt2Tokenizer>(std::move(table), std::move(splitter), end_of_text);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTiktoken(const std::string& path) {
  STRETTO_ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(kFile, path));
  return ParseTiktoken(text, path);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadGpt2Bpe(const std::string& vocab_json,
                                                       const std::string& merges_txt) {
  STRETTO_ASSIGN_OR_RETURN(const std::string vocab, ReadRegularFile(kFile, vocab_json));
  STRETTO_ASSIGN_OR_RETURN(const std::string merges, ReadRegularFile(kFile, merges_txt));
  return ParseGpt2Bpe(vocab, merges, vocab_json, merges_txt);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& spec) {
  constexpr std::string_view kSuffix = ".tiktoken";
  if (spec == "bytes") return MakeByteTokenizer();
  if (spec.size() > kSuffix.size() &&
      spec.compare(spec.size() - kSuffix.size(), kSuffix.size(), kSuffix) == 0) {
    return LoadTiktoken(spec);
  }
  struct stat status;
  if (stat(spec.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
    return LoadGpt2Bpe(absl::StrCat(spec, "/vocab.json"), absl::StrCat(spec, "/merges.txt"));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("there is no tokenizer '", spec,
                   "'; give \"bytes\", a file that ends in .tiktoken, or a directory that holds "
                   "vocab.json and merges.txt"));
}

}  // namespace stretto
