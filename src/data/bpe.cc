#include "src/data/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto {
namespace {

// Pieces up to this length are merged by scanning; nearly all are.
constexpr size_t kShortPiece = 64;

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

size_t Mix(uint64_t key) {
  key *= 0x9e3779b97f4a7c15u;
  return static_cast<size_t>(key ^ (key >> 32));
}

size_t HashBytes(std::string_view bytes) { return std::hash<std::string_view>{}(bytes); }

}  // namespace

absl::Status BpeTable::Index(const std::string& source) {
  slots_.assign(std::bit_ceil(tokens_.size() * 2 + 1), -1);
  const size_t mask = slots_.size() - 1;
  std::fill(std::begin(bytes_), std::end(bytes_), -1);
  for (int32_t id = 0; id < size(); ++id) {
    const std::string& token = tokens_[id];
    if (token.empty() || token.size() > kMaxTokenBytes) {
      return absl::InvalidArgumentError(absl::StrCat("token ", id, " of '", source, "' has ",
                                                     token.size(), " bytes; it must have 1 to ",
                                                     kMaxTokenBytes));
    }
    size_t slot = HashBytes(token) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask) {
      if (tokens_[slots_[slot]] == token) {
        return absl::InvalidArgumentError(
            absl::StrCat("'", source, "' gives the same token the ids ", slots_[slot], " and ", id,
                         "; the file is damaged, get it again"));
      }
    }
    slots_[slot] = id;
    if (token.size() == 1) bytes_[static_cast<unsigned char>(token[0])] = id;
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (bytes_[byte] < 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("'%s' has no token for the single byte 0x%02x; a byte-level tokenizer "
                          "needs all 256, get the file again",
                          source, byte));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<BpeTable> BpeTable::FromRanks(std::vector<std::string> tokens,
                                             const std::string& source) {
  BpeTable table;
  table.tokens_ = std::move(tokens);
  STRETTO_RETURN_IF_ERROR(table.Index(source));
  std::vector<Merge> merges;
  for (int32_t id = 0; id < table.size(); ++id) {
    const std::string_view token = table.tokens_[id];
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const int32_t left = table.Find(token.substr(0, cut));
      if (left < 0) continue;
      const int32_t right = table.Find(token.substr(cut));
      if (right >= 0) merges.push_back({left, right, id});
    }
  }
  table.ReservePairs(merges.size());
  for (const Merge& m : merges) {
    table.AddPair(m.left, m.right, static_cast<uint32_t>(m.result), m.result);
  }
  table.whole_.assign(table.tokens_.size(), true);
  return table;
}

absl::StatusOr<BpeTable> BpeTable::FromMerges(std::vector<std::string> tokens,
                                              const std::vector<Merge>& merges,
                                              const std::string& source) {
  BpeTable table;
  table.tokens_ = std::move(tokens);
  STRETTO_RETURN_IF_ERROR(table.Index(source));
  table.ReservePairs(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& m = merges[rank];
    if (table.FindPair(m.left, m.right) != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("merge ", rank + 1, " of '", source,
                                                     "' was given before; get the file again"));
    }
    table.AddPair(m.left, m.right, static_cast<uint32_t>(rank), m.result);
  }
  // Most pieces of real text are single tokens. Those whose merges lead to them are found at once.
  table.whole_.assign(table.tokens_.size(), false);
  Scratch scratch;
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < table.size(); ++id) {
    ids.clear();
    table.Encode(table.tokens_[id], &scratch, &ids);
    table.whole_[id] = ids.size() == 1 && ids[0] == id;
  }
  return table;
}

int32_t BpeTable::Find(std::string_view bytes) const {
  const size_t mask = slots_.size() - 1;
  for (size_t slot = HashBytes(bytes) & mask; slots_[slot] >= 0; slot = (slot + 1) & mask) {
    if (tokens_[slots_[slot]] == bytes) return slots_[slot];
  }
  return -1;
}

void BpeTable::ReservePairs(size_t count) { pairs_.assign(std::bit_ceil(count * 2 + 1), Pair{}); }

void BpeTable::AddPair(int32_t left, int32_t right, uint32_t rank, int32_t result) {
  const size_t mask = pairs_.size() - 1;
  const uint64_t key = PairKey(left, right);
  size_t slot = Mix(key) & mask;
  while (pairs_[slot].key != ~uint64_t{0}) slot = (slot + 1) & mask;
  pairs_[slot] = {key, rank, result};
}

const BpeTable::Pair* BpeTable::FindPair(int32_t left, int32_t right) const {
  const size_t mask = pairs_.size() - 1;
  const uint64_t key = PairKey(left, right);
  for (size_t slot = Mix(key) & mask; pairs_[slot].key != ~uint64_t{0}; slot = (slot + 1) & mask) {
    if (pairs_[slot].key == key) return &pairs_[slot];
  }
  return nullptr;
}

void BpeTable::Encode(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const {
  if (piece.size() <= kMaxTokenBytes) {
    const int32_t id = Find(piece);
    if (id >= 0 && whole_[id]) {
      ids->push_back(id);
      return;
    }
  }
  if (piece.size() <= kShortPiece) {
    MergeShort(piece, ids);
  } else {
    MergeLong(piece, scratch, ids);
  }
}

void BpeTable::MergeShort(std::string_view piece, std::vector<int32_t>* ids) const {
  struct Part {
    int32_t id;
    uint32_t rank;  // of merging with the next part
    int32_t result;
  };
  Part parts[kShortPiece];
  size_t count = piece.size();
  const auto look = [&](size_t i) {
    const Pair* pair = i + 1 < count ? FindPair(parts[i].id, parts[i + 1].id) : nullptr;
    parts[i].rank = pair == nullptr ? kNoRank : pair->rank;
    parts[i].result = pair == nullptr ? -1 : pair->result;
  };
  for (size_t i = 0; i < count; ++i) parts[i].id = bytes_[static_cast<unsigned char>(piece[i])];
  for (size_t i = 0; i < count; ++i) look(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (parts[i].rank < parts[best].rank) best = i;
    }
    if (parts[best].rank == kNoRank) break;
    parts[best].id = parts[best].result;
    std::copy(parts + best + 2, parts + count, parts + best + 1);
    --count;
    look(best);
    if (best > 0) look(best - 1);
  }
  for (size_t i = 0; i < count; ++i) ids->push_back(parts[i].id);
}

// Parts are a linked list, candidates a heap. A candidate whose parts have changed since it was
// found is stale and dropped when it comes up.
void BpeTable::MergeLong(std::string_view piece, Scratch* scratch,
                         std::vector<int32_t>* ids) const {
  constexpr uint32_t kEnd = ~uint32_t{0};
  auto& parts = scratch->parts;
  auto& heap = scratch->heap;
  const uint32_t count = static_cast<uint32_t>(piece.size());
  parts.resize(count);
  heap.clear();
  for (uint32_t i = 0; i < count; ++i) {
    parts[i] = {bytes_[static_cast<unsigned char>(piece[i])], i == 0 ? kEnd : i - 1,
                i + 1 == count ? kEnd : i + 1};
  }
  const auto later = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.place > b.place;
  };
  const auto look = [&](uint32_t place) {
    const uint32_t next = parts[place].next;
    if (next == kEnd) return false;
    const Pair* pair = FindPair(parts[place].id, parts[next].id);
    if (pair == nullptr) return false;
    heap.push_back({pair->rank, place, parts[place].id, parts[next].id, pair->result});
    return true;
  };
  for (uint32_t i = 0; i < count; ++i) look(i);
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Scratch::Candidate c = heap.back();
    heap.pop_back();
    Scratch::Part& part = parts[c.place];
    if (part.id != c.left || part.next == kEnd || parts[part.next].id != c.right) continue;
    Scratch::Part& gone = parts[part.next];
    part.id = c.result;
    gone.id = -1;
    part.next = gone.next;
    if (part.next != kEnd) parts[part.next].previous = c.place;
    if (look(c.place)) std::push_heap(heap.begin(), heap.end(), later);
    if (part.previous != kEnd && look(part.previous)) {
      std::push_heap(heap.begin(), heap.end(), later);
    }
  }
  for (uint32_t i = 0; i != kEnd; i = parts[i].next) ids->push_back(parts[i].id);
}

}  // namespace stretto
