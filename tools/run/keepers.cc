#include "tools/run/keepers.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tools/run/process.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kReady(30), kLeave(5);

// The port of "ready <port>". DEADLINE_EXCEEDED when it does not come in time, CANCELLED when it is
// not waited for any more, UNAVAILABLE when the pipe ends before it or something else comes.
absl::StatusOr<int> ReadReady(int descriptor, const std::function<bool()>& asked) {
  constexpr int64_t kLook = 50;  // milliseconds
  std::string text;
  const Clock::time_point deadline = Clock::now() + kReady;
  while (text.find('\n') == std::string::npos) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    struct pollfd watched = {.fd = descriptor, .events = POLLIN, .revents = 0};
    if (left <= 0) {
      return absl::DeadlineExceededError(
          absl::StrCat("did not become ready within ", kReady.count(), " s"));
    }
    if (asked()) return absl::CancelledError("was not waited for");
    if (poll(&watched, 1, static_cast<int>(std::min<int64_t>(left, kLook))) <= 0) continue;
    char part[256];
    const ssize_t n = read(descriptor, part, sizeof(part));
    if (n <= 0) return absl::UnavailableError("ended before it was ready");
    text.append(part, static_cast<size_t>(n));
  }
  int port = 0;
  if (text.rfind("ready ", 0) != 0 ||
      !absl::SimpleAtoi(text.substr(6, text.find('\n') - 6), &port)) {
    return absl::UnavailableError("writes something else than \"ready PORT\"");
  }
  return port;
}

// How a process has ended that is about to; it is collected.
std::string HowEnded(pid_t pid) {
  int status = 0;
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(1);
  pid_t ended;
  while ((ended = waitpid(pid, &status, WNOHANG)) == 0) {
    if (Clock::now() >= deadline) return "closed its output before it was ready";
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (ended < 0) return "ended before it was ready";  // somebody else was told how
  return WIFSIGNALED(status)
             ? absl::StrCat("was killed by ", SignalName(WTERMSIG(status)), " before it was ready")
             : absl::StrCat("ended with code ", WEXITSTATUS(status), " before it was ready");
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
  const absl::StatusOr<int> port = ReadReady(ends[0], asked_);
  if (port.ok() && *port == node.port) return absl::OkStatus();
  if (absl::IsCancelled(port.status())) return port.status();
  std::string why(port.status().message());
  if (port.ok()) {
    why = absl::StrCat("listens on port ", *port, ", not on ", node.port, " as its peers expect");
  } else if (absl::IsUnavailable(port.status())) {
    const std::string how = HowEnded(node.pid);
    if (kill(node.pid, 0) != 0) {
      node.pid = -1;
      why = how;
    }
  }
  End({&node});  // else it would count as one that runs
  return absl::UnavailableError(absl::StrCat("keeper ", n, " (", options.program, ") ", why,
                                             "; see its messages, or use --keepers 0"));
}

absl::StatusOr<Keepers> Keepers::Start(const KeeperOptions& options, std::function<bool()> asked) {
  Keepers keepers;
  keepers.asked_ = std::move(asked);
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

void Keepers::End(const std::vector<Node*>& nodes) {
  for (const Node* node : nodes) {
    if (node->pid <= 0) continue;
    kill(node->pid, SIGTERM);
    kill(node->pid, SIGCONT);  // who is stopped cannot clean up
  }
  const Clock::time_point deadline = Clock::now() + kLeave;
  for (Node* node : nodes) {
    while (node->pid > 0 && waitpid(node->pid, nullptr, WNOHANG) == 0) {
      if (Clock::now() >= deadline) {
        kill(node->pid, SIGKILL);
        waitpid(node->pid, nullptr, 0);
        break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    node->pid = -1;
    if (node->output >= 0) close(node->output);
    node->output = -1;
  }
}

Keepers::~Keepers() {
  std::vector<Node*> all;
  for (Node& node : nodes_) all.push_back(&node);
  End(all);
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
