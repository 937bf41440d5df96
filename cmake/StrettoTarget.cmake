# One CMake target for each layer: stretto_layer(core SOURCES a.cc DEPENDS ... PRIVATE ...).
#   DEPENDS  other layers, seen by users       PRIVATE  libraries that no public header mentions
set(STRETTO_TARGETS "")

# Precompiled headers save time in a build from nothing. ccache does better without them, and
# without them a forgotten #include is noticed.
set(precompile OFF)
if(PROJECT_IS_TOP_LEVEL AND (NOT STRETTO_CCACHE OR DEFINED ENV{CCACHE_DISABLE}))
  set(precompile ON)
endif()
option(STRETTO_PRECOMPILE_HEADERS "Precompile the headers that most files include" ${precompile})

function(stretto_options target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wno-unused-parameter;-Wno-missing-field-initializers>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter>")
  if(STRETTO_SANITIZE)
    target_compile_options(${target} PUBLIC -fsanitize=${STRETTO_SANITIZE} -fno-omit-frame-pointer -g)
    target_link_options(${target} PUBLIC -fsanitize=${STRETTO_SANITIZE})
  endif()
endfunction()

# stretto_precompile(layer|program|test): makes what stretto_use_precompiled(target KIND) takes. Code of
# each kind has the same options, as a precompiled header needs.
set(STRETTO_PRECOMPILED
  <algorithm> <array> <atomic> <chrono> <cmath> <condition_variable> <cstdint> <cstdio> <cstring>
  <filesystem> <fstream> <functional> <limits> <map> <memory> <mutex> <numeric> <optional> <set>
  <sstream> <string> <thread> <utility> <vector> <absl/status/status.h> <absl/status/statusor.h>
  <absl/strings/str_cat.h> <absl/strings/str_format.h>)
function(stretto_precompile kind)
  if(NOT STRETTO_PRECOMPILE_HEADERS)
    return()
  endif()
  set(target stretto_precompiled_${kind})
  set(source ${PROJECT_BINARY_DIR}/precompiled/${kind}.cc)
  if(kind STREQUAL "layer")
    file(CONFIGURE OUTPUT ${source} CONTENT "")
    add_library(${target} OBJECT EXCLUDE_FROM_ALL ${source})
  else()
    file(CONFIGURE OUTPUT ${source} CONTENT "int main() {}\n")
    add_executable(${target} EXCLUDE_FROM_ALL ${source})
  endif()
  stretto_options(${target})
  target_link_libraries(${target} PRIVATE absl::status absl::statusor absl::strings absl::str_format)
  target_precompile_headers(${target} PRIVATE ${STRETTO_PRECOMPILED})
  if(kind STREQUAL "test")
    target_link_libraries(${target} PRIVATE GTest::gtest GTest::gmock)
    target_precompile_headers(${target} PRIVATE <gmock/gmock.h> <gtest/gtest.h>)
  endif()
endfunction()
function(stretto_use_precompiled target kind)
  if(STRETTO_PRECOMPILE_HEADERS)
    target_precompile_headers(${target} REUSE_FROM stretto_precompiled_${kind})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC 12 then warns of its own library's strings.
      target_compile_options(${target} PRIVATE
        "$<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict;-Wno-array-bounds;-Wno-stringop-overflow>")
    endif()
  endif()
endfunction()
stretto_precompile(layer)
stretto_precompile(program)

function(stretto_layer name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS;PRIVATE" ${ARGN})
  set(target stretto_${name})
  add_library(${target} ${ARG_SOURCES})
  add_library(stretto::${name} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name} VERSION ${PROJECT_VERSION}
                                             SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
                                             INSTALL_RPATH $ORIGIN)
  stretto_options(${target})
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR})
  foreach(dep ${ARG_DEPENDS})
    target_link_libraries(${target} PUBLIC stretto_${dep})
  endforeach()
  target_link_libraries(${target} PRIVATE ${ARG_PRIVATE})
  if(NOT name STREQUAL "kernels_cpu")  # has options of its own
    stretto_use_precompiled(${target} layer)
  endif()
  set(STRETTO_TARGETS ${STRETTO_TARGETS} ${target} PARENT_SCOPE)
endfunction()

# A program of the project: stretto_program(stretto-plan SOURCES main.cc LINK train). Those named
# stretto-* are installed, and with INSTALL others that users run; tests and benchmarks are not.
# PRECOMPILED: the kind of headers.
file(RELATIVE_PATH STRETTO_BIN_TO_LIB /prefix/${CMAKE_INSTALL_BINDIR} /prefix/${CMAKE_INSTALL_LIBDIR})
function(stretto_program name)
  cmake_parse_arguments(ARG "INSTALL" "PRECOMPILED" "SOURCES;LINK" ${ARGN})
  if(NOT ARG_PRECOMPILED)
    set(ARG_PRECOMPILED program)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  stretto_options(${name})
  if(NOT ARG_PRECOMPILED STREQUAL "none")
    stretto_use_precompiled(${name} ${ARG_PRECOMPILED})
  endif()
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  foreach(layer ${ARG_LINK})
    target_link_libraries(${name} PRIVATE stretto_${layer})
  endforeach()
  if(ARG_INSTALL OR name MATCHES "^stretto-")
    set_target_properties(${name} PROPERTIES INSTALL_RPATH $ORIGIN/${STRETTO_BIN_TO_LIB})
    set_property(GLOBAL APPEND PROPERTY STRETTO_PROGRAMS ${name})
  endif()
endfunction()
