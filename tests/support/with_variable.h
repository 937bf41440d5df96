// An environment variable for as long as a test wants it.
#ifndef STRETTO_TESTS_SUPPORT_WITH_VARIABLE_H_
#define STRETTO_TESTS_SUPPORT_WITH_VARIABLE_H_

#include <cstdlib>

namespace stretto::test {

// `name` is `value` while it lives, and unset behind it.
class WithVariable {
 public:
  WithVariable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~WithVariable() { unsetenv(name_); }
  WithVariable(const WithVariable&) = delete;
  WithVariable& operator=(const WithVariable&) = delete;

 private:
  const char* name_;
};

}  // namespace stretto::test

#endif  // STRETTO_TESTS_SUPPORT_WITH_VARIABLE_H_
