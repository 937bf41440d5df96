#include "tools/run/guard.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "src/observe/file.h"
#include "stretto/comm/world.h"
#include "stretto/observe/progress.h"
#include "tools/run/fate.h"
#include "tools/run/process.h"
#include "tools/run/stream.h"

namespace stretto {
namespace {

constexpr double kLook = 0.2;   // seconds between looks at what is requested
constexpr size_t kSaid = 2000;  // bytes of standard error that are kept for the report
// What the launcher's end becomes: a signal that nobody else sends.
const int kOrphaned = SIGRTMIN + 5;

class Events {
 public:
  Events(const std::string& directory, int rank)
      : descriptor_(open(EventsPath(directory, rank).c_str(),
                         O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644)) {}
  bool open_for_writing() const { return descriptor_ >= 0; }
  void Write(RankEvent event) {
    event.time = observe_internal::UnixSeconds();
    (void)observe_internal::WriteAll(descriptor_, "events", ToLine(event)).ok();
  }

 private:
  int descriptor_;
};

std::string RequestPath(const std::string& directory) { return directory + "/request"; }

}  // namespace

// In place and always as long, so that a full disk has room for it.
absl::Status WriteRequest(const std::string& directory, int signal) {
  const std::string path = RequestPath(directory);
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  const bool written =
      file >= 0 && observe_internal::WriteAll(file, path, absl::StrFormat("%3d\n", signal)).ok();
  const int error = errno;
  if (file >= 0) close(file);
  if (written) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("cannot write ", path, ": ", std::strerror(error), "; see --directory"));
}

int ReadRequest(const std::string& directory) {
  // Opened each time: network file systems look for what others wrote then.
  const int file = open(RequestPath(directory).c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  std::array<char, 4> text = {};
  const ssize_t n = read(file, text.data(), text.size());
  close(file);
  int signal = 0;
  const bool whole = n == static_cast<ssize_t>(text.size()) &&
                     absl::SimpleAtoi(absl::string_view(text.data(), text.size()), &signal);
  return whole && signal > 0 && signal < NSIG ? signal : 0;
}

int RunGuard(const GuardOptions& options, const std::vector<std::string>& command) {
  const auto fail = [](const std::string& what) {
    std::fprintf(stderr, "stretto-run: %s\n", what.c_str());
    return 1;
  };
  const absl::StatusOr<RankInfo> info = ResolveRank();
  if (!info.ok()) return fail(std::string(info.status().message()));
  Events events(options.directory, info->rank);
  if (!events.open_for_writing()) {
    return fail(absl::StrCat("rank ", info->rank, " cannot write ",
                             EventsPath(options.directory, info->rank), ": ", std::strerror(errno),
                             "; --directory must be a folder that all machines share"));
  }
  sigset_t signals;
  sigemptyset(&signals);
  for (const int s : {SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2, kOrphaned}) {
    sigaddset(&signals, s);
  }
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGCHLD, SIG_DFL);
  const int arrived = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  if (arrived < 0) return fail(absl::StrCat("signalfd failed: ", std::strerror(errno)));
  BecomeReaper();
  const pid_t launcher = getppid();
  prctl(PR_SET_PDEATHSIG, kOrphaned);
  if (getppid() != launcher) return fail("the launcher is gone");

  int error[2], output[2] = {-1, -1};
  if (pipe2(error, O_CLOEXEC) != 0 || (options.prefix && pipe2(output, O_CLOEXEC) != 0)) {
    return fail(absl::StrCat("no pipe for the output: ", std::strerror(errno)));
  }
  SpawnOptions spawn = {.environment = {{kProgressVariable, options.directory}},
                        .output = output[1],
                        .error = error[1],
                        .parent_death = SIGKILL};
  if (!options.keepers.empty()) {
    // The ranks of a node stand side by side.
    const size_t share =
        static_cast<size_t>(info->rank) * options.keepers.size() / static_cast<size_t>(info->size);
    spawn.environment.emplace_back("STRETTO_KEEPER", options.keepers[share]);
  }
  const absl::StatusOr<pid_t> started = Spawn(command, spawn);
  if (!started.ok()) return fail(std::string(started.status().message()));
  const pid_t program = *started;
  close(error[1]);
  if (output[1] >= 0) close(output[1]);
  std::array<char, 256> host = {};
  gethostname(host.data(), host.size() - 1);
  events.Write({.kind = RankEvent::Kind::kStarted, .pid = program, .host = host.data()});

  const std::string prefix = options.prefix ? absl::StrCat("[", info->rank, "] ") : "";
  Stream errors(error[0], STDERR_FILENO, prefix, kSaid);
  std::vector<Stream*> streams = {&errors};
  Stream outputs(output[0], STDOUT_FILENO, prefix, 0);
  if (options.prefix) streams.push_back(&outputs);

  int ended = 0;
  std::set<int> passed, requested;
  bool running = true;
  const auto pass_on = [&](int which) {
    if (which != SIGUSR2) events.Write({.kind = RankEvent::Kind::kAsked, .signal = which});
    kill(-program, which);
    passed.insert(which);
  };
  // All guards look at the same time, by the clock: the first rank that is asked may be gone soon,
  // and the others with it. A rank that writes much makes no looks of its own.
  int64_t looked = 0;
  while (running) {
    const double looks = observe_internal::UnixSeconds() / kLook;
    const double next = kLook * (std::floor(looks) + 1 - looks);
    std::vector<struct pollfd> watched = {{.fd = arrived, .events = POLLIN, .revents = 0}};
    for (const Stream* s : streams) {
      if (s->from() >= 0) watched.push_back({.fd = s->from(), .events = POLLIN, .revents = 0});
    }
    const int wait = static_cast<int>(std::ceil(1e3 * next));
    if (poll(watched.data(), watched.size(), wait) < 0 && errno != EINTR) break;
    for (Stream* s : streams) {
      if (s->from() >= 0) s->Pump();
    }
    struct signalfd_siginfo received;
    while (read(arrived, &received, sizeof(received)) == sizeof(received)) {
      const int which = static_cast<int>(received.ssi_signo);
      if (which == kOrphaned) {
        events.Write({.kind = RankEvent::Kind::kAsked, .signal = SIGKILL});
        kill(program, SIGKILL);
      } else if (which != SIGCHLD && requested.count(which) == 0) {
        // A launcher may bring late what was read already, to a rank that no longer listens.
        pass_on(which);
      }
    }
    const auto look = static_cast<int64_t>(observe_internal::UnixSeconds() / kLook);
    if (look != looked) {
      looked = look;
      const int request = ReadRequest(options.directory);
      if (request != 0 && requested.insert(request).second && passed.count(request) == 0) {
        pass_on(request);
      }
    }
    int status = 0;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG | WUNTRACED | WCONTINUED)) > 0;) {
      if (pid != program) continue;
      if (WIFSTOPPED(status)) {
        events.Write({.kind = RankEvent::Kind::kStopped, .signal = WSTOPSIG(status)});
      } else if (WIFCONTINUED(status)) {
        events.Write({.kind = RankEvent::Kind::kContinued});
      } else {
        ended = status;
        running = false;
      }
    }
  }
  for (Stream* s : streams) {
    if (s->from() >= 0) s->Pump();
    s->Flush();
  }
  RankEvent end = {.kind = RankEvent::Kind::kEnded, .said = errors.said()};
  if (WIFSIGNALED(ended)) {
    end.signal = WTERMSIG(ended);
  } else {
    end.code = WEXITSTATUS(ended);
  }
  events.Write(end);
  KillDescendants({});
  if (end.signal == 0) return end.code;
  // As a shell does it, so that the launcher sees what happened. Its core, if any, is written.
  signal(end.signal, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  prctl(PR_SET_DUMPABLE, 0);
  raise(end.signal);
  return 128 + end.signal;
}

}  // namespace stretto
