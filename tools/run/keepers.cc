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
#include "stretto/core/exit_code.h"
#include "tools/run/process.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kReady(30), kLeave(5);
constexpr int kLook = 50;  // milliseconds

// How a process has ended that is about to; it is collected. FAILED_PRECONDITION for wrong usage,
// and for a program that cannot be started.
absl::Status HowEnded(pid_t pid) {
  int status = 0;
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(1);
  pid_t ended;
  while ((ended = waitpid(pid, &status, WNOHANG)) == 0) {
    if (Clock::now() >= deadline) {
      return absl::UnavailableError("closed its output before it was ready");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (ended < 0) return absl::UnavailableError("ended before it was ready");  // others know how
  if (WIFSIGNALED(status)) {
    return absl::UnavailableError(
        absl::StrCat("was killed by ", SignalName(WTERMSIG(status)), " before it was ready"));
  }
  const int code = WEXITSTATUS(status);
  const std::string how = absl::StrCat("ended with code ", code, " before it was ready");
  return code == kExitUsage || code == kCannotRun || code == kNoProgram
             ? absl::FailedPreconditionError(how)
             : absl::UnavailableError(how);
}

}  // namespace

absl::Status Keepers::Launch(size_t n) {
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
  if (options.data >= 0) command.insert(command.end(), {"--data", absl::StrCat(options.data)});
  if (options.parity >= 0)
    command.insert(command.end(), {"--parity", absl::StrCat(options.parity)});
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
  node.said.clear();
  node.starting = true;
  node.deadline = Clock::now() + kReady;
  return absl::OkStatus();
}

absl::StatusOr<bool> Keepers::Look(Node& node, int milliseconds) {
  if (Clock::now() >= node.deadline) {
    return absl::DeadlineExceededError(
        absl::StrCat("did not become ready within ", kReady.count(), " s"));
  }
  struct pollfd watched = {.fd = node.output, .events = POLLIN, .revents = 0};
  if (poll(&watched, 1, milliseconds) <= 0) return false;
  char part[256];
  const ssize_t n = read(node.output, part, sizeof(part));
  if (n <= 0) return absl::UnavailableError("ended before it was ready");
  node.said.append(part, static_cast<size_t>(n));
  const size_t end = node.said.find('\n');
  if (end == std::string::npos) return false;
  int port = 0;
  if (node.said.rfind("ready ", 0) != 0 || !absl::SimpleAtoi(node.said.substr(6, end - 6), &port)) {
    return absl::InternalError("writes something else than \"ready PORT\"");
  }
  if (port != node.port) {
    return absl::InternalError(
        absl::StrCat("listens on port ", port, ", not on ", node.port, " as its peers expect"));
  }
  node.starting = false;
  return true;
}

std::string Keepers::Trouble(size_t n, const absl::Status& status) const {
  return absl::StrCat("keeper ", n, " (", options_[0].program, ") ", std::string(status.message()),
                      "; see its messages, or use --keepers 0");
}

absl::Status Keepers::StartNode(size_t n) {
  STRETTO_RETURN_IF_ERROR(Launch(n));
  Node& node = nodes_[n];
  absl::StatusOr<bool> ready = false;
  while (ready.ok() && !*ready) {
    if (asked_()) return absl::CancelledError("was not waited for");
    ready = Look(node, kLook);
  }
  if (ready.ok()) return absl::OkStatus();
  absl::Status why = ready.status();
  if (absl::IsUnavailable(why)) {
    why = HowEnded(node.pid);
    if (kill(node.pid, 0) != 0) node.pid = -1;
  }
  End({&node});  // else it would count as one that runs
  return absl::Status(absl::IsFailedPrecondition(why) ? why.code() : absl::StatusCode::kUnavailable,
                      Trouble(n, why));
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
    node->starting = false;
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
    nodes_[n].starting = false;
    return static_cast<int>(n);
  }
  return -1;
}

absl::Status Keepers::Restart() {
  for (size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].pid < 0) STRETTO_RETURN_IF_ERROR(Launch(n));
  }
  return absl::OkStatus();
}

absl::Status Keepers::Check() {
  absl::Status trouble;
  for (size_t n = 0; n < nodes_.size(); ++n) {
    Node& node = nodes_[n];
    if (!node.starting) continue;
    const absl::Status looked = Look(node, 0).status();
    if (looked.ok() || absl::IsUnavailable(looked)) continue;  // of its end Ended will hear
    kill(node.pid, SIGKILL);
    node.starting = false;
    trouble.Update(absl::UnavailableError(Trouble(n, looked)));
  }
  return trouble;
}

bool Keepers::ready() const {
  return std::none_of(nodes_.begin(), nodes_.end(), [](const Node& node) { return node.starting; });
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
