include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/annulus)
install(TARGETS annulus EXPORT annulusTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/annulus DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(EXPORT annulusTargets NAMESPACE annulus:: DESTINATION ${package_dir})
if(ANNULUS_BUILD_TOOLS)
  install(TARGETS annulus_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

configure_package_config_file(cmake/annulusConfig.cmake.in annulusConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(annulusConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/annulusConfig.cmake ${PROJECT_BINARY_DIR}/annulusConfigVersion.cmake
  DESTINATION ${package_dir})

# Paths in annulus.pc start at the file itself, so that the installed tree can be moved.
set(pc_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig
  OUTPUT_VARIABLE prefix_from_pc)
set(pc_requires "libhwy, fmt")
if(ANNULUS_EXECUTOR STREQUAL "tbb")
  string(APPEND pc_requires ", tbb")
endif()
configure_file(cmake/annulus.pc.in annulus.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/annulus.pc DESTINATION ${pc_dir})
