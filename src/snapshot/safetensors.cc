#include "stretto/snapshot/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/format.h"
#include "src/snapshot/file_io.h"
#include "src/snapshot/safetensors_types.h"

namespace stretto {
namespace {

using snapshot_internal::FileReader;
using snapshot_internal::kMaxSafetensorsHeader;
using snapshot_internal::kSafetensorsTypes;
using snapshot_internal::SafetensorsTypeIndex;

constexpr int kMaxDimensions = 64;  // of one tensor; no framework has more
constexpr int kMaxSkippedDepth = 120;

std::string Quoted(const std::string& name) {
  return absl::StrCat("\"", name.size() <= 200 ? name : name.substr(0, 200) + "...", "\"");
}

// Builds the entries while the parser runs, so that repeated keys are seen (a DOM would drop them)
// and nothing recurses. Fields of a tensor that the format does not know are passed over.
class HeaderHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
  std::string error;  // what is wrong, empty when nothing is

  bool null() override {
    if (in_ == In::kRoot && in_metadata_) {
      in_metadata_ = false;
      return true;  // the reference reader takes null for "no metadata"
    }
    return Ignored() || Fail("has a null where a value is needed");
  }
  bool boolean(bool) override { return Ignored() || Fail("has a boolean where none is allowed"); }
  bool number_integer(number_integer_t value) override {
    return Ignored() || Fail(absl::StrCat("has the negative number ", value));
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (Ignored()) return true;
    if (in_ != In::kShape && in_ != In::kOffsets) return Fail("has a number where none is allowed");
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Fail(absl::StrCat("has the number ", value, ", which is out of range"));
    }
    std::vector<int64_t>& list = in_ == In::kShape ? entries.back().shape : offsets_;
    if (static_cast<int>(list.size()) == (in_ == In::kShape ? kMaxDimensions : 2)) {
      return Fail(in_ == In::kShape ? absl::StrCat("has more than ", kMaxDimensions, " dimensions")
                                    : "has more than two data_offsets");
    }
    list.push_back(static_cast<int64_t>(value));
    return true;
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Ignored() || Fail(absl::StrCat("has ", text, " where a whole number is needed"));
  }
  bool string(string_t& value) override {
    if (Ignored()) return true;
    if (in_ == In::kMetadata) {
      metadata[key_] = value;
      return true;
    }
    if (in_ != In::kTensor || field_ != Field::kDType) {
      return Fail("has a string where none is allowed");
    }
    if (SafetensorsTypeIndex(value) < 0) {
      return Fail(absl::StrCat("has the unknown dtype ", Quoted(value)));
    }
    entries.back().dtype = value;
    return true;
  }
  bool binary(binary_t&) override { return Fail("has binary data"); }

  bool start_object(std::size_t) override {
    if (Ignored()) return Deeper();
    if (in_ == In::kTop) {
      in_ = In::kRoot;
      return true;
    }
    if (in_ != In::kRoot) return Fail("has an object where none is allowed");
    if (in_metadata_) {
      in_ = In::kMetadata;
      return true;
    }
    in_ = In::kTensor;
    entries.emplace_back();
    entries.back().name = key_;
    offsets_.clear();
    seen_ = {};
    return true;
  }
  bool key(string_t& name) override {
    switch (in_) {
      case In::kRoot:
        key_ = name;
        tensor_ = name;
        in_metadata_ = name == "__metadata__";
        return names_.insert(name).second || Fail("appears twice");
      case In::kMetadata:
        key_ = name;
        return metadata.emplace(name, "").second ||
               Fail(absl::StrCat("has ", Quoted(name), " twice"));
      case In::kTensor: {
        if (depth_ > 0) return true;
        field_ = name == "dtype"          ? Field::kDType
                 : name == "shape"        ? Field::kShape
                 : name == "data_offsets" ? Field::kOffsets
                                          : Field::kOther;
        if (field_ == Field::kOther) return true;
        bool& seen = seen_[static_cast<int>(field_)];
        return !std::exchange(seen, true) || Fail(absl::StrCat("has ", name, " twice"));
      }
      default:
        return true;
    }
  }
  bool end_object() override {
    if (depth_ > 0) return Shallower();
    if (in_ == In::kMetadata) {
      in_ = In::kRoot;
      in_metadata_ = false;
    } else if (in_ == In::kTensor) {
      if (!seen_[0]) return Fail("has no dtype");
      if (!seen_[1]) return Fail("has no shape");
      if (!seen_[2]) return Fail("has no data_offsets");
      if (offsets_.size() != 2) return Fail("does not have two data_offsets");
      entries.back().begin = offsets_[0];
      entries.back().end = offsets_[1];
      in_ = In::kRoot;
    }
    return true;
  }
  bool start_array(std::size_t) override {
    if (Ignored()) return Deeper();
    if (in_ == In::kTensor && field_ == Field::kShape) {
      in_ = In::kShape;
    } else if (in_ == In::kTensor && field_ == Field::kOffsets) {
      in_ = In::kOffsets;
    } else {
      return Fail("has a list where none is allowed");
    }
    return true;
  }
  bool end_array() override {
    if (depth_ > 0) return Shallower();
    in_ = In::kTensor;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    error = absl::StrCat("the header is not valid JSON at byte ", position, ": ",
                         WithoutJsonTag(e.what()));
    return false;
  }

 private:
  enum class In { kTop, kRoot, kMetadata, kTensor, kShape, kOffsets };
  enum class Field { kDType, kShape, kOffsets, kOther };

  // Inside the value of a tensor's unknown field.
  bool Ignored() const { return in_ == In::kTensor && field_ == Field::kOther; }
  bool Deeper() {
    return ++depth_ <= kMaxSkippedDepth || Fail("has a field that is nested too deeply");
  }
  bool Shallower() {
    --depth_;
    return true;
  }
  bool Fail(const std::string& reason) {
    if (in_ == In::kTop) {
      error = "the header is not a JSON object";
    } else {
      error =
          absl::StrCat(in_metadata_ ? "__metadata__" : "tensor " + Quoted(tensor_), " ", reason);
    }
    return false;
  }

  In in_ = In::kTop;
  Field field_ = Field::kDType;
  std::array<bool, 3> seen_ = {};  // dtype, shape, data_offsets of the present tensor
  bool in_metadata_ = false;
  int depth_ = 0;
  std::string key_;
  std::string tensor_;
  std::set<std::string> names_;
  std::vector<int64_t> offsets_;
};

// Bytes that the shape and type ask for; false when that overflows or ends within a byte.
bool ShapeBytes(const SafetensorsEntry& entry, int64_t* bytes, std::string* reason) {
  int64_t bits = 1;
  for (const int64_t dimension : entry.shape) {
    if (__builtin_mul_overflow(bits, dimension, &bits)) {
      *reason = "has a shape whose product overflows";
      return false;
    }
  }
  const int width = kSafetensorsTypes[SafetensorsTypeIndex(entry.dtype)].bits;
  if (__builtin_mul_overflow(bits, int64_t{width}, &bits)) {
    *reason = "has a shape whose size overflows";
    return false;
  }
  if (bits % 8 != 0) {
    *reason = "does not fill a whole number of bytes";
    return false;
  }
  *bytes = bits / 8;
  return true;
}

absl::Status Refuse(const std::string& source, const std::string& reason) {
  return absl::InvalidArgumentError(
      absl::StrCat(source, ": not a valid safetensors file: ", reason));
}

// Sorts by data offset and checks that the tensors fill the data section without hole or overlap.
absl::Status CheckLayout(const std::string& source, std::vector<SafetensorsEntry>& entries,
                         int64_t data_bytes) {
  std::sort(entries.begin(), entries.end(),
            [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  int64_t end = 0;
  for (const SafetensorsEntry& entry : entries) {
    const std::string who = absl::StrCat("tensor ", Quoted(entry.name), " ");
    if (entry.end < entry.begin) {
      return Refuse(source,
                    absl::StrCat(who, "ends at ", entry.end, " before it begins at ", entry.begin));
    }
    if (entry.begin != end) {
      return Refuse(source, absl::StrCat(who, "begins at ", entry.begin, " where ", end,
                                         " is due: the data has ",
                                         entry.begin > end ? "a hole" : "an overlap"));
    }
    int64_t bytes = 0;
    std::string reason;
    if (!ShapeBytes(entry, &bytes, &reason)) return Refuse(source, who + reason);
    if (entry.end - entry.begin != bytes) {
      return Refuse(source,
                    absl::StrCat(who, "has ", entry.end - entry.begin,
                                 " bytes of data where its shape and dtype ask for ", bytes));
    }
    end = entry.end;
  }
  if (end != data_bytes) {
    return Refuse(source, absl::StrCat("the tensors end at ", end, " and the file has ", data_bytes,
                                       " bytes of data: it was cut off or something was appended"));
  }
  return absl::OkStatus();
}

// The header's length N from its first 8 bytes, checked against the size of the file.
absl::StatusOr<int64_t> HeaderBytes(const std::string& source, const void* head,
                                    int64_t file_bytes) {
  uint64_t length = 0;
  std::memcpy(&length, head, sizeof(length));
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeader)) {
    return Refuse(source, absl::StrCat("the header is said to have ", length, " bytes, at most ",
                                       kMaxSafetensorsHeader, " are allowed"));
  }
  if (static_cast<int64_t>(length) > file_bytes - 8) {
    return Refuse(source, absl::StrCat("the header is said to have ", length,
                                       " bytes and the file ends after ", file_bytes - 8));
  }
  return static_cast<int64_t>(length);
}

}  // namespace

int64_t SafetensorsEntry::elements() const {
  int64_t n = 1;
  for (const int64_t dimension : shape) n *= dimension;
  return n;
}

absl::StatusOr<DType> FromSafetensorsType(const std::string& dtype) {
  for (const DType t : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16, DType::kE4M3,
                        DType::kE5M2, DType::kI32, DType::kI64, DType::kU8}) {
    if (dtype == SafetensorsType(t)) return t;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no tensor of this library holds the safetensors dtype ", Quoted(dtype)));
}

const char* SafetensorsType(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "F64";
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kE4M3:
      return "F8_E4M3";
    case DType::kE5M2:
      return "F8_E5M2";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
    case DType::kU8:
      return "U8";
  }
  return "";
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Parse(const std::string& source, const void* head,
                                                       int64_t head_bytes, int64_t file_bytes) {
  if (file_bytes < 8 || head_bytes < 8) {
    return Refuse(source, absl::StrCat("it has ", std::min(file_bytes, head_bytes),
                                       " bytes, not even a header length"));
  }
  STRETTO_ASSIGN_OR_RETURN(const int64_t length, HeaderBytes(source, head, file_bytes));
  if (head_bytes < 8 + length) {
    return Refuse(source, absl::StrCat("the header has ", length, " bytes, only ", head_bytes - 8,
                                       " were given"));
  }
  const char* json = static_cast<const char*>(head) + 8;
  if (length == 0 || json[0] != '{') return Refuse(source, "the header does not start with {");
  // The JSON parser takes a NUL byte for the end of its input and would ignore what follows.
  if (std::memchr(json, '\0', length) != nullptr) {
    return Refuse(source, "the header contains a NUL byte");
  }

  HeaderHandler handler;
  if (!nlohmann::json::sax_parse(json, json + length, &handler) || !handler.error.empty()) {
    return Refuse(source, handler.error);
  }
  STRETTO_RETURN_IF_ERROR(CheckLayout(source, handler.entries, file_bytes - 8 - length));

  SafetensorsFile file;
  file.path_ = source;
  file.data_begin_ = 8 + length;
  file.entries_ = std::move(handler.entries);
  file.metadata_ = std::move(handler.metadata);
  for (size_t i = 0; i < file.entries_.size(); ++i) {
    file.index_[file.entries_[i].name] = static_cast<int>(i);
  }
  return file;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  STRETTO_ASSIGN_OR_RETURN(auto reader, FileReader::Open(path));
  std::vector<char> head(std::min<int64_t>(reader->size(), 8));
  STRETTO_RETURN_IF_ERROR(reader->Read(0, head.size(), head.data()));
  if (head.size() == 8) {
    // Checked against the size of the file before anything of that length is allocated.
    STRETTO_ASSIGN_OR_RETURN(const int64_t length, HeaderBytes(path, head.data(), reader->size()));
    head.resize(8 + length);
    STRETTO_RETURN_IF_ERROR(reader->Read(8, length, head.data() + 8));
  }
  STRETTO_ASSIGN_OR_RETURN(SafetensorsFile file,
                           Parse(path, head.data(), head.size(), reader->size()));
  file.file_ = reader;
  return file;
}

const SafetensorsEntry* SafetensorsFile::Find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &entries_[it->second];
}

absl::Status SafetensorsFile::Read(const SafetensorsEntry& entry, int64_t offset, int64_t bytes,
                                   void* out) const {
  if (file_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat(path_, ": only the header was parsed, there is no data to read"));
  }
  const int64_t size = entry.end - entry.begin;
  if (offset < 0 || bytes < 0 || offset > size || bytes > size - offset) {
    return absl::OutOfRangeError(absl::StrCat(path_, ": bytes ", offset, " to ", offset + bytes,
                                              " are outside tensor ", Quoted(entry.name), " of ",
                                              size, " bytes"));
  }
  const auto* reader = static_cast<const FileReader*>(file_.get());
  return reader->Read(data_begin_ + entry.begin + offset, bytes, out);
}

}  // namespace stretto
