// A rank that ends or stops while another one's kernels wait for it: that one ends its kernels,
// names the rank and returns, also when its host thread waits for a stream, or for room in one, and
// not for the communicator. Starts two ranks of itself, on two GPUs, without MPI. --only TEXT:
// the fault of this name, else those with this in their name.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/log.h"

extern char** environ;

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kTimeout = std::chrono::seconds(20);  // also of the set-up
constexpr int kSaidSo = 3;  // exit status of a rank that was told what is wrong

constexpr char kFullQueue[] = "stop with a full queue";  // the other one submits ahead, and waits
constexpr char kLaunches[] = "stop under launches";      // ... launches more than the device takes
constexpr char kSetup[] = "exit after ";  // ... so many milliseconds, of set-up or not
// In front of one of those, in place of NCCL's sums: gathers by copy engines through windows, in
// memory that the ranks share, and sums.
constexpr char kCopied[] = "copied ", kShared[] = "shared ", kSummed[] = "summed ";
constexpr const char* kFaults[] = {
    "exit",
    "stop",
    "stop under synchronize",
    kFullQueue,
    kLaunches,
    "exit after 500",
    "exit after 1000",
    "exit after 2000",
    "copied exit",
    "copied stop under synchronize",
    "copied stop with a full queue",
    "copied stop under launches",
    "shared exit",
    "shared stop under synchronize",
    "summed exit",
    "summed stop with a full queue",
};

// What the ranks do, by the words in front of a fault.
enum class Way : uint8_t { kNccl, kCopied, kShared, kSummed };
Way TakeWay(std::string* fault) {
  for (const auto& [prefix, way] :
       {std::pair(kCopied, Way::kCopied), std::pair(kShared, Way::kShared),
        std::pair(kSummed, Way::kSummed)}) {
    if (!fault->starts_with(prefix)) continue;
    *fault = fault->substr(std::strlen(prefix));
    return way;
  }
  return Way::kNccl;
}

absl::Status Victim(World& world, const std::string& fault, Way way) {
  const Device device = Device::Cuda(world.rank());
  STRETTO_ASSIGN_OR_RETURN(const Arena arena, Arena::Create(device, "test", 5 << 20));
  const Tensor data = Tensor::Of(arena.data(), DType::kF32, {1 << 20}, device);
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(device));
  if (world.rank() == 1 && fault.starts_with(kSetup)) {
    std::thread([ms = std::atoi(fault.c_str() + sizeof(kSetup) - 1)] {
      std::this_thread::sleep_for(std::chrono::milliseconds(ms));
      _exit(9);
    }).detach();
  }
  Communicator c(world);
  STRETTO_RETURN_IF_ERROR(c.UseDevice(device));
  if (way != Way::kNccl) {
    STRETTO_ASSIGN_OR_RETURN(std::string why, c.UseCopyEngines(c.all()));
    if (why.empty() && way == Way::kShared) {
      STRETTO_ASSIGN_OR_RETURN(why, c.ShareMemory(c.all(), data, /*layout=*/1));
    }
    if (!why.empty()) return absl::UnavailableError(why);
  }
  const Tensor half = data.Rows(world.rank() * (data.rows() / 2), data.rows() / 2);
  if (fault.starts_with(kSetup) && world.rank() == 1) std::this_thread::sleep_for(kTimeout);
  Ticket last = 0;
  for (int round = 0; round < 100; ++round) {
    if (world.rank() == 1 && round == 20) {
      if (fault == "exit") _exit(9);
      raise(SIGSTOP);
    }
    const Event after = stream->Record();
    const Ticket ticket =
        way == Way::kNccl     ? c.AllReduce(c.all(), data, ReduceOp::kMax, "grad bucket", after)
        : way == Way::kSummed ? c.ReduceScatter(c.all(), half, data, "grad bucket", after)
                              : c.AllGather(c.all(), data, half, "grad bucket", after);
    if (fault == "stop under synchronize") {
      STRETTO_RETURN_IF_ERROR(c.Wait(*stream, ticket));
      STRETTO_RETURN_IF_ERROR(stream->Synchronize());
    } else if (fault == kLaunches && world.rank() == 0) {
      STRETTO_RETURN_IF_ERROR(c.Wait(*stream, ticket));
      for (int copy = 0; copy < 200; ++copy) {
        CopyBytes(*stream, arena.data() + (4 << 20), arena.data() + (4 << 20) + 4096, 4096);
      }
    } else if (fault != kFullQueue || world.rank() == 1) {
      STRETTO_RETURN_IF_ERROR(c.Wait(ticket));
    }
    last = ticket;
  }
  STRETTO_RETURN_IF_ERROR(c.Wait(*stream, last));
  return stream->Synchronize();
}

int VictimMain(std::string fault) {
  const Way way = TakeWay(&fault);
  SetLogLevel(LogLevel::kError);
  WorldOptions options;
  options.timeout = kTimeout;
  auto world = World::FromEnvironment(options);
  const absl::Status status = world.ok() ? Victim(**world, fault, way) : world.status();
  const std::string message(status.message());
  std::fprintf(stderr, "  rank %s: %s\n", std::getenv("RANK"), message.c_str());
  // Number 21 is the first one that rank 1 does not enter.
  const char* const operation = way == Way::kNccl     ? "all_reduce"
                                : way == Way::kSummed ? "reduce_scatter"
                                                      : "all_gather";
  const std::string missed = absl::StrCat(operation, "(all) seq 21 [grad bucket]");
  const bool said = message.find("rank 1 ") != std::string::npos &&
                    (fault.starts_with(kSetup) || message.find(missed) != std::string::npos);
  std::fflush(stderr);
  // Rank 0 would wait for the other one to leave the control plane.
  _exit(said ? kSaidSo : 1);
}

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  int port = 0;
  if (fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0) {
    port = ntohs(address.sin_port);
  }
  if (fd >= 0) close(fd);
  return port;
}

pid_t Start(const char* program, const std::string& fault, int rank, int port) {
  std::vector<std::string> variables = {
      absl::StrCat("RANK=", rank),
      absl::StrCat("LOCAL_RANK=", rank),
      "WORLD_SIZE=2",
      "LOCAL_WORLD_SIZE=2",
      "MASTER_ADDR=127.0.0.1",
      absl::StrCat("MASTER_PORT=", port),
  };
  std::vector<char*> environment;
  for (std::string& v : variables) environment.push_back(v.data());
  for (char** v = environ; *v != nullptr; ++v) {
    bool ours = false;
    for (const std::string& mine : variables) {
      ours = ours || std::strncmp(*v, mine.c_str(), mine.find('=') + 1) == 0;
    }
    if (!ours) environment.push_back(*v);
  }
  environment.push_back(nullptr);
  std::string name = program, argument = fault;
  char* arguments[] = {name.data(), argument.data(), nullptr};
  pid_t pid = -1;
  if (posix_spawn(&pid, "/proc/self/exe", nullptr, nullptr, arguments, environment.data()) != 0) {
    return -1;
  }
  return pid;
}

// Whether rank 0 ended in time, knowing what was wrong with rank 1.
bool Survives(const char* program, const char* fault) {
  std::fprintf(stderr, "%s\n", fault);
  const int port = FreePort();
  pid_t ranks[2] = {};
  for (int r = 0; r < 2; ++r) ranks[r] = Start(program, fault, r, port);
  // Set-up, the time-out and its diagnosis.
  const Clock::time_point end = Clock::now() + 2 * kTimeout + std::chrono::seconds(20);
  int status = 0;
  bool ended = false;
  while (!ended && Clock::now() < end && ranks[0] > 0) {
    ended = waitpid(ranks[0], &status, WNOHANG) == ranks[0];
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  for (int r = ended ? 1 : 0; r < 2; ++r) {
    if (ranks[r] <= 0) continue;
    kill(ranks[r], SIGKILL);
    waitpid(ranks[r], nullptr, 0);
  }
  if (!ended) {
    std::fprintf(stderr, "FAILED: rank 0 hangs\n");
  } else if (!WIFEXITED(status) || WEXITSTATUS(status) != kSaidSo) {
    std::fprintf(stderr, "FAILED: rank 0 does not say what happened to rank 1\n");
    ended = false;
  }
  return ended;
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  using namespace stretto;
  if (argc == 2) return VictimMain(argv[1]);
  const char* const some = argc == 3 && std::strcmp(argv[1], "--only") == 0 ? argv[2] : "";
  const absl::StatusOr<DeviceInfo> info = DescribeDevice(Device::Cuda(1));
  if (!info.ok()) {
    std::printf("SKIP: %s\n", std::string(info.status().message()).c_str());
    return 0;
  }
  bool one = false, any = false, sound = true;
  for (const char* fault : kFaults) one = one || std::strcmp(fault, some) == 0;
  for (const char* fault : kFaults) {
    if (one ? std::strcmp(fault, some) != 0 : std::strstr(fault, some) == nullptr) continue;
    any = true;
    sound = Survives(argv[0], fault) && sound;
  }
  if (!any) std::fprintf(stderr, "FAILED: no fault has '%s' in its name\n", some);
  return any && sound ? 0 : 1;
}
