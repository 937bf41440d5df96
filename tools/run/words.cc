#include "tools/run/words.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr size_t kTelling = 200;  // bytes of a line that is quoted
constexpr char kEscape = 0x1b, kBell = 0x07;

// Where the sequence that begins with an escape at `i` ends.
size_t EndOfEscape(const std::string& text, size_t i) {
  if (++i == text.size()) return i;
  const char kind = text[i++];
  if (kind == '[') {  // colours, the cursor
    while (i < text.size() && (text[i] < 0x40 || text[i] > 0x7e)) ++i;
    return std::min(i + 1, text.size());
  }
  if (kind == ']') {  // titles
    while (i < text.size() && text[i] != kBell && text[i] != kEscape && text[i] != '\n') ++i;
    if (i + 1 < text.size() && text[i] == kEscape && text[i + 1] == '\\') return i + 2;
    return i < text.size() && text[i] == kBell ? i + 1 : i;
  }
  return i;
}

bool HasWord(const std::string& line) {
  return std::any_of(line.begin(), line.end(),
                     [](unsigned char c) { return absl::ascii_isalpha(c) || c >= 0x80; });
}

}  // namespace

std::string CleanText(const std::string& text) {
  using Json = nlohmann::json;
  const std::string valid =
      Json::parse(Json(text).dump(-1, ' ', false, Json::error_handler_t::replace))
          .get<std::string>();
  std::string clean;
  for (size_t i = 0; i < valid.size();) {
    const char c = valid[i];
    const auto next = static_cast<unsigned char>(i + 1 < valid.size() ? valid[i + 1] : 0);
    if (c == kEscape) {
      i = EndOfEscape(valid, i);
      continue;
    }
    if (c == '\xc2' && next >= 0x80 && next < 0xa0) {  // control characters, too
      i += 2;
      continue;
    }
    if (c == '\r' && next != '\n') clean += '\n';  // a line that is written over
    if (c == '\t') clean += ' ';
    if (c == '\n' || !absl::ascii_iscntrl(static_cast<unsigned char>(c))) clean += c;
    ++i;
  }
  return clean;
}

std::vector<std::string> LastLines(const std::string& text) {
  std::string clean = CleanText(text);
  if (clean.size() > kWordBytes) {
    size_t begin = clean.size() - kWordBytes;
    const size_t newline = clean.find('\n', begin - 1);
    if (newline != std::string::npos && newline + 1 < clean.size()) begin = newline + 1;
    while (begin < clean.size() && (clean[begin] & 0xc0) == 0x80) ++begin;
    clean.erase(0, begin);
  }
  std::vector<std::string> lines;
  std::istringstream all(clean);
  for (std::string line; std::getline(all, line);) {
    absl::StripTrailingAsciiWhitespace(&line);
    if (!line.empty() || !lines.empty()) lines.push_back(line);
  }
  while (!lines.empty() && lines.back().empty()) lines.pop_back();
  if (lines.size() > kWordLines) lines.erase(lines.begin(), lines.end() - kWordLines);
  return lines;
}

std::string Telling(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) {
    if (!HasWord(line)) {
      if (!text.empty()) break;
      continue;
    }
    absl::StrAppend(&text, text.empty() ? "" : " ", absl::StripAsciiWhitespace(line));
  }
  if (text.size() > kTelling) {
    size_t end = kTelling;
    while ((text[end] & 0xc0) == 0x80) --end;
    return text.substr(0, end) + "...";
  }
  while (!text.empty() && (text.back() == ':' || text.back() == '.')) text.pop_back();
  return text;
}

std::string WithoutNumbers(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) {
    for (const char c : line) {
      const bool digit = absl::ascii_isdigit(static_cast<unsigned char>(c));
      if (!digit) text += c;
      if (digit && (text.empty() || text.back() != '#')) text += '#';
    }
    text += '\n';
  }
  return text;
}

}  // namespace stretto
