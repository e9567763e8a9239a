# pyroute.placement's integer loops: Cython makes a C file of each, the compiler a module.
foreach(name IN ITEMS _packing _moves)
  set(pyx "${CMAKE_CURRENT_SOURCE_DIR}/pyroute/placement/${name}.pyx")
  set(c "${CMAKE_CURRENT_BINARY_DIR}/${name}.c")
  add_custom_command(OUTPUT "${c}" DEPENDS "${pyx}"
    COMMAND "${Python_EXECUTABLE}" -m cython -3 -o "${c}" "${pyx}" COMMENT "Cython ${name}.pyx" VERBATIM)
  Python_add_library(${name} MODULE WITH_SOABI "${c}")
  target_compile_options(${name} PRIVATE -O3 -ffp-contract=off)
  if(CMAKE_LIBRARY_OUTPUT_DIRECTORY) # beside its Python files in a source tree
    set_target_properties(${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/placement")
  endif()
  install(TARGETS ${name} DESTINATION pyroute/placement)
endforeach()
