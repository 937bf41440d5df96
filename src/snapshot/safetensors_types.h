// The element types of the safetensors format.
#ifndef STRETTO_SRC_SNAPSHOT_SAFETENSORS_TYPES_H_
#define STRETTO_SRC_SNAPSHOT_SAFETENSORS_TYPES_H_

#include <cstdint>
#include <string>

namespace stretto::snapshot_internal {

constexpr int64_t kMaxSafetensorsHeader = 100'000'000;  // bytes of JSON, as in the reference reader

struct SafetensorsTypeInfo {
  const char* name;
  int bits;
};

// In the order of the reference implementation ("increasing alignment"), which its writer sorts by.
constexpr SafetensorsTypeInfo kSafetensorsTypes[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};

// Index in kSafetensorsTypes, -1 for a name that the format does not have.
inline int SafetensorsTypeIndex(const std::string& name) {
  int index = 0;
  for (const SafetensorsTypeInfo& type : kSafetensorsTypes) {
    if (name == type.name) return index;
    ++index;
  }
  return -1;
}

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_SAFETENSORS_TYPES_H_
