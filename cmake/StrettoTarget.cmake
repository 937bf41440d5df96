# One CMake target for each layer: stretto_layer(core SOURCES a.cc DEPENDS ... PRIVATE ...).
#   DEPENDS  other layers, seen by users       PRIVATE  libraries that no public header mentions
set(STRETTO_TARGETS "")

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
  set(STRETTO_TARGETS ${STRETTO_TARGETS} ${target} PARENT_SCOPE)
endfunction()

# A program of the project: stretto_program(stretto-plan SOURCES main.cc LINK train). Those named
# stretto-* are installed; tests and benchmarks have other names.
file(RELATIVE_PATH STRETTO_BIN_TO_LIB /prefix/${CMAKE_INSTALL_BINDIR} /prefix/${CMAKE_INSTALL_LIBDIR})
function(stretto_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  stretto_options(${name})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  foreach(layer ${ARG_LINK})
    target_link_libraries(${name} PRIVATE stretto_${layer})
  endforeach()
  if(name MATCHES "^stretto-")
    set_target_properties(${name} PROPERTIES INSTALL_RPATH $ORIGIN/${STRETTO_BIN_TO_LIB})
    set_property(GLOBAL APPEND PROPERTY STRETTO_PROGRAMS ${name})
  endif()
endfunction()
