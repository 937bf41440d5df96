// The collectives against references computed on the spot, as one body that runs on threads, over
// TCP and under mpirun. Inputs depend on (rank, element) only, so every rank knows everybody's.
#ifndef STRETTO_TESTS_SUPPORT_COLLECTIVE_CASES_H_
#define STRETTO_TESTS_SUPPORT_COLLECTIVE_CASES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"

namespace stretto::testing {

// Bytes with a type.
struct Data {
  DType dtype = DType::kF32;
  std::vector<std::byte> bytes;

  Data() = default;
  Data(DType type, int64_t elements)
      : dtype(type), bytes(static_cast<std::size_t>(elements * SizeOf(type)), std::byte{0xA5}) {}
  int64_t elements() const { return static_cast<int64_t>(bytes.size()) / SizeOf(dtype); }
  Tensor tensor() { return Tensor::Of(bytes.data(), dtype, {elements()}); }
  Tensor Part(int64_t begin, int64_t count) { return tensor().Rows(begin, count); }
  bool operator==(const Data& o) const { return dtype == o.dtype && bytes == o.bytes; }
};

// What rank `rank` holds: values of mixed sign and size, so that the order of additions shows.
inline Data Values(DType dtype, int64_t elements, int rank, uint64_t salt) {
  // A cheap mixing function (splitmix64): the tests make a great many values.
  uint64_t state = salt * 1000003 + static_cast<uint64_t>(rank);
  const auto bits = [&state] {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  Data data(dtype, elements);
  for (int64_t i = 0; i < elements; ++i) {
    const uint64_t word = bits();
    const double value =
        (static_cast<double>(word >> 11) * 0x1p-53 - 0.5) * static_cast<double>(1 << (word % 20));
    switch (dtype) {
      case DType::kF64:
        data.tensor().as<double>()[i] = value;
        break;
      case DType::kF32:
        data.tensor().as<float>()[i] = static_cast<float>(value);
        break;
      case DType::kBF16:
        data.tensor().as<BFloat16>()[i] = BFloat16(static_cast<float>(value));
        break;
      case DType::kI32:
        data.tensor().as<int32_t>()[i] = static_cast<int32_t>(value * 8);
        break;
      case DType::kI64:
        data.tensor().as<int64_t>()[i] = static_cast<int64_t>(value * 8);
        break;
      default:
        data.bytes[static_cast<std::size_t>(i)] = static_cast<std::byte>(word);
        break;
    }
  }
  return data;
}

template <class T, class A>
void ReferenceAs(const std::vector<Data>& all, ReduceOp op, bool reversed, Data* out) {
  const std::size_t n = all.size();
  for (int64_t i = 0; i < out->elements(); ++i) {
    A sum{};
    for (std::size_t s = 0; s < n; ++s) {
      const Data& source = all[reversed ? n - 1 - s : s];
      const A value = static_cast<A>(reinterpret_cast<const T*>(source.bytes.data())[i]);
      if (s == 0) {
        sum = value;
      } else if (op == ReduceOp::kSum) {
        sum = sum + value;
      } else {
        sum = (op == ReduceOp::kMax) == (value > sum) ? value : sum;
      }
    }
    reinterpret_cast<T*>(out->bytes.data())[i] = static_cast<T>(sum);
  }
}

// The reduction in rank order; `reversed` is the negative control.
inline Data Reference(const std::vector<Data>& all, ReduceOp op, bool reversed = false) {
  Data out(all[0].dtype, all[0].elements());
  switch (out.dtype) {
    case DType::kF64:
      ReferenceAs<double, double>(all, op, reversed, &out);
      break;
    case DType::kF32:
      ReferenceAs<float, float>(all, op, reversed, &out);
      break;
    case DType::kBF16:
      ReferenceAs<BFloat16, float>(all, op, reversed, &out);
      break;
    case DType::kI32:
      ReferenceAs<int32_t, int32_t>(all, op, reversed, &out);
      break;
    default:
      ReferenceAs<int64_t, int64_t>(all, op, reversed, &out);
      break;
  }
  return out;
}

inline void Mix(const Data& data, uint64_t* hash) {
  for (std::byte b : data.bytes) *hash = (*hash ^ static_cast<uint64_t>(b)) * 1099511628211ull;
}

inline absl::Status Differs(const std::string& what) {
  return absl::DataLossError(absl::StrCat(what, ": the bits differ from the reference"));
}

inline Data Slice(const Data& d, int64_t begin, int64_t count) {
  Data out(d.dtype, count);
  std::copy_n(d.bytes.begin() + begin * SizeOf(d.dtype), out.bytes.size(), out.bytes.begin());
  return out;
}

// All collectives over `g` for one type and size; mixes the results into `hash`.
inline absl::Status CheckCollectives(Communicator& c, const Group& g, DType dtype, int64_t elements,
                                     uint64_t* hash) {
  const int n = g.size();
  const std::string what = absl::StrCat(Name(dtype), "[", elements, "] over ", n, " ranks");
  const uint64_t salt = static_cast<uint64_t>(elements) * 31 + static_cast<uint64_t>(dtype);
  std::vector<Data> whole;  // one tensor a rank
  std::vector<Data> wide;   // n parts a rank
  for (int r : g.ranks) {
    whole.push_back(Values(dtype, elements, r, salt));
    wide.push_back(Values(dtype, elements * n, r, salt + 1));
  }
  const std::size_t me = static_cast<std::size_t>(g.index);
  const bool reducible = dtype != DType::kU8;

  if (reducible) {
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      Data mine = whole[me];
      STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(g, mine.tensor(), op, "case")));
      if (!(mine == Reference(whole, op))) return Differs("all_reduce of " + what);
      Mix(mine, hash);
    }
    const Data sums = Reference(wide, ReduceOp::kSum);
    const Data expected = Slice(sums, g.index * elements, elements);
    Data output(dtype, elements);
    Data input = wide[me];
    STRETTO_RETURN_IF_ERROR(c.Wait(c.ReduceScatter(g, output.tensor(), input.tensor(), "case")));
    if (!(output == expected)) return Differs("reduce_scatter of " + what);
    if (!(input == wide[me])) return Differs("the input of reduce_scatter of " + what);
    Mix(output, hash);
    // In place.
    STRETTO_RETURN_IF_ERROR(c.Wait(
        c.ReduceScatter(g, input.Part(g.index * elements, elements), input.tensor(), "in place")));
    if (!(Slice(input, g.index * elements, elements) == expected)) {
      return Differs("reduce_scatter in place of " + what);
    }
  }

  Data gathered(dtype, elements * n);
  Data expected(dtype, elements * n);
  for (int p = 0; p < n; ++p) {
    const auto& part = whole[static_cast<std::size_t>(p)].bytes;
    std::copy(part.begin(), part.end(), expected.bytes.begin() + p * elements * SizeOf(dtype));
  }
  Data mine = whole[me];
  STRETTO_RETURN_IF_ERROR(c.Wait(c.AllGather(g, gathered.tensor(), mine.tensor(), "case")));
  if (!(gathered == expected)) return Differs("all_gather of " + what);
  Mix(gathered, hash);
  Data in_place(dtype, elements * n);
  std::copy(mine.bytes.begin(), mine.bytes.end(),
            in_place.bytes.begin() + g.index * elements * SizeOf(dtype));
  STRETTO_RETURN_IF_ERROR(c.Wait(
      c.AllGather(g, in_place.tensor(), in_place.Part(g.index * elements, elements), "in place")));
  if (!(in_place == expected)) return Differs("all_gather in place of " + what);

  for (const int root : {0, n - 1}) {
    Data data = g.index == root ? whole[me] : Data(dtype, elements);
    STRETTO_RETURN_IF_ERROR(c.Wait(c.Broadcast(g, data.tensor(), root, "case")));
    if (!(data == whole[static_cast<std::size_t>(root)])) return Differs("broadcast of " + what);
  }

  // Rank i sends i + 2 j (mod elements + 1) elements to rank j: uneven, some of them none.
  const auto count = [&](int from, int to) { return (from + 2 * to) * 37 % (elements + 1); };
  std::vector<int64_t> sends, receives;
  int64_t sent = 0, received = 0;
  for (int p = 0; p < n; ++p) {
    sends.push_back(count(g.index, p));
    receives.push_back(count(p, g.index));
    sent += sends.back();
    received += receives.back();
  }
  Data input = Values(dtype, sent, g.ranks[me], salt + 2);
  Data output(dtype, received);
  Data exchanged(dtype, received);
  std::size_t at = 0;
  for (int p = 0; p < n; ++p) {
    int64_t begin = 0, total = 0;
    for (int q = 0; q < n; ++q) {
      if (q < g.index) begin += count(p, q);
      total += count(p, q);
    }
    const Data theirs = Slice(Values(dtype, total, g.ranks[static_cast<std::size_t>(p)], salt + 2),
                              begin, count(p, g.index));
    if (!theirs.bytes.empty()) {
      std::memcpy(exchanged.bytes.data() + at, theirs.bytes.data(), theirs.bytes.size());
    }
    at += theirs.bytes.size();
  }
  STRETTO_RETURN_IF_ERROR(
      c.Wait(c.AllToAll(g, output.tensor(), receives, input.tensor(), sends, "case")));
  if (!(output == exchanged)) return Differs("all_to_all of " + what);
  Mix(output, hash);

  // Round the ring, two messages in flight each way.
  const int next = (g.index + 1) % n;
  const int previous = (g.index + n - 1) % n;
  Data first(dtype, elements), second(dtype, elements);
  const Ticket receive1 = c.Receive(g, first.tensor(), previous, "ring");
  const Ticket send1 = c.Send(g, mine.tensor(), next, "ring");
  Data other = Values(dtype, elements, g.ranks[me], salt + 3);
  const Ticket send2 = c.Send(g, other.tensor(), next, "ring");
  const Ticket receive2 = c.Receive(g, second.tensor(), previous, "ring");
  for (const Ticket t : {receive2, send1, receive1, send2}) STRETTO_RETURN_IF_ERROR(c.Wait(t));
  if (!(first == whole[static_cast<std::size_t>(previous)]) ||
      !(second == Values(dtype, elements, g.ranks[static_cast<std::size_t>(previous)], salt + 3))) {
    return Differs("send and receive of " + what);
  }
  return absl::OkStatus();
}

// Buckets, several operations in flight in two groups, and waits in another order than the posts.
inline absl::Status CheckManyInFlight(Communicator& c, const Group& g, const Group& sub,
                                      uint64_t* hash) {
  const int n = g.size();
  const std::vector<int64_t> sizes = {3, 1000, 0, 70001, 17};
  std::vector<Data> inputs, outputs, gathered, sums;
  std::vector<std::vector<Data>> everybody;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    everybody.emplace_back();
    for (int r : g.ranks) everybody[i].push_back(Values(DType::kF32, sizes[i] * n, r, 900 + i));
    inputs.push_back(everybody[i][static_cast<std::size_t>(g.index)]);
    outputs.emplace_back(DType::kF32, sizes[i]);
    gathered.emplace_back(DType::kF32, sizes[i] * n);
    sums.push_back(Reference(everybody[i], ReduceOp::kSum));
  }
  std::vector<Tensor> in, out, all;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    in.push_back(inputs[i].tensor());
    out.push_back(outputs[i].tensor());
    all.push_back(gathered[i].tensor());
  }
  std::vector<Data> extra, extra_expected;
  std::vector<Ticket> tickets;
  for (int k = 0; k < 9; ++k) {
    const Group& group = k % 2 == 0 ? g : sub;
    const int64_t elements = 1 + 40000 * (k % 3);
    std::vector<Data> of;
    for (int r : group.ranks)
      of.push_back(Values(DType::kBF16, elements, r, 700 + static_cast<uint64_t>(k)));
    extra.push_back(of[static_cast<std::size_t>(group.index)]);
    extra_expected.push_back(Reference(of, ReduceOp::kSum));
  }
  const Ticket bucket = c.ReduceScatterMany(g, out, in, "bucket");
  for (int k = 0; k < 9; ++k) {
    const Group& group = k % 2 == 0 ? g : sub;
    tickets.push_back(
        c.AllReduce(group, extra[static_cast<std::size_t>(k)].tensor(), ReduceOp::kSum, "extra"));
  }
  for (std::size_t k = tickets.size(); k-- > 0;) STRETTO_RETURN_IF_ERROR(c.Wait(tickets[k]));
  STRETTO_RETURN_IF_ERROR(c.Wait(bucket));
  STRETTO_RETURN_IF_ERROR(c.Wait(c.AllGatherMany(g, all, out, "bucket")));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (!(gathered[i] == sums[i])) return Differs(absl::StrCat("bucket item ", i));
    Mix(gathered[i], hash);
  }
  for (std::size_t k = 0; k < extra.size(); ++k) {
    if (!(extra[k] == extra_expected[k]))
      return Differs(absl::StrCat("operation ", k, " in flight"));
    Mix(extra[k], hash);
  }
  return absl::OkStatus();
}

// Everything; the hash of the results is the same for every transport.
inline absl::StatusOr<uint64_t> RunCollectiveCases(World& world, bool large) {
  Communicator c(world);
  uint64_t hash = 1469598103934665603ull;
  RankList mine;  // ranks of my parity, in descending order: any order is a ring
  for (int r = world.size() - 1; r >= 0; --r) {
    if (r % 2 == world.rank() % 2) mine.push_back(r);
  }
  STRETTO_ASSIGN_OR_RETURN(const Group half, c.MakeGroup("half", mine));
  for (const DType dtype :
       {DType::kF64, DType::kF32, DType::kBF16, DType::kI32, DType::kI64, DType::kU8}) {
    for (const int64_t elements :
         {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{1021}, int64_t{33331}}) {
      STRETTO_RETURN_IF_ERROR(CheckCollectives(c, c.all(), dtype, elements, &hash));
    }
    STRETTO_RETURN_IF_ERROR(CheckCollectives(c, half, dtype, 3001, &hash));
  }
  // Several segments on each lane.
  if (large) STRETTO_RETURN_IF_ERROR(CheckCollectives(c, c.all(), DType::kF32, 1300003, &hash));
  STRETTO_RETURN_IF_ERROR(CheckManyInFlight(c, c.all(), half, &hash));
  STRETTO_RETURN_IF_ERROR(c.WaitAll());
  return hash;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_COLLECTIVE_CASES_H_
