// Byte encoding of control-plane messages: little-endian integers and length-prefixed strings.
#ifndef STRETTO_SRC_COMM_WIRE_H_
#define STRETTO_SRC_COMM_WIRE_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace stretto::wire {

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian");

// A frame is a u32 length followed by that many bytes. A client that has not shown the job token
// may send small frames only, so that strangers cannot make the server allocate.
inline constexpr uint32_t kMaxFrame = 64u << 20;
inline constexpr uint32_t kMaxHelloFrame = 4096;
inline constexpr uint32_t kHelloMagic = 0x53545231;  // "1RTS"

enum class Request : uint8_t {
  kHello = 1,
  kSet,
  kTryGet,
  kGet,
  kAdd,
  kList,
  kListWhen,
  kErase,
  kCancel,
  kGoodbye,
};
enum class Reply : uint8_t { kOk = 0, kNotFound, kInvalid, kRefused };

class Writer {
 public:
  // Starts a frame; Frame() fills in its length.
  Writer() : bytes_(sizeof(uint32_t), '\0') {}
  template <class T>
  Writer& Int(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Writer& Text(const std::string& text) {
    Int(static_cast<uint32_t>(text.size()));
    bytes_ += text;
    return *this;
  }
  const std::string& Frame() {
    const uint32_t length = static_cast<uint32_t>(bytes_.size() - sizeof(uint32_t));
    std::memcpy(bytes_.data(), &length, sizeof(length));
    return bytes_;
  }

 private:
  std::string bytes_;
};

// Reads past the end give zeros and make ok() false.
class Reader {
 public:
  Reader(const char* data, std::size_t size) : at_(data), left_(size) {}
  template <class T>
  T Int() {
    T value{};
    if (left_ < sizeof(T)) {
      ok_ = false;
      left_ = 0;
      return value;
    }
    std::memcpy(&value, at_, sizeof(T));
    at_ += sizeof(T);
    left_ -= sizeof(T);
    return value;
  }
  std::string Text() {
    const uint32_t size = Int<uint32_t>();
    if (!ok_ || left_ < size) {
      ok_ = false;
      left_ = 0;
      return "";
    }
    std::string text(at_, size);
    at_ += size;
    left_ -= size;
    return text;
  }
  bool ok() const { return ok_; }

 private:
  const char* at_;
  std::size_t left_;
  bool ok_ = true;
};

}  // namespace stretto::wire

#endif  // STRETTO_SRC_COMM_WIRE_H_
