#include "stretto/comm/world.h"

#include <algorithm>
#include <cstdlib>
#include <future>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/socket.h"
#include "src/comm/transport_tcp.h"
#include "src/comm/transport_threads.h"
#include "src/comm/trouble.h"
#include "src/comm/world_internal.h"
#include "src/core/start_thread.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

// How long rank 0 keeps the control plane up for ranks that have not left yet.
constexpr std::chrono::milliseconds kLinger = std::chrono::seconds(30);
// How long the ranks wait for each other before MPI is finalised.
constexpr std::chrono::milliseconds kFarewell = std::chrono::seconds(30);
// ... after a failure, so that they hear of it and do not only see that rank 0 is gone.
constexpr std::chrono::milliseconds kLingerAfterFailure = std::chrono::seconds(2);

const char* Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? nullptr : value;
}

}  // namespace

std::chrono::milliseconds SetupTimeout(const WorldOptions& options) {
  constexpr std::chrono::milliseconds kLongest = std::chrono::seconds(300);
  return options.timeout.count() <= 0 ? kLongest : std::min(options.timeout, kLongest);
}

World::World() : phase_(std::make_unique<Phase>()) {}

bool World::failed() const { return phase_->failed; }

World::~World() {
  bool clean = !phase_->failed;
  if (phase_->finalize && clean && store_ != nullptr && size() > 1) {
    // MPI_Finalize waits for everybody and cannot be interrupted: only go there together.
    const std::chrono::milliseconds asked = options_.timeout;
    options_.timeout = asked.count() <= 0 ? kFarewell : std::min(asked, kFarewell);
    const absl::Status met = Barrier("end of the job");
    options_.timeout = asked;
    clean = met.ok();
    if (!met.ok()) {
      LogWarning(absl::StrCat("MPI is not finalised: ", std::string(met.message())));
    }
  }
  transport_.reset();
  store_.reset();
  const bool idle =
      server_ == nullptr || server_->WaitUntilIdle(phase_->failed ? kLingerAfterFailure : kLinger);
  if (!idle && !phase_->failed) {
    LogWarning(
        "some ranks have not left the job, but rank 0 ends and takes the control plane along");
  }
  server_.reset();
  if (phase_->finalize) phase_->finalize(clean);
}

std::unique_ptr<World> WorldAccess::New(const RankInfo& info, const WorldOptions& options) {
  std::unique_ptr<World> world(new World());
  world->info_ = info;
  world->options_ = options;
  return world;
}

void WorldAccess::Announce(const World& w) {
  SetLogRank(w.rank(), w.size());
  LogInfo(absl::StrCat("rank ", w.rank(), " of ", w.size(), " (", w.info().source, ", messages by ",
                       w.transport_->name(), ")"));
  for (const std::string& warning : w.info().warnings) LogWarning(warning);
}

absl::StatusOr<std::unique_ptr<World>> WorldAccess::Single(const WorldOptions& options) {
  std::unique_ptr<World> world = New(RankInfo(), options);
  StoreOptions store;
  store.job_token = net::RandomToken();
  STRETTO_ASSIGN_OR_RETURN(world->server_, StoreServer::Start(store));
  store.port = world->server_->port();
  STRETTO_ASSIGN_OR_RETURN(world->store_, Store::Connect(store, 0));
  world->transport_ = std::make_unique<ThreadsTransport>(std::make_shared<ThreadsHub>(1), 0);
  Announce(*world);
  return world;
}

absl::StatusOr<std::unique_ptr<World>> World::Create(const WorldOptions& options) {
  if (Variable("RANK") != nullptr && Variable("WORLD_SIZE") != nullptr &&
      Variable("MASTER_ADDR") != nullptr) {
    return FromEnvironment(options);
  }
  absl::StatusOr<std::unique_ptr<World>> world = FromMpi(options);
  if (absl::IsUnimplemented(world.status())) {
    STRETTO_ASSIGN_OR_RETURN(const RankInfo info, ResolveRank());
    if (info.size == 1) return WorldAccess::Single(options);
  }
  return world;
}

absl::StatusOr<std::unique_ptr<World>> World::FromEnvironment(const WorldOptions& options) {
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
    if (Variable(name) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the environment variable ", name,
          " is not set; set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or use mpirun"));
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const RankInfo info, ResolveRank());
  StoreOptions store;
  store.host = Variable("MASTER_ADDR");
  // torchrun's agent holds MASTER_PORT itself; its neighbour is then ours.
  const char* agent = Variable("TORCHELASTIC_USE_AGENT_STORE");
  const char* own_port = Variable("STRETTO_MASTER_PORT");
  const char* port = own_port != nullptr ? own_port : Variable("MASTER_PORT");
  if (!absl::SimpleAtoi(port, &store.port) || store.port < 1 || store.port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(own_port != nullptr ? "STRETTO_" : "",
                                                   "MASTER_PORT='", port,
                                                   "' is not a port number from 1 to 65535"));
  }
  if (own_port == nullptr && agent != nullptr && std::string(agent) == "True") ++store.port;
  const char* token = Variable("STRETTO_JOB_TOKEN");
  if (token == nullptr) token = Variable("TORCHELASTIC_RUN_ID");
  store.job_token = !options.job_token.empty() ? options.job_token
                    : token != nullptr         ? std::string(token)
                                               : absl::StrCat(store.host, ":", store.port);
  const bool loopback = net::IsLoopback(store.host);
  store.bind_address = !options.bind_address.empty() ? options.bind_address
                       : loopback                    ? "127.0.0.1"
                                                     : "0.0.0.0";
  store.connect_timeout = SetupTimeout(options);

  std::unique_ptr<World> world = WorldAccess::New(info, options);
  if (info.rank == 0) {
    STRETTO_ASSIGN_OR_RETURN(world->server_, StoreServer::Start(store));
  }
  STRETTO_ASSIGN_OR_RETURN(world->store_, Store::Connect(store, info.rank));
  const bool all_interfaces = store.bind_address == "0.0.0.0" || store.bind_address == "::";
  STRETTO_ASSIGN_OR_RETURN(
      world->transport_,
      TcpTransport::Connect(*world->store_, info.rank, info.size,
                            all_interfaces ? "0.0.0.0" : store.bind_address,
                            all_interfaces ? world->store_->local_address() : store.bind_address,
                            store.job_token, net::After(SetupTimeout(options))));
  WorldAccess::Announce(*world);
  return world;
}

absl::Status World::RunThreads(int ranks, const std::function<absl::Status(World&)>& body,
                               const WorldOptions& options) {
  if (ranks < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("RunThreads needs a rank at least, not ", ranks));
  }
  StoreOptions store;
  store.job_token = net::RandomToken();
  STRETTO_ASSIGN_OR_RETURN(const std::unique_ptr<StoreServer> server, StoreServer::Start(store));
  store.port = server->port();
  const auto hub = std::make_shared<ThreadsHub>(ranks);
  std::mutex mutex;
  absl::Status first;
  const auto note = [&](const absl::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (first.ok()) first = status;
  };
  const auto run = [&](int rank) -> absl::Status {
    RankInfo info;
    info.rank = info.local_rank = rank;
    info.size = info.local_size = ranks;
    info.source = "threads";
    std::unique_ptr<World> world = WorldAccess::New(info, options);
    world->phase_->in_process = true;
    STRETTO_ASSIGN_OR_RETURN(world->store_, Store::Connect(store, rank));
    world->transport_ = std::make_unique<ThreadsTransport>(hub, rank);
    // Noted before this rank leaves: others fail because it has left.
    note(body(*world));
    return absl::OkStatus();
  };
  // Nobody begins before all threads are there: some alone would wait for the others.
  std::promise<bool> all_there;
  const std::shared_future<bool> begin = all_there.get_future().share();
  std::vector<std::thread> threads;
  absl::Status started;
  for (int rank = 0; rank < ranks && started.ok(); ++rank) {
    absl::StatusOr<std::thread> thread = StartThread(absl::StrCat("rank ", rank), [&, rank] {
      if (!begin.get()) return;
      note(run(rank));
    });
    started = thread.status();
    if (thread.ok()) threads.push_back(*std::move(thread));
  }
  all_there.set_value(started.ok());
  for (std::thread& thread : threads) thread.join();
  return started.ok() ? first : started;
}

absl::StatusOr<std::vector<std::string>> World::AllGather(const std::string& name,
                                                          const std::string& value) {
  if (options_.before_message) options_.before_message(absl::StrCat("'", name, "'"));
  // Whoever comes to meeting k has seen everybody arrive at k - 1, so everybody has left k - 2.
  const int64_t meeting = phase_->next++;
  if (rank() == 0 && meeting >= 2) {
    STRETTO_RETURN_IF_ERROR(store_->Erase(absl::StrCat("meet/", meeting - 2, "/")));
  }
  const std::string prefix = absl::StrCat("meet/", meeting, "/");
  // Rank 0 serves the control plane, and has left, died or stopped.
  const auto explain = [&](const absl::Status& status) {
    const bool gone = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
    if (!gone || rank() == 0) return status;
    phase_->failed = true;
    return absl::Status(status.code(),
                        absl::StrCat(std::string(status.message()), " while rank ", rank(),
                                     " was at '", name, "'; see its messages, or restart the job"));
  };
  const absl::Status came_here =
      store_->Set(absl::StrCat(prefix, rank()), absl::StrCat(name.size(), " ", name, value));
  if (!came_here.ok()) return explain(came_here);

  const auto begin = net::Clock::now();
  const net::Deadline deadline = net::After(options_.timeout);
  std::vector<std::pair<std::string, std::string>> pairs;
  while (true) {
    const std::chrono::milliseconds slice(std::max(1, net::PollTimeout(deadline, 500)));
    auto listed = store_->ListWhen(prefix, size(), slice);
    if (listed.ok() && static_cast<int>(listed->size()) == size()) {
      pairs = std::move(*listed);
      break;
    }
    if (!listed.ok() && !absl::IsDeadlineExceeded(listed.status())) {
      return explain(listed.status());
    }
    auto there = store_->List(prefix);
    if (!there.ok()) return explain(there.status());
    if (static_cast<int>(there->size()) == size()) continue;
    std::vector<bool> came(static_cast<std::size_t>(size()), false);
    for (const auto& [key, unused] : *there) {
      int r = 0;
      if (absl::SimpleAtoi(key.substr(prefix.size()).c_str(), &r))
        came[static_cast<std::size_t>(r)] = true;
    }
    const auto came_not = [&](int r) {
      return r >= 0 && r < size() && !came[static_cast<std::size_t>(r)];
    };
    const auto give_up = [&](const absl::Status& status, bool own) {
      phase_->failed = true;  // the end of this world waits for nobody
      TellTrouble(*store_, rank(), std::string(status.message()), own);
      return status;
    };
    const Trouble trouble = AskForTrouble(*store_);
    std::vector<int> dead, left;
    std::copy_if(trouble.dead.begin(), trouble.dead.end(), std::back_inserter(dead), came_not);
    std::copy_if(trouble.left.begin(), trouble.left.end(), std::back_inserter(left), came_not);
    if (!dead.empty()) {
      return give_up(absl::UnavailableError(absl::StrCat(
                         RanksText(dead), " died before coming to '", name, "'; restart the job")),
                     false);
    }
    for (const auto& told : {trouble.failed, trouble.gave_up}) {
      for (const auto& [r, message] : told) {
        if (!came_not(r)) continue;
        return give_up(absl::UnavailableError(absl::StrCat("rank ", r, " failed before coming to '",
                                                           name, "': ", message)),
                       false);
      }
    }
    if (!left.empty()) {
      return absl::UnavailableError(absl::StrCat(
          RanksText(left), " left the job before coming to '", name, "'; see the messages there"));
    }
    if (net::Clock::now() >= deadline) {
      std::vector<int> missing;
      for (int r = 0; r < size(); ++r) {
        if (came_not(r)) missing.push_back(r);
      }
      return give_up(
          absl::DeadlineExceededError(absl::StrFormat(
              "%s did not come to '%s' within %.1f s; look there for a hang", RanksText(missing),
              name, std::chrono::duration<double>(net::Clock::now() - begin).count())),
          true);
    }
  }

  std::vector<std::string> values(static_cast<std::size_t>(size()));
  for (const auto& [key, text] : pairs) {
    int r = 0;
    std::size_t length = 0;
    const std::size_t space = text.find(' ');
    if (!absl::SimpleAtoi(key.substr(prefix.size()).c_str(), &r) || r < 0 || r >= size() ||
        space == std::string::npos || !absl::SimpleAtoi(text.substr(0, space).c_str(), &length) ||
        text.size() < space + 1 + length) {
      return absl::InternalError(absl::StrCat("malformed control-plane entry '", key, "'"));
    }
    const std::string theirs = text.substr(space + 1, length);
    if (theirs != name) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", r, " came to '", theirs, "' while rank ", rank(), " came to '",
                       name, "'; all ranks must pass the same set-up steps in the same order"));
    }
    values[static_cast<std::size_t>(r)] = text.substr(space + 1 + length);
  }
  return values;
}

absl::Status World::Barrier(const std::string& name) { return AllGather(name, "").status(); }

namespace {
constexpr char kAgreedPayload[] = "stretto/agreed";
}  // namespace

bool IsAgreed(const absl::Status& status) { return status.GetPayload(kAgreedPayload).has_value(); }

absl::Status World::Agree(const std::string& phase, const absl::Status& mine) {
  // An error that an inner phase has agreed on already names its rank and phase.
  const std::string text = absl::StrCat(static_cast<int>(mine.code()), IsAgreed(mine) ? " " : " !",
                                        std::string(mine.message()));
  absl::StatusOr<std::vector<std::string>> all = AllGather(phase, text);
  if (!all.ok()) return mine.ok() ? all.status() : mine;
  for (int r = 0; r < size(); ++r) {
    const std::string& theirs = (*all)[static_cast<std::size_t>(r)];
    const std::size_t space = theirs.find(' ');
    int code = 0;
    if (space == std::string::npos || !absl::SimpleAtoi(theirs.substr(0, space).c_str(), &code)) {
      return absl::InternalError(absl::StrCat("rank ", r, " sent a malformed status"));
    }
    if (code == 0) continue;
    std::string message = theirs.substr(space + 1);
    if (!message.empty() && message[0] == '!') {
      message = absl::StrCat("rank ", r, " failed in ", phase, ": ", message.substr(1));
    }
    absl::Status agreed(static_cast<absl::StatusCode>(code), message);
    agreed.SetPayload(kAgreedPayload, absl::Cord("1"));
    return agreed;
  }
  return absl::OkStatus();
}

std::vector<int> World::DeadRanks() {
  if (!store_->List("dead/").ok()) return {0};  // rank 0 serves the control plane
  std::vector<int> ranks;
  for (const auto& [rank, unused] : ByRank(*store_, "dead/")) ranks.push_back(rank);
  return ranks;
}

}  // namespace stretto
