#include "src/comm/flight_dump.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "src/core/start_thread.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

// What a signal handler may reach has to be global. Never destroyed: the thread outlives main.
struct Dumper {
  std::mutex mutex;
  FlightRecorder* recorder = nullptr;  // guarded by mutex
  std::string directory;
  int rank = 0;
  int world_size = 0;
  bool running = false;
  int read_end = -1;
};

Dumper& Global() {
  static Dumper* dumper = new Dumper();
  return *dumper;
}

int write_end = -1;

void OnSignal(int) {
  const int saved = errno;
  const char byte = 1;
  [[maybe_unused]] const ssize_t written = write(write_end, &byte, 1);
  errno = saved;
}

void Loop() {
  Dumper& d = Global();
  char byte;
  while (true) {
    const ssize_t got = read(d.read_end, &byte, 1);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return;
    const std::lock_guard<std::mutex> lock(d.mutex);
    if (d.recorder == nullptr) continue;
    const absl::Status dumped = d.recorder->Dump(d.directory, d.rank, d.world_size);
    if (!dumped.ok()) LogError(std::string(dumped.message()));
  }
}

}  // namespace

void ForgetFlightDump(const FlightRecorder* recorder) {
  Dumper& d = Global();
  const std::lock_guard<std::mutex> lock(d.mutex);
  if (d.recorder == recorder) d.recorder = nullptr;
}

absl::Status InstallFlightDumpOnSignal(Communicator& communicator, const std::string& directory) {
  Dumper& d = Global();
  const std::lock_guard<std::mutex> lock(d.mutex);
  if (d.recorder != nullptr && d.recorder != &communicator.recorder()) {
    return absl::AlreadyExistsError(
        "flight dumps on SIGUSR2 are installed for another communicator of this process");
  }
  d.recorder = &communicator.recorder();
  d.directory = directory;
  d.rank = communicator.world().rank();
  d.world_size = communicator.world().size();
  if (d.running) return absl::OkStatus();
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    d.recorder = nullptr;
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot make a pipe for flight dumps: ", std::strerror(errno)));
  }
  fcntl(ends[1], F_SETFL, O_NONBLOCK);  // a handler must not block
  d.read_end = ends[0];
  absl::StatusOr<std::thread> thread = StartThread("flight dumps", Loop);
  if (!thread.ok()) {
    d.recorder = nullptr;
    close(ends[0]);
    close(ends[1]);
    return thread.status();
  }
  thread->detach();
  write_end = ends[1];
  d.running = true;
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGUSR2, &action, nullptr) != 0) {
    return absl::InternalError(absl::StrCat("cannot handle SIGUSR2: ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace stretto
