#include "tools/run/keepers.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tools/run/process.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kReady(30), kLeave(5);

// The port of "ready <port>"; 0 when the pipe ends or the time is over before it.
int ReadReady(int descriptor) {
  std::string text;
  const Clock::time_point deadline = Clock::now() + kReady;
  while (text.find('\n') == std::string::npos) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    struct pollfd watched = {.fd = descriptor, .events = POLLIN, .revents = 0};
    if (left <= 0 || (poll(&watched, 1, static_cast<int>(left)) <= 0 && errno != EINTR)) return 0;
    char part[256];
    const ssize_t n = read(descriptor, part, sizeof(part));
    if (n <= 0) return 0;
    text.append(part, static_cast<size_t>(n));
  }
  int port = 0;
  if (text.rfind("ready ", 0) != 0) return 0;
  return absl::SimpleAtoi(text.substr(6, text.find('\n') - 6), &port) ? port : 0;
}

}  // namespace

absl::Status Keepers::StartNode(size_t n) {
  const KeeperOptions& options = options_[0];
  Node& node = nodes_[n];
  std::vector<std::string> command = {options.program,
                                      "--job",
                                      options.job,
                                      "--node",
                                      absl::StrCat(n),
                                      "--nodes",
                                      absl::StrCat(nodes_.size()),
                                      "--peers"};
  std::string peers;
  for (const std::string& address : addresses()) {
    absl::StrAppend(&peers, peers.empty() ? "" : ",", address);
  }
  command.insert(command.end(), {peers, "--dir", options.directory});
  if (options.data > 0) command.insert(command.end(), {"--data", absl::StrCat(options.data)});
  if (options.parity > 0) command.insert(command.end(), {"--parity", absl::StrCat(options.parity)});
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("no pipe: ", std::strerror(errno)));
  }
  // They clean up behind themselves, so they are asked, also when this process is gone.
  absl::StatusOr<pid_t> pid = Spawn(command, {.output = ends[1], .parent_death = SIGTERM});
  close(ends[1]);
  if (!pid.ok()) {
    close(ends[0]);
    return pid.status();
  }
  if (node.output >= 0) close(node.output);
  node.pid = *pid;
  node.output = ends[0];
  const int port = ReadReady(ends[0]);
  if (port != node.port) {
    return absl::UnavailableError(
        absl::StrCat("keeper ", n, " (", options.program, ") ",
                     port == 0 ? absl::StrCat("did not become ready within ", kReady.count(), " s")
                               : absl::StrCat("listens on port ", port, ", not on ", node.port,
                                              " as its peers expect"),
                     "; see its messages, or use --keepers 0"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Keepers> Keepers::Start(const KeeperOptions& options) {
  Keepers keepers;
  keepers.options_.push_back(options);
  if (std::string& program = keepers.options_[0].program; program.empty()) {
    const std::filesystem::path beside =
        std::filesystem::path(OwnPath()).replace_filename("stretto-keeper");
    std::error_code ignored;
    program = std::filesystem::exists(beside, ignored) ? beside.string() : "stretto-keeper";
  }
  keepers.nodes_.resize(static_cast<size_t>(options.count));
  STRETTO_ASSIGN_OR_RETURN(const std::vector<int> ports,
                           FreePorts(static_cast<int>(options.count)));
  for (size_t n = 0; n < ports.size(); ++n) keepers.nodes_[n].port = ports[n];
  for (size_t n = 0; n < keepers.nodes_.size(); ++n) {
    STRETTO_RETURN_IF_ERROR(keepers.StartNode(n));
  }
  return keepers;
}

Keepers::~Keepers() {
  for (const Node& node : nodes_) {
    if (node.pid > 0) kill(node.pid, SIGTERM);
  }
  const Clock::time_point deadline = Clock::now() + kLeave;
  for (const Node& node : nodes_) {
    while (node.pid > 0 && waitpid(node.pid, nullptr, WNOHANG) == 0) {
      if (Clock::now() >= deadline) {
        kill(node.pid, SIGKILL);
        waitpid(node.pid, nullptr, 0);
        break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    if (node.output >= 0) close(node.output);
  }
}

int Keepers::Ended(pid_t pid) {
  for (size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].pid != pid) continue;
    nodes_[n].pid = -1;
    return static_cast<int>(n);
  }
  return -1;
}

absl::Status Keepers::Restart() {
  for (size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].pid < 0) STRETTO_RETURN_IF_ERROR(StartNode(n));
  }
  return absl::OkStatus();
}

std::vector<std::string> Keepers::addresses() const {
  std::vector<std::string> all;
  for (const Node& node : nodes_) all.push_back(absl::StrCat("127.0.0.1:", node.port));
  return all;
}

std::set<pid_t> Keepers::pids() const {
  std::set<pid_t> all;
  for (const Node& node : nodes_) {
    if (node.pid > 0) all.insert(node.pid);
  }
  return all;
}

}  // namespace stretto
