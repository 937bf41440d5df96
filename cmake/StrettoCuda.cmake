# The CUDA backend: STRETTO_CUDA=AUTO builds it when nvcc is found, ON insists, OFF leaves it out.
# Only the CUDA runtime is linked (statically). cuBLASLt, cuDNN, NCCL and NVML are opened when they
# are first needed, so that the same programs run on machines without them.
set(STRETTO_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO, ON, OFF")
set(STRETTO_WITH_CUDA OFF)
if(STRETTO_CUDA STREQUAL "OFF")
  return()
endif()

find_program(STRETTO_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
             PATHS /usr/local/cuda/bin)
if(NOT STRETTO_NVCC AND NOT CMAKE_CUDA_COMPILER)
  if(STRETTO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "stretto: STRETTO_CUDA is ON but nvcc was not found; install the CUDA 13 "
                        "toolkit, or set CUDACXX to its nvcc")
  endif()
  message(STATUS "stretto: nvcc was not found; the CUDA backend is not built")
  return()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${STRETTO_NVCC})
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90)  # machine code for it, and PTX for what comes later
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "stretto: CUDA ${CMAKE_CUDA_COMPILER_VERSION} at ${CMAKE_CUDA_COMPILER} is "
                      "too old; install CUDA 13, or configure with -DSTRETTO_CUDA=OFF")
endif()
# CMake before 3.25.2 does not know that nvcc 12 and later speak C++20.
foreach(which STANDARD EXTENSION)
  if(NOT CMAKE_CUDA20_${which}_COMPILE_OPTION)
    set(CMAKE_CUDA20_${which}_COMPILE_OPTION "-std=c++20")
  endif()
endforeach()
if(STRETTO_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${STRETTO_CCACHE})
endif()
find_package(CUDAToolkit REQUIRED)
set(STRETTO_WITH_CUDA ON)
include(StrettoCudnnFrontend)
message(STATUS "stretto: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures "
               "${CMAKE_CUDA_ARCHITECTURES}")
