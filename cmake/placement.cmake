# pyroute.placement._packing: integer loops in Cython, of which the compiler makes one C file.
set(packing_pyx "${CMAKE_CURRENT_SOURCE_DIR}/pyroute/placement/_packing.pyx")
set(packing_c "${CMAKE_CURRENT_BINARY_DIR}/_packing.c")
add_custom_command(OUTPUT "${packing_c}" DEPENDS "${packing_pyx}"
  COMMAND "${Python_EXECUTABLE}" -m cython -3 -o "${packing_c}" "${packing_pyx}" COMMENT "Cython _packing.pyx" VERBATIM)
Python_add_library(_packing MODULE WITH_SOABI "${packing_c}")
target_compile_options(_packing PRIVATE -O3 -ffp-contract=off)
if(CMAKE_LIBRARY_OUTPUT_DIRECTORY) # beside its Python files in a source tree
  set_target_properties(_packing PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/placement")
endif()
install(TARGETS _packing DESTINATION pyroute/placement)
