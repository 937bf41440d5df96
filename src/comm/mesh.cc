#include "stretto/comm/mesh.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

std::string AxesText(const std::vector<Axis>& axes) {
  std::string text;
  for (const Axis& a : axes) absl::StrAppend(&text, text.empty() ? "" : " x ", a.name, "=", a.size);
  return text;
}

}  // namespace

absl::StatusOr<Mesh> Mesh::Create(int ranks, int rank, std::vector<Axis> axes) {
  if (rank < 0 || rank >= ranks) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " is outside a mesh of ", ranks, " ranks"));
  }
  int64_t product = 1;
  for (std::size_t i = 0; i < axes.size(); ++i) {
    const Axis& a = axes[i];
    if (a.name.empty() || a.size < 1) {
      return absl::InvalidArgumentError(absl::StrCat("mesh axis '", a.name, "' has size ", a.size,
                                                     "; an axis needs a name and a size >= 1"));
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (axes[j].name == a.name) {
        return absl::InvalidArgumentError(
            absl::StrCat("the mesh names the axis '", a.name, "' twice"));
      }
    }
    product *= a.size;
    if (product > ranks) break;
  }
  if (product != ranks) {
    return absl::InvalidArgumentError(
        absl::StrCat("the mesh ", AxesText(axes), " does not multiply to the ", ranks,
                     " ranks of this job; change an axis or the number of ranks"));
  }
  Mesh mesh;
  mesh.rank_ = rank;
  mesh.axes_ = std::move(axes);
  return mesh;
}

absl::StatusOr<Mesh> Mesh::View(std::vector<Axis> axes) const {
  return Create(size(), rank_, std::move(axes));
}

int Mesh::size() const {
  int n = 1;
  for (const Axis& a : axes_) n *= a.size;
  return n;
}

int Mesh::Size(const std::string& axis) const {
  for (const Axis& a : axes_) {
    if (a.name == axis) return a.size;
  }
  return 1;
}

int Mesh::Coord(const std::string& axis) const { return CoordOf(rank_, axis); }

int Mesh::CoordOf(int rank, const std::string& axis) const {
  for (std::size_t i = axes_.size(); i-- > 0;) {
    if (axes_[i].name == axis) return rank % axes_[i].size;
    rank /= axes_[i].size;
  }
  return 0;
}

RankList Mesh::Along(const std::vector<std::string>& axes) const {
  // The first rank of the group is this one with the named coordinates set to zero; the others
  // follow by counting those coordinates up, the last axis of the mesh fastest.
  RankList ranks = {rank_};
  int stride = 1;
  for (std::size_t i = axes_.size(); i-- > 0;) {
    const Axis& a = axes_[i];
    if (std::find(axes.begin(), axes.end(), a.name) != axes.end()) {
      const int coord = rank_ / stride % a.size;
      RankList grown;
      grown.reserve(ranks.size() * static_cast<std::size_t>(a.size));
      for (int c = 0; c < a.size; ++c) {
        for (int r : ranks) grown.push_back(r + (c - coord) * stride);
      }
      ranks = std::move(grown);
    }
    stride *= a.size;
  }
  return ranks;
}

std::string Mesh::Describe(const std::vector<int>& machines, const std::string& transport) const {
  std::string text;
  for (const Axis& a : axes_) {
    absl::StrAppend(&text, a.name, ": size ", a.size, ", coordinate ", Coord(a.name), ", ranks");
    std::set<int> places;
    for (int r : Along({a.name})) {
      absl::StrAppend(&text, " ", r);
      if (static_cast<std::size_t>(r) < machines.size()) {
        places.insert(machines[static_cast<std::size_t>(r)]);
      }
    }
    if (a.size > 1 && !places.empty()) {
      absl::StrAppend(&text, places.size() == 1 ? ", on machine" : ", between machines");
      for (int m : places) absl::StrAppend(&text, " ", m);
    }
    if (a.size > 1 && !transport.empty()) absl::StrAppend(&text, ", over ", transport);
    text += "\n";
  }
  return text;
}

}  // namespace stretto
