# Flags of two kinds of code. Kernels touch no input that was not checked and run for hours: plain optimization. All
# other code of the library reads files and arguments: hardened, and strict about conversions.
include(CheckCXXCompilerFlag)
include(CheckLinkerFlag)
include(CheckPIESupported)

check_pie_supported(LANGUAGES CXX)

# The vector types of kernels never cross the interface that -Wpsabi notes a change of.
set(ANNULUS_WARNINGS -Wall -Wextra -Wshadow -Wno-psabi)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Sees overlaps of 2^63 bytes in "text" + std::string (GCC bug 105651).
  list(APPEND ANNULUS_WARNINGS -Wno-restrict)
endif()
set(ANNULUS_HOST_OPTIONS "")
set(ANNULUS_HOST_LINK_OPTIONS "")

if(ANNULUS_SANITIZE)
  # The checks that sanitizers insert look to GCC like paths that the program may take out of bounds.
  list(APPEND ANNULUS_WARNINGS -Wno-array-bounds)
  add_compile_options(-fsanitize=${ANNULUS_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${ANNULUS_SANITIZE})
else()
  # Undefined first: some distributions set a lower level, and redefining it warns. Without optimization glibc warns.
  list(APPEND ANNULUS_HOST_OPTIONS "$<$<NOT:$<CONFIG:Debug>>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=3>")
  foreach(flag IN ITEMS -fstack-protector-strong -fstack-clash-protection -fcf-protection)
    string(MAKE_C_IDENTIFIER "ANNULUS_HAS${flag}" has)
    check_cxx_compiler_flag(${flag} ${has})
    if(${has})
      list(APPEND ANNULUS_HOST_OPTIONS ${flag})
    endif()
  endforeach()
  check_linker_flag(CXX "-Wl,-z,relro,-z,now" ANNULUS_HAS_RELRO)
  if(ANNULUS_HAS_RELRO)
    list(APPEND ANNULUS_HOST_LINK_OPTIONS "-Wl,-z,relro,-z,now")
  endif()
endif()

function(annulus_library_flags target)
  target_compile_options(${target} PRIVATE ${ANNULUS_WARNINGS})
  get_target_property(sources ${target} SOURCES)
  set(kernels ${sources})
  list(FILTER kernels INCLUDE REGEX "/src/kernels/")
  list(FILTER sources EXCLUDE REGEX "/src/kernels/")
  set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "-Wconversion;${ANNULUS_HOST_OPTIONS}")
  if(NOT ANNULUS_SANITIZE)
    # Some distributions protect by default.
    set_source_files_properties(${kernels} PROPERTIES COMPILE_OPTIONS "-fno-stack-protector;-U_FORTIFY_SOURCE")
  endif()
endfunction()

function(annulus_host_flags target)
  target_compile_options(${target} PRIVATE ${ANNULUS_WARNINGS} ${ANNULUS_HOST_OPTIONS})
  target_link_options(${target} PRIVATE ${ANNULUS_HOST_LINK_OPTIONS})
endfunction()
