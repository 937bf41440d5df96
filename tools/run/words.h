// What programs have said, for reports: read by people, and never for a meaning.
#ifndef STRETTO_TOOLS_RUN_WORDS_H_
#define STRETTO_TOOLS_RUN_WORDS_H_

#include <cstddef>
#include <string>
#include <vector>

namespace stretto {

// So many bytes and lines of a launcher stand in a report: Open MPI takes 30 lines to refuse.
inline constexpr size_t kWordBytes = 4096, kWordLines = 40;

// UTF-8 without control characters but ends of lines: nothing that a terminal would act on.
std::string CleanText(const std::string& text);
// The last kWordLines lines of it, cleaned, of at most kWordBytes in all; none is cut off in front
// but one that is longer. Without empty ones at the beginning and the end.
std::vector<std::string> LastLines(const std::string& text);
// The first paragraph with a word in it, on one line and not longer than a line may be. Empty
// when there is none.
std::string Telling(const std::vector<std::string>& lines);
// Two tries differ in times and process ids: the same words have the same text here.
std::string WithoutNumbers(const std::vector<std::string>& lines);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_WORDS_H_
