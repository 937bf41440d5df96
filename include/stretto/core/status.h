// Errors are values: set-up, I/O, configuration, communication and recovery return absl::Status or
// absl::StatusOr. No exception crosses the API and the library never calls exit or abort.
//
// Messages are one sentence that says what is wrong, where (file, option, tensor or rank), and what
// to do about it.
#ifndef STRETTO_CORE_STATUS_H_
#define STRETTO_CORE_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define STRETTO_STATUS_CONCAT_INNER_(a, b) a##b
#define STRETTO_STATUS_CONCAT_(a, b) STRETTO_STATUS_CONCAT_INNER_(a, b)

// Evaluates an expression of type absl::Status and returns it from the enclosing function unless it
// is OK.
#define STRETTO_RETURN_IF_ERROR(expr)                                                         \
  do {                                                                                        \
    if (absl::Status stretto_status_ = (expr); !stretto_status_.ok()) return stretto_status_; \
  } while (false)

// Evaluates an expression of type absl::StatusOr<T>; on success assigns or declares `lhs`,
// otherwise returns the status:  STRETTO_ASSIGN_OR_RETURN(auto plan, planner.Solve());
#define STRETTO_ASSIGN_OR_RETURN(lhs, expr) \
  STRETTO_ASSIGN_OR_RETURN_IMPL_(STRETTO_STATUS_CONCAT_(stretto_statusor_, __LINE__), lhs, expr)
#define STRETTO_ASSIGN_OR_RETURN_IMPL_(result, lhs, expr) \
  auto result = (expr);                                   \
  if (!result.ok()) return std::move(result).status();    \
  lhs = std::move(result).value()

#endif  // STRETTO_CORE_STATUS_H_
