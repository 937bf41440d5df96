// Ranks arranged along named axes.
#ifndef STRETTO_COMM_MESH_H_
#define STRETTO_COMM_MESH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// Ranks of the world in ring order: any subset, any size. A group is data (contract 3).
using RankList = std::vector<int>;

struct Axis {
  std::string name;
  int size = 1;
  bool operator==(const Axis&) const = default;
};

// An arrangement of `ranks` ranks as a grid, first axis outermost (slowest varying). Immutable.
//   Mesh::Create(8, rank, {{"pp", 2}, {"dp", 2}, {"tp", 2}})
//   mesh.Along({"dp"})        -> the ranks that differ from mine in dp only, in ring order
//   mesh.Along({"dp", "tp"})  -> ... in dp and tp, dp outermost
class Mesh {
 public:
  // INVALID_ARGUMENT when the sizes do not multiply to `ranks`, a size is < 1 or a name repeats.
  static absl::StatusOr<Mesh> Create(int ranks, int rank, std::vector<Axis> axes);
  // Another arrangement of the same ranks in the same order, e.g. an expert view.
  absl::StatusOr<Mesh> View(std::vector<Axis> axes) const;

  int rank() const { return rank_; }
  int size() const;
  const std::vector<Axis>& axes() const { return axes_; }
  // Size of an axis; 1 for an axis that the mesh does not have.
  int Size(const std::string& axis) const;
  // This rank's coordinate; 0 for an axis that the mesh does not have.
  int Coord(const std::string& axis) const;
  int CoordOf(int rank, const std::string& axis) const;
  // The ranks reached from this one by varying the named axes, in the order of the mesh.
  RankList Along(const std::vector<std::string>& axes) const;
  // Who talks to whom, and over what: one line an axis with its size, this rank's coordinate, its
  // group and, where `machines` names the machine of each rank, whether the group lies on one.
  // `transport` is what carries messages ("mpi", "tcp", "threads"); empty: not said.
  //   tp: size 2, coordinate 1, ranks 6 7, on machine 1, over mpi
  std::string Describe(const std::vector<int>& machines = {},
                       const std::string& transport = "") const;

 private:
  int rank_ = 0;
  std::vector<Axis> axes_;
};

}  // namespace stretto

#endif  // STRETTO_COMM_MESH_H_
