// What a process writes, on its way to where it would go without us.
#ifndef STRETTO_TOOLS_RUN_STREAM_H_
#define STRETTO_TOOLS_RUN_STREAM_H_

#include <cstddef>
#include <limits>
#include <string>

namespace stretto {

// Passes on what comes, line by line where lines are marked, and keeps the end of it.
class Stream {
 public:
  // Reads from `from`, which it closes. The newest `kept` bytes are what was said.
  Stream(int from, int to, std::string prefix, size_t kept);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int from() const { return from_; }  // -1 after its end
  // What is there, or about `most` bytes of it, without waiting for more. False at the end.
  bool Pump(size_t most = std::numeric_limits<size_t>::max());
  void Flush();
  // Ends a line that was passed on without its end.
  void EndLine();
  // Passes nothing on any more; what comes is kept as before.
  void Mute() { to_ = -1; }
  bool muted() const { return to_ < 0; }
  const std::string& said() const { return said_; }

 private:
  void Take(const std::string& text);
  void Write(const std::string& text);
  int from_, to_;
  std::string prefix_, line_, said_;
  size_t kept_;
  bool within_line_ = false;
};

// Bytes that a pipe with room takes at once.
inline constexpr size_t kPiece = 4096;
// Whether the descriptor is ready for `events` (POLLIN, POLLOUT) within so many seconds.
bool IsReady(int descriptor, short events, double seconds);
// Writes it where somebody reads, or whoever reads goes on within so many seconds; otherwise false,
// and some of it or all is not written.
bool WriteUnlessStuck(int to, const std::string& text, double seconds);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_STREAM_H_
