#include "tools/run/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "src/comm/socket.h"
#include "src/observe/file.h"
#include "stretto/core/exit_code.h"
#include "tools/files.h"
#include "tools/run/flight.h"
#include "tools/run/guard.h"
#include "tools/run/incident.h"
#include "tools/run/process.h"
#include "tools/run/words.h"

namespace stretto {
namespace {

using observe_internal::UnixSeconds;

constexpr double kTick = 0.1;        // seconds between looks
constexpr int kKeeperEnds = 10;      // that are made good
constexpr double kAfterRanks = 0.5;  // seconds in which a launcher follows its ranks
constexpr double kFarewell = 3;      // seconds in which ranks leave by themselves, and dump records

constexpr double kAskAgain = 1;  // seconds
constexpr double kPatience = 2;  // seconds with whoever reads what we say
constexpr int kStopSignals[] = {SIGTERM, SIGUSR1, SIGHUP, SIGINT};

double Monotonic() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whoever reads it may have stopped: ranks have to be watched and asked to save all the same, and
// what counts stands in reports, too. False where it is not said.
bool Say(const std::string& text) {
  static bool stuck = false;
  stuck = !WriteUnlessStuck(STDERR_FILENO, absl::StrCat("stretto-run: ", text, "\n"),
                            stuck ? 0 : kPatience);
  return !stuck;
}

bool AllEnded(const std::vector<RankFate>& fates) {
  return std::all_of(fates.begin(), fates.end(), [](const RankFate& fate) {
    return fate.state == RankFate::State::kExited || fate.state == RankFate::State::kKilled;
  });
}

class Supervisor {
 public:
  explicit Supervisor(const SupervisorOptions& options)
      : options_(options), policy_(options.restart) {}
  int Run();

 private:
  enum class Ending { kDone, kRequested, kFailed, kInterrupted };

  absl::Status SetUp();
  // Whether a signal that asks it to stop has come and waits to be taken.
  bool Asked() const;
  void TakeSignals();
  // Passes on what the launcher says, for at most `seconds` and until a signal comes.
  void PassOn(double seconds);
  // The same of its last words, which are kept also where nobody takes them.
  void PassOnTheRest();
  // Handles signals and ends of children until `until` holds or `seconds` are over or it is asked
  // to stop at once.
  void WaitFor(double seconds, const std::function<bool()>& until);
  void Collect();
  absl::Status StartJob();
  Ending Watch();
  void EndJob(bool stalled);
  Ending Judge(bool stalled);
  void AskToSave();
  // Fills in what the restart after the newest incident has shown so far.
  void FollowUp(const std::vector<RankProgress>& progress);
  void Report(Ending ending);
  absl::Status Write(const Incident& incident) const;
  void Rewrite() const;  // the newest
  std::string FolderOf(int64_t number) const {
    return absl::StrFormat("%s/incident-%04d", options_.directory, number);
  }
  int Finish(int code, const std::string& how);
  int EndBeforeRanks();  // it was asked to
  // Whether somebody has removed what guards and ranks write into.
  bool IsGone() const {
    return access(live_.c_str(), F_OK) != 0 && (errno == ENOENT || errno == ENOTDIR);
  }

  SupervisorOptions options_;
  RestartPolicy policy_;
  std::string live_;  // where the job's files are while it runs
  std::optional<Keepers> keepers_;
  int keeper_ends_ = 0;
  std::set<pid_t> earlier_;  // children from before
  std::optional<Job> job_;
  sigset_t signals_ = {};
  int arrived_ = -1;  // readable while one of them waits to be taken

  int stop_signal_ = 0;       // asked to stop and save
  bool asked_ = false;        // the ranks were told
  double save_deadline_ = 0;  // Monotonic, as the next
  double ask_again_ = 0;
  bool request_failed_ = false;  // which is said once
  bool interrupted_ = false;
  double noticed_ = 0;  // Unix seconds

  std::vector<Incident> incidents_;
  bool reported_ = false;   // the newest
  bool following_ = false;  // the newest incident is not complete
  double gone_ = 0;         // Unix seconds when nothing of the failed job was left
  Decision decision_;
  int failed_code_ = 0;
};

absl::Status Supervisor::SetUp() {
  earlier_ = Descendants(getpid());
  std::error_code error;
  std::filesystem::create_directories(options_.directory, error);
  if (error) {
    return absl::UnavailableError(absl::StrCat("cannot make the directory ", options_.directory,
                                               ": ", error.message(), "; see --directory"));
  }
  options_.directory = std::filesystem::absolute(options_.directory).string();
  sigemptyset(&signals_);
  for (const int s : {SIGCHLD, SIGTERM, SIGUSR1, SIGINT}) sigaddset(&signals_, s);
  struct sigaction hang_up;  // nohup has it ignored
  sigaction(SIGHUP, nullptr, &hang_up);
  if (hang_up.sa_handler != SIG_IGN) sigaddset(&signals_, SIGHUP);
  signal(SIGCHLD, SIG_DFL);
  sigprocmask(SIG_BLOCK, &signals_, nullptr);
  arrived_ = signalfd(-1, &signals_, SFD_CLOEXEC | SFD_NONBLOCK);
  if (arrived_ < 0) {
    return absl::ResourceExhaustedError(absl::StrCat("signalfd failed: ", std::strerror(errno)));
  }
  signal(SIGPIPE, SIG_IGN);
  BecomeReaper();
  if (options_.keepers.count > 0) {
    // Keepers and ranks know each other by it.
    setenv("STRETTO_JOB_TOKEN", net::RandomToken().c_str(), /*overwrite=*/0);
    STRETTO_ASSIGN_OR_RETURN(keepers_,
                             Keepers::Start(options_.keepers, [this] { return Asked(); }));
  }
  return absl::OkStatus();
}

bool Supervisor::Asked() const {
  sigset_t pending;
  if (sigpending(&pending) != 0) return false;
  return std::any_of(std::begin(kStopSignals), std::end(kStopSignals), [&](int s) {
    return sigismember(&pending, s) == 1 && sigismember(&signals_, s) == 1;
  });
}

void Supervisor::Collect() {
  int status = 0;
  for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
    if (job_) job_->Ended(pid, status);
    const int keeper = keepers_ ? keepers_->Ended(pid) : -1;
    if (keeper >= 0) {
      const bool again = ++keeper_ends_ <= kKeeperEnds;
      Say(absl::StrCat("keeper ", keeper, " has ended",
                       again ? "; it starts again" : ", too often to be started again"));
      absl::Status started = again ? keepers_->Restart() : absl::OkStatus();
      while (!started.ok()) {
        Say(std::string(started.message()));
        if (++keeper_ends_ > kKeeperEnds) break;
        started = keepers_->Restart();
      }
    }
  }
  if (!keepers_) return;
  if (const absl::Status ready = keepers_->Check(); !ready.ok()) {
    Say(std::string(ready.message()));
  }
}

void Supervisor::PassOn(double seconds) {
  const auto ready = [&](int descriptor, short events) {
    struct pollfd watched[] = {{.fd = arrived_, .events = POLLIN, .revents = 0},
                               {.fd = descriptor, .events = events, .revents = 0}};
    return poll(watched, 2, static_cast<int>(std::ceil(1e3 * seconds))) > 0 &&
           watched[0].revents == 0 && watched[1].revents != 0;
  };
  // Whoever reads it may be slow. Then the launcher has to wait, but not who watches it.
  if (ready(job_ ? job_->words().from() : -1, POLLIN) &&
      (job_->words().muted() || ready(STDERR_FILENO, POLLOUT))) {
    job_->words().Pump(kPiece);
  }
}

void Supervisor::PassOnTheRest() {
  Stream& words = job_->words();
  while (IsReady(words.from(), POLLIN, 0)) {
    if (!words.muted() && !IsReady(STDERR_FILENO, POLLOUT, kPatience)) words.Mute();
    if (!words.Pump(kPiece)) break;
  }
  words.EndLine();
}

void Supervisor::TakeSignals() {
  const double end = Monotonic() + kTick;
  const struct timespec none = {};
  int s = -1;
  for (double left; (s = sigtimedwait(&signals_, nullptr, &none)) < 0;) {
    if ((left = end - Monotonic()) <= 0) break;
    PassOn(left);
  }
  Collect();
  if (s == SIGTERM || s == SIGUSR1 || s == SIGHUP) {
    const bool said = stop_signal_ != 0 ||
                      Say(absl::StrCat("got ", SignalName(s), ": the job is to save and end"));
    // Ranks that wait for room could not save.
    if (!said && job_) job_->words().Mute();
    stop_signal_ = s;
  } else if (s == SIGINT) {
    if (!interrupted_) Say("got SIGINT: the job is ended");
    interrupted_ = true;
  }
}

void Supervisor::WaitFor(double seconds, const std::function<bool()>& until) {
  const double deadline = Monotonic() + seconds;
  while (!until() && Monotonic() < deadline && !interrupted_) TakeSignals();
}

absl::Status Supervisor::StartJob() {
  std::error_code error;
  std::filesystem::remove_all(live_, error);
  // A name of its own: by that of the start before another machine may still find what was there.
  live_ = absl::StrCat(options_.directory, "/live-", getpid(), "-", policy_.restarts());
  std::filesystem::remove_all(live_, error);
  std::filesystem::create_directories(options_.directory, error);
  if (mkdir(live_.c_str(), 0700) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot make the directory ", live_, ": ",
                                               std::strerror(errno), "; see --directory"));
  }
  STRETTO_RETURN_IF_ERROR(WriteRequest(live_, 0));
  if (keepers_) {
    // Not as an argument, which everybody can read.
    const int token =
        open((live_ + "/token").c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    const absl::Status written =
        observe_internal::WriteAll(token, live_ + "/token", std::getenv("STRETTO_JOB_TOKEN"));
    if (token >= 0) close(token);
    STRETTO_RETURN_IF_ERROR(written);
  }
  asked_ = request_failed_ = false;
  STRETTO_ASSIGN_OR_RETURN(job_,
                           Job::Start(options_.launch, policy_.ranks(), policy_.restarts(), live_,
                                      keepers_ ? keepers_->addresses() : std::vector<std::string>(),
                                      [this] { return Asked(); }));
  return absl::OkStatus();
}

void Supervisor::AskToSave() {
  // mpirun passes SIGUSR1 on to all ranks; SIGTERM would make it end them.
  if (!asked_) {
    job_->Signal(SIGUSR1);
    save_deadline_ = Monotonic() + options_.save;
    ask_again_ = Monotonic() + kAskAgain;
  }
  asked_ = true;
}

Supervisor::Ending Supervisor::Watch() {
  std::vector<double> beats;
  bool started = false;
  double changed = Monotonic(), ended = 0;
  while (true) {
    TakeSignals();
    if (interrupted_) {
      EndJob(false);
      return Ending::kInterrupted;
    }
    if (stop_signal_ != 0) AskToSave();
    const std::vector<RankProgress> progress = job_->Progress();
    FollowUp(progress);
    if (!job_->running()) return Judge(false);
    // A stopped rank may go on: a debugger, a person. That nothing moves is what counts.
    const std::vector<RankFate> fates = job_->Fates();
    started = started || std::any_of(fates.begin(), fates.end(), [](const RankFate& f) {
                return f.state != RankFate::State::kUnknown;
              });
    // An mpirun that has not started its ranks yet passes nothing on, and some never do. Signals
    // come first: they reach all ranks before one leaves, so that none is asked when it no longer
    // listens.
    const bool unasked = std::any_of(fates.begin(), fates.end(), [](const RankFate& f) {
      return f.asked == 0 &&
             (f.state == RankFate::State::kUnknown || f.state == RankFate::State::kRunning);
    });
    if (asked_ && unasked && Monotonic() > ask_again_) {
      const absl::Status requested = WriteRequest(live_, SIGUSR1);
      if (!requested.ok() && !request_failed_) {
        Say(absl::StrCat(requested.message(),
                         "; ranks save only if the launcher passes the signal on"));
      }
      request_failed_ = !requested.ok();
      ask_again_ = Monotonic() + kAskAgain;
    }
    const Cause::Kind trouble = FindCause(fates, kSaved).kind;
    if (trouble != Cause::Kind::kUnknown && trouble != Cause::Kind::kStopped) {
      noticed_ = UnixSeconds();
      EndJob(false);
      return Judge(false);
    }
    const bool over = AllEnded(fates);
    if (!over) ended = 0;
    if (over && ended == 0) ended = Monotonic();
    if (over && Monotonic() - ended > kAfterRanks) {
      EndJob(false);
      return Judge(false);
    }
    std::vector<double> now;
    bool stepped = false, any = false;
    for (const RankProgress& p : progress) {
      now.push_back(p.beat + p.met);
      stepped = stepped || p.first_step > 0;
      any = any || p.met > 0;
    }
    if (now != beats) changed = Monotonic();
    beats = std::move(now);
    const double limit = stepped ? options_.stall : options_.stall_start;
    // Without its directory nothing is known of ranks.
    const bool idle = !started && !IsGone();
    const bool stalled = (any || idle) && limit > 0 && Monotonic() - changed > limit;
    const bool late = asked_ && Monotonic() > save_deadline_;
    if (stalled || late) {
      noticed_ = UnixSeconds();
      Say(stalled && idle
              ? absl::StrFormat("the launcher has started no rank for %g s (--stall-start)", limit)
          : stalled ? absl::StrFormat("no sign of life of any rank for %g s", limit)
                    : absl::StrFormat("the job did not save and end within %g s", options_.save));
      EndJob(true);
      return Judge(true);
    }
  }
}

void Supervisor::EndJob(bool stalled) {
  // mpirun waits for as long as ranks may take to end, also when they have ended.
  const auto gone = [&] { return !job_->running() || AllEnded(job_->Fates()); };
  const std::optional<JobFacts> facts = ReadJobFacts(live_);
  if (stalled && facts) {
    // Ranks that hang still answer this with their flight records.
    const double asked = UnixSeconds();
    job_->Signal(SIGUSR2);
    WriteRequest(live_, SIGUSR2).IgnoreError();  // without it a launcher decides
    std::vector<std::string> records;
    for (const RankFate& fate : job_->Fates()) {
      if (fate.state != RankFate::State::kRunning) continue;
      records.push_back(absl::StrCat(facts->flight_directory, "/flight-rank", fate.rank, ".json"));
    }
    WaitFor(kFarewell, [&] {
      return std::all_of(records.begin(), records.end(), [&](const std::string& path) {
        struct stat info;
        return stat(path.c_str(), &info) == 0 &&
               static_cast<double>(info.st_mtim.tv_sec) >= std::floor(asked);
      });
    });
  } else if (!stalled) {
    WaitFor(kFarewell, gone);
  }
  if (!gone()) job_->Signal(SIGTERM);
  WaitFor(options_.launch.grace, gone);
  WaitFor(kAfterRanks, [&] { return !job_->running(); });
  std::set<pid_t> spared = earlier_;
  if (keepers_) spared.merge(keepers_->pids());
  // Ends that are collected here belong to a job that is over.
  const std::set<pid_t> left = KillDescendants(spared);
  PassOnTheRest();
  if (!left.empty()) Say(absl::StrCat("process ", *left.begin(), " does not end, even by SIGKILL"));
  Collect();
}

Supervisor::Ending Supervisor::Judge(bool stalled) {
  if (noticed_ == 0) noticed_ = UnixSeconds();
  std::set<pid_t> spared = earlier_;
  if (keepers_) spared.merge(keepers_->pids());
  KillDescendants(spared);  // what a rank that is gone left behind
  PassOnTheRest();
  gone_ = UnixSeconds();
  const std::vector<RankProgress> progress = job_->Progress();
  FollowUp(progress);
  if (following_) Rewrite();

  Incident incident;
  incident.fates = job_->Fates();
  incident.cause = FindCause(incident.fates, kSaved);
  bool done = true, saved = false;
  const bool gone = IsGone();
  if (gone) {
    Say(absl::StrCat(live_,
                     " was removed while the job ran, so that only the launcher's end is known"));
    if (!stalled && !interrupted_ && !job_->running() && job_->signal() == 0) {
      if (job_->code() == 0) return Ending::kDone;
      if (job_->code() == kSaved) return Ending::kRequested;
    }
  }
  bool started = gone || std::any_of(progress.begin(), progress.end(),
                                     [](const RankProgress& p) { return p.beat > 0 || p.met > 0; });
  for (const RankFate& fate : incident.fates) {
    started = started || fate.state != RankFate::State::kUnknown;
    const bool left = fate.state == RankFate::State::kExited;
    done = done && left && fate.code == 0;
    saved = saved || (left && fate.code == kSaved);
  }
  Cause& cause = incident.cause;
  if (cause.kind == Cause::Kind::kUnknown && !stalled) {
    if (done) return Ending::kDone;
    if (saved || stop_signal_ != 0) return saved ? Ending::kRequested : Ending::kInterrupted;
    cause.code = job_->code();
    cause.signal = job_->signal();
    const bool ended = std::any_of(incident.fates.begin(), incident.fates.end(), [](const auto& f) {
      return f.state == RankFate::State::kExited && f.asked == 0;
    });
    if (!gone && !ended && (cause.code != 0 || cause.signal != 0 || !started)) {
      cause.kind = Cause::Kind::kLauncher;
      cause.started = started;
    }
  }
  incident.ranks = job_->ranks();
  incident.restarts = policy_.restarts();
  incident.noticed = noticed_;
  double last_sign = 0;
  for (const RankProgress& p : progress) {
    if (p.step >= 0) incident.last_step = std::max(incident.last_step.value_or(0), p.step);
    last_sign = std::max(last_sign, p.beat);
  }
  const std::optional<JobFacts> facts = ReadJobFacts(live_);
  std::vector<FlightNote> notes;
  std::vector<std::string> records;
  if (facts) {
    for (int rank = 0; rank < job_->ranks(); ++rank) {
      const std::string path = absl::StrCat(facts->flight_directory, "/flight-rank", rank, ".json");
      struct stat info;
      // Of this job, not of one before it.
      if (stat(path.c_str(), &info) != 0 ||
          static_cast<double>(info.st_mtim.tv_sec) +
                  1e-9 * static_cast<double>(info.st_mtim.tv_nsec) <
              job_->started()) {
        continue;
      }
      const absl::StatusOr<std::string> text = ReadTextFile(path);
      std::optional<FlightNote> note = text.ok() ? ParseFlight(*text) : std::nullopt;
      if (!note || note->rank != rank) continue;
      records.push_back(path);
      incident.flights[rank] = *note;
      notes.push_back(*std::move(note));
    }
  }
  if (cause.kind == Cause::Kind::kUnknown && stalled && !started) {
    cause.kind = Cause::Kind::kLauncher;
    cause.hung = true;
  }
  if (cause.kind == Cause::Kind::kUnknown && stalled) {
    cause.kind = Cause::Kind::kHung;
    cause.time = last_sign;
    cause.ranks = Behind(notes, job_->ranks(), "all");
    // With the data axis alone its group holds all ranks, too.
    if (cause.ranks.empty() && facts && facts->dp * facts->cp == job_->ranks()) {
      cause.ranks = Behind(notes, job_->ranks(), "dp");
    }
  }
  if (cause.time > 0) incident.detect = std::max(noticed_ - cause.time, 0.0);
  incident.end = gone_ - noticed_;

  // Its folder takes what the job has left.
  std::error_code ignored;
  std::filesystem::create_directories(options_.directory, ignored);
  bool made = false;
  do {
    ++incident.number;
    made = mkdir(FolderOf(incident.number).c_str(), 0755) == 0;
  } while (!made && errno == EEXIST);
  const int not_made = errno;
  const std::string folder = FolderOf(incident.number);
  for (const std::string& path : records) {
    std::filesystem::copy_file(path, folder + "/" + std::filesystem::path(path).filename().string(),
                               ignored);
  }

  Failure failure;
  failure.what = Describe(cause);
  if (cause.kind == Cause::Kind::kExited) failure.exit_code = cause.code;
  if (cause.kind == Cause::Kind::kLauncher && cause.code > 125) failure.exit_code = cause.code;
  failure.step = incident.last_step;
  failure.started = started;
  std::string quoted;
  if (cause.kind == Cause::Kind::kLauncher || cause.kind == Cause::Kind::kUnknown) {
    incident.launcher = LastLines(job_->words().said());
  }
  if (cause.kind == Cause::Kind::kLauncher && !started) {
    if (cause.signal == 0) failure.said = WithoutNumbers(incident.launcher);
    const std::string telling = Telling(incident.launcher);
    quoted = telling.empty() ? ", and said nothing" : absl::StrCat(" (\"", telling, "\")");
  }
  if (cause.kind == Cause::Kind::kKilled || cause.kind == Cause::Kind::kStopped) {
    failure.lost = cause.ranks;
  }
  failed_code_ = failure.exit_code;
  if (stop_signal_ != 0) {
    decision_ = {.reason = "it was asked to stop"};
  } else {
    decision_ = policy_.OnFailure(failure, facts, Monotonic());
  }
  incident.restarting = decision_.restart;
  incident.decision =
      decision_.restart
          ? absl::StrFormat("restart %d with %d %s in %g s%s%s", policy_.restarts(),
                            decision_.ranks, decision_.ranks == 1 ? "rank" : "ranks",
                            decision_.delay, decision_.reason.empty() ? "" : "; ", decision_.reason)
          : absl::StrCat("no restart: ", decision_.reason);
  std::filesystem::rename(live_, folder + "/ranks", ignored);
  const absl::Status written =
      made ? Write(incident)
           : absl::UnavailableError(absl::StrCat(folder, ": ", std::strerror(not_made)));
  Say(absl::StrCat(
      Describe(cause, gone ? "" : When(incident.last_step)), quoted, "; ", incident.decision,
      written.ok()
          ? absl::StrCat("; see ", folder, "/report.txt")
          : absl::StrCat("; no report (", absl::StripSuffix(written.message(), "."), ")")));
  reported_ = written.ok();
  incidents_.push_back(std::move(incident));
  following_ = decision_.restart;
  return stop_signal_ != 0 ? Ending::kInterrupted : Ending::kFailed;
}

absl::Status Supervisor::Write(const Incident& incident) const {
  const std::string folder = FolderOf(incident.number);
  for (const auto& [name, text] :
       {std::pair<std::string, std::string>("report.json", ToJson(incident)),
        {"report.txt", ToText(incident)}}) {
    STRETTO_RETURN_IF_ERROR(observe_internal::ReplaceFile(folder + "/" + name, text));
  }
  return absl::OkStatus();
}

void Supervisor::Rewrite() const {
  const absl::Status written = Write(incidents_.back());
  if (!written.ok() && reported_) Say(std::string(written.message()));
}

void Supervisor::FollowUp(const std::vector<RankProgress>& progress) {
  if (!following_) return;
  Incident& incident = incidents_.back();
  double met = 0, restored = 0, stepped = 0;
  bool all_met = true, all_restored = true, all_stepped = true;
  for (const RankProgress& p : progress) {
    all_met = all_met && p.met > 0;
    all_restored = all_restored && p.restored > 0;
    all_stepped = all_stepped && p.first_step > 0;
    met = std::max(met, p.met);
    restored = std::max(restored, p.restored);
    stepped = std::max(stepped, p.first_step);
    if (p.restored_step >= 0) incident.restored_step = p.restored_step;
  }
  if (all_met) incident.start = met - job_->started();
  if (all_met && all_restored) incident.load = restored - met;
  if (!all_stepped || !all_restored) return;
  incident.first_step = stepped - restored;
  following_ = false;
  Rewrite();
  const std::optional<int64_t> steps = incident.StepsLost();
  const std::optional<double> seconds = incident.SecondsLost();
  Say(absl::StrCat(
      "the job goes on from step ", *incident.restored_step, ": ",
      steps ? absl::StrCat(*steps) : std::string("an unknown number of"),
      steps && *steps == 1 ? " step" : " steps", " and ",
      seconds ? absl::StrFormat("%.1f", *seconds) : std::string("an unknown number of"),
      " s lost"));
}

int Supervisor::Finish(int code, const std::string& how) {
  if (following_) Rewrite();
  std::error_code ignored;
  std::filesystem::remove_all(live_, ignored);
  if (incidents_.empty()) std::filesystem::remove(options_.directory, ignored);  // when empty
  keepers_.reset();
  KillDescendants(earlier_);  // what keepers have left
  Say(absl::StrCat(how, "; ", History(incidents_)));
  return code;
}

int Supervisor::EndBeforeRanks() {
  if (!interrupted_ && stop_signal_ == 0) TakeSignals();
  if (interrupted_) return Finish(kInterrupted, "interrupted");
  return Finish(kSaved, "asked to stop while no rank ran: what is saved stays");
}

int Supervisor::Run() {
  const absl::Status ready = SetUp();
  if (absl::IsCancelled(ready)) return EndBeforeRanks();
  if (!ready.ok()) {
    KillDescendants(earlier_);
    Say(std::string(ready.message()));
    return ExitCodeOf(ready);
  }
  while (true) {
    noticed_ = 0;
    // Ranks that find none would fail.
    const auto ready_or_asked = [this] {
      return !keepers_ || keepers_->ready() || stop_signal_ != 0;
    };
    while (!ready_or_asked() && !interrupted_) WaitFor(1, ready_or_asked);
    if (interrupted_ || stop_signal_ != 0) return EndBeforeRanks();
    const absl::Status started = StartJob();
    if (absl::IsCancelled(started)) return EndBeforeRanks();
    if (!started.ok()) return Finish(ExitCodeOf(started), std::string(started.message()));
    if (following_) incidents_.back().back_off = job_->started() - gone_;
    const Ending ending = Watch();
    if (following_ && ending != Ending::kFailed) Rewrite();
    switch (ending) {
      case Ending::kDone:
        return Finish(kDone, "the job is done");
      case Ending::kRequested:
        return Finish(kSaved, "the job was asked to stop and has saved");
      case Ending::kInterrupted:
        if (interrupted_) return Finish(kInterrupted, "interrupted");
        return Finish(kNotSaved, "the job was asked to stop and ended without saving");
      case Ending::kFailed:
        break;
    }
    if (!decision_.restart) {
      const std::vector<int>& fatal = options_.restart.fatal_codes;
      const bool is_fatal = std::find(fatal.begin(), fatal.end(), failed_code_) != fatal.end();
      return Finish(is_fatal && failed_code_ != 0 ? failed_code_ : kGaveUp,
                    "gave up: " + decision_.reason);
    }
    WaitFor(decision_.delay, [&] { return stop_signal_ != 0; });
    if (interrupted_ || stop_signal_ != 0) return EndBeforeRanks();
  }
}

}  // namespace

int Supervise(const SupervisorOptions& options) { return Supervisor(options).Run(); }

}  // namespace stretto
