# Attention through cuDNN. Needs, for compiling only, the headers of cuDNN 9 (which come with it) and
# NVIDIA's header-only cudnn-frontend (MIT licence); the library itself is opened when a program
# first needs it. STRETTO_CUDNN=AUTO takes what is there, and fetches the frontend from PyPI when it
# is not; ON insists; OFF leaves it out, and attention runs on our own kernels.
#
# Defines STRETTO_WITH_CUDNN (ON or OFF) and, when it is ON, STRETTO_CUDNN_INCLUDE_DIR and
# STRETTO_CUDNN_FRONTEND_INCLUDE_DIR.
set(STRETTO_CUDNN AUTO CACHE STRING "Use cuDNN for attention: AUTO, ON, OFF")
set(STRETTO_WITH_CUDNN OFF)

# The wheel of one platform serves all: only its headers are used.
set(STRETTO_CUDNN_FRONTEND_VERSION 1.32.0)
set(STRETTO_CUDNN_FRONTEND_WHEEL
  nvidia_cudnn_frontend-1.32.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl)
set(STRETTO_CUDNN_FRONTEND_SHA256
  c6006556017a4d1c914c52a556c71b1267f2d6a0500f742e7b4edef539878df0)

# Ends the search: an error when cuDNN was asked for, a message otherwise.
macro(stretto_without_cudnn why)
  if(STRETTO_CUDNN STREQUAL "ON")
    message(FATAL_ERROR "stretto: STRETTO_CUDNN is ON but ${why}")
  endif()
  message(STATUS "stretto: ${why}; attention on CUDA runs on our own kernels")
  return()
endmacro()

# Whether `folder` has a cudnn-frontend that cudnn_plans.cc compiles with.
function(stretto_check_cudnn_frontend result folder)
  set(${result} FALSE PARENT_SCOPE)
  set(file "${folder}/cudnn_frontend_version.h")
  if(NOT EXISTS "${file}" OR NOT EXISTS "${folder}/cudnn_frontend.h")
    return()
  endif()
  file(READ "${file}" text)
  set(version "")
  foreach(part MAJOR MINOR PATCH)
    if(NOT text MATCHES "#define CUDNN_FRONTEND_${part}_VERSION ([0-9]+)")
      return()
    endif()
    list(APPEND version ${CMAKE_MATCH_1})
  endforeach()
  list(JOIN version "." version)
  if(version VERSION_GREATER_EQUAL STRETTO_CUDNN_FRONTEND_VERSION AND version VERSION_LESS 2)
    set(${result} TRUE PARENT_SCOPE)
  endif()
endfunction()

# Unpacks the headers of the pinned wheel to `folder`/include. Leaves nothing there when it fails.
function(stretto_fetch_cudnn_frontend folder python)
  set(work "${folder}.part")
  file(REMOVE_RECURSE "${work}")
  file(MAKE_DIRECTORY "${work}")
  execute_process(
    COMMAND "${python}" -m pip download --quiet --no-deps --disable-pip-version-check
            --retries 1 --timeout 15 --only-binary=:all: --implementation cp --python-version 3.11
            --abi cp311 --platform manylinux_2_28_x86_64 --dest "${work}"
            nvidia-cudnn-frontend==${STRETTO_CUDNN_FRONTEND_VERSION}
    RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  set(wheel "${work}/${STRETTO_CUDNN_FRONTEND_WHEEL}")
  if(failed OR NOT EXISTS "${wheel}")
    file(REMOVE_RECURSE "${work}")
    return()
  endif()
  file(SHA256 "${wheel}" sha256)
  if(NOT sha256 STREQUAL STRETTO_CUDNN_FRONTEND_SHA256)
    message(WARNING "stretto: ${STRETTO_CUDNN_FRONTEND_WHEEL} has SHA-256 ${sha256}, expected "
                    "${STRETTO_CUDNN_FRONTEND_SHA256}; it is not used")
    file(REMOVE_RECURSE "${work}")
    return()
  endif()
  file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${work}/wheel"
       PATTERNS "include/*" "*/licenses/*")
  file(REMOVE_RECURSE "${folder}")
  file(RENAME "${work}/wheel" "${folder}")
  file(REMOVE_RECURSE "${work}")
endfunction()

if(STRETTO_CUDNN STREQUAL "OFF")
  return()
endif()

# Folders of Python packages, where NVIDIA's wheels put headers.
find_program(STRETTO_CUDNN_PYTHON NAMES python3 python)
set(python_folders "")
if(STRETTO_CUDNN_PYTHON)
  execute_process(
    COMMAND "${STRETTO_CUDNN_PYTHON}" -c "import site, sys, sysconfig
folders = [sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sys.prefix]
folders += site.getsitepackages() + [site.getusersitepackages()]
print(';'.join(dict.fromkeys(folders)), end='')"
    OUTPUT_VARIABLE python_folders RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    set(python_folders "")
  endif()
endif()

find_path(STRETTO_CUDNN_INCLUDE_DIR cudnn_version.h
  HINTS ENV CUDNN_HOME ENV CUDNN_PATH ${CUDAToolkit_INCLUDE_DIRS} ${python_folders}
  PATH_SUFFIXES include nvidia/cudnn/include)
if(NOT STRETTO_CUDNN_INCLUDE_DIR)
  stretto_without_cudnn("the headers of cuDNN 9 were not found (set CUDNN_HOME to where it is)")
endif()
file(STRINGS "${STRETTO_CUDNN_INCLUDE_DIR}/cudnn_version.h" cudnn_major
     REGEX "^#define CUDNN_MAJOR [0-9]+")
if(NOT cudnn_major MATCHES " 9$")
  stretto_without_cudnn("the headers of cuDNN in ${STRETTO_CUDNN_INCLUDE_DIR} are not version 9")
endif()

set(fetched "${PROJECT_BINARY_DIR}/_deps/cudnn-frontend-${STRETTO_CUDNN_FRONTEND_VERSION}")
find_path(STRETTO_CUDNN_FRONTEND_INCLUDE_DIR cudnn_frontend.h
  HINTS ENV CUDNN_FRONTEND_HOME "${fetched}" ${CUDAToolkit_INCLUDE_DIRS} ${python_folders}
  PATH_SUFFIXES include)
stretto_check_cudnn_frontend(good "${STRETTO_CUDNN_FRONTEND_INCLUDE_DIR}")
if(NOT good)
  if(STRETTO_CUDNN_PYTHON AND NOT EXISTS "${fetched}/include/cudnn_frontend.h")
    stretto_fetch_cudnn_frontend("${fetched}" "${STRETTO_CUDNN_PYTHON}")
  endif()
  stretto_check_cudnn_frontend(good "${fetched}/include")
  if(NOT good)
    unset(STRETTO_CUDNN_FRONTEND_INCLUDE_DIR CACHE)  # look again next time
    stretto_without_cudnn("cudnn-frontend ${STRETTO_CUDNN_FRONTEND_VERSION} or later was neither \
found nor fetched (pip install nvidia-cudnn-frontend==${STRETTO_CUDNN_FRONTEND_VERSION})")
  endif()
  set(STRETTO_CUDNN_FRONTEND_INCLUDE_DIR "${fetched}/include" CACHE PATH
      "Where cudnn_frontend.h is" FORCE)
endif()
set(STRETTO_WITH_CUDNN ON)
message(STATUS "stretto: attention through cuDNN (${STRETTO_CUDNN_FRONTEND_INCLUDE_DIR})")
