// Turns text files into token files for training and validation, and token files back into text.
#include <sys/stat.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/read_file.h"
#include "stretto/data/token_file.h"
#include "stretto/data/tokenizer.h"
#include "tools/arguments.h"

namespace stretto {
namespace {

struct Options {
  std::string tokenizer = "bytes";
  std::string output;
  std::string decode;
  std::string split_documents = "blank";
  double validation_fraction = 0.1;
  std::vector<std::string> inputs;
};

// Text is encoded in parts of about this size, so that inputs may be larger than memory.
constexpr size_t kPart = size_t{4} << 20;
constexpr int64_t kDecodeTokens = 1 << 16;

absl::Status SystemError(const std::string& what, const std::string& path) {
  const int error = errno;
  const std::string message =
      absl::StrCat("cannot ", what, " '", path, "': ", std::strerror(error));
  return error == ENOENT ? absl::NotFoundError(message) : absl::UnavailableError(message);
}

// Where a text may be cut so that its two parts encode to the same ids as the whole: after a line
// end that stands between two printable ASCII characters, since white space is then a piece of its
// own in any split pattern. Returns the last such place, or 0.
size_t SafeCut(const std::string& text) {
  const auto printable = [&](size_t i) { return text[i] > 0x20 && text[i] < 0x7f; };
  for (size_t i = text.size(); i-- > 2;) {
    if (text[i - 1] == '\n' && printable(i) && printable(i - 2)) return i;
  }
  return 0;
}

// Encodes documents, given line by line, into the training file and then the validation file.
class Converter {
 public:
  Converter(const Options& options, const Tokenizer& tokenizer, int64_t split_at)
      : options_(options), tokenizer_(tokenizer), split_at_(split_at) {}

  absl::Status Start() { return OpenSplit("train"); }

  absl::Status Line(const std::string& line) {
    const bool blank = line.find_first_not_of(" \t\r\n\v\f") == std::string::npos;
    if (options_.split_documents == "blank" && blank) {
      STRETTO_RETURN_IF_ERROR(EndDocument());
    } else {
      const bool boundary = options_.split_documents != "blank" || !in_document_;
      if (!validation_ && seen_ >= split_at_ && boundary) {
        STRETTO_RETURN_IF_ERROR(EndDocument());
        STRETTO_RETURN_IF_ERROR(Close());
        validation_ = true;
        STRETTO_RETURN_IF_ERROR(OpenSplit("validation"));
      }
      in_document_ = true;
      text_ += line;
      if (text_.size() >= next_flush_) {
        const size_t cut = SafeCut(text_);
        if (cut > 0) STRETTO_RETURN_IF_ERROR(Flush(cut));
        next_flush_ = text_.size() + kPart;
      }
    }
    seen_ += static_cast<int64_t>(line.size());
    return absl::OkStatus();
  }

  absl::Status EndFile() {
    return options_.split_documents == "none" ? absl::OkStatus() : EndDocument();
  }

  absl::Status Finish() {
    STRETTO_RETURN_IF_ERROR(EndDocument());
    if (split_at_ < INT64_MAX && !validation_) {
      return absl::InvalidArgumentError(
          "nothing is left for validation, since the last document (or line) is longer than the "
          "validation fraction; use a larger --validation-fraction, or 0 for none, or another "
          "--split-documents");
    }
    return Close();
  }

 private:
  absl::Status OpenSplit(const char* split) {
    split_ = split;
    STRETTO_ASSIGN_OR_RETURN(
        writer_, TokenFileWriter::Create(absl::StrCat(options_.output, ".", split, ".bin"),
                                         tokenizer_.vocabulary()));
    documents_ = 0;
    return absl::OkStatus();
  }

  absl::Status Flush(size_t size) {
    ids_.clear();
    const bool all = size == text_.size();
    STRETTO_RETURN_IF_ERROR(tokenizer_.Encode(all ? text_ : text_.substr(0, size), &ids_));
    text_.erase(0, size);
    return writer_->Append(ids_);
  }

  absl::Status EndDocument() {
    if (!in_document_) return absl::OkStatus();
    STRETTO_RETURN_IF_ERROR(Flush(text_.size()));
    in_document_ = false;
    next_flush_ = kPart;
    ++documents_;
    if (options_.split_documents == "none") return absl::OkStatus();
    const int32_t separator = static_cast<int32_t>(tokenizer_.end_of_text());
    return writer_->Append(&separator, 1);
  }

  absl::Status Close() {
    const int64_t tokens = writer_->tokens();
    STRETTO_RETURN_IF_ERROR(writer_->Finish());
    std::printf("%s.%s.bin: %lld tokens, %lld document%s\n", options_.output.c_str(), split_,
                static_cast<long long>(tokens), static_cast<long long>(documents_),
                documents_ == 1 ? "" : "s");
    return absl::OkStatus();
  }

  const Options& options_;
  const Tokenizer& tokenizer_;
  const int64_t split_at_;  // validation starts at the first boundary from this byte on
  std::unique_ptr<TokenFileWriter> writer_;
  const char* split_ = "";
  bool validation_ = false;
  bool in_document_ = false;
  int64_t seen_ = 0;
  int64_t documents_ = 0;
  size_t next_flush_ = kPart;
  std::string text_;  // of the document at hand, not yet encoded
  std::vector<int32_t> ids_;
};

absl::Status ConvertFile(const std::string& path, Converter* converter) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"),
                                                       &std::fclose);
  if (file == nullptr) return SystemError("open", path);
  char* data = nullptr;
  size_t capacity = 0;
  absl::Status status;
  std::string line;
  for (;;) {
    const ssize_t n = getline(&data, &capacity, file.get());
    if (n < 0) break;
    line.assign(data, static_cast<size_t>(n));
    status = converter->Line(line);
    if (!status.ok()) break;
  }
  std::free(data);
  STRETTO_RETURN_IF_ERROR(status);
  if (!std::feof(file.get())) return SystemError("read", path);
  return converter->EndFile();
}

absl::Status Encode(const Options& options, const Tokenizer& tokenizer) {
  if (options.output.empty()) {
    return absl::InvalidArgumentError("stretto-tokenize needs --output PREFIX; see --help");
  }
  if (options.inputs.empty()) {
    return absl::InvalidArgumentError("stretto-tokenize needs at least one text file; see --help");
  }
  if (options.validation_fraction < 0 || options.validation_fraction >= 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--validation-fraction must be in [0, 1), not ", options.validation_fraction));
  }
  int64_t total = 0;
  for (const std::string& path : options.inputs) {
    struct stat status;
    if (stat(path.c_str(), &status) != 0) return SystemError("find", path);
    STRETTO_RETURN_IF_ERROR(CheckRegularFile("the text", path));
    total += status.st_size;
  }
  if (total == 0) return absl::InvalidArgumentError("the input files are empty; name text files");
  const int64_t held_out =
      static_cast<int64_t>(std::llround(static_cast<double>(total) * options.validation_fraction));
  const std::filesystem::path parent = std::filesystem::path(options.output).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  if (error) {
    return absl::UnavailableError(
        absl::StrCat("cannot create the directory '", parent.string(), "': ", error.message()));
  }
  Converter converter(options, tokenizer, held_out > 0 ? total - held_out : INT64_MAX);
  STRETTO_RETURN_IF_ERROR(converter.Start());
  for (const std::string& path : options.inputs) {
    STRETTO_RETURN_IF_ERROR(ConvertFile(path, &converter));
  }
  return converter.Finish();
}

absl::Status Decode(const Options& options, const Tokenizer& tokenizer) {
  STRETTO_ASSIGN_OR_RETURN(const TokenFile file, TokenFile::Open(options.decode));
  std::vector<int32_t> ids;
  for (int64_t at = 0; at < file.tokens(); at += kDecodeTokens) {
    ids.resize(std::min(kDecodeTokens, file.tokens() - at));
    STRETTO_RETURN_IF_ERROR(
        file.Read(at, static_cast<int64_t>(ids.size()), tokenizer.vocabulary(), ids.data()));
    STRETTO_ASSIGN_OR_RETURN(const std::string text, tokenizer.Decode(ids));
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) {
      return SystemError("write", "standard output");
    }
  }
  if (std::fflush(stdout) != 0) return SystemError("write", "standard output");
  return absl::OkStatus();
}

absl::Status Main(int argc, char** argv) {
  Options options;
  Arguments arguments("stretto-tokenize",
                      "Writes PREFIX.train.bin and PREFIX.validation.bin from text files. The "
                      "validation split is the end\nof the text, from the first document (blank) "
                      "or line (file, none) inside the fraction.",
                      "INPUT...");
  arguments.Add("tokenizer", "SPEC",
                "bytes, FILE.tiktoken, or a directory with vocab.json and merges.txt",
                &options.tokenizer);
  arguments.Add("output", "PREFIX", "where the token files go", &options.output);
  arguments.Add("validation-fraction", "F", "part of the bytes to hold out; 0: none",
                &options.validation_fraction);
  arguments.AddChoice("split-documents", {"blank", "file", "none"},
                      "documents end at blank lines (which are dropped), at files' ends, or never",
                      &options.split_documents);
  arguments.Add("decode", "FILE.bin", "print the text of a token file instead", &options.decode);
  STRETTO_RETURN_IF_ERROR(arguments.Parse(argc, argv));
  if (arguments.help()) return PrintText(arguments.Help());
  options.inputs = arguments.rest();
  STRETTO_ASSIGN_OR_RETURN(const auto tokenizer, OpenTokenizer(options.tokenizer));
  return options.decode.empty() ? Encode(options, *tokenizer) : Decode(options, *tokenizer);
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) { return stretto::EndProgram(stretto::Main(argc, argv)); }
