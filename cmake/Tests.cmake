find_package(GTest REQUIRED)
find_package(rapidcheck REQUIRED)
find_package(Python3 REQUIRED COMPONENTS Interpreter)

# Under a sanitizer a test may divide its rounds and sizes by the scale.
set(test_definitions ANNULUS_TEST_SCALE=1)
if(ANNULUS_SANITIZE)
  set(test_definitions ANNULUS_TEST_SCALE=10 ANNULUS_SANITIZED)
endif()

file(GLOB_RECURSE test_sources CONFIGURE_DEPENDS src/*_test.cc tools/*_test.cc tests/*_test.cc)
foreach(source IN LISTS test_sources)
  cmake_path(GET source STEM test)
  set(namesakes ${test_sources})
  list(FILTER namesakes INCLUDE REGEX "/${test}\\.cc$")
  list(LENGTH namesakes count)
  if(count GREATER 1)
    cmake_path(GET source PARENT_PATH folder)
    cmake_path(GET folder FILENAME folder)
    set(test ${folder}_${test})
  endif()
  add_executable(${test} ${source})
  target_compile_options(${test} PRIVATE ${ANNULUS_WARNINGS})
  target_compile_definitions(${test} PRIVATE ${test_definitions}
    ANNULUS_EXAMPLE_DATA="${PROJECT_SOURCE_DIR}/examples/data")
  target_include_directories(${test} PRIVATE src tests)
  target_link_libraries(${test} PRIVATE annulus GTest::gtest_main fmt::fmt nlohmann_json::nlohmann_json rapidcheck
    PkgConfig::ANNULUS_HWY Threads::Threads)
  # Long ones in two halves, so that two cores share them.
  if(test STREQUAL "grid_test")
    foreach(shard 0 1)
      add_test(NAME ${test}_${shard} COMMAND ${test})
      set_tests_properties(${test}_${shard} PROPERTIES LABELS unit
        ENVIRONMENT "GTEST_TOTAL_SHARDS=2;GTEST_SHARD_INDEX=${shard}")
    endforeach()
    continue()
  endif()
  add_test(NAME ${test} COMMAND ${test})
  set_tests_properties(${test} PROPERTIES LABELS unit)
endforeach()

function(annulus_add_script_test test)
  if(NOT EXISTS ${PROJECT_SOURCE_DIR}/tests/${test}.py)
    return()
  endif()
  add_test(NAME ${test} COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tests/${test}.py ${ARGN} COMMAND_EXPAND_LISTS)
  set_tests_properties(${test} PROPERTIES LABELS script)
endfunction()

annulus_add_script_test(layers_test ${PROJECT_SOURCE_DIR})
if(ANNULUS_BUILD_TOOLS)
  annulus_add_script_test(cli_test $<TARGET_FILE:annulus_cli>)
  annulus_add_script_test(docs_test ${PROJECT_SOURCE_DIR} $<TARGET_FILE:annulus_cli>)
endif()
# Sanitizers put instructions and symbols of their own everywhere, and consumers would have to follow them.
if(NOT ANNULUS_SANITIZE)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    annulus_add_script_test(isolation_test --nm ${CMAKE_NM} --objdump ${CMAKE_OBJDUMP} --source ${PROJECT_SOURCE_DIR}
      $<TARGET_OBJECTS:annulus>)
  endif()
  if(ANNULUS_INSTALL AND ANNULUS_BUILD_TOOLS)
    add_test(NAME install_test COMMAND bash ${PROJECT_SOURCE_DIR}/tests/install_test.sh ${PROJECT_BINARY_DIR}
      ${PROJECT_SOURCE_DIR} ${CMAKE_CXX_COMPILER})
    set_tests_properties(install_test PROPERTIES LABELS script)
  endif()
endif()

get_property(all_tests DIRECTORY PROPERTY TESTS)
set_tests_properties(${all_tests} PROPERTIES TIMEOUT 600)
