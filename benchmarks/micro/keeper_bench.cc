// Speed of keepers: how long snapshots take to encode, and a lost node to be rebuilt, with one
// keeper a node, all on this machine, each in a process of its own and over TCP.
//
// "encode" is from the order to the node's PROTECTED, the slowest node's; "commit" from the last
// seal to COMMITTED everywhere; "rebuild" from the order to PROTECTED. GB/s are of the bytes that
// a keeper then reads (docs/snapshots.md).
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/socket.h"
#include "stretto/core/exit_code.h"
#include "stretto/snapshot/keeper.h"
#include "stretto/snapshot/snapshotter.h"
#include "tools/arguments.h"

namespace {

using stretto::Tensor;

constexpr double kPatience = 120;  // seconds from one snapshot to the next

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Event {
  double time;
  int node;
  int64_t step;
  char what[16];
};

class Bench {
 public:
  Bench(int64_t bytes, int nodes, int parity, int threads, int64_t snapshots)
      : bytes_(bytes), nodes_(nodes), parity_(parity), threads_(threads), snapshots_(snapshots) {}
  ~Bench() {
    for (const pid_t keeper : keepers_) {
      if (keeper > 0) kill(keeper, SIGTERM);
      if (keeper > 0) waitpid(keeper, nullptr, 0);
    }
    std::filesystem::remove_all(folder_);
  }

  absl::Status Run() {
    if (pipe(events_) != 0 || mkdtemp(folder_.data()) == nullptr) {
      return absl::InternalError("no pipe or no folder for the keepers");
    }
    {
      std::vector<stretto::net::Fd> taken;
      for (int n = 0; n < nodes_; ++n) {
        int port = 0;
        STRETTO_ASSIGN_OR_RETURN(taken.emplace_back(), stretto::net::Listen("127.0.0.1", 0, &port));
        peers_.push_back(absl::StrCat("127.0.0.1:", port));
      }
    }
    for (int n = 0; n < nodes_; ++n) keepers_.push_back(Fork(n));
    for (int n = 0; n < nodes_; ++n) STRETTO_RETURN_IF_ERROR(WaitUntilItListens(n));
    STRETTO_RETURN_IF_ERROR(Train());
    ReadEvents();
    absl::PrintF("%-10s %8s %8s %8s\n", "snapshot", "encode", "GB/s", "commit");
    const double read = static_cast<double>(bytes_ * parity_);
    for (const int64_t step : steps_) {
      double encode = 0;
      for (int n = 0; n < nodes_; ++n) {
        encode = std::max(encode, At("PROTECTED", n, step) - At("encode", n, step));
      }
      const double commit = Last("COMMITTED", step) - Last("seal", step);
      absl::PrintF("%-10d %8.3f %8.2f %8.3f\n", step, encode, read / encode / 1e9, commit);
    }
    const int lost = nodes_ - 1;
    kill(keepers_[static_cast<size_t>(lost)], SIGKILL);
    waitpid(keepers_[static_cast<size_t>(lost)], nullptr, 0);
    const double start = Now();
    keepers_[static_cast<size_t>(lost)] = Fork(lost);
    STRETTO_RETURN_IF_ERROR(WaitUntilItListens(lost));
    seen_.clear();
    double restored = 0;
    STRETTO_RETURN_IF_ERROR(Restore(&restored));
    const double end = Now();
    ReadEvents();
    const double rebuild =
        At("PROTECTED", lost, steps_.back()) - At("rebuild", lost, steps_.back());
    const double read_to_rebuild = static_cast<double>(bytes_ * nodes_);
    absl::PrintF("rebuild %.3f s, %.2f GB/s; restore %.3f s; in all %.3f s\n", rebuild,
                 read_to_rebuild / rebuild / 1e9, restored, end - start);
    return absl::OkStatus();
  }

 private:
  pid_t Fork(int node) {
    const pid_t child = fork();
    if (child != 0) return child;
    prctl(PR_SET_PDEATHSIG, SIGTERM);  // however this program ends
    stretto::KeeperOptions options;
    options.job = absl::StrCat("keeper-bench-", getppid());
    options.token = "bench";
    options.node = node;
    options.nodes = nodes_;
    options.peers = peers_;
    options.parity = parity_;
    options.data = nodes_ - parity_;
    options.socket = Socket(node);
    if (threads_ > 0) options.threads = threads_;
    options.observer = [this, node](const stretto::KeeperEvent& event) {
      Event told{Now(), node, event.step, {}};
      std::strncpy(told.what, event.what, sizeof(told.what) - 1);
      [[maybe_unused]] const ssize_t written = write(events_[1], &told, sizeof(told));
    };
    auto keeper = stretto::Keeper::Start(std::move(options));
    if (!keeper.ok()) {
      absl::FPrintF(stderr, "%s\n", std::string(keeper.status().message()));
      _exit(1);
    }
    static stretto::Keeper* running = nullptr;
    running = keeper->get();
    signal(SIGTERM, [](int) { running->Stop(); });
    const bool ok = (*keeper)->Run().ok();
    keeper->reset();
    _exit(ok ? 0 : 1);
  }

  std::string Socket(int node) const { return absl::StrCat(folder_, "/", node); }

  template <class Body>
  absl::Status WithState(const Body& body) {
    return stretto::World::RunThreads(nodes_, [&](stretto::World& world) -> absl::Status {
      constexpr int64_t kTensors = 32;
      const int64_t rows = nodes_, columns = std::max<int64_t>(1, bytes_ / 4 / kTensors);
      std::vector<std::vector<float>> tensors(kTensors);
      stretto::StateRegistry registry;
      for (size_t t = 0; t < tensors.size(); ++t) {
        tensors[t].resize(static_cast<size_t>(columns), static_cast<float>(t));
        STRETTO_RETURN_IF_ERROR(registry.Add(
            {.name = absl::StrCat("w", t),
             .global_shape = {rows, columns},
             .first_row = world.rank(),
             .local = Tensor::Of(tensors[t].data(), stretto::DType::kF32, {1, columns})}));
      }
      const int cores = static_cast<int>(std::thread::hardware_concurrency());
      STRETTO_ASSIGN_OR_RETURN(
          const auto snapshots,
          stretto::Snapshotter::Create(world, registry,
                                       {.keeper = Socket(world.rank()),
                                        .token = "bench",
                                        .restart_threads = std::max(1, cores / nodes_)}));
      return body(world, tensors, *snapshots);
    });
  }

  // Steps until enough are committed; the first are passed over while memory is prepared.
  absl::Status Train() {
    return WithState([&](stretto::World& world, auto& tensors,
                         stretto::Snapshotter& snapshots) -> absl::Status {
      double progress = Now();
      absl::Status stuck;
      for (int64_t step = 1; static_cast<int64_t>(steps_.size()) < snapshots_; ++step) {
        for (auto& tensor : tensors) tensor[0] = static_cast<float>(step);
        STRETTO_RETURN_IF_ERROR(world.Barrier("step"));
        snapshots.Capture(step, [] { return "{}"; });
        snapshots.Wait();
        STRETTO_RETURN_IF_ERROR(WaitUntilIdle(world.rank()));
        STRETTO_RETURN_IF_ERROR(world.Barrier("idle"));
        if (world.rank() == 0) {
          STRETTO_ASSIGN_OR_RETURN(const std::string text, stretto::AskKeeper(Socket(0), "bench"));
          const bool there = stretto::CommittedStep(text) == step;
          if (there) steps_.push_back(step);
          if (there) progress = Now();
          if (Now() - progress > kPatience) {
            stuck = absl::ResourceExhaustedError(absl::StrCat(
                "no snapshot was committed within ", kPatience, " s; the keeper says: ", text));
          }
        }
        STRETTO_RETURN_IF_ERROR(world.Agree("counting", stuck));
      }
      return absl::OkStatus();
    });
  }

  absl::Status WaitUntilItListens(int node) const {
    while (!stretto::AskKeeper(Socket(node), "bench").ok()) {
      if (waitpid(keepers_[static_cast<size_t>(node)], nullptr, WNOHANG) != 0) {
        return absl::UnavailableError(absl::StrCat("the keeper of node ", node, " has ended"));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return absl::OkStatus();
  }

  absl::Status WaitUntilIdle(int node) const {
    while (true) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      STRETTO_ASSIGN_OR_RETURN(const std::string text, stretto::AskKeeper(Socket(node), "bench"));
      if (text.find("WRITING") == text.npos && text.find("SEALED") == text.npos &&
          text.find("PROTECTED") == text.npos) {
        return absl::OkStatus();
      }
    }
  }

  absl::Status Restore(double* seconds) {
    return WithState(
        [&](stretto::World& world, auto& tensors, stretto::Snapshotter& snapshots) -> absl::Status {
          const double start = Now();
          STRETTO_RETURN_IF_ERROR(snapshots.Restore());
          if (world.rank() == 0) *seconds = Now() - start;
          return tensors.back()[0] == static_cast<float>(steps_.back())
                     ? absl::OkStatus()
                     : absl::DataLossError("another step came back");
        });
  }

  void ReadEvents() {
    const Event last{};
    [[maybe_unused]] const ssize_t written = write(events_[1], &last, sizeof(last));
    for (Event event; read(events_[0], &event, sizeof(event)) == sizeof(event);) {
      if (event.what[0] == '\0') return;
      seen_[{event.what, event.node, event.step}] = event.time;
    }
  }
  double At(const std::string& what, int node, int64_t step) const {
    const auto found = seen_.find({what, node, step});
    return found == seen_.end() ? 0 : found->second;
  }
  double Last(const std::string& what, int64_t step) const {
    double last = 0;
    for (int n = 0; n < nodes_; ++n) last = std::max(last, At(what, n, step));
    return last;
  }

  const int64_t bytes_;
  const int nodes_, parity_, threads_;
  const int64_t snapshots_;
  std::string folder_ = "/tmp/stretto-keeper-bench-XXXXXX";
  int events_[2] = {-1, -1};
  std::vector<std::string> peers_;
  std::vector<pid_t> keepers_;
  std::vector<int64_t> steps_;  // committed
  std::map<std::tuple<std::string, int, int64_t>, double> seen_;
};

}  // namespace

int main(int argc, char** argv) {
  int64_t bytes = int64_t{256} << 20, nodes = 2, parity = 1, threads = 0, snapshots = 4;
  stretto::Arguments arguments(
      "stretto-keeper-bench",
      "Speed of keepers: encoding snapshots and rebuilding a lost node, with one keeper a node,\n"
      "all on this machine and over TCP.",
      "");
  arguments.Add("bytes", "N", "of a node's snapshot", &bytes);
  arguments.Add("nodes", "N", "keepers", &nodes);
  arguments.Add("parity", "M", "parity blocks of their code", &parity);
  arguments.Add("threads", "N", "of a keeper; 0: as stretto-keeper", &threads);
  arguments.Add("snapshots", "N", "to measure", &snapshots);
  absl::Status status = arguments.Parse(argc, argv);
  if (arguments.help()) return stretto::EndProgram(stretto::PrintText(arguments.Help()));
  const auto check = [&](const char* name, int64_t value, int64_t least, int64_t most) {
    if (!status.ok() || (value >= least && value <= most)) return;
    status = absl::InvalidArgumentError(
        absl::StrCat("--", name, " must be ", least, " to ", most, ", not ", value));
  };
  check("bytes", bytes, 4096, int64_t{1} << 40);
  check("nodes", nodes, 2, 16);
  check("parity", parity, 1, nodes - 1);
  check("threads", threads, 0, 64);
  check("snapshots", snapshots, 1, 1000);
  // State, and in each keeper two slots and their parity.
  const double needed = static_cast<double>(bytes * nodes * (3 + 2 * parity));
  const double there =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (status.ok() && needed > there) {
    status = absl::InvalidArgumentError(
        absl::StrFormat("%d nodes of %d bytes need %.1f GB of memory, this machine has %.1f GB; "
                        "lower --bytes or --nodes",
                        nodes, bytes, needed / 1e9, there / 1e9));
  }
  if (!status.ok()) return stretto::EndProgram(status);
  absl::PrintF("%d nodes of %d bytes, %d + %d\n", nodes, bytes, nodes - parity, parity);
  return stretto::EndProgram(Bench(bytes, static_cast<int>(nodes), static_cast<int>(parity),
                                   static_cast<int>(threads), snapshots)
                                 .Run());
}
