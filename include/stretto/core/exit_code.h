// How programs end: who starts them again has to know whether that helps.
#ifndef STRETTO_CORE_EXIT_CODE_H_
#define STRETTO_CORE_EXIT_CODE_H_

#include <string>

#include "stretto/core/status.h"

namespace stretto {

// What programs exit with.
inline constexpr int kExitDone = 0, kExitFailed = 1, kExitUsage = 2;

// kExitUsage for an error that comes again however often the program starts: what was asked for is
// wrong, is not there, or does not go together. Else kExitFailed. OK is kExitDone.
inline int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitDone;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnimplemented:
      return kExitUsage;
    default:
      return kExitFailed;
  }
}

// Writes `text` to standard output. UNAVAILABLE when it, or what was printed before, has not
// arrived there: who reads it would take a part, or nothing, for all.
absl::Status PrintText(const std::string& text);

// The last thing that a program does: makes sure that what it printed has arrived, says on standard
// error what is wrong (`result`, or else that), and returns the exit code.
int EndProgram(const absl::StatusOr<int>& result);
int EndProgram(const absl::Status& result);

}  // namespace stretto

#endif  // STRETTO_CORE_EXIT_CODE_H_
