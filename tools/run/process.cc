#include "tools/run/process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

struct Relation {
  pid_t parent = 0;
  char state = '?';
};

// Of all processes; those that ended while they were read are left out.
std::map<pid_t, Relation> AllProcesses() {
  std::map<pid_t, Relation> all;
  std::error_code error;
  std::filesystem::directory_iterator entry("/proc", error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    int pid = 0;
    if (!absl::SimpleAtoi(entry->path().filename().string(), &pid)) continue;
    std::ifstream file(entry->path() / "stat");
    std::string text;
    std::getline(file, text);
    // The name in parentheses may hold anything.
    const size_t end = text.rfind(')');
    if (end == std::string::npos) continue;
    std::istringstream rest(text.substr(end + 1));
    Relation relation;
    if (rest >> relation.state >> relation.parent) all[pid] = relation;
  }
  return all;
}

}  // namespace

absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& command, const SpawnOptions& options) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = getpid();
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid < 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot start ", command[0], ": ",
                                                     std::strerror(errno),
                                                     "; raise the limit on processes (ulimit -u)"));
  }
  if (pid > 0) {
    setpgid(pid, pid);  // also by the child: whoever comes first
    return pid;
  }
  setpgid(0, 0);
  if (options.parent_death != 0) {
    prctl(PR_SET_PDEATHSIG, options.parent_death);
    if (getppid() != parent) _exit(1);
  }
  const int nothing = open("/dev/null", O_RDONLY);
  if (nothing >= 0) dup2(nothing, STDIN_FILENO);
  if (options.output >= 0) dup2(options.output, STDOUT_FILENO);
  if (options.error >= 0) dup2(options.error, STDERR_FILENO);
  for (const auto& [name, value] : options.environment) setenv(name.c_str(), value.c_str(), 1);
  for (int s = 1; s < NSIG; ++s) signal(s, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execvp(argv[0], argv.data());
  const int error = errno;
  std::fprintf(stderr, "stretto-run: cannot start %s: %s\n", argv[0], std::strerror(error));
  std::fflush(stderr);
  _exit(error == EACCES ? kCannotRun : kNoProgram);
}

std::set<pid_t> Descendants(pid_t ancestor) {
  const std::map<pid_t, Relation> all = AllProcesses();
  std::set<pid_t> found = {ancestor};
  for (size_t before = 0; before != found.size();) {
    before = found.size();
    for (const auto& [pid, relation] : all) {
      if (found.count(relation.parent) != 0) found.insert(pid);
    }
  }
  found.erase(ancestor);
  for (auto it = found.begin(); it != found.end();) {
    const auto process = all.find(*it);
    it = process != all.end() && process->second.state == 'Z' ? found.erase(it) : std::next(it);
  }
  return found;
}

void OpenStandardStreams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) < 0) open("/dev/null", O_RDWR);  // the lowest that is free
  }
}

void BecomeReaper() { prctl(PR_SET_CHILD_SUBREAPER, 1); }

std::set<pid_t> KillDescendants(const std::set<pid_t>& spared) {
  std::set<pid_t> left;
  for (int round = 0; round < 250; ++round) {
    left = Descendants(getpid());
    for (const pid_t pid : spared) {
      for (const pid_t theirs : Descendants(pid)) left.erase(theirs);
      left.erase(pid);
    }
    for (const pid_t pid : left) kill(pid, SIGKILL);
    if (left.empty()) break;
    const struct timespec pause = {0, 20'000'000};
    nanosleep(&pause, nullptr);
    for (const pid_t pid : left) waitpid(pid, nullptr, WNOHANG);  // only children's ends come
  }
  return left;
}

absl::StatusOr<std::vector<int>> FreePorts(int count) {
  // Held until all are chosen, so that they differ.
  std::vector<int> sockets, ports;
  absl::Status status;
  for (int i = 0; i < count && status.ok(); ++i) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* const general = reinterpret_cast<struct sockaddr*>(&address);
    if (fd < 0 || bind(fd, general, size) != 0 || getsockname(fd, general, &size) != 0) {
      status =
          absl::UnavailableError(absl::StrCat("no free port on 127.0.0.1: ", std::strerror(errno)));
    }
    if (fd >= 0) sockets.push_back(fd);
    ports.push_back(ntohs(address.sin_port));
  }
  for (const int fd : sockets) close(fd);
  if (!status.ok()) return status;
  return ports;
}

int64_t ProcessLimit() {
  int64_t limit = std::numeric_limits<int>::max();
  struct rlimit own;
  if (getrlimit(RLIMIT_NPROC, &own) == 0 && own.rlim_cur != RLIM_INFINITY) {
    limit = std::min(limit, static_cast<int64_t>(own.rlim_cur));
  }
  for (const char* path : {"/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"}) {
    int64_t most = 0;
    if (std::ifstream(path) >> most && most > 0) limit = std::min(limit, most);
  }
  return limit;
}

std::string SignalName(int signal) {
  const char* name = sigabbrev_np(signal);
  return name != nullptr ? absl::StrCat("SIG", name) : absl::StrCat("signal ", signal);
}

std::string OwnPath() {
  std::error_code error;
  const std::string path = std::filesystem::read_symlink("/proc/self/exe", error).string();
  return error ? "stretto-run" : path;
}

}  // namespace stretto
