# Install rules: headers, one target a layer in one export set, a relocatable CMake package, a
# pkg-config file, and the programs.
include(CMakePackageConfigHelpers)

set(STRETTO_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/stretto)

install(DIRECTORY include/stretto DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(TARGETS ${STRETTO_TARGETS} EXPORT strettoTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(EXPORT strettoTargets NAMESPACE stretto:: DESTINATION ${STRETTO_CMAKE_DIR})

get_property(programs GLOBAL PROPERTY STRETTO_PROGRAMS)
if(programs)
  install(TARGETS ${programs} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

configure_package_config_file(cmake/strettoConfig.cmake.in
  ${PROJECT_BINARY_DIR}/cmake/strettoConfig.cmake INSTALL_DESTINATION ${STRETTO_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cmake/strettoConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/cmake/strettoConfig.cmake
              ${PROJECT_BINARY_DIR}/cmake/strettoConfigVersion.cmake
        DESTINATION ${STRETTO_CMAKE_DIR})

# pkg-config. Archives carry no list of what they need, so a static build names everything; the
# order is the linker's, users before what they use.
set(layers train sim observe snapshot optim parallel model plan data comm ops kernels_cpu core)
if(STRETTO_WITH_CUDA)
  list(INSERT layers 11 kernels_cuda)  # behind ops
endif()
foreach(layer ${layers})
  string(APPEND STRETTO_PC_LIBRARIES " -lstretto_${layer}")
endforeach()
set(STRETTO_PC_REQUIRES "absl_status absl_statusor")
set(internal "absl_strings absl_str_format spdlog openblas libisal libxxhash libpcre2-8 libutf8proc")
set(internal_libraries "-lpthread")
if(STRETTO_WITH_CUDA)
  string(PREPEND internal_libraries "${CUDA_cudart_static_LIBRARY} -ldl -lrt ")
endif()
if(STRETTO_WITH_MPI)
  list(JOIN MPI_C_LIBRARIES " " mpi)
  string(PREPEND internal_libraries "${mpi} ")
endif()
if(BUILD_SHARED_LIBS)
  set(STRETTO_PC_REQUIRES_PRIVATE "${internal}")
  set(STRETTO_PC_LIBRARIES_PRIVATE "${internal_libraries}")
else()
  string(APPEND STRETTO_PC_REQUIRES " ${internal}")
  string(APPEND STRETTO_PC_LIBRARIES " ${internal_libraries}")
endif()
set(pkgconfig_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH STRETTO_PC_TO_PREFIX /prefix/${pkgconfig_dir} /prefix)
configure_file(stretto.pc.in ${PROJECT_BINARY_DIR}/stretto.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/stretto.pc DESTINATION ${pkgconfig_dir})
install(FILES LICENSE README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
