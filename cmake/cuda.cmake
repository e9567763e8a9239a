# The CUDA floor: pyroute/_cuda, which is plain C++ and is always built, and the kernels' images, pyroute/_kernels/
# <room>.fatbin, where there is an nvcc. Without one the sources, which are installed too, are compiled by NVRTC on the
# user's machine. CMake's CUDA language is not used: it wants a host compiler that nvcc accepts, and a runtime library.

file(GLOB cuda_sources CONFIGURE_DEPENDS RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}"
  csrc/cuda/*.cpp csrc/cuda/sm90/*.cpp csrc/bindings/cuda/*.cpp)
pybind11_add_module(_cuda MODULE ${cuda_sources})
target_link_libraries(_cuda PRIVATE pyroute_flags ${CMAKE_DL_LIBS})
install(TARGETS _cuda DESTINATION pyroute)

# What NVRTC reads: the kernels and the headers that they include, as they lie in the source tree.
install(DIRECTORY csrc/ DESTINATION pyroute/_kernels/csrc FILES_MATCHING PATTERN "*.cu" PATTERN "*.cuh" PATTERN "*.h"
  PATTERN "cpu" EXCLUDE PATTERN "bindings" EXCLUDE)

if(CMAKE_LIBRARY_OUTPUT_DIRECTORY)
  set(images "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/_kernels") # make dev: beside the sources
else()
  set(images "${CMAKE_CURRENT_BINARY_DIR}/_kernels")
endif()
file(REMOVE "${images}/architectures") # written below: without it nothing that an earlier build left there is used

if(PYROUTE_CUDA STREQUAL "OFF")
  return()
endif()
find_program(PYROUTE_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
if(NOT PYROUTE_NVCC)
  # the nvcc of the build environment's wheels (pyproject.toml: PYROUTE_NVCC_FROM_PYPI)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import nvidia.cu13 as it; print(list(it.__path__)[0], end='')"
    OUTPUT_VARIABLE wheels ERROR_QUIET)
  find_program(PYROUTE_NVCC nvcc PATHS "${wheels}/bin" NO_DEFAULT_PATH)
endif()
if(NOT PYROUTE_NVCC)
  if(PYROUTE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PYROUTE_CUDA=ON, but there is no nvcc")
  endif()
  message(STATUS "pyroute: no nvcc, so the CUDA kernels are left to NVRTC on the user's machine")
  return()
endif()

execute_process(COMMAND "${PYROUTE_NVCC}" --version OUTPUT_VARIABLE nvcc_version)
string(REGEX MATCH "release ([0-9.]+)" nvcc_version "${nvcc_version}")
set(nvcc_version "${CMAKE_MATCH_1}")
execute_process(COMMAND "${PYROUTE_NVCC}" --list-gpu-code OUTPUT_VARIABLE known_to_nvcc ERROR_QUIET)
string(REPLACE "\n" ";" known_to_nvcc "${known_to_nvcc}")
set(archs "")
foreach(arch IN LISTS PYROUTE_CUDA_ARCHS)
  string(REGEX REPLACE "[af]$" "" plain "sm_${arch}") # the list leaves these forms out
  if(plain IN_LIST known_to_nvcc)
    list(APPEND archs ${arch})
  else()
    message(STATUS "pyroute: this nvcc knows no sm_${arch}")
  endif()
endforeach()

# The same flags as pyroute/_device/images.py gives NVRTC; packed, images take a sixth of the space (line tables most).
set(nvcc_flags -fatbin --threads 0 -Xfatbin=-compress-all -O3 -std=c++17 -fmad=false -lineinfo
  -I "${CMAKE_CURRENT_SOURCE_DIR}/csrc" -Xptxas --warn-on-spills,--warn-on-local-memory-usage)
if(PYROUTE_WERROR)
  list(APPEND nvcc_flags -Werror all-warnings)
endif()
set(fatbins "")
file(GLOB kernels CONFIGURE_DEPENDS RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda" csrc/cuda/*.cu csrc/cuda/sm90/*.cu)
foreach(kernel IN LISTS kernels)
  string(REGEX REPLACE "\\.cu$" "" room "${kernel}")
  set(codes "")
  foreach(arch IN LISTS archs)
    if(NOT room MATCHES "^sm90/" OR arch STREQUAL "90a")
      list(APPEND codes -gencode arch=compute_${arch},code=sm_${arch})
    endif()
  endforeach()
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/${kernel}")
  set(fatbin "${images}/${room}.fatbin")
  get_filename_component(folder "${fatbin}" DIRECTORY)
  file(MAKE_DIRECTORY "${folder}")
  if(codes)
    add_custom_command(OUTPUT "${fatbin}"
      COMMAND "${PYROUTE_NVCC}" ${nvcc_flags} ${codes} -MD -MF "${fatbin}.d" -MT "${fatbin}" -o "${fatbin}" "${source}"
      DEPENDS "${source}" DEPFILE "${fatbin}.d" COMMENT "nvcc ${kernel}" VERBATIM)
    list(APPEND fatbins "${fatbin}")
  endif()
endforeach()
add_custom_target(cuda_kernels ALL DEPENDS ${fatbins})
list(TRANSFORM archs PREPEND "sm_" OUTPUT_VARIABLE codes)
list(JOIN codes ", " printed)
message(STATUS "pyroute: nvcc ${nvcc_version} compiles the CUDA kernels for ${printed}, a minute of one core each "
  "(PYROUTE_CUDA=OFF leaves them to NVRTC)")
list(JOIN codes "\n" codes)
file(CONFIGURE OUTPUT "${images}/architectures" CONTENT "cuda ${nvcc_version}\n${codes}\n")
install(DIRECTORY "${images}/" DESTINATION pyroute/_kernels FILES_MATCHING PATTERN "*.fatbin" PATTERN "architectures")
