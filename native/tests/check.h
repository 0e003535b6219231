// check.h: the checks of the native tests. A failed check prints its location, and the test continues; main
// returns check_result(), or skip(). Any thread may check.
#pragma once

#include <atomic>
#include <cstdio>
#include <sstream>
#include <string>

namespace argosy::testing {

inline std::atomic<int> num_checks{0};
inline std::atomic<int> num_failures{0};

inline void report(bool holds, const char* file, int line, const std::string& sentence) {
  ++num_checks;
  if (holds) return;
  if (++num_failures <= 20) fprintf(stderr, "%s:%d: %s\n", file, line, sentence.c_str());
}

template <class A, class B>
void report_equal(const A& found, const B& expected, const char* file, int line, const char* what) {
  const bool holds = found == expected;
  std::ostringstream sentence;
  if (!holds) sentence << what << ": found " << found << ", expected " << expected;
  report(holds, file, line, sentence.str());
}

// What main returns if the processor lacks all that a test checks: ctest then calls the test skipped, not
// passed.
inline int skip(const char* needs) {
  printf("skipped: the processor lacks %s, or the system refuses it\n", needs);
  return 77;
}

inline int check_result() {
  printf("%d checks, %d failed\n", num_checks.load(), num_failures.load());
  return num_failures == 0 ? 0 : 1;
}

}  // namespace argosy::testing

#define CHECK(condition) argosy::testing::report(bool(condition), __FILE__, __LINE__, #condition)

#define CHECK_EQUAL(found, expected) \
  argosy::testing::report_equal((found), (expected), __FILE__, __LINE__, #found)

#define CHECK_THROWS(type, expression)                                                 \
  do {                                                                                 \
    bool thrown = false;                                                               \
    try {                                                                              \
      (void)(expression);                                                              \
    } catch (const type&) {                                                            \
      thrown = true;                                                                   \
    }                                                                                  \
    argosy::testing::report(thrown, __FILE__, __LINE__, #expression " throws " #type); \
  } while (false)
