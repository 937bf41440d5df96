#include "src/data/split.h"

#include <cstdint>

#include "absl/strings/str_cat.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace stretto {
namespace {

// White space as the Unicode property has it. PCRE2's own \s also holds U+180E, which lost the
// property in Unicode 6.3 and which the reference tokenizer does not count.
#define STRETTO_SPACE_                                                                          \
  "\\x{09}-\\x{0d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}" \
  "\\x{205f}\\x{3000}"
// Letters and numbers that Unicode 15 and 16 added, so that ids do not depend on the Unicode
// version of the PCRE2 at hand (10.42 has version 14) and are those of tiktoken 0.14 on every code
// point.
#define STRETTO_NEW_LETTERS_                                                             \
  "\\x{1c89}-\\x{1c8a}\\x{a7cb}-\\x{a7cd}\\x{a7da}-\\x{a7dc}\\x{105c0}-\\x{105f3}"       \
  "\\x{10d4a}-\\x{10d65}\\x{10d6f}-\\x{10d85}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}" \
  "\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}"   \
  "\\x{113d3}\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}"  \
  "\\x{1342f}\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}"            \
  "\\x{16d40}-\\x{16d6c}\\x{18cff}\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}"             \
  "\\x{1e030}-\\x{1e06d}\\x{1e4d0}-\\x{1e4eb}\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}"  \
  "\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"
#define STRETTO_NEW_NUMBERS_                                                             \
  "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}" \
  "\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1d2c0}-\\x{1d2d3}" \
  "\\x{1e4f0}-\\x{1e4f9}\\x{1e5f1}-\\x{1e5fa}"
#define STRETTO_LETTER_ "\\p{L}" STRETTO_NEW_LETTERS_
#define STRETTO_NUMBER_ "\\p{N}" STRETTO_NEW_NUMBERS_
constexpr char kGpt2Pattern[] =
    "'(?:[sdmt]|ll|ve|re)| ?[" STRETTO_LETTER_ "]+| ?[" STRETTO_NUMBER_
    "]+| ?[^" STRETTO_SPACE_ STRETTO_LETTER_ STRETTO_NUMBER_ "]+|[" STRETTO_SPACE_
    "]+(?![^" STRETTO_SPACE_ "])|[" STRETTO_SPACE_ "]+";
#undef STRETTO_SPACE_
#undef STRETTO_NEW_LETTERS_
#undef STRETTO_NEW_NUMBERS_
#undef STRETTO_LETTER_
#undef STRETTO_NUMBER_

std::string PcreMessage(int error) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(error, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

// Length of the valid character at the start of `s`, or 0. Never called with an empty string.
size_t CharacterLength(std::string_view s) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(s[i]); };
  const auto within = [&](size_t i, unsigned low, unsigned high) {
    return i < s.size() && byte(i) >= low && byte(i) <= high;
  };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead < 0xc2) return 0;
  if (lead < 0xe0) return within(1, 0x80, 0xbf) ? 2 : 0;
  if (lead < 0xf0) {
    const unsigned low = lead == 0xe0 ? 0xa0 : 0x80, high = lead == 0xed ? 0x9f : 0xbf;
    return within(1, low, high) && within(2, 0x80, 0xbf) ? 3 : 0;
  }
  if (lead < 0xf5) {
    const unsigned low = lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xf4 ? 0x8f : 0xbf;
    return within(1, low, high) && within(2, 0x80, 0xbf) && within(3, 0x80, 0xbf) ? 4 : 0;
  }
  return 0;
}

}  // namespace

size_t ValidUtf8Prefix(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t n = CharacterLength(text.substr(at));
    if (n == 0) break;
    at += n;
  }
  return at;
}

absl::StatusOr<std::unique_ptr<Gpt2Splitter>> Gpt2Splitter::Create() {
  std::unique_ptr<Gpt2Splitter> splitter(new Gpt2Splitter);
  int error;
  PCRE2_SIZE place;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kGpt2Pattern), PCRE2_ZERO_TERMINATED,
                    PCRE2_UTF | PCRE2_UCP, &error, &place, nullptr);
  if (code == nullptr) {
    return absl::InternalError(absl::StrCat("PCRE2 refuses the GPT-2 split pattern at ", place,
                                            ": ", PcreMessage(error),
                                            "; install a PCRE2 that was built with Unicode"));
  }
  splitter->code_ = code;
  // Where the machine forbids executable memory the interpreter does the same, slower.
  splitter->jit_ = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  return splitter;
}

Gpt2Splitter::~Gpt2Splitter() { pcre2_code_free(static_cast<pcre2_code*>(code_)); }

Gpt2Splitter::Pieces::Pieces(const Gpt2Splitter& splitter, std::string_view text)
    : splitter_(splitter), rest_(text), match_(pcre2_match_data_create(1, nullptr)) {
  if (match_ == nullptr) status_ = absl::ResourceExhaustedError("no memory to split text");
}

Gpt2Splitter::Pieces::~Pieces() { pcre2_match_data_free(static_cast<pcre2_match_data*>(match_)); }

bool Gpt2Splitter::Pieces::Next(std::string_view* piece) {
  if (!status_.ok()) return false;
  if (at_ == run_.size()) {
    if (rest_.empty()) return false;
    const size_t valid = ValidUtf8Prefix(rest_);
    if (valid == 0) {
      size_t stray = 1;
      while (stray < rest_.size() && CharacterLength(rest_.substr(stray)) == 0) ++stray;
      *piece = rest_.substr(0, stray);
      rest_.remove_prefix(stray);
      return true;
    }
    run_ = rest_.substr(0, valid);
    rest_.remove_prefix(valid);
    at_ = 0;
  }
  const auto* code = static_cast<const pcre2_code*>(splitter_.code_);
  auto* match = static_cast<pcre2_match_data*>(match_);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(run_.data());
  const uint32_t options = PCRE2_NO_UTF_CHECK;  // checked above
  const int rc = splitter_.jit_
                     ? pcre2_jit_match(code, subject, run_.size(), at_, options, match, nullptr)
                     : pcre2_match(code, subject, run_.size(), at_, options, match, nullptr);
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match);
  // The alternatives cover every character, so a match starts where the last one ended.
  if (rc < 1 || ends[0] != at_ || ends[1] <= at_) {
    status_ = absl::InternalError(absl::StrCat(
        "the GPT-2 split pattern fails at byte ", at_,
        " of a text: ", rc < 1 ? PcreMessage(rc) : std::string("it skips characters")));
    return false;
  }
  *piece = run_.substr(at_, ends[1] - at_);
  at_ = ends[1];
  return true;
}

}  // namespace stretto
