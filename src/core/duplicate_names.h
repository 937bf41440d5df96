// Names that appear twice in one object of a JSON text.
#ifndef STRETTO_SRC_CORE_DUPLICATE_NAMES_H_
#define STRETTO_SRC_CORE_DUPLICATE_NAMES_H_

#include <set>
#include <string>
#include <vector>

#include "src/core/config_text.h"

namespace stretto {

// A callback of Json::parse that refuses them, which the library would settle silently: `errors`
// gets a sentence for each, with the path. The parser copies its callback, so hand it one that
// refers to this.
template <class Json>
class DuplicateNames {
 public:
  explicit DuplicateNames(std::vector<std::string>* errors) : errors_(errors) {}

  bool operator()(int /*depth*/, typename Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
        open_.emplace_back();
        break;
      case Json::parse_event_t::object_end:
        if (!open_.empty()) open_.pop_back();
        break;
      case Json::parse_event_t::key: {
        if (open_.empty()) break;
        Object& object = open_.back();
        object.key = parsed.template get<std::string>();
        if (!object.names.insert(object.key).second) {
          std::string path;
          for (const Object& o : open_) path = JoinPath(path, o.key);
          errors_->push_back(path + ": is given twice; remove one");
        }
        break;
      }
      default:
        break;
    }
    return true;
  }

 private:
  struct Object {
    std::set<std::string> names;
    std::string key;
  };
  std::vector<std::string>* errors_;
  std::vector<Object> open_;
};

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_DUPLICATE_NAMES_H_
