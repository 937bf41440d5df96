// The CPU side of stretto-doctor.
#include <cblas.h>
#include <dirent.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#ifdef STRETTO_WITH_MPI
#define OMPI_SKIP_MPICXX 1
#include <mpi.h>
#endif

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/observe/memory.h"
#include "tools/doctor.h"

namespace stretto {
namespace {

std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The value behind "key   : " in a file of such lines; empty when there is none.
std::string Field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

// Processors that the container's quota is worth; a negative number without one.
double CpuQuota() {
  double quota = 0, period = 0;
  const std::string unified = ReadText("/sys/fs/cgroup/cpu.max");  // "150000 100000"
  if (std::sscanf(unified.c_str(), "%lf %lf", &quota, &period) == 2 && period > 0) {
    return quota / period;
  }
  quota = std::atof(ReadText("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str());
  period = std::atof(ReadText("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str());
  return quota > 0 && period > 0 ? quota / period : -1;
}

void CheckCores(Report& report) {
  const long machine = sysconf(_SC_NPROCESSORS_ONLN);
  cpu_set_t set;
  CPU_ZERO(&set);
  const long mine = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : machine;
  const double quota = CpuQuota();
  const std::string model = Field("/proc/cpuinfo", "model name");
  std::string text = mine == machine ? absl::StrCat(machine) : absl::StrCat(mine, " of ", machine);
  absl::StrAppend(&text, machine == 1 ? " processor" : " processors");
  if (!model.empty()) absl::StrAppend(&text, ", ", model);
  const nlohmann::ordered_json values = {{"processors", machine}, {"usable", mine}};
  if (quota > 0 && quota < static_cast<double>(mine) - 0.5) {
    report.Note("processors",
                absl::StrFormat("%s, but the container may use the time of %.1f only; use at most "
                                "that many ranks x runtime.threads, or raise its limit",
                                text, quota),
                values);
  } else if (mine < machine) {
    report.Note("processors",
                absl::StrCat(text,
                             " may be used by this process (taskset, or the launcher's "
                             "binding); with mpirun, --bind-to none lifts it"),
                values);
  } else {
    report.Ok("processors", text, values);
  }
}

#if defined(__x86_64__)
// x86-64-v1 to v4 as far as the kernels care; the levels are those of the x86-64 psABI.
int MachineLevel() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 1;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2")) {
    return 2;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512cd")) {
    return 3;
  }
  return 4;
}

void CheckVectorUnits(Report& report) {
  constexpr const char* kUnits[] = {"SSE2", "SSE4.2", "AVX2", "AVX-512"};
  const std::string built = STRETTO_CPU_ARCH;
  const int level = MachineLevel();
  const std::string has = absl::StrCat(kUnits[level - 1], " (x86-64-v", level, ")");
  int needed = 0;
  if (built == "x86-64") needed = 1;
  if (built.rfind("x86-64-v", 0) == 0) needed = std::atoi(built.c_str() + 8);
  const nlohmann::ordered_json values = {{"level", level}, {"built_for", built}};
  if (needed == 0) {
    report.Note("vector units",
                absl::StrCat("the machine has ", has, "; the CPU kernels were built for ", built,
                             " and run on such processors only"),
                values);
  } else if (needed > level) {
    report.Problem(
        "vector units",
        absl::StrCat("the machine has ", has, ", but the CPU kernels were built for ", built,
                     " and would end with an illegal instruction; configure with "
                     "-DSTRETTO_CPU_ARCH=x86-64-v",
                     level),
        values);
  } else if (level == 4 && needed < 4) {
    report.Ok("vector units",
              absl::StrCat(has, "; the CPU kernels were built for ", built,
                           ", -DSTRETTO_CPU_ARCH=x86-64-v4 would use all of them"),
              values);
  } else {
    report.Ok("vector units", absl::StrCat(has, "; the CPU kernels were built for ", built),
              values);
  }
}
#else
void CheckVectorUnits(Report& report) {
  report.Note("vector units",
              "this is no x86-64 processor: the CPU kernels run without vector code of their own, "
              "several times slower");
}
#endif

void CheckMemory(Report& report) {
  constexpr int64_t kLittle = int64_t{2} << 30;
  const int64_t total =
      std::strtoll(Field("/proc/meminfo", "MemTotal").c_str(), nullptr, 10) * 1024;
  const int64_t available = AvailableMemory();
  const nlohmann::ordered_json values = {{"total_bytes", total}, {"available_bytes", available}};
  if (available < 0) {
    report.Note("memory",
                "the system does not say how much is available (/proc/meminfo); the check of a "
                "run's plan against it does not happen",
                values);
    return;
  }
  const std::string text = absl::StrCat(SizeText(available), " available of ", SizeText(total));
  if (available < kLittle) {
    report.Note("memory",
                absl::StrCat(text,
                             "; end other programs, or check with stretto-plan "
                             "what a run needs"),
                values);
  } else {
    report.Ok("memory", text, values);
  }
}

// What a command prints (both streams); empty when it cannot be run.
std::string OutputOf(const std::string& command) {
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return "";
  std::string output;
  std::array<char, 4096> buffer;
  for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    output.append(buffer.data(), n);
  }
  return pclose(pipe) == 0 ? output : "";
}

// "4.1.4" out of "mpirun (Open MPI) 4.1.4" or "Open MPI v4.1.4, package: ...".
std::string FirstVersion(const std::string& text) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (std::isdigit(static_cast<unsigned char>(text[i])) == 0) continue;
    const size_t end = text.find_first_not_of("0123456789.", i);
    const std::string number = text.substr(i, end - i);
    if (number.find('.') != std::string::npos) return number;
    if (end == std::string::npos) break;
    i = end;
  }
  return "";
}

#ifdef STRETTO_WITH_MPI
void CheckMpi(Report& report) {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);  // allowed before MPI_Init
  const std::string library = text;
  const bool open_mpi = absl::StrContains(library, "Open MPI");
  const std::string version = FirstVersion(library);
  const std::string linked = absl::StrCat(open_mpi ? "Open MPI " : "an MPI library ", version);
  const std::string launcher = OutputOf("mpirun --version");
  const std::string launcher_version = FirstVersion(launcher);
  const nlohmann::ordered_json values = {{"library", version}, {"mpirun", launcher_version}};
  if (launcher_version.empty()) {
    report.Note("mpi",
                absl::StrCat(linked,
                             " is linked, but there is no mpirun in PATH: only single "
                             "ranks and TCP (RANK, WORLD_SIZE, MASTER_ADDR) work; install "
                             "openmpi-bin"),
                values);
  } else if (open_mpi && (!absl::StrContains(launcher, "Open MPI") ||
                          launcher_version.substr(0, launcher_version.find('.')) !=
                              version.substr(0, version.find('.')))) {
    report.Problem(
        "mpi",
        absl::StrCat("the program is linked with ", linked, " but mpirun in PATH is ",
                     absl::StrContains(launcher, "Open MPI") ? "Open MPI" : "another MPI's", " ",
                     launcher_version,
                     ", under which every rank would run alone; "
                     "put the mpirun of the linked library first in PATH"),
        values);
  } else if (!open_mpi) {
    report.Note("mpi", absl::StrCat(linked, " is linked; Open MPI is what is tested"), values);
  } else if (geteuid() == 0 && std::getenv("OMPI_ALLOW_RUN_AS_ROOT") == nullptr) {
    report.Note("mpi",
                absl::StrCat(linked,
                             "; mpirun refuses to start as root without "
                             "--allow-run-as-root, which scripts/mpirun.sh gives it"),
                values);
  } else {
    report.Ok("mpi", linked, values);
  }
}
#else
void CheckMpi(Report& report) {
  report.Note("mpi",
              "this program was built without MPI: ranks run over TCP (RANK, WORLD_SIZE, "
              "MASTER_ADDR) or as threads; for mpirun install libopenmpi-dev and openmpi-bin, and "
              "configure again");
}
#endif

// Ranks of one machine exchange through files there.
void CheckSharedMemory(Report& report) {
  constexpr int64_t kLittle = int64_t{256} << 20;
  struct statvfs fs;
  if (statvfs("/dev/shm", &fs) != 0) {
    report.Problem("shared memory",
                   "/dev/shm is missing, and MPI and NCCL need it between the ranks of a machine; "
                   "mount a tmpfs there");
    return;
  }
  const auto unit = static_cast<int64_t>(fs.f_frsize);
  const int64_t total = unit * static_cast<int64_t>(fs.f_blocks);
  const int64_t available = unit * static_cast<int64_t>(fs.f_bavail);
  const std::string text =
      absl::StrCat(SizeText(available), " free of ", SizeText(total), " in /dev/shm");
  const nlohmann::ordered_json values = {{"total_bytes", total}, {"free_bytes", available}};
  if (available < kLittle) {
    report.Note("shared memory",
                absl::StrCat(text,
                             ", which is little for several ranks; remove old files there, "
                             "or start the container with --shm-size=1g or --ipc=host"),
                values);
  } else {
    report.Ok("shared memory", text, values);
  }
}

rlim_t Limit(decltype(RLIMIT_CORE) which) {
  struct rlimit limit = {};
  return getrlimit(which, &limit) == 0 ? limit.rlim_cur : RLIM_INFINITY;
}

bool HasInfiniBand() {
  DIR* folder = opendir("/sys/class/infiniband");
  if (folder == nullptr) return false;
  int entries = 0;
  while (const dirent* entry = readdir(folder)) entries += entry->d_name[0] != '.';
  closedir(folder);
  return entries > 0;
}

void CheckLimits(Report& report) {
  constexpr rlim_t kFewFiles = 1024, kFewThreads = 256;
  const auto shown = [](rlim_t value) {
    return value == RLIM_INFINITY ? std::string("unlimited") : absl::StrCat(value);
  };
  std::string fine;
  const rlim_t files = Limit(RLIMIT_NOFILE);
  if (files < kFewFiles) {
    report.Note("limits", absl::StrCat("a process may open ", files,
                                       " files only, and each rank "
                                       "needs a connection to each other one; ulimit -n 4096"));
  } else {
    absl::StrAppend(&fine, "open files ", shown(files));
  }
  // The user's limit does not bind root; a container's binds everybody.
  rlim_t threads = geteuid() == 0 ? RLIM_INFINITY : Limit(RLIMIT_NPROC);
  const std::string group = ReadText("/sys/fs/cgroup/pids.max");
  if (const long long n = std::atoll(group.c_str()); n > 0) {
    threads = std::min(threads, static_cast<rlim_t>(n));
  }
  if (threads < kFewThreads) {
    report.Note("limits", absl::StrCat("only ", threads,
                                       " threads and processes may run, and a "
                                       "rank needs runtime.threads and about ten more; ulimit -u, "
                                       "or the container's --pids-limit"));
  } else {
    absl::StrAppend(&fine, fine.empty() ? "" : ", ", "threads ", shown(threads));
  }
  const rlim_t locked = Limit(RLIMIT_MEMLOCK);
  if (locked != RLIM_INFINITY && HasInfiniBand()) {
    report.Note("limits",
                absl::StrCat("a process may lock ", SizeText(static_cast<int64_t>(locked)),
                             " of memory, but InfiniBand needs what it sends locked; "
                             "ulimit -l unlimited"));
  } else {
    absl::StrAppend(&fine, fine.empty() ? "" : ", ", "locked memory ",
                    locked == RLIM_INFINITY ? std::string("unlimited")
                                            : SizeText(static_cast<int64_t>(locked)));
  }
  if (const rlim_t space = Limit(RLIMIT_AS); space != RLIM_INFINITY) {
    report.Note("limits", absl::StrCat("the address space is limited to ",
                                       SizeText(static_cast<int64_t>(space)),
                                       ", and CUDA reserves far more than it uses; ulimit -v "
                                       "unlimited"));
  }
  absl::StrAppend(&fine, fine.empty() ? "" : ", ",
                  Limit(RLIMIT_CORE) == 0 ? "no core files (ulimit -c unlimited to have them)"
                                          : "core files are written");
  report.Ok("limits", fine);
}

void CheckOpenBlas(Report& report) {
  const std::string config = openblas_get_config();  // "OpenBLAS 0.3.21 NO_LAPACKE ..."
  const std::string core = openblas_get_corename();
  const std::string text = absl::StrCat("OpenBLAS ", FirstVersion(config), ", kernels for ", core);
  const nlohmann::ordered_json values = {{"version", FirstVersion(config)}, {"core", core}};
#if defined(__x86_64__)
  // Its names for kernels without AVX2.
  for (const char* old : {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Sandybridge",
                          "Atom", "Athlon", "Opteron", "Opteron_SSE3", "Barcelona", "Bobcat",
                          "Katmai", "Coppermine", "Northwood", "Banias", "Generic"}) {
    if (core != old || MachineLevel() < 3) continue;
    report.Note("openblas",
                absl::StrCat(text,
                             ", which leave this processor's vector units unused; unset "
                             "OPENBLAS_CORETYPE, or install a newer OpenBLAS"),
                values);
    return;
  }
#endif
  report.Ok("openblas", text, values);
}

}  // namespace

void CheckHost(Report& report) {
  CheckCores(report);
  CheckVectorUnits(report);
  CheckMemory(report);
  CheckMpi(report);
  CheckSharedMemory(report);
  CheckLimits(report);
  CheckOpenBlas(report);
}

}  // namespace stretto
