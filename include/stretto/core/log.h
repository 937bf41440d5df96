// Log lines of the library. Everything goes to one sink (standard error by default).
#ifndef STRETTO_CORE_LOG_H_
#define STRETTO_CORE_LOG_H_

#include <functional>
#include <string>

namespace stretto {

enum class LogLevel : int { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3, kOff = 4 };

// Formatting is the caller's (absl::StrCat, StrFormat). Lines carry the time, the level and, once
// SetLogRank was called, the rank. Safe from any thread.
void Log(LogLevel level, const std::string& message);
inline void LogDebug(const std::string& m) { Log(LogLevel::kDebug, m); }
inline void LogInfo(const std::string& m) { Log(LogLevel::kInfo, m); }
inline void LogWarning(const std::string& m) { Log(LogLevel::kWarning, m); }
inline void LogError(const std::string& m) { Log(LogLevel::kError, m); }

void SetLogLevel(LogLevel level);
// Info lines are written by rank 0 only; all others by every rank, with its number.
void SetLogRank(int rank, int world_size);
// Replaces the sink: an embedding program receives the lines instead of standard error, with the
// rank and without time and level. Calls never overlap, and none is running any more when this
// returns. Lines that the sink itself logs go to standard error. Pass an empty function to restore
// the default. A sink may not call SetLogSink or SetLogRank.
void SetLogSink(std::function<void(LogLevel, const std::string&)> sink);

}  // namespace stretto

#endif  // STRETTO_CORE_LOG_H_
