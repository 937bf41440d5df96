#include "stretto/core/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace stretto {
namespace {

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
    case LogLevel::kOff:
      return spdlog::level::off;
  }
  return spdlog::level::off;
}

struct Logger {
  Logger() : stderr_logger("stretto", std::make_shared<spdlog::sinks::stderr_color_sink_mt>()) {
    stderr_logger.set_pattern("%Y-%m-%d %H:%M:%S.%e %^%L%$ %v");
    stderr_logger.set_level(spdlog::level::trace);  // filtered by `level`
    stderr_logger.flush_on(spdlog::level::trace);
  }

  std::atomic<int> level{static_cast<int>(LogLevel::kInfo)};
  std::atomic<int> rank{-1};

  std::mutex mutex;  // guards the rest, and is held while a sink runs
  std::string prefix;
  std::function<void(LogLevel, const std::string&)> sink;
  spdlog::logger stderr_logger;
};

// Never destroyed: lines may come from threads that outlive main.
Logger& Instance() {
  static Logger* const logger = new Logger;
  return *logger;
}

// Set while a sink runs on this thread: a sink that logs must not wait for itself.
thread_local bool inside_sink = false;

}  // namespace

void Log(LogLevel level, const std::string& message) {
  Logger& logger = Instance();
  if (level >= LogLevel::kOff || level < LogLevel::kDebug) return;
  if (static_cast<int>(level) < logger.level.load(std::memory_order_relaxed)) return;
  if (level == LogLevel::kInfo && logger.rank.load(std::memory_order_relaxed) > 0) return;
  if (inside_sink) {
    logger.stderr_logger.log(ToSpdlog(level), message);
    return;
  }
  std::lock_guard<std::mutex> lock(logger.mutex);
  const std::string line = logger.prefix + message;
  if (!logger.sink) {
    logger.stderr_logger.log(ToSpdlog(level), line);
    return;
  }
  inside_sink = true;
  try {
    logger.sink(level, line);
  } catch (...) {
    // A line is lost; the run must not be.
  }
  inside_sink = false;
}

void SetLogLevel(LogLevel level) {
  Instance().level.store(static_cast<int>(level), std::memory_order_relaxed);
}

void SetLogRank(int rank, int world_size) {
  Logger& logger = Instance();
  std::lock_guard<std::mutex> lock(logger.mutex);
  logger.rank.store(rank, std::memory_order_relaxed);
  logger.prefix = "[rank " + std::to_string(rank) + " of " + std::to_string(world_size) + "] ";
}

void SetLogSink(std::function<void(LogLevel, const std::string&)> sink) {
  Logger& logger = Instance();
  std::lock_guard<std::mutex> lock(logger.mutex);
  logger.sink = std::move(sink);
}

}  // namespace stretto
